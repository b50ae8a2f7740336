"""Which row of which source stands at a given place of the training stream.

The stream of rows is endless; place n is computed from (row counts, rates, seed, n) without
looking at the places before it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Int

from tokjax.data.shuffle import derive_seed, mix, permute
from tokjax.errors import ConfigError

# Places of a block are shuffled among the sources; over whole blocks the counts follow the rates.
# Longer blocks would cost more to compute at a random place, shorter ones show less randomness.
BLOCK = 1024


@dataclass(frozen=True)
class Located:
    """Where places of the stream come from: arrays of one shape.

    Attributes:
        source: index of the source.
        epoch: how many times that source had been used up before this row.
        row: row within the source.
    """

    source: Int[np.ndarray, "N"]
    epoch: Int[np.ndarray, "N"]
    row: Int[np.ndarray, "N"]


class Mixture:
    """An endless stream of rows drawn from several sources at fixed rates.

    With rates, the sources of each block of 1024 places are shuffled, and over whole blocks their
    counts follow the rates: fractions of a row are carried on, so the error never grows and the
    long-run rates are exact. Each source is used up completely, in an order of its own, before it
    starts again. Without rates the sources are concatenated and used up together: every row of
    every source once per epoch.

    Args:
        row_counts: rows in each source, each at least 1.
        rates: shares of rows, positive, in any unit (0.7 and 0.3, or 7 and 3); None to
            concatenate.
        seed: any integer.
        shuffle: False reads each source in its stored order.

    Raises:
        ConfigError: no source, an empty one, or rates that are not positive finite numbers, one
            for each source.
    """

    def __init__(
        self,
        row_counts: Sequence[int],
        rates: Sequence[float] | None,
        seed: int,
        shuffle: bool = True,
    ):
        self.row_counts = np.asarray(row_counts, np.int64)
        if self.row_counts.ndim != 1 or not self.row_counts.size or self.row_counts.min() < 1:
            raise ConfigError(
                f"a mixture needs at least one source and a row in each, got {list(row_counts)}"
            )
        self.weights = None if rates is None else _integer_weights(rates, len(row_counts))
        self.seed = seed
        self.shuffle = shuffle
        self._ends = np.cumsum(self.row_counts)

    def locate(self, places: Int[np.ndarray, "N"] | Sequence[int]) -> Located:
        """Returns what stands at each of the given places (0, 1, ...) of the stream."""
        places = np.array(places, np.int64)
        if places.ndim != 1 or (places.size and places.min() < 0):
            raise ValueError("locate: places must be a one-dimensional array of numbers from 0")
        if self.weights is None:
            return self._locate_concatenated(places)
        source, draw = self._draws(places)
        epoch, row = np.divmod(draw, self.row_counts[source])
        if self.shuffle:
            for k in np.unique(source).tolist():
                mine = source == k
                stream = derive_seed(self.seed, "source", k)
                row[mine] = permute(row[mine], int(self.row_counts[k]), stream, epoch[mine])
        return Located(source, epoch, row)

    def epochs_before(self, place: int) -> list[float]:
        """Returns how often each source was passed over by the places before `place`.

        Concatenated sources share one number: they are used up together.
        """
        if self.weights is None:
            return [place / int(self._ends[-1])] * len(self.row_counts)
        block, rest = divmod(place, BLOCK)
        draws = _shares(block * BLOCK, self.weights)
        if rest:
            source, _ = self._draws(np.arange(block * BLOCK, place))
            inside = np.bincount(source, minlength=len(draws)).tolist()
            draws = [before + more for before, more in zip(draws, inside, strict=True)]
        return [d / r for d, r in zip(draws, self.row_counts.tolist(), strict=True)]

    def _locate_concatenated(self, places: Int[np.ndarray, "N"]) -> Located:
        total = int(self._ends[-1])
        epoch, index = np.divmod(places, total)
        if self.shuffle:
            stream = derive_seed(self.seed, "concatenated")
            index = permute(index, total, stream, epoch)
        source = np.searchsorted(self._ends, index, side="right")
        return Located(source, epoch, index - (self._ends - self.row_counts)[source])

    def _draws(
        self, places: Int[np.ndarray, "N"]
    ) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
        """Returns the source of each place and how many draws that source gave before it."""
        assert self.weights is not None
        if len(self.weights) == 1 or not places.size:
            return np.zeros_like(places), places
        block, offset = np.divmod(places, BLOCK)
        blocks, which = np.unique(block, return_inverse=True)
        source, draw = self._block_draws(blocks)
        return source[which, offset], draw[which, offset]

    def _block_draws(
        self, blocks: Int[np.ndarray, "U"]
    ) -> tuple[Int[np.ndarray, "U M"], Int[np.ndarray, "U M"]]:
        """Returns source and draw number of every place of the given blocks."""
        assert self.weights is not None
        low = np.array([_shares(b * BLOCK, self.weights) for b in blocks.tolist()], np.int64)
        high = np.array([_shares((b + 1) * BLOCK, self.weights) for b in blocks.tolist()], np.int64)
        high = high.reshape(low.shape)
        sources = np.arange(len(self.weights))
        ordered = np.stack([np.repeat(sources, n) for n in high - low])
        # Shuffled by sorting hashes; ties, were there any, keep their order: still deterministic.
        key = np.uint64(derive_seed(self.seed, "blocks"))
        places = (blocks[:, None] * BLOCK + np.arange(BLOCK)).astype(np.uint64)
        order = np.argsort(mix(mix(places) ^ key), axis=1, kind="stable")
        source = np.take_along_axis(ordered, order, axis=1)
        # The draws of a source follow the order of places, so that its epochs stay whole.
        by_source = np.argsort(source, axis=1, kind="stable")
        starts = np.cumsum(high - low, axis=1) - (high - low)
        rank = np.arange(BLOCK) + np.take_along_axis(low - starts, ordered, axis=1)
        draw = np.empty_like(rank)
        np.put_along_axis(draw, by_source, rank, axis=1)
        return source, draw


def _integer_weights(rates: Sequence[float], count: int) -> list[int]:
    """Returns whole-number weights in the exact proportions of the rates as they were written."""
    if len(rates) != count:
        raise ConfigError(f"{count} sources need {count} rates, got {len(rates)}: {list(rates)}")
    for number, rate in enumerate(rates):
        if not (math.isfinite(rate) and rate > 0):
            raise ConfigError(
                f"the rate of source {number} is {rate}; rates are positive finite numbers "
                "(leave a source out to give it none)"
            )
    # Through the decimal text: 0.1 means one tenth, not the nearest binary fraction.
    fractions = [Fraction(repr(float(rate))) for rate in rates]
    denominator = math.lcm(*(f.denominator for f in fractions))
    weights = [int(f * denominator) for f in fractions]
    divisor = math.gcd(*weights)
    return [w // divisor for w in weights]


def _shares(total: int, weights: Sequence[int]) -> list[int]:
    """Returns how `total` places divide among the sources: non-decreasing in `total`, sum exact.

    Each source in turn takes its exact share, rounded down, of what the earlier ones left. Rounding
    every share by largest remainder would be closer by a fraction of a row, but the share of a
    rare source can then shrink as the total grows (the Alabama paradox), which no stream can
    follow. Plain integers: no precision to lose however long the run.
    """
    shares = []
    left, weight_left = total, sum(weights)
    for weight in weights:
        share = left * weight // weight_left
        shares.append(share)
        left, weight_left = left - share, weight_left - weight
    return shares
