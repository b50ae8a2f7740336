"""Chains of arithmetic steps, thought through line by line before the answer.

A question names steps, each an operation and a digit that are applied to what the step before it
left, from 0 on. Thinking has a paragraph a step, of one or more equal lines of six words: which
step, line and number of lines; operation and digit; the number before; `=`; the number behind; `;`.

    1:+4 2:*7 <think> 1:1/2 +4 0 = 4 ; 1:2/2 +4 0 = 4 ; 2:1/1 *7 4 = 8 ; </think> 8
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokjax.errors import ConfigError
from tokjax.reproduction.materials import jsonl, word_tokenizer

THINK, ANSWER, LINE_END = "<think>", "</think>", ";"
WORDS_A_LINE = 6
_TABLES = ("@", "&", "~")  # operations without a rule

Question = tuple[tuple[str, int], ...]  # (operation, digit) of each step


@dataclass(frozen=True)
class Chains:
    """A distribution of questions and of ways to think about them.

    Attributes:
        steps: least and largest number of steps of a question.
        operations: "+", "-", "*", or "@", "&" and "~", which are arbitrary tables that can only be
            remembered; each with how often it occurs, relative to the others.
        lines: lines a paragraph may have, equally often.
        redraw: probability that a paragraph's number of lines is drawn anew, instead of being that
            of the paragraph before.
        modulus: numbers are 0 up to this.
    """

    steps: tuple[int, int] = (8, 8)
    operations: tuple[tuple[str, float], ...] = (("+", 1.0),)
    lines: tuple[int, ...] = (1,)
    redraw: float = 0.3
    modulus: int = 10

    def __post_init__(self):
        low, high = self.steps
        if not 1 <= low <= high or not self.lines or min(self.lines) < 1 or self.modulus < 2:
            raise ConfigError(
                f"steps={self.steps} must be two numbers from 1 on in order, lines={self.lines} "
                f"one number from 1 on at least, and modulus={self.modulus} 2 or more"
            )
        for name, weight in self.operations:
            if name not in ("+", "-", "*", *_TABLES) or not weight > 0:
                raise ConfigError(
                    f"operation {name!r} with weight {weight}: operations are + - * @ & ~ and "
                    f"their weights positive"
                )
        if not self.operations or not 0 <= self.redraw <= 1:
            raise ConfigError(
                f"redraw={self.redraw} must lie within 0 and 1, and there must be an operation"
            )

    @property
    def words(self) -> list[str]:
        """All words that occur."""
        places = range(1, self.steps[1] + 1)
        return [
            *(THINK, ANSWER, LINE_END, "="),
            *(str(n) for n in range(self.modulus)),
            *(f"{name}{n}" for name, _ in self.operations for n in range(self.modulus)),
            *(
                f"{i}:{name}{n}"
                for i in places
                for name, _ in self.operations
                for n in range(self.modulus)
            ),
            *(f"{i}:{j + 1}/{n}" for i in places for n in sorted(self.lines) for j in range(n)),
        ]

    def question(self, rng: np.random.Generator) -> Question:
        """Returns a question."""
        count = int(rng.integers(self.steps[0], self.steps[1] + 1))
        weights = np.array([weight for _, weight in self.operations], float)
        drawn = rng.choice(len(weights), count, p=weights / weights.sum())
        digits = rng.integers(0, self.modulus, count)
        return tuple((self.operations[k][0], int(d)) for k, d in zip(drawn, digits, strict=True))

    def numbers(self, question: Question) -> list[int]:
        """Returns 0 and the number behind each step; the last one is the answer."""
        found = [0]
        for name, digit in question:
            found.append(apply(name, found[-1], digit, self.modulus))
        return found

    def prompt(self, question: Question) -> str:
        """Returns the question as text, up to where thinking begins."""
        told = [f"{i}:{name}{digit}" for i, (name, digit) in enumerate(question, 1)]
        return " ".join([*told, THINK])

    def response(
        self,
        question: Question,
        rng: np.random.Generator,
        numbers: Sequence[int] | None = None,
    ) -> str:
        """Returns thinking and the answer, with the space before it.

        Args:
            question: that is thought about.
            rng: of the lines.
            numbers: 0 and what is taken for the number behind each step; None is right.
        """
        numbers, words = self.numbers(question) if numbers is None else numbers, []
        count = int(rng.choice(self.lines))
        for i, (name, digit) in enumerate(question, 1):
            if i > 1 and rng.random() < self.redraw:
                count = int(rng.choice(self.lines))
            for j in range(1, count + 1):
                line = (
                    f"{i}:{j}/{count}",
                    f"{name}{digit}",
                    numbers[i - 1],
                    "=",
                    numbers[i],
                    LINE_END,
                )
                words += [str(word) for word in line]
        return "".join(f" {word}" for word in [*words, ANSWER, numbers[-1]])

    def correct(self, question: Question, words: Sequence[str]) -> bool:
        """Returns whether the first word behind the thinking is the answer.

        Args:
            question: that was asked.
            words: of the response.
        """
        answer = given_answer(words)
        return answer is not None and answer == str(self.numbers(question)[-1])


def given_answer(words: Sequence[str]) -> str | None:
    """Returns the word behind the thinking, or None.

    >>> given_answer("1:1/1 +4 0 = 4 ; </think> 4 </s>".split())
    '4'
    """
    words = list(words)
    at = words.index(ANSWER) + 1 if ANSWER in words else len(words)
    return words[at] if at < len(words) else None


def apply(name: str, a: int, b: int, modulus: int = 10) -> int:
    """Returns what an operation makes of two numbers.

    >>> apply("*", 4, 7)
    8
    """
    if name in _TABLES:
        rng = np.random.default_rng([_TABLES.index(name), modulus])
        return int(rng.integers(0, modulus, (modulus, modulus))[a, b])
    return {"+": a + b, "-": a - b, "*": a * b}[name] % modulus


def run_on_chains(
    chains: Chains, title: str, folder: Path, settings: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Returns the configuration of a run that learns to think in chains.

    Args:
        chains: what is learned from.
        title: of the run.
        folder: gets the examples and the tokenizer.
        settings: `corpus` (examples), `d_model`, `n_layers` and `steps`.
        seed: of the examples and the run.
    """
    rng = np.random.default_rng([seed, 1])

    def records():
        for _ in range(settings["corpus"]):
            question = chains.question(rng)
            response = chains.response(question, rng)
            yield {"prompt": chains.prompt(question), "response": response}

    file = jsonl(folder / "chains.jsonl", records)
    source = {"name": "jsonl", "files": (str(file),), "kind": "response"}
    return {
        "title": title,
        "seed": seed,
        "model": {
            "d_model": settings["d_model"],
            "n_layers": settings["n_layers"],
            "n_heads": 4,
            "max_positions": 192,
        },
        "data": {
            "tokenizer": word_tokenizer(folder / "words", chains.words),
            "train": [{"source": source}],
            "evals": {},
            "seq_len": 160,
            "batch_size": 8,
        },
        "steps": settings["steps"],
        "optimizer": {"name": "adamw", "peak_lr": 4e-3},
        "schedule": {"name": "cosine", "warmup_steps": 30},
        "checkpoints": {"every_steps": 200, "keep": 1},
    }
