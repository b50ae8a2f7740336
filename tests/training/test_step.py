import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.models import Transformer
from tokjax.parallel.mesh import MeshConfig, build_mesh
from tokjax.pretraining.next_token import NextToken
from tokjax.pretraining.patch_training import Patch
from tokjax.signals import token_stats
from tokjax.training.objective import Loss
from tokjax.training.optimizers import AdamW, Constant, Cosine
from tokjax.training.state import init_state, state_shardings
from tokjax.training.step import StepConfig, make_eval_step, make_train_step

# Adam divides by the gradient's size: with a larger eps, rounding of tiny gradients stays small.
ADAMW = AdamW(peak_lr=1e-2, eps=1e-3)


def settings(**changes):
    base = {"peak_lr": 1e-2, "schedule": Constant(), "first_step": 0, "stage_steps": 10}
    return StepConfig(**(base | changes))


def start(model, objective=None, optimizer=None, ema=False):
    optimizer = optimizer or ADAMW.build(model.config)
    return init_state(model, objective or NextToken(), optimizer, seed=0, ema=ema)


@functools.cache
def compiled(model, objective, config, sgd=False):
    optimizer = optax.sgd(1.0) if sgd else ADAMW.build(model.config)
    return jax.jit(make_train_step(model, objective, optimizer, config))


def train(step, state, batches):
    metrics = {}
    for batch in batches:
        state, metrics = step(state, batch)
    return state, metrics


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def naive_mean(model, params, batch):
    """The weighted mean from whole logits."""
    logits, _ = model(params, batch.tokens, positions=batch.positions, segments=batch.segment_ids)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    nll = -jnp.take_along_axis(logprobs, batch.targets[..., None], axis=-1)[..., 0]
    return (nll * batch.weights).sum() / batch.weights.sum()


