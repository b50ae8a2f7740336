"""Texts whose symbols have no fixed meaning: substitutions, look-ups, permutations, repetitions."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def substituted(
    rng: np.random.Generator, ids: Int[np.ndarray, "N T"], symbols: Sequence[int]
) -> tuple[Int[np.ndarray, "N T"], Int[np.ndarray, "N V"]]:
    """Returns texts each under a substitution of its own, and the keys.

    Args:
        rng: where the keys come from.
        ids: texts.
        symbols: ids that stand for each other; all other ids stay.

    Returns:
        the texts, and for each the id that every id became (up to the largest id).
    """
    ids, pool = np.asarray(ids), np.asarray(symbols)
    size = int(max(ids.max(initial=0), pool.max(initial=0))) + 1
    keys = np.tile(np.arange(size), (len(ids), 1))
    for key in keys:
        key[pool] = rng.permutation(pool)
    return np.take_along_axis(keys, ids, axis=1), keys


def look_up(rng: np.random.Generator, symbols: Sequence[int], pairs: int) -> tuple[list[int], int]:
    """Returns keys with values, one key again, and its value.

    Args:
        rng: where they come from.
        symbols: ids to draw from; no symbol stands for two things.
        pairs: how many.

    Raises:
        ValueError: there are too few symbols.
    """
    drawn = _distinct(rng, symbols, 2 * pairs).reshape(pairs, 2)
    asked = drawn[rng.integers(pairs)]
    return [*map(int, drawn.reshape(-1)), int(asked[0])], int(asked[1])


def permuting(
    rng: np.random.Generator, symbols: Sequence[int], length: int, shown: int
) -> tuple[list[int], list[int]]:
    """Returns lists with their permutations, all by one order, a list more, and what it becomes.

    Args:
        rng: where they come from.
        symbols: ids to draw from; the lists share none.
        length: of a list.
        shown: lists that are shown with what they become.

    Raises:
        ValueError: there are too few symbols.
    """
    order = rng.permutation(length)
    lists = _distinct(rng, symbols, (shown + 1) * length).reshape(shown + 1, length)
    prompt = [int(s) for each in lists[:-1] for s in (*each, *each[order])]
    return [*prompt, *map(int, lists[-1])], lists[-1][order].tolist()


def periodic(
    rng: np.random.Generator, count: int, length: int, symbols: int, periods: tuple[int, int]
) -> Int[np.ndarray, "N T"]:
    """Returns sequences of distinct symbols that repeat with a period.

    Args:
        rng: where they come from.
        count: how many.
        length: of each.
        symbols: ids to draw from, from 0.
        periods: the shortest and the longest.
    """
    rows = []
    for _ in range(count):
        period = int(rng.integers(periods[0], periods[1] + 1))
        rows.append(np.resize(_distinct(rng, range(symbols), period), length))
    return np.array(rows, np.int32)


def _distinct(rng: np.random.Generator, symbols: Sequence[int], count: int) -> np.ndarray:
    if count > len(symbols):
        raise ValueError(f"{count} different symbols of {len(symbols)}: give more, or ask for less")
    return rng.choice(np.asarray(symbols), count, replace=False)
