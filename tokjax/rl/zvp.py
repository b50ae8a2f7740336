"""RL-ZVP: prompts whose answers are all right or all wrong teach too, token by token.

Where all rewards of a prompt are equal GRPO's advantages are 0. Here right answers get alpha x H,
most where the policy is uncertain, and wrong ones -alpha x (max H - H), most where it is certain.

Reference: "No Prompt Left Behind: Exploiting Zero-Variance Prompts in LLM Reinforcement Learning
via Entropy-Guided Advantage Shaping", arXiv 2509.21880, Algorithm 1.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.rl.advantages import GroupAdvantage, Shaped
from tokjax.rl.rollout import Rollout
from tokjax.signals.groups import group_stats

SIGN = "constant_sign"  # of the reward of actions in groups of equal rewards, 0 elsewhere


def entropy_advantages(
    sign: Float[Array, "R T"], entropies: Float[Array, "R T"], mask: Bool[Array, "R T"]
) -> Float[Array, "R T"]:
    """Returns H where the sign is 1, H less its largest in the row where it is -1, else 0.

    >>> row, mask = jnp.array([[0.25, 1.0, 0.5]]), jnp.ones((1, 3), bool)
    >>> entropy_advantages(-jnp.ones((1, 3)), row, mask).tolist()
    [[-0.75, 0.0, -0.5]]
    """
    most = jnp.where(mask, entropies, -jnp.inf).max(-1, keepdims=True)
    found = jnp.where(sign > 0, entropies, jnp.where(sign < 0, entropies - most, 0.0))
    return jnp.where(mask, found, 0.0)


@register("advantage", "rl_zvp")
@dataclass(frozen=True)
class ZeroVariance:
    """GRPO's advantages, and ones by entropy where all answers to a prompt have the same reward.

    An answer is wrong if its reward is not above 0; graded rewards are beyond the paper.
    """

    alpha: float = 0.1  # factor of the entropies
    # of the policy in each update, as in the paper's Algorithm 1 ("current"), or of the policy that
    # answered ("rollout"), which is cheaper and not the paper's
    entropies: Literal["current", "rollout"] = "current"
    right: bool = True  # reward prompts whose answers are all right
    wrong: bool = True  # punish prompts whose answers are all wrong
    scaled: bool = True  # by entropy; False: 1 and -1, without alpha
    scale: bool = True  # divide by the group's standard deviation where rewards differ
    ddof: int = 0  # 1: deviation of a sample, 0: of a population
    eps: float = 1e-8  # added to the deviation

    def __post_init__(self):
        if not self.alpha >= 0:
            raise ConfigError(f"alpha={self.alpha} must not be negative")
        if self.entropies not in ("current", "rollout"):
            raise ConfigError(f"entropies={self.entropies!r} must be 'current' or 'rollout'")
        self._grpo()

    def _grpo(self) -> GroupAdvantage:
        return GroupAdvantage(scale=self.scale, ddof=self.ddof, eps=self.eps)

    @property
    def channels(self) -> tuple[str, ...]:
        """The values beside each action that `in_step` needs."""
        return (SIGN,)

    def beside(self, rollout: Rollout) -> dict[str, Float[Array, "R T"]]:
        """Returns those values."""
        rewards = rollout.by_prompt(rollout.reward)
        sign = jnp.where(rewards > 0, float(self.right), -float(self.wrong))
        sign = jnp.where(group_stats(rewards).constant, sign, 0.0)
        return {SIGN: rollout.at_actions(rollout.flat(sign))}

    def __call__(self, rollout: Rollout) -> Shaped:
        """Returns the advantages with the rollout's entropies, and weights of 1."""
        rewards = rollout.by_prompt(rollout.reward)
        constant = rollout.flat(jnp.broadcast_to(group_stats(rewards).constant, rewards.shape))
        found, weights = self._grpo()(rollout)
        # Of a group of one GRPO takes the reward itself.
        found = jnp.where(constant[:, None], 0.0, found)
        sign = self.beside(rollout)[SIGN]
        return self._filled(found, sign, rollout.entropies, rollout.mask), weights

    def in_step(
        self, advantages: Float[Array, "B T"], entropies: Float[Array, "B T"], batch: Batch
    ) -> Float[Array, "B T"]:
        """Returns the advantages with the entropies of the policy as it is."""
        if self.entropies == "rollout":
            return advantages
        return self._filled(advantages, batch.channels[SIGN], entropies, batch.weights != 0)

    def _filled(self, advantages: Array, sign: Array, entropies: Array, mask: Array) -> Array:
        shaped = self.alpha * entropy_advantages(sign, entropies, mask) if self.scaled else sign
        return jnp.where(sign != 0, shaped, advantages)

    def warnings(self, group: int) -> list[str]:
        """Returns what should be told of a group's size."""
        if group > 1:
            return []
        return [
            "advantage 'rl_zvp' with rollouts.group=1: every prompt counts as one of equal "
            "rewards, so that right answers gain and wrong ones lose by entropy alone"
        ]
