"""Advantages from the rewards of a prompt's answers: GRPO, RLOO, REINFORCE++, and GAE's critic.

An advantage is a frozen dataclass registered under the kind "advantage". Called with a `Rollout`
it returns the advantage of every action and the weight of every action in the loss, both [R, T];
weights of 0 leave actions out, and rows without any weight are left out first where fewer rows are
trained on than were collected. It is compiled, and a constant of the loss's gradient.

Optional methods: `gather(rollout, environment) -> dict of arrays` runs on the host beforehand
and may sample further answers (see `tokjax.rl.environment`); what it returns is `rollout.extra`.
`in_step(advantages, entropies, batch) -> advantages` runs in every training step with the entropies
of the policy as it then is; what else it needs of each action is named by the property `channels`,
returned by `beside(rollout) -> dict of [R, T]`, and found in `batch.channels`. `warnings(group)`
returns what people should be told before the first update. `draw(sample, prompts, seed, group=,
limit=) -> Answers` draws the collection itself.
"""

from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.config import register
from tokjax.errors import ConfigError
from tokjax.rl.rollout import Rollout
from tokjax.rl.token_rewards import gae, merge_rewards, reward_to_go, whitened
from tokjax.signals.groups import centred, group_stats, standardised

Shaped = tuple[Float[Array, "R T"], Float[Array, "R T"]]


class Advantage(Protocol):
    """Says how much better an action was than expected."""

    def __call__(self, rollout: Rollout) -> Shaped:
        """Returns the advantages and the weights of the actions in the loss."""
        ...


def group_advantages(
    rewards: Float[Array, "P G"], *, scale: bool = True, ddof: int = 1, eps: float = 1e-4
) -> Float[Array, "P G"]:
    """Returns rewards relative to the others of their prompt; 0 where all are equal.

    Args:
        rewards: of the answers to each prompt.
        scale: whether to divide by the standard deviation.
        ddof: 1 takes the sample's deviation, 0 the population's.
        eps: added to the deviation.

    >>> found = group_advantages(jnp.array([[1.0, 0, 0, 1, 0, 0, 0, 0]]))
    >>> [round(float(a), 5) for a in found[0, :2]]
    [1.61984, -0.53995]
    """
    stats = group_stats(rewards)
    return standardised(rewards, stats, ddof=ddof, eps=eps) if scale else centred(rewards, stats)


@register("advantage", "group")
@dataclass(frozen=True)
class GroupAdvantage:
    """The reward relative to the answers to the same prompt (GRPO, arXiv 2402.03300).

    A group of one has nothing to be compared with: its reward is the advantage, as in UniR's code
    (arXiv 2505.19075).
    """

    scale: bool = True  # divide by the group's standard deviation; Dr. GRPO does not
    ddof: int = 1  # 1: deviation of a sample, 0: of a population
    eps: float = 1e-4  # added to the deviation
    # leave out groups of equal rewards, whose advantage is 0; they count as no tokens then
    # (DAPO, arXiv 2503.14476: collect more prompts than are trained on, and these give way)
    drop_constant: bool = False

    def __post_init__(self):
        if self.ddof not in (0, 1):
            raise ConfigError(f"ddof={self.ddof} must be 0 or 1")

    def __call__(self, rollout: Rollout) -> Shaped:
        """Returns the advantages and the weights of the actions in the loss."""
        rewards = rollout.by_prompt(rollout.reward)
        if rollout.group == 1:
            found = rewards
        else:
            found = group_advantages(rewards, scale=self.scale, ddof=self.ddof, eps=self.eps)
        kept = jnp.ones_like(rewards)
        if self.drop_constant:
            kept = kept * ~group_stats(rewards).constant
        return rollout.at_actions(rollout.flat(found)), rollout.at_actions(rollout.flat(kept))


@register("advantage", "rloo")
@dataclass(frozen=True)
class LeaveOneOut:
    """The reward less the mean of the prompt's other answers (RLOO, arXiv 2402.14740, eq. 7)."""

    def __call__(self, rollout: Rollout) -> Shaped:
        """Returns the advantages and the weights of the actions in the loss."""
        rewards, G = rollout.by_prompt(rollout.reward), rollout.group
        if G < 2:
            raise ConfigError("advantage 'rloo' compares answers to one prompt: set group to 2")
        found = centred(rewards, group_stats(rewards)) * (G / (G - 1))
        return rollout.at_actions(rollout.flat(found)), rollout.mask.astype(jnp.float32)


@register("advantage", "reinforce_pp")
@dataclass(frozen=True)
class ReinforcePlusPlus:
    """Returns of token rewards, standardised over all actions of the batch (arXiv 2501.03262)."""

    baseline: bool = False  # take the mean of the prompt's answers off the reward first
    gamma: float = 1.0  # discount of a token
    kl_coef: float = 0.0  # of log pi / pi_ref, taken off each action's reward

    def __call__(self, rollout: Rollout) -> Shaped:
        """Returns the advantages and the weights of the actions in the loss."""
        outcome = rollout.reward
        if self.baseline:
            by_prompt = rollout.by_prompt(outcome)
            outcome = rollout.flat(centred(by_prompt, group_stats(by_prompt)))
        returns = reward_to_go(merged(rollout, outcome, self.kl_coef), rollout.mask, self.gamma)
        return whitened(returns, rollout.mask), rollout.mask.astype(jnp.float32)


@register("advantage", "gae")
@dataclass(frozen=True)
class GeneralisedAdvantage:
    """Generalised advantages over the values of a critic: of the objective "ppo"."""

    gamma: float = 1.0  # discount of a token
    lam: float = 0.95  # decay of what lies further ahead
    kl_coef: float = 0.0  # of log pi / pi_ref, taken off each action's reward
    whiten: bool = True  # mean 0 and variance 1 over all actions of the batch

    def __call__(self, rollout: Rollout) -> Shaped:
        """Returns the advantages and the weights of the actions in the loss."""
        found = self.unscaled(rollout)
        found = whitened(found, rollout.mask) if self.whiten else found
        return found, rollout.mask.astype(jnp.float32)

    def unscaled(self, rollout: Rollout) -> Float[Array, "R T"]:
        """Returns the advantages as they are; with the values they add up to the returns."""
        if "value" not in rollout.scores:
            raise ConfigError("advantage 'gae' needs values of a critic: use the objective 'ppo'")
        rewards = merged(rollout, rollout.reward, self.kl_coef)
        return gae(rewards, rollout.scores["value"], rollout.mask, self.gamma, self.lam)


def merged(
    rollout: Rollout, outcome: Float[Array, "R"], kl_coef: float = 0.0
) -> Float[Array, "R T"]:
    """Returns each action's reward: the outcome at the last one, token rewards and a KL penalty.

    Raises:
        ConfigError: a penalty without a reference.
    """
    log_ratio = None
    if kl_coef:
        if "reference" not in rollout.scores:
            raise ConfigError(
                "an advantage with kl_coef needs a reference: set reference=True in the objective"
            )
        log_ratio = rollout.logprobs - rollout.scores["reference"]
    return merge_rewards(
        outcome, rollout.mask, dense=rollout.token_rewards, log_ratio=log_ratio, kl_coef=kl_coef
    )
