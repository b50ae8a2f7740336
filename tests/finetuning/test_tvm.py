"""The objective of values: what is read where, its averages, and a run from records to a scorer."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokjax.config import resolve
from tokjax.data.batch import Batch
from tokjax.data.prepare import ensure_store
from tokjax.data.store import TokenStore
from tokjax.decoding.search import value_scorer
from tokjax.errors import ConfigError
from tokjax.finetuning.sft import SFT
from tokjax.finetuning.tvm import TVM
from tokjax.models import ModelConfig, Transformer
from tokjax.models.scalar_head import scalar_head
from tokjax.selection.tvm import prefix_values, write_prefix_values
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.metrics import read_metrics
from tokjax.training.optimizers import Constant
from tokjax.training.run import build_run
from tokjax.training.state import init_state
from tokjax.training.step import StepConfig, make_train_step
from tokjax.training.trained import load_trained

MODEL = Transformer(ModelConfig(vocab_size=24, d_model=16, n_layers=1, n_heads=2, max_positions=32))
KEY = jax.random.key(0)
LENGTHS = [[7, 5, 3], [9, 7], [16], [3, 4, 9]]  # inputs of the samples in four rows
VALUE = TVM()


@pytest.fixture(scope="module")
def params():
    found = jax.tree.map(lambda a: 2 * a, MODEL.init(jax.random.key(0)))
    return {**found, "heads": VALUE.init_heads(jax.random.key(1), MODEL)}


def samples():
    """Each sample's ids, its weights as targets, and labels of its tokens."""
    rng = np.random.default_rng(0)
    found = []
    for row in LENGTHS:
        for n in row:
            weights = rng.choice([0.5, 1.0, 2.0]) * rng.choice([-1.0, 1.0]) * np.ones(n + 1)
            weights[:2] = 0.0  # the prompt
            found.append((rng.integers(0, 24, n + 1), weights, rng.uniform(size=n + 1)))
    return found


def packed(given, rows=LENGTHS, width=16):
    """The samples as a batch, those of one entry of `rows` in a row."""
    B, S = len(rows), max(map(len, rows))
    ints = lambda: np.zeros((B, width), np.int32)  # noqa: E731
    tokens, targets, positions, segments = (ints() for _ in range(4))
    weights, values = np.zeros((B, width), np.float32), np.zeros((B, width), np.float32)
    examples, rest = np.full((B, S), -1, np.int32), iter(enumerate(given))
    for b, row in enumerate(rows):
        at = 0
        for s, n in enumerate(row):
            number, (ids, weight, label) = next(rest)
            own = slice(at, at + n)
            tokens[b, own], targets[b, own] = ids[:-1], ids[1:]
            positions[b, own], segments[b, own] = np.arange(n), s + 1
            weights[b, own], values[b, own] = weight[1:], label[1:]
            examples[b, s] = number
            at += n
    return Batch(tokens, targets, positions, segments, weights, examples, {"value": values})  # type: ignore[arg-type]


@functools.cache
def graded(objective):
    """The compiled function (params, batch) -> (loss, gradient of its sum)."""

    def total(params, batch):
        loss = objective.loss(MODEL, params, (), batch, KEY)
        return loss.total, loss

    return jax.jit(jax.value_and_grad(total, has_aux=True))


@jax.jit
def read(params, tokens):
    x = MODEL.backbone(params, MODEL.embed(params, tokens)).x
    return scalar_head(params["heads"]["value"], x)[0, :, 0]


def values_of(params, ids):
    """The head's number behind each token of one sequence, by a pass of its own."""
    row = np.zeros((1, 24), np.int32)
    row[0, : len(ids)] = ids
    return np.asarray(read(params, row), np.float64)[: len(ids)]


def close(found, expected, tolerance=1e-5):
    def near(a, b):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) + 1e-7

    jax.tree.map(near, jax.device_get(found), jax.device_get(expected))


# ---- what is read, and averaged


@pytest.mark.parametrize("kind", ["mse", "bce"])
@pytest.mark.parametrize("norm", ["sequence", "token"])
def test_packed_rows_equal_each_solution_read_to_its_end_token(params, kind, norm):
    given = samples()
    sums, sizes = [], []
    for ids, weights, label in given:
        f = values_of(params, ids)
        if kind == "mse":
            error = (f - label) ** 2
        else:
            error = np.logaddexp(0, f) - label * f
        sums.append((np.abs(weights) * error).sum())
        sizes.append(np.abs(weights).sum())
    sums, sizes = np.array(sums), np.array(sizes)
    expected = (sums / sizes, len(sums)) if norm == "sequence" else (sums, sizes.sum())
    (total, loss), _ = graded(TVM(kind=kind, norm=norm))(params, packed(given))
    np.testing.assert_allclose(total, expected[0].sum(), rtol=1e-5)
    np.testing.assert_allclose(loss.weight, expected[1], rtol=1e-6)


