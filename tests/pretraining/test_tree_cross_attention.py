"""Tree Cross Attention: what is asked, what is read, its three losses, and a run."""

import dataclasses
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.config import load, resolve
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.models.encoder import Encoder
from tokjax.models.stack import StackConfig
from tokjax.pretraining.tree_cross_attention import (
    FullReader,
    LatentReader,
    TreeCrossAttention,
    TreeReader,
    queries_of,
    reinforce,
)
from tokjax.training.config import TrainConfig
from tokjax.training.evaluation import evaluate
from tokjax.training.objective import init_heads
from tokjax.training.run import build_run

V, N, T, M = 12, 8, 15, 8
CONFIG = ModelConfig(
    vocab_size=V, d_model=16, n_layers=1, n_heads=2, d_ff=24, remat="none", causal=False,
    max_positions=T, positions="learned", init_scale=0.5, attention="dense",
)  # fmt: skip
MODEL = Encoder(CONFIG)
KEY = jax.random.key(4)
MEAN = StackConfig(n_layers=0)
OBJECTIVE = TreeCrossAttention(TreeReader(aggregator=MEAN), context=N)


def batch_of(context, answers):
    """Rows of that many context tokens and answers."""
    rows, shape = np.random.default_rng(0).integers(1, V, (3, T + 1)), (len(context), T)
    at = np.arange(T)
    context, answers = np.array(context)[:, None], np.array(answers)[:, None]
    there = at < context + answers - 1
    return Batch(
        tokens=jnp.asarray(np.where(there, rows[:, :-1], 0), jnp.int32),
        targets=jnp.asarray(np.where(there, rows[:, 1:], 0), jnp.int32),
        positions=jnp.asarray(np.where(there, at, 0), jnp.int32),
        segment_ids=jnp.asarray(there, jnp.int32),
        weights=jnp.asarray(there & (at >= context - 1), jnp.float32),
        example_id=jnp.zeros((shape[0], 1), jnp.int32),
    )


# A full row, a short one, an empty one.
BATCH = batch_of([8, 5, 1], [8, 3, 0])
ASKED = queries_of(BATCH, N)
TARGETS = np.asarray(ASKED.targets)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(1)) | init_heads(OBJECTIVE, jax.random.key(2), MODEL)


@pytest.fixture(scope="module")
def losses():
    """A compiled function giving an objective's loss of the batch."""

    def of(objective, params, batch, key):
        return objective.loss(MODEL, params, (), batch, key)

    return jax.jit(of, static_argnums=0)


@pytest.fixture(scope="module")
def read(params):
    """What is read in the loss of the batch, and the logits by it and by the whole."""

    @jax.jit
    def of(params):
        found: Any = OBJECTIVE.read(MODEL, params, BATCH, ASKED, KEY, whole=True)
        scored = [OBJECTIVE.scored(MODEL, params, x) for x in (found.x, found.whole)]
        return found, [jax.nn.log_softmax(x @ head.table.T) for x, head in scored]

    return jax.tree.map(np.asarray, of(params))


@pytest.fixture(scope="module")
def readings():
    """A compiled function giving what a reader's queries read of states."""

    def read(reader, params, queries, states, mask, key, draws):
        return reader.read(CONFIG, params, queries, states, mask, key, draws=draws, whole=True)

    return jax.jit(read, static_argnums=(0, 6))


def test_each_answer_is_asked_for_by_the_position_before_it():
    np.testing.assert_array_equal(ASKED.mask.sum(1), [8, 5, 0])
    assert ASKED.positions.shape == (3, M)
    np.testing.assert_array_equal(ASKED.weights, [[1] * 8, [1] * 3 + [0] * 5, [0] * 8])
    np.testing.assert_array_equal(ASKED.positions[0], np.arange(7, 15))
    np.testing.assert_array_equal(ASKED.positions[1, :3], [4, 5, 6])
    np.testing.assert_array_equal(ASKED.targets[0], BATCH.targets[0, 7:])
    assert float(ASKED.left_out) == 0
    # A context that is too long asks nothing, answers beyond the queries have no place.
    small = queries_of(BATCH, 6, 2)
    np.testing.assert_array_equal(small.weights, [[0, 0], [1, 1], [0, 0]])
    assert float(small.left_out) == 9 and not np.asarray(small.mask)[0].any()


