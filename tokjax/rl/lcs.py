"""Longest common substring and subsequence of two texts, with where they lie."""

import numpy as np


def common_substring(short: str, long: str) -> tuple[int, int, int]:
    """Returns start in the first text, start in the second, and length; the first of the longest.

    >>> common_substring("the cat", "a cat sat")
    (3, 1, 4)
    """
    if not short or not long:
        return 0, 0, 0
    if (start := long.find(short)) >= 0:
        return 0, start, len(short)
    first = np.array([ord(c) for c in short])
    second = np.array([ord(c) for c in long])
    best, at = 0, (0, 0)
    before = np.zeros(len(second) + 1, np.int32)
    for i, code in enumerate(first):
        # Length of the common substring that ends here: one more than that of the ends before.
        now = np.zeros_like(before)
        now[1:] = np.where(second == code, before[:-1] + 1, 0)
        k = int(now.argmax())
        if now[k] > best:
            best, at = int(now[k]), (i + 1, k)
        before = now
    return at[0] - best, at[1] - best, best


def common_subsequence(first: str, second: str) -> list[tuple[int, int]]:
    """Returns the pairs of places of a longest common subsequence, in order.

    Of several the one whose last pairs lie furthest behind.

    >>> common_subsequence("ace", "abcde")
    [(0, 0), (1, 2), (2, 4)]
    """
    if first == second:
        return [(i, i) for i in range(len(first))]
    n, m = len(first), len(second)
    lengths = [[0] * (m + 1) for _ in range(n + 1)]
    for i in range(n):
        row, above, letter = lengths[i + 1], lengths[i], first[i]
        for j in range(m):
            row[j + 1] = above[j] + 1 if letter == second[j] else max(row[j], above[j + 1])
    pairs = []
    i, j = n, m
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif lengths[i - 1][j] >= lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]
