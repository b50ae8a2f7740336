"""Feedback on statements: which an answer makes, whether they are true, and how useful they are.

A feedback is a frozen dataclass registered under the kind "feedback". Called with episodes it
returns the graded sentences of each answer, which `rlfh.py` turns into rewards of tokens.
"""

import functools
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tokjax.config import register
from tokjax.errors import ConfigError, DataError
from tokjax.rl.rewards import Episode

VERDICTS = ("Correct", "Hedged correct", "Vague", "Hedged wrong", "Wrong")
GRADES = ("1", "2", "3", "4", "5")
T = TypeVar("T")

_IDLE = re.compile(
    r"\b(?:sorry|apologi[sz]e|apolog(?:y|ies)|not sure|unsure|don't know|do not know|no information"
    r"|cannot (?:find|provide|confirm)|can't (?:find|provide|confirm)|unable to|not aware)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Statement:
    """One claim of a sentence.

    Attributes:
        text: the claim, in words that are the sentence's as far as possible.
        verdict: one of `VERDICTS`.
        usefulness: one of `GRADES`.
    """

    text: str
    verdict: str
    usefulness: str

    def __post_init__(self):
        if self.verdict not in VERDICTS:
            raise DataError(f"verdict {self.verdict!r} is none of {', '.join(VERDICTS)}")
        if self.usefulness not in GRADES:
            raise DataError(f"usefulness {self.usefulness!r} is none of {', '.join(GRADES)}")


@dataclass(frozen=True)
class Sentence:
    """A sentence of an answer with its claims."""

    text: str
    statements: tuple[Statement, ...]


class Feedback(Protocol):
    """Grades the statements of answers."""

    def __call__(self, episodes: Sequence[Episode]) -> list[list[Sentence]]:
        """Returns the graded sentences of each answer."""
        ...


def informative(sentences: Sequence[T], text: Callable[[T], str] = str) -> list[T]:
    """Returns the sentences that are no apology, no remark of not knowing and no question.

    >>> informative(["Oslo is in Norway.", "I am not sure.", "Is it?"])
    ['Oslo is in Norway.']
    """
    return [s for s in sentences if not (_IDLE.search(text(s)) or text(s).rstrip().endswith("?"))]


@register("feedback", "function")
@dataclass(frozen=True)
class FeedbackFunction:
    """A Python function of an `Episode` that returns {sentence: {statement: (verdict, grade)}}."""

    path: str = ""  # "module:function"

    def __post_init__(self):
        self._function  # noqa: B018 (what is wrong with it is said now)

    def __call__(self, episodes: Sequence[Episode]) -> list[list[Sentence]]:
        """Returns the graded sentences of each answer."""
        return [graded(self._function(episode)) for episode in episodes]

    @functools.cached_property
    def _function(self) -> Callable[[Episode], Any]:
        module, _, name = self.path.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"feedback.path={self.path!r} names no function ({error}): write 'module:function'"
            ) from None


def graded(labels: Mapping[str, Mapping[str, tuple[str, str]]]) -> list[Sentence]:
    """Returns sentences from {sentence: {statement: (verdict, usefulness)}}."""
    return [
        Sentence(text, tuple(Statement(s, *found) for s, found in statements.items()))
        for text, statements in labels.items()
    ]


@register("feedback", "facts")
@dataclass(frozen=True)
class FactFeedback:
    """Sentences of known forms, compared with a table of facts: exact, without a model.

    A file of facts has a line {"subject": ..., "relation": ..., "value": ...} for each. A sentence
    of a form is one statement: Correct or Wrong by the table, Vague of a subject that is not there.
    Other sentences state nothing.
    """

    facts: str = ""  # file of facts, JSON lines
    # relation and form of its sentences, with {subject} and {value}
    forms: tuple[tuple[str, str], ...] = ()
    asked: str = "5"  # usefulness of a statement of the reference's subject and relation
    aside: str = "2"  # usefulness of any other

    def __post_init__(self):
        for relation, form in self.forms:
            if "{subject}" not in form or "{value}" not in form:
                raise ConfigError(f"form {form!r} of {relation!r} needs {{subject}} and {{value}}")
        for name in ("asked", "aside"):
            if getattr(self, name) not in GRADES:
                raise ConfigError(f"{name}={getattr(self, name)!r} is none of {', '.join(GRADES)}")

    def __call__(self, episodes: Sequence[Episode]) -> list[list[Sentence]]:
        """Returns the graded sentences of each answer."""
        return [self.of_answer(e.answer, e.reference) for e in episodes]

    def of_answer(self, answer: str, reference: str) -> list[Sentence]:
        """Returns the graded sentences of an answer."""
        wanted = {found[:2] for s in split_sentences(reference) if (found := self.read(s))}
        sentences = []
        for text in informative(split_sentences(answer)):
            if (found := self.read(text)) is None:
                continue
            subject, relation, value = found
            known = self._table.get((subject, relation))
            verdict = "Vague" if known is None else "Correct" if value == known else "Wrong"
            grade = self.asked if (subject, relation) in wanted else self.aside
            sentences.append(Sentence(text, (Statement(text, verdict, grade),)))
        return sentences

    def read(self, sentence: str) -> tuple[str, str, str] | None:
        """Returns subject, relation and value of a sentence, None where it has no known form."""
        for relation, pattern in self._patterns:
            if match := pattern.fullmatch(sentence.strip()):
                return match["subject"], relation, match["value"]
        return None

    @functools.cached_property
    def _patterns(self) -> list[tuple[str, re.Pattern[str]]]:
        found = []
        for relation, form in self.forms:
            pattern = re.escape(form)
            for name in ("subject", "value"):
                pattern = pattern.replace(re.escape(f"{{{name}}}"), f"(?P<{name}>.+?)")
            found.append((relation, re.compile(pattern + r"\s*\.?")))
        return found

    @functools.cached_property
    def _table(self) -> dict[tuple[str, str], str]:
        try:
            lines = Path(self.facts).read_text().splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
            return {(row["subject"], row["relation"]): row["value"] for row in rows}
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"feedback.facts={self.facts!r} is no file of facts ({error!r}): each line is "
                f'{{"subject": ..., "relation": ..., "value": ...}}'
            ) from None


def split_sentences(text: str) -> list[str]:
    """Returns the sentences of a text.

    >>> split_sentences("Paris is big. Lyon is in Peru.")
    ['Paris is big.', 'Lyon is in Peru.']
    """
    return [s.strip() for s in re.split(r"(?<=[.!?])\s+", text) if s.strip()]
