"""The invented language of the reproduction of DCSQE, and its judges."""

import runpy

import numpy as np

from tokjax.finetuning.quality_estimation import Severity, Span, error_spans
from tokjax.reproduction.plan import PLANS

PLAN = runpy.run_path(str(PLANS / "dcsqe.py"))
WORDS = PLAN["WORDS"]
_, MINOR, MAJOR, CRITICAL = Severity


def said(*meanings):
    return [WORDS.target[meaning] for meaning in meanings]


MEANT = [("det", 0), ("adj", 4), ("noun", 6), ("verb", 2), ("det", 1), ("noun", 7)]
RIGHT = [
    ("det", 0, 0),
    ("adj", 4, 0),
    ("noun", 6, 1),
    ("verb", 2, 0),
    ("det", 1, 1),
    ("noun", 7, 0),
]


def judged(changes):
    words = said(*(changes.get(at, meaning) for at, meaning in enumerate(RIGHT)))
    return PLAN["judged_by_people"]([3], words, [MEANT])


def test_references_are_right_whichever_word_and_order_they_take():
    rng = np.random.default_rng(0)
    for _ in range(100):
        source, reference, meant = PLAN["sentence"](rng)
        assert max(source) < WORDS.first_target <= min(reference)
        assert PLAN["judged_by_people"](source, reference, meant).score == 1


def test_people_grade_by_meaning_and_form():
    assert judged({2: ("noun", 6, 0), 3: ("verb", 2, 1)}).score == 1  # synonyms
    assert judged({1: ("adj", 4, 2)}).spans == (Span(1, 2, MINOR),)  # does not agree
    assert judged({3: ("verb", 8, 0)}).spans == (Span(3, 4, MINOR),)  # of the same group
    assert judged({3: ("verb", 9, 0)}).spans == (Span(3, 4, MAJOR),)
    assert judged({3: ("prep", 0, 0)}).spans == (Span(3, 4, CRITICAL),)
    # Another noun, with which the adjective does not agree: all of the phrase is wrong.
    assert judged({2: ("noun", 10, 0)}).spans == (Span(0, 3, MAJOR),)


def test_the_parser_gives_a_tree_of_any_words():
    rng = np.random.default_rng(1)
    for _ in range(200):
        words = rng.integers(WORDS.first_target, WORDS.size, rng.integers(1, 9))
        heads = PLAN["parse"]([str(word) for word in words])
        error_spans(np.ones(len(words), int), heads)  # raises where it is none
        assert heads.count(0) == 1
    assert PLAN["parse"]([str(word) for word in said(*RIGHT)]) == [3, 3, 4, 0, 6, 4]
