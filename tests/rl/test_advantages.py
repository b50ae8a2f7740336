"""Advantages of groups, returns of token rewards, and generalised advantages."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.errors import ConfigError
from tokjax.rl.advantages import (
    GeneralisedAdvantage,
    GroupAdvantage,
    LeaveOneOut,
    ReinforcePlusPlus,
    group_advantages,
)
from tokjax.rl.token_rewards import gae, merge_rewards, reward_to_go, whitened


def test_group_advantages_of_unir():
    found = group_advantages(jnp.array([[1.0, 0, 0, 1, 0, 0, 0, 0]]))
    np.testing.assert_allclose(found[0, :4], [1.61984, -0.53995, -0.53995, 1.61984], atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_equal_rewards_give_exactly_nothing(rollout_of, value):
    rollout = rollout_of([value] * 7, [2] * 7, group=7)
    for advantage in (GroupAdvantage(), GroupAdvantage(scale=False), LeaveOneOut()):
        assert not np.any(advantage(rollout)[0])


def test_they_lie_at_actions_and_nowhere_else(rollout_of):
    rollout = rollout_of([1, 0, 0, 0], [3, 1, 2, 2], group=2)
    found, weights = GroupAdvantage()(rollout)
    assert np.all((found[:2] != 0) == rollout.mask[:2])
    np.testing.assert_array_equal(weights, rollout.mask.astype(jnp.float32))


def test_constant_groups_can_be_dropped(rollout_of):
    rollout = rollout_of([1, 0, 0, 0], [3, 1, 2, 2], group=2)
    plain, _ = GroupAdvantage()(rollout)
    found, weights = GroupAdvantage(drop_constant=True)(rollout)
    np.testing.assert_array_equal(found, plain)
    assert np.array_equal(weights != 0, rollout.mask & (jnp.arange(4)[:, None] < 2))


def test_a_group_of_one_keeps_its_reward(rollout_of):
    rollout = rollout_of([1.0, -2.0], [1, 1], group=1)
    found, _ = GroupAdvantage()(rollout)
    np.testing.assert_array_equal(found[:, 1], [1.0, -2.0])
    with pytest.raises(ConfigError, match="rloo"):
        LeaveOneOut()(rollout)


def test_leave_one_out_is_the_reward_less_the_mean_of_the_others(rollout_of):
    reward = np.array([1.0, 0.0, 0.5, 3.0], np.float32)
    found, _ = LeaveOneOut()(rollout_of(reward, [1] * 4, group=4))
    expected = [r - np.delete(reward, i).mean() for i, r in enumerate(reward)]
    np.testing.assert_allclose(found[:, 1], expected, rtol=1e-6)


@given(
    st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4),
    st.permutations(range(4)),
    st.floats(-3, 3, width=32),
)
@settings(max_examples=40, deadline=None)
def test_they_follow_a_permutation_and_ignore_a_constant(rewards, order, constant):
    rewards = jnp.asarray([rewards], jnp.float32)
    found = group_advantages(rewards, scale=False)
    np.testing.assert_allclose(
        group_advantages(rewards[:, jnp.array(order)], scale=False)[0],
        found[0][jnp.array(order)],
        atol=1e-5,
    )
    moved = group_advantages(rewards + constant, scale=False)
    np.testing.assert_allclose(moved, found, atol=1e-5)


def test_watermark_card_numbers_of_gae():
    """Log-ratios .1, -.2, .3; score 2; beta .1, lambda .95 (arXiv 2403.10553)."""
    mask = jnp.ones((1, 3), bool)
    rewards = merge_rewards(
        jnp.array([2.0]), mask, log_ratio=jnp.array([[0.1, -0.2, 0.3]]), kl_coef=0.1
    )
    np.testing.assert_allclose(rewards, [[-0.01, 0.02, 1.97]], atol=1e-6)
    values = jnp.array([[0.5, 0.6, 0.7]])
    found = gae(rewards, values, mask, 1.0, 0.95)
    np.testing.assert_allclose(found, [[1.35017, 1.32650, 1.27]], atol=1e-5)
    np.testing.assert_allclose(found + values, [[1.85017, 1.92650, 1.97]], atol=1e-5)


def test_gae_without_values_is_the_sum_of_what_comes():
    """gamma 1, lambda 1 and no values: the suffix sum of the rewards (arXiv 2401.07382)."""
    rewards = jnp.array([[1.0, 2.0, 3.0, 9.0]])
    mask = jnp.array([[True, True, True, False]])
    np.testing.assert_allclose(
        gae(rewards, jnp.zeros((1, 4)), mask, 1.0, 1.0), [[6.0, 5.0, 3.0, 0.0]]
    )


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_gae_is_its_definition(seed, gamma, lam):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, 1, 6)).astype(np.float32)
    mask = np.zeros((1, 6), bool)
    mask[0, 1:5] = True
    found = np.asarray(gae(*map(jnp.asarray, (rewards, values, mask)), gamma, lam))
    after = np.append(values[0, 2:5], 0.0)
    deltas = rewards[0, 1:5] + gamma * after - values[0, 1:5]
    expected = [sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, 4)) for i in range(4)]
    np.testing.assert_allclose(found[0, 1:5], expected, atol=1e-4)
    assert not found[0, 0]
    assert not found[0, 5]


def test_an_outcome_is_paid_at_the_last_action_and_never_without_one():
    mask = jnp.array([[True, True, False], [False, False, False]])
    np.testing.assert_array_equal(
        merge_rewards(jnp.array([3.0, 5.0]), mask), [[0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]
    )


def test_flow_rewards_add_to_the_outcome():
    """Token rewards -.01 x (0, .5, 0, 0, 1) and outcome 1 (arXiv 2510.10201)."""
    mask = jnp.ones((1, 5), bool)
    dense = -0.01 * jnp.array([[0.0, 0.5, 0.0, 0.0, 1.0]])
    returns = reward_to_go(merge_rewards(jnp.array([1.0]), mask, dense=dense), mask)
    np.testing.assert_allclose(returns, [[0.985, 0.985, 0.99, 0.99, 0.99]], atol=1e-6)


def test_whitened_values_have_mean_0_and_variance_1_over_actions():
    rng = np.random.default_rng(0)
    mask = jnp.asarray(rng.random((4, 6)) < 0.6)
    values = jnp.asarray(rng.normal(3, 2, (4, 6)), jnp.float32)
    found = np.asarray(whitened(values, mask))[np.asarray(mask)]
    np.testing.assert_allclose((found.mean(), found.std()), (0, 1), atol=1e-5)


def test_reinforce_plus_plus_whitens_over_the_whole_batch(rollout_of):
    rollout = rollout_of([1, 0, 0, 0], [2, 2, 2, 2], group=2)
    found, _ = ReinforcePlusPlus()(rollout)
    kept = np.asarray(found)[np.asarray(rollout.mask)]
    np.testing.assert_allclose((kept.mean(), kept.std()), (0, 1), atol=1e-5)
    assert np.all(found[0, 1:3] > 0)
    # The second prompt's answers, equal among themselves, are worse than the batch.
    assert np.all(found[2:, 1:3] < 0)
    centred, _ = ReinforcePlusPlus(baseline=True)(rollout)
    np.testing.assert_allclose(centred[2:, 1:3], 0, atol=1e-6)


def test_a_penalty_needs_a_reference_and_gae_a_critic(rollout_of):
    rollout = rollout_of([1, 0], [1, 1], group=2)
    with pytest.raises(ConfigError, match="reference=True"):
        ReinforcePlusPlus(kl_coef=0.1)(rollout)
    with pytest.raises(ConfigError, match="objective 'ppo'"):
        GeneralisedAdvantage()(rollout)
