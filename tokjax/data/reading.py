"""Reading the records of each source in order; none of it but `tfds` imports TensorFlow."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from tokjax.data.arithmetic import ArithmeticSource, solved, text_of
from tokjax.data.copying import CopySource, copies
from tokjax.data.files import expand_files, numbered_lines, read_bytes, unreadable
from tokjax.data.records import BadRecord, to_document
from tokjax.data.sources import (
    Document,
    JsonlSource,
    ParquetSource,
    Problem,
    RecordSource,
    StdlibSource,
    TextSource,
    TfdsSource,
    make_key,
    namespace,
)
from tokjax.errors import ConfigError, DataError, nearest

_PARQUET_ROWS = 1024  # rows in memory at a time
_NO_RECORDS = "no records in the file"


def read(source: Any) -> Iterator[Document | Problem]:
    """Yields what a source holds, in order; see `tokjax.data.sources.read_documents`."""
    if isinstance(source, StdlibSource):
        yield from _stdlib(source)
    elif isinstance(source, ArithmeticSource):
        yield from _arithmetic(source)
    elif isinstance(source, CopySource):
        yield from _copies(source)
    elif isinstance(source, TfdsSource):
        from tokjax.data.tfds_records import tfds_records

        for name, record in tfds_records(source):
            yield _document(record, source, name)
    elif isinstance(source, TextSource | JsonlSource | ParquetSource):
        for file in expand_files(source.files):
            empty = True
            for item in _READERS[type(source)](file, source):
                empty = False
                yield item
            if empty:
                yield Problem(file, _NO_RECORDS, "remove it from the source")
    else:
        raise TypeError(f"a {type(source).__name__} has no records of its own")


def _stdlib(source: StdlibSource) -> Iterator[Document]:
    from tokjax.data.stdlib_corpus import documents, split_of

    for name, text in documents(source.parts):
        if source.split == "all" or split_of(name, source.validation_share) == source.split:
            yield Document(name, make_key(namespace(source), text), text)


def _arithmetic(source: ArithmeticSource) -> Iterator[Document]:
    for found in solved(source):
        text, start, placed = text_of(source, found)
        key = make_key(namespace(source), found.question)
        counted = ((start, len(text), 1.0),)
        yield Document(found.question, key, text, weights=counted, insertion=placed)


def _copies(source: CopySource) -> Iterator[Document]:
    for question, answer in copies(source):
        answered = (len(question), len(question) + len(answer), 1.0)
        key = make_key(namespace(source), question)
        yield Document(question, key, question + answer, weights=(answered,))


def _text(file: str, source: TextSource) -> Iterator[Document | Problem]:
    if source.per == "file":
        data = read_bytes(file)
        if data.strip():
            yield _plain(file, 1, data, source)
        return
    paragraph: list[bytes] = []
    first = 1
    for number, line in numbered_lines(file):
        if source.per == "line":
            if line.strip():
                yield _plain(f"{file}:{number}", number, line.rstrip(b"\r\n"), source)
        elif line.strip():
            first = first if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield _paragraph(file, first, paragraph, source)
            paragraph = []
    if paragraph:
        yield _paragraph(file, first, paragraph, source)


def _paragraph(file: str, first: int, lines: list[bytes], source: TextSource) -> Document | Problem:
    return _plain(f"{file}:{first}", first, b"".join(lines).rstrip(b"\r\n"), source)


def _plain(name: str, line: int, data: bytes, source: TextSource) -> Document | Problem:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return _not_utf8(name, data, line, error)
    return Document(name, make_key(namespace(source), text), text)


def _not_utf8(name: str, data: bytes, line: int, error: UnicodeDecodeError) -> Problem:
    at = line + data.count(b"\n", 0, error.start)
    if line == 1 and data.startswith(b"\x1f\x8b"):
        return Problem(name, "invalid UTF-8", "it is compressed by gzip: its name must end in .gz")
    return Problem(
        name, "invalid UTF-8", f"byte 0x{data[error.start]:02x} in line {at}; convert the file"
    )


def _jsonl(file: str, source: JsonlSource) -> Iterator[Document | Problem]:
    for number, line in numbered_lines(file):
        if not line.strip():
            continue  # a blank line is no record, and most files end in one
        name = f"{file}:{number}"
        try:
            record = json.loads(line.decode().rstrip(), object_pairs_hook=_without_repeats)
        except UnicodeDecodeError as error:
            yield _not_utf8(name, line, number, error)
        except (ValueError, RecursionError) as error:
            detail = str(error)
            if isinstance(error, json.JSONDecodeError):
                detail = f"{error.msg} (column {error.colno})"
            elif isinstance(error, _RepeatedKey):
                yield Problem(name, "a key occurs twice", detail)
                continue
            if number == 1 and line.lstrip().startswith(b"["):
                detail += "; the file seems to be one JSON array: write one object a line instead"
            yield Problem(name, "broken JSON", detail)
        else:
            yield _document(record, source, name)


class _RepeatedKey(ValueError):
    pass


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Python would keep the last value and drop the others without a word.
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(f"it is {next(key for key in keys if keys.count(key) > 1)!r}")
    return found


def _parquet(file: str, source: ParquetSource) -> Iterator[Document | Problem]:
    import pyarrow
    import pyarrow.parquet

    if file.endswith(".gz"):
        raise ConfigError(f"{file}: a Parquet file is compressed inside; unpack it with gunzip")
    try:
        table = pyarrow.parquet.ParquetFile(file)
        present = table.schema_arrow.names
        for field in source.fields:
            if field not in present:
                raise ConfigError(f"{file} has no column {field!r}.{nearest(field, present)}")
        wanted = {*source.fields, *source.optional_fields}
        columns = [name for name in present if name in wanted]
        row = 0
        for batch in table.iter_batches(_PARQUET_ROWS, columns=columns):
            for record in batch.to_pylist():
                yield _document(record, source, f"{file}#{row}")
                row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(file, error) from error


def _document(record: Any, source: RecordSource, name: str) -> Document | Problem:
    try:
        return to_document(record, source, name)
    except BadRecord as error:
        return Problem(name, error.reason, error.detail)


_READERS: dict[type, Any] = {TextSource: _text, JsonlSource: _jsonl, ParquetSource: _parquet}


class SeenKeys:
    """A set of 64-bit keys that stays small: a sorted array and the few that came last."""

    def __init__(self):
        self._sorted = np.zeros(0, np.uint64)
        self._recent: set[int] = set()

    def add(self, key: int) -> bool:
        """Adds a key and returns whether it was new."""
        if key in self._recent:
            return False
        at = int(np.searchsorted(self._sorted, np.uint64(key)))
        if at < self._sorted.size and int(self._sorted[at]) == key:
            return False
        self._recent.add(key)
        # Merging at a share of the size keeps the total work of all merges linear.
        if len(self._recent) > max(1 << 16, self._sorted.size // 8):
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]))
            self._recent.clear()
        return True


def record_error(problem: Problem) -> DataError:
    """Returns the error for a bad record that stops the work."""
    end = "" if problem.detail.endswith((".", "?")) else "."
    return DataError(
        f"{problem}{end} Mend the record, or set on_error='skip' to leave bad records out (they "
        "are counted and listed)."
    )
