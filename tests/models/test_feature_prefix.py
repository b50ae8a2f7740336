"""Frames as inputs of a decoder, and views of a model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.models.feature_prefix import FeaturePrefix, pool_frames
from tokjax.models.views import Observed, Prefilled

FRAMES = jnp.arange(1.0, 11.0).reshape(1, 5, 2)
COUNTS = jnp.array([5])
MODEL = Transformer(
    ModelConfig(vocab_size=7, d_model=8, n_layers=2, n_heads=2, d_ff=8, max_positions=8)
)


def test_groups_are_averaged_or_stacked_and_what_is_not_a_row_s_own_has_no_effect():
    mean = pool_frames(FRAMES, COUNTS, 2)
    np.testing.assert_allclose(mean[0], [[2, 3], [6, 7], [9, 10]])  # the last group is one frame
    stacked = pool_frames(FRAMES, COUNTS, 2, "stack")
    np.testing.assert_allclose(stacked[0], [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]])
    for pooling in ("mean", "stack"):
        short = pool_frames(FRAMES[:, :3], jnp.array([3]), 2, pooling)
        longer = pool_frames(FRAMES.at[:, 3:].set(jnp.nan), jnp.array([3]), 2, pooling)
        np.testing.assert_array_equal(longer[:, :2], short)
        assert not longer[:, 2].any()
    np.testing.assert_array_equal(pool_frames(FRAMES, COUNTS, 1), FRAMES)


def test_the_projector_is_linear_relu_linear_and_perhaps_a_layer_norm():
    prefix = FeaturePrefix(2, factor=2, pooling="stack", hidden=3)
    params = prefix.init(jax.random.key(0), 8)
    assert {k: v.shape for k, v in params.items()} == {
        "enter": (4, 3), "enter_bias": (3,), "leave": (3, 8), "leave_bias": (8,),
    }  # fmt: skip
    params = {**params, "enter_bias": jnp.array([0.5, -100.0, 0.1])}
    x = np.asarray(pool_frames(FRAMES, COUNTS, 2, "stack"))
    hidden = np.maximum(x @ np.asarray(params["enter"]) + np.asarray(params["enter_bias"]), 0)
    expected = hidden @ np.asarray(params["leave"])
    found = prefix(params, FRAMES, COUNTS)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert prefix.count(5) == found.shape[1] == 3
    normed = FeaturePrefix(2, factor=2, layer_norm=True)
    made = normed.init(jax.random.key(0), 8, "bfloat16")
    y = np.asarray(normed(made, FRAMES, COUNTS))
    assert made["norm"].dtype == jnp.bfloat16 and y.dtype == np.float32
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(-1), 1, atol=1e-3)


def test_impossible_prefixes_and_frames_are_refused():
    refused: list[tuple[dict[str, Any], str]] = [
        ({"features": 0}, "features=0"),
        ({"features": 2, "factor": 0}, "factor=0"),
        ({"features": 2, "hidden": 0}, "hidden=0"),
        ({"features": 2, "pooling": "stacked"}, "Did you mean 'stack'"),
    ]
    for options, said in refused:
        with pytest.raises(ConfigError, match=said):
            FeaturePrefix(**options)
    prefix = FeaturePrefix(3)
    with pytest.raises(ConfigError, match="features=3"):
        prefix(prefix.init(jax.random.key(0), 8), FRAMES, COUNTS)


def test_views_change_embeddings_and_listen_and_are_equal_to_nothing_else():
    params = MODEL.init(jax.random.key(0))
    tokens = jnp.array([[1, 2, 3, 4]])
    vectors, slots = jnp.ones((1, 2, 8)), jnp.array([[-1, 1, -1, 0]])
    filled = Prefilled.of(MODEL, vectors, slots)
    x = filled.embed(params, tokens)
    np.testing.assert_array_equal(x[:, [1, 3]], vectors)
    np.testing.assert_array_equal(x[:, [0, 2]], MODEL.embed(params, tokens)[:, [0, 2]])
    with pytest.raises(ConfigError, match="reads each row once"):
        filled.embed(params, tokens[:, :2])

    heard = Observed.of(filled, {"resid_pre": lambda h: h.sum(), "resid_post": lambda h: h.max()})
    assert heard != Observed.of(filled, heard.reads) and heard == heard
    mean = lambda h: h.mean()  # noqa: E731
    out = heard.backbone(params, heard.embed(params, tokens), capture={"resid_post": mean})
    plain = MODEL.backbone(params, x, capture={"resid_pre", "resid_post"})
    np.testing.assert_array_equal(out.x, plain.x)
    states = plain.captured["resid_post"]
    assert set(out.captured) == {"resid_post"}
    np.testing.assert_allclose(out.captured["resid_post"], states.mean((1, 2, 3)), atol=1e-5)
    (noted,) = heard.found
    np.testing.assert_allclose(noted["resid_post"], states.max((1, 2, 3)), rtol=1e-5)
    sums = plain.captured["resid_pre"].sum((1, 2, 3))
    np.testing.assert_allclose(noted["resid_pre"], sums, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(heard.head(params).table, MODEL.head(params).table)
