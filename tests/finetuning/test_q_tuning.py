"""The decisions of Q-Tuning: the specification's exact checks, and limits."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.finetuning import quadrants as q
from tokjax.finetuning.quadrants import (
    choose_samples,
    find_level,
    keep_lowest,
    neighbour_scores,
    quadrants,
    side,
)

PPL = jnp.array([9, 2, 8, 3, 7, 1.5, 6, 4], jnp.float32)
ENTROPY = jnp.array([0.3, 1.8, 2, 0.4, 0.5, 1.6, 1, 1.2], jnp.float32)
ALL = jnp.ones(8, bool)
TOKENS = jnp.array([[1.2, 8, 1.1, 1, 6, 7, 5, 1.3]], jnp.float32)


def members(found, quadrant):
    return set(np.flatnonzero(np.asarray(found.quadrant) == quadrant).tolist())


# --- the specification's exact checks, in its order ---


@pytest.mark.parametrize(
    ("ratio", "two", "four"),
    [(0.25, {0}, {1}), (0.5, {0, 4}, {1, 5}), (0.75, {0, 4, 6}, {1, 5, 7})],
)
def test_oracle_1_quadrants_of_eight_samples(ratio, two, four):
    found = choose_samples(PPL, ENTROPY, ALL, ratio)
    assert (members(found, 2), members(found, 4)) == (two, four)
    assert set(np.flatnonzero(found.keep)) == two | four
    assert not np.asarray(found.supplemented).any()
    assert found.counts[1] == len(two) and found.counts[3] == len(four)


def test_oracle_1_bracket_of_the_bisection():
    low, high = find_level(PPL, ENTROPY, ALL, 0.5)
    np.testing.assert_allclose([low, high], [0.285674, 0.286152], atol=1e-6)
    assert choose_samples(PPL, ENTROPY, ALL, 0.5).level == high


def test_oracle_2_supplement_scores():
    expected = [1, 0.815686, 0.133333, 0.141176, 0.615686, 0.764706, 0.188235, 0.196078]
    np.testing.assert_allclose(jnp.abs(side(PPL, ENTROPY, ALL)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("weight", "scores", "kept"),
    [
        (0.5, [5.2, 5.15, 5.05, 4.05, 7, 9, 6.65, 3.8], [1, 2, 3, 7]),
        (0.0, [1.2, 8, 1.1, 1, 6, 7, 5, 1.3], [0, 2, 3, 7]),
    ],
)
def test_oracle_3_isolated_spikes_survive_and_runs_do_not(weight, scores, kept):
    ones = jnp.ones((1, 8), jnp.int32)
    found = neighbour_scores(TOKENS, ones == 1, ones, weight)
    np.testing.assert_allclose(found[0], scores, rtol=1e-6)
    keep = keep_lowest(found, ones == 1, ones, 1, 0.5)
    assert np.flatnonzero(keep[0]).tolist() == kept
    reverse = keep_lowest(found, ones == 1, ones, 1, 0.5, reverse=True)
    assert np.array_equal(reverse, ~keep)


# Oracle 4 (ratios of 1 are plain SFT) concerns the objective: see test_q_tuning_objective.py.


def test_oracle_5_without_neighbours_the_highest_perplexities_go():
    rng = np.random.default_rng(0)
    values = rng.permutation(64).reshape(4, 16).astype(np.float32) + 1
    ones = jnp.ones((4, 16), jnp.int32)
    scores = neighbour_scores(jnp.asarray(values), ones == 1, ones, 0.0)
    keep = keep_lowest(scores, ones == 1, ones, 1, 0.7)
    for row, kept in zip(values, np.asarray(keep), strict=True):
        assert kept.sum() == 11
        assert row[kept].max() < row[~kept].min()


_quadrants = jax.jit(quadrants)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_oracle_6_more_is_kept_at_a_higher_level(data):
    number = st.integers(0, 9).map(float)
    ppl, entropy = (
        jnp.asarray(data.draw(st.lists(number, min_size=8, max_size=8)), jnp.float32)
        for _ in range(2)
    )
    mask = jnp.asarray(data.draw(st.lists(st.booleans(), min_size=8, max_size=8)))
    counts = []
    for level in np.linspace(0, 0.49, 12, dtype=np.float32):
        at = np.asarray(_quadrants(ppl, entropy, mask, level))
        counts.append(int(((at == 2) | (at == 4)).sum()))
    assert counts == sorted(counts)


@pytest.mark.parametrize("scale", ["minmax", "rank", "log"])
def test_oracle_6_permuted_samples_have_permuted_decisions(scale):
    rng = np.random.default_rng(1)
    ppl, entropy = np.exp(rng.normal(size=32)) + 1, rng.random(32)
    mask = rng.random(32) < 0.9
    order = rng.permutation(32)
    decide = jax.jit(lambda *a: choose_samples(*a, 0.3, scale=scale))
    arrays = [ppl.astype(np.float32), entropy.astype(np.float32), mask]
    one, two = decide(*arrays), decide(*(a[order] for a in arrays))
    for name in ("keep", "quadrant", "supplemented"):
        np.testing.assert_array_equal(getattr(one, name)[order], getattr(two, name))
    assert one.keep.sum() == int(0.3 * mask.sum())
    assert np.array_equal(one.level, two.level) and np.array_equal(one.counts, two.counts)


# --- limits ---


def test_constant_statistics_keep_the_first_samples_whole():
    ones = jnp.ones(8)
    found = choose_samples(ones, ones, ALL, 0.5)
    assert np.flatnonzero(found.keep).tolist() == [0, 1, 2, 3]
    assert members(found, 4) == {0, 1, 2, 3}


@pytest.mark.parametrize("ratio", [0.1, 1.0])
def test_a_single_sample_is_kept_whole(ratio):
    found = choose_samples(jnp.array([7.0]), jnp.array([0.2]), jnp.array([True]), ratio)
    assert found.keep.tolist() == [True] and found.quadrant.tolist() == [4]


def test_without_samples_nothing_is_kept():
    found = choose_samples(PPL, ENTROPY, ~ALL, 0.5)
    assert not np.asarray(found.keep).any() and not np.asarray(found.counts).any()


@pytest.mark.parametrize(("ratio", "kept"), [(0.7, 63), (1 / 3, 30), (0.25, 22), (1.0, 90)])
def test_floors_are_exact(ratio, kept):
    ones = jnp.ones((1, 90), jnp.int32)
    assert keep_lowest(jnp.arange(90.0)[None], ones == 1, ones, 1, ratio).sum() == kept
    rng = np.random.default_rng(0)
    ppl, entropy = jnp.asarray(rng.random((2, 90)), jnp.float32)
    assert choose_samples(ppl + 1, entropy, ones[0] == 1, ratio).keep.sum() == kept


def test_masked_samples_decide_nothing():
    """Samples that do not exist may hold anything."""
    ppl = jnp.concatenate([PPL, jnp.array([1e30, 0.0, 5.0])])
    entropy = jnp.concatenate([ENTROPY, jnp.array([0.0, 50.0, 0.1])])
    mask = jnp.arange(11) < 8
    for scale in ("minmax", "rank", "log"):
        one = choose_samples(PPL, ENTROPY, ALL, 0.5, scale=scale)
        two = choose_samples(ppl, entropy, mask, 0.5, scale=scale)
        for name in ("keep", "quadrant", "supplemented"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name)[:8])
            assert not np.asarray(getattr(two, name)[8:]).any()


def test_a_short_batch_is_filled_up_from_both_sides():
    # Perplexity rises with entropy: nothing is in Q2 or Q4 before their thresholds meet.
    ppl = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    entropy = jnp.array([0.1, 0.5, 0.75, 0.77, 0.8, 1.1])
    found = choose_samples(ppl, entropy, jnp.ones(6, bool), 0.5)
    lean = np.asarray(side(ppl, entropy, jnp.ones(6, bool)))
    added = np.asarray(found.supplemented)
    assert found.keep.sum() == 3 and added.sum() == 3
    assert set(np.flatnonzero(added)) == set(np.argsort(-np.abs(lean), kind="stable")[:3])
    np.testing.assert_array_equal(found.quadrant[added], np.where(lean[added] > 0, 2, 4))
    whole = choose_samples(ppl, entropy, jnp.ones(6, bool), 0.5, supplement="keep_all")
    np.testing.assert_array_equal(whole.keep, found.keep)
    assert not np.asarray(whole.quadrant).any()


def test_one_enormous_perplexity_hides_the_others_unless_scaled():
    ppl = jnp.array([1e30, 2.0, 4.0, 3.0])
    entropy = jnp.array([0.0, 0.1, 0.3, 1.0])
    mask = jnp.ones(4, bool)
    np.testing.assert_allclose(side(ppl, entropy, mask)[1:], -entropy[1:], atol=1e-6)
    np.testing.assert_allclose(side(ppl, entropy, mask, "rank"), [1, -1 / 3, 0, -2 / 3], atol=1e-6)
    logs = np.log([1e30, 2, 4, 3])
    scaled = (logs - logs[1]) / (logs[0] - logs[1])
    np.testing.assert_allclose(side(ppl, entropy, mask, "log"), scaled - entropy, atol=1e-5)


def test_equal_values_share_their_rank():
    values = jnp.array([1.0, 1.0, 1.0, 2.0])
    zeros = jnp.zeros(4)
    found = side(values, zeros, jnp.ones(4, bool), "rank")
    np.testing.assert_allclose(found, np.array([1 / 3, 1 / 3, 1 / 3, 1.0]) - 0.5, atol=1e-6)


def test_neighbours_are_the_trainable_tokens_of_the_same_sample():
    values = jnp.array([[3.0, 50.0, 5.0, 7.0, 11.0, 90.0, 13.0, 70.0]])
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]])
    trainable = jnp.array([[1, 0, 1, 1, 1, 0, 1, 0]]) == 1
    found = neighbour_scores(values, trainable, segments, 0.5)
    # Sample 1 is (3, 5), sample 2 is (7, 11, 13); edges repeat.
    expected = [5.5, 0, 6.5, 12.5, 15.5, 0, 18.5, 0]
    np.testing.assert_allclose(found[0], expected)
    mean = neighbour_scores(values, trainable, segments, 0.5, "mean")
    np.testing.assert_allclose(mean[0], [3.5, 0, 4.5, 8, 10.5, 0, 12.5, 0])


def test_each_sample_keeps_its_share_and_one_at_least():
    scores = jnp.array([[5.0, 4, 3, 2, 9, 1, 1, 8], [0.0] * 8])
    segments = jnp.array([[1, 1, 1, 1, 2, 3, 3, 0], [0] * 8])
    trainable = jnp.array([[1, 1, 0, 1, 1, 1, 1, 0], [0] * 8]) == 1
    keep = keep_lowest(scores, trainable, segments, 4, 0.5)
    np.testing.assert_array_equal(keep[0], [0, 0, 0, 1, 1, 1, 0, 0])
    assert not np.asarray(keep[1]).any()


def test_perplexity_of_anything_is_finite():
    found = q.perplexity(jnp.array([0.0, 1.0, 1e4, jnp.inf]))
    assert np.isfinite(found).all() and np.isfinite(3 * found).all()
    np.testing.assert_allclose(found[:2], [1, np.e], rtol=1e-6)


def test_examples_of_the_docstrings_hold():
    assert doctest.testmod(q).failed == 0
