import functools
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokjax.config import registered_name, resolve
from tokjax.data.artifact import read_artifact, write_artifact
from tokjax.data.batch import Batch
from tokjax.data.prepare import ensure_store
from tokjax.data.store import TokenStore
from tokjax.errors import ConfigError, DataError
from tokjax.finetuning.sft import SFT
from tokjax.finetuning.star_dss import StarDSS, chunk_ends, chunk_values
from tokjax.models import ModelConfig, Transformer, lora
from tokjax.models.lora import LoraConfig
from tokjax.signals import vocabulary
from tokjax.signals.divergences import kl_estimate
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.metrics import read_metrics
from tokjax.training.optimizers import Constant
from tokjax.training.run import build_run
from tokjax.training.state import init_state
from tokjax.training.step import StepConfig, make_train_step

MODEL = Transformer(ModelConfig(vocab_size=24, d_model=16, n_layers=1, n_heads=2, max_positions=32))
KEY = jax.random.key(0)
SHAPE = (4, 16)
KINDS = ["k1", "k2", "k3", "full"]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda a: 2 * a, MODEL.init(jax.random.key(0)))


@pytest.fixture(scope="module")
def reference():
    return jax.tree.map(lambda a: 2 * a, MODEL.init(jax.random.key(1)))


def rows(safety=None):
    """Four rows of up to three samples; weights are any real numbers, some 0."""
    rng = np.random.default_rng(0)
    segments, places = np.zeros(SHAPE, np.int32), np.zeros(SHAPE, np.int32)
    examples = np.full((4, 3), -1, np.int32)
    for b, lengths in enumerate([[7, 5, 3], [9, 7], [16], [3, 4, 9]]):
        at = 0
        for s, n in enumerate(lengths):
            segments[b, at : at + n], places[b, at : at + n] = s + 1, np.arange(n)
            examples[b, s] = 5 * b + s
            at += n
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], SHAPE) * (segments > 0) * (places > 1)
    ids = rng.integers(0, 24, (2, *SHAPE)).astype(np.int32)
    given = rng.choice([0.0, 0.2, 0.9, 1.0], SHAPE) if safety is None else safety
    channel = np.broadcast_to(np.asarray(given, np.float32), SHAPE)
    weights = weights.astype(np.float32)
    return Batch(ids[0], ids[1], places, segments, weights, examples, {"safety": channel})


@functools.cache
def graded(objective, model=MODEL):
    """The compiled function (params, aux, batch) -> (loss, gradient of its sum)."""

    def total(params, aux, batch):
        loss = objective.loss(model, params, aux, batch, KEY)
        return loss.total, loss

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def close(found, expected, tolerance=1e-5):
    """Every leaf, relative to its norm: sums of another order round in other places."""

    def near(a, b):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)

    jax.tree.map(near, jax.device_get(found), jax.device_get(expected))


def logprobs(params, batch):
    at = {"positions": batch.positions, "segments": batch.segment_ids}
    return jax.nn.log_softmax(MODEL(params, batch.tokens, **at)[0])


@functools.cache
def naive(kind, lam):
    """The sum of the loss by all logits, for automatic differentiation."""

    def total(params, reference, batch):
        a, b = logprobs(params, batch), logprobs(reference, batch)
        at = lambda p: jnp.take_along_axis(p, batch.targets[..., None], 2)[..., 0]  # noqa: E731
        r = at(a) - at(b)
        kl = {
            "k1": r,
            "k2": r**2 / 2,
            "k3": jnp.exp(-r) - 1 + r,
            "full": (jnp.exp(a) * (a - b)).sum(-1),
        }[kind]
        safety = batch.channels["safety"]
        return (batch.weights * (-safety * at(a) + (1 - safety) * lam * kl)).sum()

    return jax.jit(jax.value_and_grad(total))


# ---- numbers


