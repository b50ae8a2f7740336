"""What holds of every causal mixer, as functions that tests of each mixer call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.models import ModelConfig, parameters

B, T, V = 2, 24, 61
TOLERANCE = {"rtol": 5e-5, "atol": 5e-5}


def config_with(mixer, **changes):
    tree = {
        "vocab_size": V,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "d_ff": 32,
        "max_positions": 32,
    }
    return ModelConfig(**{**tree, "init_scale": 0.5, "mixer": mixer, **changes})


def random_params(model, scale=0.2):
    """Initial parameters with noise on all of them: zeros would hide a part left out."""
    params = model.init(jax.random.key(3))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    noisy = [a + jnp.asarray(scale * rng.normal(size=a.shape), jnp.float32) for a in leaves]
    return jax.tree.unflatten(tree, noisy)


def some_tokens():
    return np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)


@functools.cache
def logits_of(model):
    """The compiled forward pass."""
    return jax.jit(lambda params, tokens, **kw: model(params, tokens, **kw)[0])


def packing():
    """Rows of documents: (segments, positions)."""
    lengths = ((10, 9, 5), (5, 2, 17))
    segments = [np.repeat(np.arange(1, 4), row) for row in lengths]
    positions = [np.concatenate([np.arange(n) for n in row]) for row in lengths]
    return {
        "segments": np.array(segments, np.int32),
        "positions": np.array(positions, np.int32),
    }


def future_moves_the_past(model, params) -> bool:
    """Whether logits before a token depend on it, alone or on what follows, bit for bit."""
    tokens, run = some_tokens(), logits_of(model)
    before = run(params, tokens)
    for first, last in ((13, T), (T - 1, T)):
        changed = tokens.copy()
        changed[:, first:last] = (changed[:, first:last] + 9) % V
        after = run(params, changed)
        assert (after[:, first:] != before[:, first:]).any()
        if (after[:, :first] != before[:, :first]).any():
            return True
    return False


def assert_documents_do_not_mix(model, params):
    tokens, run, packed = some_tokens(), logits_of(model), packing()
    together = run(params, tokens, **packed)
    for b in range(B):
        for segment in np.unique(packed["segments"][b]):
            at = np.flatnonzero(packed["segments"][b] == segment)
            row = np.zeros((B, T), np.int32)
            row[:, : len(at)] = tokens[b, at]
            np.testing.assert_allclose(together[b, at], run(params, row)[0, : len(at)], **TOLERANCE)


def assert_cached_equals_whole(model, params):
    """Unrolled, a prompt of 5 tokens, then one at a time, with a rejected draft on the way; as a
    scan over layers, the whole.
    """
    tokens, whole = some_tokens(), logits_of(model)(params, some_tokens())
    params = parameters.unstack(params)

    @jax.jit
    def step(cache, tokens):
        logits, out = model(params, tokens, cache=cache)
        return logits, out.cache

    cache, parts = model.init_cache(B, T), []
    for start, stop in ((0, 5), *((t, t + 1) for t in range(5, T))):
        if start == 8:
            cache = step(cache, jnp.full((B, 1), 3))[1].rewind(cache.lengths)
        logits, cache = step(cache, tokens[:, start:stop])
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, **TOLERANCE)


def mixed(mixer, x, weights=None, segments=None):
    """What a mixer makes of x [B T D] behind the first of two blocks."""
    from tokjax.models.mixing import with_history

    x = jnp.asarray(x, jnp.float32)
    given, of = with_history(x, segments, None, None, mixer.reach)
    return np.asarray(mixer(given, of, weights or {}, jnp.int32(0), 2))
