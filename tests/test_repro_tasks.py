"""Chains of operations: what is written is right, and only what is right is taken for right."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokjax.errors import ConfigError
from tokjax.reproduction.tasks import ANSWER, LINE_END, THINK, Chains, given_answer
from tokjax.reproduction.tasks.chains import WORDS_A_LINE, apply

ALL = (("+", 4.0), ("-", 2.0), ("*", 1.0), ("@", 1.0), ("&", 1.0), ("~", 1.0))
CHAINS = Chains(steps=(2, 6), operations=ALL, lines=(1, 2, 4), modulus=7)


def drawn(chains, count, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        question = chains.question(rng)
        yield question, chains.prompt(question), chains.response(question, rng)


def test_a_question_and_its_thinking_as_text():
    question = (("+", 4), ("*", 7))
    chains = Chains(steps=(1, 2), operations=ALL, lines=(2,))
    assert chains.prompt(question) == f"1:+4 2:*7 {THINK}"
    assert chains.response(question, np.random.default_rng(0)) == (
        " 1:1/2 +4 0 = 4 ; 1:2/2 +4 0 = 4 ; 2:1/2 *7 4 = 8 ; 2:2/2 *7 4 = 8 ; </think> 8"
    )
    assert chains.numbers(question) == [0, 4, 8]


@given(st.integers(0, 2**32 - 1))
def test_thinking_is_right_line_by_line_and_in_the_vocabulary(seed):
    words = set(CHAINS.words)
    assert len(words) == len(CHAINS.words)
    for question, prompt, response in drawn(CHAINS, 3, seed):
        told = response.split()
        assert {*prompt.split(), *told} <= words
        assert 2 <= len(question) <= 6
        end = told.index(ANSWER)
        lines = np.array(told[:end]).reshape(-1, WORDS_A_LINE)
        place, number, last, done = 0, 0, 0, 0
        for head, operand, before, equals, after, closing in lines:
            i, line, count = (int(n) for n in head.replace("/", ":").split(":"))
            if line == 1:
                assert done == place == i - 1  # the paragraph before is whole
                place, number = i, last
            assert (i, equals, closing) == (place, "=", LINE_END)
            assert count in (1, 2, 4)
            assert operand == f"{question[i - 1][0]}{question[i - 1][1]}"
            assert int(before) == number
            last = apply(operand[0], int(before), int(operand[1:]), 7)
            assert int(after) == last
            done = i if line == count else done
        assert done == len(question)
        assert told[end + 1 :] == [str(last)]
        assert CHAINS.correct(question, told)


def test_paragraphs_keep_their_number_of_lines_as_often_as_they_should():
    chains = Chains(steps=(8, 8), lines=(1, 2, 3, 4), redraw=0.3)
    kept, changes, lengths = 0, 0, []
    for _, _, response in drawn(chains, 400):
        words = response.split()
        lengths.append(words.index(ANSWER) + 1)
        heads = [w for w in words if ":1/" in w]
        counts = [w.split("/")[1] for w in heads]
        kept += sum(a == b for a, b in itertools.pairwise(counts))
        changes += len(counts) - 1
    assert kept / changes == pytest.approx(0.7 + 0.3 / 4, abs=0.02)
    assert np.mean(lengths) == pytest.approx(8 * 6 * 2.5 + 1, rel=0.05)


def test_only_the_right_word_right_behind_the_thinking_is_right():
    question = (("+", 4), ("+", 2))
    text = "1:1/1 +4 0 = 4 ; 2:1/1 +2 4 = 6 ; </think> 6"
    right = text.split()
    assert CHAINS.correct(question, right)
    assert CHAINS.correct(question, [*right, "</s>"])
    assert CHAINS.correct(question, [ANSWER, "6"])  # the thinking itself is not judged
    for wrong in ([*right[:-1], "5"], right[:-1], right[:-2], [], [*right[:-1], "</s>", "6"]):
        assert not CHAINS.correct(question, wrong)
    assert given_answer(["6", ANSWER]) is None


def test_tables_are_arbitrary_and_always_the_same():
    tables = {name: [[apply(name, a, b, 7) for b in range(7)] for a in range(7)] for name in "@&~"}
    for name, table in tables.items():
        assert {n for row in table for n in row} == set(range(7))
        assert table == [[apply(name, a, b, 7) for b in range(7)] for a in range(7)]
    assert tables["@"] != tables["&"] != tables["~"]
    assert apply("-", 2, 5, 7) == 4


def test_operations_occur_as_often_as_they_should():
    chains = Chains(steps=(5, 5), operations=(("+", 3.0), ("@", 1.0)))
    names = [name for question, _, _ in drawn(chains, 500) for name, _ in question]
    assert names.count("+") / len(names) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": (3, 2)},
        {"steps": (0, 2)},
        {"lines": ()},
        {"lines": (0,)},
        {"modulus": 1},
        {"operations": ()},
        {"operations": (("/", 1.0),)},
        {"operations": (("+", 0.0),)},
        {"redraw": 1.5},
    ],
)
def test_impossible_chains_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong)).rstrip("s")):
        Chains(**wrong)
