import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.models import Transformer, parameters
from tokjax.models import cache as kv

B, T = 2, 12
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(scope="module")
def whole(tiny):
    """Logits of whole rows without a cache."""
    return jax.jit(lambda p: tiny.model(p, tiny.tokens)[0])(tiny.params)


@pytest.fixture(scope="module")
def step(tiny):
    """A compiled pass over some tokens with a cache: (logits, cache)."""
    params = parameters.unstack(tiny.params)

    @jax.jit
    def step(cache, tokens):
        logits, out = tiny.model(params, tokens, cache=cache)
        return logits, out.cache

    return step


def test_prefill_and_single_steps_equal_the_whole_pass(tiny, step, whole):
    logits, cache = step(tiny.model.init_cache(B, T), tiny.tokens[:, :7])
    parts = [logits]
    for t in range(7, T):
        logits, cache = step(cache, tiny.tokens[:, t : t + 1])
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, **TOLERANCE)
    np.testing.assert_array_equal(cache.lengths, [T, T])


def test_rows_of_different_lengths_equal_the_whole_pass(tiny, step, whole):
    # Prompts of 7 and 4 tokens in one rectangle: the second is filled up with an id that counts
    # for nothing, and is cut back afterwards.
    lengths = np.array([7, 4])
    prompts = np.where(np.arange(7) < lengths[:, None], tiny.tokens[:, :7], 60)
    logits, cache = step(tiny.model.init_cache(B, T), prompts)
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(logits[b, :n], whole[b, :n], **TOLERANCE)
    cache = cache.rewind(jnp.asarray(lengths))
    for i in range(3):
        tokens = tiny.tokens[np.arange(B), lengths + i][:, None]
        logits, cache = step(cache, tokens)
        expected = whole[np.arange(B), lengths + i]
        np.testing.assert_allclose(logits[:, 0], expected, **TOLERANCE)
    np.testing.assert_array_equal(cache.lengths, lengths + 3)


def test_rewinding_forgets_what_came_after(tiny, step, whole):
    _, cache = step(tiny.model.init_cache(B, T), tiny.tokens[:, :7])
    _, wrong = step(cache, jnp.full((B, 1), 3))
    rewound = wrong.rewind(jnp.array([7, 7]))
    logits, _ = step(rewound, tiny.tokens[:, 7:8])
    np.testing.assert_allclose(logits[:, 0], whole[:, 7], **TOLERANCE)
    # A row is never lengthened by rewinding: those slots hold nothing.
    np.testing.assert_array_equal(cache.rewind(jnp.array([9, 2])).lengths, [7, 2])


def test_room_beyond_the_lengths_changes_nothing(tiny, step):
    _, cache = step(tiny.model.init_cache(B, T), tiny.tokens[:, :7])
    garbage = jax.tree.map(
        lambda a: jnp.where(jnp.arange(T)[:, None, None] < 7, a, 1e3), cache.keys
    )
    dirty = cache.replace(keys=garbage)
    for a, b in zip(*(step(c, tiny.tokens[:, 7:8])[0] for c in (cache, dirty)), strict=True):
        np.testing.assert_array_equal(a, b)
    grown = cache.grow(T + 4, tiny.config)
    assert grown.capacity == T + 4
    a, b = (step(c, tiny.tokens[:, 7:8])[0] for c in (cache, grown))
    np.testing.assert_allclose(a, b, **TOLERANCE)


def test_forked_rows_continue_like_their_origin(tiny, step, whole):
    _, cache = step(tiny.model.init_cache(B, T), tiny.tokens[:, :7])
    forks = kv.fork(cache, 2)
    np.testing.assert_array_equal(forks.keys[0][0], forks.keys[0][1])
    logits, _ = step(forks, np.repeat(tiny.tokens[:, 7:8], 2, axis=0))
    np.testing.assert_allclose(logits[:, 0], np.repeat(whole[:, 7], 2, axis=0), **TOLERANCE)


def test_write_puts_each_row_at_its_own_slot_and_drops_what_does_not_fit():
    buffer, new = jnp.zeros((2, 4, 1, 1)), jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(2, 2, 1, 1)
    written = kv.write(buffer, new, jnp.array([1, 3]), ring=False)
    np.testing.assert_array_equal(written[:, :, 0, 0], [[0, 1, 2, 0], [0, 0, 0, 3]])


def test_the_cache_is_updated_in_place_when_donated(tiny):
    params = parameters.unstack(tiny.params)
    cache = tiny.model.init_cache(B, T)
    step = jax.jit(
        lambda cache, tokens: tiny.model(params, tokens, cache=cache)[1].cache, donate_argnums=0
    )
    memory = step.lower(cache, tiny.tokens[:, :1]).compile().memory_analysis()
    buffers = sum(a.nbytes for a in (*cache.keys, *cache.values))
    assert memory.alias_size_in_bytes >= buffers


def test_a_cache_is_refused_where_it_cannot_be_used(tiny):
    cache = tiny.model.init_cache(B, 4)
    unstacked = parameters.unstack(tiny.params)
    with pytest.raises(ValueError, match="unstacked parameters"):
        tiny.model(tiny.params, tiny.tokens, cache=cache)
    with pytest.raises(ValueError, match="give no segments"):
        tiny.model(unstacked, tiny.tokens, cache=cache, segments=tiny.packed["segments"])
    with pytest.raises(ValueError, match="12 tokens do not fit a cache of 4 slots"):
        tiny.model(unstacked, tiny.tokens, cache=cache)
    with pytest.raises(ValueError, match="cannot shrink a cache of 4 slots to 3"):
        cache.grow(3, tiny.config)


def test_a_cache_has_the_compute_dtype_and_only_key_value_heads(tiny):
    model = Transformer(dataclasses.replace(tiny.config, dtype="bfloat16"))
    cache = model.init_cache(B, 5)
    assert {a.dtype for a in cache.keys + cache.values} == {jnp.dtype("bfloat16")}
    assert {a.shape for a in cache.keys + cache.values} == {(B, 5, 2, 8)}
    assert len(cache.keys) == tiny.config.n_layers
    assert len({id(a) for a in cache.keys + cache.values}) == 2 * tiny.config.n_layers
