"""Collecting paths: prompts are continued, the continuations rewarded in every state.

What an objective's collector adds to `PromptCollector` is `found`, which says which paths there
are and what they are worth.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from tokjax.data.batch import Batch
from tokjax.data.shuffle import derive_seed
from tokjax.files import write_atomically
from tokjax.gflownet.flow import FORCED
from tokjax.training.answers import Question
from tokjax.training.rollouts import Answers, PromptCollector

FLOWS_FILE = "flows.jsonl"
_SHOWN = 64  # paths of the latest collection that are written down


@dataclass(frozen=True)
class Paths:
    """Paths behind prompts, a row each. L is the largest number of tokens and one more.

    Attributes:
        prompts: ids before each.
        tokens: ids of each; those of a path that counts in the flow end with the end token.
        log_r: log-reward of ending in each state, before each token.
        states: which states count in the flow; none of rows that are only imitated.
        forced: which of them are at the largest number of tokens, where a path can but end.
        imitated: whether the row is imitated.
        told: what people should read of each row, besides its texts.
    """

    prompts: Sequence[tuple[int, ...]]
    tokens: Sequence[Sequence[int]]
    log_r: Float[np.ndarray, "R L"]
    states: Bool[np.ndarray, "R L"]
    forced: Bool[np.ndarray, "R L"]
    imitated: Bool[np.ndarray, "R"]
    told: Sequence[dict[str, Any]]


class FlowCollector(PromptCollector):
    """Makes the batches of one stage of a run from paths; subclasses define `found`.

    The latest collection's paths are written to the run's `flows.jsonl`.
    """

    behind = 1  # a path that was cut gets the end token
    end: int  # id of the end token

    def end_ids(self) -> tuple[int, ...]:
        """Returns the ids that end a path."""
        return (self.end,)

    def found(
        self, state: Any, step: int, asked: Sequence[Question], seed: int
    ) -> tuple[Paths, dict[str, float]]:
        """Returns the paths of a collection, as many to each prompt, and metrics."""
        raise NotImplementedError

    def collect(self, state: Any, step: int) -> tuple[dict[str, float], list[str]]:
        """Makes the batches of a collection; returns its metrics and warnings."""
        iteration = step // self.period
        asked = self.asked(iteration)
        seed = derive_seed(self.run.config.seed, "rollouts", self.stage.first_step + step)
        paths, metrics = self.found(state, step, asked, seed)
        rows = self.rows_of_paths(paths)
        useful = (np.asarray(rows.channels["state"]) != 0).any(1) | paths.imitated
        order = np.argsort(~useful, kind="stable")[: self.rows]
        self.batches = []
        for share in self.shares(order, seed):
            part = jax.tree.map(lambda a, share=share: a[share], rows)
            self.batches.append((self.scaled(part), np.arange(len(share))))
        self.write(step, paths)
        return metrics, self.warnings(iteration)

    def drawn(self, state: Any, asked: Sequence[Question], seed: int) -> Answers:
        """Returns paths of the policy; those that were cut get the end token."""
        answers = self.sample(state, [q.prompt for q in asked], seed)
        ended = [t if t and t[-1] == self.end else [*t, self.end] for t in answers.tokens]
        return dataclasses.replace(answers, tokens=ended)

    def rows_of_paths(self, paths: Paths) -> Batch:
        """Returns a row for each path, its channels not yet divided."""
        nothing = [[0.0] * len(tokens) for tokens in paths.tokens]
        ended = np.ones(len(paths.tokens), bool)
        tokens = [list(t) for t in paths.tokens]
        batch = self.rows_of(Answers(list(paths.prompts), tokens, nothing, ended))
        weights = np.asarray(batch.weights)
        log_reward, state = np.zeros_like(weights), np.zeros_like(weights)
        T, L = weights.shape[1], paths.states.shape[1]
        for r, prompt in enumerate(paths.prompts):
            first = len(prompt) - 1
            part = slice(first, min(first + L, T))
            size = part.stop - part.start
            log_reward[r, part] = paths.log_r[r, :size]
            state[r, part] = np.where(paths.forced[r], FORCED, paths.states[r])[:size]
        imitate = np.where(paths.imitated[:, None], weights, 0.0).astype(np.float32)
        channels: Any = {"log_reward": log_reward, "state": state, "imitate": imitate}
        return dataclasses.replace(batch, channels=channels)

    def scaled(self, batch: Batch) -> Batch:
        """Returns an update's rows, with each part of the loss divided by what it is a mean over.

        Losses are divided by the number of rows in the end, so these are multiplied by it.
        """
        theta, rows = self.objective.theta, batch.tokens.shape[0]
        state, imitate = (np.asarray(batch.channels[n]) for n in ("state", "imitate"))
        pairs = self.objective.pairs((state != 0).sum(1)).sum()
        flow = np.where(state != 0, (1 - theta) * rows / pairs if pairs else 0.0, 0.0)
        targets = imitate.sum()
        imitate = imitate * (theta * rows / targets if targets else 0.0)
        channels: Any = {
            **batch.channels,
            "flow": flow.astype(np.float32),
            "imitate": imitate.astype(np.float32),
        }
        return dataclasses.replace(batch, channels=channels)

    def warnings(self, iteration: int) -> list[str]:
        """Returns what people should be told of a collection."""
        if iteration > 0 or not self.left_out:
            return []
        return [
            f"{self.left_out} examples leave no room for rollouts.max_new_tokens="
            f"{self.config.max_new_tokens} within data.seq_len, or are unfit, and are not asked"
        ]

    def write(self, step: int, paths: Paths) -> None:
        """Writes some paths of the latest collection to `flows.jsonl`, for people to read."""
        if jax.process_index() != 0:
            return
        lines = [
            {
                "step": self.stage.first_step + step,
                "prompt": self.text(prompt),
                "path": self.text(tokens),
                **told,
            }
            for prompt, tokens, told in list(
                zip(paths.prompts, paths.tokens, paths.told, strict=True)
            )[:_SHOWN]
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(Path(self.workdir) / FLOWS_FILE, text)
