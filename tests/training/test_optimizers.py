import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.training.optimizers import (
    Adafactor,
    AdamW,
    Constant,
    Cosine,
    Lion,
    Muon,
    WarmupStableDecay,
    decay_mask,
)

CONFIG = ModelConfig(
    vocab_size=24,
    d_model=16,
    n_layers=2,
    n_heads=2,
    d_ff=24,
    tie_embeddings=False,
    attention_bias=True,
    remat="none",
)
TABLES = {"embedding", "head"}


def by_path(tree):
    return {
        "/".join(k.key for k in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    start = Transformer(CONFIG).init(jax.random.key(0))
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), start
    )  # biases and norms too: zeros would hide their decay


def first_update(optimizer, params, gradient):
    @jax.jit
    def update(gradient, params):
        transform = optimizer.build(CONFIG)
        return transform.update(gradient, transform.init(params), params)[0]

    return by_path(update(gradient, params))


def test_decay_mask_leaves_out_norms_and_biases():
    every, matrices = (by_path(decay_mask(CONFIG, e)({})) for e in (True, False))
    assert {p for p, kept in every.items() if not kept} == {
        "norm",
        "layers/attention/norm",
        "layers/mlp/norm",
        *(f"layers/attention/{n}_bias" for n in ("query", "key", "value")),
    }
    assert {p for p in every if every[p] != matrices[p]} == TABLES


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("kind", [AdamW, Lion, Adafactor])
def test_weight_decay_shrinks_exactly_what_the_mask_names(params, kind, embeddings):
    optimizer = kind(weight_decay=0.25, decay_embeddings=embeddings)
    updates = first_update(optimizer, params, jax.tree.map(jnp.zeros_like, params))
    mask = by_path(decay_mask(CONFIG, embeddings)({}))
    for path, p in by_path(params).items():
        expected = -0.25 * p if mask[path] else jnp.zeros_like(p)
        np.testing.assert_allclose(updates[path], expected, rtol=1e-6, err_msg=path)


def test_without_weight_decay_adamw_is_adam(params):
    gradient = jax.tree.map(lambda p: jnp.sin(7 * p), params)
    found = first_update(AdamW(weight_decay=0.0), params, gradient)
    adam = optax.adam(1.0, 0.9, 0.95)
    expected = by_path(adam.update(gradient, adam.init(params), params)[0])
    for path, update in found.items():
        np.testing.assert_allclose(update, expected[path], rtol=1e-6, err_msg=path)


def test_rows_of_the_embedding_that_were_not_read_need_not_decay(params):
    gradient = jax.tree.map(jnp.zeros_like, params)
    gradient["embedding"] = gradient["embedding"].at[jnp.array([2, 5])].set(0.3)
    rows = first_update(AdamW(weight_decay=0.25, decay_rows="touched"), params, gradient)
    every = first_update(AdamW(weight_decay=0.25), params, gradient)
    for path, update in rows.items():
        if path != "embedding":
            np.testing.assert_array_equal(update, every[path], err_msg=path)
    table = np.asarray(params["embedding"])
    read = np.isin(np.arange(24), [2, 5])
    np.testing.assert_allclose(rows["embedding"][~read], np.zeros_like(table[~read]), atol=1e-7)
    np.testing.assert_array_equal(rows["embedding"][read], every["embedding"][read])
    np.testing.assert_allclose(every["embedding"][~read], -0.25 * table[~read], rtol=1e-6)


def test_rows_of_a_tied_table_all_have_gradients_and_are_refused():
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    with pytest.raises(ConfigError, match="tie_embeddings=False"):
        AdamW(decay_rows="touched").build(tied)
    with pytest.raises(ConfigError, match="unknown decay_rows='some'"):
        AdamW(decay_rows="some")  # type: ignore[arg-type]


def test_muons_two_weight_decays_spare_norms_and_biases(params):
    optimizer = Muon(weight_decay=0.25, adam_weight_decay=0.5, adam_lr_ratio=0.1)
    updates = first_update(optimizer, params, jax.tree.map(jnp.zeros_like, params))
    mask = by_path(decay_mask(CONFIG, True)({}))
    for path, p in by_path(params).items():
        rate = 0.0 if not mask[path] else 0.05 if path in TABLES else 0.25
        np.testing.assert_allclose(updates[path], -rate * p, rtol=1e-5, err_msg=path)


