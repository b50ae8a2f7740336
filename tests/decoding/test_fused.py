import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.decoding import Prompts, decode, fused
from tokjax.decoding.predictors import ModelPredictor
from tokjax.models import ModelConfig, Transformer
from tokjax.models.quantized import quantize
from tokjax.models.transposed import Transposed

PLAIN = {"vocab_size": 128, "d_model": 64, "n_layers": 1, "n_heads": 2, "d_ff": 192}
OTHER = {
    "vocab_size": 100,
    "n_kv_heads": 2,
    "n_heads": 4,
    "head_dim": 32,
    "qk_norm": True,
    "attention_bias": True,
    "attention_softcap": 20.0,
    "tie_embeddings": False,
    "norm_plus_one": True,
    "activation": "gelu_tanh",
    "head_bias": True,
}


def _model(**fields):
    model = Transformer(ModelConfig(**(PLAIN | {"max_positions": 64} | fields)))
    return model, model.init(jax.random.key(0))


def _prompts(batch):
    ids = np.random.default_rng(0).integers(0, 100, (batch, 9))
    return Prompts(ids, np.array([9, 4, 1])[:batch])


def _logits(context):
    return context.logits


@pytest.mark.parametrize(
    ("fields", "batch", "int8"), [({"n_layers": 2}, 1, True), (OTHER, 3, False)]
)
def test_kernels_write_the_text_of_the_general_pass(fields, batch, int8):
    model, params = _model(**fields)
    params = quantize(params) if int8 else params
    plain, kernels = (
        decode(
            ModelPredictor(model, kernels=wanted), params, _prompts(batch), max_new_tokens=6,
            record={"logits": _logits},
        )
        for wanted in (False, True)
    )  # fmt: skip
    np.testing.assert_array_equal(kernels.tokens, plain.tokens)
    np.testing.assert_allclose(kernels.recorded["logits"], plain.recorded["logits"], atol=2e-5)
    assert len(set(np.asarray(plain.tokens).ravel().tolist())) > 1


def test_prepared_parameters_serve_the_general_pass_and_are_prepared_once():
    model, params = _model(param_dtype="float16")
    predictor = ModelPredictor(model, kernels=True)
    prepared = predictor.prepare(params)
    assert isinstance(prepared["layers"][0]["attention"]["out"], Transposed)
    tokens = jnp.arange(6)[None]
    expected, _ = model(ModelPredictor(model, kernels=False).prepare(params), tokens)
    found, _ = model(prepared, tokens)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    again = predictor.prepare(prepared)
    assert jax.tree.structure(again) == jax.tree.structure(prepared)
    assert again["layers"][0]["mlp"]["down"] is prepared["layers"][0]["mlp"]["down"]


def test_rows_beyond_the_kernels_and_int8_caches_take_the_general_pass():
    model, _ = _model()
    assert fused.fits(model.init_cache(64, 16))
    assert not fused.fits(model.init_cache(65, 16))
    assert not fused.fits(model.init_cache(1, 16, "int8"))


@pytest.mark.parametrize(
    "fields",
    [
        {"norm": "layer"},
        {"norm_placement": "both"},
        {"positions": "learned"},
        {"gated": False},
        {"parallel_residual": True},
        {"sliding_window": 8},
        {"rotary_fraction": 0.5},
        {"mlp_bias": True},
        {"d_ff": 96},
        {"d_model": 96},
    ],
)
def test_other_kinds_of_models_are_left_to_the_general_pass(fields):
    config = ModelConfig(**(PLAIN | fields))
    assert not fused.supported(config)
    assert fused.supported(ModelConfig(**PLAIN))


def test_kernels_are_not_chosen_without_a_gpu():
    assert not fused.pays(ModelConfig(**PLAIN, dtype="bfloat16"))
