import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.parallel.mesh import MeshConfig, build_mesh
from tokjax.parallel.rules import BATCH_AXES
from tokjax.pretraining.next_token import NextToken
from tokjax.training.objective import Loss
from tokjax.training.optimizers import AdamW, Constant, Cosine, Muon
from tokjax.training.state import init_state, state_shardings
from tokjax.training.step import StepConfig, make_eval_step, make_train_step

B, T, V = 4, 16, 32
CONFIG = ModelConfig(
    vocab_size=V,
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_ff=32,
    # Embeddings of 0.02 would make the first norm amplify rounding 50 times.
    init_scale=1.0,
    remat="none",
)
MODEL = Transformer(CONFIG)
SGD = optax.sgd(1.0)


def batch_of(tokens, segments, weights):
    """A batch of successive tokens [B, T + 1]; positions count within segments."""
    segments = np.asarray(segments, np.int32)
    positions = np.zeros_like(segments)
    for row, out in zip(segments, positions, strict=True):
        for i in range(1, len(row)):
            out[i] = out[i - 1] + 1 if row[i] == row[i - 1] else 0
    tokens = np.asarray(tokens, np.int32)
    arrays = (tokens[:, :-1], tokens[:, 1:], positions, segments)
    ids = np.zeros((len(tokens), 2), np.int32)
    tokens, targets, positions, segments, ids = (jnp.asarray(a) for a in (*arrays, ids))
    weights = jnp.asarray(weights, jnp.float32)
    return Batch(tokens, targets, positions, segments, weights, ids)


def random_batch(seed, ones=False):
    rng = np.random.default_rng(seed)
    segments = np.repeat([[1] * 5 + [2] * 9 + [0] * 2], B, 0)
    weights = np.ones((B, T)) if ones else rng.normal(loc=0.5, size=(B, T))
    return batch_of(rng.integers(0, V, (B, T + 1)), segments, weights * (segments > 0))


def settings(**changes):
    base = {"peak_lr": 1.0, "schedule": Constant(), "first_step": 0, "stage_steps": 10}
    return StepConfig(**(base | changes))


def close(found, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


# --- the arithmetic of the step, on a model of three numbers ---


@dataclass(frozen=True)
class Product:
    """A loss of three parameters whose gradient is sum of w t e_(t mod 3), and a counter."""

    tokens_per_position: int = 1

    def init(self, key, model, params):
        return {"calls": jnp.zeros((), jnp.int32)}

    def loss(self, model, params, aux, batch, key):
        value = jnp.take(params["p"], batch.tokens % 3) * batch.tokens.astype(jnp.float32)
        weight = batch.weights.sum()
        noise = jax.random.normal(key)
        metrics = {"noise": (noise, jnp.float32(1)), "nothing": (jnp.float32(0), jnp.float32(0))}
        total = (batch.weights * value).sum()
        return Loss(total, weight, metrics, {"calls": aux["calls"] + 1})


class ThreeNumbers:
    config = CONFIG

    def init(self, key):
        return {"p": jnp.array([1.0, -2.0, 3.0])}


def small_state(optimizer=SGD, ema=False):
    return init_state(ThreeNumbers(), Product(), optimizer, 0, ema)


def small_step(optimizer=SGD, **changes):
    return jax.jit(make_train_step(ThreeNumbers(), Product(), optimizer, settings(**changes)))


def gradient_of(batch):
    tokens, weights = np.asarray(batch.tokens), np.asarray(batch.weights, np.float64)
    sums = [(weights * tokens)[tokens % 3 == i].sum() for i in range(3)]
    return np.array(sums) / weights.sum()


def moved(before, after):
    return np.asarray(before.params["p"]) - np.asarray(after.params["p"])


def test_the_update_is_the_gradient_of_the_weighted_mean():
    batch, state = random_batch(0), small_state()
    after, metrics = small_step(peak_lr=0.5)(state, batch)
    exact = gradient_of(batch)
    np.testing.assert_allclose(moved(state, after), 0.5 * exact, rtol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(exact), rtol=1e-5)
    np.testing.assert_allclose(metrics["target_weight"], np.sum(batch.weights), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], exact @ [1.0, -2.0, 3.0], rtol=1e-4)
    assert (metrics["finite"], metrics["learning_rate"], metrics["nothing"]) == (1, 0.5, 0)
    assert (int(after.step), int(after.aux["calls"])) == (1, 1)


