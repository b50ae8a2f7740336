"""Examples of a token store as padded rows, and which of their tokens a method looks at."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Bool, Float32, Int32, Shaped

from tokjax.decoding.prompts import bucket
from tokjax.errors import ConfigError

Scope = Literal["response", "prompt", "all"]


class Store(Protocol):
    """What is read of a `tokjax.data.store.TokenStore`; its `manifest` too, where it has one."""

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        ...

    @property
    def lengths(self) -> Shaped[np.ndarray, "N"]:
        """Tokens of each example."""
        ...

    def tokens(self, i: int, start: int = 0, stop: int | None = None) -> Int32[np.ndarray, "n"]:
        """Tokens [start, stop) of example i."""
        ...

    def weights(self, i: int, start: int = 0, stop: int | None = None) -> Float32[np.ndarray, "n"]:
        """Weights, as targets, of tokens [start, stop) of example i."""
        ...

    def example_key(self, i: int) -> str:
        """A stable key."""
        ...

    def example_name(self, i: int) -> str:
        """A name for people."""
        ...


@dataclass(frozen=True, eq=False)
class Rows:
    """Examples of a store, one a row, filled up with zeros on the right.

    Attributes:
        indices: of the examples in their store; -1 for a row that only fills up the batch.
        keys: of the examples.
        tokens: ids, the first and the last included.
        lengths: number of ids of each row that are the example's.
        weights: of each token as a target of training.
        ended: rows whose last token is the end token that the store puts behind every example.
    """

    indices: Int32[np.ndarray, "B"]
    keys: tuple[str, ...]
    tokens: Int32[np.ndarray, "B T"]
    lengths: Int32[np.ndarray, "B"]
    weights: Float32[np.ndarray, "B T"]
    ended: Bool[np.ndarray, "B"]

    @property
    def real(self) -> Bool[np.ndarray, "B T"]:
        """Where there is a token."""
        return np.arange(self.tokens.shape[1]) < self.lengths[:, None]

    def scope(
        self, which: Scope, exclude: Sequence[int] = (), *, end: bool = True
    ) -> Bool[np.ndarray, "B T"]:
        """Returns the tokens that count.

        The first token of an example never does: it is no target, it may be BOS, and it is where
        attention sinks are.

        Args:
            which: tokens that have a weight in training (`response`), those that have none
                (`prompt`), or both.
            exclude: ids that never count.
            end: whether the end token counts. It is a target, but training never reads it, so that
                its state says nothing.
        """
        slots = np.arange(self.tokens.shape[1])
        inside = self.real & (slots > 0)
        if not end:
            inside &= ~(self.ended[:, None] & (slots == self.lengths[:, None] - 1))
        if which != "all":
            inside &= (self.weights != 0) == (which == "response")
        return inside & ~np.isin(self.tokens, exclude) if len(exclude) else inside


def batches(
    store: Store, indices: Sequence[int], *, batch_tokens: int, max_tokens: int
) -> Iterator[Rows]:
    """Yields the examples in batches, short ones first, of one of a few shapes each.

    Args:
        store: where the examples are.
        indices: which.
        batch_tokens: places of a batch, filling included; a long example has a batch of its own.
        max_tokens: of an example; what is behind is left out.

    Raises:
        ConfigError: a limit is below what an example needs.
    """
    if batch_tokens < 1 or max_tokens < 2:
        raise ConfigError(
            f"batch_tokens={batch_tokens} must be at least 1 and max_tokens={max_tokens} at least 2"
        )
    chosen = np.asarray(indices, np.int64)
    known, counts = np.unique(np.minimum(store.lengths, max_tokens), return_counts=True)
    widths = np.minimum([bucket(int(n)) for n in known], max_tokens)
    own = widths[np.searchsorted(known, np.minimum(np.asarray(store.lengths)[chosen], max_tokens))]
    for width in sorted(set(own.tolist())):
        # Few examples do not fill a batch; powers of two, so that few programs are compiled. All
        # of the store's are counted, so that some of them are computed as all of them would be.
        most = int(counts[widths == width].sum())
        size = min(max(1, batch_tokens // width), 1 << (most - 1).bit_length())
        group = chosen[own == width].tolist()
        for first in range(0, len(group), size):
            yield rows_of(store, group[first : first + size], width, size)


def rows_of(store: Store, indices: Sequence[int], width: int, size: int | None = None) -> Rows:
    """Returns some examples as `size` rows of `width` tokens; the others are empty."""
    size = len(indices) if size is None else size
    found = Rows(
        indices=np.full(size, -1, np.int32),
        keys=tuple(store.example_key(i) for i in indices) + ("",) * (size - len(indices)),
        tokens=np.zeros((size, width), np.int32),
        lengths=np.zeros(size, np.int32),
        weights=np.zeros((size, width), np.float32),
        ended=np.zeros(size, bool),
    )
    manifest = getattr(store, "manifest", None)
    after = manifest["tokenizer"].get("after", []) if manifest else []
    for b, i in enumerate(indices):
        n = min(int(store.lengths[i]), width)
        found.indices[b], found.lengths[b] = i, n
        found.tokens[b, :n] = store.tokens(i, 0, n)
        found.weights[b, :n] = store.weights(i, 0, n)
        found.ended[b] = n == int(store.lengths[i]) and after == found.tokens[b, n - 1 : n].tolist()
    return found
