"""The encoder-decoder and the encoder without any checkpoint: inputs, edits, captures, dtypes."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.models import (
    Edits,
    EncDecConfig,
    Encoder,
    EncoderDecoder,
    ModelConfig,
    Transformer,
    Write,
    parameters,
)
from tokjax.models.edits import CROSS_SITES, SITES
from tokjax.models.lora import LoraConfig
from tokjax.signals import token_stats

V, D, B, S, T = 31, 24, 2, 10, 6
SIZES = {"d_model": D, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 40}
ENCODER = ModelConfig(**SIZES, n_layers=2, causal=False, positions="relative", relative_buckets=8)
DECODER = ModelConfig(
    **SIZES, vocab_size=V, n_layers=3, cross_attention=True, norm_placement="both", qk_norm=True
)
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def randomised(model):
    """Parameters that are all random: ones and zeros would hide a part left out."""
    shapes, tree = jax.tree.flatten(model.init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    noise = (rng.normal(scale=0.3 if s.ndim < 3 else 0.1, size=s.shape) for s in shapes)
    leaves = [s + jnp.asarray(n, jnp.float32) for s, n in zip(shapes, noise, strict=True)]
    return jax.tree.unflatten(tree, leaves)


@pytest.fixture(scope="module")
def pair():
    model = EncoderDecoder(EncDecConfig(ENCODER, DECODER))
    rng = np.random.default_rng(1)
    mask = np.ones((B, S), bool)
    mask[0, 7:] = False
    params = randomised(model)
    inputs = rng.integers(0, V, (B, S)).astype(np.int32)
    return SimpleNamespace(
        model=model,
        params=params,
        inputs=inputs,
        tokens=rng.integers(0, V, (B, T)).astype(np.int32),
        memory=jax.jit(model.encode)(params, inputs, mask),
        decode=jax.jit(model.decode, static_argnames="capture"),
    )


def test_unrolled_layers_and_a_memory_computed_ahead_equal_the_scan(pair):
    expected, _ = pair.decode(pair.params, pair.tokens, pair.memory)
    apart = parameters.unstack(pair.params)
    ahead = pair.model.remember(apart, pair.memory)
    assert len(ahead.keys) == len(ahead.values) == DECODER.n_layers
    assert ahead.keys[0].shape == (B, S, 2, 8)
    logits, _ = pair.decode(apart, pair.tokens, ahead)
    np.testing.assert_allclose(logits, expected, **TOLERANCE)
    jax.tree.map(np.testing.assert_array_equal, parameters.stack(apart), pair.params)
    with pytest.raises(ValueError, match="unstacked parameters"):
        pair.model.decode(pair.params, pair.tokens, ahead)


def test_a_memory_computed_ahead_has_the_adapters_too(pair):
    lora = LoraConfig(rank=2, targets=("key", "value", "out"))
    model = EncoderDecoder(EncDecConfig(ENCODER, dataclasses.replace(DECODER, lora=lora)))
    params = parameters.unstack(randomised(model))
    assert "key_lora_b" in params["decoder"]["layers"][0]["cross"]
    decode = jax.jit(model.decode)
    expected, _ = decode(params, pair.tokens, pair.memory)
    logits, _ = decode(params, pair.tokens, model.remember(params, pair.memory))
    np.testing.assert_allclose(logits, expected, **TOLERANCE)


def test_captured_sites_of_cross_attention_are_its_parts(pair):
    sites = frozenset([*SITES, *CROSS_SITES])
    _, out = pair.decode(pair.params, pair.tokens, pair.memory, capture=sites)
    found = {name: np.asarray(value) for name, value in out.captured.items()}
    assert set(found) == sites
    assert found["cross_probs"].shape == (3, B, 4, T, S)
    np.testing.assert_allclose(found["cross_probs"].sum(-1), 1.0, rtol=1e-5)
    assert (found["cross_probs"][:, 0, :, :, 7:] == 0).all()
    np.testing.assert_allclose(
        found["resid_mid"] + found["cross_out"], found["resid_cross"], **TOLERANCE
    )
    # What the heads found are the probabilities times the values of the memory.
    values = pair.model.remember(pair.params, pair.memory).values
    heads = np.einsum("lbhts,lbshd->lbthd", found["cross_probs"], np.repeat(values, 2, axis=3))
    np.testing.assert_allclose(found["cross_heads"], heads, **TOLERANCE)
    scores = np.einsum(
        "lbthd,lbshd->lbhts",
        found["cross_q"],
        np.repeat(pair.model.remember(pair.params, pair.memory).keys, 2, axis=3),
    )
    scores = np.where(np.asarray(pair.memory.mask)[None, :, None, None], scores * 8**-0.5, -1e9)
    probabilities = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    np.testing.assert_allclose(found["cross_probs"], probabilities, **TOLERANCE)


def test_edits_reach_cross_attention(pair):
    def decoded(edits, capture=frozenset()):
        found = pair.decode(pair.params, pair.tokens, pair.memory, edits=edits, capture=capture)
        return found[0], found[1].captured

    plain, _ = decoded(Edits())
    # No attention to the memory, said in two ways.
    nowhere = Write(jnp.zeros((3, 1, 1, 1, 1)), jnp.ones((3, 1, 1, 1, 1), bool))
    nothing = Write(jnp.zeros((3, 1, 1, 1)), jnp.ones((3, 1, 1), bool))
    one, _ = decoded(Edits(write={"cross_probs": nowhere}))
    other, _ = decoded(Edits(write={"cross_out": nothing}))
    np.testing.assert_allclose(one, other, **TOLERANCE)
    assert np.abs(one - plain).max() > 0.01
    added = jnp.zeros((3, 1, 1, D)).at[1].set(0.5)
    edits = Edits(add={"cross_out": added, "resid_cross": -added})
    np.testing.assert_allclose(decoded(edits)[0], plain, **TOLERANCE)
    gate = Edits(layer_gate=jnp.zeros((3, 1, 1)))
    captured = decoded(gate, frozenset({"resid_pre", "resid_post"}))[1]
    np.testing.assert_array_equal(captured["resid_pre"], captured["resid_post"])


def test_sites_of_cross_attention_are_refused_where_there_is_none(pair):
    with pytest.raises(ValueError, match="unknown capture site 'cross_out'"):
        pair.model.run_encoder(pair.params, pair.inputs, capture={"cross_out"})
    edits = Edits(add={"cross_out": jnp.zeros((2, 1, 1, 1))})
    with pytest.raises(ValueError, match="unknown site 'cross_out'"):
        pair.model.encode(pair.params, pair.inputs, edits=edits)
    with pytest.raises(ValueError, match="cross_attention"):
        pair.model.decoder(pair.params["decoder"], pair.tokens)
    encoder, x = pair.model.encoder, pair.memory.x
    with pytest.raises(ValueError, match="cross_attention"):
        encoder.backbone(pair.params["encoder"], x, memory=pair.memory)


def test_the_encoder_reads_any_embeddings_and_passes_gradients_to_them(pair):
    x = jax.random.normal(jax.random.key(3), (B, S, D))
    continuous = EncoderDecoder(EncDecConfig(ENCODER, DECODER, inputs="embeddings"))
    assert jax.tree.structure(continuous.abstract_params()) == jax.tree.structure(pair.params)

    def spread(x):
        return continuous(pair.params, x, pair.tokens)[0].var()

    gradient = jax.jit(jax.grad(spread))(x)
    assert (np.abs(gradient).max(-1) > 0).all()
    with pytest.raises(ValueError, match="reads embeddings, not tokens"):
        continuous.encode(pair.params, pair.inputs)
    with pytest.raises(ValueError, match="reads embeddings, not frames"):
        continuous.embed_frames(pair.params, x)


def test_frames_are_halved_and_each_embedding_sees_seven_of_them():
    encoder = dataclasses.replace(ENCODER, positions="learned", max_positions=8)
    config = EncDecConfig(encoder, DECODER, inputs="frames", frame_width=5)
    model = EncoderDecoder(config)
    params = randomised(model)
    frames = jax.random.normal(jax.random.key(4), (1, 16, 5))
    embed = jax.jit(model.embed_frames)
    before = embed(params, frames)
    assert before.shape == (1, 8, D)
    moved = (before != embed(params, frames.at[:, 7].add(1.0)))[0].any(-1)
    assert np.flatnonzero(moved).tolist() == [3, 4]
    memory = model.encode(params, before)
    assert memory.x.shape == (1, 8, D)
    with pytest.raises(ValueError, match="reads frames, not tokens"):
        model.encode(params, jnp.zeros((1, 4), jnp.int32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", ["none", "elementwise", "block"])
def test_no_dtype_is_promoted_silently_and_every_parameter_learns(pair, dtype, remat):
    stacks = (dataclasses.replace(c, dtype=dtype, remat=remat) for c in (ENCODER, DECODER))
    model = EncoderDecoder(EncDecConfig(*stacks))

    def loss(params):
        logits, _ = model(params, pair.inputs, pair.tokens)
        return (jax.nn.logsumexp(logits, -1) - logits[..., 0]).mean()

    with jax.numpy_dtype_promotion("strict"):
        total, grads = jax.eval_shape(jax.value_and_grad(loss), pair.params)
    assert total.dtype == jnp.float32
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
    if (dtype, remat) == ("float32", "elementwise"):
        grads = jax.jit(jax.grad(loss))(pair.params)
        assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_parameters_are_counted_over_both_stacks(pair):
    counts = parameters.count_parameters(pair.model.config)
    leaves = jax.tree.leaves(pair.params)
    assert sum(counts.values()) == sum(leaf.size for leaf in leaves)
    assert counts["cross"] == 3 * (2 * D * 32 + 2 * D * 16)
    assert counts["embedding"] == V * D
    axes = parameters.logical_axes(pair.model.config)
    assert axes["decoder"]["layers"]["cross"]["key"] == ("layers", "embed", "kv_heads")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": DECODER}, "the encoder must have causal=False"),
        ({"decoder": ENCODER}, "the decoder must have causal=True"),
        ({"encoder": dataclasses.replace(ENCODER, d_model=32)}, "differ in d_model: 32, 24"),
        ({"inputs": "frames"}, "frame_width"),
        ({"inputs": "token"}, "unknown inputs='token'.*tokens"),
    ],
)
def test_stacks_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        EncDecConfig(**({"encoder": ENCODER, "decoder": DECODER} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relative_buckets": 2}, "relative_buckets=2"),
        ({"relative_distance": 1}, "relative_distance=1"),
        ({"sliding_window": 4}, "cannot have a sliding_window"),
        ({"logit_scale": 0.0}, "logit_scale=0.0"),
        ({"first_attention_norm": False, "norm_placement": "post"}, "first_attention_norm"),
    ],
)
def test_features_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(ENCODER, **changes)


def test_relative_positions_continue_beside_a_cache():
    config = dataclasses.replace(ENCODER, causal=True, vocab_size=V)
    model = Transformer(config)
    params = randomised(model)
    tokens = np.random.default_rng(2).integers(0, V, (B, S)).astype(np.int32)
    expected, _ = jax.jit(model)(params, tokens)
    step = jax.jit(lambda cache, tokens: model(parameters.unstack(params), tokens, cache=cache))
    cache, parts = model.init_cache(B, S), []
    for start in range(0, S, 2):
        logits, out = step(cache, tokens[:, start : start + 2])
        cache = out.cache
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, **TOLERANCE)


def test_masked_tokens_are_scored_as_their_logits_say():
    config = dataclasses.replace(ENCODER, vocab_size=V, mlm_head="gelu", head_bias=True)
    model = Encoder(config)
    params = randomised(model)
    tokens = np.random.default_rng(2).integers(0, V, (B, S)).astype(np.int32)
    logits, out = jax.jit(model)(params, tokens)
    stats = token_stats(
        model.mlm_hidden(params, out.x), model.head(params), tokens, want=("nll", "entropy")
    )
    logprobs = jax.nn.log_softmax(logits)
    nll = -np.take_along_axis(np.asarray(logprobs), tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(stats.nll, nll, rtol=0, atol=1e-4)
    # Every output may depend on every input.
    hidden = lambda x: model.backbone(params, x).x[0].sum(-1)  # noqa: E731
    jacobian = jax.jit(jax.jacrev(hidden))(model.embed(params, tokens[:1]))[:, 0]
    assert (np.abs(jacobian).max(-1) > 0).all()


def test_sentences_are_pooled_over_their_own_tokens():
    model = Encoder(dataclasses.replace(ENCODER, vocab_size=V))
    params = randomised(model)
    tokens = np.random.default_rng(2).integers(0, V, (B, S)).astype(np.int32)
    mask = np.arange(S) < np.array([[6], [S]])
    embed = jax.jit(model.embed_sentences, static_argnames="how")
    for how in ("mean", "first"):
        vectors = embed(params, tokens, mask, how=how)
        np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=-1), 1.0, rtol=1e-5)
        other = embed(params, np.where(mask, tokens, 3), mask, how=how)
        np.testing.assert_array_equal(vectors, other)
        padded = embed(params, np.roll(tokens, 4, 1), np.roll(mask, 4, 1), how=how)
        np.testing.assert_allclose(vectors[0], padded[0], **TOLERANCE)
