"""GTPO and GRPO-S: outcomes shared out by entropy, among tokens or among whole answers.

Right answers of a prompt earn more where the policy was uncertain, wrong ones lose more where it
was certain. GTPO compares the answers of a prompt at the same position, GRPO-S their mean
entropies; GRPO-S belongs with ratio="sequence_arith" and norm="response".

Reference: "GTPO and GRPO-S: Token and Sequence-Level Reward Shaping with Policy Entropy", arXiv
2508.04349.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax.config import register
from tokjax.errors import ConfigError, nearest
from tokjax.rl.advantages import Shaped
from tokjax.rl.rollout import Rollout
from tokjax.signals.groups import group_stats

NORMALISATIONS = ("joint", "per_sign")
Normalise = Literal["joint", "per_sign"]


def shared_rewards(
    rewards: Float[Array, "P G ..."],
    entropies: Float[Array, "P G ..."],
    mask: Bool[Array, "P G ..."],
    *,
    gain: tuple[float, float],
    threshold: float = 0.5,
    eps: float = 1e-8,
) -> Float[Array, "P G ..."]:
    """Returns rewards with a share of the group's bonus: by H of right ones, by 1 / H of wrong.

    What G runs over shares a bonus: the answers of a prompt, at each position by themselves where
    there are positions. If the gains sum to 1, right answers have as much as without shares.

    Args:
        rewards: broadcast to the entropies.
        entropies: H, in nats, of the policy that answered.
        mask: what takes part; the rest is of no meaning.
        gain: of the outcome and of the bonus, alpha 1 and alpha 2 (of GRPO-S: beta).
        threshold: answers with a reward above it are right.
        eps: added to the entropies of wrong answers, and the least sum that is divided by.

    >>> rewards, entropies = jnp.array([[1.0, 1.0, 0.0]]), jnp.array([[0.2, 0.6, 0.5]])
    >>> found = shared_rewards(rewards, entropies, jnp.ones((1, 3), bool), gain=(1.0, 0.1))
    >>> [round(float(reward), 3) for reward in found[0]]
    [1.05, 1.15, -1.1]
    """
    outcome, bonus = gain
    right = rewards > threshold
    up = _shares(entropies, mask & right, eps)
    down = _shares(1.0 / (entropies + eps), mask & ~right, eps)
    return jnp.where(right, outcome * rewards + bonus * up, -outcome - bonus * down)


def _shares(values: Array, mask: Array, eps: float) -> Array:
    """Returns each value over the mean of those in its group that take part."""
    values = jnp.where(mask, values, 0.0)
    count = mask.sum(1, keepdims=True).astype(jnp.float32)
    return values / jnp.maximum(values.sum(1, keepdims=True), eps) * count


def _normalised(
    values: Array, mask: Array, right: Array, axis: int | tuple[int, int], how: str, eps: float
) -> tuple[Array, Array]:
    """Returns values with mean 0 and variance 1, and which groups have right and wrong ones."""
    right = jnp.broadcast_to(right, values.shape)
    mixed = (mask & right).any(axis, keepdims=True) & (mask & ~right).any(axis, keepdims=True)
    found = jnp.zeros_like(values)
    for part in [mask & mixed] if how == "joint" else [mask & right, mask & ~right]:
        stats = group_stats(values, part, axis)
        standard = (values - stats.mean) / jnp.sqrt(jnp.square(stats.std(0)) + eps)
        found = jnp.where(part & ~stats.constant, standard, found)
    return found, mixed


@dataclass(frozen=True)
class _Shared:
    outcome: float = 1.0  # of the reward: alpha 1 (of GRPO-S: beta 1)
    bonus: float = 0.1  # of what is shared out by entropy: alpha 2 (of GRPO-S: beta 2)
    threshold: float = 0.5  # answers with a reward above it are right
    # mean 0 and variance 1 over all answers of a prompt ("joint": without a bonus this is GRPO), or
    # over right and wrong ones apart ("per_sign", as published code has it: half of the right
    # tokens then lose, and without a bonus nothing is left)
    normalise: Normalise = "joint"
    eps: float = 1e-8  # added to entropies and variances
    drop_constant: bool = False  # leave out prompts whose answers are all right or all wrong

    def __post_init__(self):
        if self.normalise not in NORMALISATIONS:
            raise ConfigError(
                f"unknown normalise={self.normalise!r}.{nearest(self.normalise, NORMALISATIONS)}"
            )
        if not self.eps > 0:
            raise ConfigError(f"eps={self.eps} must be above 0")


@register("advantage", "gtpo")
@dataclass(frozen=True)
class GTPO(_Shared):
    """Outcomes shared out among the tokens at the same position of a prompt's answers."""

    def __call__(self, rollout: Rollout) -> Shaped:
        """Returns the advantages and the weights of the actions in the loss."""
        # Answers to one prompt begin at the same place of their rows.
        mask, entropies = rollout.by_prompt(rollout.mask), rollout.by_prompt(rollout.entropies)
        rewards = rollout.by_prompt(rollout.reward)[..., None]
        gain, right = (self.outcome, self.bonus), rewards > self.threshold
        shared = shared_rewards(
            rewards, entropies, mask, gain=gain, threshold=self.threshold, eps=self.eps
        )
        found, mixed = _normalised(shared, mask, right, (-2, -1), self.normalise, self.eps)
        kept = mask & mixed if self.drop_constant else mask
        return rollout.flat(found), rollout.flat(kept).astype(jnp.float32)


@register("advantage", "grpo_s")
@dataclass(frozen=True)
class GRPOS(_Shared):
    """Outcomes shared out among a prompt's answers by their mean entropies."""

    def __call__(self, rollout: Rollout) -> Shaped:
        """Returns the advantages and the weights of the actions in the loss."""
        sums = jnp.where(rollout.mask, rollout.entropies, 0.0).sum(-1)
        means = rollout.by_prompt(sums / jnp.maximum(rollout.lengths, 1.0))
        rewards, mask = rollout.by_prompt(rollout.reward), jnp.ones(means.shape, bool)
        gain, right = (self.outcome, self.bonus), rewards > self.threshold
        shared = shared_rewards(
            rewards, means, mask, gain=gain, threshold=self.threshold, eps=self.eps
        )
        found, mixed = _normalised(shared, mask, right, -1, self.normalise, self.eps)
        kept = mask & mixed if self.drop_constant else mask
        kept = rollout.flat(kept).astype(jnp.float32)
        return rollout.at_actions(rollout.flat(found)), rollout.at_actions(kept)
