"""From wrong words to wrong phrases: the shortest that a dependency tree holds together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from tokjax.errors import DataError
from tokjax.files import storage_errors
from tokjax.finetuning.quality_estimation.tags import Severity

Parser = Callable[[Sequence[str]], Sequence[int]]
"""words -> the head of each, counted from 1; 0 for a root."""

WEIGHTS: Mapping[Severity, float] = {
    Severity.MINOR: 0.1,
    Severity.MAJOR: 1.0,
    Severity.CRITICAL: 5.0,
}


class Span(NamedTuple):
    """An error: words from `start` up to `stop`."""

    start: int
    stop: int
    severity: Severity


def covered(heads: Sequence[int], first: int, last: int) -> tuple[int, int]:
    """Returns the first and the last word of the phrase that covers two words.

    Words between the two, their lowest common ancestor and the ways to it belong to it, and so on
    until nothing is added. Several roots are joined above the sentence, which adds no word.

    Args:
        heads: of each word, counted from 1; 0 for a root.
        first: number of a word, counted from 1.
        last: of a word not before it.

    >>> covered([2, 0, 2, 3], 1, 4), covered([2, 0, 2, 3], 3, 4)
    ((1, 4), (3, 4))
    """
    ways = {}
    while True:
        for word in range(first, last + 1):
            if word not in ways:
                ways[word] = _way(heads, word)
        inside = [ways[word] for word in range(first, last + 1)]
        shared = set(inside[0]).intersection(*inside[1:])
        # A way leads upwards: of the shared nodes the lowest is met first.
        top = next(i for i, node in enumerate(inside[0]) if node in shared)
        ancestor = inside[0][top]
        nodes = {ancestor}
        for way in inside:
            nodes.update(way[: way.index(ancestor)])
        nodes.discard(0)
        wider = min(nodes), max(nodes)
        if wider == (first, last):
            return wider
        first, last = wider


def error_spans(
    severities: Int[np.ndarray, "W"] | Sequence[int], heads: Sequence[int] | None = None
) -> list[Span]:
    """Returns the errors of a sentence, in order.

    With a tree, each run of wrong words is widened to the phrase that covers it, which is as bad as
    the worst word in it; the search for the next goes on behind the phrase. Without, each run of
    words of one severity is an error.

    Args:
        severities: of the words.
        heads: of the words, counted from 1; 0 for a root.

    Raises:
        DataError: the heads are those of no tree of these words.

    Reference: arXiv 2502.19941.
    """
    found, spans, at = np.array(severities), [], 0
    if heads is not None:
        check_heads(heads, len(found))
    while at < len(found):
        if found[at] == Severity.OK:
            at += 1
            continue
        stop = at + 1
        while stop < len(found) and (
            found[stop] if heads is not None else found[stop] == found[at]
        ):
            stop += 1
        start = at
        if heads is not None:
            start, stop = covered(heads, at + 1, stop)
            start -= 1
        worst = Severity(int(found[start:stop].max()))
        found[start:stop] = worst  # a later phrase may reach back into this one
        spans.append(Span(start, stop, worst))
        at = stop
    return spans


def span_severities(spans: Sequence[Span], count: int) -> Int[np.ndarray, "W"]:
    """Returns the severity of each of `count` words: that of the worst error it is in."""
    found = np.zeros(count, np.int64)
    for start, stop, severity in spans:
        found[start:stop] = np.maximum(found[start:stop], severity)
    return found


def sentence_score(
    spans: Sequence[Span], count: int, weights: Mapping[Severity, float] = WEIGHTS
) -> float:
    """Returns 1 less the weights of a sentence's errors over its number of words.

    >>> minor, major = Span(0, 2, Severity.MINOR), Span(4, 5, Severity.MAJOR)
    >>> sentence_score([minor, major], 10), sentence_score([], 10)
    (0.89, 1.0)
    """
    if count < 1:
        raise DataError("a sentence without words has no score")
    return 1.0 - sum(weights[span.severity] for span in spans) / count


def check_heads(heads: Sequence[int], count: int) -> None:
    """Raises where heads are those of no tree of `count` words.

    Raises:
        DataError: there are too many or too few, one is no word, or they form a circle.
    """
    if len(heads) != count:
        raise DataError(
            f"{len(heads)} heads for {count} words: the parser must keep the words as they are, "
            f"and in one sentence"
        )
    for word, head in enumerate(heads, 1):
        if not 0 <= head <= count:
            raise DataError(f"word {word} of {count} has the head {head}")
    for word in range(1, count + 1):
        _way(heads, word)


def conllu_parser(path: Path | str) -> Parser:
    """Returns a parser that looks sentences up in a CoNLL-U file.

    Ranges of words (1-2) and empty nodes (1.1) are left out.

    Raises:
        DataError: a line is none of the format. (The parser raises it too, for a sentence that is
            not in the file.)
        StorageError: the file cannot be read.
    """
    trees = {tuple(words): heads for words, heads in _sentences(Path(path))}

    def parse(words: Sequence[str]) -> Sequence[int]:
        if tuple(words) not in trees:
            raise DataError(f"{path} has no tree of the sentence {' '.join(words)!r}: parse it too")
        return trees[tuple(words)]

    return parse


def _sentences(path: Path) -> Iterator[tuple[list[str], list[int]]]:
    with storage_errors(path, "read", "Name a readable file."):
        lines = path.read_text(encoding="utf-8").splitlines()
    words, heads = [], []
    for number, line in enumerate([*lines, ""], 1):
        if not line.strip():
            if words:
                yield words, heads
            words, heads = [], []
            continue
        if line.startswith("#"):
            continue
        fields: list[Any] = line.split("\t")
        if len(fields) != 10:
            raise DataError(f"{path}, line {number}: {len(fields)} fields, CoNLL-U has 10")
        if not fields[0].isdigit():
            continue
        if int(fields[0]) != len(words) + 1 or not fields[6].isdigit():
            raise DataError(
                f"{path}, line {number}: word {fields[0]!r} with head {fields[6]!r}, expected "
                f"word {len(words) + 1} with the number of its head"
            )
        words.append(fields[1])
        heads.append(int(fields[6]))


def _way(heads: Sequence[int], word: int) -> list[int]:
    """Returns the nodes from a word up to 0."""
    way = [word]
    while way[-1]:
        way.append(heads[way[-1] - 1])
        if len(way) > len(heads) + 1:
            raise DataError(f"the heads above word {word} form a circle")
    return way
