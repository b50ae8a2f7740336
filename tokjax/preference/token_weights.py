"""Weights of answers' tokens that a method finds once, before training, and their artifact.

A training with `data.train.0.artifact` multiplies them into the data's own weights, which are above
0 on chosen or good answers and below 0 on rejected or bad ones: what is written here is a size, and
its sign stays the data's.
"""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float32, Int32, Shaped

from tokjax.data.artifact import write_artifact
from tokjax.errors import DataError


class AnswerStore(Protocol):
    """What is read of a `tokjax.data.store.TokenStore`."""

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        ...

    @property
    def lengths(self) -> Shaped[np.ndarray, "N"]:
        """Tokens of each example."""
        ...

    @property
    def manifest(self) -> dict[str, Any]:
        """What the store says of itself."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of its contents."""
        ...

    @property
    def has_pairs(self) -> bool:
        """Whether every example is a pair of answers."""
        ...

    def cut(self, i: int) -> int:
        """Where the second answer of example i begins; 0 where there is one."""
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


def require_pairs(store: AnswerStore, method: str) -> None:
    """Raises DataError unless the examples of a store are pairs of answers."""
    if not store.has_pairs:
        raise DataError(
            f"{method} compares two answers, but this store holds single ones: read records of "
            f"kind 'preference'"
        )


def counted_targets(store: AnswerStore, i: int) -> Bool[np.ndarray, "n"]:
    """Returns which tokens of an example are targets with a weight.

    The first token of a sequence never is: nothing predicts it.
    """
    counted = store.weights(i) != 0
    for start in (0, store.cut(i)):
        counted[start : start + 1] = False
    return counted


def end_tokens(store: AnswerStore, i: int) -> Bool[np.ndarray, "n"]:
    """Returns which counted targets are the end token that the store puts behind a sequence.

    Those that a chat template wrote behind a turn are meant too.
    """
    after = store.manifest["tokenizer"].get("after", [])
    return counted_targets(store, i) & np.isin(store.tokens(i), after[-1:])


def write_token_weights(
    path: str | os.PathLike,
    store: AnswerStore,
    weights: Sequence[Float32[np.ndarray, "n"]],
    *,
    method: str,
    options: Mapping[str, Any] | None = None,
    keep: Sequence[bool] | Bool[np.ndarray, "N"] | None = None,
    channels: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> None:
    """Writes the artifact of a store that says what each of its tokens weighs.

    Args:
        path: of the file, for `data.train.0.artifact`.
        store: whose examples are meant.
        weights: of each example's tokens, in the order of the store.
        method: that found them.
        options: its options, as plain JSON values.
        keep: which examples to train on; None keeps all.
        channels: further values of tokens, which reach an objective as `batch.channels`.

    Raises:
        DataError: the numbers of examples or tokens do not fit, or a value is not finite.
        StorageError: the file cannot be written.
    """
    import tokjax

    every = range(store.num_examples)
    kept = np.ones(store.num_examples, bool) if keep is None else np.asarray(keep, bool)
    write_artifact(
        path,
        keys=[store.example_key(i) for i in every],
        names=[store.example_name(i) for i in every],
        n_tokens=store.lengths,
        scores=None,
        keep=kept,
        channels={"weights": weights, **(channels or {})},
        meta={
            "method": method,
            "options": dict(options or {}),
            "tokenizer": store.manifest["tokenizer"].get("fingerprint"),
            "stores": {"pool": store.fingerprint},
            "counts": {"examples": len(every), "kept": int(kept.sum())},
            "versions": {"tokjax": tokjax.__version__},
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )
