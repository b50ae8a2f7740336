"""Tags, severities, phrases and scores: what makes a translation's errors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokjax.errors import ConfigError, DataError, StorageError
from tokjax.finetuning.quality_estimation import (
    Severity,
    Span,
    conllu_parser,
    covered,
    edited_words,
    error_spans,
    sentence_score,
    severities,
    span_severities,
    word_severities,
)

OK, MINOR, MAJOR, CRITICAL = Severity
TREE = [2, 0, 2, 3]
RANKS = np.array([0, 3, 4, 7, 8, 29, 40])


def test_numbers_of_the_severities():
    everywhere = np.ones(7, bool)
    expected = [OK, OK, MINOR, MINOR, MAJOR, MAJOR, CRITICAL]
    assert severities(RANKS, everywhere).tolist() == expected
    candidates = np.array([1, 1, 0, 1, 1, 1, 0], bool)
    assert severities(RANKS, candidates).tolist() == [OK, OK, OK, MINOR, MAJOR, MAJOR, OK]
    assert severities(RANKS, everywhere, (1, 4, 8)).tolist() == [0, 1, 2, 2, 3, 3, 3]
    with pytest.raises(ConfigError, match="must be three ranks that rise"):
        severities(RANKS, everywhere, (4, 3, 8))


def test_a_reference_has_no_errors():
    words = ["a", "b", "c", "a"]
    changed, missing = edited_words(words, words)
    assert not changed.any() and not missing
    spans = error_spans(severities(np.full(4, 99), changed), [0, 1, 2, 3])
    assert spans == [] and sentence_score(spans, 4) == 1


def test_words_are_tagged_by_the_fewest_edits():
    changed, missing = edited_words(["the", "black", "cat", "sat", "there"], ["the", "cat", "sat"])
    assert changed.tolist() == [False, True, False, False, True] and not missing
    changed, missing = edited_words(["the", "dog", "sat"], ["the", "old", "cat", "sat"])
    assert changed.tolist() == [False, True, False] and missing
    assert edited_words([], ["a"])[1] and edited_words(["a"], [])[0].tolist() == [True]


def test_a_word_is_as_bad_as_its_worst_token():
    assert word_severities(np.array([0, 2, 1, 0]), [0, 0, 1, 2], 3).tolist() == [2, 1, 0]
    for numbers, count in (([0, 0, 1], 2), ([0, 0, 2, 2], 3), ([0, 1, 2, 3], 3)):
        with pytest.raises(DataError, match="must each have one of"):
            word_severities(np.array([0, 2, 1, 0]), numbers, count)


def test_numbers_of_the_phrases():
    assert covered(TREE, 1, 1) == (1, 1) and covered(TREE, 3, 4) == (3, 4)
    assert covered(TREE, 1, 4) == (1, 4)
    assert error_spans([1, 0, 0, 2], TREE) == [Span(0, 1, MINOR), Span(3, 4, MAJOR)]
    assert error_spans([0, 0, 1, 3], TREE) == [Span(2, 4, CRITICAL)]
    assert error_spans([1, 2, 0, 3]) == [Span(0, 1, MINOR), Span(1, 2, MAJOR), Span(3, 4, CRITICAL)]


def test_a_phrase_takes_in_the_ancestor_and_what_lies_between():
    # The two words hang on the fourth, from which the way leads over the sixth.
    heads = [4, 4, 4, 0, 6, 4]
    assert error_spans([0, 1, 1, 0, 0, 0], heads) == [Span(1, 4, MINOR)]
    # Word 5 hangs on 6: with 3 and 4 the way from 5 to 4 leads over 6.
    assert error_spans([0, 0, 0, 1, 2, 0], heads) == [Span(3, 6, MAJOR)]
    # The way leads to the left, over words that were right, and into an earlier error.
    assert error_spans([3, 0, 1, 1], [0, 1, 1, 1]) == [Span(0, 1, CRITICAL), Span(0, 4, CRITICAL)]


def test_the_node_above_several_roots_adds_no_word():
    assert covered([0, 0, 0, 0], 2, 3) == (2, 3)
    assert covered([2, 0, 4, 0, 4], 3, 5) == (3, 5)
    assert covered([2, 0, 4, 0], 1, 3) == (1, 4)


@st.composite
def trees(draw):
    """Heads of a random tree, two words, and severities."""
    count = draw(st.integers(1, 8))
    order = draw(st.permutations(range(1, count + 1)))
    heads = [0] * count
    for i, word in enumerate(order[1:], 1):
        heads[word - 1] = order[draw(st.integers(0, i - 1))]
    first = draw(st.integers(1, count))
    return heads, first, draw(st.integers(first, count))


@given(trees())
def test_a_phrase_is_the_shortest_connected_interval(tree):
    heads, first, last = tree

    def connected(low, high):
        inside = set(range(low, high + 1))
        return sum(heads[word - 1] not in inside for word in inside) == 1

    low, high = covered(heads, first, last)
    assert low <= first and last <= high and connected(low, high)
    for other_low in range(low, first + 1):
        for other_high in range(last, high + 1):
            if (other_low, other_high) != (low, high):
                assert not connected(other_low, other_high)


def test_numbers_of_the_score():
    assert sentence_score([Span(0, 2, MINOR), Span(4, 5, MAJOR)], 10) == pytest.approx(0.89)
    assert sentence_score([], 10) == 1.0
    assert sentence_score([Span(0, 1, CRITICAL)] * 2, 2) == -4
    assert sentence_score([Span(0, 1, MINOR)], 2, {MINOR: 1.0}) == 0.5
    assert span_severities([Span(0, 1, CRITICAL), Span(0, 3, MINOR)], 4).tolist() == [3, 1, 1, 0]


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([0, 1], "2 heads for 3 words"),
        ([0, 1, 4], "word 3 of 3 has the head 4"),
        ([2, 1, 0], "circle"),
    ],
)
def test_heads_of_no_tree_are_refused(heads, message):
    with pytest.raises(DataError, match=message):
        error_spans([1, 1, 1], heads)


CONLLU = """# text = We did not go
1\tWe\twe\tPRON\t_\t_\t4\tnsubj\t_\t_
2-3\tdidn't\t_\t_\t_\t_\t_\t_\t_\t_
2\tdid\tdo\tAUX\t_\t_\t4\taux\t_\t_
3\tnot\tnot\tPART\t_\t_\t4\tadvmod\t_\t_
3.1\telided\t_\t_\t_\t_\t_\t_\t_\t_
4\tgo\tgo\tVERB\t_\t_\t0\troot\t_\t_

1\tHello\thello\tINTJ\t_\t_\t0\troot\t_\t_
"""


def test_trees_come_from_a_conllu_file(tmp_path):
    path = tmp_path / "trees.conllu"
    path.write_text(CONLLU)
    parse = conllu_parser(path)
    assert parse(["We", "did", "not", "go"]) == [4, 4, 4, 0] and parse(["Hello"]) == [0]
    with pytest.raises(DataError, match="no tree of the sentence 'We go'"):
        parse(["We", "go"])
    for wrong, message in (
        ("1\tHello\n", "line 1: 2 fields"),
        (CONLLU.replace("2\tdid", "5\tdid"), "expected word 2"),
    ):
        path.write_text(wrong)
        with pytest.raises(DataError, match=message):
            conllu_parser(path)
    with pytest.raises(StorageError):
        conllu_parser(tmp_path / "none.conllu")