def test_a_step_descends_the_weighted_mean(small):
    state, batch = start(small.model, optimizer=optax.sgd(1.0)), small.batch(0)
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: naive_mean(small.model, p, batch)))(
        state.params
    )
    after, metrics = compiled(small.model, NextToken(), settings(), sgd=True)(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["nll"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(metrics["target_weight"], batch.weights.sum(), rtol=1e-6)
    expected = jax.tree.map(lambda p, g: p - 1e-2 * g, state.params, gradient)
    assert_close(after.params, expected, 1e-7)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_train_what_one_batch_trains(small, micro_batches):
    batches = [small.batch(seed) for seed in range(4)]
    shares = [b.weights.reshape(-1, micro_batches, 16).sum((0, 2)) for b in batches]
    assert np.std(np.concatenate(shares)) > 1  # a mean of means would come out otherwise
    state = start(small.model)
    whole, a = train(compiled(small.model, NextToken(), settings()), state, batches)
    step = compiled(small.model, NextToken(), settings(micro_batches=micro_batches))
    parts, b = train(step, state, batches)
    assert_close(parts.params, whole.params, 1e-6)
    assert_close(a, b, 2e-5)
    moved = jax.tree.map(lambda p, q: float(jnp.abs(p - q).max()), whole.params, state.params)
    assert min(jax.tree.leaves(moved)) > 1e-4


def test_rows_that_do_not_split_are_refused(small):
    step = make_train_step(
        small.model, NextToken(), ADAMW.build(small.config), settings(micro_batches=3)
    )
    with pytest.raises(ConfigError, match="8 rows.*micro_batches=3"):
        jax.eval_shape(step, start(small.model), small.batch(0))


def test_weights_of_one_give_the_plain_mean(small):
    batch = small.batch(0, weights="ones")
    real = np.asarray(batch.segment_ids) > 0
    state = start(small.model)
    _, metrics = compiled(small.model, NextToken(), settings())(state, batch)
    x = small.model.backbone(
        state.params,
        small.model.embed(state.params, batch.tokens),
        positions=batch.positions,
        segments=batch.segment_ids,
    ).x
    nll = token_stats(x, small.model.unembedding(state.params), batch.targets).nll
    np.testing.assert_allclose(metrics["loss"], np.asarray(nll)[real].mean(), rtol=1e-6)


def test_weights_of_the_other_sign_change_nothing(small):
    batch, state = small.batch(0), start(small.model)
    step = compiled(small.model, NextToken(), settings())
    a, metrics = step(state, batch)
    b, negated = step(state, batch.replace(weights=-batch.weights))
    assert_close(a.params, b.params, 1e-8)
    np.testing.assert_allclose(negated["loss"], metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(negated["grad_norm"], metrics["grad_norm"], rtol=1e-6)


def test_packed_examples_train_like_one_example_a_row(small):
    rng = np.random.default_rng(0)
    lengths, T = (5, 7, 4), 16
    tokens, targets = rng.integers(0, 37, (2, T))
    weights = rng.normal(1, 0.5, T)
    bounds = np.cumsum((0, *lengths))

    def packed() -> Batch:
        ids = np.repeat([1, 2, 3], lengths)[None]
        positions = np.concatenate([np.arange(n) for n in lengths])[None]
        return as_batch(tokens[None], targets[None], positions, ids, weights[None])

    def unpacked() -> Batch:
        rows = np.zeros((5, 3, T))
        for i, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            n = b - a
            rows[:, i, :n] = tokens[a:b], targets[a:b], np.arange(n), np.ones(n), weights[a:b]
        return as_batch(*rows)

    def as_batch(tokens, targets, positions, ids, weights) -> Batch:
        ints = [jnp.asarray(a, jnp.int32) for a in (tokens, targets, positions, ids)]
        return Batch(*ints, jnp.asarray(weights, jnp.float32), jnp.zeros((len(tokens), 1), int))

    def nll(params, batch):
        x = small.model.backbone(
            params,
            small.model.embed(params, batch.tokens),
            positions=batch.positions,
            segments=batch.segment_ids,
        ).x
        found = token_stats(x, small.model.unembedding(params), batch.targets).nll
        return (found * batch.weights).sum(), found

    params = small.model.init(jax.random.key(1))
    grad = jax.jit(jax.grad(nll, has_aux=True))
    one, one_nll = grad(params, packed())
    each, each_nll = grad(params, unpacked())
    for i, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        np.testing.assert_allclose(one_nll[0, a:b], each_nll[i, : b - a], atol=2e-6)
    assert_close(one, each, 2e-6)


def test_a_nan_loss_leaves_everything_as_it_was(small):
    state, batch = start(small.model, ema=True), small.batch(0)
    poisoned = batch.replace(weights=batch.weights.at[0, 0].set(jnp.nan))
    step = compiled(small.model, NextToken(), settings(ema_decay=0.9))
    after, metrics = step(state, poisoned)
    assert metrics["finite"] == 0
    assert np.isnan(metrics["loss"])
    assert after.step == 1
    assert_equal(after.replace(step=state.step), state)
    after, metrics = step(after, batch)
    assert metrics["finite"] == 1
    assert np.isfinite(metrics["loss"])
    assert after.step == 2


@dataclasses.dataclass(frozen=True)
class Probe:
    """An objective made of what a test needs: a steep gradient, randomness, a counter."""

    steep: bool = False
    tokens_per_position = 1

    def init(self, key, model, params):
        return jnp.zeros((), jnp.int32)

    def loss(self, model: Transformer, params, aux, batch, key) -> Loss:
        scale = params["norm"].sum()
        # The root of 0 is 0, its slope infinite.
        total = jnp.sqrt(0.0 * scale) if self.steep else scale
        noise = jax.random.uniform(key)
        one = jnp.ones(())
        return Loss(total, one, {"noise": (noise, one), "square": (noise**2, one)}, aux + 1)


def test_an_infinite_gradient_of_a_finite_loss_is_left_out(small):
    state = start(small.model, Probe())
    step = make_train_step(small.model, Probe(steep=True), ADAMW.build(small.config), settings())
    after, metrics = jax.jit(step)(state, small.batch(0))
    assert np.isfinite(metrics["loss"])
    assert metrics["finite"] == 0
    assert_equal(after.replace(step=state.step), state)


def test_every_step_and_micro_batch_draws_its_own_noise_and_hands_on_its_state(small):
    config = settings(micro_batches=4)
    step = jax.jit(make_train_step(small.model, Probe(), ADAMW.build(small.config), config))
    state, batch = start(small.model, Probe()), small.batch(0)
    first, a = step(state, batch)
    second, b = step(first, batch)
    again, c = step(state, batch)
    assert (first.aux, second.aux) == (4, 8)
    assert a["noise"] != b["noise"]
    assert a["noise"] == c["noise"]
    assert a["square"] - a["noise"] ** 2 > 1e-4  # the four draws are not one draw
    assert_equal(first, again)


def test_a_batch_without_weight_updates_nothing(small):
    state, batch = start(small.model), small.batch(0)
    empty = batch.replace(weights=jnp.zeros_like(batch.weights))
    after, metrics = compiled(small.model, NextToken(), settings())(state, empty)
    assert metrics["finite"] == 1
    assert metrics["loss"] == metrics["nll"] == 0
    assert_equal(after.replace(step=state.step), state)
    assert after.step == 1


def test_clipping_bounds_the_gradient_and_reports_it_whole(small):
    state, batch = start(small.model, optimizer=optax.sgd(1.0)), small.batch(0)
    free, metrics = compiled(small.model, NextToken(), settings(), sgd=True)(state, batch)
    norm = float(metrics["grad_norm"])

    def moved(after):
        return optax.tree.norm(jax.tree.map(jnp.subtract, state.params, after.params)) / 1e-2

    np.testing.assert_allclose(moved(free), norm, rtol=1e-4)
    clip = settings(clip_norm=norm / 3)
    clipped, metrics = compiled(small.model, NextToken(), clip, sgd=True)(state, batch)
    np.testing.assert_allclose(moved(clipped), norm / 3, rtol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
    loose = settings(clip_norm=norm * 3)
    same, _ = compiled(small.model, NextToken(), loose, sgd=True)(state, batch)
    assert_close(same.params, free.params, 1e-8)


def test_the_moving_average_follows_the_parameters(small):
    state = start(small.model, ema=True)
    expected, step = state.params, compiled(small.model, NextToken(), settings(ema_decay=0.9))
    for seed in range(3):
        state, _ = step(state, small.batch(seed))
        expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, expected, state.params)
    assert_close(state.ema, expected, 1e-6)
    assert float(jnp.abs(state.ema["norm"] - state.params["norm"]).max()) > 1e-3


def test_bfloat16_parameters_keep_a_float32_average_and_float32_sums(small):
    config = dataclasses.replace(small.config, dtype="bfloat16", param_dtype="bfloat16")
    model = Transformer(config)
    state = start(model, ema=True)
    before = state.ema["norm"]
    step = compiled(model, NextToken(), settings(ema_decay=0.9999, micro_batches=2))
    after, metrics = step(state, small.batch(0))
    assert jax.tree.all(jax.tree.map(lambda p: p.dtype == jnp.bfloat16, after.params))
    assert jax.tree.all(jax.tree.map(lambda e: e.dtype == jnp.float32, after.ema))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert metrics["grad_norm"].dtype == jnp.float32
    # A ten-thousandth of the change; bfloat16 near 1 moves by 1/256 or not at all.
    change = 1e-4 * (after.params["norm"].astype(jnp.float32) - before)
    assert float(jnp.abs(change).max()) > 0
    np.testing.assert_allclose(after.ema["norm"] - before, change, atol=2e-7)


def test_bfloat16_compute_follows_float32_training(small):
    model = Transformer(dataclasses.replace(small.config, dtype="bfloat16"))
    state, batches = start(small.model), [small.batch(0, weights="ones")] * 8
    wide, a = train(compiled(small.model, NextToken(), settings()), state, batches)
    narrow, b = train(compiled(model, NextToken(), settings()), state, batches)
    assert jax.tree.all(jax.tree.map(lambda p: p.dtype == jnp.float32, narrow.params))
    assert jax.tree.all(
        jax.tree.map(lambda m: m.dtype != jnp.bfloat16, (narrow.opt_state, narrow.aux))
    )
    np.testing.assert_allclose(b["loss"], a["loss"], rtol=0.01)
    assert_close(narrow.params, wide.params, 0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("objective", [NextToken(z_loss=1e-3), Patch(k=2, average="offset")])
def test_no_step_relies_on_implicit_promotion(small, dtype, objective):
    model = Transformer(dataclasses.replace(small.config, dtype=dtype))
    config = settings(schedule=Cosine(2), micro_batches=2, clip_norm=1.0, ema_decay=0.9)
    step = make_train_step(model, objective, ADAMW.build(model.config), config)
    with jax.numpy_dtype_promotion("strict"):
        state = jax.eval_shape(lambda: start(model, objective, ema=True))
        after, _ = jax.eval_shape(step, state, small.batch(0))
    assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, state)


def test_the_schedule_counts_from_the_stage(small):
    config = settings(schedule=Cosine(4, final_factor=0.0), first_step=3, stage_steps=12)
    step = compiled(small.model, NextToken(), config)
    state, batch = start(small.model), small.batch(0)
    for at, factor in ((3, 0.25), (6, 1.0), (7, 1.0), (11, 0.5), (15, 0.0)):
        _, metrics = step(state.replace(step=jnp.int32(at)), batch)
        np.testing.assert_allclose(metrics["learning_rate"], 1e-2 * factor, atol=1e-8)


def test_new_values_never_compile_anew(small):
    step = jax.jit(make_train_step(small.model, NextToken(), optax.sgd(1.0), settings()))
    state = start(small.model, optimizer=optax.sgd(1.0))
    train(step, state, [small.batch(seed) for seed in range(3)])
    assert step._cache_size() == 1


MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"tensor": 2, "data": 4},
    "sequence": {"sequence": 2, "data": 4},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
    "all but data": {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2},
}


def on_mesh(small, objective, config, sizes, batches):
    mesh = build_mesh(MeshConfig(**sizes))
    optimizer = ADAMW.build(small.config)
    with jax.set_mesh(mesh):
        state = start(small.model, objective)
        layout = state_shardings(jax.eval_shape(lambda: state), small.model, mesh)
        state = jax.device_put(state, layout)
        step = jax.jit(
            make_train_step(small.model, objective, optimizer, config), out_shardings=(layout, None)
        )
        return train(step, state, batches)


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_every_mesh_trains_what_one_device_trains(small, sizes):
    batches = [small.batch(seed) for seed in range(5)]
    config = settings(clip_norm=1.0)
    alone, a = train(compiled(small.model, NextToken(), config), start(small.model), batches)
    together, b = on_mesh(small, NextToken(), config, sizes, batches)
    assert len(together.params["head"].sharding.device_set) == 8
    assert_close(jax.device_get(together.params), jax.device_get(alone.params), 1e-5)
    assert_close(jax.device_get(a), jax.device_get(b), 1e-4)


def test_patches_and_micro_batches_train_the_same_on_a_mesh(small):
    batches = [small.batch(seed) for seed in range(3)]
    config, objective = settings(micro_batches=2), Patch(k=2)
    alone, _ = train(
        compiled(small.model, objective, config), start(small.model, objective), batches
    )
    together, _ = on_mesh(small, objective, config, MESHES["mixed"], batches)
    assert_close(jax.device_get(together.params), jax.device_get(alone.params), 1e-5)


def test_evaluation_returns_the_sums_of_the_loss(small):
    batch, params = small.batch(0), small.model.init(jax.random.key(0))
    step = make_eval_step(small.model, NextToken())
    assert step is make_eval_step(Transformer(small.config), NextToken())
    total, weight = step(params, (), batch)["loss"]
    np.testing.assert_allclose(weight, batch.weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(total / weight, naive_mean(small.model, params, batch), rtol=1e-6)


def test_metrics_of_micro_batches_are_ratios_of_sums(small):
    @struct.dataclass
    class Sums:
        tokens: jax.Array

    @dataclasses.dataclass(frozen=True)
    class Ratio(Probe):
        def loss(self, model, params, aux, batch, key) -> Loss:
            mass = jnp.abs(batch.weights).sum()
            found = {"share": (batch.weights.sum(), mass)}
            return Loss(params["norm"].sum(), mass, found, aux)

        def init(self, key, model, params):
            return Sums(jnp.zeros(()))

    batch = small.batch(0)
    config = settings(micro_batches=4)
    step = jax.jit(make_train_step(small.model, Ratio(), optax.sgd(1.0), config))
    _, metrics = step(start(small.model, Ratio(), optax.sgd(1.0)), batch)
    expected = batch.weights.sum() / jnp.abs(batch.weights).sum()
    np.testing.assert_allclose(metrics["share"], expected, rtol=1e-6)
