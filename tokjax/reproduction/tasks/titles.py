"""A made-up catalogue: a hundred titles of one to four words, whose popularity follows Zipf's law.

Reference: the small setting of "Process-Supervised LLM Recommenders via Flow-guided Tuning", arXiv
2503.07377, with titles drawn at random in the place of films.
"""

import functools
from typing import Any

import numpy as np
from jaxtyping import Float

WORDS = tuple("abcdefghijk")
ASK = "title"  # the prompt of all
LONGEST = 4  # words


@functools.cache
def catalogue(size: int = 100) -> dict[str, float]:
    """Returns titles and how often each was chosen, the most popular first.

    >>> list(catalogue().items())[:2]
    [('c', 1000.0), ('e e b h', 500.0)]
    """
    rng = np.random.default_rng(30)
    titles: dict[str, None] = {}
    while len(titles) < size:
        words = rng.integers(0, len(WORDS), rng.integers(1, LONGEST + 1))
        titles.setdefault(" ".join(WORDS[i] for i in words))
    return {title: float(max(1, round(1000 / rank))) for rank, title in enumerate(titles, 1)}


def shuffled(seed: int) -> dict[str, float]:
    """Returns the catalogue with its counts given to other titles."""
    own = catalogue()
    order = np.random.default_rng(seed).permutation(len(own))
    counts = list(own.values())
    return {title: counts[i] for title, i in zip(own, order, strict=True)}


def shares(power: float) -> Float[np.ndarray, "I"]:
    """Returns each title's share of all counts^power."""
    weights = np.array(list(catalogue().values())) ** power
    return weights / weights.sum()


def tempered_reward(episode: Any) -> float:
    """Returns the square root of the answer's count over that of the most popular title.

    Args:
        episode: of `tokjax.rl.rewards`; an answer that is no title is worth nothing.
    """
    counts = catalogue()
    count = counts.get(episode.answer.strip(), 0.0)
    return float(np.sqrt(count / max(counts.values())))
