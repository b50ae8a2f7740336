import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.signals import (
    by_bin,
    frequency_bins,
    init_type_stats,
    merge_type_stats,
    update_type_stats,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")
V, B, T = 6, 2, 7
update = jax.jit(update_type_stats)
merge = jax.jit(merge_type_stats)
binned = jax.jit(by_bin, static_argnames="num")


def batch(seed, shift=0.0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, V - 1, (B, T)).astype(np.int32)  # the last type never occurs
    values = rng.gamma(2.0, size=(B, T)).astype(np.float32) + np.float32(shift)
    return ids, values, rng.random((B, T)) < 0.8


def gathered(*batches):
    stats = init_type_stats(V)
    for one in batches:
        stats = update(stats, *one)
    return stats


def assert_equal_numpy(stats, batches, rtol=1e-5):
    ids, values, mask = (np.concatenate([b[i] for b in batches]) for i in range(3))
    for v in range(V):
        own = values[mask & (ids == v)].astype(np.float64)
        assert stats.count[v] == own.size
        np.testing.assert_allclose(stats.total[v], own.sum(), rtol=rtol)
        if own.size:
            np.testing.assert_allclose(stats.mean[v], own.mean(), rtol=rtol)
            np.testing.assert_allclose(stats.variance(0)[v], own.var(), rtol=rtol, atol=1e-6)
        sample = own.var(ddof=1) if own.size > 1 else 0
        np.testing.assert_allclose(stats.variance(1)[v], sample, rtol=rtol, atol=1e-6)


def test_micro_and_macro_averages():
    ids = np.resize([0] * 8 + [1, 1], (B, T))
    losses = np.resize([0.1] * 8 + [2.0, 3.0], (B, T)).astype(np.float32)
    stats = update(init_type_stats(V), ids, losses, np.arange(B * T).reshape(B, T) < 10)
    whole = binned(stats, np.zeros(V, np.int32), 1)
    np.testing.assert_allclose(whole.micro, [0.58], rtol=1e-6)
    np.testing.assert_allclose(whole.macro, [1.3], rtol=1e-6)
    np.testing.assert_array_equal(whole.types, [2])  # those without a value are left out
    np.testing.assert_array_equal(whole.count, [10])


def test_a_uniform_model_has_the_same_loss_for_every_type():
    ids, _, mask = batch(0)
    stats = update(init_type_stats(V), ids, np.full((B, T), np.log(V), np.float32), mask)
    np.testing.assert_allclose(stats.mean[stats.seen], np.log(V), rtol=1e-6)
    bins = binned(stats, frequency_bins(np.arange(1, V + 1), 2), 2)
    np.testing.assert_allclose(bins.macro[0] - bins.macro[1], 0, atol=1e-6)


def test_streamed_statistics_equal_numpy():
    batches = [batch(seed) for seed in range(4)]
    assert_equal_numpy(gathered(*batches), batches)


def test_a_large_mean_does_not_drown_the_variance():
    batches = [batch(seed, shift=4096.0) for seed in range(3)]
    stats = gathered(*batches)
    sums = np.zeros(V, np.float32), np.zeros(V, np.float32)
    for ids, values, mask in batches:
        np.add.at(sums[0], ids[mask], values[mask])
        np.add.at(sums[1], ids[mask], values[mask] ** 2)
    assert_equal_numpy(stats, batches, rtol=1e-3)
    mean = sums[0] / np.maximum(stats.count, 1)
    naive = sums[1] / np.maximum(stats.count, 1) - mean**2
    assert np.abs(naive - stats.variance(0)).max() > 0.05  # the trap


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 99), min_size=3, max_size=3))
def test_merging_is_associative_and_commutative_and_equals_streaming(seeds):
    a, b, c = (gathered(batch(seed)) for seed in seeds)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)  # noqa: E731
    left = merge(merge(a, b), c)
    jax.tree.map(close, left, merge(a, merge(b, c)))
    jax.tree.map(close, left, merge(c, merge(b, a)))
    jax.tree.map(close, left, gathered(*map(batch, seeds)))
    equal = np.testing.assert_array_equal
    jax.tree.map(equal, merge(init_type_stats(V), a), a)
    jax.tree.map(equal, merge(a, init_type_stats(V)), a)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from(["types", "mass"]))
def test_totals_do_not_depend_on_the_bins(seed, num, by):
    batches = [batch(seed)]
    stats = gathered(*batches)
    bins = frequency_bins(np.random.default_rng(seed).integers(1, 99, V), num, by)
    found = binned(stats, bins, num)
    _, values, mask = batches[0]
    total = (np.asarray(found.micro, np.float64) * np.asarray(found.count)).sum()
    np.testing.assert_allclose(total, values[mask].astype(np.float64).sum(), rtol=1e-5)
    assert found.types.sum() == stats.seen.sum()
    assert found.count.sum() == mask.sum()


def test_nothing_seen_gives_zeros():
    ids, values, _ = batch(0)
    stats = update(init_type_stats(V), ids, values, np.zeros((B, T), bool))
    jax.tree.map(lambda a: np.testing.assert_array_equal(a, np.zeros(V)), stats)
    found = binned(stats, np.zeros(V, np.int32), 2)
    jax.tree.map(lambda a: np.testing.assert_array_equal(a, np.zeros(2)), found)


def test_types_of_no_bin_are_left_out():
    stats = gathered(batch(0))
    found = binned(stats, np.array([0, -1, -1, -1, -1, -1], np.int32), 1)
    assert found.types == 1 and found.count == stats.count[0]
    assert found.macro == stats.mean[0]


def test_shapes_that_differ_are_named():
    ids, values, mask = batch(0)
    with pytest.raises(ValueError, match=r"\(2, 6\)"):
        update_type_stats(init_type_stats(V), ids, values[:, :6], mask)


def test_bins_of_equally_many_types():
    counts = np.array([5, 0, 100, 5, 1, 20, 7])
    np.testing.assert_array_equal(frequency_bins(counts, 3), [0, -1, 2, 1, 0, 2, 1])
    np.testing.assert_array_equal(frequency_bins(counts, 1), [0, -1, 0, 0, 0, 0, 0])


def test_bins_of_equal_mass():
    # Half of the occurrences are one type's.
    np.testing.assert_array_equal(frequency_bins([1, 2, 3, 6], 2, "mass"), [0, 0, 0, 1])
    np.testing.assert_array_equal(frequency_bins([4, 4, 4, 4], 4, "mass"), [0, 1, 2, 3])
    # A type that holds nearly all lies in the middle; bins beside it may stay empty.
    np.testing.assert_array_equal(frequency_bins([1, 998], 3, "mass"), [0, 1])


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 6))
def test_bins_are_a_partition_in_order_of_frequency(counts, num):
    counts = np.array(counts, np.int64)
    for by in ("types", "mass"):
        bins = frequency_bins(counts, num, by)
        np.testing.assert_array_equal(bins == -1, counts == 0)
        assert bins.max(initial=-1) < num
        order = np.argsort(counts, kind="stable")
        assert (np.diff(bins[order]) >= 0).all()
    sizes = np.bincount(frequency_bins(counts, num)[counts > 0], minlength=num)
    assert sizes.max() - sizes.min() <= 1


def test_binning_names_what_is_wrong():
    with pytest.raises(ValueError, match="mass"):
        frequency_bins([1], 1, "mas")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0"):
        frequency_bins([1], 0)
