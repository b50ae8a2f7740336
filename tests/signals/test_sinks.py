"""Sinks, massive activations and cosines of one pass."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.signals import SinkRules, activation_ratio, cosine_to_bos, find_sinks
from tokjax.signals.sinks import first_positions

V, LAYERS, T, D = 11, 3, 24, 16
MODEL = Transformer(
    ModelConfig(
        vocab_size=V,
        d_model=D,
        n_layers=LAYERS,
        n_heads=2,
        d_ff=24,
        max_positions=T,
        positions="none",
        remat="none",
    )
)
SEGMENTS = jnp.array([[1] * 20 + [0] * 4, [1] * 16 + [2] * 8])


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


@pytest.fixture(scope="module")
def even(params):
    """Parameters with which all keys are attended alike."""
    attention = dict(params["layers"]["attention"])
    attention["query"] = jnp.zeros_like(attention["query"])
    return {**params, "layers": {**params["layers"], "attention": attention}}


@pytest.fixture(scope="module")
def embedded(params):
    tokens = np.random.default_rng(0).integers(0, V, (2, T))
    return MODEL.embed(params, jnp.asarray(tokens, jnp.int32))


def test_segments_begin_where_ids_change():
    found = first_positions(jnp.array([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 0, 0]]))
    np.testing.assert_array_equal(found, [[0, 0, 2, 2, 2, 5], [0, 0, 0, 0, 4, 4]])


def test_uniform_attention_has_the_known_mass_and_no_sinks(even, embedded):
    segments = jnp.array([[1] * 4 + [0] * 20, [1] * 20 + [2] * 4])
    found = find_sinks(MODEL, even, embedded, segments=segments)
    expected = [0.520833, (1 / 2 + 1 / 3 + 1 / 4) / 3, 7 / 24, 0.25]
    for layer in range(LAYERS):
        np.testing.assert_allclose(found.mass[layer, 0, :4], expected, atol=1e-6)
        # The second piece of a packed row is a text of its own.
        np.testing.assert_allclose(found.mass[layer, 1, 20:], expected, atol=1e-6)
    np.testing.assert_allclose(found.mass[0], found.uniform, atol=1e-6)
    assert not np.asarray(found.mass)[:, 0, 4:].any()
    assert not found.sinks.any()


def test_keys_that_collect_attention_are_sinks_and_intermediate_behind_the_first(params, embedded):
    # In the first layer all queries look for feature 1, which two tokens of a row have.
    at = params["layers"]["attention"]
    x = embedded.at[:, :, 0].set(1.0).at[0, jnp.array([0, 7]), 1].set(1.0)
    query = jnp.zeros_like(at["query"]).at[0, 0, ::8].set(4.0)
    key = jnp.zeros_like(at["key"]).at[0, 1, ::8].set(4.0)
    attention = {**at, "query": query, "key": key}
    made = {**params, "layers": {**params["layers"], "attention": attention}}
    found = find_sinks(MODEL, made, x, segments=SEGMENTS)
    # The two share the attention of later queries; of the first one's much is its uniform share.
    np.testing.assert_allclose(found.mass[0, 0, 7], 0.5, atol=0.02)
    np.testing.assert_allclose(found.mass[0, 0, 0], (7 + 13 / 2) / 20, atol=0.02)
    assert np.argwhere(found.sinks).tolist() == [[0, 0, 7]]
    assert np.argwhere(found.intermediate).tolist() == [[0, 0, 7]]
    lower = find_sinks(MODEL, made, x, segments=SEGMENTS, rules=SinkRules(over_uniform=3.0))
    assert np.flatnonzero(lower.sinks[0, 0]).tolist() == [0, 7]
    assert np.flatnonzero(lower.intermediate[0, 0]).tolist() == [7]
    # Both thresholds are arguments, and another value compiles nothing.
    compiled: Any = find_sinks
    before = compiled._cache_size()
    for rules in (SinkRules(over_uniform=100.0), SinkRules(over_median=np.inf)):
        assert not find_sinks(MODEL, made, x, segments=SEGMENTS, rules=rules).sinks.any()
    assert compiled._cache_size() == before
    output = jnp.arange(T) >= 5
    candidates = jnp.broadcast_to(~output, SEGMENTS.shape)
    narrower = find_sinks(MODEL, made, x, segments=SEGMENTS, candidates=candidates)
    assert not narrower.intermediate.any()


def test_states_are_those_of_the_pass_and_cosines_those_with_each_first_token(params, embedded):
    found = find_sinks(MODEL, params, embedded, segments=SEGMENTS)
    out = jax.jit(
        lambda p, x: MODEL.backbone(p, x, segments=SEGMENTS, capture={"resid_mid", "resid_post"})
    )(params, embedded)
    states = np.concatenate([embedded[None], out.captured["resid_post"]])
    expected = np.array(cosine_to_bos(jnp.asarray(states), first_positions(SEGMENTS)))
    there = np.asarray(SEGMENTS) > 0
    np.testing.assert_allclose(found.cosines, np.where(there, expected, 0), atol=1e-5)
    assert found.cosines.shape == (LAYERS + 1, 2, T)
    np.testing.assert_allclose(np.asarray(found.cosines)[:, 1, [0, 16]], 1, atol=1e-5)
    for name, given in (("before_mlp", "resid_mid"), ("after_mlp", "resid_post")):
        sizes = np.abs(np.asarray(out.captured[given]))
        activations = getattr(found, name)
        np.testing.assert_allclose(activations.largest, sizes.max(-1) * there, rtol=1e-5)
        ratio = sizes[:, there].max((1, 2)) / np.median(sizes[:, there], axis=(1, 2))
        np.testing.assert_allclose(activation_ratio(activations), ratio, rtol=1e-4)
    behind = there & ~np.isin(np.arange(T), [0]) & ~((np.arange(T) == 16) & [[False], [True]])
    np.testing.assert_array_equal(found.behind, behind)
    np.testing.assert_array_equal(np.asarray(found.same_feature)[:, 1, 16], [True] * LAYERS)


def test_massive_activations_that_the_feed_forward_makes_show_behind_it_alone(params, embedded):
    # In the second layer a neuron that always fires writes feature 5.
    mlp = params["layers"]["mlp"]
    down = mlp["down"].at[1, :, 5].set(1e5)
    made = {**params, "layers": {**params["layers"], "mlp": {**mlp, "down": down}}}
    rules = SinkRules(activation=0.0, activation_over_median=50.0)
    found = find_sinks(MODEL, made, embedded, segments=SEGMENTS, rules=rules)
    assert not found.before_mlp.massive[:2].any() and not found.after_mlp.massive[0].any()
    massive = np.asarray(found.after_mlp.massive[1])
    assert massive.any() and (np.asarray(found.after_mlp.feature[1])[massive] == 5).all()
    assert not massive[np.asarray(SEGMENTS) == 0].any()
    # It stays in the residual stream.
    assert np.asarray(found.before_mlp.massive[2]).any()
    absolute = find_sinks(
        MODEL, made, embedded, segments=SEGMENTS, rules=dataclasses.replace(rules, activation=1e9)
    )
    assert not absolute.after_mlp.massive.any()
    some = jnp.zeros(SEGMENTS.shape, bool).at[0, 3].set(True)
    one = activation_ratio(found.after_mlp, some)
    expected = found.after_mlp.largest[:, 0, 3] / found.after_mlp.median
    np.testing.assert_allclose(one, expected, rtol=1e-6)


def test_encoders_are_refused():
    from tokjax.models import Encoder

    model = Encoder(dataclasses.replace(MODEL.config, causal=False))
    with pytest.raises(ConfigError, match="encoders"):
        find_sinks(model, {}, jnp.zeros((1, 4, D)))