def test_the_loss_is_the_sum_of_its_three_parts(params, losses, read):
    found = losses(OBJECTIVE, params, BATCH, KEY)
    reading, logps = read
    nll = [-np.take_along_axis(a, TARGETS[..., None], -1)[..., 0] for a in logps]
    right = 1.0 * (logps[0].argmax(-1) == TARGETS)
    there = np.asarray(ASKED.weights) > 0
    policy = -right * reading.log_probs - 0.01 * reading.entropy
    assert float(found.weight) == there.sum() == 11
    assert float(found.total) == pytest.approx((nll[0] + nll[1] + policy)[there].sum(), rel=1e-4)
    mean = {name: float(total / weight) for name, (total, weight) in found.metrics.items()}
    assert mean["accuracy"] == pytest.approx(right[there].mean(), rel=1e-5)
    assert mean["whole_nll"] == pytest.approx(nll[1][there].mean(), rel=1e-4)
    assert float(np.log(2)) >= mean["policy_entropy"] > 0
    # Four nodes of the full row; of the short one fewer where its tree has holes.
    assert reading.used[0].tolist() == [4] * M and 3.5 < mean["used"] <= 4


def test_every_parameter_learns(params):
    total = lambda p: OBJECTIVE.loss(MODEL, p, (), BATCH, KEY).total  # noqa: E731
    gradient = jax.jit(jax.grad(total))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path


def test_neither_answers_nor_filling_are_read(params, losses):
    found = losses(OBJECTIVE, params, BATCH, KEY)
    seen = np.zeros((3, T), bool)
    seen[:, :N] = ASKED.mask
    other = jnp.where(seen, BATCH.tokens, (BATCH.tokens + 5) % V)
    changed = losses(OBJECTIVE, params, dataclasses.replace(BATCH, tokens=other), KEY)
    assert float(changed.total) == float(found.total)
    moved = dataclasses.replace(BATCH, tokens=BATCH.tokens.at[0, 3].add(-1))
    assert float(losses(OBJECTIVE, params, moved, KEY).total) != float(found.total)


def test_evaluation_draws_nothing_and_is_the_answers_loss_alone(params, losses):
    own = OBJECTIVE.evaluates
    first = losses(own, params, BATCH, KEY)
    second = losses(own, params, BATCH, jax.random.key(9))
    assert float(first.total) == float(second.total) == float(first.metrics["nll"][0])
    assert "whole_nll" not in first.metrics
    answers, asked = jax.jit(lambda p: OBJECTIVE.answers(MODEL, p, BATCH))(params)
    right = (answers == asked.targets) & (asked.weights > 0)
    assert float(first.metrics["accuracy"][0]) == right.sum()