def test_numbers_of_four_tokens(monkeypatch):
    """States are logits of two ids: the targets have the worked example's likelihoods."""
    nll, log_reference = np.array([1.0, 0.5, 0.3, 0.7]), np.array([-1.2, -0.4, -2.3, -3.0])
    states = lambda nll: jnp.stack([jnp.zeros(4), jnp.log(jnp.expm1(nll))], -1)[None]  # noqa: E731
    path = "tokjax.finetuning.star_dss"
    model = SimpleNamespace(head=lambda params: jnp.eye(2))
    out = SimpleNamespace(x=states(nll))
    monkeypatch.setattr(f"{path}.forward", lambda *_: out)
    monkeypatch.setattr(f"{path}.reference_pass", lambda *_: (states(-log_reference), jnp.eye(2)))
    ids, ones = np.zeros((1, 4), np.int32), np.ones((1, 4), np.float32)
    channels = {"safety": np.array([[0.9, 0.9, 0.2, 0.2]], np.float32)}
    batch = Batch(ids, ids, ids, ids + 1, ones, ids[:, :1], channels)

    loss = StarDSS().loss(model, {}, (), batch, KEY)  # type: ignore[arg-type]
    assert loss.weight == 4
    np.testing.assert_allclose(loss.total / 4, 1.317125, atol=1e-6)
    np.testing.assert_allclose(loss.metrics["imitation"][0] / 4, 0.3875, atol=1e-6)
    np.testing.assert_allclose(loss.metrics["pull"][0] / 4, 1.317125 - 0.3875, atol=1e-6)
    k2 = kl_estimate(jnp.asarray(-nll - log_reference), "k2")
    np.testing.assert_allclose(k2, [0.02, 0.005, 2.0, 2.645], atol=1e-6)


def test_estimates_agree_to_second_order_and_their_gradients_too():
    r = jnp.float32(1e-2)
    np.testing.assert_allclose(kl_estimate(r, "k3"), kl_estimate(r, "k2"), rtol=0.01)
    slopes = [jax.grad(kl_estimate)(jnp.float32(0.3), kind) for kind in ("k1", "k2", "k3")]
    np.testing.assert_allclose(slopes, [1.0, 0.3, 1 - np.exp(-0.3)], rtol=1e-6)


# ---- limit cases


@pytest.mark.parametrize("kind", ["k2", "k3", "full"])
def test_where_all_is_safe_the_loss_is_plain_sft_whatever_the_reference(params, kind):
    batch = rows(safety=1.0)
    (_, plain), expected = graded(SFT())(params, (), batch)
    wild = jax.tree.map(lambda a: 30 * a, params)
    (_, found), gradient = graded(StarDSS(kl=kind))(params, wild, batch)
    (_, again), same = graded(StarDSS(kl=kind))(params, params, batch)
    assert found.total == again.total and found.weight == plain.weight
    jax.tree.map(np.testing.assert_array_equal, gradient, same)
    assert found.metrics["pull"][0] == 0
    # The mean cross-entropy bit for bit; SFT rounds it elsewhere.
    assert found.total == found.metrics["nll"][0] == found.metrics["imitation"][0]
    np.testing.assert_allclose(found.total, plain.total, rtol=1e-6)
    close(gradient, expected)


def test_a_ratio_beyond_all_numbers_does_not_count_where_all_is_safe(params):
    wild = jax.tree.map(lambda a: 30 * a, params)
    (total, loss), gradient = graded(StarDSS(kl="k3"))(wild, params, rows(safety=1.0))
    assert loss.metrics["nll"][0] / loss.weight > 200  # e^-r is infinite
    assert np.isfinite(total) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_reference_nothing_safe_means_no_loss(params, kind):
    (total, loss), gradient = graded(StarDSS(kl=kind))(params, params, rows(safety=0.0))
    np.testing.assert_allclose(total, 0.0, atol=1e-6)
    moved = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient))
    if kind == "k1":
        # Its mean is the divergence, but not its gradient on data of another source.
        assert moved > 1e-2
    else:
        assert moved < 1e-5
    assert loss.metrics["safety"][0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_equal_the_naive_form(params, reference, kind):
    batch = rows()
    expected = naive(kind, 0.7)(params, reference, batch)
    (total, _), gradient = graded(StarDSS(kl=kind, lambda_kl=0.7))(params, reference, batch)
    close((total, gradient), expected)


def test_without_pull_no_reference_is_kept_and_samples_are_rejected(params):
    objective = StarDSS(lambda_kl=0.0)
    assert objective.init(KEY, MODEL, params) == ()
    batch = rows()
    keep = np.isin(5 * np.arange(4)[:, None] + batch.segment_ids - 1, [0, 5, 6, 16])
    batch = batch.replace(channels={"safety": keep.astype(np.float32)})
    (total, loss), gradient = graded(objective)(params, (), batch)
    dropped = batch.replace(weights=batch.weights * keep)
    (expected, plain), other = graded(SFT())(params, (), dropped)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    close(gradient, other)
    # What is dropped still counts in the denominator.
    assert loss.weight == batch.weights.sum() > plain.weight


def test_one_value_of_a_sample_weighs_the_whole_sample(params):
    values = np.random.default_rng(1).uniform(size=(4, 3))
    batch = rows()
    own = np.take_along_axis(values, np.maximum(batch.segment_ids - 1, 0), 1).astype(np.float32)
    (total, _), gradient = graded(StarDSS(lambda_kl=0.0))(
        params, (), batch.replace(channels={"safety": own})
    )
    (expected, _), other = graded(SFT())(params, (), batch.replace(weights=batch.weights * own))
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    close(gradient, other)


def test_no_gradient_reaches_reference_or_safety(params, reference):
    batch = rows()

    def total(aux, safety):
        channels = {"safety": safety}
        return StarDSS().loss(MODEL, params, aux, batch.replace(channels=channels), KEY).total

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))(reference, batch.channels["safety"])
    assert all(not g.any() for g in jax.tree.leaves(gradient))


