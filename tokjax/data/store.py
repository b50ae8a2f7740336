"""The token store: one task split, tokenised, in memory-mapped arrays of one directory.

    manifest.json   what it is, how it was made, and the size and SHA-256 of every other file
    tokens.bin      ids of all examples one after another, uint16, or uint32 for large vocabularies
    weights.bin     float32 beside each token; only where some weight is not 1
    cuts.bin        int64 [N, G - 1], where the second and further sequences of each example begin;
                    only where examples are groups of G sequences (pairs: G = 2)
    labels.bin      float32 [N, G], how relevant each sequence is; only of rankings
    scores.bin      float32 [N, G], a teacher's scores; only of rankings that have them
    sides.bin       float32 [N, 2], 0 and 1; only of translations
    offsets.bin     int64 [N + 1], where each example starts in tokens.bin
    lengths.bin     int64 [N]
    keys.bin        uint64 [N], and repeats.bin uint32 [N] only where a key occurs more than once
    names.bin       UTF-8 names one after another, name_offsets.bin int64 [N + 1]
    unigram.bin     int64 [V], how often each id occurs
    skipped.jsonl   place and reason of every record that was left out; only where there are some

All numbers are little-endian. Opening reads the manifest and maps the rest, so that a store of any
size opens at once and costs no Python object per example.
"""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from tokjax.data.store_format import (
    MANIFEST,
    OPTIONAL,
    VALUES,
    check_file,
    damaged,
    read_manifest,
)
from tokjax.data.store_writer import StoreWriter
from tokjax.errors import DataError

__all__ = ["StoreWriter", "TokenStore"]


