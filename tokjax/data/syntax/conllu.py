"""Reader of treebanks in CoNLL-U (https://universaldependencies.org/format.html)."""

import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokjax.data.files import expand_files, unreadable
from tokjax.data.syntax.tags import OTHER, Word, tag_index, tagged
from tokjax.errors import DataError

_COLUMNS = 10


@dataclass
class Sentence:
    """A sentence of a treebank.

    Attributes:
        text: as it is written.
        words: its words, those that are written as one (`don't`) split where their forms allow it.
        begins: whether a document begins with it.
        tight: whether the next sentence follows without a space.
    """

    text: str = ""
    words: list[Word] = field(default_factory=list)
    begins: bool = False
    tight: bool = False


def read_conllu(path: str | Path) -> Iterator[Sentence]:
    """Yields the sentences of a file, which may be compressed (.gz).

    The text is put together from the forms and `SpaceAfter=No`, so that every word lies where its
    characters are whatever a comment says. Tags are universal; other ones are X.

    Raises:
        DataError: the file cannot be read, or a line of it is none of CoNLL-U.
    """
    path = Path(path)
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as lines:
            yield from _sentences(lines, path)
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise unreadable(str(path), error) from error


def documents(files: Sequence[str]) -> Iterator[tuple[str, list[Word]]]:
    """Yields text and words of every document: its sentences, with a space between them.

    Args:
        files: paths or patterns. One whose comments name no documents is one document.

    Raises:
        ConfigError: a file is missing.
        DataError: a file is no treebank.
    """
    for file in expand_files(files):
        text, words, gap = "", [], ""
        for sentence in read_conllu(file):
            if sentence.begins and text:
                yield text, words
                text, words, gap = "", [], ""
            start = len(text) + len(gap)
            text += gap + sentence.text
            words += [Word(w.start + start, w.end + start, w.tags) for w in sentence.words]
            gap = "" if sentence.tight else " "
        if text:
            yield text, words


def _sentences(lines, path: Path) -> Iterator[Sentence]:
    rows: list[list[str]] = []
    begins = False
    found = False
    number = 0
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r\n")
        if line.startswith("#"):
            begins |= line[1:].strip().startswith("newdoc")
        elif line:
            row = line.split("\t")
            if len(row) != _COLUMNS:
                raise DataError(
                    f"{path}:{number}: {len(row)} columns where CoNLL-U has {_COLUMNS}: "
                    f"{line[:60]!r}. Is it a treebank?"
                )
            rows.append(row)
        elif rows:
            found = True
            yield _sentence(rows, begins, path, number)
            rows, begins = [], False
    if rows:
        found = True
        yield _sentence(rows, begins, path, number)
    if not found:
        raise DataError(f"{path} holds no sentence in CoNLL-U")


def _sentence(rows: list[list[str]], begins: bool, path: Path, number: int) -> Sentence:
    sentence = Sentence(begins=begins)
    inside = 0  # the last word of the range that is being read
    waiting: list[tuple[str, int]] = []
    surface, gap = "", True

    def close() -> None:
        """Places the words of a range in its surface."""
        nonlocal waiting
        start = len(sentence.text) - len(surface)
        if "".join(form for form, _ in waiting) == surface:
            for form, tag in waiting:
                sentence.words.append(tagged(start, start + len(form), tag))
                start += len(form)
        else:
            end = len(sentence.text)
            sentence.words += [tagged(start, end, tag) for _, tag in waiting]
        waiting = []

    for row in rows:
        label, form, upos = row[0], row[1], row[3]
        if "." in label:
            continue  # an empty node is not written
        spaced = "SpaceAfter=No" not in row[9].split("|")
        first, _, last = label.partition("-")
        try:
            at, until = int(first), int(last or first)
        except ValueError:
            raise DataError(
                f"{path}, sentence that ends in line {number}: {label!r} numbers no word"
            ) from None
        tag = tag_index(upos)
        if last:
            inside, surface = until, form
            sentence.text, gap = _with(sentence.text, form, gap), spaced
        elif at <= inside:
            waiting.append((form, OTHER if tag is None else tag))
            if at == inside:
                close()
        else:
            sentence.text, gap = _with(sentence.text, form, gap), spaced
            end = len(sentence.text)
            sentence.words.append(tagged(end - len(form), end, OTHER if tag is None else tag))
    sentence.tight = not gap
    return sentence


def _with(text: str, form: str, gap: bool) -> str:
    return f"{text} {form}" if text and gap else text + form
