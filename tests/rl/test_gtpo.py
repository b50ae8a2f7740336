"""Rewards shared out by entropy, position by position and answer by answer (arXiv 2508.04349)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.errors import ConfigError
from tokjax.rl.advantages import group_advantages
from tokjax.rl.gtpo import GRPOS, GTPO, shared_rewards
from tokjax.rl.policy_loss import policy_loss
from tokjax.signals.groups import group_stats, standardised

ENTROPIES = np.array([[0.2, 1.0, 0.6], [0.4, 0.5, 9.0], [0.1, 0.8, 0.3], [0.5, 9.0, 9.0]])
LENGTHS = [3, 2, 3, 1]
REWARDS = [1.0, 1, 0, 0]
GAIN = (1.0, 0.1)


def card_rollout(rollout_of, entropies=ENTROPIES, lengths=LENGTHS, rewards=REWARDS, group=4):
    """The worked example's group; an answer begins at place 1 of its row."""
    T = max(lengths) + 2
    placed = np.full((len(lengths), T), 7.0, np.float32)
    placed[:, 1 : 1 + entropies.shape[1]] = entropies
    return rollout_of(rewards, lengths, group, entropies=jnp.asarray(placed))


def shaped(advantage, rollout):
    """Lists of the values at each answer's actions."""
    values, mask = np.asarray(advantage(rollout)[0]), np.asarray(rollout.mask)
    assert not np.any(values[~mask])
    return [row[own] for row, own in zip(values, mask, strict=True)]


def assert_rows(found, expected, atol=1.5e-5):
    for row, own in zip(found, expected, strict=True):
        np.testing.assert_allclose(row, own, atol=atol)


def test_shared_rewards_of_the_worked_example(rollout_of):
    rollout = card_rollout(rollout_of)
    found = np.asarray(
        shared_rewards(
            jnp.asarray(REWARDS)[None, :, None],
            rollout.by_prompt(rollout.entropies),
            rollout.by_prompt(rollout.mask),
            gain=GAIN,
        )
    )[0]
    rows = [row[own] for row, own in zip(found, np.asarray(rollout.mask), strict=True)]
    assert_rows(
        rows,
        [[1.06667, 1.13333, 1.1], [1.13333, 1.06667], [-1.16667, -1.1, -1.1], [-1.03333]],
    )


def test_each_sign_alone_as_in_the_worked_example(rollout_of):
    """Half of the right tokens lose: the trap of this normalisation."""
    found = shaped(GTPO(normalise="per_sign"), card_rollout(rollout_of))
    root = 1.41421
    assert_rows(
        found, [[-1.11803, 1.11803, 0], [1.11803, -1.11803], [-root, 0, 0], [root]], atol=1e-4
    )


def test_both_signs_together_as_in_the_worked_example(rollout_of):
    found = shaped(GTPO(), card_rollout(rollout_of))
    assert_rows(
        found,
        [
            [0.86340, 0.92435, 0.89387],
            [0.92435, 0.86340],
            [-1.17829, -1.11734, -1.11734],
            [-1.05640],
        ],
    )


def test_what_is_shared_out_adds_up_to_what_was_earned(rollout_of):
    rollout = card_rollout(rollout_of)
    found = np.asarray(
        shared_rewards(
            jnp.asarray(REWARDS)[None, :, None],
            rollout.by_prompt(rollout.entropies),
            rollout.by_prompt(rollout.mask),
            gain=(0.9, 0.1),
        )
    )[0, :2]
    columns = np.where(np.asarray(rollout.mask)[:2], found, 0).sum(0)
    np.testing.assert_allclose(columns, [0, 2, 2, 1, 0], atol=1e-6)
    np.testing.assert_allclose(columns.sum(), 5, atol=1e-6)


