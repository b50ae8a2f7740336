from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.signals import fraction_count, masked_quantile, top_mask
from tokjax.signals.quantiles import METHODS

pytestmark = pytest.mark.usefixtures("strict_dtypes")
quantile = jax.jit(masked_quantile, static_argnames=("axis", "method", "empty"))
top = jax.jit(top_mask, static_argnames="largest")
N = 9


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=N), st.lists(st.integers(0, 16)))
def test_every_method_equals_numpy_on_the_masked_values(method, kept, sixteenths):
    # Sixteenths are exact in both precisions, so that NumPy decides as we do.
    q = np.resize(np.array([*sixteenths, 0, 16, 8]) / 16, 5)
    rng = np.random.default_rng(len(kept))
    mask = np.zeros(N, bool)
    mask[rng.permutation(N)[: len(kept)]] = True
    values = np.full(N, 99.0)
    values[mask] = kept
    found = quantile(
        jnp.asarray(values, jnp.float32), jnp.asarray(q, jnp.float32), mask, -1, method
    )
    np.testing.assert_allclose(found, np.quantile(kept, q, method=method), rtol=1e-6, atol=1e-6)
    assert np.all((found >= min(kept)) & (found <= max(kept)))


def test_thresholds_of_known_batches():
    differences = np.float32([-2, -1, -0.5, 0, 0.2, 0.9, 1.1, 1.6, 2.5])
    found = quantile(differences, np.float32([0.33, 0.66]), np.ones(N, bool))
    np.testing.assert_allclose(found, [-0.18, 0.956], atol=1e-6)
    assert quantile(np.float32([0.5, 0.6, 0.7, 0.8]), 0.2, np.ones(4, bool)) == 0.56


def test_a_place_that_rounding_moved_off_its_whole_number_is_put_back():
    # In float32, 0.15 * 100 = 15.000001 and 0.53 * 100 = 52.999996.
    values, q = np.arange(101, dtype=np.float32), np.float32([0.29, 0.15, 0.53, 0.07])
    for method in ("lower", "higher", "nearest"):
        found = quantile(values, q, np.ones(101, bool), -1, method)
        np.testing.assert_array_equal(found, [29, 15, 53, 7])
    # A half is put back too, then goes to the even place: 0.59 * 50 = 29.499998.
    first = np.arange(101) < 51
    halves = quantile(values, np.float32([0.59, 0.53, 0.15, 0.27]), first, -1, "nearest")
    np.testing.assert_array_equal(halves, [30, 26, 8, 14])


def test_axes_and_the_shape_of_the_levels():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 3, 4)).astype(np.float32)
    q, mask = np.array([[0.25, 0.5]], np.float32), np.ones((2, 3, 4), bool)
    for axis in (-2, (0, 2), None):
        found = quantile(values, q, mask, axis)
        np.testing.assert_allclose(found, np.quantile(values, q, axis=axis), rtol=1e-5)
    rows = quantile(values, 0.5, np.array([True, False, True, True]))
    np.testing.assert_allclose(rows, np.median(values[..., [0, 2, 3]], axis=-1), rtol=1e-5)


def test_empty_single_and_infinite_values():
    assert quantile(np.ones(3, np.float32), 0.5, np.zeros(3, bool)) == 0
    assert quantile(np.ones(3, np.float32), 0.5, np.zeros(3, bool), empty=-1.0) == -1
    assert quantile(np.ones(0, np.float32), 0.5, np.ones(0, bool), axis=None) == 0
    for q in (0.0, 0.3, 1.0):
        assert quantile(np.float32([1.0, 5.0]), q, np.array([False, True])) == 5
    with_infinite = np.float32([1.0, jnp.inf, jnp.inf, -jnp.inf])
    for method in METHODS:
        found = quantile(with_infinite, np.float32([0, 1 / 3, 1]), np.ones(4, bool), -1, method)
        np.testing.assert_array_equal(found, [-np.inf, 1, np.inf])


def test_quantiles_name_what_is_wrong():
    with pytest.raises(ValueError, match="linear"):
        masked_quantile(jnp.ones(2), 0.5, jnp.ones(2, bool), method="liner")  # type: ignore
    with pytest.raises(ValueError, match=r"1\.5"):
        masked_quantile(jnp.ones(2), 1.5, jnp.ones(2, bool))


