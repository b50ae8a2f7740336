"""Which candidate of each chunk: a filter by length, then likelihood behind what was chosen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from tokjax.errors import ConfigError, DataError
from tokjax.finetuning.r1_compress.scorers import Context, Scorer

Normalise = Literal["mean", "total"]


@dataclass(frozen=True)
class Candidate:
    """A version of a chunk.

    Attributes:
        text: with the blanks around it, so that chosen ones are joined as they are.
        tokens: its length.
    """

    text: str
    tokens: int


@dataclass(frozen=True)
class Found:
    """What a search chose.

    Attributes:
        chosen: number of the candidate of each chunk.
        score: what was maximised.
        scored_tokens: length of all candidates that a model read.
    """

    chosen: tuple[int, ...]
    score: float
    scored_tokens: int


def keep_short(lengths: Sequence[float], original: int, share: float) -> list[int]:
    """Returns which candidates a length filter keeps, in order; none where the original is to stay.

    The ceil(share x M) shortest stay, of equals the earliest, without those longer than the
    original.

    Args:
        lengths: of the M candidates, in tokens; infinite for one that was cut off.
        original: length of the chunk.
        share: of the candidates.

    >>> keep_short([12, 8, 20, 9], 15, 0.5)
    [1, 3]

    Raises:
        ConfigError: the share is not within (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"keep={share} must be above 0 and at most 1")
    count = math.ceil(share * len(lengths) - 1e-9)
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))[:count]
    return sorted(i for i in order if lengths[i] <= original)


def normalised(
    totals: Float[np.ndarray, "B N"], lengths: Sequence[int], by: Normalise
) -> Float[np.ndarray, "B N"]:
    """Returns log-probabilities of candidates as they are compared: totals, or means a token."""
    return totals / np.maximum(np.asarray(lengths), 1) if by == "mean" else totals


def search(
    chunks: Sequence[Sequence[Candidate]],
    scorer: Scorer,
    context: Context = "",
    *,
    normalise: Normalise = "mean",
    beams: int = 1,
    originals: Sequence[Candidate] | None = None,
) -> Found:
    """Returns the candidate of each chunk, chosen from left to right.

    A sequence of candidates is worth the sum of its candidates' scores; with one beam each is the
    likeliest behind those chosen before, of equals the earliest.

    Args:
        chunks: candidates of each chunk, at least one.
        scorer: of candidates behind what was chosen.
        context: what comes before the trace.
        normalise: "mean" compares log-probabilities a token, "total" those of whole candidates.
        beams: sequences that are kept at each step.
        originals: the chunks themselves, to condition on these instead of what was chosen.

    Raises:
        ConfigError: no beam, an unknown normalisation, or a chunk without candidates; what the
            scorer refuses.
        DataError: the scorer gives no number.
    """
    if normalise not in ("mean", "total") or beams < 1:
        raise ConfigError(
            f"normalise={normalise!r} must be 'mean' or 'total', and beams={beams} 1 or more"
        )
    if not all(chunks):
        raise ConfigError(
            f"chunk {next(i for i, c in enumerate(chunks) if not c)} has no candidate"
        )
    given = [list(own) for own in chunks]
    if originals is not None:
        beams = min(beams, 1)  # all contexts would be the same
        given = [[*own, original] for own, original in zip(given, originals, strict=True)]
    width = 1 << (max(map(len, given)) - 1).bit_length()
    longest = [max(c.tokens for c in own) for own in given]
    state = scorer.begin(context, beams, max(longest), sum(longest))
    values, chosen, read = np.array([0.0] + [-np.inf] * (beams - 1)), [()] * beams, 0
    for number, own in enumerate(given):
        totals, state = scorer.score(state, [c.text for c in own], width)
        if np.isnan(totals).any():
            raise DataError(f"a candidate of chunk {number} has the log-probability NaN")
        read += beams * sum(c.tokens for c in own)
        scores = values[:, None] + normalised(totals, [c.tokens for c in own], normalise)
        scores = scores[:, : len(chunks[number])]
        flat = scores.reshape(-1)
        best = np.argsort(-flat, kind="stable")[:beams]
        best = np.concatenate([best, np.zeros(beams - len(best), best.dtype)])
        values = np.where(np.arange(beams) < flat.size, flat[best], -np.inf)
        beam, pick = np.divmod(best, scores.shape[1])
        chosen = [(*chosen[b], int(c)) for b, c in zip(beam, pick, strict=True)]
        onward = np.full(beams, len(own) - 1) if originals is not None else pick
        state = scorer.choose(state, beam.tolist(), onward.tolist())
    return Found(chosen[0], float(values[0]), read)