def test_sequence_rewards_and_advantages_of_the_worked_example(rollout_of):
    rollout = card_rollout(rollout_of)
    mean = jnp.array([[0.6, 0.45, 0.4, 0.5]])
    found = shared_rewards(jnp.asarray(REWARDS)[None], mean, jnp.ones((1, 4), bool), gain=GAIN)
    expected = np.array([1.11429, 1.08571, -1.11111, -1.08889])
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    # Means over the answers' own actions: (.2 + 1 + .6) / 3, (.4 + .5) / 2, ...
    rows = shaped(GRPOS(), rollout)
    standard = (expected - expected.mean()) / expected.std()
    assert_rows(rows, [np.full(n, a) for n, a in zip(LENGTHS, standard, strict=True)], atol=3e-5)
    assert_rows(
        shaped(GRPOS(normalise="per_sign"), rollout),
        [np.full(n, a) for n, a in zip(LENGTHS, [1, -1, -1, 1], strict=True)],
        atol=1e-3,
    )


def test_equal_entropies_earn_a_constant_bonus():
    entropies, mask = jnp.full((1, 4, 3), 0.7), jnp.ones((1, 4, 3), bool)
    rewards = jnp.asarray(REWARDS)[None, :, None]
    found = shared_rewards(rewards, entropies, mask, gain=(1.0, 0.25))
    np.testing.assert_allclose(found[0, :2], 1.25, rtol=1e-6)
    np.testing.assert_allclose(found[0, 2:], -1.25, rtol=1e-6)


@given(st.integers(0, 2**32 - 1), st.permutations(range(4)))
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("kind", [GTPO, GRPOS])
@pytest.mark.parametrize("normalise", ["joint", "per_sign"])
def test_answers_may_come_in_any_order(rollout_of, kind, normalise, seed, order):
    rng = np.random.default_rng(seed)
    entropies = rng.uniform(0.01, 2, (4, 3)).astype(np.float32)
    lengths = np.array([3, *rng.integers(1, 4, 3)])
    rewards, order = np.array([1.0, *rng.integers(0, 2, 3)]), np.array(order)
    advantage = kind(normalise=normalise)
    found = shaped(advantage, card_rollout(rollout_of, entropies, lengths, rewards))
    moved = shaped(
        advantage, card_rollout(rollout_of, entropies[order], lengths[order], rewards[order])
    )
    # Where all rewards nearly agree, rounding is divided by sqrt(eps).
    assert_rows(moved, [found[i] for i in order], atol=5e-3)


@pytest.mark.parametrize("advantage", [GTPO(), GTPO(normalise="per_sign"), GRPOS()])
def test_entropies_behind_an_answer_and_padding_change_nothing(rollout_of, advantage):
    found = shaped(advantage, card_rollout(rollout_of))
    other = np.where(ENTROPIES == 9.0, 0.123, ENTROPIES)
    assert_rows(shaped(advantage, card_rollout(rollout_of, other)), found, atol=0)
    # A longer answer elsewhere in the batch pads this group's rows.
    more = np.concatenate([np.pad(ENTROPIES, ((0, 0), (0, 4))), np.ones((4, 7))])
    wide = card_rollout(rollout_of, more, [*LENGTHS, 7, 7, 7, 7], [*REWARDS, 1, 0, 0, 0])
    assert_rows(shaped(advantage, wide)[:4], found, atol=1e-4)


def test_without_a_bonus_tokens_have_the_outcomes_of_grpo_bitwise(rollout_of):
    rollout = card_rollout(rollout_of)
    sign = rollout.by_prompt(rollout.at_actions(jnp.asarray(REWARDS) * 2 - 1))
    mask = rollout.by_prompt(rollout.mask)
    stats = group_stats(sign, mask, (-2, -1))
    expected = jnp.where(mask, (sign - stats.mean) / jnp.sqrt(stats.std(0) ** 2 + 1e-8), 0.0)
    np.testing.assert_array_equal(GTPO(bonus=0.0)(rollout)[0], rollout.flat(expected))
    np.testing.assert_allclose(
        expected, standardised(sign, stats, ddof=0, mask=mask), rtol=1e-6, atol=1e-6
    )
    # And sequences those of GRPO with the deviation of a population.
    of_sequences = group_advantages(jnp.asarray([REWARDS]), ddof=0, eps=0.0)[0]
    found = GRPOS(bonus=0.0)(rollout)[0]
    np.testing.assert_allclose(found, rollout.at_actions(of_sequences), rtol=1e-6)


def test_without_a_bonus_each_sign_alone_is_nothing(rollout_of):
    for kind in (GTPO, GRPOS):
        found, _ = kind(bonus=0.0, normalise="per_sign")(card_rollout(rollout_of))
        assert not np.any(found)


