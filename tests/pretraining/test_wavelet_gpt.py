"""Wavelets between blocks: windows and averages by hand, and what every causal mixer must keep."""

import collections
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixers_for_tests import (
    TOLERANCE,
    T,
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
from tokjax.models import Encoder, Transformer, huggingface
from tokjax.models.cost import forward_flops
from tokjax.models.parameters import count_parameters
from tokjax.pretraining import wavelet_gpt
from tokjax.pretraining.wavelet_gpt import Wavelet, coordinate_windows, ladder, moving_sums

SIGNAL = np.array([1.0, 3, 5, 7, 2, 0, 4, 4])
BY_TWO = [0.5, 2, 4, 6, 4.5, 1, 2, 4]
BY_FOUR = [0.25, 1, 2.25, 4, 4.25, 3.5, 3.25, 2.5]


def on_signal(mixer, signal=SIGNAL, **more):
    """The averages of one signal in two coordinates, of which the second is replaced."""
    x = np.stack([signal, signal], -1)[None]
    out = mixed(mixer, x, **more)[0]
    np.testing.assert_array_equal(out[:, 0], np.float32(signal))
    return out[:, 1]


def test_windows_of_the_coordinates():
    assert list(coordinate_windows(8, ladder(16))) == [1, 1, 1, 1, 1, 2, 4, 8]
    found = collections.Counter(coordinate_windows(128, ladder(512)))
    expected = {1: 71, 2: 6, 4: 7, 8: 6, 16: 6, 32: 7, 64: 6, 128: 7, 256: 6, 512: 6}
    assert dict(found) == expected and sum(found.values()) == 128
    assert coordinate_windows(8, (16,), 0.25) == (1,) * 6 + (16, 16)
    assert coordinate_windows(4, ladder(4), 1.0) == (1, 1, 2, 4)
    assert coordinate_windows(4, ladder(4), 0.0) == (1,) * 4


def test_averages_by_hand():
    np.testing.assert_allclose(on_signal(Wavelet(8, windows=(2,))), BY_TWO)
    np.testing.assert_allclose(on_signal(Wavelet(8, windows=(4,))), BY_FOUR)
    by_count = on_signal(Wavelet(8, windows=(4,), divide_by_count=True))
    np.testing.assert_allclose(by_count, [1, 2, 3, 4, 4.25, 3.5, 3.25, 2.5])


def test_any_window_is_the_sum_by_hand():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 40, 5)).astype(np.float32)
    segments = np.repeat([1, 2, 3], [17, 3, 20])[None].astype(np.int32)
    windows = (1, 3, 7, 12, 32)
    sums = moving_sums(jnp.asarray(x), jnp.asarray(segments), [(w, 1) for w in windows])
    for number, window in enumerate(windows):
        for t in range(40):
            near = range(max(0, t - window + 1), t + 1)
            own = sum(x[0, s, number] for s in near if segments[0, s] == segments[0, t])
            np.testing.assert_allclose(sums[number][0, t, 0], own, atol=1e-5)


def test_a_constant_signal_is_a_fixed_point_once_the_window_is_full():
    out = on_signal(Wavelet(8, windows=(4,)), np.full(8, 2.5))
    np.testing.assert_array_equal(out[3:], 2.5)
    assert (out[:3] < 2.5).all()
    counted = on_signal(Wavelet(8, windows=(4,), divide_by_count=True), np.full(8, 2.5))
    np.testing.assert_allclose(counted, 2.5)


def test_exponential_averages_are_the_recurrence_cut_off_at_the_context():
    y, expected = 0.0, []
    for value in SIGNAL:
        y = 0.4 * value + 0.6 * y  # a window of 4 tokens: 2 / (4 + 1)
        expected.append(y)
    mixer = Wavelet(8, windows=(4,), kernel="ema")
    np.testing.assert_allclose(on_signal(mixer), expected, rtol=1e-6)
    counted = on_signal(dataclasses.replace(mixer, divide_by_count=True), np.full(8, 2.5))
    np.testing.assert_allclose(counted, 2.5, rtol=1e-5)
    short = on_signal(Wavelet(4, windows=(4,), kernel="ema"))
    by_hand = sum(0.4 * 0.6**j * SIGNAL[7 - j] for j in range(4))
    np.testing.assert_allclose(short[7], by_hand, rtol=1e-6)


def test_centred_windows_reach_as_far_ahead_as_back():
    out = on_signal(Wavelet(8, windows=(4,), centered=True))
    padded = np.pad(SIGNAL, (1, 2))
    np.testing.assert_allclose(out, [padded[t : t + 4].sum() / 4 for t in range(8)])


def test_controls_read_random_earlier_tokens_or_nothing():
    np.testing.assert_array_equal(on_signal(Wavelet(8, windows=(4,), kernel="zero")), 0.0)
    impulse = np.eye(8)[0]
    seen = on_signal(Wavelet(8, windows=(4,), kernel="shuffled"), impulse)
    assert sorted(seen) == [0.0] * 4 + [0.25] * 4
    assert list(np.flatnonzero(seen)) != [0, 1, 2, 3]


KERNELS = {
    "average": Wavelet(16),
    "by count": Wavelet(16, divide_by_count=True, apply_last=True),
    "learned by count": Wavelet(16, kernel="learned", divide_by_count=True),
    "ema": Wavelet(T, kernel="ema", windows=(1, 4)),
}


@pytest.fixture(scope="module", params=list(KERNELS))
def model_and_params(request):
    model = Transformer(config_with(KERNELS[request.param]))
    return model, random_params(model)


