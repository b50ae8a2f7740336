"""The fewest edits from one sequence to another, and which tokens they concern."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Shaped

Ids = Sequence[int] | Shaped[np.ndarray, "n"]


class Edit(NamedTuple):
    """One edit: at place `source` of the initial sequence, at place `target` of the revised one."""

    kind: Literal["replace", "delete", "insert"]
    source: int
    target: int


def edit_script(initial: Ids, revised: Ids) -> list[Edit]:
    """Returns the fewest edits that make the revised sequence of the initial one, in order.

    Of several shortest scripts it is the one that, walking back from both ends, prefers equal
    tokens, then a replacement, then a deletion, then an insertion (a recommendation of tokjax).

    >>> [tuple(edit) for edit in edit_script([11, 12, 13, 14, 2], [11, 15, 13, 2])]
    [('replace', 1, 1), ('delete', 3, 3)]
    """
    a, b = np.asarray(initial, np.int64), np.asarray(revised, np.int64)
    distance, edits = _distances(a, b), []
    i, j = len(a), len(b)
    while i or j:
        if i and j and a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
        elif i and j and distance[i, j] == distance[i - 1, j - 1] + 1:
            i, j = i - 1, j - 1
            edits.append(Edit("replace", i, j))
        elif i and distance[i, j] == distance[i - 1, j] + 1:
            i -= 1
            edits.append(Edit("delete", i, j))
        else:
            j -= 1
            edits.append(Edit("insert", i, j))
    return edits[::-1]


def _distances(a: Int[np.ndarray, "n"], b: Int[np.ndarray, "m"]) -> Int[np.ndarray, "n1 m1"]:
    """Returns the edit distance of every beginning of one sequence to every one of the other."""
    columns = np.arange(len(b) + 1, dtype=np.int32)
    found = np.empty((len(a) + 1, len(b) + 1), np.int32)
    found[0] = columns
    for i, token in enumerate(a, 1):
        above = found[i - 1]
        row = above + 1
        np.minimum(row[1:], above[:-1] + (b != token), out=row[1:])
        # Insertions run along the row: the least of what any earlier column costs plus the way.
        found[i] = np.minimum.accumulate(row - columns) + columns
    return found


def edit_marks(initial: Ids, revised: Ids) -> tuple[Bool[np.ndarray, "n"], Bool[np.ndarray, "m"]]:
    """Returns the deleted or replaced tokens of the first, and the new tokens of the second."""
    bad, good = np.zeros(len(initial), bool), np.zeros(len(revised), bool)
    for edit in edit_script(initial, revised):
        if edit.kind != "insert":
            bad[edit.source] = True
        if edit.kind != "delete":
            good[edit.target] = True
    return bad, good
