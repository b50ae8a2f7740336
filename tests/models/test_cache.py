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
    garbage = jax.tree.map(lambda a: jnp.where(jnp.arange(T)[:, None] < 7, a, 1e3), cache.keys)
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
    buffer, new = jnp.zeros((2, 1, 4, 1)), jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(2, 2, 1, 1)
    written = kv.write(buffer, new, jnp.array([1, 3]), ring=False)
    np.testing.assert_array_equal(written[:, 0, :, 0], [[0, 1, 2, 0], [0, 0, 0, 3]])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_moved_token_stands_where_it_was_moved_and_nothing_else_changes(tiny, step, dtype):
    _, cache = step(tiny.model.init_cache(B, T, dtype), tiny.tokens[:, :7])
    moved = kv.moved(cache, jnp.array([5, 2]), jnp.array([3, 2]))
    for before, after in ((cache.keys, moved.keys), (cache.values, moved.values)):
        for a, b in zip(before, after, strict=True):
            a, b = (np.array(kv.read(each, jnp.float32)) for each in (a, b))
            a[0, 3] = a[0, 5]
            np.testing.assert_array_equal(a, b)


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
    assert {a.shape for a in cache.keys + cache.values} == {(B, 2, 5, 8)}
    assert len(cache.keys) == tiny.config.n_layers
    assert len({id(a) for a in cache.keys + cache.values}) == 2 * tiny.config.n_layers


@pytest.fixture(scope="module")
def windowed(tiny):
    """A model whose first and last layers see four tokens: (model, unstacked parameters)."""
    config = dataclasses.replace(
        tiny.config, sliding_window=4, window_pattern=(True, False, True), rope_local_theta=90.0
    )
    return Transformer(config), parameters.unstack(tiny.params)


def run_steps(model, params, cache, tokens, sizes):
    step = jax.jit(lambda cache, tokens: model(params, tokens, cache=cache)[::1])
    parts, at = [], 0
    for size in sizes:
        logits, out = step(cache, tokens[:, at : at + size])
        cache, at = out.cache, at + size
        parts.append(logits)
    return np.concatenate(parts, 1), cache


@pytest.mark.parametrize("sizes", [(1,) * T, (3, 3, 3, 3), (2, 3, 1, 1, 3, 2)])
def test_a_windowed_layer_keeps_a_ring(tiny, windowed, sizes):
    model, params = windowed
    whole = jax.jit(lambda p: model(p, tiny.tokens)[0])(params)
    cache = model.init_cache(B, T, chunk=max(sizes))
    assert [a.shape[2] for a in cache.keys] == [3 + max(sizes), T, 3 + max(sizes)]
    logits, cache = run_steps(model, params, cache, tiny.tokens, sizes)
    np.testing.assert_allclose(logits, whole, **TOLERANCE)


def test_scanned_windows_are_those_of_single_layers(tiny, windowed):
    model, params = windowed
    scanned = jax.jit(lambda p: model(p, tiny.tokens)[0])(parameters.stack(params))
    unrolled = jax.jit(lambda p: model(p, tiny.tokens)[0])(params)
    np.testing.assert_allclose(scanned, unrolled, **TOLERANCE)
    everywhere = Transformer(dataclasses.replace(model.config, window_pattern=()))
    other = jax.jit(lambda p: everywhere(p, tiny.tokens)[0])(params)
    assert np.abs(other - unrolled).max() > 1e-2


def test_a_ring_takes_back_as_many_tokens_as_a_pass_may_add(tiny, windowed):
    model, params = windowed
    whole = jax.jit(lambda p: model(p, tiny.tokens)[0])(params)
    cache = model.init_cache(B, T, chunk=3)
    _, cache = run_steps(model, params, cache, tiny.tokens, (3, 3, 2))
    _, drafted = run_steps(model, params, cache, jnp.full((B, 3), 5), (3,))
    logits, _ = run_steps(model, params, drafted.rewind(cache.lengths), tiny.tokens[:, 8:], (1, 3))
    np.testing.assert_allclose(logits, whole[:, 8:], **TOLERANCE)


