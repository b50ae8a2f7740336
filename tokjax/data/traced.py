"""Strings that remember, character by character, where their text came from.

A chat template is a program; what it does with a message (trim it, split it, join it) cannot be
known from outside. Text whose every character carries a mark through those operations shows in
the rendered result which characters a message wrote and which the template wrote. An operation
that is not known here gives plain text without marks, never wrong marks.
"""

from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex

PLAIN = "\0"


class Traced(str):
    """A string with a mark for each of its characters.

    The marks are a parallel string of the same length, so that slicing and joining them costs what
    slicing and joining text costs; chr(0) marks text of unknown or the template's own making.
    """

    marks: str

    def __new__(cls, text: str, marks: str):
        """Returns `text` with `marks`.

        Raises:
          ValueError: they differ in length.
        """
        if len(text) != len(marks):
            raise ValueError(f"{len(text)} characters with {len(marks)} marks")
        self = super().__new__(cls, text)
        self.marks = marks
        return self

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> "Traced":
        return concat((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> "Traced":
        return concat((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> "Traced":
        return Traced(str.__mul__(self, count), self.marks * int(count))

    __rmul__ = __mul__  # type: ignore[assignment]

    def __getitem__(self, key: Any) -> "Traced":
        return Traced(str.__getitem__(self, key), self.marks[key])

    def __iter__(self) -> Iterator["Traced"]:
        return (self[k] for k in range(len(self)))

    def join(self, parts: Iterable[str]) -> "Traced":
        """As `str.join`."""
        joined: list[str] = []
        for part in parts:
            joined += [self, part] if joined else [part]
        return concat(joined)

    def strip(self, chars: str | None = None) -> "Traced":
        """As `str.strip`."""
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> "Traced":
        """As `str.lstrip`."""
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None) -> "Traced":
        """As `str.rstrip`."""
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str) -> "Traced":
        """As `str.removeprefix`."""
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> "Traced":
        """As `str.removesuffix`."""
        return self[: len(self) - len(suffix)] if suffix and self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> "list[str]":
        """As `str.split`."""
        pieces = str.split(self, sep, maxsplit)
        return self._words(pieces) if sep is None else self._consecutive(pieces, len(sep))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> "list[str]":
        """As `str.rsplit`."""
        pieces = str.rsplit(self, sep, maxsplit)
        return self._words(pieces) if sep is None else self._consecutive(pieces, len(sep))

    def splitlines(self, keepends: bool = False) -> "list[str]":
        """As `str.splitlines`."""
        whole = self._consecutive(str.splitlines(self, keepends=True), 0)
        if keepends:
            return whole
        bare = str.splitlines(self)
        return [line[: len(text)] for line, text in zip(whole, bare, strict=True)]

    def partition(self, sep: str) -> "tuple[str, str, str]":
        """As `str.partition`."""
        head, found, tail = self._consecutive(str.partition(self, sep), 0)
        return head, found, tail

    def rpartition(self, sep: str) -> "tuple[str, str, str]":
        """As `str.rpartition`."""
        head, found, tail = self._consecutive(str.rpartition(self, sep), 0)
        return head, found, tail

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:  # type: ignore[override]
        """As `str.replace`; replacing the empty string loses the marks."""
        if not old:
            return str.replace(self, old, new, count)
        return concat([new]).join(self.split(old, count))

    def lower(self) -> str:
        """As `str.lower`."""
        return self._same_length(str.lower(self))

    def upper(self) -> str:
        """As `str.upper`."""
        return self._same_length(str.upper(self))

    def capitalize(self) -> str:
        """As `str.capitalize`."""
        return self._same_length(str.capitalize(self))

    def title(self) -> str:
        """As `str.title`."""
        return self._same_length(str.title(self))

    def _same_length(self, text: str) -> str:
        return Traced(text, self.marks) if len(text) == len(self) else text

    def _consecutive(self, pieces: Iterable[str], gap: int) -> list[str]:
        """Returns the marked pieces, which make up this string with `gap` characters between."""
        found: list[str] = []
        start = 0
        for piece in pieces:
            found.append(self[start : start + len(piece)])
            start += len(piece) + gap
        return found

    def _words(self, pieces: Iterable[str]) -> list[str]:
        """Returns the marked pieces, which only blanks separate."""
        found: list[str] = []
        start = 0
        for piece in pieces:
            start = self.index(piece, start)  # blanks lie before it, so the first find is it
            found.append(self[start : start + len(piece)])
            start += len(piece)
        return found


def concat(parts: Iterable[str]) -> Traced:
    """Returns the parts joined, plain ones marked as such."""
    parts = list(parts)
    marks = (p.marks if isinstance(p, Traced) else PLAIN * len(p) for p in parts)
    return Traced("".join(parts), "".join(marks))


def marked(text: str, mark: str) -> Traced:
    """Returns `text` with every character marked by the one-character string `mark`."""
    return Traced(text, mark * len(text))
