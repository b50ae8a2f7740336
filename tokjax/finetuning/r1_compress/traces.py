"""Traces made shorter, with what became of each and of all."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tokjax.errors import ConfigError, DataError
from tokjax.finetuning.r1_compress.chunks import (
    MARKERS,
    Trace,
    body_of,
    chunks_of,
    count_markers,
    final_answer,
    numbers_of,
    split_trace,
)
from tokjax.finetuning.r1_compress.compressors import Compressor
from tokjax.finetuning.r1_compress.scorers import Context, Scorer
from tokjax.finetuning.r1_compress.search import Candidate, Normalise, keep_short, search

METHODS = ("r1", "likelihood", "shortest", "random", "instance")


@dataclass(frozen=True)
class Settings:
    """How traces are made shorter.

    Attributes:
        method: "r1" filters by length and takes the likeliest; "likelihood" takes the likeliest of
            all that are no longer than the chunk, "shortest" the shortest, "random" a random one
            of those that the filter keeps; "instance" rewrites the whole thinking as one chunk,
            and filters and takes as "r1".
        keep: share of a chunk's candidates that the length filter keeps.
        min_words: least number of words of a chunk.
        boundary: where a trace may be cut.
        normalise: "mean" or "total" log-probability.
        beams: sequences that the search keeps.
        condition: candidates are scored behind those "chosen", or behind the "original" chunks.
        numbers: candidates that lose a number of their chunk are discarded: "none", those whose
            number is needed "later", or "all".
        markers: words of reflection that are counted.
        begin: tag before the thinking.
        end: tag behind it; what follows is the answer, which is not touched.
        seed: of random choices and of the compressor.
    """

    method: Literal["r1", "likelihood", "shortest", "random", "instance"] = "r1"
    keep: float = 0.5
    min_words: int = 50
    boundary: str = "\n\n"
    normalise: Normalise = "mean"
    beams: int = 1
    condition: Literal["chosen", "original"] = "chosen"
    numbers: Literal["none", "later", "all"] = "none"
    markers: tuple[str, ...] = MARKERS
    begin: str = "<think>"
    end: str = "</think>"
    seed: int = 0

    def __post_init__(self):
        for name, known in (
            ("method", METHODS),
            ("normalise", ("mean", "total")),
            ("condition", ("chosen", "original")),
            ("numbers", ("none", "later", "all")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be one of {known}")
        if self.beams < 1 or self.seed < 0 or not self.end:
            raise ConfigError(
                f"beams={self.beams} must be at least 1, seed={self.seed} not negative, and "
                f"end={self.end!r} not empty"
            )
        keep_short([1], 1, self.keep)
        chunks_of("", self.min_words, self.boundary)


@dataclass(frozen=True)
class Compressed:
    """A response with shorter thinking.

    Attributes:
        text: the response.
        tokens: of the thinking before and after, by the scorer's tokenizer.
        markers: of reflection, before and after.
        chunks: number of chunks.
        unchanged: chunks that stayed as they were.
        discarded: candidates left out before the filter, by reason.
        scored_tokens: that the search model read.
    """

    text: str
    tokens: tuple[int, int]
    markers: tuple[int, int]
    chunks: int
    unchanged: int
    discarded: Mapping[str, int]
    scored_tokens: int

    @property
    def ratio(self) -> float:
        """Length after over length before."""
        return self.tokens[1] / max(self.tokens[0], 1)


@dataclass(frozen=True)
class Dropped:
    """A response that is left out, and why."""

    reason: str


@dataclass
class Totals:
    """What became of many responses; filled by `add`.

    Attributes:
        kept: number of responses made shorter.
        dropped: number left out, by reason.
        tokens: of the thinking before and after, of those kept.
        markers: of reflection, before and after.
        discarded: candidates, by reason.
        scored_tokens: that the search model read.
    """

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: tuple[int, int] = (0, 0)
    markers: tuple[int, int] = (0, 0)
    discarded: Counter[str] = field(default_factory=Counter)
    scored_tokens: int = 0

    def add(self, one: Compressed | Dropped) -> None:
        """Counts a response."""
        if isinstance(one, Dropped):
            self.dropped[one.reason] += 1
            return
        self.kept += 1
        self.tokens = (self.tokens[0] + one.tokens[0], self.tokens[1] + one.tokens[1])
        self.markers = (self.markers[0] + one.markers[0], self.markers[1] + one.markers[1])
        self.discarded.update(one.discarded)
        self.scored_tokens += one.scored_tokens


def same_final_answer(before: str, after: str) -> bool:
    """Returns whether two responses end with the same answer; see `final_answer`."""
    return final_answer(before) == final_answer(after)


def compress(
    responses: Sequence[str],
    compressor: Compressor,
    scorer: Scorer,
    settings: Settings | None = None,
    *,
    contexts: Sequence[Context] | None = None,
    numbers: Sequence[int] | None = None,
    same: Callable[[str, str], bool] = same_final_answer,
) -> list[Compressed | Dropped]:
    """Returns each response with shorter thinking, or why it is left out.

    Args:
        responses: long traces with their answers.
        compressor: writes candidates of chunks; all chunks are handed to it at once.
        scorer: of candidates behind what was chosen, and of lengths.
        settings: how.
        contexts: what comes before each response, as text or ids.
        numbers: of the responses among all, which their randomness depends on; default 0, 1, ...
        same: (response before, after) -> whether the answer is still right; others are dropped.

    Raises:
        ConfigError: what the scorer or compressor refuses.
        DataError: the compressor does not answer for each chunk.
    """
    settings = settings or Settings()
    contexts = [""] * len(responses) if contexts is None else contexts
    numbers = range(len(responses)) if numbers is None else numbers
    begun = [
        _begin(text, context, scorer, settings)
        for text, context in zip(responses, contexts, strict=True)
    ]
    jobs = [(t, c) for t, one in enumerate(begun) for c in range(len(one.chunks))]
    bodies = [body_of(begun[t].chunks[c], settings.boundary) for t, c in jobs]
    # A chunk of blanks and boundaries alone has nothing to rewrite.
    asked = [j for j, body in enumerate(bodies) if body[1]]
    seeds = [
        int(np.random.SeedSequence([settings.seed, numbers[t], c]).generate_state(1)[0])
        for t, c in (jobs[j] for j in asked)
    ]
    answers = compressor([bodies[j][1] for j in asked], seeds) if asked else []
    if len(answers) != len(asked):
        raise DataError(f"the compressor answered {len(answers)} of {len(asked)} chunks")
    written: list[Sequence[str | None]] = [[] for _ in jobs]
    for j, versions in zip(asked, answers, strict=True):
        written[j] = versions
    found: list[Compressed | Dropped] = []
    each = iter(zip(bodies, written, strict=True))
    for text, one, number in zip(responses, begun, numbers, strict=True):
        own = [next(each) for _ in one.chunks]
        result = one.dropped or _one(one, own, scorer, settings, number)
        if isinstance(result, Compressed) and not same(text, result.text):
            result = Dropped("the final answer changed")
        found.append(result)
    return found


@dataclass(frozen=True)
class _Begun:
    """A response before its candidates are written."""

    trace: Trace
    context: Context
    chunks: list[str]
    originals: list[Candidate]
    dropped: Dropped | None = None


def _begin(text: str, context: Context, scorer: Scorer, settings: Settings) -> _Begun:
    trace = split_trace(text, settings.begin, settings.end)
    if not trace.thinking.strip():
        return _Begun(trace, context, [], [], Dropped("there is no thinking to shorten"))
    if settings.method == "instance":
        chunks = [trace.thinking]
    else:
        chunks = chunks_of(trace.thinking, settings.min_words, settings.boundary)
    originals = [Candidate(chunk, scorer.count(chunk)) for chunk in chunks]
    if settings.method not in ("random", "shortest"):
        context = scorer.extended(context, trace.head)
        if sum(c.tokens for c in originals) > scorer.room(context):
            long = Dropped("longer than the search model's positions")
            return _Begun(trace, context, [], [], long)
    return _Begun(trace, context, chunks, originals)


def _one(
    begun: _Begun,
    written: Sequence[tuple[tuple[str, str, str], Sequence[str | None]]],
    scorer: Scorer,
    settings: Settings,
    number: int,
) -> Compressed:
    trace, chunks, originals = begun.trace, begun.chunks, begun.originals
    discarded: Counter[str] = Counter()
    kept, place = [], 0
    for chunk, original, (around, versions) in zip(chunks, originals, written, strict=True):
        place += len(chunk)
        later = trace.thinking[place:] + trace.answer
        own = list(_valid(around, versions, later, scorer, settings, discarded))
        lengths = [np.inf if c is None else c.tokens for c in own]
        share = 1.0 if settings.method == "likelihood" else settings.keep
        at = keep_short(lengths, original.tokens, share) if own else []
        kept.append([c for i in at if (c := own[i]) is not None] or [original])
    chosen, read = _chosen(kept, begun, scorer, settings, number)
    thinking = "".join(c.text for c in chosen)
    return Compressed(
        text=trace.head + thinking + trace.answer,
        tokens=(sum(c.tokens for c in originals), sum(c.tokens for c in chosen)),
        markers=(
            count_markers(trace.thinking, settings.markers),
            count_markers(thinking, settings.markers),
        ),
        chunks=len(chunks),
        unchanged=sum(c.text == o.text for c, o in zip(chosen, originals, strict=True)),
        discarded=dict(discarded),
        scored_tokens=read,
    )


def _valid(
    around: tuple[str, str, str],
    versions: Sequence[str | None],
    later: str,
    scorer: Scorer,
    settings: Settings,
    discarded: Counter[str],
) -> Iterator[Candidate | None]:
    """Yields the candidates of a chunk, None for one cut off, and counts those discarded."""
    before, body, behind = around
    needed = set[str]()
    if settings.numbers != "none":
        needed = numbers_of(body)
    if settings.numbers == "later":
        needed &= numbers_of(later)
    for version in versions:
        if version is None:
            discarded["cut off"] += 1
            yield None
        elif not version.strip():
            discarded["empty"] += 1
        elif settings.end in version or (settings.begin and settings.begin in version):
            discarded["a tag of thinking in it"] += 1
        elif not needed <= numbers_of(version):
            discarded["a number lost"] += 1
        else:
            text = before + version.strip() + behind
            yield Candidate(text, scorer.count(text))


def _chosen(
    kept: Sequence[Sequence[Candidate]],
    begun: _Begun,
    scorer: Scorer,
    settings: Settings,
    number: int,
) -> tuple[list[Candidate], int]:
    """Returns the candidate of each chunk, and how many tokens were read to choose."""
    if settings.method == "random":
        rng = np.random.default_rng([settings.seed, number])
        return [own[int(rng.integers(len(own)))] for own in kept], 0
    if settings.method == "shortest":
        return [min(own, key=lambda c: c.tokens) for own in kept], 0
    if all(len(own) == 1 for own in kept):
        return [own[0] for own in kept], 0
    found = search(
        kept,
        scorer,
        begun.context,
        normalise=settings.normalise,
        beams=settings.beams,
        originals=begun.originals if settings.condition == "original" else None,
    )
    return [own[i] for own, i in zip(kept, found.chosen, strict=True)], found.scored_tokens
