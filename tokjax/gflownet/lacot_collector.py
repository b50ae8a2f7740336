"""LaCoT's paths: rationales of the data and of the model, rewarded by the frozen copy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tokjax.decoding.prompts import Prompts, bucket
from tokjax.decoding.transforms import chain, min_new_tokens, suppress, temperature, top_p
from tokjax.decoding.transforms.base import Transform
from tokjax.errors import DataError
from tokjax.gflownet.collector import FlowCollector, Paths
from tokjax.gflownet.lacot import LaCoT, anchors, interpolated, kept
from tokjax.gflownet.prefix_rewards import prefix_rewards
from tokjax.models import lora
from tokjax.training.answers import Question
from tokjax.training.objective import of_model


class LaCoTCollector(FlowCollector):
    """Makes the batches of a stage of LaCoT: each prompt's own rationale, then explorations."""

    def __init__(self, objective: LaCoT, run: Any, stage: Any, workdir: Path):
        self.marker = tuple(run.tokenizer.encode(objective.marker))
        self.end = self.marker[0]
        super().__init__(objective, run, stage, workdir, more=1)
        model = run.model

        def score(params: Any, aux: Any, *given: Any) -> Any:
            if aux == ():
                return prefix_rewards(lora.off(model), lora.split(of_model(params))[0], *given)
            return prefix_rewards(model, aux, *given)

        self._rewards = jax.jit(score)

    def _questions(self, seq_len: int) -> tuple[list[Question], int]:
        """Returns the prompts whose references are a rationale, the marker and an answer."""
        found, left_out = super()._questions(seq_len)
        limit = self.config.max_new_tokens
        parts = [(q, self.split(q)) for q in found]
        most = self.run.model.config.max_positions - limit - len(self.marker)
        fit = [
            q
            for q, part in parts
            if part is not None and len(part[0]) <= limit and len(q.prompt) + len(part[1]) <= most
        ]
        if not fit:
            raise DataError(
                f"no answer of data.train holds the marker {self.objective.marker!r} behind at "
                f"most rollouts.max_new_tokens={limit} tokens; the first is "
                f"{self.text(found[0].reference)!r}"
            )
        return fit, left_out + len(found) - len(fit)

    def split(self, question: Question) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Returns a reference's rationale and answer, or None if the marker is not in it.

        A rationale that holds the marker's first token would end there, so that is none either.
        """
        ids, n = question.reference, len(self.marker)
        for at in range(len(ids) - n):
            if ids[at : at + n] == self.marker:
                return (ids[:at], ids[at + n :]) if self.end not in ids[:at] else None
        return None

    def transform(self, seeds: np.ndarray) -> Transform:
        """Returns temperatures of each row's own, and that nothing ends too early."""
        objective, config, R = self.objective, self.config, len(seeds)
        rng = np.random.default_rng(seeds.astype(np.uint64))
        hot = rng.random(R) < objective.hot
        other = rng.uniform(objective.hot_low, objective.hot_high, R)
        eos = self.run.tokenizer.eos_id
        steps = [min_new_tokens(objective.min_tokens, [self.end])]
        steps += [] if eos is None or eos == self.end else [suppress([eos])]
        steps += [temperature(np.where(hot, other, config.temperature).astype(np.float32))]
        steps += [top_p(config.top_p)] if config.top_p < 1 else []
        return chain(*steps)

    def found(
        self, state: Any, step: int, asked: Sequence[Question], seed: int
    ) -> tuple[Paths, dict[str, float]]:
        """Returns the paths of a collection: each prompt's reference, then explorations."""
        G, objective = self.config.group, self.objective
        drawn = self.drawn(state, asked, seed).tokens
        prompts: list[tuple[int, ...]] = []
        rationales: list[tuple[int, ...]] = []
        answers: list[tuple[int, ...]] = []
        for i, question in enumerate(asked):
            own, answer = self.split(question) or ((), ())
            prompts += [question.prompt] * (G + 1)
            answers += [answer] * (G + 1)
            rationales += [own] + [tuple(t[:-1]) for t in drawn[i * G : (i + 1) * G]]
        tau = objective.tau.at(step)
        delta = None if objective.delta is None else objective.delta.at(step)
        at, exact = self.rewards(state, prompts, rationales, answers)
        L = self.config.max_new_tokens + 1
        log_r, states = np.zeros((len(prompts), L), np.float32), np.zeros((len(prompts), L), bool)
        for r, rationale in enumerate(rationales):
            n = len(rationale)
            values = exact[r, : len(at[r])] / tau
            log_r[r, : n + 1] = interpolated(
                n, at[r], values, first=objective.min_tokens, early=objective.early
            )
            states[r, : n + 1] = True
        size = np.array(
            [len(z) + len(self.marker) + len(y) for z, y in zip(rationales, answers, strict=True)]
        )
        last = np.array([len(a) - 1 for a in at])
        whole = exact[np.arange(len(at)), last]
        mean = (whole / size / tau).reshape(-1, G + 1)
        good = kept(mean, mean[:, 0], delta)
        states &= good.reshape(-1)[:, None]
        imitated = np.zeros(len(prompts), bool)
        imitated[:: G + 1] = objective.theta > 0
        told = [
            {
                "kind": "drawn" if r % (G + 1) else "reference",
                "log_r": float(whole[r] / tau),
                "kept": bool(good.reshape(-1)[r]),
            }
            for r in range(len(prompts))
        ]
        forced = states & (np.arange(L) == L - 1)
        ended = [(*z, self.end) for z in rationales]
        paths = Paths(prompts, ended, log_r, states, forced, imitated, told)
        lengths = np.array([len(z) for z in rationales]).reshape(-1, G + 1)
        texts = [tuple(z) for z in rationales]
        groups = [texts[i + 1 : i + G + 1] for i in range(0, len(texts), G + 1)]
        return paths, {
            "reward/mean": float((whole / tau).reshape(-1, G + 1)[:, 1:].mean()),
            "flow/kept": float(good[:, 1:].mean()),
            "flow/length": float(lengths[:, 1:].mean()),
            "flow/distinct": float(np.mean([len(set(g)) / G for g in groups])),
            "flow/tau": tau,
        } | ({} if delta is None else {"flow/delta": delta})

    def rewards(
        self, state: Any, prompts: Any, rationales: Any, answers: Any
    ) -> tuple[list[list[int]], np.ndarray]:
        """Returns each row's anchors, and log P(prefix, marker, answer | prompt) at these."""
        objective, size = self.objective, self.run.config.data.batch_size
        limit = self.config.max_new_tokens
        at = [anchors(len(z), objective.every, objective.min_tokens) for z in rationales]
        A = len(anchors(limit, objective.every, objective.min_tokens)) + 1
        endings = [(*self.marker, *y) for y in answers]
        S = bucket(max(map(len, endings)))
        T = min(bucket(max(map(len, prompts)) + limit), self.run.model.config.max_positions)
        parts = []
        for first in range(0, len(prompts), size):
            place = [min(r, len(prompts) - 1) for r in range(first, first + size)]
            texts = [(*prompts[r], *rationales[r]) for r in place]
            tokens, suffix = np.zeros((size, T), np.int32), np.zeros((size, S), np.int32)
            # Places that a row does not need repeat its last.
            wanted = np.array([at[r] + at[r][-1:] * (A - len(at[r])) for r in place], np.int32)
            for b, r in enumerate(place):
                tokens[b, : len(texts[b])] = texts[b]
                suffix[b, : len(endings[r])] = endings[r]
            lengths = np.array([len(t) for t in texts], np.int32)
            starts = np.array([len(prompts[r]) for r in place], np.int32)
            ends = np.array([len(endings[r]) for r in place], np.int32)
            given = (Prompts(tokens, lengths), starts, wanted, suffix, ends)  # type: ignore[arg-type]
            parts.append(jax.device_get(self._rewards(state.whole, state.aux, *given)))
        return at, np.concatenate(parts)[: len(prompts)].astype(np.float64)
