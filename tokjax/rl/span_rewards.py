"""From spans of an answer's text to rewards of its tokens: what dense textual feedback needs.

Used by DRLC (`drlc.py`), whose critic quotes spans, by RLFH (`rlfh.py`), which grades statements,
and by TS-GRPO (`ts_grpo.py`), which credits a plan and an answer apart. All of it runs on the host.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from tokjax.signals.spans import span_mask, without_spaces

Ranges = Sequence[tuple[int, int]]
Span = str | tuple[int, int]  # a quotation, or the characters [start, end)
Match = Literal["offset", "bag"]
MATCHES = ("offset", "bag")


def find_spans(text: str, spans: Sequence[Span]) -> list[tuple[int, int] | None]:
    """Returns where each span lies in a text, None where it does not.

    A quotation is the first occurrence that no equal quotation before it has taken; spans that
    differ may overlap. White space at its ends is ignored, and one of nothing else lies nowhere.

    >>> find_spans("bad, bad", ["bad", "bad", "bad"])
    [(0, 3), (5, 8), None]
    """
    behind: dict[str, int] = {}
    found: list[tuple[int, int] | None] = []
    for span in spans:
        if not isinstance(span, str):
            start, end = span
            found.append((start, end) if 0 <= start < end <= len(text) else None)
            continue
        quoted = span.strip()
        start = text.find(quoted, behind.get(quoted, 0)) if quoted else -1
        found.append(None if start < 0 else (start, start + len(quoted)))
        if start >= 0:
            behind[quoted] = start + len(quoted)
    return found


def offset_mask(text: str, offsets: Ranges, spans: Sequence[Span]) -> Bool[np.ndarray, " N"]:
    """Returns which tokens share a character with a span, spaces at a token's ends aside."""
    ranges = [r for r in find_spans(text, spans) if r is not None]
    return span_mask(without_spaces(offsets, text), ranges, "any")


def bag_mask(pieces: Sequence[str], spans: Sequence[str]) -> Bool[np.ndarray, " N"]:
    """Returns which tokens' texts occur anywhere within the spans, written one behind the other.

    It is how the reference code of DRLC matches: "is" counts where a span has "disliked", and so
    does every other "is" of the answer. Tokens of white space never count.
    """
    quoted = " ".join(spans)
    stripped = [piece.strip() for piece in pieces]
    return np.array([bool(piece) and piece in quoted for piece in stripped], bool)


def span_rewards(
    text: str,
    offsets: Ranges,
    pieces: Sequence[str],
    positive: Sequence[Span],
    negative: Sequence[Span],
    values: tuple[float, float],
    match: Match = "offset",
) -> Float[np.ndarray, " N"]:
    """Returns a reward for each token: a value in positive spans plus one in negative spans.

    Args:
        text: of the answer.
        offsets: characters of each token.
        pieces: text of each token, for match "bag".
        positive: spans that helped.
        negative: spans that hurt.
        values: of a token in any positive and in any negative span; several count once.
        match: "offset" goes by the characters that spans lie at, "bag" by `bag_mask`.
    """
    found = np.zeros(len(pieces), np.float32)
    for spans, value in zip((positive, negative), values, strict=True):
        if match == "bag":
            quoted = [s if isinstance(s, str) else text[s[0] : s[1]] for s in spans]
            inside = bag_mask(pieces, quoted)
        else:
            inside = offset_mask(text, offsets, spans)
        found += np.float32(value) * inside
    return found


def at_actions(
    mask: Bool[np.ndarray, "R T"], values: Sequence[np.ndarray]
) -> Float[np.ndarray, "R T"]:
    """Returns values [N] of each answer's N tokens at its actions, and 0 elsewhere.

    Raises:
        ValueError: an answer has another number of values than actions.
    """
    found = np.zeros(mask.shape, np.float32)
    for row, (actions, own) in enumerate(zip(mask, values, strict=True)):
        if len(own) != actions.sum():
            raise ValueError(f"answer {row}: {len(own)} values for {actions.sum()} actions")
        found[row, actions] = own
    return found


def token_at(offsets: Ranges, character: int) -> int:
    """Returns the token that a character lies in: the last one that begins at or before it."""
    holding = [k for k, (start, end) in enumerate(offsets) if start <= character < end]
    if holding:
        return holding[-1]
    before = [k for k, (start, _) in enumerate(offsets) if start <= character]
    return before[-1] if before else 0
