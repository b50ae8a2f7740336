"""A token store with what a selection artifact says of its examples and tokens."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from tokjax.data.artifact import Artifact, read_artifact
from tokjax.data.store import TokenStore
from tokjax.errors import DataError

WEIGHTS = "weights"  # the channel that multiplies the data's own weights


class AnnotatedStore:
    """The examples of a store that an artifact keeps, with its values of their tokens.

    It is read like a `TokenStore`. Examples are joined by key.

    Attributes:
      store: the store behind it.
      kept: Int64[N], numbers of the kept examples in the store, in its order.
      dropped: examples that the artifact leaves out.
      unknown: examples that it does not name; they are left out too.
      absent: rows of the artifact for which the store has no example.
    """

    def __init__(self, store: TokenStore, artifact: Artifact, name: str = "the artifact"):
        """Joins the two.

        Args:
          store: what is trained on.
          artifact: what was found out about its examples.
          name: of the artifact, for messages.

        Raises:
          DataError: they share no example, none is kept, or an example has another number of
            tokens than when the artifact was made.
        """
        self.store = store
        self._artifact = artifact
        found = [artifact.rows.get(store.example_key(i), -1) for i in range(store.num_examples)]
        row = np.array(found, np.int64)
        known = row >= 0
        if not known.any():
            raise DataError(
                f"{name} names none of the {store.num_examples} examples of {store.directory}: it "
                f"was made of other data, or of another kind of record"
            )
        self._check_lengths(row, name)
        keep = np.zeros(store.num_examples, bool)
        keep[known] = artifact.keep[row[known]]
        if not keep.any():
            raise DataError(f"{name} keeps none of the examples of {store.directory}")
        self.kept = np.flatnonzero(keep)
        self._row = row[self.kept]
        self.dropped = int((known & ~keep).sum())
        self.unknown = int((~known).sum())
        self.absent = len(artifact) - int(known.sum())
        self.lengths = np.asarray(store.lengths)[self.kept]
        self.channels = tuple(name for name in artifact.channels if name != WEIGHTS)

    def _check_lengths(self, row: np.ndarray, name: str) -> None:
        known = np.flatnonzero(row >= 0)
        theirs = self._artifact.n_tokens[row[known]]
        wrong = known[theirs != np.asarray(self.store.lengths)[known]]
        if wrong.size:
            i = int(wrong[0])
            raise DataError(
                f"{name} was made with another tokenizer or template: {self.store.example_name(i)} "
                f"has {int(self.store.lengths[i])} tokens here and "
                f"{int(self._artifact.n_tokens[row[i]])} there ({wrong.size} such examples)"
            )

    def summary(self) -> str:
        """Returns in words what was kept and what was not."""
        told = f"the selection keeps {self.num_examples:,} of {self.store.num_examples:,} examples"
        for count, what in (
            (self.dropped, "dropped by it"),
            (self.unknown, "that it does not name are left out"),
            (self.absent, "that it names are not there"),
        ):
            told += f"; {count:,} {what}" if count else ""
        return told

    @property
    def directory(self) -> Path:
        """Where the store lies; packing plans are kept there."""
        return self.store.directory

    @property
    def manifest(self) -> dict[str, Any]:
        """What the store says of itself, of all its examples."""
        return self.store.manifest

    @property
    def num_examples(self) -> int:
        """Number of kept examples."""
        return len(self.kept)

    @property
    def num_tokens(self) -> int:
        """Number of their tokens."""
        return int(self.lengths.sum())

    @property
    def has_weights(self) -> bool:
        """Whether some weight may differ from 1."""
        return self.store.has_weights or WEIGHTS in self._artifact.channels

    @property
    def has_pairs(self) -> bool:
        """Whether every example is a pair of answers."""
        return self.store.has_pairs

    @property
    def has_rankings(self) -> bool:
        """Whether every example is a query with passages."""
        return self.store.has_rankings

    @property
    def has_translations(self) -> bool:
        """Whether every example is a text with its translation."""
        return self.store.has_translations

    @property
    def sequences(self) -> int:
        """Sequences of each example."""
        return self.store.sequences

    @property
    def value_names(self) -> tuple[str, ...]:
        """Names of what is known of each sequence."""
        return self.store.value_names

    @property
    def unigram_entropy(self) -> float:
        """That of the whole store."""
        return self.store.unigram_entropy

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the store's contents and of the artifact's."""
        identity = f"{self.store.fingerprint} {self._artifact.digest}"
        return hashlib.sha256(identity.encode()).hexdigest()

    def tokens(self, i: int, start: int = 0, stop: int | None = None) -> Int32[np.ndarray, "n"]:
        """Returns the ids of tokens [start, stop) of kept example `i`."""
        return self.store.tokens(self._example(i), start, stop)

    def weights(self, i: int, start: int = 0, stop: int | None = None) -> Float32[np.ndarray, "n"]:
        """Returns the weights of these tokens as targets: the store's times the artifact's."""
        own = self.store.weights(self._example(i), start, stop)
        if WEIGHTS not in self._artifact.channels:
            return own
        return own * self._values(WEIGHTS, i)[start:stop]

    def channel(
        self, name: str, i: int, start: int = 0, stop: int | None = None
    ) -> Float32[np.ndarray, "n"]:
        """Returns the artifact's values of these tokens.

        Raises:
          KeyError: there is no such channel.
        """
        self._example(i)
        return self._values(name, i)[start:stop]

    def values(self, name: str, i: int) -> Float32[np.ndarray, "G"]:
        """Returns a value of each sequence of kept example `i`."""
        return self.store.values(name, self._example(i))

    def cuts(self, i: int) -> tuple[int, ...]:
        """Returns where the second and further sequences of kept example `i` begin."""
        return self.store.cuts(self._example(i))

    def cut(self, i: int) -> int:
        """Returns where the second sequence of kept example `i` begins; 0 where there is one."""
        return self.store.cut(self._example(i))

    def example_key(self, i: int) -> str:
        """Returns the stable key of kept example `i`."""
        return self.store.example_key(self._example(i))

    def example_name(self, i: int) -> str:
        """Returns where kept example `i` came from."""
        return self.store.example_name(self._example(i))

    def _values(self, name: str, i: int) -> np.ndarray:
        row = int(self._row[i])
        first, last = self._artifact.starts[row : row + 2].tolist()
        return self._artifact.channel(name)[first:last]

    def _example(self, i: int) -> int:
        if not 0 <= i < len(self.kept):
            raise IndexError(f"example {i} of {len(self.kept)} kept ones")
        return int(self.kept[i])


def annotate(store: TokenStore, path: str) -> AnnotatedStore:
    """Returns the store with the artifact at `path`; see `AnnotatedStore`.

    Raises:
      DataError: the artifact is missing, damaged, or does not fit the store.
    """
    return AnnotatedStore(store, read_artifact(path), path)