def test_with_adapters_the_reference_is_the_model_without_them(params):
    model, adapted = lora.on(MODEL, params, LoraConfig(rank=2), jax.random.key(1))
    objective = StarDSS()
    assert objective.init(KEY, model, adapted) == ()
    base, own = lora.split(adapted)
    moved = lora.join(base, jax.tree.map(lambda a: a + 0.1, own))
    merged = lora.merge(model, moved)[1]
    (total, _), gradient = graded(objective, model)(moved, (), rows())
    np.testing.assert_allclose(total, naive("k2", 1.0)(merged, params, rows())[0], rtol=1e-4)
    assert any(g.any() for g in jax.tree.leaves(lora.split(gradient)[1]))
    (at_start, _), _ = graded(objective, model)(adapted, (), rows(safety=0.0))
    np.testing.assert_allclose(at_start, 0.0, atol=1e-6)


# ---- batches


@pytest.mark.parametrize("norm", ["token", "sequence"])
def test_packed_rows_equal_samples_one_by_one(params, reference, norm):
    batch = rows()
    alone = []
    for b, s in np.argwhere(batch.example_id >= 0):
        own = batch.segment_ids[b] == s + 1
        alone.append(batch.replace(weights=np.where(np.arange(4)[:, None] == b, own, 0)))
    objective = StarDSS(norm=norm)
    (total, loss), _ = graded(objective)(params, reference, batch)
    sums, sizes = [], []
    for one in alone:
        unit = one.weights  # which targets are the sample's
        own = batch.replace(weights=batch.weights * unit)
        # The sample alone: nothing else of the row is there.
        own = own.replace(segment_ids=np.where(unit, 1, 0).astype(np.int32))
        sums.append(naive("k2", 1.0)(params, reference, own)[0])
        sizes.append(own.weights.sum())
    sums, sizes = np.array(sums), np.array(sizes)
    if norm == "token":
        expected, weight = sums.sum(), sizes.sum()
    else:
        some = sizes > 0
        expected, weight = (sums[some] / sizes[some]).sum(), some.sum()
    assert loss.weight == weight
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_micro_batches_equal_the_large_batch():
    batch, optimizer, objective = rows(), optax.sgd(1.0), StarDSS(kl="full")
    states = []
    for k in (1, 2):
        state = init_state(MODEL, objective, optimizer, 0, False)
        # Away from the reference, or there would be no pull.
        state = state.replace(params=jax.tree.map(lambda a: 1.5 * a, state.params))
        config = StepConfig(0.5, Constant(), 0, 10, micro_batches=k)
        step = jax.jit(make_train_step(MODEL, objective, optimizer, config))
        after, metrics = step(state, batch)
        states.append(after.params)
        jax.tree.map(np.testing.assert_array_equal, after.aux, state.aux)
    assert metrics["pull"] > 0
    close(*states)


@pytest.mark.parametrize("kind", ["k2", "k3", "full"])
def test_a_batch_without_weights_adds_nothing(params, reference, kind):
    batch = rows().replace(weights=np.zeros(SHAPE, np.float32))
    (total, loss), gradient = graded(StarDSS(kl=kind))(params, reference, batch)
    assert total == 0 and loss.weight == 0
    assert all(not g.any() for g in jax.tree.leaves(gradient))
    assert all(part[0] == 0 for part in loss.metrics.values())


