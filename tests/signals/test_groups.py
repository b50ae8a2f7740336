from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.signals import centred, group_stats, group_stats_by_id, min_max, standardised

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@jax.jit
def advantages(rewards, mask):
    """Population- and sample-standardised, centred and min-max scaled values."""
    stats = group_stats(rewards, mask)
    return (
        standardised(rewards, stats, ddof=0, mask=mask),
        standardised(rewards, stats, ddof=1, mask=mask),
        centred(rewards, stats, mask),
        min_max(rewards, stats, mask),
    )


@jax.jit
def by_id(rewards, ids, mask):
    stats = group_stats_by_id(rewards, ids, 3, mask)
    return standardised(rewards, stats, ddof=0, mask=mask), stats


@partial(jax.jit, static_argnames="axis")
def standardised_along(values, mask, axis=-1):
    return standardised(values, group_stats(values, mask, axis), ddof=0, mask=mask)


def every(rewards):
    return np.ones(rewards.shape, bool)


def test_population_advantages_of_three_groups():
    rewards = jnp.array([[1.0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    found = advantages(rewards, every(rewards))[0]
    np.testing.assert_allclose(found[0], [1.73205, *[-0.57735] * 3], atol=1e-5)
    np.testing.assert_array_equal(found[1], np.zeros(4))
    np.testing.assert_allclose(found[2], [1, 1, -1, -1], rtol=1e-6)


def test_sample_and_population_deviations_differ():
    population, sample, _, _ = advantages(jnp.array([[2 / 3, 1 / 3]]), jnp.ones((1, 2), bool))
    np.testing.assert_allclose(population, [[1, -1]], rtol=1e-5)
    np.testing.assert_allclose(sample, [[0.70711, -0.70711]], atol=1e-5)
    without_std = advantages(jnp.array([[1.4, 0.4, 1.4, 0.4]]), jnp.ones((1, 4), bool))[2]
    np.testing.assert_allclose(without_std, [[0.5, -0.5, 0.5, -0.5]], rtol=1e-5)


def test_one_group_over_the_tokens_of_several_sequences():
    shaped = jnp.array(
        [[1.06667, 1.13333, 1.1], [1.13333, 1.06667, 0], [-1.16667, -1.1, -1.1], [-1.03333, 0, 0]]
    )
    mask = jnp.arange(3) < jnp.array([3, 2, 3, 1])[:, None]
    joint = standardised_along(shaped, mask, (-2, -1))
    expected = [
        [0.86340, 0.92435, 0.89387],
        [0.92435, 0.86340, 0],
        [-1.17829, -1.11734, -1.11734],
        [-1.05640, 0, 0],
    ]
    np.testing.assert_allclose(joint, expected, atol=2e-5)
    wrong = mask & (jnp.arange(4) >= 2)[:, None]
    half = standardised_along(shaped, wrong, (-2, -1))
    np.testing.assert_allclose(half[2], [-1.41421, 0, 0], atol=3e-4)
    np.testing.assert_allclose(half[3, 0], 1.41421, atol=3e-4)


def test_min_max_ignores_masked_positions():
    scores = jnp.array([[0.8, 2, 1.4, 0.5, 3.5, 0.0, 0.0]])
    mask = jnp.arange(7)[None] < 5
    scaled = advantages(scores, mask)[3]
    np.testing.assert_allclose(scaled[0], [0.1, 0.5, 0.3, 0, 1, 0, 0], atol=1e-6)


def test_supplement_scores_of_a_batch():
    perplexity = jnp.array([9, 2, 8, 3, 7, 1.5, 6, 4])
    entropy = jnp.array([0.3, 1.8, 2, 0.4, 0.5, 1.6, 1, 1.2])
    both = [advantages(a, every(a))[3] for a in (perplexity, entropy)]
    expected = [1, 0.815686, 0.133333, 0.141176, 0.615686, 0.764706, 0.188235, 0.196078]
    np.testing.assert_allclose(jnp.abs(both[0] - both[1]), expected, atol=1e-6)


def test_equal_rewards_give_zero_where_a_float_deviation_does_not():
    rewards = np.full((1, 7), 0.1, np.float32)
    mean = np.float32(rewards.sum(dtype=np.float32) / np.float32(7))
    assert mean != rewards[0, 0]  # the trap: a computed deviation is not 0
    for found in advantages(jnp.asarray(rewards), jnp.ones((1, 7), bool)):
        np.testing.assert_array_equal(found, np.zeros((1, 7)))


def test_values_closer_than_their_squares_can_tell_give_numbers():
    rewards = jnp.array([[1e-30, 2e-30, 3e-30]])
    population, _, _, scaled = advantages(rewards, every(rewards))
    np.testing.assert_array_equal(population, np.zeros((1, 3)))
    np.testing.assert_allclose(scaled, [[0, 0.5, 1]], rtol=1e-5)


def test_empty_and_single_groups():
    rewards = jnp.array([[3.0, 4.0, 9.0], [3.0, 4.0, 9.0]])
    mask = jnp.array([[False] * 3, [False, True, False]])
    for found in advantages(rewards, mask):
        np.testing.assert_array_equal(found, np.zeros((2, 3)))
    stats = jax.jit(group_stats)(rewards, mask)
    np.testing.assert_array_equal(stats.mean[:, 0], [0, 4])
    np.testing.assert_array_equal(stats.count[:, 0], [0, 1])
    np.testing.assert_array_equal(stats.std(1), np.zeros((2, 1)))
    assert stats.constant.all()


def test_the_gradient_of_a_constant_group_is_finite():
    gradient = jax.jit(jax.grad(lambda r: standardised_along(r, None).sum()))
    np.testing.assert_array_equal(gradient(np.ones(4, np.float32)), np.zeros(4))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_groups_by_id_equal_numpy_in_any_order(seed):
    rng = np.random.default_rng(seed)
    rewards = rng.integers(0, 3, 12) / 2
    ids, mask = rng.integers(0, 3, 12), rng.random(12) < 0.8
    order = rng.permutation(12)
    expected = np.zeros(12)
    for group in range(3):
        own = (ids == group) & mask
        if own.any() and rewards[own].std() > 0:
            expected[own] = (rewards[own] - rewards[own].mean()) / rewards[own].std()
    give = lambda a, dtype: jnp.asarray(a[order], dtype)  # noqa: E731
    found, stats = by_id(give(rewards, jnp.float32), give(ids, jnp.int32), give(mask, bool))
    np.testing.assert_allclose(found, expected[order], atol=1e-5)
    np.testing.assert_array_equal(stats.count, [((ids == i) & mask).sum() for i in ids[order]])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-8, 8), min_size=5, max_size=5), st.integers(-9, 9), st.integers(1, 9))
def test_advantages_ignore_shift_and_positive_scale(rewards, shift, scale):
    rewards = jnp.asarray([rewards], jnp.float32)
    before, after = (advantages(r, every(r)) for r in (rewards, rewards * scale + shift))
    for k in (0, 1, 3):
        np.testing.assert_allclose(before[k], after[k], atol=2e-4)