def test_metrics_compare_values_with_labels_and_outcomes(params):
    given = samples()
    (_, loss), _ = graded(VALUE)(params, packed(given))
    weights = np.concatenate([w for _, w, _ in given])
    f = np.concatenate([values_of(params, ids) for ids, _, _ in given])
    labels = np.concatenate([label for _, _, label in given])
    mean = lambda v: (np.abs(weights) * v).sum() / np.abs(weights).sum()  # noqa: E731
    found = {name: float(a / b) for name, (a, b) in loss.metrics.items()}
    assert set(found) == {"value", "label", "brier", "value_loss"}
    np.testing.assert_allclose(found["value"], mean(f), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["label"], mean(labels), rtol=1e-5)
    np.testing.assert_allclose(found["brier"], mean((f - (weights > 0)) ** 2), rtol=1e-5)
    np.testing.assert_allclose(found["value_loss"], loss.total / loss.weight)


@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_one_solution_a_problem_is_outcome_supervision_bit_for_bit(params, kind):
    given = [
        (ids, w, np.concatenate([[0, 0], prefix_values([ids[2:]], [w[-1] > 0]).values[0]]))
        for ids, w, _ in samples()
    ]
    one = graded(TVM(kind=kind))(params, packed(given))
    two = graded(TVM(kind=kind, channel=None))(params, packed(given))
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize(("kind", "norm"), [("mse", "sequence"), ("bce", "token")])
def test_a_batch_with_all_solutions_of_a_problem_has_the_gradient_of_outcomes(params, kind, norm):
    rng = np.random.default_rng(1)
    paths = rng.integers(0, 2, (8, 5))  # many share their beginnings
    right = rng.integers(0, 2, 8)
    labels = prefix_values(paths, right).values
    given = [
        (np.concatenate([[20, 21, 22], p]), sign * np.array([0, 0, 0] + [1] * 5), [0, 0, 0, *own])
        for p, sign, own in zip(paths, 2 * right - 1, labels, strict=True)
    ]
    batch = packed(given, rows=[[7, 7]] * 4)
    (one, _), by_prefix = graded(TVM(kind=kind, norm=norm))(params, batch)
    (two, _), by_outcome = graded(TVM(kind=kind, norm=norm, channel=None))(params, batch)
    if kind == "mse":
        assert one < two - 0.5  # the same gradient of another loss
    close(by_prefix, by_outcome, 1e-4)
    # Half of the solutions are not the whole problem.
    half = batch.replace(weights=batch.weights * (np.arange(4) < 2)[:, None].astype(np.float32))
    _, a = graded(TVM(kind=kind, norm=norm))(params, half)
    _, b = graded(TVM(kind=kind, norm=norm, channel=None))(params, half)
    assert not np.allclose(a["heads"]["value"]["weight"], b["heads"]["value"]["weight"], atol=1e-3)


def test_right_solutions_alone_teach_the_language_model(params):
    batch = packed(samples())
    (plain, _), gradient = graded(VALUE)(params, batch)
    (both, loss), found = graded(TVM(lambda_lm=0.5))(params, batch)
    good = batch.replace(weights=np.maximum(batch.weights, 0))
    bare = {name: value for name, value in params.items() if name != "heads"}
    (nll, _), of_nll = graded(SFT(norm="sequence"))(bare, good)
    np.testing.assert_allclose(both, plain + 0.5 * nll, rtol=1e-5)
    of_nll = {**of_nll, "heads": jax.tree.map(jnp.zeros_like, params["heads"])}
    close(found, jax.tree.map(lambda a, b: a + 0.5 * b, gradient, of_nll))
    np.testing.assert_allclose(loss.metrics["nll"][0], nll, rtol=1e-5)


# ---- batches


def test_what_follows_changes_no_earlier_value(params):
    later = np.arange(16) >= 5
    batch = packed(samples())
    batch = batch.replace(weights=np.where(later, 0.0, batch.weights).astype(np.float32))
    other = batch.replace(
        # The first of these is the target before, which counts.
        tokens=np.where(np.arange(16) > 5, (batch.tokens + 5) % 24, batch.tokens),
        channels={"value": np.where(later, 0.5, batch.channels["value"]).astype(np.float32)},
    )
    one, two = (graded(VALUE)(params, each)[0][0] for each in (batch, other))
    assert one != 0
    np.testing.assert_allclose(one, two, rtol=1e-6)


def test_what_has_no_weight_may_hold_anything(params):
    batch = packed(samples())
    off = batch.weights == 0
    other = batch.replace(
        targets=np.where(off, -100, batch.targets),
        channels={"value": np.where(off, np.nan, batch.channels["value"]).astype(np.float32)},
    )
    one, two = (graded(TVM(lambda_lm=0.5))(params, each) for each in (batch, other))
    assert one[0][0] == two[0][0]
    jax.tree.map(np.testing.assert_array_equal, (one[1], one[0][1]), (two[1], two[0][1]))