def test_ragged_rows_fill_a_ring_with_their_latest_tokens(tiny, windowed):
    model, params = windowed
    whole = jax.jit(lambda p: model(p, tiny.tokens)[0])(params)
    lengths = jnp.array([10, 2])
    out = model.backbone(params, model.embed(params, tiny.tokens), capture={"k", "v"})
    cache = kv.fill(
        model.init_cache(B, T),
        [out.captured["k"][i] for i in range(3)],
        [out.captured["v"][i] for i in range(3)],
        lengths,
    )
    for i in range(2):
        tokens = tiny.tokens[np.arange(B), lengths + i][:, None]
        logits, cache = run_steps(model, params, cache, tokens, (1,))
        expected = whole[np.arange(B), lengths + i]
        np.testing.assert_allclose(logits[:, 0], expected, **TOLERANCE)


def test_a_pass_longer_than_a_rings_chunk_is_refused(tiny, windowed):
    model, params = windowed
    with pytest.raises(ValueError, match=r"made for 2 at a time; give init_cache chunk=3"):
        model(params, tiny.tokens[:, :3], cache=model.init_cache(B, T, chunk=2))


def test_growing_in_the_middle_changes_nothing(tiny, windowed):
    model, params = windowed
    whole = jax.jit(lambda p: model(p, tiny.tokens)[0])(params)
    small = model.init_cache(B, 3)
    first, small = run_steps(model, params, small, tiny.tokens, (1, 1, 1))
    grown = small.grow(8, model.config)
    second, grown = run_steps(model, params, grown, tiny.tokens[:, 3:], (1,) * 5)
    last = grown.grow(T, model.config)
    assert [a.shape[2] for a in last.keys] == [4, T, 4]
    third, _ = run_steps(model, params, last, tiny.tokens[:, 8:], (1,) * 4)
    np.testing.assert_allclose(np.concatenate([first, second, third], 1), whole, **TOLERANCE)


def test_eight_bit_storage_is_close_and_a_quarter_of_the_bytes(tiny, windowed, whole):
    for model, params, expected in (
        (tiny.model, parameters.unstack(tiny.params), whole),
        (*windowed, jax.jit(lambda p: windowed[0](p, tiny.tokens)[0])(windowed[1])),
    ):
        cache = model.init_cache(B, T, "int8", chunk=4)
        logits, cache = run_steps(model, params, cache, tiny.tokens, (4, 4, 1, 1, 2))
        assert {a.values.dtype for a in cache.keys} == {jnp.dtype("int8")}
        error = np.abs(logits - expected)
        assert 0 < error.max() < 0.05 * np.abs(expected).max()
        grown = cache.grow(T + 2, model.config).rewind(jnp.array([9, 9]))
        forked = kv.fork(grown, 2)
        logits, _ = run_steps(model, params, forked, tiny.tokens[:, 9:].repeat(2, 0), (1,))
        assert np.abs(logits[::2, 0] - expected[:, 9]).max() < 0.05 * np.abs(expected).max()
    plain = tiny.model.init_cache(B, T)
    small = sum(a.nbytes for a in jax.tree.leaves(tiny.model.init_cache(B, T, "int8").keys))
    assert small == sum(a.nbytes for a in plain.keys) * (8 + 4) / 32  # heads are 8 wide


def test_int8_rounds_each_heads_vector_by_its_largest_number():
    vectors = jnp.array([[127.0, -63.4, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]).reshape(1, 2, 1, 4)
    empty = kv.Int8(jnp.zeros((1, 1, 2, 4), jnp.int8), jnp.zeros((1, 1, 2, 1)))
    kept = kv.write(empty, vectors, jnp.array([0]), ring=False)
    np.testing.assert_array_equal(kept.values[0, 0, 0], [127, -63, 0, 1])
    np.testing.assert_array_equal(kv.read(kept, jnp.float32)[0, 1], 0)


def test_bfloat16_storage_beside_float32_compute(tiny, whole):
    cache = tiny.model.init_cache(B, T, "bfloat16")
    logits, cache = run_steps(
        tiny.model, parameters.unstack(tiny.params), cache, tiny.tokens, (6, 6)
    )
    assert {a.dtype for a in cache.values} == {jnp.dtype("bfloat16")}
    assert 0 < np.abs(logits - whole).max() < 0.02 * np.abs(whole).max()
