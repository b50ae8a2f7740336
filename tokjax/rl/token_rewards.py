"""Rewards of single actions, and what they add up to: returns and generalised advantages."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def merge_rewards(
    outcome: Float[Array, "R"],
    mask: Bool[Array, "R T"],
    *,
    dense: Float[Array, "R T"] | None = None,
    log_ratio: Float[Array, "R T"] | None = None,
    kl_coef: float = 0.0,
) -> Float[Array, "R T"]:
    """Returns the reward of each action: the outcome at the last one, dense ones and a KL penalty.

    Args:
        outcome: of each answer.
        mask: actions; an answer without any has no reward.
        dense: a reward for each action.
        log_ratio: log pi / pi_ref of each action; its multiple is taken off.
        kl_coef: of that penalty.

    >>> mask = jnp.array([[False, True, True, False]])
    >>> merge_rewards(jnp.array([2.0]), mask, dense=jnp.full((1, 4), 0.5)).tolist()
    [[0.0, 0.5, 2.5, 0.0]]
    """
    last = mask & (jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)
    found = jnp.where(last, outcome[:, None], 0.0)
    if dense is not None:
        found = found + jnp.where(mask, dense, 0.0)
    if log_ratio is not None and kl_coef:
        found = found - jnp.where(mask, kl_coef * log_ratio, 0.0)
    return found


def reward_to_go(
    rewards: Float[Array, "R T"], mask: Bool[Array, "R T"], gamma: float = 1.0
) -> Float[Array, "R T"]:
    """Returns the discounted sum of the rewards from each action on; 0 where there is none.

    >>> reward_to_go(jnp.array([[1.0, 2.0, 4.0]]), jnp.ones((1, 3), bool), 0.5).tolist()
    [[3.0, 4.0, 4.0]]
    """
    return gae(rewards, jnp.zeros_like(rewards), mask, gamma, 1.0)


def gae(
    rewards: Float[Array, "R T"],
    values: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    gamma: float,
    lam: float,
) -> Float[Array, "R T"]:
    """Returns generalised advantages; nothing is worth anything behind an answer's last action.

    Args:
        rewards: of the actions.
        values: of the states they were taken in.
        mask: actions.
        gamma: discount of a step.
        lam: decay of what lies further ahead; 1 sums all rewards, 0 looks one step ahead.

    Reference: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage
    Estimation", arXiv 1506.02438, equation 16.
    """

    def back(carry, now):
        value_after, advantage_after = carry
        reward, value, real = now
        delta = reward + gamma * value_after - value
        advantage = delta + gamma * lam * advantage_after
        # What is no action passes on what lies behind it.
        carry = (jnp.where(real, value, value_after), jnp.where(real, advantage, advantage_after))
        return carry, jnp.where(real, advantage, 0.0)

    zeros = jnp.zeros(rewards.shape[0], jnp.float32)
    steps = (rewards.T.astype(jnp.float32), values.T.astype(jnp.float32), mask.T)
    return jax.lax.scan(back, (zeros, zeros), steps, reverse=True)[1].T


def whitened(
    values: Float[Array, "R T"], mask: Bool[Array, "R T"], *, shift: bool = True, eps: float = 1e-8
) -> Float[Array, "R T"]:
    """Returns values with mean 0 (unless shift is False) and variance 1 over the actions."""
    count = jnp.maximum(mask.sum(), 1).astype(jnp.float32)
    mean = jnp.where(mask, values, 0.0).sum() / count
    variance = jnp.where(mask, jnp.square(values - mean), 0.0).sum() / count
    moved = values - mean if shift else values
    return jnp.where(mask, moved * jax.lax.rsqrt(variance + eps), 0.0)
