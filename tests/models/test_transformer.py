import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.models import Edits, Transformer, parameters
from tokjax.models.edits import SITES
from tokjax.models.layers import norm
from tokjax.models.transformer import with_vocabulary

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def variant(tiny, **changes):
    return Transformer(dataclasses.replace(tiny.config, **changes))


@pytest.fixture(scope="module")
def plain_gradients(tiny):
    """Loss and gradients of a variant of the tiny model; each is compiled once."""

    @functools.cache
    def gradients(**changes):
        model = variant(tiny, **changes)

        def loss(params):
            logits, _ = model(params, tiny.tokens, **tiny.packed)
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])

        return jax.jit(jax.value_and_grad(loss))(tiny.params)

    return gradients


def logits_of(model, params, tokens, **kwargs):
    return jax.jit(lambda p: model(p, tokens, **kwargs)[0])(params)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("attention", ["dense", "blockwise"])
def test_logits_equal_the_forward_pass_written_in_numpy(tiny, reference, activation, attention):
    model = variant(tiny, activation=activation, attention=attention)
    expected, _ = reference(model.config, tiny.params, tiny.tokens, **tiny.packed)
    logits = logits_of(model, tiny.params, tiny.tokens, **tiny.packed)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, **TOLERANCE)


def test_tied_embeddings_are_the_output_head(tiny, reference):
    model = variant(tiny, tie_embeddings=True)
    params = {name: leaf for name, leaf in tiny.params.items() if name != "head"}
    expected, _ = reference(model.config, params, tiny.tokens)
    np.testing.assert_allclose(logits_of(model, params, tiny.tokens), expected, **TOLERANCE)


@pytest.mark.parametrize("form", ["unroll", "unstacked"])
def test_scanned_layers_equal_unrolled_ones(tiny, form):
    scanned = logits_of(tiny.model, tiny.params, tiny.tokens, **tiny.packed)
    model, params = tiny.model, tiny.params
    if form == "unroll":
        model = variant(tiny, unroll=3)
    else:
        params = parameters.unstack(params)
    other = logits_of(model, params, tiny.tokens, **tiny.packed)
    np.testing.assert_allclose(other, scanned, **TOLERANCE)


def test_every_capture_site_equals_numpys(tiny, reference):
    _, expected = reference(tiny.config, tiny.params, tiny.tokens, **tiny.packed)
    out = jax.jit(lambda p: tiny.model(p, tiny.tokens, capture=frozenset(SITES), **tiny.packed)[1])(
        tiny.params
    )
    assert set(out.captured) == set(SITES) == set(expected)
    for site in SITES:
        np.testing.assert_allclose(out.captured[site], expected[site], err_msg=site, **TOLERANCE)


def test_captures_are_the_same_from_unstacked_layers_and_through_rematerialisation(tiny):
    sites = frozenset({"resid_mid", "k", "attn_out"})

    def captured(model, params):
        return jax.jit(lambda p: model(p, tiny.tokens, capture=sites)[1].captured)(params)

    scanned = captured(variant(tiny, remat="block"), tiny.params)
    unrolled = captured(variant(tiny, remat="none"), parameters.unstack(tiny.params))
    assert set(scanned) == sites
    for site in sites:
        np.testing.assert_allclose(scanned[site], unrolled[site], **TOLERANCE)


def test_capture_applies_its_function_inside_the_layer_loop(tiny):
    T = tiny.tokens.shape[1]
    mean_of_heads = lambda p: p.mean(1)[:, -1]  # noqa: E731

    def reduced(params):
        return tiny.model(params, tiny.tokens, capture={"attn_probs": mean_of_heads})[1].captured

    whole = tiny.model(tiny.params, tiny.tokens, capture={"attn_probs"})[1].captured["attn_probs"]
    compiled = jax.jit(reduced)
    np.testing.assert_allclose(
        compiled(tiny.params)["attn_probs"], whole.mean(2)[:, :, -1], **TOLERANCE
    )
    layers, batch, heads = tiny.config.n_layers, *tiny.tokens.shape[:1], tiny.config.n_heads
    text = compiled.lower(tiny.params).compile().as_text()
    assert f"f32[{layers},{batch},{heads},{T},{T}]" not in text
    assert f"f32[{layers},{batch},{T}]" in text


def test_unknown_capture_site_is_refused_with_the_nearest_name(tiny):
    with pytest.raises(ValueError, match=r"unknown capture site 'resid_pots'.*resid_post"):
        tiny.model(tiny.params, tiny.tokens, capture={"resid_pots"})


def test_changing_the_future_moves_nothing_before_it(tiny):
    forward = jax.jit(lambda tokens: tiny.model(tiny.params, tokens)[0])
    changed = tiny.tokens.copy()
    changed[:, 7:] = (changed[:, 7:] + 13) % tiny.config.vocabulary
    before, after = forward(tiny.tokens), forward(changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).min(axis=-1).max() > 0


