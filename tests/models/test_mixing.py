"""Token mixers between blocks: over whole rows, packed documents, caches and in decoding."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.decoding import Prompts, decode
from tokjax.models import Transformer, padding, parameters
from tokjax.models.parameters import Parameter

B, T = 2, 12
TOLERANCE = {"rtol": 3e-5, "atol": 3e-5}


@dataclass(frozen=True)
class Weighted:
    """x(t) + w (x(t) - mean of x(t - reach .. t - 1) of the same segment), not behind the last."""

    reach: int = 3

    def parameters(self, d_model):
        return {"gain": Parameter((d_model,), (None,), 0.5)}

    def __call__(self, x, segments, weights, layer, n_layers):
        T, own = x.shape[1] - self.reach, segments[:, self.reach :]
        total = jnp.zeros_like(x[:, self.reach :])
        count = jnp.zeros(own.shape, x.dtype)
        for back in range(1, self.reach + 1):
            at = slice(self.reach - back, self.reach - back + T)
            same = (segments[:, at] == own).astype(x.dtype)
            total = total + same[..., None] * x[:, at]
            count = count + same
        now = x[:, self.reach :]
        mean = total / jnp.maximum(count, 1.0)[..., None]
        mixed = now + weights["gain"] * jnp.where(count[..., None] > 0, now - mean, 0.0)
        return jnp.where(layer < n_layers - 1, mixed, now)


@pytest.fixture(scope="module")
def mixed(tiny):
    """(model, parameters) of the tiny model with a mixer."""
    model = Transformer(dataclasses.replace(tiny.config, mixer=Weighted()))
    gains = model.init(jax.random.key(7))["layers"]["mixer"]
    return model, {**tiny.params, "layers": {**tiny.params["layers"], "mixer": gains}}


@pytest.fixture(scope="module")
def whole(tiny, mixed):
    model, params = mixed
    return jax.jit(lambda tokens, **kw: model(params, tokens, **kw)[0])


def test_a_mixer_of_gain_zero_is_no_mixer(tiny, mixed):
    model, params = mixed
    still = jax.tree.map(jnp.zeros_like, params["layers"]["mixer"])
    zeroed = {**params, "layers": {**params["layers"], "mixer": still}}
    plain = jax.jit(lambda p: tiny.model(p, tiny.tokens)[0])(tiny.params)
    np.testing.assert_allclose(
        jax.jit(lambda p: model(p, tiny.tokens)[0])(zeroed), plain, **TOLERANCE
    )
    assert np.abs(jax.jit(lambda p: model(p, tiny.tokens)[0])(params) - plain).max() > 0.1


def test_the_stream_between_blocks_is_the_mixture_by_hand(tiny, mixed):
    model, params = mixed
    sites = {"resid_pre", "resid_post"}
    captured = jax.jit(lambda p: model(p, tiny.tokens, capture=sites)[1].captured)(params)
    behind, before = (np.asarray(captured[s], np.float64) for s in ("resid_post", "resid_pre"))
    gains = np.asarray(params["layers"]["mixer"]["gain"], np.float64)
    for layer in range(2):
        x = behind[layer]
        for t in range(T):
            expected = x[:, t]
            if t:
                expected = expected + gains[layer] * (x[:, t] - x[:, max(0, t - 3) : t].mean(1))
            np.testing.assert_allclose(before[layer + 1][:, t], expected, rtol=1e-4, atol=1e-4)


def test_the_future_never_moves_the_past(tiny, whole):
    changed = np.array(tiny.tokens)
    changed[:, 7:] = (changed[:, 7:] + 9) % tiny.config.vocabulary
    one, two = whole(tiny.tokens), whole(changed)
    np.testing.assert_array_equal(one[:, :7], two[:, :7])
    assert (one[:, 7:] != two[:, 7:]).any()


def test_documents_do_not_mix(tiny, whole):
    packed = whole(tiny.tokens, **tiny.packed)
    segments, positions = (np.asarray(tiny.packed[k]) for k in ("segments", "positions"))
    for b in range(B):
        for segment in np.unique(segments[b]):
            at = np.flatnonzero(segments[b] == segment)
            row = np.zeros((1, T), np.int32)
            row[0, : len(at)] = tiny.tokens[b, at]
            assert (positions[b, at] == np.arange(len(at))).all()
            alone = whole(row)[0, : len(at)]
            np.testing.assert_allclose(packed[b, at], alone, **TOLERANCE)


def test_padding_in_front_does_not_mix_in(tiny, whole):
    mask = np.ones((B, T), bool)
    mask[:, :4] = False
    positions, segments = padding(mask)
    shifted = whole(tiny.tokens, positions=positions, segments=segments)[:, 4:]
    row = np.zeros((B, T), np.int32)
    row[:, : T - 4] = tiny.tokens[:, 4:]
    np.testing.assert_allclose(shifted, whole(row)[:, : T - 4], **TOLERANCE)


@pytest.mark.parametrize("first", [1, 5])
def test_cached_steps_equal_the_whole_pass(tiny, mixed, whole, first):
    model, params = mixed
    params = parameters.unstack(params)

    @jax.jit
    def step(cache, tokens):
        logits, out = model(params, tokens, cache=cache)
        return logits, out.cache

    cache, parts = model.init_cache(B, T), []
    for start, stop in ((0, first), *((t, t + 1) for t in range(first, T))):
        logits, cache = step(cache, tiny.tokens[:, start:stop])
        parts.append(logits)
        if start == 8:  # a rejected draft leaves no trace
            cache = step(cache, jnp.full((B, 1), 3))[1].rewind(cache.lengths)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole(tiny.tokens), **TOLERANCE)


def test_ragged_prompts_decode_as_if_alone(tiny, mixed):
    model, params = mixed
    rows = [tiny.tokens[0, :9].tolist(), tiny.tokens[1, :2].tolist()]
    both = decode(model, params, Prompts.of(rows), max_new_tokens=6).rows()
    for row, expected in zip(rows, both, strict=True):
        ids = list(row)
        for _ in range(6):
            padded = np.zeros((1, 24), np.int32)
            padded[0, : len(ids)] = ids
            logits = _logits(model)(params, padded)
            ids.append(int(logits[0, len(ids) - 1].argmax()))
        assert ids[len(row) :] == expected


def _logits(model, made={}):  # noqa: B006 (one compiled program for all calls)
    return made.setdefault(model, jax.jit(lambda p, t: model(p, t)[0]))


def test_a_cache_without_room_for_the_mixers_inputs_is_refused(tiny, mixed):
    model, params = mixed
    bare = tiny.model.init_cache(B, T)
    with pytest.raises(ValueError, match="mixer=True"):
        model(parameters.unstack(params), tiny.tokens, cache=bare)
