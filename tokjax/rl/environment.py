"""What an advantage may ask for beyond the collection: more answers, from any point of one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tokjax.data.shuffle import derive_seed
from tokjax.errors import ConfigError
from tokjax.training.answers import Question


@dataclass
class Environment:
    """Continues answers by the policy that gave them, and judges what comes out.

    Attributes:
        collector: whose policy and rewards are used.
        state: with the policy's parameters.
        asked: the question behind each row of the collection.
        answers: of the collection.
        seed: of the collection.
    """

    collector: Any
    state: Any
    asked: list[Question]
    answers: Any
    seed: int
    calls: int = field(default=0, init=False)
    tokens: int = field(default=0, init=False)
    rollouts: int = field(default=0, init=False)

    def continued(self, rows: Sequence[int], kept: Sequence[int], samples: int) -> np.ndarray:
        """Returns the rewards [N, samples] of fresh answers that begin like answers of the rows.

        Args:
            rows: of the collection, N of them.
            kept: tokens of that row's answer that are kept, fewer than all of them.
            samples: fresh continuations of each.

        Raises:
            ConfigError: nothing is left to be continued.
        """
        collector, limit = self.collector, self.collector.config.max_new_tokens
        for row, n in zip(rows, kept, strict=True):
            if not 0 <= n < limit:
                raise ConfigError(
                    f"row {row} cannot go on behind {n} tokens: answers have at most {limit}"
                )
        prompts = [
            (*self.answers.prompts[row], *self.answers.tokens[row][:n])
            for row, n in zip(rows, kept, strict=True)
        ]
        self.calls += 1
        fresh = collector.sample(
            self.state,
            prompts,
            derive_seed(self.seed, "continued", self.calls),
            group=samples,
            limits=[limit - n for n in kept],
        )
        self.rollouts += len(fresh.tokens)
        self.tokens += sum(map(len, fresh.tokens))
        each = [i for i in range(len(rows)) for _ in range(samples)]
        whole = [
            [*self.answers.tokens[rows[i]][: kept[i]], *new]
            for i, new in zip(each, fresh.tokens, strict=True)
        ]
        joined = type(fresh)(
            [self.answers.prompts[rows[i]] for i in each], whole, [[]] * len(whole), fresh.stopped
        )
        episodes = collector.episodes([self.asked[rows[i]] for i in each], joined)
        judged = collector.judged(episodes)
        total = sum(
            np.float32(reward.weight) * judged.scores[name]
            for name, reward in zip(collector.judge.names, collector.objective.rewards, strict=True)
        )
        return np.asarray(total, np.float32).reshape(len(rows), samples)

    def metrics(self) -> dict[str, float]:
        """Returns what the further answers cost."""
        return {
            "rollout/further_answers": float(self.rollouts),
            "rollout/further_tokens": float(self.tokens),
        }
