"""Answers of the model in training to the prompts of its data, as rows of batches.

What every objective shares whose data the model makes itself: reinforcement learning
(`tokjax.rl.collector`) and flows (`tokjax.gflownet.collector`) say what the answers are worth. A
collection is a function of the run's seed, the step it begins at, and the parameters; nothing of
it is kept between steps but the batches that are still to be trained on.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tokjax.data.batch import Batch
from tokjax.data.feed import to_device
from tokjax.data.shuffle import derive_seed, permute
from tokjax.decoding.engine import decode
from tokjax.decoding.predictors import prepare
from tokjax.decoding.prompts import Prompts
from tokjax.decoding.samplers import categorical
from tokjax.decoding.stops import on_tokens
from tokjax.decoding.transforms import chain, temperature, top_p
from tokjax.decoding.transforms.base import Transform
from tokjax.errors import ConfigError, DataError
from tokjax.parallel.rules import constrain
from tokjax.training.answers import Question, questions


@dataclass(frozen=True)
class Answers:
    """Answers as the decoder gave them, on the host.

    Attributes:
        prompts: ids before each answer.
        tokens: ids of each answer, an end token included.
        logprobs: of these under the decoder, at the temperature of sampling.
        stopped: which ended by themselves.
    """

    prompts: list[tuple[int, ...]]
    tokens: list[list[int]]
    logprobs: list[list[float]]
    stopped: np.ndarray


class PromptCollector:
    """Asks prompts, draws answers, and shares rows out to steps; subclasses define `collect`.

    See `tokjax.training.objective.Collector`.

    Args:
        objective: with `rollouts` (a `SamplingConfig`), `channels`, `policy` and `score`.
        run: whose prompts are answered: what lies before the last answer of each example of its
            training data, which is the reference.
        stage: of the run.
        workdir: of the run.
        more: rows that are trained on with each prompt besides its answers.

    Raises:
        ConfigError: sizes that do not fit together.
        DataError: no prompt has room for an answer.
    """

    behind = 0  # tokens of a row behind an answer of the largest length

    def __init__(self, objective: Any, run: Any, stage: Any, workdir: Path, *, more: int = 0):
        self.objective, self.run, self.stage = objective, run, stage
        self.workdir = Path(workdir)
        config = self.config = objective.rollouts
        data = run.config.data
        each = config.group + more
        self.rows = data.batch_size * config.minibatches
        wanted = self.rows if config.prompts is None else config.prompts * each
        if wanted % each or wanted < self.rows:
            beside = f" + {more}" if more else ""
            raise ConfigError(
                f"a collection trains on data.batch_size={data.batch_size} x rollouts.minibatches="
                f"{config.minibatches} = {self.rows} answers, which must be whole groups of "
                f"rollouts.group={config.group}{beside} and no more than rollouts.prompts="
                f"{config.prompts} x group{beside}"
            )
        self.prompts = wanted // each
        self.period = config.minibatches * config.epochs
        self.channels = tuple(sorted(objective.channels))
        self.questions, self.left_out = self._questions(data.seq_len)
        self.batches: list[tuple[Batch, np.ndarray]] = []
        model = run.model
        self._score = jax.jit(
            lambda params, aux, batch: jax.tree.map(
                lambda a: constrain(a, (None,) * a.ndim),
                objective.score(model, params, aux, batch),
            )
        )

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    # ---------------------------------------------------------------- prompts

    def _questions(self, seq_len: int) -> tuple[list[Question], int]:
        model, config = self.run.model.config, self.config
        found = [q for store in self.run.stores for q in questions(store, None)]
        # A row holds everything but its last token as input.
        room = min(seq_len + 1, model.max_positions) - config.max_new_tokens - self.behind
        fitting = [q for q in found if 1 <= len(q.prompt) <= room]
        if not fitting:
            raise DataError(
                f"none of the {len(found)} prompts of data.train leaves room for "
                f"rollouts.max_new_tokens={config.max_new_tokens} within data.seq_len={seq_len}: "
                f"prompts are what lies before the last answer of an example, so the data need a "
                f"kind with answers, such as 'response' or 'messages'"
            )
        return fitting, len(found) - len(fitting)

    def asked(self, iteration: int) -> list[Question]:
        """Returns the prompts of a collection: each epoch goes through all, in an order of its own.

        Args:
            iteration: number of the collection within the stage.
        """
        size, seed = len(self.questions), derive_seed(self.run.config.seed, "prompts")
        first = iteration * self.prompts
        places = [(i // size, i % size) for i in range(first, first + self.prompts)]
        return [self.questions[int(permute(i, size, seed, epoch))] for epoch, i in places]

    # ---------------------------------------------------------------- a collection

    def batch(self, state: Any, step: int) -> tuple[Batch, dict[str, float], list[str]]:
        """Returns the batch of a step, and with a collection's first its metrics and warnings."""
        metrics: dict[str, float] = {}
        warnings: list[str] = []
        at = step % self.period
        if at == 0:
            metrics, warnings = self.collect(state, step)
        elif not self.batches:
            raise RuntimeError(f"step {step} lies within a collection that was not made here")
        rows, place = self.batches[at]
        return self._on_device(jax.tree.map(lambda a: a[place], rows)), metrics, warnings

    def collect(self, state: Any, step: int) -> tuple[dict[str, float], list[str]]:
        """Makes the batches of a collection; returns its metrics and warnings."""
        raise NotImplementedError

    def end_ids(self) -> tuple[int, ...]:
        """Returns the ids that end an answer."""
        eos = self.run.tokenizer.eos_id
        return () if eos is None else (eos,)

    def transform(self, seeds: np.ndarray) -> Transform:
        """Returns what changes the logits that answers are drawn from.

        Args:
            seeds: of the rows that are drawn.
        """
        del seeds
        config = self.config
        steps = [temperature(config.temperature)] if config.temperature != 1 else []
        steps += [top_p(config.top_p)] if config.top_p < 1 else []
        return chain(*steps)

    def sample(
        self,
        state: Any,
        prompts: Sequence[tuple[int, ...]],
        seed: int,
        *,
        group: int | None = None,
        limits: Sequence[int] | None = None,
    ) -> Answers:
        """Returns answers of the policy, `group` neighbours to each prompt.

        Args:
            state: whose parameters answer.
            prompts: ids.
            seed: of the drawing; each answer has a stream of its own.
            group: answers to each; default the configuration's.
            limits: most tokens of the answers to each prompt; default the configuration's.
        """
        config = self.config
        G = config.group if group is None else group
        limits = [config.max_new_tokens] * len(prompts) if limits is None else list(limits)
        predictor, params = self.objective.policy(self.run.model, state.whole, state.aux)
        params = prepare(predictor, params)
        at_once = max(1, config.rows // G)
        at_once = min(at_once, len(prompts))
        seeds = (np.uint64(seed) + np.arange(len(prompts) * G, dtype=np.uint64)) % 2**32
        parts = []
        for first in range(0, len(prompts), at_once):
            # The last part is filled up, so that one program serves all.
            part = [min(i, len(prompts) - 1) for i in range(first, first + at_once)]
            rows = [i * G + g for i in part for g in range(G)]
            generation = decode(
                predictor,
                params,
                Prompts.of([list(prompts[i]) for i in part]),
                max_new_tokens=np.array([limits[i] for i in part]),
                samples=G,
                transform=self.transform(seeds[rows]),
                sampler=categorical(),
                stop=on_tokens(self.end_ids()),
                seeds=seeds[rows],
            )
            parts.append(jax.device_get(generation))
        R = len(prompts) * G
        tokens = [row for part in parts for row in part.rows()]
        logprobs = [row for part in parts for row in part.sampling_logprobs.tolist()]
        return Answers(
            prompts=[prompt for prompt in prompts for _ in range(G)],
            tokens=tokens[:R],
            logprobs=[row[: len(t)] for row, t in zip(logprobs[:R], tokens, strict=False)],
            stopped=np.concatenate([part.stopped for part in parts])[:R],
        )

    def rows_of(self, answers: Answers) -> Batch:
        """Returns a row of `data.seq_len` tokens for each answer, on the host."""
        R, T = len(answers.tokens), self.run.config.data.seq_len
        tokens, targets, positions, segments = (np.zeros((R, T), np.int32) for _ in range(4))
        weights, decoded = np.zeros((R, T), np.float32), np.zeros((R, T), np.float32)
        pairs = zip(answers.prompts, answers.tokens, answers.logprobs, strict=True)
        for r, (prompt, answer, logprobs) in enumerate(pairs):
            row = [*prompt, *answer]
            n = len(row) - 1
            tokens[r, :n], targets[r, :n] = row[:-1], row[1:]
            positions[r, :n], segments[r, :n] = np.arange(n), 1
            actions = slice(len(prompt) - 1, n)
            weights[r, actions], decoded[r, actions] = 1.0, logprobs
        ids = np.arange(R, dtype=np.int32)[:, None]
        return Batch(  # type: ignore[call-arg]
            tokens,  # type: ignore[arg-type]
            targets,  # type: ignore[arg-type]
            positions,  # type: ignore[arg-type]
            segments,  # type: ignore[arg-type]
            weights,  # type: ignore[arg-type]
            ids,  # type: ignore[arg-type]
            {"decoded": decoded},  # type: ignore[arg-type]
        )

    def scores(self, state: Any, batch: Batch) -> dict[str, np.ndarray]:
        """Returns what the objective's pass says of all rows, on the host."""
        size, R = self.run.config.data.batch_size, batch.tokens.shape[0]
        bare = dataclasses.replace(batch, channels={})
        parts = []
        for first in range(0, R, size):
            place = np.minimum(np.arange(first, first + size), R - 1)
            part = self._on_device(jax.tree.map(lambda a, place=place: a[place], bare))
            parts.append(jax.device_get(self._score(state.whole, state.aux, part)))
        together = jax.tree.map(lambda *a: np.concatenate(a)[:R], *parts)
        return {**together, "decoded": np.asarray(batch.channels["decoded"])}

    def text(self, ids: Sequence[int]) -> str:
        """Returns the text of ids without end tokens."""
        end = self.run.tokenizer.eos_id
        return self.run.tokenizer.decode([i for i in ids if i != end])

    def shares(self, rows: np.ndarray, seed: int) -> list[np.ndarray]:
        """Returns which rows each update of a collection trains on, mixed anew each epoch."""
        size, found = self.run.config.data.batch_size, []
        for epoch in range(self.config.epochs):
            mixed = np.random.default_rng([seed, epoch]).permutation(rows)
            found += [mixed[i : i + size] for i in range(0, self.rows, size)]
        return found

    def _on_device(self, batch: Batch) -> Batch:
        size = batch.tokens.shape[0]
        return to_device(
            lambda rows: jax.tree.map(lambda a: a[rows], batch), self.run.batch_sharding, size
        )
