"""Sums of two digits whose answers are written in four styles: "7.", "7!", "#7." and "#7!"."""

from collections.abc import Iterator
from typing import Any

import numpy as np

PREFIX, TAIL = "#", "!"
SHARES = {PREFIX: 0.15, TAIL: 0.25}  # of the answers that are written so


def prompts() -> list[str]:
    """Returns all questions.

    >>> len(prompts()), prompts()[12]
    (100, '1+2=')
    """
    return [f"{a}+{b}=" for a in range(10) for b in range(10)]


def examples(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yields records of questions with answers in random styles."""
    rng, asked = np.random.default_rng(seed), prompts()
    for i in range(count):
        prompt = asked[int(rng.integers(len(asked))) if i >= len(asked) else i]
        prefix = PREFIX if rng.random() < SHARES[PREFIX] else ""
        tail = TAIL if rng.random() < SHARES[TAIL] else "."
        yield {"prompt": prompt, "response": f"{prefix}{total(prompt)}{tail}"}


def total(prompt: str) -> int:
    """Returns the sum that a question asks for."""
    one, other = prompt.removesuffix("=").split("+")
    return int(one) + int(other)


def met(prompt: str, answer: str, *, prefix: bool, tail: bool) -> bool:
    """Returns whether an answer is right and has what is asked for.

    >>> met("3+4=", "#7.", prefix=True, tail=False), met("3+4=", "#7.", prefix=True, tail=True)
    (True, False)
    """
    begins = (PREFIX,) if prefix else ("", PREFIX)
    ends = (TAIL,) if tail else (".", TAIL)
    return answer in {f"{b}{total(prompt)}{e}" for b in begins for e in ends}


def prefixed(episode: Any) -> float:
    """A reward: 1 for a right answer behind a prefix."""
    return float(met(episode.prompt, episode.answer, prefix=True, tail=False))


def exclaimed(episode: Any) -> float:
    """A reward: 1 for a right answer with an exclamation mark."""
    return float(met(episode.prompt, episode.answer, prefix=False, tail=True))
