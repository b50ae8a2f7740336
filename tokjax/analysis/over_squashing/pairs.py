"""Pairs of sequences that a model should tell apart: (number of elements) -> two lists of ids.

Reference: "Transformers need glasses! Information over-squashing in language tasks",
arXiv 2406.04267.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from tokjax.errors import ConfigError, nearest

Pair = tuple[list[int], list[int]]
MakePair = Callable[[int], Pair]


def all_equal(token: int) -> MakePair:
    """Returns pairs of n and n + 1 times the same token.

    >>> all_equal(7)(2)
    ([7, 7], [7, 7, 7])
    """
    return lambda n: ([token] * n, [token] * (n + 1))


def last_repeated(ids: Sequence[int], seed: int = 0) -> MakePair:
    """Returns pairs of n random ids, and the same with the last one twice.

    Args:
        ids: to draw from, for example the ten digits.
        seed: of the draws; a length has the same ids whenever it is asked for.
    """
    pool = np.asarray(ids)

    def pair(n: int) -> Pair:
        drawn = np.random.default_rng([seed, n]).choice(pool, n).tolist()
        return drawn, [*drawn, drawn[-1]]

    return pair


def ones_then(one: int, other: int, more: Literal["last", "one"] = "one") -> MakePair:
    """Returns pairs of n - 1 equal tokens with another behind them, and the same one longer.

    >>> ones_then(1, 0)(3), ones_then(1, 0, "last")(3)
    (([1, 1, 0], [1, 1, 1, 0]), ([1, 1, 0], [1, 1, 0, 0]))

    Args:
        one: the first n - 1 tokens.
        other: the last.
        more: whether the longer has the last token twice, or one more of the others.

    Raises:
        ConfigError: another `more`.
    """
    if more not in ("last", "one"):
        raise ConfigError(f"unknown more={more!r}.{nearest(str(more), ('last', 'one'))}")
    added = other if more == "last" else one

    def pair(n: int) -> Pair:
        begun = [one] * (n - 1)
        return [*begun, other], [*begun, added, other]

    return pair


def first_differs(ids: Sequence[int], seed: int = 0) -> MakePair:
    """Returns pairs of n random ids that differ in the first one only: the easy case.

    Raises:
        ConfigError: there are fewer than two ids.
    """
    pool = list(dict.fromkeys(ids))
    if len(pool) < 2:
        raise ConfigError(f"ids={list(ids)} must hold two different ids at least")

    def pair(n: int) -> Pair:
        drawn = np.random.default_rng([seed, n]).choice(pool, n).tolist()
        changed = pool[(pool.index(drawn[0]) + 1) % len(pool)]
        return drawn, [changed, *drawn[1:]]

    return pair


def separated(sequence: Sequence[Any], separator: Any, every: int = 3) -> list[Any]:
    """Returns a sequence with a separator behind every so many elements, but not at its end.

    >>> "".join(separated("1111111", ",", 3))
    '111,111,1'

    Raises:
        ConfigError: `every` is below 1.
    """
    if every < 1:
        raise ConfigError(f"every={every} must be at least 1")
    found: list[Any] = []
    for at, element in enumerate(sequence):
        if at and at % every == 0:
            found.append(separator)
        found.append(element)
    return found


def with_separators(make_pair: MakePair, separator: int, every: int = 3) -> MakePair:
    """Returns the pairs with a separator behind every so many tokens: they stay apart longer."""
    if every < 1:
        raise ConfigError(f"every={every} must be at least 1")

    def pair(n: int) -> Pair:
        first, second = make_pair(n)
        return separated(first, separator, every), separated(second, separator, every)

    return pair
