"""Int8 weights: the products of the matrices that they stand for, everywhere a model is used."""

import dataclasses

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.decoding import Prompts, decode
from tokjax.errors import ConfigError
from tokjax.models import EncDecConfig, EncoderDecoder, Transformer, huggingface, lora, parameters
from tokjax.models.lora import LoraConfig
from tokjax.models.quantized import Int8Matrix, dequantize, is_quantized, quantize


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=3, max_side=6),
        elements=st.floats(-1e4, 1e4, width=32),
    )
)
def test_an_entry_is_off_by_half_a_scale_at_most(matrix):
    quantised = Int8Matrix.of(jnp.asarray(matrix))
    wide = np.asarray(quantised.widened(jnp.float32), np.float64)
    scale = np.asarray(quantised.scale, np.float64)[..., None, :]
    assert (np.abs(wide - matrix) <= scale * (0.5 + 1e-5) + 1e-30).all()
    assert (np.abs(np.asarray(quantised.values)) <= 127).all()


def test_logits_and_gradients_are_those_of_the_widened_matrices(tiny):
    quantised = quantize(tiny.params)
    wide = dequantize(quantised)
    assert is_quantized(quantised) and not is_quantized(wide) and not is_quantized(tiny.params)
    at = quantised["layers"]["attention"]
    assert at["query"].values.dtype == jnp.int8 and at["norm"].dtype == jnp.float32

    @jax.jit
    def logits(params):
        return tiny.model(params, tiny.tokens)[0]

    np.testing.assert_allclose(logits(quantised), logits(wide), rtol=2e-5, atol=2e-5)
    plain = logits(tiny.params)
    assert 0 < np.abs(logits(quantised) - plain).max() < 0.05 * np.abs(plain).max()

    @jax.jit
    def gradient(embedding, params):
        loss = lambda e: jnp.sum(jnp.square(tiny.model({**params, "embedding": e}, tiny.tokens)[0]))  # noqa: E731
        return jax.grad(loss)(embedding)

    found = gradient(tiny.params["embedding"], quantised)
    expected = gradient(tiny.params["embedding"], wide)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("form", ["stacked", "unstacked"])
def test_decoding_writes_the_text_of_the_widened_matrices(tiny, form):
    params = {**tiny.params, "embedding": 50 * tiny.params["embedding"]}
    quantised = quantize(params if form == "stacked" else parameters.unstack(params))
    prompts = Prompts.of([[1, 2, 3], [4]])
    found = decode(tiny.model, quantised, prompts, max_new_tokens=12)
    expected = decode(tiny.model, dequantize(quantised), prompts, max_new_tokens=12)
    assert found.rows() == expected.rows()
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-3)


def test_bfloat16_models_and_adapters_take_quantised_matrices(tiny):
    config = dataclasses.replace(tiny.config, dtype="bfloat16", param_dtype="bfloat16")
    model = Transformer(config)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), tiny.params)
    assert model(quantize(params), tiny.tokens)[0].dtype == jnp.float32
    adapted, with_adapters = lora.on(
        tiny.model, quantize(tiny.params), LoraConfig(), jax.random.key(0)
    )
    base, adapters = lora.split(with_adapters)

    @jax.jit
    def gradients(adapters):
        loss = lambda a: jnp.sum(adapted(lora.join(base, a), tiny.tokens)[0] ** 2)  # noqa: E731
        return jax.grad(loss)(adapters)

    assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients(adapters)))


def test_both_stacks_of_an_encoder_decoder_are_quantised(tiny):
    side = dataclasses.replace(tiny.config, tie_embeddings=True)
    config = EncDecConfig(
        encoder=dataclasses.replace(side, causal=False),
        decoder=dataclasses.replace(side, cross_attention=True),
    )
    model = EncoderDecoder(config)
    params = quantize(model.init(jax.random.key(0)))
    for stack in ("encoder", "decoder"):
        assert isinstance(params[stack]["layers"]["mlp"]["up"], Int8Matrix)
    assert isinstance(params["decoder"]["layers"]["cross"]["query"], Int8Matrix)


def test_quantising_twice_saving_and_merging_are_refused(tiny, tmp_path):
    quantised = quantize(tiny.params)
    with pytest.raises(ConfigError, match="quantised already"):
        quantize(quantised)
    with pytest.raises(ConfigError, match="dequantize"):
        huggingface.save(tmp_path / "out", tiny.model, quantised)
    assert not (tmp_path / "out").exists()
    adapted, params = lora.on(tiny.model, quantised, LoraConfig(), jax.random.key(0))
    with pytest.raises(ConfigError, match="dequantize"):
        lora.merge(adapted, params)
