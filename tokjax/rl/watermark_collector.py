"""Collections for a learnt watermark: answers beside human continuations of the same prompts."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tokjax.data.batch import Batch
from tokjax.data.tokenizers import sequence_ends
from tokjax.errors import ConfigError, DataError
from tokjax.rl.collector import Collector
from tokjax.rl.rewards import Episode
from tokjax.rl.rollout import Rollout
from tokjax.rl.watermark_detector import DETECTOR
from tokjax.training.answers import Question
from tokjax.training.processes import on_first
from tokjax.training.rollouts import Answers

TextFunction = str  # "module:function", from a list of texts to a list of as many texts


@functools.cache
def text_function(path: str) -> Callable[[list[str]], Sequence[str]]:
    """Returns the function that "module:function" names.

    Raises:
        ConfigError: there is none.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path!r} names no function ({error}): write 'module:function'"
        ) from None


class WatermarkCollector(Collector):
    """Rewards answers by the detector, and puts the texts they are compared with beside them.

    See `tokjax.rl.collector.Collector`.
    """

    def _questions(self, seq_len: int) -> tuple[list[Question], int]:
        size, new = self.objective.prompt_tokens, self.config.max_new_tokens
        if size is None:
            return super()._questions(seq_len)
        # Every piece begins as a text of its own does.
        before, _ = sequence_ends(self.run.config.data.tokenizer, self.run.tokenizer)
        room = min(seq_len + 1, self.run.model.config.max_positions)
        if len(before) + size + new > room:
            raise ConfigError(
                f"prompt_tokens={size} and rollouts.max_new_tokens={new} are more than the "
                f"{room - len(before)} tokens that data.seq_len={seq_len} has room for"
            )
        found = []
        for store in self.run.stores:
            for i in range(store.num_examples):
                tokens = store.tokens(i)[len(before) :].tolist()
                for k in range(len(tokens) // (size + new)):
                    piece = tokens[k * (size + new) : (k + 1) * (size + new)]
                    prompt, rest = (*before, *piece[:size]), tuple(piece[size:])
                    found.append(Question(f"{store.example_name(i)}#{k}", prompt, rest))
        if not found:
            raise DataError(
                f"no text of data.train has prompt_tokens={size} + rollouts.max_new_tokens={new} "
                f"tokens"
            )
        return found, 0

    def enrich(
        self,
        state: Any,
        rollout: Rollout,
        asked: Sequence[Question],
        answers: Answers,
        episodes: Sequence[Episode],
        seed: int,
    ) -> tuple[Rollout, dict[str, float], list[str]]:
        """Returns the rollout with the detector's reward and the texts that answers face."""
        objective = self.objective
        rollout, more, warnings = super().enrich(state, rollout, asked, answers, episodes, seed)
        own = [self.bare(tokens) for tokens in answers.tokens]
        valid = np.array([len(tokens) > 1 for tokens in own])
        scores = np.asarray(rollout.scores[DETECTOR])
        ends = [len(p) + len(t) - 2 for p, t in zip(answers.prompts, own, strict=True)]
        score = np.where(valid, scores[np.arange(len(ends)), np.maximum(ends, 0)], 0.0)
        clipped = np.clip(score, -objective.reward_clip, objective.reward_clip)
        share = np.float32(objective.share)
        reward = share * clipped.astype(np.float32) + (1 - share) * np.asarray(rollout.reward)
        human = [self.bare(q.reference) for q in asked]
        texts = {"human": (own, human)}
        if objective.paraphrase:
            said = self.written(objective.paraphrase, [e.answer for e in episodes])
            texts["paraphrase"] = (said, human)
        if objective.other_texts:
            texts["other"] = (
                own,
                self.written(objective.other_texts, [e.prompt for e in episodes]),
            )
        extra = {"valid": valid.astype(np.float32)}
        for name, (high, low) in texts.items():
            rows = low if name != "paraphrase" else high
            extra[name] = self.channel(rollout.batch, answers.prompts, rows)
            end = np.zeros_like(scores)
            for r, prompt in enumerate(answers.prompts):
                shorter = min(len(high[r]), len(low[r]))
                if valid[r] and shorter > 0:
                    end[r, len(prompt) + shorter - 2] = 1.0
            extra[f"{name}_end"] = end
        found = valid if valid.any() else np.ones_like(valid)
        more["reward/detector"] = float(score[found].mean())
        more["reward/clipped"] = float((score != clipped)[found].mean())
        more["rollout/dropped"] = float((~valid).mean())
        extra = {**rollout.extra, **extra}
        return dataclasses.replace(rollout, reward=reward, extra=extra), more, warnings

    def bare(self, tokens: Sequence[int]) -> list[int]:
        """Returns a text's tokens up to its end, at most as many as answers may have."""
        ends, found = self.end_ids(), list(tokens[: self.config.max_new_tokens])
        return found[: next((i for i, t in enumerate(found) if t in ends), len(found))]

    def written(self, path: str, texts: list[str]) -> list[list[int]]:
        """Returns the tokens of what a function makes of texts, the same on every process."""
        told = on_first(lambda: list(text_function(path)(texts)))
        if len(told) != len(texts):
            raise DataError(f"{path!r} returned {len(told)} texts for {len(texts)}")
        return [self.bare(self.run.tokenizer.encode(text)) for text in told]

    def channel(
        self, batch: Batch, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """Returns the targets of rows with other texts behind the prompts, plus 1; 0 on filling."""
        found = np.zeros(batch.targets.shape, np.float32)  # type: ignore[arg-type]
        for r, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            row = [*prompt, *text][1:]
            found[r, : len(row)] = np.asarray(row, np.float32) + 1
        return found
