"""Sources are mixed at their exact rates, each row once per epoch, at any place of the stream."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.data.mixing import BLOCK, Mixture
from tokjax.errors import ConfigError

RATES = st.lists(st.floats(1e-4, 1e3, allow_nan=False), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(rates=RATES, seed=st.integers(0, 100), data=st.data())
def test_each_row_of_a_source_occurs_once_before_any_occurs_twice(rates, seed, data):
    rows = data.draw(st.lists(st.integers(1, 50), min_size=len(rates), max_size=len(rates)))
    located = Mixture(rows, rates, seed).locate(np.arange(3000))
    for k, count in enumerate(rows):
        mine = located.source == k
        draws = np.arange(mine.sum())
        np.testing.assert_array_equal(located.epoch[mine], draws // count)
        for epoch in range(int(mine.sum()) // count):
            passed = located.row[mine][epoch * count : (epoch + 1) * count]
            np.testing.assert_array_equal(np.sort(passed), np.arange(count))


@settings(max_examples=30, deadline=None)
@given(rates=RATES, block=st.integers(1, 10**9))
def test_counts_after_whole_blocks_follow_the_rates(rates, block):
    mixture = Mixture([1] * len(rates), rates, seed=0)
    counts = np.array(mixture.epochs_before(block * BLOCK))
    assert counts.sum() == block * BLOCK
    exact = np.array(rates) / sum(rates) * block * BLOCK
    # The error stays within a few rows after a trillion of them.
    np.testing.assert_allclose(counts, exact, atol=len(rates), rtol=1e-12)
    later = np.array(mixture.epochs_before((block + 1) * BLOCK))
    assert (later >= counts).all()


def test_a_rare_source_comes_at_its_rate():
    mixture = Mixture([5, 5, 5], [1, 1e-5, 0.5], seed=3)
    places = np.arange(400 * BLOCK)
    located = mixture.locate(places)
    found = np.bincount(located.source, minlength=3)
    np.testing.assert_allclose(found, len(places) * np.array([1, 1e-5, 0.5]) / 1.50001, atol=2)
    assert found[1] == 2


def test_rates_are_the_decimals_as_written():
    assert Mixture([1, 1], [0.7, 0.3], 0).epochs_before(BLOCK * 10**15)[0] == BLOCK * 7 * 10**14


@settings(max_examples=20, deadline=None)
@given(
    rates=st.one_of(st.none(), st.just([3.0, 1.0, 0.01])),
    places=st.lists(st.integers(0, 20_000), min_size=1, max_size=30),
    shuffle=st.booleans(),
)
def test_any_place_alone_agrees_with_the_whole_stream(rates, places, shuffle):
    mixture = Mixture([40, 3, 500], rates, seed=1, shuffle=shuffle)
    whole = mixture.locate(np.arange(20_001))
    some = mixture.locate(places)
    for name in ("source", "epoch", "row"):
        np.testing.assert_array_equal(getattr(some, name), getattr(whole, name)[places])


@pytest.mark.parametrize("rates", [[5.0, 1.0], [1.0, 5.0]])
@pytest.mark.parametrize("place", [0, 1, 29, 30, 31, 1023, 1024, 2500])
def test_epochs_before_count_the_stream(rates, place):
    mixture = Mixture([20, 10], rates, seed=4)
    counted = np.bincount(mixture.locate(np.arange(place)).source, minlength=2)
    assert mixture.epochs_before(place) == (counted / [20, 10]).tolist()


def test_concatenated_sources_share_their_epochs():
    assert Mixture([20, 10], None, seed=4).epochs_before(45) == [1.5, 1.5]


def test_sources_of_a_block_are_shuffled_and_blocks_differ():
    source = Mixture([5, 5], [1, 1], seed=0).locate(np.arange(2 * BLOCK)).source
    runs = int((np.diff(source[:BLOCK]) != 0).sum())
    assert abs(runs - BLOCK / 2) < 5 * np.sqrt(BLOCK) / 2
    assert (source[:BLOCK] != source[BLOCK:]).any()
    assert source[:BLOCK].sum() == BLOCK // 2


def test_without_rates_every_row_of_every_source_comes_once_per_epoch():
    rows = [3, 1, 8]
    located = Mixture(rows, None, seed=2).locate(np.arange(24))
    for epoch in range(2):
        part = slice(12 * epoch, 12 * (epoch + 1))
        seen = sorted(zip(located.source[part].tolist(), located.row[part].tolist(), strict=True))
        assert seen == [(k, r) for k, count in enumerate(rows) for r in range(count)]
        assert (located.epoch[part] == epoch).all()
    assert (located.row[:12] != located.row[12:]).any()


@pytest.mark.parametrize("rates", [None, [2.0, 1.0]])
def test_without_shuffling_each_source_is_read_in_stored_order(rates):
    located = Mixture([10, 4], rates, seed=2, shuffle=False).locate(np.arange(100))
    for k, count in enumerate([10, 4]):
        mine = located.row[located.source == k]
        np.testing.assert_array_equal(mine, np.arange(len(mine)) % count)


def test_seed_decides_the_order_and_sources_have_their_own():
    first, again, other = (
        Mixture([64, 64], [1, 1], seed).locate(np.arange(256)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.row, again.row)
    assert (first.row != other.row).any()
    assert (first.row[first.source == 0][:64] != first.row[first.source == 1][:64]).any()


@pytest.mark.parametrize(
    ("rows", "rates", "message"),
    [
        ([], None, "at least one source"),
        ([3, 0], None, "a row in each"),
        ([3, 3], [1.0], "2 sources need 2 rates"),
        ([3, 3], [1.0, 0.0], "rate of source 1 is 0.0"),
        ([3, 3], [float("nan"), 1.0], "rate of source 0 is nan"),
        ([3, 3], [1.0, float("inf")], "rate of source 1 is inf"),
    ],
)
def test_impossible_mixtures_are_refused(rows, rates, message):
    with pytest.raises(ConfigError, match=message):
        Mixture(rows, rates, seed=0)


def test_places_are_numbers_from_zero():
    mixture = Mixture([3, 3], [1.0, 1.0], seed=0)
    with pytest.raises(ValueError, match="from 0"):
        mixture.locate([-1])
    assert mixture.locate(np.zeros(0, np.int64)).row.shape == (0,)
