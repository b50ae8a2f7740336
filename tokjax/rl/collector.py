"""Collecting experience: prompts are answered, answers judged, and rollouts cut into batches."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from tokjax.data.batch import Batch
from tokjax.data.offsets import offsets_of_ids
from tokjax.data.shuffle import derive_seed
from tokjax.files import write_atomically
from tokjax.rl.judge import Judge, Judged
from tokjax.rl.rewards import Episode
from tokjax.rl.rollout import Rollout
from tokjax.signals.groups import group_stats
from tokjax.training.answers import Question
from tokjax.training.processes import on_first
from tokjax.training.rollouts import Answers, PromptCollector

EPISODES_FILE = "episodes.jsonl"
_SHOWN = 64  # answers of the latest collection that are written down


class Collector(PromptCollector):
    """Makes the batches of one stage of a run; see `tokjax.training.objective.Collector`.

    Args:
        objective: a `Policy`.
        run: whose prompts are answered: what lies before the last answer of each example of its
            training data, which is the reference.
        stage: of the run.
        workdir: the latest collection's answers are written to its `episodes.jsonl`.

    Raises:
        ConfigError: sizes that do not fit together.
        DataError: no prompt has room for an answer.
    """

    def __init__(self, objective: Any, run: Any, stage: Any, workdir: Path):
        super().__init__(objective, run, stage, workdir)
        self.judge = Judge(objective.rewards, self.config.timeout_s)
        self._shape = jax.jit(objective.shape)

    def __exit__(self, *error: Any) -> None:
        self.judge.close()

    def collect(self, state: Any, step: int) -> tuple[dict[str, float], list[str]]:
        """Makes the batches of a collection; returns its metrics and warnings."""
        iteration = step // self.period
        asked = [q for q in self.asked(iteration) for _ in range(self.config.group)]
        seed = derive_seed(self.run.config.seed, "rollouts", self.stage.first_step + step)
        answers = self.drawn(state, [q.prompt for q in asked[:: self.config.group]], seed)
        batch = self.rows_of(answers)
        scores = self.scores(state, batch)
        episodes = self.episodes(asked, answers, scores, batch)
        judged = self.judged(episodes)
        total = sum(
            (
                np.float32(reward.weight) * judged.scores[name]
                for name, reward in zip(self.judge.names, self.objective.rewards, strict=True)
            ),
            start=np.zeros(len(episodes), np.float32),
        )
        rollout = Rollout(
            batch=batch,
            reward=np.asarray(total, np.float32),  # type: ignore[arg-type]
            rewards=judged.scores,  # type: ignore[arg-type]
            logprobs=scores["logprob"],  # type: ignore[arg-type]
            entropies=scores["entropy"],  # type: ignore[arg-type]
            scores=scores,  # type: ignore[arg-type]
            stopped=answers.stopped,  # type: ignore[arg-type]
            progress=np.float32(step / max(self.stage.steps, 1)),  # type: ignore[arg-type]
            group=self.config.group,
        )
        rollout, more, warnings = self.enrich(state, rollout, asked, answers, episodes, seed)
        channels = jax.device_get(self._shape(rollout))
        self.cut(batch, channels, seed)
        self.write(step, asked, episodes, np.asarray(rollout.reward), judged)
        metrics = self.metrics(rollout, judged, channels) | more
        return metrics, warnings + self.warnings(judged, iteration)

    def drawn(self, state: Any, prompts: Sequence[tuple[int, ...]], seed: int) -> Answers:
        """Returns a collection's answers, `group` neighbours to each prompt.

        An advantage with the method `draw(sample, prompts, seed, group=, limit=)` draws them
        itself, for example as trees.
        """
        advantage, config = self.objective.advantage, self.config
        if not hasattr(advantage, "draw"):
            return self.sample(state, prompts, seed)
        sample = functools.partial(self.sample, state)
        return advantage.draw(
            sample, prompts, seed, group=config.group, limit=config.max_new_tokens
        )

    def enrich(
        self,
        state: Any,
        rollout: Rollout,
        asked: Sequence[Question],
        answers: Answers,
        episodes: Sequence[Episode],
        seed: int,
    ) -> tuple[Rollout, dict[str, float], list[str]]:
        """Returns the rollout with token rewards and what the advantage gathers, and metrics.

        An objective with the method `token_rewards(rollout, episodes)` gives each action a reward
        of its own, beside that of the answer. Subclasses may give answers another reward here.
        """
        more: dict[str, float] = {}
        if hasattr(self.objective, "token_rewards"):
            dense = np.asarray(self.objective.token_rewards(rollout, episodes), np.float32)
            rollout = dataclasses.replace(rollout, token_rewards=dense)
            shown = dense[np.asarray(rollout.mask)]
            more["reward/token_mean"] = float(shown.mean())
            more["reward/token_std"] = float(shown.std())
        if hasattr(self.objective.advantage, "gather"):
            from tokjax.rl.environment import Environment

            environment = Environment(self, state, list(asked), answers, seed)
            extra = self.objective.advantage.gather(rollout, environment)
            rollout = dataclasses.replace(rollout, extra=extra)
            more |= environment.metrics()
        return rollout, more, []

    def episodes(
        self,
        asked: Sequence[Question],
        answers: Answers,
        scores: dict[str, np.ndarray] | None = None,
        batch: Batch | None = None,
    ) -> list[Episode]:
        """Returns the answers as rewards see them."""
        mask = None if batch is None else np.asarray(batch.weights) != 0
        shown = []
        for r, (question, tokens) in enumerate(zip(asked, answers.tokens, strict=True)):
            logprobs, entropies = answers.logprobs[r], ()
            if scores is not None and mask is not None:
                logprobs = scores["logprob"][r][mask[r]].tolist()
                entropies = scores["entropy"][r][mask[r]].tolist()
            shown.append(
                Episode(
                    prompt=self.text(answers.prompts[r]),
                    answer=self.text(tokens),
                    reference=self.text(question.reference),
                    tokens=tuple(tokens),
                    logprobs=tuple(logprobs),
                    entropies=tuple(entropies),
                    stopped=bool(answers.stopped[r]),
                    limit=self.config.max_new_tokens,
                    pieces=tuple(self.text([t]) for t in tokens),
                    offsets=tuple(offsets_of_ids(self.run.tokenizer, tokens)),
                )
            )
        return shown

    def judged(self, episodes: Sequence[Episode]) -> Judged:
        """Returns the rewards of episodes, the same on every process."""

        def ask() -> dict[str, Any]:
            found = self.judge(episodes)
            scores = {name: values.tolist() for name, values in found.scores.items()}
            return {**dataclasses.asdict(found), "scores": scores}

        told = on_first(ask)
        scores = {name: np.asarray(v, np.float32) for name, v in told["scores"].items()}
        return Judged(**{**told, "scores": scores})

    def cut(self, batch: Batch, channels: dict[str, np.ndarray], seed: int) -> None:
        """Shares the rows out to the collection's updates, those without any weight last."""
        useful = (channels["weight"] * np.asarray(batch.weights) != 0).any(-1)
        order = np.argsort(~useful, kind="stable")[: self.rows]
        rows = dataclasses.replace(batch, channels={n: channels[n] for n in self.channels})
        self.batches = [(rows, share) for share in self.shares(order, seed)]

    # ---------------------------------------------------------------- what is told

    def metrics(
        self, rollout: Rollout, judged: Judged, channels: dict[str, np.ndarray]
    ) -> dict[str, float]:
        """Returns the metrics of a collection."""
        mask = np.asarray(rollout.mask)
        lengths = mask.sum(-1)
        by_prompt = np.asarray(rollout.reward).reshape(-1, rollout.group)
        constant = np.asarray(group_stats(by_prompt).constant)  # type: ignore[arg-type]
        mismatch = np.asarray(rollout.logprobs - rollout.scores["decoded"])[mask]
        useful = (channels["weight"] * np.asarray(rollout.batch.weights) != 0).any(-1)
        found = {
            "reward/mean": float(by_prompt.mean()),
            "reward/group_std": float(by_prompt.std(-1).mean()),
            "reward/constant_groups": float(constant.mean()),
            "reward/errors": float(judged.errors),
            "reward/timeouts": float(judged.timeouts),
            "rollout/length": float(lengths.mean()),
            "rollout/cut": float((~np.asarray(rollout.stopped)).mean()),
            "rollout/entropy": float(np.asarray(rollout.entropies)[mask].mean()),
            "rollout/distinct": distinct_share(np.asarray(rollout.batch.targets), mask),
            "rollout/rows_left_out": float(len(useful) - self.rows),
            "rollout/rows_without_weight": float((~useful).sum()),
            # Training and decoding compute the same policy by different programs.
            "mismatch/mean": float(np.abs(mismatch).mean()),
            "mismatch/max": float(np.abs(mismatch).max()),
        }
        found |= {f"reward/{name}": float(v.mean()) for name, v in judged.scores.items()}
        return found

    def warnings(self, judged: Judged, iteration: int) -> list[str]:
        """Returns what people should be told of a collection."""
        told = []
        if iteration == 0 and self.left_out:
            told.append(
                f"{self.left_out} prompts leave no room for rollouts.max_new_tokens="
                f"{self.config.max_new_tokens} within data.seq_len and are not asked"
            )
        if iteration == 0 and hasattr(self.objective.advantage, "warnings"):
            told += self.objective.advantage.warnings(self.config.group)
        if judged.errors or judged.timeouts:
            told.append(
                f"{judged.errors} rewards failed and {judged.timeouts} answers timed out, which "
                f"counts as 0; the first: {judged.first_error}"
            )
        return told

    def write(
        self,
        step: int,
        asked: Sequence[Question],
        episodes: Sequence[Episode],
        total: Float[Array, "R"] | Any,
        judged: Judged,
    ) -> None:
        """Writes some answers of the latest collection to `episodes.jsonl`, for people to read."""
        if jax.process_index() != 0:
            return
        lines = [
            {
                "step": self.stage.first_step + step,
                "example": question.name,
                "prompt": episode.prompt,
                "answer": episode.answer,
                "reference": episode.reference,
                "stopped": episode.stopped,
                "reward": round(float(total[i]), 6),
                **{n: round(float(values[i]), 6) for n, values in judged.scores.items()},
            }
            for i, (question, episode) in enumerate(zip(asked, episodes, strict=True))
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines[:_SHOWN])
        write_atomically(self.workdir / EPISODES_FILE, text)


def distinct_share(targets: np.ndarray, mask: np.ndarray) -> float:
    """Returns distinct pairs of neighbouring actions over all such pairs: low where texts repeat.

    >>> distinct_share(np.array([[1, 2, 1, 2]]), np.ones((1, 4), bool))
    0.6666666666666666
    """
    both = mask[:, 1:] & mask[:, :-1]
    pairs = np.stack([targets[:, :-1][both], targets[:, 1:][both]], axis=1)
    return len(np.unique(pairs, axis=0)) / len(pairs) if len(pairs) else 1.0
