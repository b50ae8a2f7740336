"""Prompts whose answers are all right or all wrong, credited by entropy (arXiv 2509.21880)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.rl.advantages import GroupAdvantage
from tokjax.rl.policy import Policy
from tokjax.rl.zvp import ZeroVariance
from tokjax.training.loop import train
from tokjax.training.metrics import read_metrics

ENTROPIES = np.array([0.2, 1.0, 0.6])


def rolled(rollout_of, rewards, lengths, group, entropies=None, pad=0):
    T = max(lengths) + 2
    if entropies is None:
        entropies = np.tile(ENTROPIES, (len(rewards), 1))
    placed = np.full((len(rewards), T), 7.0, np.float32)
    placed[:, 1 : 1 + entropies.shape[1]] = entropies
    rollout = rollout_of(rewards, lengths, group, entropies=jnp.asarray(placed))
    return jax.tree.map(
        lambda a: jnp.pad(a, ((0, 0), (0, pad))) if a.ndim == 2 and a.shape[1] == T else a, rollout
    )


def current(advantage, rollout, entropies=None):
    """The advantages that a step computes, with the batch that the objective makes."""
    channels = Policy(advantage=advantage).shape(rollout)
    batch = dataclasses.replace(rollout.batch, channels=channels)
    now = rollout.entropies if entropies is None else entropies
    return advantage.in_step(channels["advantage"], now, batch)


def of(advantage, rollout):
    if advantage.entropies == "rollout":
        return advantage(rollout)[0]
    return current(advantage, rollout)


BOTH = pytest.mark.parametrize("entropies", ["current", "rollout"])


@BOTH
def test_advantages_of_the_worked_example(rollout_of, entropies):
    rollout = rolled(rollout_of, [1, 1, 0, 0], [3] * 4, 2)
    found = of(ZeroVariance(alpha=0.1, entropies=entropies), rollout)
    np.testing.assert_allclose(found[:2, 1:4], [[0.02, 0.1, 0.06]] * 2, atol=1e-7)
    np.testing.assert_allclose(found[2:, 1:4], [[-0.08, 0, -0.04]] * 2, atol=1e-7)
    assert not np.any(np.asarray(found)[~np.asarray(rollout.mask)])
    assert not np.any(found[2:, 2])  # exactly nothing at the most uncertain token of a wrong one


@BOTH
def test_mixed_groups_are_grpo_bit_for_bit(rollout_of, entropies):
    rollout = rolled(rollout_of, [1, 0, 1, 0], [3, 2, 3, 1], 4)
    found = of(ZeroVariance(entropies=entropies), rollout)
    np.testing.assert_array_equal(found, GroupAdvantage(ddof=0, eps=1e-8)(rollout)[0])


@BOTH
def test_without_strength_all_groups_are_grpo_bit_for_bit(rollout_of, entropies):
    rollout = rolled(rollout_of, [1, 0, 1, 1, 0, 0], [3, 2, 3, 1, 3, 2], 2)
    found = of(ZeroVariance(alpha=0.0, ddof=1, eps=1e-4, entropies=entropies), rollout)
    np.testing.assert_array_equal(found, GroupAdvantage()(rollout)[0])


@BOTH
def test_uniform_entropies_punish_nothing_and_praise_alike(rollout_of, entropies):
    rollout = rolled(rollout_of, [1, 1, 0, 0], [3] * 4, 2, np.full((4, 3), 0.7))
    found = of(ZeroVariance(alpha=0.1, entropies=entropies), rollout)
    np.testing.assert_allclose(found[:2, 1:4], 0.07, rtol=1e-6)
    assert not np.any(found[2:])


@BOTH
def test_praise_and_blame_add_up_to_the_largest_entropy(rollout_of, entropies):
    rng = np.random.default_rng(0)
    drawn, lengths = rng.uniform(0, 2, (4, 5)), [5, 3, 4, 1]
    advantage = ZeroVariance(alpha=0.1, entropies=entropies)
    right, wrong = (
        np.asarray(of(advantage, rolled(rollout_of, [r] * 4, lengths, 4, drawn))) for r in (1, 0)
    )
    for row, n in enumerate(lengths):
        most = 0.1 * drawn[row, :n].max()
        np.testing.assert_allclose((right + abs(wrong))[row, 1 : 1 + n], most, rtol=1e-5)
        assert np.all(right[row] >= 0)
        assert np.all(wrong[row] <= 0)


def test_the_largest_entropy_is_that_of_actions(rollout_of):
    # What lies before and behind an answer is 7.
    rollout = rolled(rollout_of, [0, 0], [2, 1], 2)
    found = np.asarray(current(ZeroVariance(alpha=1.0), rollout))
    np.testing.assert_allclose(found[0, 1:3], [-0.8, 0.0], atol=1e-6)
    np.testing.assert_array_equal(found[1], 0)


def test_equality_says_what_is_constant_not_a_deviation(rollout_of):
    # In float32 the deviation of seven rewards of 0.1 is not 0.
    rollout = rolled(rollout_of, [0.1] * 7, [3] * 7, 7)
    found = current(ZeroVariance(alpha=0.1), rollout)
    np.testing.assert_allclose(found[:, 1:4], np.tile([0.02, 0.1, 0.06], (7, 1)), atol=1e-7)


def test_wrong_answers_are_those_without_a_positive_reward(rollout_of):
    rollout = rolled(rollout_of, [-1.0, -1.0], [3, 3], 2)
    np.testing.assert_allclose(
        current(ZeroVariance(alpha=0.1), rollout)[0, 1:4], [-0.08, 0, -0.04], atol=1e-7
    )


def test_a_step_sees_the_entropies_of_the_policy_as_it_is(rollout_of):
    rollout = rolled(rollout_of, [1, 1], [3, 3], 2)
    now = rollout.entropies * 2
    found = current(ZeroVariance(alpha=0.1), rollout, now)
    np.testing.assert_allclose(found[0, 1:4], [0.04, 0.2, 0.12], atol=1e-6)
    kept = current(ZeroVariance(alpha=0.1, entropies="rollout"), rollout, now)
    np.testing.assert_allclose(kept[0, 1:4], [0.02, 0.1, 0.06], atol=1e-7)


@BOTH
def test_parts_can_be_left_out(rollout_of, entropies):
    rollout = rolled(rollout_of, [1, 1, 0, 0, 1, 0], [3] * 6, 2)
    whole = of(ZeroVariance(entropies=entropies), rollout)
    right = of(ZeroVariance(wrong=False, entropies=entropies), rollout)
    wrong = of(ZeroVariance(right=False, entropies=entropies), rollout)
    np.testing.assert_array_equal(right[:2], whole[:2])
    np.testing.assert_array_equal(wrong[2:4], whole[2:4])
    assert not np.any(right[2:4])
    assert not np.any(wrong[:2])
    for found in (right, wrong):
        np.testing.assert_array_equal(found[4:], whole[4:])
    flat = of(ZeroVariance(scaled=False, entropies=entropies), rollout)
    np.testing.assert_array_equal(flat[:4, 1:4], [[1.0] * 3] * 2 + [[-1.0] * 3] * 2)


def losses(objective, rollout, logprobs, entropies):
    batch = dataclasses.replace(rollout.batch, channels=objective.shape(rollout))
    loss = objective.loss_of(logprobs, entropies, batch)
    return loss.total / loss.weight


def test_no_gradient_goes_through_entropies(rollout_of):
    rollout = rolled(rollout_of, [1, 1, 0, 0], [3, 2, 3, 1], 2)
    objective = Policy(advantage=ZeroVariance(), clip_high=0.28)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 6)), jnp.float32)

    def loss(logits, held=None):
        found = jax.nn.log_softmax(logits)
        entropies = -(jnp.exp(found) * found).sum(-1)
        return losses(objective, rollout, found[..., 0], entropies if held is None else held)

    found = jax.nn.log_softmax(logits)
    held = -(jnp.exp(found) * found).sum(-1)
    slope = jax.grad(loss)(logits)
    np.testing.assert_array_equal(slope, jax.grad(loss)(logits, held))
    assert np.any(slope)


def test_padding_changes_no_loss_and_groups_may_come_in_any_order(rollout_of):
    rewards, lengths = np.array([1, 1, 0, 0, 1, 0]), np.array([3, 2, 3, 1, 2, 2])
    rng = np.random.default_rng(1)
    drawn, logprobs = rng.uniform(0, 1, (6, 3)), rng.normal(-1, 0.1, (6, 5)).astype(np.float32)
    objective = Policy(advantage=ZeroVariance())

    def loss(order, pad):
        rollout = rolled(rollout_of, rewards[order], lengths[order], 2, drawn[order], pad)
        padded = jnp.pad(jnp.asarray(logprobs[order]), ((0, 0), (0, pad)))
        return losses(objective, rollout, padded, rollout.entropies)

    plain = np.arange(6)
    expected = loss(plain, 0)
    np.testing.assert_allclose(loss(plain, 6), expected, rtol=1e-6)
    np.testing.assert_allclose(loss(np.array([4, 5, 1, 0, 2, 3]), 0), expected, rtol=1e-5)


def test_a_run_trains_where_all_answers_are_right(rl_run, tmp_path):

    def trained(advantage, folder):
        run = rl_run(
            steps=2,
            objective__advantage=advantage,
            objective__rewards=[{"name": "format", "pattern": ".*"}],
        )
        train(run, tmp_path / folder)
        return read_metrics(tmp_path / folder)

    current = trained({"name": "rl_zvp"}, "zvp")
    cached = trained({"name": "rl_zvp", "entropies": "rollout"}, "cached")
    assert all(v > 0 for v in current["grad_norm"])
    assert min(v for v in current["reward/constant_groups"] if v is not None) == 1.0
    # The first update of a collection has the rollout's entropies; the second does not.
    np.testing.assert_allclose(current["advantage_size"][0], cached["advantage_size"][0], rtol=1e-4)
    assert current["advantage_size"][1] != cached["advantage_size"][1]
    # alpha x entropy, of the policy in that update
    np.testing.assert_allclose(
        current["advantage_size"], 0.1 * np.array(current["entropy"]), rtol=1e-4
    )


def test_a_group_of_one_is_allowed_and_told(rl_run, rollout_of, tmp_path):
    rollout = rolled(rollout_of, [1.0, 0.0], [3, 3], 1)
    found = current(ZeroVariance(alpha=0.1), rollout)
    np.testing.assert_allclose(found[:, 1:4], [[0.02, 0.1, 0.06], [-0.08, 0, -0.04]], atol=1e-7)
    assert not ZeroVariance().warnings(8)
    run = rl_run(
        steps=1,
        objective__advantage={"name": "rl_zvp"},
        objective__rewards=[{"name": "format", "pattern": ".*"}],
        objective__rollouts__group=1,
        objective__rollouts__minibatches=1,
    )
    train(run, tmp_path)
    assert "group=1" in (tmp_path / "run.json").read_text()


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="alpha=-1"):
        ZeroVariance(alpha=-1)
    with pytest.raises(ConfigError, match="entropies='now'"):
        ZeroVariance(entropies="now")  # type: ignore[arg-type]
