"""The objective of Q-Tuning, with labels masked and with tokens dropped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tokjax.config import registered_name
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.finetuning.q_tuning import QTuning
from tokjax.finetuning.sft import SFT, forward, target_stats
from tokjax.models import ModelConfig, Transformer
from tokjax.parallel.mesh import MeshConfig, build_mesh
from tokjax.parallel.rules import BATCH_AXES
from tokjax.pretraining.next_token import NextToken
from tokjax.training.optimizers import Constant
from tokjax.training.state import init_state, state_shardings
from tokjax.training.step import StepConfig, make_train_step

V, T = 23, 24
CONFIG = ModelConfig(
    vocab_size=V, d_model=16, n_layers=2, n_heads=2, d_ff=24, init_scale=0.7, remat="none"
)
MODEL = Transformer(CONFIG)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(1))


def batch_of(rows, samples):
    """A batch of rows of (prompt, answer) lengths, with `samples` places for samples in a row."""
    rng = np.random.default_rng(sum(a + b for row in rows for a, b in row))
    shape = (len(rows), T)
    ints = {n: np.zeros(shape, np.int32) for n in ("tokens", "targets", "positions", "segment_ids")}
    weights, ids = np.zeros(shape, np.float32), np.full((len(rows), samples), -1, np.int32)
    number = 0
    for r, row in enumerate(rows):
        start = 0
        for s, (prompt, answer) in enumerate(row):
            tokens = rng.integers(1, V, prompt + answer)
            span = slice(start, start + len(tokens) - 1)
            ints["tokens"][r, span], ints["targets"][r, span] = tokens[:-1], tokens[1:]
            ints["positions"][r, span] = np.arange(len(tokens) - 1)
            ints["segment_ids"][r, span] = s + 1
            weights[r, start + prompt - 1 : start + len(tokens) - 1] = rng.uniform(0.5, 2, answer)
            ids[r, s] = number
            number, start = number + 1, start + len(tokens) - 1
    arrays = {name: jnp.asarray(a) for name, a in ints.items()}
    return Batch(**arrays, weights=jnp.asarray(weights), example_id=jnp.asarray(ids))


def single(seed=0):
    """Eight rows of one sample each; the last two short, one with an answer of one token."""
    rng = np.random.default_rng(seed)
    rows = [[(int(rng.integers(2, 6)), int(rng.integers(6, 17)))] for _ in range(6)]
    return batch_of([*rows, [(3, 1)], [(2, 3)]], 1)


def packed():
    """Eight rows of up to three samples; one row is filling."""
    rows = [[(2, 9), (3, 10)], [(4, 18)], [(3, 5), (2, 4), (4, 7)], [(2, 20)]]
    return batch_of([*rows, [], [(2, 6), (5, 9)], [(3, 12)], [(2, 4), (2, 5), (2, 6)]], 3)


_COMPILED = {}


def loss_and_gradient(objective, params, batch):
    if objective not in _COMPILED:

        def total(params, batch):
            loss = objective.loss(MODEL, params, (), batch, jax.random.key(0))
            return loss.total, loss

        _COMPILED[objective] = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, loss), gradient = _COMPILED[objective](params, batch)
    return loss, gradient


@jax.jit
def _stats(params, batch):
    out = forward(MODEL, params, batch)
    return target_stats(out, MODEL.head(params), batch, ("nll", "entropy"))


def decisions_of(objective, params, batch):
    return jax.tree.map(np.asarray, jax.jit(objective.decide)(_stats(params, batch), batch))


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def close(found, expected, rtol=1e-5, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), found, expected)


def share(loss, name):
    total, weight = loss.metrics[name]
    return float(total / weight)


BATCHES = pytest.mark.parametrize("make", [single, packed])
MASK = QTuning(sample_ratio=0.5)
DROP = dataclasses.replace(MASK, mode="drop")
ALL = QTuning(sample_ratio=1.0, token_ratio=1.0)


# --- nothing pruned ---


@BATCHES
def test_oracle_4_keeping_everything_is_plain_sft_exactly(params, make):
    batch = make()
    loss, gradient = loss_and_gradient(ALL, params, batch)
    for plain in (NextToken(), SFT()):
        expected, expected_gradient = loss_and_gradient(plain, params, batch)
        equal((loss.total, gradient), (expected.total, expected_gradient))
        close(loss.weight, expected.weight, 1e-6)
        close(share(loss, "nll"), share(expected, "nll"), 1e-6)
    for name in ("kept_samples", "kept_tokens"):
        assert share(loss, name) == 1.0


@BATCHES
def test_dropping_nothing_is_plain_sft_to_rounding(params, make):
    batch = make()
    loss, gradient = loss_and_gradient(dataclasses.replace(ALL, mode="drop"), params, batch)
    expected, expected_gradient = loss_and_gradient(NextToken(), params, batch)
    close((loss.total, loss.weight), (expected.total, expected.weight))
    close(gradient, expected_gradient, 1e-4, 1e-4)


# --- what is trained on ---


@BATCHES
def test_masked_loss_is_that_of_the_kept_tokens_in_their_context(params, make):
    batch = make()
    loss, gradient = loss_and_gradient(MASK, params, batch)
    tokens = decisions_of(MASK, params, batch).tokens
    masked = dataclasses.replace(batch, weights=batch.weights * tokens)
    expected, expected_gradient = loss_and_gradient(NextToken(), params, masked)
    close((loss.total, loss.weight), (expected.total, expected.weight), 1e-6)
    close(gradient, expected_gradient, 1e-5, 1e-6)
    assert 0 < tokens.sum() < np.count_nonzero(batch.weights)


def deleted(batch, decisions):
    """Each kept sample as a row of its own, made by deleting tokens from a list."""
    rows = []
    for r in range(batch.tokens.shape[0]):
        for s in range(batch.example_id.shape[1]):
            if not decisions.samples.keep[r, s]:
                continue
            at = np.flatnonzero(np.asarray(batch.segment_ids[r]) == s + 1)
            tokens, weights = [int(batch.tokens[r, at[0]])], [0.0]
            for t in at:
                if batch.weights[r, t] == 0 or decisions.tokens[r, t]:
                    tokens.append(int(batch.targets[r, t]))
                    weights.append(float(batch.weights[r, t]))
            rows.append((tokens, weights))
    shape = (len(rows), T)
    ints = np.zeros((4, *shape), np.int32)
    w = np.zeros(shape, np.float32)
    for r, (tokens, weights) in enumerate(rows):
        n = len(tokens) - 1
        ints[0, r, :n], ints[1, r, :n] = tokens[:-1], tokens[1:]
        ints[2, r, :n], ints[3, r, :n], w[r, :n] = np.arange(n), 1, weights[1:]
    ids = jnp.zeros((len(rows), 1), jnp.int32)
    return Batch(*map(jnp.asarray, ints), weights=jnp.asarray(w), example_id=ids)


@BATCHES
def test_dropped_loss_is_that_of_samples_without_the_pruned_tokens(params, make):
    batch = make()
    loss, gradient = loss_and_gradient(DROP, params, batch)
    decisions = decisions_of(DROP, params, batch)
    expected, expected_gradient = loss_and_gradient(NextToken(), params, deleted(batch, decisions))
    close((loss.total, loss.weight), (expected.total, expected.weight))
    close(gradient, expected_gradient, 1e-4, 1e-4)
    assert share(loss, "trained_positions") < 1


def test_both_modes_decide_the_same(params):
    batch = single()
    (mask, _), (drop, _) = (loss_and_gradient(o, params, batch) for o in (MASK, DROP))
    for name in ("kept_samples", "kept_tokens", "supplemented", "level", "q2", "q4", "nll"):
        close(share(mask, name), share(drop, name), 1e-6)
    assert share(mask, "kept_samples") == 0.5
    close(mask.weight, drop.weight, 1e-6)


def test_metrics_tell_the_decisions(params):
    batch = packed()
    loss, _ = loss_and_gradient(MASK, params, batch)
    found = decisions_of(MASK, params, batch)
    exist = np.asarray(batch.example_id) >= 0
    assert share(loss, "kept_samples") == np.float32(6 / 13)
    assert found.samples.keep.sum() == 6 and exist.sum() == 13
    assert not (found.samples.keep & ~exist).any()
    answers = np.asarray(batch.weights) != 0
    close(share(loss, "kept_tokens"), found.tokens.sum() / answers.sum(), 1e-6)
    close(share(loss, "supplemented"), found.samples.supplemented.sum() / 6, 1e-6)
    assert [share(loss, f"q{i}") for i in (1, 2, 3, 4)] == found.samples.counts.tolist()
    assert share(loss, "level") == found.samples.level


def test_tokens_are_pruned_in_q2_only(params):
    batch = packed()
    found = decisions_of(MASK, params, batch)
    segments, answers = np.asarray(batch.segment_ids), np.asarray(batch.weights) != 0
    seen = set()
    for r, s in np.argwhere(found.samples.keep):
        of_sample = answers[r] & (segments[r] == s + 1)
        kept, quadrant = found.tokens[r][of_sample].sum(), int(found.samples.quadrant[r, s])
        n = of_sample.sum()
        assert kept == (max(n // 2, 1) if quadrant == 2 else n)
        seen.add(quadrant)
    assert seen == {2, 4}


@pytest.mark.parametrize("objective", [MASK, DROP], ids=["mask", "drop"])
def test_the_order_of_rows_changes_nothing(params, objective):
    batch = single()
    order = np.random.default_rng(3).permutation(8)
    shuffled = jax.tree.map(lambda a: a[order], batch)
    one, two = (loss_and_gradient(objective, params, b) for b in (batch, shuffled))
    close((one[0].total, one[0].metrics), (two[0].total, two[0].metrics))
    close(one[1], two[1], 1e-4, 1e-4)
    before, after = (decisions_of(objective, params, b) for b in (batch, shuffled))
    equal(before.tokens[order], after.tokens)
    equal(before.samples.quadrant[order], after.samples.quadrant)


# --- limits ---


@pytest.mark.parametrize("objective", [MASK, DROP], ids=["mask", "drop"])
def test_a_batch_without_answers_has_no_loss(params, objective):
    batch = single()
    for empty in (
        dataclasses.replace(batch, weights=jnp.zeros_like(batch.weights)),
        batch_of([[]] * 8, 1),
    ):
        loss, gradient = loss_and_gradient(objective, params, empty)
        assert float(loss.total) == float(loss.weight) == 0.0
        assert all(not np.asarray(g).any() for g in jax.tree.leaves(gradient))
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(loss.metrics))


@pytest.mark.parametrize("mode", ["mask", "drop"])
def test_a_single_sample_is_trained_whole(params, mode):
    batch = jax.tree.map(lambda a: a[:1], single())
    objective = QTuning(sample_ratio=0.25, mode=mode)
    loss, gradient = loss_and_gradient(objective, params, batch)
    expected, expected_gradient = loss_and_gradient(NextToken(), params, batch)
    close((loss.total, loss.weight), (expected.total, expected.weight))
    close(gradient, expected_gradient, 1e-4, 1e-4)


@pytest.mark.parametrize("mode", ["mask", "drop"])
def test_equal_samples_keep_the_first_ones_whole(params, mode):
    batch = jax.tree.map(lambda a: jnp.repeat(a[:1], 8, axis=0), single())
    found = decisions_of(QTuning(sample_ratio=0.25), params, batch)
    assert np.flatnonzero(found.samples.keep[:, 0]).tolist() == [0, 1]
    assert (found.samples.quadrant[:2] == 4).all()
    loss, _ = loss_and_gradient(QTuning(sample_ratio=0.25, mode=mode), params, batch)
    expected, _ = loss_and_gradient(NextToken(), params, batch)
    close(4 * loss.total, expected.total)


def test_answers_of_one_token_are_kept_whole(params):
    batch = batch_of([[(4, 1)]] * 8, 1)
    objective = QTuning(sample_ratio=1.0, token_ratio=0.5)
    found = decisions_of(objective, params, batch)
    equal(found.tokens, np.asarray(batch.weights) != 0)
    loss, gradient = loss_and_gradient(objective, params, batch)
    equal(
        (loss.total, gradient),
        (lambda f: (f[0].total, f[1]))(loss_and_gradient(NextToken(), params, batch)),
    )


def test_what_decides_carries_no_gradient(params):
    """The gradient is that of the kept tokens alone: decisions and statistics are constants."""
    batch = single()
    stats = _stats(params, batch)

    def entropy(params):
        out = forward(MODEL, params, batch)
        return sum(
            a.sum() for a in target_stats(out, MODEL.head(params), batch, tuple(stats)).values()
        )

    gradient = jax.jit(jax.grad(entropy))(params)
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(gradient))


# --- in the training step ---


def settings(**changes):
    base = {"peak_lr": 0.5, "schedule": Constant(), "first_step": 0, "stage_steps": 10}
    return StepConfig(**(base | changes))


def stepped(objective, batch, mesh=None, **changes):
    """The state and metrics behind one step of gradient descent."""
    optimizer = optax.sgd(1.0)
    make = lambda: init_state(MODEL, objective, optimizer, 0, False)  # noqa: E731
    step = make_train_step(MODEL, objective, optimizer, settings(**changes))
    if mesh is None:
        return jax.jit(step)(make(), batch)
    with jax.set_mesh(mesh):
        layout = state_shardings(jax.eval_shape(make), MODEL, mesh)
        rows = NamedSharding(mesh, P(BATCH_AXES, "sequence"))
        ids = NamedSharding(mesh, P(BATCH_AXES))
        placed = {
            f.name: jax.device_put(getattr(batch, f.name), ids if f.name == "example_id" else rows)
            for f in dataclasses.fields(batch)
            if f.name not in ("channels", "values", "group")
        }
        state = jax.jit(make, out_shardings=layout)()
        return jax.jit(step, out_shardings=(layout, None))(state, Batch(**placed))


@pytest.mark.parametrize(
    ("mode", "mesh", "make"),
    [
        ("mask", {"data": 4, "fsdp": 2}, single),
        ("drop", {"data": 4, "fsdp": 2}, single),
        ("drop", {"data": 2, "fsdp": 2, "tensor": 2}, packed),
    ],
    ids=["mask-data", "drop-data", "drop-tensor"],
)
def test_a_mesh_decides_and_trains_like_one_device(mode, mesh, make):
    objective = QTuning(sample_ratio=0.5, mode=mode)
    batch = make()
    one, metrics = stepped(objective, batch)
    many, of_many = stepped(objective, batch, build_mesh(MeshConfig(**mesh)))
    for name in ("kept_samples", "kept_tokens", "supplemented", "level", "q2", "q4"):
        assert float(metrics[name]) == float(of_many[name]), name
    close(metrics["loss"], of_many["loss"])
    close(one.params, many.params, 1e-4, 1e-4)


@pytest.mark.parametrize("mode", ["mask", "drop"])
def test_micro_batches_are_pruned_each_for_itself(mode):
    objective = QTuning(sample_ratio=0.5, mode=mode)
    batch = single()
    params = init_state(MODEL, objective, optax.sgd(1.0), 0, False).params
    _, metrics = stepped(objective, batch, micro_batches=2)
    # Row i belongs to part i mod 2.
    parts = [jax.tree.map(lambda a, k=k: a[k::2], batch) for k in (0, 1)]
    losses = [loss_and_gradient(objective, params, part)[0] for part in parts]
    expected = sum(loss.total for loss in losses) / sum(loss.weight for loss in losses)
    close(metrics["loss"], expected)
    assert float(metrics["kept_samples"]) == 0.5


def test_frozen_parameters_get_no_gradient(params):
    """As a base beside its adapters has none: the gradient is the same, with fewer products."""
    batch = single()

    def total(moving, fixed, batch):
        loss = DROP.loss(MODEL, {**fixed, **moving}, (), batch, jax.random.key(0))
        return loss.total

    moving = {"norm": params["norm"]}
    fixed = {name: value for name, value in params.items() if name != "norm"}
    value, gradient = jax.jit(jax.value_and_grad(total))(moving, fixed, batch)
    loss, full = loss_and_gradient(DROP, params, batch)
    close(value, loss.total)
    close(gradient["norm"], full["norm"], 1e-4, 1e-4)
    products = lambda f, *a: str(jax.make_jaxpr(jax.grad(f))(*a)).count("dot_general")  # noqa: E731
    everything = products(lambda p, b: total(p, {}, b), params, batch)
    assert products(total, moving, fixed, batch) < everything


# --- configuration ---


def test_the_objective_is_found_by_name():
    assert registered_name(QTuning) == "q_tuning"
    assert QTuning().tokens_per_position == 1


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"sample_ratio": 0.0}, r"sample_ratio=0\.0 must be above 0"),
        ({"token_ratio": 1.5}, r"token_ratio=1\.5"),
        ({"neighbor_weight": -0.1}, r"neighbor_weight=-0\.1"),
        ({"iterations": 0}, "iterations=0"),
        ({"mode": "delete"}, "unknown mode='delete'.*drop"),
        ({"neighbor": "avg"}, "unknown neighbor='avg'"),
        ({"supplement": "both"}, "unknown supplement='both'.*by_side"),
        ({"supplement_scale": "ranks"}, "unknown supplement_scale='ranks'.*rank"),
    ],
    ids=str,
)
def test_impossible_settings_are_named(field, message):
    with pytest.raises(ConfigError, match=message):
        QTuning(**field)
