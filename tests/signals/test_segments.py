import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.signals.segments import (
    segment_counts,
    segment_extremes,
    segment_moments,
    segment_sums,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")
N, NUM = 10, 3


@jax.jit
def everything(values, ids):
    return (
        segment_counts(ids, NUM),
        segment_sums(values, ids, NUM),
        segment_extremes(values, ids, NUM),
        segment_moments(values, ids, NUM),
    )


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-2, 5), min_size=N, max_size=N), st.integers(0, 2**32 - 1))
def test_segments_equal_numpy_and_foreign_ids_count_nowhere(ids, seed):
    values = np.random.default_rng(seed).normal(size=N).astype(np.float32)
    ids = np.array(ids, np.int32)
    counts, sums, (low, high), moments = everything(values, ids)
    for s in range(NUM):
        own = values[ids == s].astype(np.float64)
        assert counts[s] == moments[0][s] == own.size
        np.testing.assert_allclose(sums[s], own.sum(), atol=1e-5)
        assert low[s] == own.min(initial=np.inf) and high[s] == own.max(initial=-np.inf)
        np.testing.assert_allclose(moments[1][s], own.mean() if own.size else 0, atol=1e-5)
        spread = own.size * own.var() if own.size else 0
        np.testing.assert_allclose(moments[2][s], spread, atol=1e-4)


def test_rounding_does_not_grow_with_the_number_of_values():
    # Added one after another, float32 stops at 2^24 / 16 steps of this size.
    n = 2**18
    values, ids = jnp.full(n, 0.1), jnp.zeros(n, jnp.int32)
    expected = n * np.float64(np.float32(0.1))
    np.testing.assert_allclose(segment_sums(values, ids, 1)[0], expected, rtol=3e-7)
    in_order = np.cumsum(np.full(n, 0.1, np.float32), dtype=np.float32)[-1]
    assert abs(in_order / expected - 1) > 3e-7


def test_sums_of_vectors_and_of_nothing():
    values = jnp.arange(6.0).reshape(3, 2)
    found = segment_sums(values, jnp.array([1, 0, 1]), 2)
    np.testing.assert_array_equal(found, [[2, 3], [4, 6]])
    np.testing.assert_array_equal(
        segment_sums(values[:0], jnp.zeros(0, jnp.int32), 2), np.zeros((2, 2))
    )


def test_mapped_over_rows_equals_row_by_row():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, N)).astype(np.float32)
    ids = rng.integers(-1, NUM + 1, (3, N)).astype(np.int32)
    mapped = jax.jit(jax.vmap(everything))(values, ids)
    rows = [everything(v, i) for v, i in zip(values, ids, strict=True)]
    close = lambda a, *b: np.testing.assert_allclose(a, np.stack(b), rtol=1e-6)  # noqa: E731
    jax.tree.map(close, mapped, *rows)


def test_the_order_of_entries_of_other_ids_changes_no_bit():
    rng = np.random.default_rng(0)
    values, ids = rng.normal(size=N).astype(np.float32), rng.integers(0, NUM, N).astype(np.int32)
    order = np.argsort(ids, kind="stable")
    found, moved = everything(values, ids), everything(values[order], ids[order])
    jax.tree.map(np.testing.assert_array_equal, found, moved)