@pytest.mark.parametrize("reward", [0.0, 1.0])
@pytest.mark.parametrize("kind", [GTPO, GRPOS])
def test_a_group_with_one_outcome_has_no_advantage_together(rollout_of, kind, reward):
    rollout = card_rollout(rollout_of, rewards=[reward] * 4)
    assert not np.any(kind()(rollout)[0])
    # Alone, its bonus is blown up to variance 1: half of a right group is punished.
    alone = np.concatenate(shaped(kind(normalise="per_sign"), rollout))
    assert (alone < 0).any()
    assert (alone > 0).any()
    weights = kind(drop_constant=True)(rollout)[1]
    assert not np.any(weights)
    assert np.array_equal(kind()(rollout)[1] != 0, rollout.mask)


@pytest.mark.parametrize("kind", [GTPO, GRPOS])
@pytest.mark.parametrize("normalise", ["joint", "per_sign"])
def test_entropies_of_zero_are_harmless(rollout_of, kind, normalise):
    entropies = np.array([[0.0, 0, 0.6], [0.0, 0.5, 0], [0.0, 0, 0.3], [0.0, 0, 0]])
    rollout = card_rollout(rollout_of, entropies)
    assert np.all(np.isfinite(kind(normalise=normalise)(rollout)[0]))
    shares = np.asarray(
        shared_rewards(
            jnp.asarray(REWARDS)[None, :, None],
            rollout.by_prompt(rollout.entropies),
            rollout.by_prompt(rollout.mask),
            gain=GAIN,
        )
    )[0]
    # No right answer is uncertain at the first place: no bonus there; wrong ones share equally.
    np.testing.assert_allclose(shares[:2, 1], 1.0)
    np.testing.assert_allclose(shares[2:, 1], -1.1, rtol=1e-6)


def test_who_is_alone_at_a_place_has_the_whole_bonus():
    mask = jnp.array([[[True, True], [True, False], [True, False], [True, True]]])
    entropies = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, (1, 4, 2)), jnp.float32)
    found = shared_rewards(jnp.asarray(REWARDS)[None, :, None], entropies, mask, gain=GAIN)
    np.testing.assert_allclose(found[0, 0, 1], 1.1, rtol=1e-6)
    np.testing.assert_allclose(found[0, 3, 1], -1.1, rtol=1e-6)


def test_the_threshold_says_what_is_right(rollout_of):
    rollout = card_rollout(rollout_of, rewards=[0.9, 0.8, 0.6, 0.6])
    assert all(row.mean() > 0 for row in shaped(GTPO(threshold=0.7), rollout)[:2])
    assert all(row.mean() < 0 for row in shaped(GTPO(threshold=0.7), rollout)[2:])


def test_the_loss_of_grpo_s_is_the_mean_over_answers(rollout_of):
    rollout = card_rollout(rollout_of)
    advantages, weights = GRPOS()(rollout)
    rng = np.random.default_rng(0)
    new, old = (jnp.asarray(rng.normal(-1, 0.05, (4, 5)), jnp.float32) for _ in range(2))
    total, count = policy_loss(
        *(new, old, advantages, rollout.mask),
        weights=weights,
        ratio="sequence_arith",
        norm="response",
    )
    mask = np.asarray(rollout.mask)
    ratios = [np.exp(np.asarray(new - old)[i][mask[i]]).mean() for i in range(4)]
    gains = [
        min(r * a[m][0], np.clip(r, 0.8, 1.2) * a[m][0])
        for r, a, m in zip(ratios, np.asarray(advantages), mask, strict=True)
    ]
    np.testing.assert_allclose(total / count, -np.mean(gains), rtol=1e-5)


def test_it_compiles(rollout_of):
    rollout = card_rollout(rollout_of)
    np.testing.assert_allclose(jax.jit(GTPO())(rollout)[0], GTPO()(rollout)[0], atol=1e-6)


def test_unknown_settings_are_refused():
    with pytest.raises(ConfigError, match="per_sign"):
        GTPO(normalise="sign")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="eps"):
        GRPOS(eps=0.0)
