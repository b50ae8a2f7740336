"""Tiny Shakespeare as words."""

import gzip
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokjax.errors import ConfigError

_WORD = re.compile(r"[a-z']+|[^\w\s]")


def shakespeare_lines() -> list[list[str]]:
    """Returns the words of each line, in small letters; punctuation marks are words.

    Raises:
        ConfigError: the text is not there.
    """
    with gzip.open(_path(), "rt") as file:
        return [_WORD.findall(line.lower()) for line in file if line.strip()]


def whole_text() -> str:
    """Returns the text as it stands.

    Raises:
        ConfigError: it is not there.
    """
    with gzip.open(_path(), "rt") as file:
        return file.read()


def most_frequent(lines: Iterable[Sequence[str]], size: int) -> list[str]:
    """Returns the most frequent words, the most frequent first; ties as in the alphabet.

    >>> most_frequent([["b", "a"], ["c", "b"]], 2)
    ['b', 'a']
    """
    counts = Counter(word for line in lines for word in line)
    return sorted(counts, key=lambda word: (-counts[word], word))[:size]


def _path() -> Path:
    path = Path(os.environ.get("TOKJAX_TEST_DATA", "")) / "tinyshakespeare" / "input.txt.gz"
    if not path.is_file():
        raise ConfigError(
            "Tiny Shakespeare is not there: set TOKJAX_TEST_DATA to a folder that holds "
            "tinyshakespeare/input.txt.gz (karpathy/char-rnn, data/tinyshakespeare/input.txt)"
        )
    return path