def test_what_has_no_weight_may_hold_anything(params, reference):
    batch = rows()
    off = batch.weights == 0
    other = batch.replace(
        targets=np.where(off, -100, batch.targets),
        channels={"safety": np.where(off, np.nan, batch.channels["safety"]).astype(np.float32)},
    )
    (one, a), ga = graded(StarDSS())(params, reference, batch)
    (two, b), gb = graded(StarDSS())(params, reference, other)
    assert one == two
    jax.tree.map(np.testing.assert_array_equal, (ga, a.metrics), (gb, b.metrics))


def test_what_follows_changes_no_earlier_loss(params, reference):
    batch = rows()
    later = np.arange(16) >= 5
    batch = batch.replace(weights=np.where(later, 0.0, batch.weights).astype(np.float32))
    other = batch.replace(
        tokens=np.where(later, (batch.tokens + 5) % 24, batch.tokens),
        channels={"safety": np.where(later, 0.5, batch.channels["safety"]).astype(np.float32)},
    )
    one, two = (graded(StarDSS())(params, reference, each)[0][0] for each in (batch, other))
    assert one != 0
    np.testing.assert_allclose(one, two, rtol=1e-6)


@pytest.mark.parametrize("kind", ["k2", "full"])
def test_no_buffer_of_all_logits(monkeypatch, kind):
    monkeypatch.setattr(vocabulary, "_CHUNK_TOKENS", 16)
    monkeypatch.setattr(vocabulary, "_TILE_LOGITS", 1)
    model = Transformer(ModelConfig(vocab_size=512, d_model=8, n_layers=1, n_heads=1))
    params = jax.eval_shape(model.init, jax.random.key(0))
    ids, values = jnp.ones((8, 16), jnp.int32), jnp.ones((8, 16))
    batch = Batch(ids, ids, ids, ids, values, jnp.zeros((8, 1), jnp.int32), {"safety": values})

    def total(params, aux):
        return StarDSS(kl=kind).loss(model, params, aux, batch, KEY).total

    text = jax.jit(jax.grad(total)).lower(params, params).compile().as_text()
    found = re.findall(r"(?:f32|s32|u32|pred)\[([\d,]+)\]", text)
    assert max(np.prod([int(n) for n in s.split(",")]) for s in found) < 8 * 16 * 512 / 4


# ---- the channel


def test_chunk_values_before_and_after_the_shift():
    found = chunk_values([0.9, 0.2], [2, 5], 6)
    np.testing.assert_allclose(found, [0.9, 0.9, 0.2, 0.2, 0.2, 0.0], rtol=1e-6)
    # Targets are the tokens from the second one on.
    np.testing.assert_allclose(found[1:], [0.9, 0.2, 0.2, 0.2, 0.0], rtol=1e-6)
    assert found.dtype == np.float32


def test_filling_and_a_single_value():
    np.testing.assert_array_equal(
        chunk_values([0.5, 0.25, 9.0, 9.0], [3, 4, -1, -1], 4), [0.5, 0.5, 0.5, 0.25]
    )
    for positions in (None, [2], [4]):
        np.testing.assert_array_equal(chunk_values([0.25], positions, 4), [0.25] * 4)
    assert not chunk_values([], [], 3).any()


def test_a_chunk_split_in_two_of_one_value_changes_nothing():
    whole = chunk_values([0.9, 0.2, 0.4], [3, 7, 9], 9)
    np.testing.assert_array_equal(whole, chunk_values([0.9, 0.2, 0.2, 0.4], [3, 5, 7, 9], 9))


def test_chunks_end_with_the_example():
    assert chunk_ends(4, 12, 4).tolist() == [8, 12]
    assert chunk_ends(4, 13, 4).tolist() == [8, 12, 13]
    assert chunk_ends(4, 6, 4).tolist() == [6]
    assert chunk_ends(4, 4, 4).tolist() == [4]  # an empty answer
    values = chunk_values([0.9, 0.5, 0.1], chunk_ends(4, 13, 4), 13)
    assert values.min() > 0


@pytest.mark.parametrize(
    ("values", "positions", "said"),
    [
        ([0.5, 1.5], [1, 2], r"score 1\.5"),
        ([0.5, float("nan")], [1, 2], "score nan"),
        ([0.5, 0.5], [2, 1], r"\[2, 1\] must rise"),
        ([0.5, 0.5], [1, 9], r"\[1, 9\] must rise, to 4"),
        ([0.5, 0.5], [-3, 2], r"\[-3, 2\] must rise"),
        ([0.5, 0.5], [4], "2 scores of chunks need as many ends, not 1"),
        ([0.5, 0.5], None, "2 scores"),
    ],
)
def test_scores_that_make_no_channel_are_refused(values, positions, said):
    with pytest.raises(DataError, match=said):
        chunk_values(values, positions, 4)


