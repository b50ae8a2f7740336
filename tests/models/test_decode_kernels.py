import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.models.decode_kernels import (
    Attention,
    Norm,
    Tile,
    Walk,
    attend,
    padded_rows,
    project,
    tile,
    walk,
)
from tokjax.models.quantized import Int8Matrix
from tokjax.models.transposed import Transposed

RMS = Norm(1e-5, False)


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def _normed(x, weights):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * weights


@pytest.mark.parametrize("rows", [1, 16])
def test_norm_between_two_products_is_that_of_separate_operations(rows):
    x, residual = _normal(0, rows, 192), _normal(1, rows, 128)
    first, second = _normal(2, 192, 128), _normal(3, 128, 256)
    weights, bias = _normal(4, 128), _normal(5, 256)
    y, scaled, squares = project(
        x, Transposed.of(first, x.dtype), residual=residual, following=(RMS, weights),
        interpret=True,
    )  # fmt: skip
    expected = x @ first + residual
    np.testing.assert_allclose(y, expected, atol=2e-4)
    assert squares.shape[1] > 1  # more programs than one have added to the sums
    turned = Transposed.of(second, x.dtype)
    found = project(scaled, turned, squares=(RMS, squares), bias=bias, interpret=True)
    normed = _normed(expected, weights)
    np.testing.assert_allclose(found, normed @ second + bias, atol=1e-3)
    gated = project(scaled, turned, squares=(RMS, squares), gate=jax.nn.silu, interpret=True)
    gate, up = jnp.split(normed @ second, 2, axis=1)
    np.testing.assert_allclose(gated, jax.nn.silu(gate) * up, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 16])
def test_int8_matrix_multiplies_as_the_matrix_it_stands_for(rows):
    x, matrix = _normal(0, rows, 128), Int8Matrix.of(_normal(1, 128, 192))
    turned = Transposed.of(matrix, x.dtype)
    expected = x @ matrix.widened(jnp.float32)
    np.testing.assert_allclose(project(x, turned, interpret=True), expected, atol=1e-3)
    np.testing.assert_allclose(turned.after(x), expected, atol=1e-3)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_attention_and_cache_are_those_of_separate_operations(batch, splits):
    H, K, d, S = 4, 2, 32, 70
    rows = padded_rows(batch)
    qkv = _normal(0, rows, (H + 2 * K) * d)
    keys, values = _normal(1, batch, K, S, d), _normal(2, batch, K, S, d)
    lengths = jnp.array([69, 3, 0])[:batch]
    angles = _normal(3, batch, d // 2)
    rotary = jnp.cos(angles), jnp.sin(angles)
    norms = _normal(4, d), _normal(5, d)
    out, new_keys, new_values = attend(
        Attention(H, K, d, d**-0.5, softcap=5.0, norm=RMS), qkv, keys, values, lengths, rotary,
        norms, interpret=True, by=Walk(16, splits, 4, 2),
    )  # fmt: skip

    q, k, v = (a.reshape(batch, -1, d) for a in jnp.split(qkv[:batch], [H * d, (H + K) * d], 1))

    def turned(x, weights):
        low, high = jnp.split(_normed(x, weights), 2, axis=-1)
        cos, sin = (a[:, None] for a in rotary)
        return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    row = jnp.arange(batch)
    expected_keys = keys.at[row, :, lengths].set(turned(k, norms[1]))
    expected_values = values.at[row, :, lengths].set(v)
    np.testing.assert_allclose(new_keys, expected_keys, atol=1e-5)
    np.testing.assert_array_equal(new_values, expected_values)
    grouped = turned(q, norms[0]).reshape(batch, K, H // K, d)
    scores = jnp.einsum("bkgd,bksd->bkgs", grouped, expected_keys) * d**-0.5
    scores = 5.0 * jnp.tanh(scores / 5.0)
    seen = jnp.arange(S) <= lengths[:, None, None, None]
    shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    expected = jnp.einsum("bkgs,bksd->bkgd", shares, expected_values).reshape(batch, H * d)
    np.testing.assert_allclose(out[:batch], expected, atol=1e-5)


def test_full_cache_is_left_as_it_is():
    S, d = 16, 32
    qkv, keys, values = _normal(0, 1, 3 * d), _normal(1, 1, 1, S, d), _normal(2, 1, 1, S, d)
    rotary = jnp.ones((1, d // 2)), jnp.zeros((1, d // 2))
    _, new_keys, new_values = attend(
        Attention(1, 1, d, 1.0), qkv, keys, values, jnp.array([S]), rotary, interpret=True
    )
    np.testing.assert_array_equal(new_keys, keys)
    np.testing.assert_array_equal(new_values, values)


def test_every_width_that_fits_is_cut_evenly():
    for width in (64, 576, 1536, 5632, 49152):
        for rows, gated in ((1, False), (1, True), (16, False), (48, True)):
            cut = tile(rows, width, width, gated)
            assert width % cut.outputs == 0 and width % cut.inputs == 0, (width, cut)
            assert rows == 1 or min(cut.outputs, cut.inputs) >= 16
    assert isinstance(cut, Tile)


def test_long_rows_are_walked_by_several_programs_until_the_gpu_is_full():
    assert [walk(1, 8, slots).splits for slots in (256, 4096, 10**6)] == [1, 8, 33]
    assert walk(64, 8, 10**6).splits == 1