def test_weights_matter_only_relative_to_each_other():
    # Also when their sum is negative: it is the mean that counts.
    batch, state, step = random_batch(1), small_state(), small_step(clip_norm=1.0)
    expected = step(state, batch)[0].params
    for factor in (3.0, -1.0):
        other = dataclasses.replace(batch, weights=factor * batch.weights)
        close(step(state, other)[0].params, expected, rtol=1e-5)


def test_clipping_keeps_the_direction_and_bounds_the_norm():
    batch, state = random_batch(2), small_state()
    exact = gradient_of(batch)
    norm = np.linalg.norm(exact)
    after, metrics = small_step(clip_norm=float(norm) / 4)(state, batch)
    np.testing.assert_allclose(moved(state, after), exact / 4, rtol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)  # as it was
    after, _ = small_step(clip_norm=float(norm) * 1.01)(state, batch)
    np.testing.assert_allclose(moved(state, after), exact, rtol=1e-4)


def test_ema_follows_the_new_parameters():
    step, state = small_step(ema_decay=0.9, peak_lr=0.01), small_state(ema=True)
    np.testing.assert_array_equal(state.ema["p"], state.params["p"])
    expected = np.asarray(state.ema["p"], np.float64)
    for seed in range(3):
        state, _ = step(state, random_batch(seed))
        expected = 0.9 * expected + 0.1 * np.asarray(state.params["p"])
        np.testing.assert_allclose(state.ema["p"], expected, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_changes_nothing_but_the_step(value):
    adam = optax.adam(1.0)
    step, state = small_step(adam, ema_decay=0.9, clip_norm=1.0), small_state(adam, ema=True)
    state, _ = step(state, random_batch(0))
    bad = random_batch(1)
    bad = dataclasses.replace(bad, weights=bad.weights.at[0, 0].set(value))
    after, metrics = step(state, bad)
    assert metrics["finite"] == 0
    for name in ("params", "opt_state", "aux", "ema"):
        close(getattr(after, name), getattr(state, name), rtol=0)
    assert int(after.step) == 2
    again, metrics = step(after, random_batch(2))
    assert metrics["finite"] == 1
    assert np.isfinite(moved(after, again)).all() and moved(after, again).any()


def test_an_infinite_gradient_of_a_finite_loss_is_left_out():
    @dataclass(frozen=True)
    class Steep(Product):
        def loss(self, model, params, aux, batch, key):
            # The root of 0 is 0, its slope infinite.
            return Loss(jnp.sqrt(0 * params["p"].sum()), jnp.float32(1), {}, aux)

    state = small_state()
    step = jax.jit(make_train_step(ThreeNumbers(), Steep(), SGD, settings()))
    after, metrics = step(state, random_batch(0))
    assert (metrics["loss"], metrics["finite"]) == (0, 0)
    close(after.params, state.params, rtol=0)


def test_bfloat16_parameters_keep_their_type_and_a_float32_average():
    class Narrow(ThreeNumbers):
        def init(self, key):
            return {"p": super().init(key)["p"].astype(jnp.bfloat16)}

    adam = optax.adam(1.0)
    state = init_state(Narrow(), Product(), adam, 0, True)
    config = settings(peak_lr=0.125, ema_decay=0.9999, micro_batches=2)
    after, metrics = jax.jit(make_train_step(Narrow(), Product(), adam, config))(
        state, random_batch(0)
    )
    types = lambda tree: [a.dtype for a in jax.tree.leaves(tree)]  # noqa: E731
    assert types(after) == types(state)
    assert metrics["grad_norm"].dtype == after.ema["p"].dtype == jnp.float32
    # A ten-thousandth of the change, which bfloat16 would round away.
    change = -1e-4 * moved(state, after).astype(np.float32)
    assert np.abs(change).min() > 1e-5
    np.testing.assert_allclose(after.ema["p"] - state.ema["p"], change, rtol=0, atol=5e-7)


def test_a_batch_without_weight_changes_nothing_and_counts_as_finite():
    decaying = optax.adamw(0.1, weight_decay=0.5)
    step, state = small_step(decaying), small_state(decaying)
    state, _ = step(state, random_batch(0))
    empty = dataclasses.replace(random_batch(1), weights=jnp.zeros((B, T)))
    after, metrics = step(state, empty)
    close(after.params, state.params, rtol=0)
    close(after.opt_state, state.opt_state, rtol=0)
    assert (metrics["finite"], metrics["loss"], metrics["target_weight"]) == (1, 0, 0)
    assert int(after.step) == 2


def test_the_schedule_counts_from_the_stages_first_step():
    step = small_step(peak_lr=2.0, schedule=Cosine(2, 0.0), first_step=5, stage_steps=12)
    state = small_state()
    for number, factor in [(5, 0.5), (6, 1.0), (7, 1.0), (12, 0.5), (17, 0.0)]:
        placed = state.replace(step=jnp.int32(number))
        rate = step(placed, random_batch(0))[1]["learning_rate"]
        np.testing.assert_allclose(rate, 2.0 * factor, atol=1e-6)


def test_random_keys_follow_the_step_number():
    step, state, batch = small_step(), small_state(), random_batch(0)
    after, first = step(state, batch)
    assert first["noise"] == step(state, batch)[1]["noise"]
    assert first["noise"] != step(after, batch)[1]["noise"]


def test_micro_batches_have_their_own_keys_and_pass_aux_on():
    step, state, batch = small_step(micro_batches=4), small_state(), random_batch(0)
    after, metrics = step(state, batch)
    assert int(after.aux["calls"]) == 4
    key = jax.random.fold_in(state.key, 0)
    noise = [jax.random.normal(k) for k in jax.random.split(key, 4)]
    np.testing.assert_allclose(metrics["noise"], np.mean(noise), rtol=1e-5)


def test_rows_that_do_not_split_are_refused():
    with pytest.raises(ConfigError, match="4 rows does not split into micro_batches=3"):
        small_step(micro_batches=3)(small_state(), random_batch(0))


# --- the step of a language model ---


@pytest.fixture(scope="module")
def state():
    return jax.jit(lambda: init_state(MODEL, NextToken(), SGD, 0, False))()


@pytest.fixture(scope="module")
def three_steps(state):
    """A function running three steps of SGD and returning parameters and metrics."""

    def run(micro_batches):
        step = jax.jit(
            make_train_step(
                MODEL, NextToken(), SGD, settings(peak_lr=0.1, micro_batches=micro_batches)
            )
        )
        now, seen = state, []
        for seed in range(3):
            now, metrics = step(now, random_batch(seed))
            seen.append(metrics)
        return now.params, seen

    return run


def test_micro_batches_equal_one_large_batch(three_steps):
    params, metrics = three_steps(1)
    for k in (2, 4):
        other, other_metrics = three_steps(k)
        close(other, params, rtol=1e-5, atol=1e-6)
        close(other_metrics, metrics, rtol=1e-4)


@jax.jit
def loss_gradient_and_nll(params, batch):
    from tokjax.signals import token_stats

    def total(params):
        loss = NextToken().loss(MODEL, params, (), batch, jax.random.key(0))
        return loss.total / loss.weight

    value, gradient = jax.value_and_grad(total)(params)
    out = MODEL.backbone(
        params,
        MODEL.embed(params, batch.tokens),
        positions=batch.positions,
        segments=batch.segment_ids,
    )
    nll = token_stats(out.x, MODEL.head(params), batch.targets).nll
    return value, gradient, nll


def test_weights_of_one_give_the_plain_mean(state):
    batch = random_batch(3, ones=True)
    loss, gradient, nll = loss_gradient_and_nll(state.params, batch)

    def plain(params):
        logits, _ = MODEL(
            params, batch.tokens, positions=batch.positions, segments=batch.segment_ids
        )
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return nll[:, :14].mean()  # the rows' last two positions are filling

    expected, expected_gradient = jax.jit(jax.value_and_grad(plain))(state.params)
    close(loss, expected, rtol=1e-5)
    close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    close(nll[:, :14].mean(), expected, rtol=1e-5)


def test_packed_examples_equal_one_a_row(state):
    # Two rows of two examples (5 and 9 tokens) against four rows of one; the same shape.
    rng = np.random.default_rng(4)
    tokens, weights = rng.integers(0, V, (B, 2, T + 1)), rng.normal(1.0, 1.0, (B, T))
    sizes = (5, 9)
    packed = [np.zeros((B, n), int) for n in (T + 1, T, T)]
    apart = [np.zeros((B, n), int) for n in (T + 1, T, T)]
    packed[2] = packed[2].astype(float)
    apart[2] = apart[2].astype(float)
    targets = {"packed": np.zeros((B, T), int), "apart": np.zeros((B, T), int)}
    where = []
    for row in range(2):
        start = 0
        for s, size in enumerate(sizes):
            single = 2 * row + s
            own, w = tokens[row, s], weights[single, :size]
            for arrays, r, at, name in (
                (packed, row, start, "packed"),
                (apart, single, 0, "apart"),
            ):
                arrays[0][r, at : at + size] = own[:size]
                targets[name][r, at : at + size] = own[1 : size + 1]
                arrays[1][r, at : at + size] = s + 1 if name == "packed" else 1
                arrays[2][r, at : at + size] = w
            where.append((row, start, single, size))
            start += size
    batches = [
        dataclasses.replace(batch_of(*arrays), targets=jnp.asarray(targets[name], jnp.int32))
        for arrays, name in ((packed, "packed"), (apart, "apart"))
    ]
    one, other = (loss_gradient_and_nll(state.params, batch) for batch in batches)
    close(one[0], other[0], rtol=1e-5)
    close(one[1], other[1], rtol=1e-4, atol=1e-6)
    for row, start, single, size in where:
        close(one[2][row, start : start + size], other[2][single, :size], rtol=1e-5)


def test_a_step_keeps_types_and_shapes_under_strict_promotion():
    model = Transformer(dataclasses.replace(CONFIG, param_dtype="bfloat16", dtype="bfloat16"))
    for optimizer in (AdamW().build(CONFIG), Muon().build(CONFIG)):
        before = jax.eval_shape(lambda o=optimizer: init_state(model, NextToken(), o, 0, True))
        changes = {"micro_batches": 2, "ema_decay": 0.9, "clip_norm": 1.0}
        step = make_train_step(model, NextToken(), optimizer, settings(**changes))
        with jax.numpy_dtype_promotion("strict"):
            after, metrics = jax.eval_shape(step, before, random_batch(0))
        assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(
            lambda a: (a.shape, a.dtype), before
        )
        assert {m.dtype for m in metrics.values()} == {jnp.dtype("float32")}
        assert after.params["norm"].dtype == jnp.bfloat16
        assert after.ema["norm"].dtype == jnp.float32


def test_eval_step_returns_sums(state):
    batch = random_batch(5)
    sums = make_eval_step(MODEL, NextToken())(state.params, (), batch)
    value, _, _ = loss_gradient_and_nll(state.params, batch)
    close(sums["loss"][0] / sums["loss"][1], value, rtol=1e-5)
    close(sums["loss"], sums["nll"], rtol=1e-6)
    assert make_eval_step(MODEL, NextToken()) is make_eval_step(MODEL, NextToken())


# --- meshes ---

# eps far above rounding: Adam's first step would turn a gradient of 1e-9 into a full step.
ADAMW = AdamW(eps=1e-3).build(CONFIG)


def five_steps(mesh=None, micro_batches=1):
    make = lambda: init_state(MODEL, NextToken(), ADAMW, 0, True)  # noqa: E731
    config = settings(peak_lr=0.01, clip_norm=1.0, ema_decay=0.9, micro_batches=micro_batches)
    step = make_train_step(MODEL, NextToken(), ADAMW, config)
    batches = [random_batch(seed) for seed in range(5)]
    if mesh is None:
        state, step = jax.jit(make)(), jax.jit(step)
    else:
        layout = state_shardings(jax.eval_shape(make), MODEL, mesh)
        state = jax.jit(make, out_shardings=layout)()
        step = jax.jit(step, out_shardings=(layout, None))
        rows = NamedSharding(mesh, P(BATCH_AXES, "sequence"))
        ids = NamedSharding(mesh, P(BATCH_AXES))
        place = lambda b: jax.device_put(  # noqa: E731
            b, jax.tree.map(lambda a: rows if a.shape[1] == T else ids, b)
        )
        batches = [place(b) for b in batches]
    seen = []
    for batch in batches:
        state, metrics = step(state, batch)
        seen.append(metrics)
    return jax.device_get((state.params, state.ema, seen))


@pytest.fixture(scope="module")
def single_device():
    return five_steps()


@pytest.mark.parametrize(
    ("mesh", "micro_batches"),
    [
        ({"data": 2}, 1),
        ({"fsdp": 2}, 1),
        ({"tensor": 2}, 1),
        ({"sequence": 2}, 1),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 1),
        ({"fsdp": 2, "tensor": 2, "sequence": 2}, 2),
    ],
    ids=str,
)
def test_a_mesh_trains_like_one_device(single_device, mesh, micro_batches):
    sizes = {"data": 1, **mesh}
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    built = build_mesh(MeshConfig(**sizes), devices)
    with jax.set_mesh(built):
        found = five_steps(built, micro_batches)
    close(found, single_device, rtol=1e-5, atol=1e-5)
