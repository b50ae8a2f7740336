"""Synthetic data of quality estimation: near translations, their errors, and how bad they are."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokjax.errors import ConfigError, DataError
from tokjax.files import AppendFile, storage_errors
from tokjax.finetuning.quality_estimation.phrases import (
    WEIGHTS,
    Parser,
    Span,
    error_spans,
    sentence_score,
    span_severities,
)
from tokjax.finetuning.quality_estimation.tags import (
    Severity,
    edited_words,
    severities,
    word_severities,
)
from tokjax.finetuning.quality_estimation.translators import ReferencedSearch, Translator
from tokjax.models.digests import digest, sampled_digest
from tokjax.training.progress import Progress

Segmented = tuple[Sequence[str], Sequence[int]]
_HEADER = "tokjax_quality_estimation"
_REMEDY = "Name a readable file."


@dataclass(frozen=True)
class Pair:
    """A source and its reference, as ids of the translators' vocabulary, without end tokens."""

    source: Sequence[int]
    reference: Sequence[int]


@dataclass(frozen=True)
class Judged:
    """A translation with its errors.

    Attributes:
        source: ids.
        hypothesis: ids.
        words: of the hypothesis.
        severities: of the words; 0 is OK.
        spans: the errors.
        end: severity of what is missing: that of ending there.
        score: 1 without errors, unbounded below.
    """

    source: tuple[int, ...]
    hypothesis: tuple[int, ...]
    words: tuple[str, ...]
    severities: tuple[int, ...]
    spans: tuple[Span, ...]
    end: int
    score: float

    @property
    def tags(self) -> list[bool]:
        """Which words are bad."""
        return [severity > 0 for severity in self.severities]


@dataclass(frozen=True, eq=False)
class Synthesis:
    """How pairs become judged translations.

    The generator must not be its own annotator: it finds its own errors likely.

    Attributes:
        generator: translates.
        annotator: another model of the same vocabulary, whose ranks say how bad an edited word is.
            None calls every edited word a major error.
        words: ids -> (words, number of the word that each id belongs to).
        parser: words -> their heads; None leaves errors as wide as the edited words.
        search: how the generator translates.
        bounds: first ranks of minor, major and critical errors.
        weights: of an error by its severity, in the score.
        unknown: ids whose sentences are left out.
    """

    generator: Translator = field(repr=False)
    annotator: Translator | None = field(repr=False)
    words: Callable[[Sequence[int]], Segmented]
    parser: Parser | None = None
    search: ReferencedSearch = ReferencedSearch()
    bounds: tuple[int, int, int] = (4, 8, 30)
    weights: Mapping[Severity, float] = field(default_factory=lambda: dict(WEIGHTS))
    unknown: frozenset[int] = frozenset()

    def judged(self, pairs: Sequence[Pair]) -> list[Judged | None]:
        """Returns each pair's translation with its errors.

        None stands for one that holds an unknown token, is empty, or did not end in time.
        """
        sources = [pair.source for pair in pairs]
        made = self.generator.translate(sources, [pair.reference for pair in pairs], self.search)
        return self.judge(pairs, made)

    def judge(
        self, pairs: Sequence[Pair], hypotheses: Sequence[Sequence[int] | None]
    ) -> list[Judged | None]:
        """Returns given translations with their errors; for None see `judged`."""
        left_out = [not made or not self.unknown.isdisjoint(made) for made in hypotheses]
        kept = [
            (pair, list(made or ()))
            for pair, made, out in zip(pairs, hypotheses, left_out, strict=True)
            if not out
        ]
        # As many rows as there are pairs: one program for all batches.
        filling = [(Pair((0,), (0,)), [0])] * (len(pairs) - len(kept))
        rows = [*kept, *filling]
        ranks: Sequence[Any] = [None] * len(rows)
        if self.annotator is not None and kept:
            ranks = self.annotator.ranks([p.source for p, _ in rows], [made for _, made in rows])
        found = iter(
            [self._one(pair, made, of) for (pair, made), of in zip(kept, ranks, strict=False)]
        )
        return [None if out else next(found) for out in left_out]

    def _one(self, pair: Pair, made: list[int], ranks: Any) -> Judged:
        words, numbers = self.words(made)
        changed, missing = edited_words(words, self.words(pair.reference)[0])
        if ranks is None:
            of_words, end = changed * int(Severity.MAJOR), int(missing) * int(Severity.MAJOR)
        else:
            of_tokens = severities(ranks[:-1], changed[list(numbers)], self.bounds)
            of_words = word_severities(of_tokens, numbers, len(words))
            end = int(severities(ranks[-1:], missing, self.bounds)[0])  # type: ignore[arg-type]
        heads = None if self.parser is None else self.parser(words)
        spans = error_spans(of_words, heads)
        return Judged(
            source=tuple(int(i) for i in pair.source),
            hypothesis=tuple(int(i) for i in made),
            words=tuple(words),
            severities=tuple(int(s) for s in span_severities(spans, len(words))),
            spans=tuple(spans),
            end=end,
            score=sentence_score(spans, len(words), self.weights),
        )

    def identity(self) -> dict[str, Any]:
        """Returns what decides the data besides the pairs and the callables, as plain values."""
        of = lambda t: None if t is None else [repr(t.model), sampled_digest(t.params)]  # noqa: E731
        return {
            "generator": of(self.generator),
            "annotator": of(self.annotator),
            "search": asdict(self.search),
            "bounds": list(self.bounds),
            "weights": {Severity(s).name: weight for s, weight in self.weights.items()},
            "unknown": sorted(self.unknown),
            "phrases": self.parser is not None,
        }


