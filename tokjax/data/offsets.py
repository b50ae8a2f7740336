"""Character ranges of tokens, from the bytes each token stands for."""

import codecs
from collections.abc import Sequence
from typing import Any

import numpy as np

Offsets = list[tuple[int, int]]


def offsets_from_bytes(text: str, pieces: Sequence[bytes]) -> Offsets:
    """Returns for each piece the range [start, end) of the characters of `text` it touches.

    A character whose UTF-8 bytes lie in several pieces belongs to the range of each of them; a
    piece without bytes has an empty range where it stands. Ranges are monotone and cover `text`.

    Args:
      text: the text whose UTF-8 bytes the pieces are, one after another.
      pieces: the bytes of each token.

    >>> offsets_from_bytes("aé", [b"a", bytes([0xC3]), bytes([0xA9])])
    [(0, 1), (1, 2), (1, 2)]
    """
    data = text.encode("utf-8")
    ends = np.cumsum(np.fromiter(map(len, pieces), np.int64, count=len(pieces)))
    starts = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    if len(data) != len(text):
        leads = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80  # every byte that begins a character
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(leads)])
        empty = ends == starts
        # `before[k]` counts the characters that begin before byte k, so the character holding
        # byte k is number before[k + 1] - 1, and a range that ends at byte k ends at before[k].
        within = np.minimum(starts + 1, len(data))
        starts = np.where(empty, before[starts], before[within] - 1)
        ends = np.where(empty, starts, before[ends])
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def monotone(ranges: Sequence[tuple[int, int]]) -> Offsets:
    """Returns the ranges with no start or end smaller than the one before it."""
    start = end = 0
    result = []
    for a, b in ranges:
        start, end = max(start, a), max(end, a, b)
        result.append((start, end))
    return result


def offsets_of_ids(tokenizer: Any, ids: Sequence[int]) -> Offsets:
    """Returns for each id the range of the characters of `tokenizer.decode(ids)` it stands for.

    A character whose bytes lie in several tokens belongs to each of them; special tokens have an
    empty range. Where a tokenizer does not decode by bytes, a token has the characters that it adds
    to the text of the tokens before it.
    """
    text = tokenizer.decode(ids)
    if not tokenizer.decodes_by_bytes:
        ends = [min(len(tokenizer.decode(ids[: k + 1])), len(text)) for k in range(len(ids))]
        return monotone(list(zip([0, *ends], ends, strict=False)))
    # The bytes of a model's answer need not be valid: they are read as decoding reads them.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    ranges, read = [], 0
    for i in ids:
        start, piece = read, tokenizer.token_bytes(i)
        read += len(decoder.decode(piece))
        unfinished = bool(piece) and bool(decoder.getstate()[0])
        ranges.append((start, read + unfinished))
    read += len(decoder.decode(b"", final=True))
    dropped = read - len(text)  # the space before a text that decoding takes away
    return [(max(start - dropped, 0), max(end - dropped, 0)) for start, end in ranges]
