"""DRLC: PPO in which a critic's quotations of what helped and what hurt pay single tokens.

Reference: Cao et al., "DRLC: Reinforcement Learning with Dense Rewards from LLM Critic" (also
"Beyond Sparse Rewards: Enhancing Reinforcement Learning with Language Model Critique in Text
Generation"), arXiv 2401.07382.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float

from tokjax.config import Choice, register
from tokjax.errors import ConfigError, nearest
from tokjax.rl import span_rewards
from tokjax.rl.critics import Critique, Lexicon
from tokjax.rl.ppo import PPO
from tokjax.rl.rewards import Episode
from tokjax.rl.rollout import Rollout
from tokjax.rl.span_rewards import Match


@register("objective", "drlc")
@dataclass(frozen=True)
class DRLC(PPO):
    """PPO on the answer's reward at its end plus fixed rewards of tokens in quoted spans.

    A span that is not in the answer pays nothing. With both values 0 it is PPO.
    """

    critic: Annotated[Any, Choice("critic")] = Lexicon()  # quotes what helped and what hurt
    positive: float = 0.8  # reward of a token in a span that helped
    negative: float = -0.8  # reward of a token in a span that hurt
    # the critic is asked about answers rewarded at most this; None asks about all
    threshold: float | None = None
    # a token is in a span by the characters it stands for, or ("bag", as the reference code does)
    # if its text occurs anywhere in the spans
    match: Match = "offset"

    def __post_init__(self):
        super().__post_init__()
        if self.match not in span_rewards.MATCHES:
            told = nearest(str(self.match), span_rewards.MATCHES)
            raise ConfigError(f"unknown match={self.match!r}.{told}")
        for name in ("positive", "negative"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)} must be a finite number")
        if self.threshold is not None and math.isnan(self.threshold):
            raise ConfigError("threshold is no number")

    def token_rewards(
        self, rollout: Rollout, episodes: Sequence[Episode]
    ) -> Float[np.ndarray, "R T"]:
        """Returns what the critic's spans pay each action."""
        rewards = np.asarray(rollout.reward)
        limit = math.inf if self.threshold is None else self.threshold
        asked = np.flatnonzero(rewards <= limit).tolist()
        critiques = [Critique()] * len(episodes)
        told = self.critic([episodes[i] for i in asked], [float(rewards[i]) for i in asked])
        for i, critique in zip(asked, told, strict=True):
            critiques[i] = critique
        return span_rewards.at_actions(
            np.asarray(rollout.mask),
            [self.of_answer(e, c) for e, c in zip(episodes, critiques, strict=True)],
        )

    def of_answer(self, episode: Episode, critique: Critique) -> Float[np.ndarray, " N"]:
        """Returns the reward of each token of an answer."""
        return span_rewards.span_rewards(
            episode.answer,
            episode.offsets,
            episode.pieces,
            critique.positive,
            critique.negative,
            (self.positive, self.negative),
            self.match,
        )
