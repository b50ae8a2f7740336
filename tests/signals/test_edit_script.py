import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokjax.signals.edit_script import edit_marks, edit_script

INITIAL, REVISED = [11, 12, 13, 14, 2], [11, 15, 13, 2]
ids = st.lists(st.integers(0, 3), max_size=7)


def test_numbers_of_the_edits():
    assert edit_script(INITIAL, REVISED) == [("replace", 1, 1), ("delete", 3, 3)]
    bad, good = edit_marks(INITIAL, REVISED)
    assert np.flatnonzero(bad).tolist() == [1, 3] and np.flatnonzero(good).tolist() == [1]


def test_of_equally_short_scripts_one_is_chosen():
    # A replacement before a deletion before an insertion, from the end.
    assert edit_script([1, 2], [3]) == [("delete", 0, 0), ("replace", 1, 0)]
    assert edit_script([1, 1], [1]) == [("delete", 0, 0)]
    assert edit_script([1], [1, 1]) == [("insert", 0, 0)]
    assert edit_script([1, 2], [2, 1]) == [("replace", 0, 0), ("replace", 1, 1)]


@pytest.mark.parametrize(("a", "b"), [([], []), ([], [5, 6]), ([5, 6], [])])
def test_edits_of_nothing(a, b):
    bad, good = edit_marks(a, b)
    assert bad.tolist() == [True] * len(a) and good.tolist() == [True] * len(b)


@functools.cache
def distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(
        distance(a[1:], b) + 1,
        distance(a, b[1:]) + 1,
        distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


@given(ids, ids)
def test_a_script_is_shortest_and_makes_the_revision(a, b):
    script = edit_script(a, b)
    assert len(script) == distance(tuple(a), tuple(b))
    made, at = [], 0
    for kind, source, target in script:
        made += a[at:source]
        at = source + (kind != "insert")
        assert len(made) == target
        made += [b[target]] if kind != "delete" else []
    assert made + a[at:] == b
    bad, good = edit_marks(a, b)
    kept = [[t for t, m in zip(*pair, strict=True) if not m] for pair in ((a, bad), (b, good))]
    assert kept[0] == kept[1]
