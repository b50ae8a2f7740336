"""cDPO: how critical each token of an answer is, by a contrast of two models.

One model is tuned on right chains, one on wrong ones. Where the second likes a token and the first
does not, the token is critical; DPO then holds it against the rejected answer, and leaves alone
what both sorts of chains share. Training is the objective "dpo" on weights from here:

    scores = critical_scores(store, (right.model, right.params), (wrong.model, wrong.params))
    weights = critical_weights(store, scores)
    write_token_weights("critical.parquet", store, weights, method="cdpo")

Reference: "Critical Tokens Matter: Token-Level Contrastive Estimation Enhances LLM's Reasoning
Capability" (arXiv 2411.19943).
"""

import functools
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from tokjax.decoding.contrast.combine import contrast
from tokjax.errors import ConfigError, DataError
from tokjax.models.head import Head, as_head
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.preference.token_weights import (
    AnswerStore,
    counted_targets,
    end_tokens,
    require_pairs,
)
from tokjax.selection.rows import Rows, batches
from tokjax.signals.vocabulary import (
    block_ids,
    flat,
    fold_blocks,
    from_chunks,
    in_chunks,
    logits_tile,
    tile_size,
)

# A target of weight 0 would be none: places in an answer would be counted without it, and a pair
# whose rejected answer has no target is left out.
_LEAST = 1e-7


