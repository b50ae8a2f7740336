"""Feedback by a language model: it extracts statements, checks them against texts, and rates them.

The three questions are `extract`, `verify` and `assess`; what is written is read by exact parsers.
Any function from prompts to texts can answer them, the policy's own starting checkpoint too.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokjax.config import register
from tokjax.errors import ConfigError
from tokjax.rl.bm25 import BM25, sections
from tokjax.rl.critics import filled
from tokjax.rl.feedback import GRADES, Sentence, Statement, informative
from tokjax.rl.rewards import Episode

# prompts, temperature and seed -> a text for each
Ask = Callable[[Sequence[str], float, int], Sequence[str]]

EXTRACT = """List the sentences of the answer that state facts. Write each as "Sentence: ..." and
below it each single fact it states as "- ...", in the sentence's own words.

Question: {prompt}
Answer: {answer}

"""
VERIFY = """Is the statement right by these texts? Answer Correct, Vague or Wrong.

{texts}

Statement: {statement}
Answer:"""
ASSESS = """How useful is the statement for the question, from 1 (useless) to 5 (what was asked)?

Question: {prompt}
Statement: {statement}
Usefulness:"""

_VERDICT = re.compile(r"\b(hedged correct|hedged wrong|correct|vague|wrong)\b", re.IGNORECASE)
_GRADE = re.compile(r"(?<!\d)[1-5](?!\d)")


def read_statements(text: str) -> dict[str, list[str]] | None:
    """Returns the statements of each sentence; None where no sentence is written.

    >>> read_statements("Sentence: Oslo is cold.\\n- Oslo is cold")
    {'Oslo is cold.': ['Oslo is cold']}
    """
    found: dict[str, list[str]] = {}
    sentence = None
    for line in map(str.strip, text.splitlines()):
        if line.lower().startswith("sentence:"):
            sentence = line.partition(":")[2].strip()
            found.setdefault(sentence, [])
        elif sentence and line[:1] in "-*" and (statement := line[1:].strip()):
            found[sentence].append(statement)
    return {s: each for s, each in found.items() if s and each} or None


def read_verdict(text: str) -> str | None:
    """Returns the first verdict in a text.

    >>> read_verdict(" That is WRONG."), read_verdict("incorrect")
    ('Wrong', None)
    """
    match = _VERDICT.search(text)
    return match.group(1).capitalize() if match else None


def read_usefulness(text: str) -> str | None:
    """Returns the first of the grades 1 to 5 in a text.

    >>> read_usefulness("I rate it 4/5"), read_usefulness("10")
    ('4', None)
    """
    match = _GRADE.search(text)
    return match.group() if match else None


def asked(
    ask: Ask,
    prompts: Sequence[str],
    read: Callable[[str], Any],
    *,
    temperature: float,
    retries: int,
    failure: Any,
) -> list[Any]:
    """Returns what is read from answers; those that cannot be read are asked again.

    Args:
        ask: answers prompts.
        prompts: questions.
        read: parser of an answer; None where it cannot be read.
        temperature: of the answers.
        retries: how often more.
        failure: what stands for an answer that never could be read.
    """
    found: list[Any] = [None] * len(prompts)
    for attempt in range(retries + 1):
        left = [i for i, value in enumerate(found) if value is None]
        if not left:
            break
        texts = ask([prompts[i] for i in left], temperature, attempt)
        for i, text in zip(left, texts, strict=True):
            found[i] = read(text)
    return [failure if value is None else value for value in found]


@register("feedback", "model")
@dataclass(frozen=True)
class ModelFeedback:
    """A frozen language model extracts, verifies by retrieved texts, and assesses."""

    checkpoint: str = ""  # whatever `tokjax.load` takes
    documents: str = ""  # text that statements are checked against: a file, or JSON lines of "text"
    extract: str = EXTRACT  # question with {prompt} and {answer}
    verify: str = VERIFY  # question with {texts} and {statement}
    assess: str = ASSESS  # question with {prompt} and {statement}
    top: int = 3  # retrieved texts for a statement
    section_words: int = 64  # most words of a retrieved text
    retries: int = 4  # further tries where an answer cannot be read
    useless: str = "1"  # usefulness where none can be read; the code has 1 or 3
    extract_temperature: float = 1.0  # of the extraction
    judge_temperature: float = 0.3  # of verdicts and usefulness
    max_new_tokens: int = 256  # of an extraction; verdicts and grades have 16

    def __post_init__(self):
        for name in ("checkpoint", "documents"):
            if not getattr(self, name):
                raise ConfigError(f"feedback 'model' needs {name}")
        if self.useless not in GRADES:
            raise ConfigError(f"useless={self.useless!r} is none of {', '.join(GRADES)}")
        if self.retries < 0 or self.top < 1:
            raise ConfigError("retries must not be negative and top must be at least 1")

    def __call__(self, episodes: Sequence[Episode]) -> list[list[Sentence]]:
        """Returns the graded sentences of each answer; what cannot be extracted states nothing."""
        long, short = self._ask(self.max_new_tokens), self._ask(16)
        return self.of(episodes, long, short)

    def of(self, episodes: Sequence[Episode], extractor: Ask, judge: Ask) -> list[list[Sentence]]:
        """Returns the graded sentences of each answer by way of two functions.

        Args:
            episodes: answers.
            extractor: answers the first question.
            judge: answers the other two.
        """
        texts = [filled(self.extract, prompt=e.prompt, answer=e.answer) for e in episodes]
        extracted = asked(
            extractor,
            texts,
            read_statements,
            temperature=self.extract_temperature,
            retries=self.retries,
            failure={},
        )
        kept = [{s: found[s] for s in informative(list(found))} for found in extracted]
        places = [
            (i, sentence, statement)
            for i, found in enumerate(kept)
            for sentence, statements in found.items()
            for statement in statements
        ]
        shared = {"temperature": self.judge_temperature, "retries": self.retries}
        verify = [
            filled(self.verify, texts="\n".join(self._retriever(s, self.top)), statement=s)
            for _, _, s in places
        ]
        assess = [filled(self.assess, prompt=episodes[i].prompt, statement=s) for i, _, s in places]
        verdicts = asked(judge, verify, read_verdict, failure="Vague", **shared)
        grades = asked(judge, assess, read_usefulness, failure=self.useless, **shared)
        result: list[dict[str, list[Statement]]] = [{s: [] for s in found} for found in kept]
        for (i, sentence, statement), verdict, grade in zip(places, verdicts, grades, strict=True):
            result[i][sentence].append(Statement(statement, verdict, grade))
        return [[Sentence(s, tuple(each)) for s, each in found.items()] for found in result]

    def _ask(self, new: int) -> Ask:
        def ask(prompts: Sequence[str], temperature: float, seed: int) -> Sequence[str]:
            return self._model.generate(
                list(prompts), max_new_tokens=new, temperature=temperature, seed=seed
            ).texts

        return ask

    @functools.cached_property
    def _model(self) -> Any:
        from tokjax.loading import load

        return load(self.checkpoint)

    @functools.cached_property
    def _retriever(self) -> BM25:
        try:
            text = Path(self.documents).read_text()
            if self.documents.endswith(".jsonl"):
                texts = [json.loads(line)["text"] for line in text.splitlines() if line.strip()]
            else:
                texts = [text]
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"feedback.documents={self.documents!r} cannot be read: {error!r}"
            ) from None
        return BM25(s for t in texts for s in sections(t, self.section_words))
