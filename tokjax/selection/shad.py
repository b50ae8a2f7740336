"""SHAD: which answer tokens depend on their own prompt (reasoning) and which do not (boilerplate).

A copy of the model is tuned on a few examples whose answers were handed to other prompts. It can
only learn what does not depend on the prompt. Answer tokens whose loss does not rise under that
copy are boilerplate, the others reasoning. Fine-tuning with the weigher `rft` (see
`tokjax.finetuning.rft`) reads these labels.

The loss is compared with that of the model itself, so the model must already use the prompt where
it reasons: of one that is near chance there, the copy only learns which tokens are frequent, and
all becomes boilerplate. Hence the summary tells the model's own loss on the reasoning tokens.

Reference: "Disentangling Reasoning Tokens and Boilerplate Tokens For Language Model Fine-tuning",
arXiv 2412.14780, section 3.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32, Shaped

from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.decoding.prompts import bucket
from tokjax.errors import ConfigError, DataError
from tokjax.finetuning.sft import SFT
from tokjax.models import lora
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.selection.baselines import losses
from tokjax.selection.rows import Rows
from tokjax.selection.scoring import Found, RowScorer, Target
from tokjax.training.optimizers import AdamW, Constant
from tokjax.training.state import init_state
from tokjax.training.step import StepConfig, make_train_step

_MATRICES = ("query", "key", "value", "out", "up", "down")  # every block has them


@register("selector", "shad")
@dataclass(frozen=True)
class Shad:
    """Share of an example's answer tokens that are reasoning; the labels are its channels.

    Channels, 0 outside of answers: `reasoning` (1 or 0), `loss_difference` (of the tuned copy and
    the model) and `nll` (of the model).
    """

    needs_target: ClassVar[bool] = False
    memory: ClassVar[int] = 1

    share: float = 0.01  # of the pool's examples that the copy is tuned on; two at least
    epochs: int = 3  # passes of the tuning over them
    learning_rate: float = 1e-3  # of the tuning, by Adam, constant
    batch_size: int = 8  # examples of a tuning step
    threshold: float = 0.0  # nats that the loss of a reasoning token rises by, at least
    rank: int | None = 8  # of the adapters that are tuned; None tunes all parameters
    seed: int = 0  # of the draw, the handing over, the adapters' start and the order

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ConfigError(f"share={self.share} must be above 0 and at most 1")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate={self.learning_rate} must be at least 0 and finite")
        if not 0 <= self.threshold < math.inf:
            raise ConfigError(f"threshold={self.threshold} must be at least 0 and finite")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must be at least 0 and below 2^32")
        if self.rank is not None:
            lora.LoraConfig(rank=self.rank)  # says what is wrong with it

    def learn(
        self,
        model: Transformer,
        params: Params,
        pool: Target,
        on_step: Callable[[int, int], None] | None = None,
    ) -> RowScorer:
        """Returns what labels rows, by a copy tuned on shuffled answers of the pool.

        Args:
            model: the model.
            params: its parameters.
            pool: the whole pool, whichever of its examples are scored afterwards.
            on_step: called with the steps of the tuning that are done, and with all.

        Raises:
            DataError: fewer than two examples of the pool have a prompt and an answer.
            ConfigError: the model has adapters already, or the tuning diverges.
        """
        shuffled = shuffled_answers(pool, self.share, self.seed)
        model, before, after = self._tuned(model, params, pool, shuffled, on_step)

        def score(rows: Rows) -> Found:
            scope = rows.scope("response")
            # One program for both, so that equal parameters give equal losses.
            found = [losses(model, each, rows.tokens, scope)[1] for each in (before, after)]
            nll, tuned = jax.device_get(found)
            difference, reasoning = labels(nll, tuned, self.threshold)
            count = scope.sum(1)
            scores = np.where(count > 0, reasoning.sum(1) / np.maximum(count, 1), -np.inf)
            scores = np.where(np.isfinite(difference).all(1), scores, np.nan)
            channels = {"reasoning": reasoning, "loss_difference": difference, "nll": nll}
            return scores, {name: np.asarray(v, np.float32) for name, v in channels.items()}

        return score

    def summary(self, pool: Target, channels: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Returns what to look at before the labels are used, from the channels of all examples."""
        reasoning, nll, unread = [], [], 0
        for i in range(pool.store.num_examples):
            answer = np.asarray(pool.store.weights(i)) != 0
            answer[0] = False
            unread += int(answer[pool.max_tokens :].sum())
            answer[pool.max_tokens :] = False
            reasoning.append(channels["reasoning"][i][answer] != 0)
            nll.append(channels["nll"][i][answer])
        hard, loss = np.concatenate(reasoning), np.concatenate(nll)
        found: dict[str, Any] = {
            "tuned_on": len(drawn(pool, self.share, self.seed)),
            "answer_tokens": len(hard),
            "reasoning_share": _mean(hard),
            "reasoning_nll": _mean(loss[hard]),
            "boilerplate_nll": _mean(loss[~hard]),
        }
        if unread:
            found["unread_answer_tokens"] = unread  # no reasoning as far as a training can see
        if not hard.any():
            found["note"] = (
                "no token is labelled reasoning: the model does not use the prompt yet (train it "
                "first), or the tuning is too weak (epochs, learning_rate)"
            )
        elif hard.all():
            found["note"] = (
                "every token is labelled reasoning: the tuning unlearned all (learning_rate)"
            )
        return found

    def _tuned(
        self, model: Transformer, params: Params, pool: Target, shuffled: "Shuffled", on_step: Any
    ) -> tuple[Transformer, Params, Params]:
        """Returns the model, possibly with adapters, and its parameters before and after tuning."""
        adapters = None
        if self.rank is not None:
            if model.config.lora is not None:
                raise ConfigError("the model has adapters already: merge them first")
            adapters = lora.LoraConfig(rank=self.rank, alpha=2.0 * self.rank, targets=_MATRICES)
        else:
            params = jax.tree.map(lambda p: p.astype(np.float32), dict(params))
        # Narrower parameters would round small updates away.
        config = dataclasses.replace(model.config, lora=adapters, param_dtype="float32")
        model = dataclasses.replace(model, config=config)

        count, width = shuffled.tokens.shape
        size = min(self.batch_size, count)
        # Backward passes take several times the memory of those that score.
        parts = math.ceil(size / max(1, pool.batch_tokens // (4 * width)))
        each = math.ceil(count / size)
        steps = self.epochs * each
        objective = SFT()
        optimizer = AdamW(b2=0.999, weight_decay=0.0).build(config)
        options = StepConfig(self.learning_rate, Constant(), 0, steps, parts, clip_norm=1.0)
        step = jax.jit(make_train_step(model, objective, optimizer, options))
        state = init_state(model, objective, optimizer, self.seed, False, params)
        before, finite = state.whole, []
        rng = np.random.default_rng([self.seed, 2])
        for epoch in range(self.epochs):
            order = rng.permutation(count)
            for number in range(each):
                chosen = order[number * size : (number + 1) * size]
                batch = shuffled.batch(chosen, parts * math.ceil(size / parts))
                state, metrics = step(state, batch)
                finite.append(metrics["finite"])
                if on_step is not None:
                    jax.block_until_ready(state.step)  # else all steps would be told at once
                    on_step(epoch * each + number + 1, steps)
        if not all(jax.device_get(finite)):
            raise ConfigError(
                f"learning_rate={self.learning_rate} makes the loss of the tuning NaN or infinite: "
                f"choose a lower one, or another dtype"
            )
        return model, before, state.whole


def labels(
    before: Float[np.ndarray, "*N"], after: Float[np.ndarray, "*N"], threshold: float = 0.0
) -> tuple[Float[np.ndarray, "*N"], Bool[np.ndarray, "*N"]]:
    """Returns how much the loss of each token rises, and which tokens are reasoning: it rises.

    Args:
        before: losses under the model.
        after: under the copy that was tuned on shuffled answers.
        threshold: above which a rise counts, in nats.

    >>> labels(np.array([0.25, 1.5, 1.0]), np.array([0.25, 2.5, 0.5]))[1].tolist()
    [False, True, False]
    """
    difference = after - before
    return difference, difference > threshold


@dataclass(frozen=True, eq=False)
class Shuffled:
    """Examples with the answers of others, one a row, filled up with zeros.

    Attributes:
        indices: of the examples in the pool that the prompts are of.
        answers: of those that the answers are of.
        tokens: ids, prompt and answer.
        weights: of each token as a target: the answer's.
        lengths: tokens of each row.
    """

    indices: Int[np.ndarray, "N"]
    answers: Int[np.ndarray, "N"]
    tokens: Int32[np.ndarray, "N T"]
    weights: Float32[np.ndarray, "N T"]
    lengths: Int32[np.ndarray, "N"]

    def batch(self, chosen: Shaped[np.ndarray, "M"], rows: int) -> Batch:
        """Returns some of them as a batch of `rows` rows; rows that are left over are filling."""
        empty = rows - len(chosen)
        tokens = np.pad(self.tokens[chosen], ((0, empty), (0, 0)))
        weights = np.pad(self.weights[chosen], ((0, empty), (0, 0)))
        lengths = np.pad(self.lengths[chosen], (0, empty))
        places = np.arange(tokens.shape[1] - 1, dtype=np.int32)
        examples = np.pad(chosen, (0, empty), constant_values=-1)
        inside = places < lengths[:, None] - 1
        return Batch(
            tokens=tokens[:, :-1],  # type: ignore[arg-type]
            targets=tokens[:, 1:],  # type: ignore[arg-type]
            positions=np.where(inside, places, 0).astype(np.int32),  # type: ignore[arg-type]
            segment_ids=inside.astype(np.int32),  # type: ignore[arg-type]
            weights=weights[:, 1:],  # type: ignore[arg-type]
            example_id=examples[:, None].astype(np.int32),  # type: ignore[arg-type]
        )


def drawn(pool: Target, share: float, seed: int) -> Int[np.ndarray, "N"]:
    """Returns the numbers of the examples that the copy is tuned on: a share, two at least.

    Only examples with a prompt and an answer within `max_tokens` are drawn.

    Raises:
        DataError: there are not two of them.
    """
    starts = [_answer_start(pool, i) for i in range(pool.store.num_examples)]
    able = np.flatnonzero([1 < start < pool.max_tokens for start in starts])
    if len(able) < 2:
        raise DataError(
            f"{len(able)} of the pool's {len(starts)} examples have a prompt and an answer: to "
            f"hand answers to other prompts takes two; choose kind='response' or 'messages'"
        )
    count = max(2, math.ceil(share * len(able)))
    return np.random.default_rng([seed, 0]).permutation(able)[:count]


def shuffled_answers(pool: Target, share: float, seed: int) -> Shuffled:
    """Returns a share of a pool with every answer handed to another prompt.

    An answer is all that follows the first token with a weight, turns of the user within included.

    Raises:
        DataError: fewer than two examples have a prompt and an answer.
    """
    store, indices = pool.store, drawn(pool, share, seed)
    starts = {int(i): _answer_start(pool, int(i)) for i in indices}
    answers = [store.tokens(int(i), starts[int(i)]) for i in indices]
    given = derangement([a.tobytes() for a in answers], np.random.default_rng([seed, 1]))
    rows, weights = [], []
    for i, j in zip(indices.tolist(), indices[given].tolist(), strict=True):
        prompt = store.tokens(i, 0, starts[i])
        answer, own = store.tokens(j, starts[j]), store.weights(j, starts[j])
        rows.append(np.concatenate([prompt, answer])[: pool.max_tokens])
        weights.append(np.concatenate([np.zeros(len(prompt)), own])[: pool.max_tokens])
    lengths = np.array([len(row) for row in rows], np.int32)
    width = min(bucket(int(lengths.max())), pool.max_tokens)
    found = Shuffled(
        indices,
        indices[given],
        np.zeros((len(rows), width), np.int32),
        np.zeros((len(rows), width), np.float32),
        lengths,
    )
    for b, n in enumerate(lengths):
        found.tokens[b, :n], found.weights[b, :n] = rows[b], weights[b]
    return found


def derangement(values: Sequence[Hashable], rng: np.random.Generator) -> Int[np.ndarray, "N"]:
    """Returns a permutation that leaves nothing in its place, nor, where it can, equal values.

    Equal values are put beside each other, in a random order of the groups, and all are moved on
    by the size of the largest group: as few as possible meet their own value again.

    Args:
        values: two at least.
        rng: draws the order.
    """
    groups: dict[Hashable, list[int]] = {}
    for i in rng.permutation(len(values)).tolist():
        groups.setdefault(values[i], []).append(i)
    order = np.concatenate([np.array(group) for group in groups.values()])
    shift = min(max(map(len, groups.values())), len(values) - 1)
    found = np.empty(len(values), np.int64)
    found[order] = np.roll(order, -shift)
    return found


def _answer_start(pool: Target, i: int) -> int:
    """Returns where the answer of an example begins; `max_tokens` where there is none before."""
    read = min(int(pool.store.lengths[i]), pool.max_tokens)
    weights = np.asarray(pool.store.weights(i, 0, read))
    places = np.flatnonzero(weights[1:])
    return int(places[0]) + 1 if len(places) else pool.max_tokens


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean()), 4) if len(values) else None