def contrastive_scores(
    positive: tuple[Float[Array, "B T D"], Head | Float[Array, "V D"]],
    negative: tuple[Float[Array, "B T E"], Head | Float[Array, "V E"]],
    targets: Int[Array, "B T"],
    beta: Any = 1.0,
    *,
    mask: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """Returns softmax((1 + beta) log p+ - beta log p-) at the targets; low is critical.

    It is streamed over the vocabulary: [B, T, V] never exists. A token that p+ excludes scores 0.

    Args:
        positive: final hidden states and head of p+, the model of right chains.
        negative: those of p-, over the same ids.
        targets: ids.
        beta: strength of the contrast; 0 gives p+.
        mask: positions out of use are False and score 1.

    Raises:
        ValueError: the two vocabularies differ, or shapes do not fit.
    """
    sides = [(x, as_head(head)) for x, head in (positive, negative)]
    (a, first), (b, second) = sides
    vocabulary = first.table.shape[0]
    if second.table.shape[0] != vocabulary:
        raise ValueError(f"vocabularies of {vocabulary} and {second.table.shape[0]} ids differ")
    if not a.shape[:2] == b.shape[:2] == targets.shape:
        raise ValueError(
            f"states {a.shape} and {b.shape} must lead with the shape of targets {targets.shape}"
        )
    if targets.size == 0:
        return jnp.ones(targets.shape, jnp.float32)
    n, size = tile_size(vocabulary, targets.size)

    def chunk(xs: tuple[Array, Array], targets: Array) -> Array:
        start = (
            jnp.full(targets.shape, -jnp.inf),
            jnp.zeros(targets.shape),
            jnp.full(targets.shape, jnp.nan),  # stays where an id is outside the vocabulary
        )

        def step(old: Any, begin: Any) -> Any:
            largest, total, value = old
            tiles = [
                logits_tile(head, x, begin, size)
                for x, head in zip(xs, (first, second), strict=True)
            ]
            # Of logits as of log-probabilities: the softmax removes what differs between them.
            z = contrast(tiles[0], tiles[1], beta)
            new = jnp.maximum(largest, z.max(-1))
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            total = total * jnp.exp(largest - shift) + jnp.exp(z - shift[:, None]).sum(-1)
            local = targets - block_ids(begin, vocabulary, size)[0][0]
            own = jnp.take_along_axis(z, jnp.clip(local, 0, size - 1)[:, None], axis=-1)[:, 0]
            here = (targets >= begin) & (local < size)
            return new, total, jnp.where(here, own, value)

        largest, total, value = fold_blocks(step, start, vocabulary, size)
        return jnp.exp((value - largest) - jnp.log(total))

    chunks, count = in_chunks(flat(((a, b), targets)), n)
    _, found = jax.lax.scan(lambda _, c: (None, chunk(*c)), None, chunks)
    found = from_chunks(found, count).reshape(targets.shape)
    return found if mask is None else jnp.where(mask, found, 1.0)


def critical_scores(
    store: AnswerStore,
    positive: tuple[Transformer, Params],
    negative: tuple[Transformer, Params],
    *,
    beta: float = 1.0,
    batch_tokens: int = 4096,
) -> list[Float32[np.ndarray, "n"]]:
    """Returns the score of each token of each pair, 1 where a token is no counted target.

    Args:
        store: pairs of answers.
        positive: p+, a model and its parameters, perhaps a base model with adapters
            (`lora.join(base, adapters)`).
        negative: p-; it may be another model with the same tokenizer.
        beta: strength of the contrast.
        batch_tokens: places computed at a time, filling included.

    Raises:
        ConfigError: beta is negative, or a model has too few ids or positions for the store.
        DataError: the store holds no pairs, or a model's numbers are not finite.
    """
    require_pairs(store, "the contrast of two models")
    if not beta >= 0:
        raise ConfigError(f"beta={beta} must not be negative")
    every = range(store.num_examples)
    cuts = np.array([store.cut(i) for i in every], np.int64)
    _check_models(store, cuts, (positive[0], negative[0]))
    found: list[Any] = [None] * store.num_examples
    longest = int(max(store.lengths, default=2))
    models, params = zip(positive, negative, strict=True)
    for rows in batches(store, every, batch_tokens=batch_tokens, max_tokens=max(longest, 2)):
        own = _pair_scores(models, params, *_packed(store, rows, cuts), jnp.float32(beta))
        for b, i in enumerate(rows.indices.tolist()):
            if i >= 0:
                found[i] = np.asarray(own[b, : rows.lengths[b]], np.float32)
                if not np.isfinite(found[i]).all():
                    raise DataError(
                        f"{store.example_name(i)} gets a score that is not finite: look at the "
                        f"parameters of the two models"
                    )
    return found


def critical_weights(
    store: AnswerStore,
    scores: Sequence[Float32[np.ndarray, "n"]],
    *,
    only_negative: bool = True,
) -> list[Float32[np.ndarray, "n"]]:
    """Returns what multiplies the data's weights: 1 - s on rejected answers, 0 on prompts.

    The end tokens weigh 1. A score of 1 leaves 1e-7 rather than 0, so that the token stays a
    target.

    Args:
        store: pairs of answers.
        scores: as `critical_scores` returns them.
        only_negative: chosen answers weigh 1; otherwise their tokens weigh s.

    Raises:
        DataError: the scores are of other pairs.
    """
    require_pairs(store, "the contrast of two models")
    if [len(s) for s in scores] != np.asarray(store.lengths).tolist():
        raise DataError("the scores are not of the tokens of this store: score it again")
    weights = []
    for i, s in enumerate(scores):
        rejected = np.arange(len(s)) >= store.cut(i)
        size = np.where(rejected, 1 - s, 1 if only_negative else s)
        size = np.where(end_tokens(store, i), 1, np.maximum(size, _LEAST))
        weights.append(np.where(counted_targets(store, i), size, 0).astype(np.float32))
    return weights


@dataclass(frozen=True)
class Chains:
    """Which of a question's sampled chains train which model.

    Attributes:
        positive: chain for p+, None where none is right.
        negatives: chains for p-, one for each of the most frequent wrong answers.
    """

    positive: int | None
    negatives: tuple[int, ...]

    @property
    def pair(self) -> tuple[int, int] | None:
        """The chosen and the rejected chain of DPO, where there are both."""
        if self.positive is None or not self.negatives:
            return None
        return self.positive, self.negatives[0]


def choose_chains(
    answers: Sequence[Hashable | None], correct: Sequence[bool], share: float = 0.5
) -> Chains:
    """Returns the chains of one question to train on, of each answer the first.

    The right one has the most frequent right answer. Wrong answers are taken in order of frequency
    until they cover a share of the wrong chains; of equally frequent ones the first met.

    Args:
        answers: final answer of each sampled chain; those without one (None) are left out.
        correct: whether it is right.
        share: of the wrong chains, 0 to 1.

    Raises:
        ConfigError: the share is not within 0 and 1.

    >>> choose_chains(["7", "9", "9", "7", "5", "9"], [True, False, False, True, False, False])
    Chains(positive=0, negatives=(1,))
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share={share} must lie within 0 and 1")
    first: dict[Any, int] = {}
    groups: tuple[Counter, Counter] = Counter(), Counter()
    for place, (answer, right) in enumerate(zip(answers, correct, strict=True)):
        if answer is not None:
            first.setdefault((answer, bool(right)), place)
            groups[bool(right)][answer] += 1
    wrong, good = groups
    taken, covered = [], 0
    for answer, count in wrong.most_common():
        if taken and covered >= share * wrong.total():
            break
        taken.append(first[answer, False])
        covered += count
    best = good.most_common(1)
    return Chains(first[best[0][0], True] if best else None, tuple(taken))


def critical_token(
    successes: Sequence[int] | Int[np.ndarray, "T"], samples: int, most_later: float = 3 / 64
) -> int | None:
    """Returns the critical token of a wrong chain by rollouts, None where there is none.

    It is the first token behind which no continuation succeeds, and after which hardly any does.
    How often another token in its place succeeds is told by `tokjax.decoding.search.pass_at_k`.

    Args:
        successes: of the continuations sampled behind each token, how many were right.
        samples: continuations behind each token.
        most_later: largest share of successes behind any later token.

    Raises:
        ConfigError: a count is not within 0 and `samples`.

    >>> critical_token([40, 0, 9, 0, 2, 3], samples=64)
    3
    """
    counts = np.asarray(successes, np.int64)
    if samples < 1 or (counts.size and not 0 <= counts.min() <= counts.max() <= samples):
        raise ConfigError(
            f"successes must be counts of {samples} samples each, and these at least 1"
        )
    # The most frequent success at or behind each token.
    later = np.maximum.accumulate(counts[::-1])[::-1]
    found = np.flatnonzero((counts == 0) & (later <= most_later * samples))
    return int(found[0]) if found.size else None


def _check_models(store: AnswerStore, cuts: np.ndarray, models: Sequence[Transformer]) -> None:
    ids = store.manifest["tokenizer"]["vocab_size"]
    lengths = np.asarray(store.lengths)
    for model in models:
        config = model.config
        if config.vocab_size != models[0].config.vocab_size or config.vocab_size < ids:
            raise ConfigError(
                f"models of {[m.config.vocab_size for m in models]} ids and a store of {ids}: both "
                f"models must have the tokenizer of the store"
            )
        # A table of positions has to reach over the whole row, in training too.
        whole = config.positions == "learned"
        sizes = lengths if whole else np.maximum(cuts, lengths - cuts)
        if sizes.size and sizes.max() > config.max_positions:
            i = int(sizes.argmax())
            what = "the pair" if whole else "an answer of"
            raise ConfigError(
                f"{what} {store.example_name(i)} has {sizes[i]} tokens, prompt included, more than "
                f"the model's {config.max_positions} positions: prepare with a smaller max_tokens"
            )


def _packed(store: AnswerStore, rows: Rows, cuts: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns tokens, positions, segments and counted targets of rows that hold a pair each."""
    slots = np.arange(rows.tokens.shape[1])
    cut = np.where(rows.indices >= 0, cuts[rows.indices], 0)[:, None]
    second = slots >= cut
    positions = np.where(second, slots - cut, slots)
    segments = np.where(rows.real, 1 + second, 0)
    counted = np.zeros(rows.tokens.shape, bool)
    for b, i in enumerate(rows.indices.tolist()):
        if i >= 0:
            counted[b, : rows.lengths[b]] = counted_targets(store, i)
    return rows.tokens, positions.astype(np.int32), segments.astype(np.int32), counted


@functools.partial(jax.jit, static_argnames="models")
def _pair_scores(models, params, tokens, positions, segments, counted, beta) -> Float[Array, "B T"]:
    def side(model, params):
        x = model.embed(params, tokens)
        out = model.backbone(params, x, positions=positions, segments=segments)
        return out.x[:, :-1], model.head(params)

    positive, negative = map(side, models, params)
    found = contrastive_scores(positive, negative, tokens[:, 1:], beta, mask=counted[:, 1:])
    return jnp.pad(found, ((0, 0), (1, 0)), constant_values=1.0)
