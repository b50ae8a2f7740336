"""Text cut into words, without loss: what the bytes of a hierarchical model are grouped by.

Reference: Neitemeier et al., "Hierarchical Autoregressive Transformers" (arXiv 2501.10322), and the
rule of its released splitter.
"""

import functools
import unicodedata
from typing import Any

from tokjax.errors import ConfigError

WORD, SPACE, WHITESPACE, PUNCTUATION = "word", "space", "whitespace", "punctuation"


def split_words(text: str, longest: int | None = None) -> list[bytes]:
    """Returns the words of a text as UTF-8; joined they are the text.

    Unicode's word boundaries, behind each punctuation character, and where an upper-case letter
    follows a lower-case one. A space goes with the word behind it, punctuation with what lies
    before it. A beginning of the text is split as the whole is, up to its last word.

    Args:
        text: valid Unicode.
        longest: most bytes of a word; longer ones are cut between characters where they can be.

    Raises:
        ConfigError: `longest` is below 1.

    >>> split_words("Hello, world!"), split_words("für", longest=2)
    ([b'Hello,', b' world!'], [b'f', b'\\xc3\\xbc', b'r'])
    """
    if longest is not None and longest < 1:
        raise ConfigError(f"longest={longest} bytes of a word must be at least 1")
    words: list[str] = []
    last = ""
    for piece in _pieces(text):
        kind = _kind(piece)
        follows = kind == PUNCTUATION and last in (SPACE, WORD, PUNCTUATION)
        if words and (follows or (kind == WORD and last == SPACE)):
            words[-1] += piece
        else:
            words.append(piece)
        last = kind
    if longest is None:
        return [word.encode() for word in words]
    return [part for word in words for part in cut(word, longest)]


def cut(word: str, longest: int) -> list[bytes]:
    """Returns a word as parts of at most so many bytes, cut between characters where it can be.

    >>> cut("verylongword", 10)
    [b'verylongwo', b'rd']
    """
    parts: list[bytes] = [b""]
    for character in word:
        data = character.encode()
        if len(parts[-1]) + len(data) <= longest:
            parts[-1] += data
            continue
        parts += [data[i : i + longest] for i in range(0, len(data), longest)]
    return [part for part in parts if part]


def fixed_patches(text: str, size: int) -> list[bytes]:
    """Returns a text as pieces of so many bytes, the last one shorter: the control of words.

    >>> fixed_patches("abcde", 4)
    [b'abcd', b'e']
    """
    data = text.encode()
    return [data[i : i + size] for i in range(0, len(data), size)]


def _pieces(text: str) -> list[str]:
    """Returns what is joined to words: segments by Unicode's rule, cut further."""
    pieces: list[str] = []
    for segment in _boundaries().split(text):
        start = 0
        for i in range(1, len(segment)):
            before, here = segment[i - 1], segment[i]
            if _punctuation(before) or (before.islower() and here.isupper()):
                pieces.append(segment[start:i])
                start = i
        pieces.append(segment[start:])
    merged: list[str] = []
    for piece in pieces:
        # Newer versions of the rule keep spaces together, older ones do not.
        if merged and piece.strip(" ") == "" and merged[-1].strip(" ") == "":
            merged[-1] += piece
        elif piece:
            merged.append(piece)
    return merged


def _kind(piece: str) -> str:
    if piece == " ":
        return SPACE
    if piece.isspace():
        return WHITESPACE
    return PUNCTUATION if len(piece) == 1 and _punctuation(piece) else WORD


def _punctuation(character: str) -> bool:
    return unicodedata.category(character).startswith("P")


@functools.cache
def _boundaries() -> Any:
    try:
        import regex
    except ImportError:
        raise ConfigError(
            "splitting text into words needs the package regex, which is not installed: "
            "pip install regex"
        ) from None
    return regex.compile(r"(?w)\b", flags=regex.V1)
