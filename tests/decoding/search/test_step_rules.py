import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tokjax.decoding.search import (
    aggregate,
    effective_sample_size,
    puct,
    rebase_allocation,
    systematic_resampling,
)
from tokjax.errors import ConfigError

VALUES = st.lists(st.floats(-5, 5), min_size=1, max_size=9)


def test_rewards_of_steps_make_one_value():
    rewards = [0.9, 0.5, 0.8]
    assert aggregate(rewards, "product") == pytest.approx(0.36)
    assert aggregate(rewards, "min") == 0.5
    assert aggregate(rewards, "last") == aggregate(rewards) == 0.8
    with pytest.raises(ConfigError, match="aggregation='mean' must be one of"):
        aggregate(rewards, "mean")
    with pytest.raises(ConfigError, match="no rewards"):
        aggregate([])


def test_the_budget_goes_to_the_most_valuable():
    assert rebase_allocation([0.9, 0.5, 0.1], 8, 0.2).tolist() == [7, 1, 0]
    assert rebase_allocation([0.1] * 4, 8).tolist() == [2] * 4
    # All shares round to nothing: the best gets the budget.
    assert rebase_allocation([0.1, 0.2, 0.1], 1, 10.0).tolist() == [0, 1, 0]
    # 1.5 and 1.5 of 3 would round to 2 each.
    assert rebase_allocation([0.3, 0.3], 3).tolist() == [2, 1]


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(VALUES, st.integers(1, 20), st.floats(0.05, 10))
def test_an_allotment_spends_something_within_the_budget(values, budget, temperature):
    counts = rebase_allocation(values, budget, temperature)
    assert 1 <= counts.sum() <= budget and counts.min() >= 0
    shares = np.exp((np.array(values) - max(values)) / temperature)
    exact = budget * shares / shares.sum()
    assert (counts <= np.maximum(np.round(exact), budget * (counts == budget))).all()
    assert counts[int(np.argmax(values))] == counts.max()


def test_impossible_allotments_are_refused():
    for values, budget, temperature in (
        ([], 3, 0.2),
        ([np.nan], 3, 0.2),
        ([1.0], 0, 0.2),
        ([1.0], 3, 0.0),
    ):
        with pytest.raises(ConfigError, match="must be"):
            rebase_allocation(values, budget, temperature)


def test_tree_search_prefers_value_prior_and_few_visits():
    found = puct(np.array([0.5, 0.2, 0]), np.array([10, 3, 0]), np.array([0.5, 0.3, 0.2]), 1.0)
    np.testing.assert_allclose(found, [0.6639, 0.4704, 0.7211], atol=5e-5)
    np.testing.assert_allclose(puct(np.array([0.5, 0.2]), np.array([0, 0]), np.ones(2)), [0.5, 0.2])


def test_effective_sample_size_counts_equal_weights():
    assert effective_sample_size([0.7, 0.1, 0.1, 0.1]) == pytest.approx(1.923, abs=5e-4)
    assert effective_sample_size([3e-200] * 5) == pytest.approx(5)
    assert effective_sample_size([0, 2, 0]) == pytest.approx(1)
    assert effective_sample_size([0, 0]) == 0


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
    st.lists(st.floats(0, 1), min_size=1, max_size=9).filter(lambda w: sum(w) > 1e-3),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 20),
)
def test_particles_go_on_as_often_as_they_weigh(weights, offset, count):
    kept = systematic_resampling(weights, offset, count)
    counts = np.bincount(kept, minlength=len(weights))
    expected = count * np.array(weights) / sum(weights)
    assert len(kept) == count and (np.diff(kept) >= 0).all()
    assert (np.abs(counts - expected) < 1 + 1e-6).all()
    assert not counts[np.array(weights) == 0].any()


def test_resampling_is_unbiased_over_offsets():
    weights = np.array([0.7, 0.1, 0.15, 0.05])
    offsets = (np.arange(1000) + 0.5) / 1000
    counts = np.mean(
        [np.bincount(systematic_resampling(weights, u), minlength=4) for u in offsets], axis=0
    )
    np.testing.assert_allclose(counts, 4 * weights, atol=5e-3)
    for bad, offset in (([0, 0], 0.5), ([1, -1], 0.5), ([1, np.inf], 0.5), ([1, 1], 1.0)):
        with pytest.raises(ConfigError, match="must be"):
            systematic_resampling(bad, offset)
