"""The twelve universal tags, what other tag sets are in them, and tags of subwords.

Reference: Petrov, Das and McDonald, "A Universal Part-of-Speech Tagset", arXiv 1104.2086.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

UNIVERSAL = ("NOUN", "VERB", "ADJ", "ADV", "PRON", "DET", "ADP", "NUM", "CONJ", "PRT", ".", "X")
OTHER = UNIVERSAL.index("X")

# Universal Dependencies' tags (https://universaldependencies.org/u/pos) that have another name.
_UPOS = {
    "PROPN": "NOUN",
    "AUX": "VERB",
    "CCONJ": "CONJ",
    "SCONJ": "CONJ",
    "PART": "PRT",
    "PUNCT": ".",
    "SYM": "X",
    "INTJ": "X",
}
_INDEX = {tag: i for i, tag in enumerate(UNIVERSAL)}
_INDEX |= {name: _INDEX[tag] for name, tag in _UPOS.items()}


def tag_index(tag: str) -> int | None:
    """Returns the number of a universal tag, or of a UPOS tag's universal one; None for others.

    >>> UNIVERSAL[tag_index("PROPN")], tag_index("NNP")
    ('NOUN', None)
    """
    return _INDEX.get(tag)


@dataclass(frozen=True)
class Word:
    """A word of a text and its tags.

    Attributes:
        start: its first character.
        end: the character behind its last.
        tags: (number of a tag, probability), which sum to 1; one tag where it is known.
    """

    start: int
    end: int
    tags: tuple[tuple[int, float], ...]


def tagged(start: int, end: int, tag: int) -> Word:
    """Returns a word whose tag is known."""
    return Word(start, end, ((tag, 1.0),))


def count_tags(
    counts: Float64[np.ndarray, "V K"],
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    text: str,
    words: Iterable[Word],
) -> None:
    """Adds the tokens of a text to the counts of their words' tags.

    A token belongs to the word that most of its characters are in (blanks around it aside); where
    several hold equally many, each gets an equal part, as do the words that are written as one.
    Tokens of blanks alone, and those outside all words, are of the last tag (X); tokens without
    characters, which are special, are not counted.

    Args:
        counts: of each id with each tag; changed in place.
        ids: tokens.
        offsets: range of the characters of each.
        text: that they make up.
        words: in the order of the text.
    """
    last = counts.shape[1] - 1
    ordered = list(words)
    at = 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        if start == end:
            continue
        piece = text[start:end]
        start, end = end - len(piece.lstrip()), start + len(piece.rstrip())
        while at < len(ordered) and ordered[at].end <= start:
            at += 1
        best, most = [], 0
        k = at
        while k < len(ordered) and ordered[k].start < end:
            shared = min(end, ordered[k].end) - max(start, ordered[k].start)
            if shared > most:
                best, most = [], shared
            if shared == most and most:
                best.append(ordered[k])
            k += 1
        if not best:
            counts[token, last] += 1.0
        for word in best:
            for tag, share in word.tags:
                counts[token, tag] += share / len(best)
