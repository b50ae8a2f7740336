"""The two halves of early stopping: what an attempt says of itself, and what follows from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Bool, Float

from tokjax.decoding.confidence.entropy import sequence_entropy, top_entropy
from tokjax.decoding.context import Context
from tokjax.decoding.engine import Generation
from tokjax.errors import ConfigError


class Signal(Protocol):
    """What an attempt says about itself: one number a row.

    Attributes:
        record: what `decode` has to record for it, by name.
    """

    @property
    def record(self) -> Mapping[str, Callable[[Context], Any]]:
        """See above."""
        ...

    def __call__(self, generation: Generation) -> Float[np.ndarray, "B"]:
        """Returns the signal of each row, on the host."""
        ...


class Policy(Protocol):
    """Which rows are finished."""

    def __call__(self, signal: Float[np.ndarray, "B"], step: int) -> Bool[np.ndarray, "B"]:
        """Returns true for rows that stop behind this step, the first being 1."""
        ...


@dataclass(frozen=True)
class MeanEntropy:
    """The mean over an attempt's tokens of the entropy of the k likeliest, in nats."""

    k: int = 20
    renormalise: bool = True

    @property
    def record(self) -> Mapping[str, Callable[[Context], Any]]:
        """What `decode` records."""
        return {"top_entropy": top_entropy(self.k, renormalise=self.renormalise)}

    def __call__(self, generation: Generation) -> Float[np.ndarray, "B"]:
        """Returns it for each row; +inf for an attempt without tokens."""
        return sequence_entropy(generation.recorded["top_entropy"], generation.mask)


@dataclass(frozen=True)
class StopBelow:
    """Stops rows whose signal is at most the threshold; see `stop_below`."""

    threshold: float
    after: Literal["each", "first"] = "each"

    def __call__(self, signal: Float[np.ndarray, "B"], step: int) -> Bool[np.ndarray, "B"]:
        """Returns true for rows that stop behind this step."""
        asked = self.after == "each" or step == 1
        return (np.asarray(signal) <= self.threshold) & asked


def stop_below(threshold: float, *, after: Literal["each", "first"] = "each") -> Policy:
    """Returns the policy that stops where the signal is at most `threshold`.

    -inf never stops, +inf stops behind the first step.

    Args:
        threshold: `calibrate(...).threshold`, for example.
        after: decide behind each step, or behind the first alone.

    Raises:
        ConfigError: the threshold is NaN, or there is no such `after`.

    Reference: "Think Just Enough", arXiv 2510.08146.
    """
    if np.isnan(threshold) or after not in ("each", "first"):
        raise ConfigError(
            f"threshold={threshold} must be a number and after={after!r} 'each' or 'first'"
        )
    return StopBelow(float(threshold), after)