def test_muon_orthogonalises_each_layer_by_itself(params):
    rng = np.random.default_rng(1)
    gradient = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    optimizer = Muon(weight_decay=0.0, adam_lr_ratio=0.1)
    updates = first_update(optimizer, params, gradient)
    # Layer 1's gradient is replaced by a much larger one: layer 0 must not notice.
    changed = jax.tree.map(lambda g: g.at[1].multiply(100.0 * jnp.sign(g[1])), gradient["layers"])
    others = first_update(optimizer, params, {**gradient, "layers": changed})
    matrices = [p for p, leaf in updates.items() if leaf.ndim == 3]
    assert len(matrices) == 7
    for path in matrices:
        np.testing.assert_allclose(updates[path][0], others[path][0], rtol=1e-5, atol=1e-6)
        assert np.abs(updates[path][1] - others[path][1]).max() > 0.01
        rows, columns = updates[path].shape[1:]
        for layer in updates[path]:
            singular = np.linalg.svd(layer, compute_uv=False)
            # Newton-Schulz with Muon's coefficients ends between 0.7 and 1.2 of
            # sqrt(max(1, outputs / inputs)).
            singular = singular / max(1.0, columns / rows) ** 0.5
            assert 0.5 < singular.min() <= singular.max() < 1.3, path
    # Everything else is Adam's first step: the sign of the gradient times the ratio.
    flat = by_path(gradient)
    for path in sorted(set(updates) - set(matrices)):
        np.testing.assert_allclose(updates[path], -0.1 * np.sign(flat[path]), rtol=1e-3)


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [(AdamW(), 0.01), (Lion(), 0.003), (Adafactor(), 0.03), (Muon(), 0.02)],
    ids=lambda v: type(v).__name__,
)
def test_each_optimiser_decreases_the_loss(optimizer, rate):
    model = Transformer(CONFIG)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 24, (2, 9)), jnp.int32)

    @jax.jit
    def loss_and_gradient(params):
        def loss(params):
            logits, _ = model(params, tokens[:, :-1])
            nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return nll.mean()

        return jax.value_and_grad(loss)(params)

    transform = optimizer.build(CONFIG)
    params = model.init(jax.random.key(0))
    state = transform.init(params)

    @jax.jit
    def update(gradient, state, params):
        updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates)), state

    start = loss_and_gradient(params)[0]
    for _ in range(20):
        params, state = update(loss_and_gradient(params)[1], state, params)
    assert loss_and_gradient(params)[0] < 0.6 * start


def factors(schedule, steps, at):
    return [float(schedule.factor(jnp.float32(step), steps)) for step in at]


def test_constant_schedule():
    assert factors(Constant(), 10, [0, 9]) == [1.0, 1.0]
    found = factors(Constant(warmup_steps=4), 10, [0, 1, 3, 4, 10])
    np.testing.assert_allclose(found, [0.25, 0.5, 1.0, 1.0, 1.0])


def test_cosine_schedule():
    schedule = Cosine(warmup_steps=10, final_factor=0.1)
    found = factors(schedule, 110, [0, 9, 10, 35, 60, 110, 500])
    quarter = 0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2
    np.testing.assert_allclose(found, [0.1, 1.0, 1.0, quarter, 0.55, 0.1, 0.1], rtol=1e-6)
    # A stage shorter than its warm-up only rises.
    np.testing.assert_allclose(factors(schedule, 5, [0, 4]), [0.1, 0.5], rtol=1e-6)


def test_warmup_stable_decay_schedule():
    schedule = WarmupStableDecay(warmup_steps=10, decay_share=0.2, final_factor=0.05)
    found = factors(schedule, 100, [0, 9, 10, 80, 90, 100, 200])
    np.testing.assert_allclose(found, [0.1, 1.0, 1.0, 1.0, 0.525, 0.05, 0.05], rtol=1e-6)


@pytest.mark.parametrize("schedule", [Constant(3), Cosine(3), WarmupStableDecay(3)])
def test_schedules_take_traced_steps_under_strict_promotion(schedule):
    with jax.numpy_dtype_promotion("strict"):
        factor = jax.jit(lambda step: schedule.factor(step, 20))(jnp.float32(1))
    np.testing.assert_allclose(factor, 2 / 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (AdamW, {"peak_lr": -1e-3}, "peak_lr=-0.001"),
        (AdamW, {"b2": 1.0}, "b2=1.0"),
        (AdamW, {"eps": -1e-8}, "eps=-1e-08"),
        (AdamW, {"peak_lr": float("nan")}, "peak_lr=nan"),
        (Lion, {"weight_decay": -1.0}, "weight_decay=-1.0"),
        (Adafactor, {"clipping_threshold": 0.0}, "clipping_threshold=0.0"),
        (Muon, {"ns_steps": 0}, "ns_steps=0"),
        (Muon, {"weight_decay": -0.1}, "weight_decay=-0.1"),
        (Muon, {"adam_lr_ratio": -1.0}, "adam_lr_ratio=-1.0"),
        (Constant, {"warmup_steps": -1}, "warmup_steps=-1"),
        (Cosine, {"final_factor": 1.5}, "final_factor=1.5"),
        (WarmupStableDecay, {"decay_share": -0.5}, "decay_share=-0.5"),
    ],
    ids=str,
)
def test_impossible_settings_are_named(kind, fields, message):
    with pytest.raises(ConfigError, match=message):
        kind(**fields)