@pytest.mark.parametrize("objective", [VALUE, TVM(kind="bce", lambda_lm=1.0)])
def test_a_batch_without_weights_adds_nothing(params, objective):
    batch = packed(samples())
    batch = batch.replace(weights=np.zeros_like(batch.weights))
    (total, loss), gradient = graded(objective)(params, batch)
    assert total == 0 and loss.weight == 0
    assert all(not g.any() for g in jax.tree.leaves(gradient))


def test_micro_batches_equal_the_large_batch():
    batch, optimizer, objective = packed(samples()), optax.sgd(1.0), TVM(lambda_lm=0.1)
    states = []
    for k in (1, 2):
        state = init_state(MODEL, objective, optimizer, 0, False)
        config = StepConfig(0.5, Constant(), 0, 10, micro_batches=k)
        step = jax.jit(make_train_step(MODEL, objective, optimizer, config))
        states.append(step(state, batch)[0].params)
    close(*states)


def test_labels_get_no_gradient(params):
    batch = packed(samples())

    def total(label):
        return VALUE.loss(MODEL, params, (), batch.replace(channels={"value": label}), KEY).total

    assert not jax.jit(jax.grad(total))(jnp.asarray(batch.channels["value"])).any()


# ---- what is refused


@pytest.mark.parametrize("options", [{"kind": "mae"}, {"norm": "kept"}, {"lambda_lm": -1.0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        TVM(**options)


def test_data_without_the_channel_are_refused(params):
    batch = packed(samples()).replace(channels={"safety": np.zeros((4, 16), np.float32)})
    with pytest.raises(ConfigError, match=r"channel 'value'.*\['safety'\].*--method=tvm"):
        jax.eval_shape(lambda p: VALUE.loss(MODEL, p, (), batch, KEY), params)


def test_learned_positions_must_leave_room_for_end_tokens(params):
    sizes = {"vocab_size": 24, "d_model": 16, "n_layers": 1, "n_heads": 2}
    for most, fits in ((23, False), (24, True)):
        model = Transformer(ModelConfig(**sizes, positions="learned", max_positions=most))
        given = {**jax.eval_shape(model.init, KEY), "heads": params["heads"]}
        run = lambda p, model=model: VALUE.loss(model, p, (), packed(samples()), KEY)  # noqa: E731
        if fits:
            jax.eval_shape(run, given)
        else:
            with pytest.raises(ConfigError, match=r"data\.seq_len to 15 or less"):
                jax.eval_shape(run, given)


# ---- a run


def test_from_rated_records_to_a_scorer(tmp_path):
    """Solutions of one letter a step; the ones that contain an x are wrong."""
    rng = np.random.default_rng(0)

    def records(count, prompts):
        for _ in range(count):
            steps = "".join(rng.choice(list("abx"), 3))
            yield {
                "prompt": f"{rng.choice(list(prompts))}:",
                "response": steps,
                "label": "x" not in steps,
            }

    for name, count, prompts in (("train", 300, "pqr"), ("held", 40, "st")):
        rows = [json.dumps(row) + "\n" for row in records(count, prompts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    source = {"name": "jsonl", "files": (str(tmp_path / "train.jsonl"),), "kind": "rated"}
    tree = {
        "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "max_positions": 64},
        "data": {
            "tokenizer": {"name": "bytes", "add_bos": False},
            "train": [{"source": source, "artifact": str(tmp_path / "values.parquet")}],
            "evals": {"held": {**source, "files": (str(tmp_path / "held.jsonl"),)}},
            "seq_len": 32,
            "batch_size": 8,
            "cache_dir": str(tmp_path / "cache"),
        },
        "objective": {"name": "tvm"},
        "steps": 120,
        "optimizer": {"name": "adamw", "peak_lr": 1e-2},
        "log_every": 60,
    }
    config = resolve(TrainConfig, {**tree, "objective": {"name": "tvm", "channel": None}})
    store = TokenStore.open(ensure_store(config.data.train[0].source, config.data, progress=False))
    write_prefix_values(tmp_path / "values.parquet", store)
    config = resolve(TrainConfig, tree)
    train(build_run(config, devices=jax.devices()[:1], show_progress=False), tmp_path / "run")
    columns = read_metrics(tmp_path / "run" / "metrics.csv")
    told = [value for value in columns["eval/held/brier"] if value is not None]
    assert len(told) == 1 and told[-1] < 0.15  # the expected outcome alone gives 0.21

    trained = load_trained(tmp_path / "run")
    score = value_scorer(trained.model, trained.params, trained.heads["value"])
    ids = lambda text: trained.tokenizer.encode(text)  # noqa: E731
    found = score([ids("p:")] * 5, [ids(text) for text in ("abb", "abx", "ab", "xab", "a")])
    whole, wrong, two, spoilt, one = found
    # What is left of two thirds a step: 1, 0, 2/3, 0, 4/9.
    np.testing.assert_allclose([whole, wrong, two, spoilt, one], [1, 0, 2 / 3, 0, 4 / 9], atol=0.25)
    assert whole > two > one > max(wrong, spoilt)