class TokenStore:
    """Read access to a token store.

    Sequences are whole, begin and end tokens included: the inputs of an example are `s[:-1]`, its
    targets `s[1:]`.

    Attributes:
      directory: where the store lies.
      manifest: what the store says of itself: format, task, tokenizer, counts, skipped, files.
      num_examples: number of examples, N.
      num_tokens: number of tokens of all examples.
      lengths: Int64[N], tokens of each example.
      unigram_counts: Int64[V], how often each id occurs among all tokens.
      sequences: G, sequences of each example: 1, or as many as a group has.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]):
        self.directory = directory
        self.manifest = manifest
        counts = manifest["counts"]
        self.num_examples: int = counts["examples"]
        self.num_tokens: int = counts["tokens"]
        n, vocab_size = self.num_examples, manifest["tokenizer"]["vocab_size"]
        self._tokens = self._map("tokens.bin", manifest["token_dtype"], self.num_tokens)
        self._weights = self._map("weights.bin", "<f4", self.num_tokens)
        held = manifest["files"].get("cuts.bin", {"bytes": 0})["bytes"]
        self.sequences: int = held // (8 * n) + 1
        self._cuts = self._map("cuts.bin", "<i8", n * (self.sequences - 1))
        self._values = {
            name: self._map(file, "<f4", n * self.sequences)
            for name, file in VALUES.items()
            if file in manifest["files"]
        }
        self._offsets = self._map("offsets.bin", "<i8", n + 1)
        self.lengths: np.ndarray = self._map("lengths.bin", "<i8", n)
        self._keys = self._map("keys.bin", "<u8", n)
        self._repeats = self._map("repeats.bin", "<u4", n)
        self._name_offsets = self._map("name_offsets.bin", "<i8", n + 1)
        self._names = self._map("names.bin", "u1", int(self._name_offsets[-1]))
        self.unigram_counts: np.ndarray = self._map("unigram.bin", "<i8", vocab_size)
        if int(self._offsets[-1]) != self.num_tokens:
            raise self._damaged("offsets.bin", "does not fit tokens.bin")

    @classmethod
    def open(cls, directory: str | os.PathLike[str], verify: bool = False) -> "TokenStore":
        """Returns the store in `directory`.

        Args:
          directory: what `prepare` returned.
          verify: also read every file and compare its SHA-256; sizes are compared always.

        Raises:
          DataError: there is no store, a newer tokjax made it, or a file of it is damaged.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        for name, facts in manifest["files"].items():
            check_file(directory / name, facts, verify)
        return cls(directory, manifest)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the contents: equal for stores with equal examples in equal order."""
        return self.manifest["fingerprint"]

    @property
    def has_weights(self) -> bool:
        """Whether some weight differs from 1."""
        return self._weights is not None

    @property
    def has_pairs(self) -> bool:
        """Whether every example is a pair of answers, the better one first."""
        return self.sequences == 2 and not self._values

    @property
    def has_rankings(self) -> bool:
        """Whether every example is a query with passages, whose values say how good they are."""
        return "label" in self._values

    @property
    def has_translations(self) -> bool:
        """Whether every example is a text with its translation."""
        return "side" in self._values

    def cuts(self, i: int) -> tuple[int, ...]:
        """Returns where the second and further sequences of example `i` begin."""
        self._range(i, 0, 0)
        size = self.sequences - 1
        return tuple(self._cuts[i * size : (i + 1) * size].tolist()) if size else ()

    def cut(self, i: int) -> int:
        """Returns where the second sequence of example `i` begins; 0 where there is one only."""
        return (*self.cuts(i), 0)[0]

    @property
    def value_names(self) -> tuple[str, ...]:
        """Names of what is known of each sequence.

        Of rankings "label" and perhaps "score", of translations "side".
        """
        return tuple(self._values)

    def values(self, name: str, i: int) -> Float32[np.ndarray, "G"]:
        """Returns a value of each sequence of example `i`, a copy.

        Raises:
          KeyError: there is no value of this name.
        """
        self._range(i, 0, 0)
        size = self.sequences
        return np.array(self._values[name][i * size : (i + 1) * size], np.float32)

    def tokens(self, i: int, start: int = 0, stop: int | None = None) -> Int32[np.ndarray, "n"]:
        """Returns the ids of tokens [start, stop) of example `i`, a copy.

        Raises:
          IndexError: there is no such example, or the range does not lie inside it.
        """
        return np.asarray(self._tokens[self._range(i, start, stop)], np.int32)

    def weights(self, i: int, start: int = 0, stop: int | None = None) -> Float32[np.ndarray, "n"]:
        """Returns the weights, as targets, of tokens [start, stop) of example `i`, a copy.

        Raises:
          IndexError: there is no such example, or the range does not lie inside it.
        """
        span = self._range(i, start, stop)
        if self._weights is None:
            return np.ones(span.stop - span.start, np.float32)
        return np.array(self._weights[span], np.float32)

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of what else is known of each token: nothing; see `AnnotatedStore`."""
        return ()

    def channel(
        self, name: str, i: int, start: int = 0, stop: int | None = None
    ) -> Float32[np.ndarray, "n"]:
        """Refuses every name.

        Raises:
          KeyError: always.
        """
        raise KeyError(f"the token store {self.directory} has no channel {name!r}")

    def example_key(self, i: int) -> str:
        """Returns the stable key of example `i`; see `tokjax.data.sources.make_key`.

        The second, third, ... example with the same key have `-1`, `-2`, ... after it.
        """
        self._range(i, 0, 0)
        key = f"{int(self._keys[i]):016x}"
        repeat = 0 if self._repeats is None else int(self._repeats[i])
        return f"{key}-{repeat}" if repeat else key

    def example_name(self, i: int) -> str:
        """Returns where example `i` came from, for people: "file.jsonl:12"."""
        self._range(i, 0, 0)
        start, stop = int(self._name_offsets[i]), int(self._name_offsets[i + 1])
        return self._names[start:stop].tobytes().decode()

    @cached_property
    def unigram_entropy(self) -> float:
        """Entropy of the distribution of ids, in nats per token: the loss of knowing only that."""
        counts = np.asarray(self.unigram_counts, np.float64)
        share = counts[counts > 0] / counts.sum()
        return float(-(share * np.log(share)).sum())

    def _range(self, i: int, start: int, stop: int | None) -> slice:
        if not 0 <= i < self.num_examples:
            raise IndexError(f"example {i} of {self.num_examples} in {self.directory}")
        length = int(self.lengths[i])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"tokens {start}:{stop} of example {i}, which has {length} tokens")
        offset = int(self._offsets[i])
        return slice(offset + start, offset + stop)

    def _map(self, name: str, dtype: str, count: int) -> Any:
        if name not in self.manifest["files"]:
            if name not in OPTIONAL:
                raise self._damaged(MANIFEST, f"does not list {name}")
            return None
        expected = count * np.dtype(dtype).itemsize
        if self.manifest["files"][name]["bytes"] != expected:
            raise self._damaged(name, f"should have {expected} bytes")
        if not count:
            return np.zeros(0, dtype)  # an empty file cannot be mapped
        try:
            return np.memmap(self.directory / name, dtype, "r", shape=(count,))
        except (OSError, ValueError) as error:
            raise self._damaged(name, f"cannot be read: {error}") from error

    def _damaged(self, name: str, what: str) -> DataError:
        return damaged(self.directory / name, what)