def write_synthetic(
    path: Path | str,
    pairs: Sequence[Pair],
    synthesis: Synthesis,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> tuple[int, int]:
    """Writes a JSONL file of judged translations; returns how many there are, and are left out.

    The first line says how the data was made. A file that is there is continued behind its last
    whole line, with the same data as without a stop.

    Args:
        path: of the file.
        pairs: what to translate, a line each.
        synthesis: how.
        batch_size: pairs that are translated at once.
        progress: whether to show it.

    Raises:
        ConfigError: the file was made otherwise.
        DataError: it is none of these files.
        StorageError: it cannot be read or written.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    path = Path(path)
    ids = [i for pair in pairs for i in (len(pair.source), *pair.source, *pair.reference)]
    told = synthesis.identity() | {"pairs": digest(ids), "batch_size": batch_size}
    lines = _whole_lines(path)
    if lines:
        _check_header(path, lines[0], told)
    done = max(len(lines) - 1, 0)
    left_out = sum("left_out" in json.loads(line) for line in lines[1:])
    file = AppendFile(path)
    try:
        if not lines:
            file.append(_line({_HEADER: told}))
        with Progress(len(pairs), enabled=progress) as shown:
            # Batches are always the same pairs, wherever an earlier call stopped.
            for first in range(done // batch_size * batch_size, len(pairs), batch_size):
                batch = pairs[first : first + batch_size]
                filled = [*batch, *[batch[-1]] * (batch_size - len(batch))]
                records = []
                for at, judged in enumerate(synthesis.judged(filled)[: len(batch)], first):
                    if at >= done:
                        records.append(_line(_record(at, judged)))
                        left_out += judged is None
                file.append(b"".join(records))
                shown.update(first + len(batch), None)
        file.sync()
    finally:
        file.close()
    return len(pairs) - left_out, left_out


def read_synthetic(path: Path | str) -> list[Judged]:
    """Returns the judged translations of a file, without those left out.

    Raises:
        DataError: it is none of these files.
        StorageError: it cannot be read.
    """
    path = Path(path)
    with storage_errors(path, "read", _REMEDY):
        lines = path.read_text(encoding="utf-8").splitlines()
    if not lines:
        raise DataError(f"{path} is empty")
    _check_header(path, lines[0], None)
    return list(_records(path, lines[1:]))


def _records(path: Path, lines: list[str]) -> Iterator[Judged]:
    for number, line in enumerate(lines, 2):
        try:
            record = json.loads(line)
            if "left_out" in record:
                continue
            yield Judged(
                source=tuple(record["source"]),
                hypothesis=tuple(record["hypothesis"]),
                words=tuple(record["words"]),
                severities=tuple(record["severities"]),
                spans=tuple(
                    Span(start, stop, Severity[name]) for start, stop, name in record["spans"]
                ),
                end=record["end"],
                score=record["score"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}, line {number} is no judged translation: {error!r}") from None


def _record(number: int, judged: Judged | None) -> dict[str, Any]:
    if judged is None:
        return {"pair": number, "left_out": True}
    spans = [[span.start, span.stop, span.severity.name] for span in judged.spans]
    tags = ["BAD" if bad else "OK" for bad in judged.tags]
    return {"pair": number} | asdict(judged) | {"spans": spans, "tags": tags}


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def _whole_lines(path: Path) -> list[str]:
    """Returns the lines of a file, and takes off its torn end."""
    if not path.exists():
        return []
    with storage_errors(path, "read", _REMEDY):
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))
    return whole.decode().split("\n")[:-1]


def _check_header(path: Path, line: str, told: Mapping[str, Any] | None) -> None:
    try:
        found = json.loads(line)[_HEADER]
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path} is no file of judged translations: name another") from None
    asked = found if told is None else json.loads(json.dumps(told))
    for name in sorted({*found, *asked}):
        if found.get(name) != asked.get(name):
            raise ConfigError(
                f"{path} was made with {name}={found.get(name)}, not {asked.get(name)}: name "
                f"another file, or remove it to begin anew"
            )
