"""Reviews in which some words help, some hurt and most do neither; rewards and critics of them."""

import hashlib
import math
from collections.abc import Iterator

import numpy as np

GOOD = ("good", "warm", "bright", "moving", "witty", "brave")
BAD = ("bad", "cold", "dull", "boring", "silly", "weak")
PLAIN = ("the", "film", "plot", "cast", "was", "and", "with", "scene", "a", "role", "this", "of")
TOPICS = tuple(f"topic{i}" for i in range(16))
WORDS = (*GOOD, *BAD, *PLAIN, *TOPICS, ":")
LENGTH = 16  # words of a review
NOISE = 0.3  # share of labels that `noisy` turns round


def reviews(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Yields records of a topic and a review, a tenth of whose words help or hurt."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        kinds = rng.choice(3, LENGTH, p=(0.05, 0.05, 0.9))
        words = [str(rng.choice((GOOD, BAD, PLAIN)[k])) for k in kinds]
        yield {"prompt": f"{rng.choice(TOPICS)} :", "response": " " + " ".join(words)}


def places(text: str) -> tuple[list[tuple[int, int]], list[int]]:
    """Returns the characters of each word and what it is worth: 1, -1 or 0."""
    ranges, values, at = [], [], 0
    for word in text.split():
        at = text.index(word, at)
        ranges.append((at, at + len(word)))
        values.append((word in GOOD) - (word in BAD))
        at += len(word)
    return ranges, values


def score(episode) -> float:
    """Returns the sigmoid of helping less hurting words: the reward of a whole review."""
    return 1 / (1 + math.exp(-sum(places(episode.answer)[1])))


def _critique(ranges, values):
    pairs = list(zip(ranges, values, strict=True))
    return [r for r, v in pairs if v > 0], [r for r, v in pairs if v < 0]


def exact(episode, reward):
    """A critic that quotes what is there."""
    del reward
    return _critique(*places(episode.answer))


def flipped(episode, reward):
    """A critic that takes what hurts for what helps."""
    del reward
    ranges, values = places(episode.answer)
    return _critique(ranges, [-v for v in values])


def scattered(episode, reward):
    """A critic that quotes as many words as there are, but any."""
    del reward
    ranges, values = places(episode.answer)
    return _critique(ranges, _rng(episode.answer).permutation(values).tolist())


def noisy(episode, reward):
    """A critic that takes some of what helps for what hurts, and the other way round."""
    del reward
    ranges, values = places(episode.answer)
    wrong = _rng(episode.answer).random(len(values)) < NOISE
    return _critique(ranges, np.where(wrong, -np.array(values, int), values).tolist())


def _rng(text: str) -> np.random.Generator:
    """Returns a generator that is a function of the text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))
