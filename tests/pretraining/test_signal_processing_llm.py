"""Learnable filter banks between blocks: signals by hand, and what every causal mixer must keep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixers_for_tests import (
    TOLERANCE,
    V,
    assert_cached_equals_whole,
    assert_documents_do_not_mix,
    config_with,
    future_moves_the_past,
    logits_of,
    mixed,
    random_params,
    some_tokens,
)

from tokjax.errors import ConfigError
from tokjax.models import Encoder, Transformer
from tokjax.models.parameters import count_parameters
from tokjax.pretraining.signal_processing_llm import (
    FilterBank,
    components,
    frequency_response,
    neighbours,
)

SIGNAL = np.array([1.0, 3, 5, 7, 2, 0, 4, 4])


def bank_weights(kernels, readout, bias=None, offset=None):
    """Weights from a list of kernels and a readout [A M J]."""
    flat = np.concatenate([np.ravel(k) for k in kernels])
    bias = np.zeros(len(kernels)) if bias is None else bias
    offset = np.zeros(len(readout)) if offset is None else offset
    found = {"analysis": flat, "bias": bias, "synthesis": np.ravel(readout), "offset": offset}
    return {name: jnp.asarray(a, jnp.float32) for name, a in found.items()}


def test_a_linear_bank_is_one_filter():
    rng = np.random.default_rng(0)
    kernels, a = rng.normal(size=(3, 4)), rng.normal(size=3)
    mixer = FilterBank(3, 4, activation="linear")
    out = mixed(mixer, SIGNAL[None, :, None], bank_weights(kernels, a.reshape(1, 3, 1)))
    expected = np.convolve(SIGNAL, a @ kernels)[:8]
    np.testing.assert_allclose(out[0, :, 0], expected, rtol=1e-5)


def test_bias_offset_and_a_longer_synthesis_by_hand():
    rng = np.random.default_rng(1)
    kernels, a = rng.normal(size=(2, 3)), rng.normal(size=(1, 2, 2))
    bias, offset = np.array([0.3, -0.2]), np.array([0.7])
    mixer = FilterBank(2, 3, synthesis_length=2, activation="relu")
    weights = bank_weights(kernels, a, bias, offset)
    segments = jnp.array([[1, 1, 1, 1, 1, 2, 2, 2]])
    out = mixed(mixer, SIGNAL[None, :, None], weights, segments)[0, :, 0]
    parts = []
    for document in (SIGNAL[:5], SIGNAL[5:]):
        n = len(document)
        y = [
            np.maximum(np.convolve(document, k)[:n] + b, 0)
            for k, b in zip(kernels, bias, strict=True)
        ]
        parts.append(0.7 + sum(np.convolve(y[m], a[0, m])[:n] for m in range(2)))
    np.testing.assert_allclose(out, np.concatenate(parts), rtol=1e-5, atol=1e-5)


def test_cosines_and_sines_are_a_sliding_fourier_transform():
    K, q = 8, 2
    angle = 2 * np.pi * np.outer(np.arange(K), np.arange(K)) / K
    kernels = jnp.asarray(np.concatenate([np.cos(angle), np.sin(angle)])[None], jnp.float32)
    t = np.arange(24)
    x = jnp.asarray(np.cos(2 * np.pi * q * t / K)[None, :, None], jnp.float32)
    near = neighbours(x, jnp.zeros((1, 24), jnp.int32), FilterBank(16, K).lags(K, 1), 24)
    y = np.asarray(components(near, kernels, jnp.zeros((1, 16))))[:, 0, K - 1 :, 0]
    magnitude = np.hypot(y[:K], y[K:])
    expected = np.where(np.isin(np.arange(K), (q, K - q)), K / 2, 0.0)
    np.testing.assert_allclose(
        magnitude, np.broadcast_to(expected[:, None], magnitude.shape), atol=1e-5
    )
    assert expected[2] == expected[6] == 4


def test_boxes_read_out_by_coordinate_are_the_averages_of_wavelets():
    lengths = (1, 2, 4, 8)
    mixer = FilterBank(4, lengths=lengths, activation="linear", per_coordinate="readout")
    weights = bank_weights([np.full(n, 1 / n) for n in lengths], np.eye(4).reshape(4, 4, 1))
    out = mixed(mixer, np.tile(SIGNAL[:, None], 4)[None], weights)[0]
    np.testing.assert_allclose(out[:, 0], SIGNAL, rtol=1e-6)
    np.testing.assert_allclose(out[:, 1], [0.5, 2, 4, 6, 4.5, 1, 2, 4], rtol=1e-6)
    np.testing.assert_allclose(out[:, 2], [0.25, 1, 2.25, 4, 4.25, 3.5, 3.25, 2.5], rtol=1e-6)


def test_dilated_kernels_skip_tokens():
    mixer = FilterBank(2, 2, dilations=(1, 3), activation="linear")
    assert mixer.reach == 3
    out = mixed(mixer, SIGNAL[None, :, None], bank_weights([[0, 1], [0, 10]], np.ones((1, 2, 1))))
    expected = np.pad(SIGNAL, (1, 0))[:8] + 10 * np.pad(SIGNAL, (3, 0))[:8]
    np.testing.assert_allclose(out[0, :, 0], expected)


def test_parameters_of_one_bank():
    counts = [int(np.prod(p.shape)) for p in FilterBank(144, 32).parameters(128).values()]
    assert counts == [4608, 144, 144, 1] and sum(counts) == 4897
    config = config_with(FilterBank(8, lengths=(2, 4, 8, 16), synthesis_length=3))
    assert count_parameters(config)["mixer"] == 2 * (2 * 30 + 8 + 8 * 3 + 1)
    own = FilterBank(8, 4, per_coordinate="bank").parameters(32)
    assert {n: p.shape for n, p in own.items()} == {
        "analysis": (32 * 8 * 4,),
        "bias": (32 * 8,),
        "synthesis": (32 * 8,),
        "offset": (32,),
    }
    assert not FilterBank(8, 4, trained=False).parameters(32)


def test_coordinates_are_treated_alike():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 10, 6)).astype(np.float32)
    weights = bank_weights(rng.normal(size=(5, 3)), rng.normal(size=(1, 5, 1)))
    order = rng.permutation(6)
    mixer = FilterBank(5, 3)
    np.testing.assert_allclose(
        mixed(mixer, x[..., order], weights), mixed(mixer, x, weights)[..., order], atol=1e-5
    )


IDENTITIES = {
    "linear": FilterBank(3, 5, activation="linear"),
    "gelu": FilterBank(4, 5),
    "relu in parts": FilterBank(20, 5, activation="relu"),
    "many lengths": FilterBank(6, lengths=(2, 5, 9), synthesis_length=2),
    "residual": FilterBank(3, 5, residual=True),
    "own banks": FilterBank(3, 5, per_coordinate="bank"),
    "frozen": FilterBank(4, 5, trained=False),
    "gains": FilterBank(4, 5, gains="softmax", gain_window=6),
    "sigmoid gains": FilterBank(4, 5, gains="sigmoid", gain_window=6, apply_last=True),
}


@pytest.mark.parametrize("name", list(IDENTITIES))
def test_an_untrained_bank_is_the_identity(name):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(2, 9, 8)).astype(np.float32)
    mixer = IDENTITIES[name]
    weights = {
        n: p.initialise(jax.random.key(i), jnp.float32)
        for i, (n, p) in enumerate(mixer.parameters(8).items())
    }
    np.testing.assert_allclose(mixed(mixer, x, weights), x, atol=1e-6)


def test_a_model_with_an_untrained_bank_is_the_baseline():
    plain = Transformer(config_with(None))
    params = random_params(plain)
    expected = logits_of(plain)(params, some_tokens())
    model = Transformer(config_with(FilterBank(4, 5, apply_last=True)))
    bank = model.init(jax.random.key(0))["layers"]["mixer"]
    given = {**params, "layers": {**params["layers"], "mixer": bank}}
    np.testing.assert_allclose(logits_of(model)(given, some_tokens()), expected, **TOLERANCE)
    frozen = Transformer(config_with(FilterBank(4, 5, trained=False)))
    np.testing.assert_allclose(logits_of(frozen)(params, some_tokens()), expected, **TOLERANCE)
    drawn = Transformer(config_with(FilterBank(4, 5, trained=False, start="random")))
    assert np.abs(logits_of(drawn)(params, some_tokens()) - expected).max() > 0.1


def test_gains_of_one_are_no_gains():
    model = Transformer(config_with(FilterBank(3, 5, gains="softmax")))
    params = random_params(model)
    mixer = params["layers"]["mixer"]
    constant = {n: jnp.zeros_like(a) for n, a in mixer.items() if n in ("gain_head", "gain_bias")}
    at_one = {**params, "layers": {**params["layers"], "mixer": {**mixer, **constant}}}
    static = {n: a for n, a in mixer.items() if not n.startswith("gain_")}
    without = {**params, "layers": {**params["layers"], "mixer": static}}
    plain = Transformer(config_with(FilterBank(3, 5)))
    expected = logits_of(plain)(without, some_tokens())
    np.testing.assert_allclose(logits_of(model)(at_one, some_tokens()), expected, **TOLERANCE)
    assert np.abs(logits_of(model)(params, some_tokens()) - expected).max() > 0.01


BANKS = {
    "shared": FilterBank(4, 6),
    "in parts": FilterBank(20, 3, synthesis_length=3),
    "dilated with gains": FilterBank(
        *(4, 3), dilations=(1, 4), gains="sigmoid", gain_window=5, synthesis_length=2
    ),
    "own, residual": FilterBank(
        6, lengths=(2, 4, 8), per_coordinate="bank", residual=True, apply_last=True
    ),
}


@pytest.fixture(scope="module", params=list(BANKS))
def model_and_params(request):
    model = Transformer(config_with(BANKS[request.param]))
    return model, random_params(model)


def test_the_future_never_moves_the_past(model_and_params):
    assert not future_moves_the_past(*model_and_params)


def test_documents_do_not_mix(model_and_params):
    assert_documents_do_not_mix(*model_and_params)


def test_cached_decoding_equals_the_whole_pass(model_and_params):
    assert_cached_equals_whole(*model_and_params)


def test_a_centred_kernel_is_caught_by_the_test_of_leaks():
    mixer = FilterBank(4, 5, activation="linear", start="random", centered=True, allow_leak=True)
    model = Transformer(config_with(mixer))
    assert future_moves_the_past(model, random_params(model))


def test_an_encoder_takes_centred_kernels_alone():
    with pytest.raises(ConfigError, match="centered=True"):
        config_with(FilterBank(4, 5), causal=False)
    model = Encoder(config_with(FilterBank(4, 5, centered=True), causal=False))
    params = random_params(model)
    x = jax.jit(lambda t: model.encode(params, t).x)
    changed = some_tokens()
    changed[:, -1] = (changed[:, -1] + 9) % V
    assert (np.asarray(x(some_tokens()))[:, 0] != np.asarray(x(changed))[:, 0]).any()


def test_filters_in_parts_are_the_filters_at_once():
    rng = np.random.default_rng(5)
    kernels, a = rng.normal(size=(20, 3)), rng.normal(size=(1, 20, 1))
    x = rng.normal(size=(1, 9, 2)).astype(np.float32)
    halves = [
        mixed(FilterBank(10, 3), x, bank_weights(kernels[half], a[:, half]))
        for half in (slice(10), slice(10, 20))
    ]
    whole = mixed(FilterBank(20, 3), x, bank_weights(kernels, a))
    np.testing.assert_allclose(whole, sum(halves), atol=1e-4)


def test_frequency_responses_tell_low_pass_from_high_pass():
    found = frequency_response(jnp.array([[0.5, 0.5], [0.5, -0.5], [1.0, 0.0]]), points=3)
    middle = 2**-0.5
    np.testing.assert_allclose(found, [[1, middle, 0], [0, middle, 1], [1, 1, 1]], atol=1e-6)


def test_kernels_come_back_by_group():
    mixer = FilterBank(4, lengths=(2, 3))
    analysis = jnp.arange(2 * 2 + 2 * 3, dtype=jnp.float32)
    short, long = mixer.kernels(analysis)
    np.testing.assert_array_equal(short, [[[0, 1], [2, 3]]])
    np.testing.assert_array_equal(long, [[[4, 5, 6], [7, 8, 9]]])


def test_gradients_reach_the_whole_bank():
    mixer, rng = FilterBank(20, 4, gains="sigmoid", gain_window=4), np.random.default_rng(6)
    x = jnp.asarray(rng.normal(size=(1, mixer.reach + 6, 8)), jnp.float32)
    segments = jnp.zeros(x.shape[:2], jnp.int32)
    weights = {
        n: jnp.asarray(rng.normal(size=p.shape), jnp.float32)
        for n, p in mixer.parameters(8).items()
    }

    @jax.jit
    def gradient(weights, layer):
        def total(w):
            return jnp.square(mixer(x, segments, w, layer, 2)).sum()

        return jax.grad(total)(weights)

    for name, leaf in gradient(weights, jnp.int32(0)).items():
        assert np.isfinite(leaf).all() and (leaf != 0).any(), name
    for name, leaf in gradient(weights, jnp.int32(1)).items():
        assert (leaf == 0).all(), name  # nothing is mixed behind the last block


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FilterBank(0), "filters=0"),
        (lambda: FilterBank(8, activation="gleu"), "gelu"),
        (lambda: FilterBank(8, lengths=(2, 4, 8)), "cannot be split evenly among the 3"),
        (lambda: FilterBank(8, dilations=(0,)), "1 or more"),
        (lambda: FilterBank(8, lengths=(2,), dilations=(2,)), "not both"),
        (lambda: FilterBank(2, lengths=(2, 4)), "start='identity'"),
        (lambda: FilterBank(8, trained=False, gains="sigmoid"), "gains='none'"),
        (lambda: config_with(FilterBank(8, 33)), "max_positions=32"),
        (lambda: config_with(FilterBank(8, 5, centered=True)), "later tokens"),
        (lambda: config_with(FilterBank(8, 5), n_layers=1), "apply_last=True"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_precision_of_half_width_activations():
    model = Transformer(config_with(dataclasses.replace(FilterBank(4, 5), apply_last=True)))
    params = random_params(model)
    half = Transformer(dataclasses.replace(model.config, dtype="bfloat16"))
    found, expected = (logits_of(m)(params, some_tokens()) for m in (half, model))
    assert np.abs(found - expected).mean() < 0.1 * np.abs(expected).mean()