def test_fractions_are_exact():
    assert fraction_count(361, 0.07) == 26
    assert fraction_count(360, 0.075, "floor") == 27  # int(360 * 0.015 * 5) is 26
    assert fraction_count(90, 0.7, "floor") == 63  # int(0.7 * 90) is 62
    assert fraction_count(100, 0.07) == 7  # ceil(100 * 0.07) is 8
    assert fraction_count(3, Fraction(1, 3)) == 1
    assert fraction_count(0, 0.5) == fraction_count(5, 0) == 0
    assert fraction_count(5, 1) == 5
    # A schedule: from 25 % of 32 to all of them, half way.
    assert fraction_count(32, jnp.float32(0.5 * 0.25 + 0.5 * 1.0)) == 20


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 20_000) | st.integers(0, 2000),
    st.integers(0, 1000),
    st.sampled_from(["ceil", "floor"]),
)
def test_counts_on_host_device_and_by_a_traced_fraction_agree(n, thousandths, rounding):
    exact = Fraction(n * thousandths, 1000)
    expected = -(-exact.numerator // exact.denominator) if rounding == "ceil" else int(exact)
    fraction = thousandths / 1000
    assert fraction_count(n, fraction, rounding) == expected
    assert fraction_count(np.asarray(n, np.int32), fraction, rounding) == expected
    # float32 tells thousandths apart up to here.
    if n <= 2000:
        assert fraction_count(np.int32(n), jnp.float32(fraction), rounding) == expected


def test_a_fraction_that_would_overflow_is_refused():
    many = jnp.int32(2_000_000_000)
    assert fraction_count(many, 0.07) == 140_000_000
    assert fraction_count(many, Fraction(1, 3), "floor") == 666_666_666
    with pytest.raises(ValueError, match="Fraction"):
        fraction_count(many, 0.3333333)
    with pytest.raises(ValueError, match=r"1\.5"):
        fraction_count(3, 1.5)
    with pytest.raises(ValueError, match="floor"):
        fraction_count(3, 0.5, "flor")  # type: ignore[arg-type]


def test_lowest_scores_are_kept_and_ties_go_to_the_lower_index():
    scores = jnp.array([5.2, 5.15, 5.05, 4.05, 7, 9, 6.65, 3.8])
    kept = top(scores, 4, jnp.ones(8, bool), largest=False)
    np.testing.assert_array_equal(np.flatnonzero(kept), [1, 2, 3, 7])
    tied = top(jnp.array([1.0, 2, 2, 2, 0, 2, 2, 2]), 2, jnp.array([True, False] + [True] * 6))
    np.testing.assert_array_equal(np.flatnonzero(tied), [2, 3])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-3, 3), min_size=8, max_size=8), st.integers(0, 9), st.integers(0, 255))
def test_exactly_the_best_masked_entries_are_chosen(scores, count, bits):
    mask = np.array([bits >> i & 1 for i in range(8)], bool)
    found = top(jnp.asarray(scores, jnp.float32), count, mask)
    order = sorted(np.flatnonzero(mask), key=lambda i: (-scores[i], i))
    np.testing.assert_array_equal(np.flatnonzero(found), sorted(order[:count]))


def test_a_masked_entry_is_never_chosen_before_an_infinitely_bad_one():
    scores = jnp.array([[9.0, -jnp.inf], [-jnp.inf, 9.0]])
    mask = jnp.array([[False, True], [True, True]])
    found = top(scores, jnp.array([1, 2]), mask)
    np.testing.assert_array_equal(found, [[False, True], [True, True]])


def test_mapped_over_rows_equals_row_by_row():
    rng = np.random.default_rng(0)
    values, mask = rng.normal(size=(3, N)).astype(np.float32), rng.random((3, N)) < 0.6
    levels, counts = np.float32([0.1, 0.5, 0.9]), np.int32([1, 0, 4])

    @jax.jit
    @jax.vmap
    def mapped(values, mask, q, count):
        return masked_quantile(values, q, mask), top_mask(values, count, mask)

    found, chosen = mapped(values, mask, levels, counts)
    for i in range(3):
        expected = np.quantile(values[i][mask[i]], levels[i])
        np.testing.assert_allclose(found[i], expected, rtol=1e-5)
        np.testing.assert_array_equal(chosen[i], top(values[i], counts[i], mask[i]))
