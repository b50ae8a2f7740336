"""BM25 over sections of documents: a small index in memory.

Reference: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009;
the weight of a word is that of Lucene, log(1 + (N - n + 0.5) / (n + 0.5)), which is never negative.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence


def sections(text: str, words: int = 64) -> list[str]:
    """Returns a text in pieces of at most so many words, split between sentences where possible.

    >>> sections("One two. Three four five.", 3)
    ['One two.', 'Three four five.']
    """
    found: list[list[str]] = [[]]
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", text):
        split = sentence.split()
        if found[-1] and len(found[-1]) + len(split) > words:
            found.append([])
        while len(found[-1]) + len(split) > words:
            found[-1], split = split[:words], split[words:]
            found.append([])
        found[-1] += split
    return [" ".join(each) for each in found if each]


class BM25:
    """Ranks texts for a query.

    Args:
        texts: that are ranked.
        k1: how soon repeats of a word stop counting.
        b: how much longer texts are held to their length, 0 to 1.
    """

    def __init__(self, texts: Iterable[str], *, k1: float = 1.5, b: float = 0.75):
        self.texts = list(texts)
        counts = [Counter(_words(text)) for text in self.texts]
        lengths = [sum(c.values()) for c in counts]
        mean = sum(lengths) / max(len(lengths), 1) or 1.0
        holding = Counter(word for c in counts for word in c)
        N = len(self.texts)
        # For each word the texts that hold it, with what it adds to their scores.
        self._added: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for i, (own, length) in enumerate(zip(counts, lengths, strict=True)):
            for word, count in own.items():
                idf = math.log(1 + (N - holding[word] + 0.5) / (holding[word] + 0.5))
                damped = count * (k1 + 1) / (count + k1 * (1 - b + b * length / mean))
                self._added[word].append((i, idf * damped))

    def scores(self, query: str) -> list[float]:
        """Returns the score of each text."""
        found = [0.0] * len(self.texts)
        for word in _words(query):
            for i, added in self._added.get(word, ()):
                found[i] += added
        return found

    def __call__(self, query: str, top: int = 3) -> list[str]:
        """Returns the best texts, the best first, without those that share no word with it."""
        scores = self.scores(query)
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        return [self.texts[i] for i in order[:top] if scores[i] > 0]


def _words(text: str) -> Sequence[str]:
    return re.findall(r"\w+", text.lower())
