"""Attraction to a reference: a search writes what a model would, close to a given text.

Each row (a beam, a sample) follows its reference by a pointer to the next word; words from there on
attract it, the nearer the more. Where the model itself finds that word unlikely it is left alone,
so that it errs where it is unsure:

    beam_search(model, params, prompts, transform=attraction(references), max_new_tokens=64)

It is a transform, with a state for each row, and serves `decode` as well.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax import struct
from tokjax.decoding.context import Context
from tokjax.decoding.prompts import Prompts, bucket
from tokjax.decoding.transforms.base import Transform, column, setting
from tokjax.errors import ConfigError, DataError

_OUTSIDE = -1  # no token's id


@struct.dataclass
class Place:
    """Where each row stands in its reference.

    Attributes:
        pointer: of the reference's token that should come next.
        departures: how many of the latest tokens in a row were not the reference's.
    """

    pointer: Int[Array, "R"]
    departures: Int[Array, "R"]


def moved(
    place: Place,
    references: Int[Array, "R N"],
    lengths: Int[Array, "R"],
    tokens: Int[Array, "R"],
    *,
    insertions: int = 3,
    deletions: int = 3,
) -> Place:
    """Returns where rows stand behind one more token each.

    The pointer goes on by one. If the token is none of the reference's, it may be one that the row
    has passed because it wrote too much, then the pointer goes back behind it; or one of the next,
    because it left some out, then the pointer goes on behind that.

    Args:
        place: before the token.
        references: ids of each row.
        lengths: of the references.
        tokens: what was written.
        insertions: how many passed tokens are tried, the latest first.
        deletions: how many of the next tokens are tried, the nearest first.
    """
    before = place.pointer

    def written(at: Int[Array, "R"]) -> Any:
        ids = jnp.take_along_axis(references, jnp.maximum(at, 0)[:, None], axis=1, mode="clip")
        return jnp.where((at >= 0) & (at < lengths), ids[:, 0], _OUTSIDE) == tokens

    pointer, departures = before + 1, jnp.where(written(before), 0, place.departures + 1)
    for k in range(1, insertions + 1):
        passed = (departures > k) & written(before - k)
        pointer = jnp.where(passed, before - k + 1, pointer)
        departures = jnp.where(passed, 0, departures)
    for k in range(1, deletions + 1):
        skipped = (departures > 0) & written(before + k)
        pointer = jnp.where(skipped, before + k + 1, pointer)
        departures = jnp.where(skipped, 0, departures)
    return Place(jnp.minimum(pointer, lengths - 1), departures)


def attraction_logprobs(
    place: Place,
    references: Int[Array, "R N"],
    lengths: Int[Array, "R"],
    vocab_size: int,
    temperature: Any = 0.2,
) -> Float[Array, "R V"]:
    """Returns the log-probabilities with which tokens attract each row; others have -inf.

    A token k places behind the pointer weighs 1 / (k + 1)^2, halved between the pointer and the
    last agreed place; repeated tokens add up, and the weights over the temperature are logits.
    """
    at = jnp.arange(references.shape[1])[None]

    def weights(pointer: Int[Array, "R"]) -> Float[Array, "R N"]:
        ahead = at - pointer[:, None]
        inside = (ahead >= 0) & (at < lengths[:, None])
        return jnp.where(inside, 1.0 / jnp.square(jnp.maximum(ahead, 0) + 1.0), 0.0)

    agreed = jnp.maximum(place.pointer - place.departures, 0)
    pulls = (weights(place.pointer) + weights(agreed)) / 2
    rows = jnp.arange(references.shape[0])[:, None]
    of_tokens = jnp.zeros((references.shape[0], vocab_size)).at[rows, references].add(pulls)
    logits = jnp.where(of_tokens > 0, of_tokens / column(temperature), -jnp.inf)
    return jax.nn.log_softmax(logits, axis=-1)


@struct.dataclass
class _Attraction:
    references: Any
    lengths: Any
    model_share: Any
    threshold: Any
    temperature: Any
    insertions: int = struct.field(pytree_node=False)
    deletions: int = struct.field(pytree_node=False)

    def check(self, prompts: Prompts, limits: Any, vocab_size: int) -> None:
        """Raises where references and prompts do not fit together."""
        del limits
        given, rows = len(self.references), len(prompts.tokens)
        if given != rows:
            raise ConfigError(f"attraction has {given} references for {rows} prompts: one for each")
        for name in ("model_share", "threshold", "temperature"):
            value = getattr(self, name)
            if np.ndim(value) and len(value) != rows:
                raise ConfigError(f"{name} has {len(value)} values for {rows} prompts")
        if np.max(self.references) >= vocab_size:
            row = int(np.max(self.references, axis=1).argmax())
            raise DataError(
                f"reference {row} has id {np.max(self.references)}, but the model's ids are 0 to "
                f"{vocab_size - 1}: was it made with another tokenizer?"
            )

    def init(self, prompts: Prompts, vocab_size: int) -> Place:
        """Returns the beginning of each reference."""
        del vocab_size
        nothing = jnp.zeros(prompts.tokens.shape[0], jnp.int32)
        return Place(nothing, nothing)

    def update(
        self, logits: Float[Array, "R V"], state: Place, context: Context
    ) -> tuple[Float[Array, "R V"], Place]:
        """Returns the attracted log-probabilities, and where the rows stand before the token."""
        copies = logits.shape[0] // self.references.shape[0]  # beams or samples of a prompt

        def each(value: Any) -> Any:
            return jnp.repeat(value, copies, axis=0) if jnp.ndim(value) else value

        references, lengths = each(self.references), each(self.lengths)
        windows = {"insertions": self.insertions, "deletions": self.deletions}
        behind = moved(state, references, lengths, context.last, **windows)
        # Before the first token the last one is the prompt's.
        place = jax.tree.map(lambda a, b: jnp.where(context.step > 0, a, b), behind, state)
        share, threshold = column(each(self.model_share)), column(each(self.threshold))
        own = jax.nn.log_softmax(logits, axis=-1)
        pull = attraction_logprobs(
            place, references, lengths, logits.shape[1], each(self.temperature)
        )
        expected = jnp.take_along_axis(references, place.pointer[:, None], axis=1)
        likely = jnp.take_along_axis(own, expected, axis=1) > jnp.log(threshold)
        mixed = jnp.logaddexp(jnp.log(share) + own, jnp.log1p(-share) + pull)
        # With a share of 1 the very numbers of the model remain, not their logarithms' rounding.
        return jnp.where(likely & (share < 1), mixed, logits), place


def attraction(
    references: Sequence[Sequence[int]],
    *,
    model_share: Any = 0.2,
    threshold: Any = 0.05,
    temperature: Any = 0.2,
    insertions: int = 3,
    deletions: int = 3,
) -> Transform:
    """Returns the pull of each prompt's new text towards a reference.

    Where the model gives the reference's next token more than `threshold`, probabilities are
    `model_share` of its own and the rest those of the attraction; elsewhere its own. The first
    token should not be the end: chain `min_new_tokens(1, [eos])` behind, and `suppress([pad])`
    where the model knows such a token. With `model_share=1` or `threshold=1` nothing changes; with
    0 and 0 the likeliest text is the reference.

    Args:
        references: ids for each prompt, its end token included.
        model_share: weight of the model's probabilities, 0 to 1; one, or one for each prompt.
        threshold: probability, 0 to 1; one, or one for each prompt.
        temperature: of the attraction, above 0; one, or one for each prompt.
        insertions: how many passed tokens of the reference are found again behind words too many.
        deletions: how many of its tokens may be left out and the rest still be followed.

    Raises:
        ConfigError: a setting is impossible, or a reference is empty.

    Reference: "Alleviating Distribution Shift in Synthetic Data for Machine Translation Quality
    Estimation", arXiv 2502.19941 (constrained beam search, as the authors' code has it).
    """
    lengths = np.array([len(row) for row in references], np.int32)
    if not len(lengths) or lengths.min() < 1:
        raise ConfigError("attraction needs a reference for each prompt, its end token included")
    if min(insertions, deletions) < 0:
        raise ConfigError(f"insertions={insertions} and deletions={deletions} must be 0 or more")
    ids = np.zeros((len(lengths), bucket(int(lengths.max()))), np.int32)
    for row, reference in zip(ids, references, strict=True):
        row[: len(reference)] = reference
    if ids.min() < 0:
        raise ConfigError(f"references have the id {ids.min()}: ids are 0 or more")

    def share(name: str, value: Any) -> Any:
        return setting(name, value, np.float32, lambda v: (v >= 0) & (v <= 1), "0 to 1")

    warm = lambda v: (v > 0) & (v < math.inf)  # noqa: E731
    return _Attraction(
        references=ids,
        lengths=lengths,
        model_share=share("model_share", model_share),
        threshold=share("threshold", threshold),
        temperature=setting("temperature", temperature, np.float32, warm, "above 0"),
        insertions=int(insertions),
        deletions=int(deletions),
    )