@pytest.mark.parametrize("attention", ["dense", "blockwise"])
def test_the_jacobian_across_segments_and_from_the_future_is_exactly_zero(tiny, attention):
    model = variant(tiny, attention=attention)
    segments = tiny.packed["segments"][:1]
    x = tiny.model.embed(tiny.params, tiny.tokens[:1])

    def hidden(x):
        out = model.backbone(
            tiny.params, x, segments=segments, positions=tiny.packed["positions"][:1]
        )
        return out.x[0].sum(-1)

    jacobian = jax.jit(jax.jacrev(hidden))(x)[:, 0]  # [T, T, D]
    T = segments.shape[1]
    allowed = np.tril(np.ones((T, T), bool)) & (segments[0][:, None] == segments[0])
    size = np.abs(jacobian).max(-1)
    assert (size[~allowed] == 0).all()
    assert (size[allowed] > 0).all()


def test_a_packed_row_equals_its_documents_alone(tiny):
    packed = logits_of(tiny.model, tiny.params, tiny.tokens, **tiny.packed)
    for b, segment in ((0, 3), (1, 2)):
        where = tiny.packed["segments"][b] == segment
        alone = logits_of(tiny.model, tiny.params, tiny.tokens[b : b + 1, where])
        np.testing.assert_allclose(alone[0], packed[b, where], **TOLERANCE)


def test_embeddings_need_not_come_from_tokens(tiny):
    x = jax.random.normal(jax.random.key(1), (2, 5, tiny.config.d_model))
    mixed = 0.5 * (x[:1] + x[1:])
    spread = lambda x: tiny.model.backbone(tiny.params, x).x.var()  # noqa: E731
    gradient = jax.jit(jax.grad(spread))(mixed)
    assert gradient.shape == mixed.shape
    assert np.abs(gradient).min() > 0


def test_an_id_outside_the_vocabulary_is_never_read_as_another_token(tiny):
    x = tiny.model.embed(tiny.params, jnp.array([[0, tiny.config.vocabulary]]))
    assert np.isfinite(x[0, 0]).all()
    assert np.isnan(x[0, 1]).all()


@pytest.mark.parametrize(
    ("attention", "remat"),
    [("dense", "block"), ("blockwise", "block"), ("blockwise", "elementwise")],
)
def test_remat_policies_give_equal_gradients(tiny, plain_gradients, attention, remat):
    loss, grads = plain_gradients(attention=attention, remat=remat)
    plain_loss, plain = plain_gradients(attention="dense", remat="none")
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain))
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, plain)


def test_vmap_over_models_equals_each_model_alone(tiny):
    other = jax.tree.map(lambda a: a * 1.1, tiny.params)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), tiny.params, other)
    logits = jax.jit(jax.vmap(lambda p: tiny.model(p, tiny.tokens)[0]))(both)
    for i, params in enumerate((tiny.params, other)):
        np.testing.assert_allclose(
            logits[i], logits_of(tiny.model, params, tiny.tokens), **TOLERANCE
        )


@pytest.mark.parametrize("attention", ["dense", "blockwise"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_dtype_is_promoted_silently_forward_or_backward(tiny, attention, dtype):
    model = variant(tiny, attention=attention, dtype=dtype)
    edits = Edits(
        attention_bias=jnp.zeros((3, 1, 1, 12, 12)),
        layer_gate=jnp.ones((3, 1, 1)),
        add={"resid_post": jnp.zeros((3, 1, 1, 24))},
    )

    def loss(params, edits):
        logits, out = model(params, tiny.tokens, edits=edits, **tiny.packed)
        return logits.sum(), out.x

    with jax.numpy_dtype_promotion("strict"):
        for given in (None, edits):
            (total, x), grads = jax.eval_shape(
                jax.value_and_grad(loss, has_aux=True), tiny.params, given
            )
            assert total.dtype == jnp.float32
            assert x.dtype == jnp.dtype(dtype)
            assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


def test_bfloat16_compute_follows_float32_and_keeps_float32_gradients(tiny, reference):
    model = variant(tiny, dtype="bfloat16")
    expected, _ = reference(model.config, tiny.params, tiny.tokens)
    logits = logits_of(model, tiny.params, tiny.tokens)
    assert logits.dtype == jnp.float32
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 0.05  # not float32 in disguise, nor noise


def test_norm_scales_keep_float32_precision_under_bfloat16_compute(tiny):
    config = dataclasses.replace(tiny.config, dtype="bfloat16")
    weights = jax.tree.map(lambda a: a[0], tiny.params["layers"]["mlp"])
    x = tiny.params["embedding"][tiny.tokens].astype(jnp.bfloat16)

    def added(scale):
        # Operation by operation: a compiler may leave out the rounding that is looked for.
        return norm(config, {"norm": jnp.full_like(weights["norm"], scale)}, x)

    # bfloat16 cannot tell 1.002 from 1: a scale rounded to it would learn in steps of 0.008.
    assert (added(1.0) != added(1.002)).any()


def test_a_frequent_tokens_gradients_add_up_in_float32(tiny):
    # A sum of ones in bfloat16 gets no further than 256.
    model = variant(tiny, dtype="bfloat16")
    tokens = jnp.full((1, 1000), 7)

    def total(params):
        return model.embed(params, tokens).astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(total))(tiny.params)["embedding"]
    np.testing.assert_array_equal(gradient[7], 1000.0)


def test_with_vocabulary_fills_only_an_open_size(tiny):
    unknown = dataclasses.replace(tiny.config, vocab_size=None)
    assert with_vocabulary(unknown, 99).vocabulary == 99
    assert with_vocabulary(tiny.config, 99).vocabulary == tiny.config.vocabulary