def test_the_future_never_moves_the_past(model_and_params):
    assert not future_moves_the_past(*model_and_params)


def test_documents_do_not_mix(model_and_params):
    assert_documents_do_not_mix(*model_and_params)


def test_cached_decoding_equals_the_whole_pass(model_and_params):
    assert_cached_equals_whole(*model_and_params)


def test_a_centred_window_is_caught_by_the_test_of_leaks():
    model = Transformer(config_with(Wavelet(16, centered=True, allow_leak=True)))
    assert future_moves_the_past(model, random_params(model))


def test_windows_of_one_token_are_the_baseline_bit_for_bit():
    plain = Transformer(config_with(None))
    params = random_params(plain)
    expected = logits_of(plain)(params, some_tokens())
    for mixer in (Wavelet(16, windows=(1,)), Wavelet(16, fraction=0.0)):
        model = Transformer(config_with(mixer))
        assert count_parameters(model.config) == count_parameters(plain.config)
        given = {**params, "layers": {**params["layers"], "mixer": {}}}
        np.testing.assert_array_equal(logits_of(model)(given, some_tokens()), expected)
        np.testing.assert_array_equal(logits_of(model)(params, some_tokens()), expected)


def test_averages_have_no_parameters_and_learned_kernels_those_of_their_windows():
    plain = config_with(None)
    average = dataclasses.replace(plain, mixer=Wavelet(16))
    assert count_parameters(average) == count_parameters(plain)
    own, other = (Transformer(c).abstract_params() for c in (average, plain))
    assert jax.tree.leaves(own) == jax.tree.leaves(other)
    (kernels,) = Wavelet(512, kernel="learned").parameters(128).values()
    assert kernels.shape == (6303,)
    learned = dataclasses.replace(plain, mixer=Wavelet(16, kernel="learned"))
    extra = sum(coordinate_windows(32, ladder(16))[16:])
    assert count_parameters(learned)["mixer"] == 2 * extra
    assert forward_flops(learned, 8) - forward_flops(plain, 8) == 2 * 2 * extra
    assert forward_flops(average, 8) == forward_flops(plain, 8)


def test_learned_kernels_start_as_averages():
    average = Transformer(config_with(Wavelet(16)))
    learned = Transformer(config_with(Wavelet(16, kernel="learned")))
    params = learned.init(jax.random.key(0))
    plain = {**params, "layers": {**params["layers"], "mixer": {}}}
    np.testing.assert_allclose(
        logits_of(learned)(params, some_tokens()),
        logits_of(average)(plain, some_tokens()),
        **TOLERANCE,
    )


def test_long_kernels_are_applied_in_parts():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(1, 90, 3)).astype(np.float32)
    segments = np.repeat([1, 2], [30, 60])[None].astype(np.int32)
    kernel = rng.normal(size=(3, 70)).astype(np.float32)
    found = wavelet_gpt.causal_filter(*map(jnp.asarray, (x, segments, kernel)), tokens=50)
    for t, c in itertools.product((40, 69, 89), range(3)):
        taps = range(min(70, t - 29))
        by_hand = sum(kernel[c, j] * x[0, t - j, c] for j in taps)
        np.testing.assert_allclose(found[0, t - 40, c], by_hand, rtol=1e-4, atol=1e-5)


def test_an_encoder_takes_centred_windows_alone():
    with pytest.raises(ConfigError, match="centered=True"):
        config_with(Wavelet(16), causal=False)
    model = Encoder(config_with(Wavelet(16, centered=True), causal=False))
    assert np.isfinite(logits_of_encoder(model)).all()


def logits_of_encoder(model):
    params = model.init(jax.random.key(0))
    return np.asarray(jax.jit(lambda p, t: model.encode(p, t).x)(params, some_tokens()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Wavelet(0), "context=0"),
        (lambda: Wavelet(16, fraction=1.5), r"fraction=1\.5"),
        (lambda: Wavelet(16, kernel="avarage"), "average"),
        (lambda: Wavelet(16, windows=(4, 2)), "ascend"),
        (lambda: Wavelet(16, windows=(32,)), "longer than context=16"),
        (lambda: Wavelet(16, kernel="ema", centered=True), "kernel='average'"),
        (lambda: Wavelet(16, kernel="zero", divide_by_count=True), "no meaning"),
        (lambda: config_with(Wavelet(16, fraction=0.3)), r"9\.6 coordinates"),
        (lambda: config_with(Wavelet(512)), "max_positions=32"),
        (lambda: config_with(Wavelet(16, centered=True)), "later tokens"),
        (lambda: config_with(Wavelet(16), n_layers=1), "apply_last=True"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_checkpoint_format_without_mixers_refuses_them(tmp_path):
    model = Transformer(config_with(Wavelet(16)))
    with pytest.raises(ConfigError, match="mixer"):
        huggingface.save(tmp_path / "mine", model, model.init(jax.random.key(0)))


def test_a_gradient_is_finite_and_reaches_every_kernel():
    model = Transformer(config_with(Wavelet(16, kernel="learned")))
    params, tokens = random_params(model), some_tokens()
    gradient = jax.jit(jax.grad(lambda p: model(p, tokens)[0][:, -1].sum()))(params)
    kernels = np.asarray(gradient["layers"]["mixer"]["kernels"])
    assert (kernels[0] != 0).all() and np.isfinite(kernels).all()
    assert (kernels[1] == 0).all()  # nothing is mixed behind the last block