@pytest.mark.parametrize("sizes", [(5, 4, 2), (0, 4, 0), (-1, 4, 2)])
def test_impossible_chunks_are_refused(sizes):
    with pytest.raises(DataError, match="no chunks"):
        chunk_ends(*sizes)


def test_an_artifact_carries_the_channel(tmp_path):
    own = [chunk_values([0.9, 0.2], chunk_ends(2, n, 3), n) for n in (6, 7)]
    write_artifact(
        tmp_path / "safety.parquet",
        keys=["0" * 16, "1" * 16],
        names=["a", "b"],
        n_tokens=[6, 7],
        scores=None,
        keep=[True, True],
        channels={"safety": own},
        meta={"method": "star_dss"},
    )
    read = read_artifact(tmp_path / "safety.parquet").channel("safety")
    np.testing.assert_array_equal(read, np.concatenate(own))


# ---- configuration


def test_a_missing_channel_is_named_with_its_remedy(params):
    batch = rows().replace(channels={"reasoning": np.ones(SHAPE, np.float32)})
    with pytest.raises(ConfigError, match=r"channel 'safety'.*\['reasoning'\].*chunk_values"):
        StarDSS().loss(MODEL, params, params, batch, KEY)
    with pytest.raises(ConfigError, match=r"channel 'guard'.*\['safety'\]"):
        StarDSS(channel="guard").loss(MODEL, params, params, rows(), KEY)


def test_the_objective_is_found_by_name():
    assert registered_name(StarDSS) == "star_dss"
    assert StarDSS().tokens_per_position == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lambda_kl": -1}, "lambda_kl=-1"),
        ({"lambda_kl": float("nan")}, "lambda_kl=nan"),
        ({"kl": "k4"}, "kl='k4'"),
        ({"norm": "kept"}, "norm='kept'"),
    ],
)
def test_impossible_settings_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        StarDSS(**settings)


def test_a_run_reads_the_channel_from_an_artifact(tmp_path, tiny_tree):
    pairs = [{"prompt": "p" * (i + 2), "response": "good" * 3 + "bad" * i} for i in range(6)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tree = tiny_tree(
        objective={"name": "star_dss", "kl": "k3"},
        data__train=[{"source": {"name": "jsonl", "files": (str(file),), "kind": "response"}}],
        data__evals={},
        data__cache_dir=str(tmp_path / "cache"),
        data__batch_size=2,
        steps=4,
    )
    data = resolve(TrainConfig, tree).data
    folder = ensure_store(data.train[0].source, data, cache_dir=tmp_path / "cache", progress=False)
    store = TokenStore.open(folder)
    every = range(store.num_examples)
    values = []
    for i in every:
        weights = store.weights(i)
        prompt = int(np.flatnonzero(weights)[0])
        ends = chunk_ends(prompt, len(weights), 12)
        values.append(chunk_values([1.0] + [0.0] * (len(ends) - 1), ends, len(weights)))
    write_artifact(
        tmp_path / "safety.parquet",
        keys=[store.example_key(i) for i in every],
        names=[store.example_name(i) for i in every],
        n_tokens=store.lengths,
        scores=None,
        keep=[True] * len(every),
        channels={"safety": values},
        meta={"method": "star_dss"},
    )

    def trained(name):
        run = build_run(resolve(TrainConfig, tree), devices=jax.devices()[:1], show_progress=False)
        train(run, tmp_path / name)
        return read_metrics(tmp_path / name)

    with pytest.raises(ConfigError, match="needs the channel 'safety', but the data have none"):
        trained("without")
    tree["data"]["train"][0]["artifact"] = str(tmp_path / "safety.parquet")
    table = trained("with")
    loss, imitation, pull, safety = (
        np.array(table[name], float) for name in ("loss", "imitation", "pull", "safety")
    )
    assert (safety > 0).all() and (safety < 1).all()
    # The first step starts at the reference; the pull comes with what the steps change.
    assert abs(pull[0]) < 1e-6 < pull[-1]
    np.testing.assert_allclose(loss, imitation + pull, rtol=1e-5)
