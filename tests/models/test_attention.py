import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.models import attention
from tokjax.models.attention import Scores, blockwise_attention, dense_attention, visible_keys

T = 150  # more than two blocks of queries, and the last one is not full
B, H, K, d = 2, 4, 2, 8
SCORES = Scores(scale=d**-0.5)


@pytest.fixture(scope="module")
def arrays():
    """Queries, keys, values, weights of a loss, and segments whose ends are no block ends."""
    rng = np.random.default_rng(0)
    q, w = (rng.normal(size=(B, T, H, d)).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(B, T, K, d)).astype(np.float32) for _ in range(2))
    segments = np.stack([np.repeat([1, 2, 3], [63, 70, 17]), np.repeat([1, 2], [1, 149])])
    return q, k, v, w, segments.astype(np.int32)


def by_dense(q, k, v, segments, window=None, *, scores):
    places = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    mask = visible_keys(
        *(places, places, window),
        causal=scores.causal,
        query_segments=segments,
        key_segments=segments,
    )
    return dense_attention(q, k, v, mask, scores)[0]


@functools.cache
def gradients(attend, scores=SCORES, window=None):
    attend = functools.partial(attend, window=window, scores=scores)

    def loss(q, k, v, w, segments):
        out = attend(q, k, v, segments)
        return (out.astype(jnp.float32) * w).sum(), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize(
    ("scores", "window"),
    [
        (SCORES, None),
        (SCORES, 20),
        (Scores(0.5, softcap=2.0), 65),
        (Scores(d**-0.5, causal=False), None),
        (Scores(d**-0.5, causal=False), 9),
    ],
)
def test_blockwise_equals_dense_in_values_and_gradients(arrays, scores, window):
    expected_grads, expected = gradients(by_dense, scores, window)(*arrays)
    grads, out = gradients(blockwise_attention, scores, window)(*arrays)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-5)


def test_blockwise_in_bfloat16_follows_float32(arrays):
    q, k, v, w, segments = arrays
    low = [jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)]
    expected_grads, expected = gradients(by_dense)(*arrays)
    grads, out = gradients(blockwise_attention)(*low, w, segments)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=0.04)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        error = np.abs(np.asarray(grad, np.float32) - expected_grad).max()
        assert error < 0.02 * np.abs(expected_grad).max()


def test_dense_equals_a_loop_over_queries(arrays):
    q, k, v, _, segments = (np.asarray(a, np.float64) for a in arrays)
    out = jax.jit(functools.partial(by_dense, scores=SCORES))(*arrays[:3], arrays[4])
    for b, t, h in ((0, 0, 0), (0, 62, 1), (0, 63, 2), (0, 149, 3), (1, 1, 0), (1, 120, 3)):
        first = np.flatnonzero(segments[b] == segments[b, t])[0]
        keys, values = (a[b, first : t + 1, h // (H // K)] for a in (k, v))
        p = np.exp(keys @ q[b, t, h] / np.sqrt(d))
        np.testing.assert_allclose(out[b, t, h], p @ values / p.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 64, 65, 1024, 1500, 5000])
def test_blocks_cover_every_query_once_and_stay_few(length):
    blocks = attention._blocks(length, causal=True)
    assert [i for rows, _ in blocks for i in range(length)[rows]] == list(range(length))
    assert [seen.stop for _, seen in blocks] == [rows.stop for rows, _ in blocks]
    assert {seen.stop for _, seen in attention._blocks(length, causal=False)} == {length}
    assert len(blocks) <= 16


def test_large_scores_neither_overflow_nor_lose_gradients(arrays):
    q, k, v, w, segments = arrays
    grads, out = gradients(blockwise_attention)(40 * q, 40 * k, v, w, segments)
    expected_grads, expected = gradients(by_dense)(40 * q, 40 * k, v, w, segments)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert np.isfinite(grad).all()
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-2, atol=0.05)


def test_blockwise_keeps_the_scores_of_one_row_at_a_time():
    rows, long = 4, 512
    q = jax.ShapeDtypeStruct((rows, long, H, d), jnp.float32)
    k = jax.ShapeDtypeStruct((rows, long, K, d), jnp.float32)
    segments = jax.ShapeDtypeStruct((rows, long), jnp.int32)
    scores = 4 * rows * H * long * long

    def temporary_bytes(attend):
        lowered = gradients(attend).lower(q, k, k, q, segments)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(by_dense) > scores
    assert temporary_bytes(blockwise_attention) < 0.6 * scores


def choose(requested, *, length, plain=True):
    return attention.choose_kernel(
        requested, plain=plain, softcap=False, dtype=jnp.float32, length=length
    )


@pytest.mark.parametrize("requested", ["dense", "blockwise"])
def test_a_named_kernel_is_used_where_it_can_be(requested):
    assert (
        attention.choose_kernel(requested, plain=True, softcap=False, dtype=jnp.float32, length=9)
        == requested
    )


@pytest.mark.parametrize("requested", ["auto", "dense", "blockwise"])
def test_what_only_dense_can_do_is_done_by_dense(requested):
    assert (
        attention.choose_kernel(requested, plain=False, softcap=False, dtype=jnp.float32, length=9)
        == "dense"
    )


def test_auto_takes_blockwise_on_a_cpu_but_not_for_one_query():
    choose = functools.partial(
        attention.choose_kernel, "auto", plain=True, softcap=False, dtype=jnp.float32
    )
    assert choose(length=2) == "blockwise"
    assert choose(length=1) == "dense"


def test_rows_split_over_devices_are_attended_to_by_dense():
    mesh = jax.make_mesh((2,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        kernel = attention.choose_kernel(
            "blockwise", plain=True, softcap=False, dtype=jnp.float32, length=8
        )
    assert kernel == "dense"


def test_cudnn_without_an_nvidia_gpu_is_refused(tiny):
    config = dataclasses.replace(tiny.config, attention="cudnn", dtype="bfloat16")
    model = dataclasses.replace(tiny.model, config=config)
    with pytest.raises(ConfigError, match=r"attention='cudnn' needs an NVIDIA GPU, this is cpu"):
        model(tiny.params, tiny.tokens)