def states_of(rows=2, tokens=N, queries=5, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    queries = jax.random.normal(keys[0], (rows, queries, CONFIG.d_model))
    return queries, jax.random.normal(keys[1], (rows, tokens, CONFIG.d_model))


@pytest.mark.parametrize(("branching", "tokens"), [(6, 6), (2, 1)])
def test_a_root_with_all_tokens_below_it_is_cross_attention(readings, branching, tokens):
    reader, mask = TreeReader(branching, MEAN), jnp.ones((2, tokens), bool).at[1, 4:].set(False)
    params = reader.init(jax.random.key(0), CONFIG, tokens)
    queries, states = states_of(tokens=tokens)
    found = readings(reader, params, queries, states, mask, KEY, True)
    plain = readings(FullReader(), params, queries, states, mask, KEY, True)
    np.testing.assert_allclose(found.x, plain.x, atol=1e-5)
    np.testing.assert_allclose(found.whole, plain.x, atol=1e-5)
    np.testing.assert_array_equal(found.used, plain.used)
    assert found.path.shape[-1] == 0 and not np.asarray(found.log_probs).any()
    assert reader.budget(tokens) == tokens


TREE = TreeReader(2, MEAN, bptt=True)


def test_the_whole_is_cross_attention_to_each_token_once(readings):
    params = TREE.init(jax.random.key(0), CONFIG, 6)
    queries, states = states_of(tokens=6)
    mask = jnp.ones((2, 6), bool).at[1, 1:3].set(False)
    found = readings(TREE, params, queries, states, mask, KEY, True)
    plain = readings(FullReader(), params, queries, states, mask, KEY, True)
    np.testing.assert_allclose(found.whole, plain.x, atol=1e-5)
    assert np.abs(found.x - plain.x).max() > 1e-3
    # What is not there has no influence, and another order of all tokens changes no whole.
    other = readings(
        TREE, params, queries, jnp.where(mask[..., None], states, 9.0), mask, KEY, True
    )
    np.testing.assert_array_equal(found.x, other.x)
    ordered = dataclasses.replace(TREE, order="coordinate", coordinate=3)
    by_value = readings(ordered, params, queries, states, mask, KEY, True)
    np.testing.assert_allclose(by_value.whole, plain.x, atol=1e-5)
    assert np.abs(by_value.x - found.x).max() > 1e-3
    mixed = np.array([4, 2, 0, 5, 1, 3])
    again = readings(ordered, params, queries, states[:, mixed], mask[:, mixed], KEY, True)
    np.testing.assert_allclose(again.x, by_value.x, atol=1e-5)
    far = dataclasses.replace(TREE, order="coordinate", coordinate=16)
    with pytest.raises(ConfigError, match="coordinate=16"):
        far.tree(CONFIG, params, states, mask)


def test_the_estimator_is_right_on_average_and_choices_pass_no_gradient():
    """Enumerated over all paths of two choices."""
    tokens, depth = 5, 2
    paths = jnp.asarray(list(itertools.product(range(2), repeat=depth)))[None]
    params = TREE.init(jax.random.key(0), CONFIG, tokens)
    query, states = states_of(1, tokens, 1)
    mask, readout = jnp.ones((1, tokens), bool), jnp.arange(16.0)
    rewards = jnp.array([0.3, -1.0, 2.0, 0.1])

    def read(query, states, path, key) -> Any:
        queries = jnp.broadcast_to(query, (1, 4, 16))
        return TREE.read(CONFIG, params, queries, states, mask, key, path=path)

    def expected(query, states):
        return (jnp.exp(read(query, states, paths, KEY).log_probs) * rewards).sum()

    def estimated(query, states):
        found = read(query, states, paths, KEY)
        pi = jax.lax.stop_gradient(jnp.exp(found.log_probs))
        return (pi * reinforce(found.log_probs, found.entropy, rewards, 0.7, 0.0)).sum()

    def task(query, states, path, key):
        found = read(query, states, path, key)
        return (found.x @ readout).sum(), found.path

    both = (0, 1)

    @jax.jit
    def run(query, states):
        exact = jax.grad(expected, both)(query, states)
        mean = jax.grad(estimated, both)(query, states)
        drawn, path = jax.grad(task, both, has_aux=True)(query, states, None, KEY)
        forced, _ = jax.grad(task, both, has_aux=True)(query, states, path, KEY)
        return exact, mean, drawn, forced

    exact, mean, drawn, forced = run(query, states)
    for a, b in zip(exact, mean, strict=True):
        assert np.abs(a).max() > 1e-3
        np.testing.assert_allclose(b, -a, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, drawn, forced)


def test_a_reward_at_its_baseline_teaches_the_entropy_alone():
    log_probs, entropy = jnp.array([-0.5, -2.0]), jnp.array([0.3, 0.6])

    def total(log_probs, entropy, reward):
        return reinforce(log_probs, entropy, reward, -np.log(10), 0.25).sum()

    same = jnp.full(2, -np.log(10), jnp.float32)
    by_choice, by_entropy, by_reward = jax.grad(total, (0, 1, 2))(log_probs, entropy, same)
    assert by_choice.tolist() == by_reward.tolist() == [0, 0]
    assert by_entropy.tolist() == [-0.25, -0.25]
    above = jax.grad(total)(log_probs, entropy, same + jnp.array([1.0, -2.0]))
    np.testing.assert_allclose(above, [-1, 2], atol=1e-6)


def test_the_likelihood_as_reward_is_measured_against_a_guess(params, losses, read):
    objective = dataclasses.replace(
        OBJECTIVE, reward="likelihood", classes=10, whole_weight=0.0, entropy_weight=0.0
    )
    found = losses(objective, params, BATCH, KEY)
    reading, logps = read
    nll = -np.take_along_axis(logps[0], TARGETS[..., None], -1)[..., 0]
    each = nll - (-nll + np.log(10)) * reading.log_probs
    there = np.asarray(ASKED.weights) > 0
    assert float(found.total) == pytest.approx(each[there].sum(), rel=1e-4)


def test_controls_go_anywhere_in_tests_too(readings):
    params = TREE.init(jax.random.key(0), CONFIG, N)
    queries, states = states_of(40, queries=10)
    mask = jnp.ones((40, N), bool)
    keys = jax.random.split(KEY)
    found = {
        control: [
            readings(
                dataclasses.replace(TREE, control=control), params, queries, states, mask, k, False
            )
            for k in keys
        ]
        for control in ("none", "random_path", "exchanged")
    }
    for control, (first, second) in found.items():
        same = (first.path == second.path).all(-1).mean()
        assert (same == 1) == (control == "none"), control
    # Two fair choices of two.
    path = np.asarray(found["random_path"][0].path)
    assert np.abs(path.mean((0, 1)) - 0.5).max() < 5 * 0.5 / np.sqrt(400)
    np.testing.assert_allclose(found["random_path"][0].log_probs, -2 * np.log(2), atol=1e-5)
    # With siblings exchanged, the leaf that is reached is the one that was looked for as often as
    # by chance: a quarter of the rows.
    right, reached = (np.asarray(found[c][0].path) for c in ("none", "exchanged"))
    hits = (right == reached).all(-1).mean(1)
    assert 0.1 < hits.mean() < 0.45
    # Leaves stay, and all of them are read as before.
    np.testing.assert_array_equal(found["exchanged"][0].whole, found["none"][0].whole)


def test_latents_are_as_many_as_the_tree_reads_and_see_what_is_there(readings):
    reader = LatentReader(among=StackConfig(1))
    assert reader.budget(1000) == 11 and LatentReader(3).budget(1000) == 3
    params = reader.init(jax.random.key(0), CONFIG, N)
    assert params["latents"].shape == (4, 16)
    queries, states = states_of()
    mask = jnp.ones((2, N), bool).at[1, 3:].set(False)
    found = readings(reader, params, queries, states, mask, KEY, True)
    assert (found.used == 4).all() and found.log_probs is None
    other = readings(
        reader, params, queries, jnp.where(mask[..., None], states, 9), mask, KEY, True
    )
    np.testing.assert_array_equal(found.x, other.x)
    moved = readings(reader, params, queries, states.at[:, 0].add(1.0), mask, KEY, True)
    assert np.abs(moved.x - found.x).max() > 1e-4


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TreeCrossAttention(context=0), "context=0"),
        (lambda: TreeCrossAttention(policy_weight=-1.0), "policy_weight=-1.0"),
        (lambda: TreeCrossAttention(queries=0), "queries=0"),
        (lambda: TreeCrossAttention(reward="acuracy"), "accuracy"),  # type: ignore[arg-type]
        (lambda: TreeCrossAttention(context=1 << 16), "leaves=65536"),
        (lambda: TreeReader(1), "branching=1"),
        (lambda: TreeReader(order="sequences"), "sequence"),  # type: ignore[arg-type]
        (lambda: TreeReader(control="random"), "random_path"),  # type: ignore[arg-type]
        (lambda: LatentReader(0), "latents=0"),
        (lambda: LatentReader(among=StackConfig(1, d_model=8)), "d_model=8"),
        (lambda: queries_of(BATCH, 16), "rows of 15 tokens"),
        (
            lambda: queries_of(
                dataclasses.replace(BATCH, example_id=jnp.zeros((3, 2), jnp.int32)), N
            ),
            "packing='none'",
        ),
        (lambda: loss_of(Transformer(dataclasses.replace(CONFIG, causal=True))), "causal=False"),
        (lambda: loss_of(Encoder(dataclasses.replace(CONFIG, positions="none"))), "'learned'"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def loss_of(model):
    return OBJECTIVE.loss(model, {}, (), BATCH, KEY)


def test_held_out_rows_of_a_run_are_asked_backwards_and_evaluated(tmp_path):
    tree = load("configs/tree_cross_attention.py:context=8,layers=1,steps=2").to_dict()
    source = tree["data"]["evals"]["validation"] | {"examples": 8}
    tree["data"] |= {
        "cache_dir": str(tmp_path),
        "train": [{"source": source}],
        "evals": {"validation": source},
        "batch_size": 4,
    }
    run = build_run(resolve(TrainConfig, tree), devices=jax.devices()[:1], show_progress=False)
    objective: Any = run.stages[-1].objective
    params = run.model.init(jax.random.key(0))
    params |= init_heads(objective, jax.random.key(1), run.model)
    found = evaluate(run, params, 1)
    assert found["eval/validation/used"] == 4 and found["eval/validation/share"] == 0.5
    assert found["eval/validation/left_out"] == 0
    batch = jax.tree.map(jnp.asarray, run.eval_loaders["validation"].batch(0))
    answers, asked = jax.jit(partial(objective.answers, run.model))(params, batch)
    assert np.asarray(asked.weights).all() and answers.shape == (4, 8)
    # The targets are the context backwards, and the token that ends it all.
    np.testing.assert_array_equal(asked.targets[:, :-1], batch.tokens[:, 7:0:-1])
    np.testing.assert_array_equal(asked.targets[:, -1], batch.tokens[:, 0])
    accuracy = (np.asarray(answers) == np.asarray(asked.targets)).mean()
    assert found["eval/validation/accuracy"] == pytest.approx(accuracy, abs=1e-6)
