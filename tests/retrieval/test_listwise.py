"""Orders that are written: parsing, windows, prompts."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.data.chat import chat_template
from tokjax.data.rankings import Passage
from tokjax.errors import ConfigError, DataError
from tokjax.retrieval.listwise import (
    Windows,
    parse_permutation,
    permutation_text,
    ranking_chat,
    rerank,
    training_chat,
)


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("[3] > [1] > [3] > [9]", 4, [2, 0, 1, 3]),
        ("", 3, [0, 1, 2]),
        ("none of them", 2, [0, 1]),
        ("[0] > [2]", 2, [1, 0]),
        ("<think>1 and 2 tell of it</think>\n[3] > [2]", 3, [2, 1, 0]),
        ("<think>[3] first", 3, [2, 0, 1]),
    ],
)
def test_permutations_are_read(text, n, expected):
    assert parse_permutation(text, n) == expected


@given(st.permutations(range(12)))
def test_what_is_written_is_read_back(order):
    assert parse_permutation(permutation_text(order), 12) == order


@given(st.text(alphabet="0123456789[] >", max_size=30), st.integers(1, 9))
def test_any_text_names_an_order(text, n):
    assert sorted(parse_permutation(text, n)) == list(range(n))


def test_the_windows_of_the_method():
    assert Windows().of(100) == [(10, 30), (0, 20)]
    assert Windows().of(30) == [(10, 30), (0, 20)]


def test_a_head_narrower_than_a_window_is_not_left_out():
    assert Windows(end=25).of(100) == [(5, 25), (0, 15)]
    assert Windows().of(25) == [(5, 25), (0, 15)]
    assert Windows().of(7) == [(0, 7)]
    assert Windows(start=3, end=12, size=4, step=2).of(50) == [
        *((8, 12), (6, 10), (4, 8)),
        (3, 6),
    ]
    assert Windows().of(1) == Windows().of(0) == []


SIZES = {"start": (0, 5), "more": (1, 40), "size": (2, 9), "step": (1, 9), "n": (0, 50)}


@given(**{name: st.integers(*bounds) for name, bounds in SIZES.items()})
def test_windows_reach_from_end_to_start_without_gaps(start, more, size, step, n):
    spans = Windows(start, start + more, size, min(step, size)).of(n)
    last = min(start + more, n)
    if last - start < 2:
        assert not spans
        return
    assert spans[0][1] == last and spans[-1][0] == start
    for (first, end), (before, until) in itertools.pairwise(spans):
        assert before < first <= until < end


@pytest.mark.parametrize(
    "settings", [{"start": 5, "end": 5}, {"step": 0}, {"step": 21}, {"size": 1, "step": 1}]
)
def test_impossible_windows_are_refused(settings):
    with pytest.raises(ConfigError, match="places"):
        Windows(**settings)


def oracle(asked):
    return [sorted(range(len(items)), key=lambda j: items[j]) for _, _, items in asked]


@given(st.permutations(range(40)))
def test_an_oracle_brings_the_best_to_the_front(items):
    (found,) = rerank([items], oracle)
    assert found[30:] == list(items[30:])  # beyond the windows
    head = sorted(items[:30])
    assert found[0] == head[0]
    # One pass carries to the front what two windows share, 10 items; a second one leaves these.
    assert found[:10] == head[:10]
    (again,) = rerank([found], oracle)
    assert again[:10] == found[:10]
    assert sorted(again[:30]) == head


def test_one_pass_does_not_sort_what_lies_behind():
    items = list(range(30))[::-1]
    (found,) = rerank([items], oracle)
    assert found[:10] == list(range(10)) and found != sorted(found)


def test_windows_of_all_lists_are_asked_for_together():
    calls = []

    def order(asked):
        calls.append([(i, step, len(items)) for i, step, items in asked])
        return oracle(asked)

    lists = [list(range(n)) for n in (30, 5, 1)]
    assert rerank(lists, order) == lists
    assert calls == [[(0, 0, 20), (1, 0, 5)], [(0, 1, 20)]]


def test_what_is_no_permutation_is_refused():
    with pytest.raises(DataError, match=r"\[0, 0\] is no permutation of a window of 2"):
        rerank([["a", "b"]], lambda asked: [[0, 0]])


PASSAGES = (Passage("one two three four", title="T"), Passage("five"))


def test_the_prompt_shows_each_passage_in_a_turn_of_its_own():
    chat = ranking_chat("why", PASSAGES, words=3)
    assert [m["role"] for m in chat] == ["system", *["user", "assistant"] * 3, "user"]
    assert chat[3]["content"] == "[1] T one two"
    assert chat[5]["content"] == "[2] five"
    assert "why" in chat[1]["content"] and "why" in chat[-1]["content"]
    chat_template(ByteTokenizer(), "chatml").render(chat, add_generation_prompt=True)


def test_only_the_answer_of_a_training_record_has_weight():
    chat = training_chat("why", PASSAGES, [1, 0], "five says it")
    answers = [m for m in chat if m["role"] == "assistant"]
    assert [m.get("weight", 1.0) for m in answers] == [0.0, 0.0, 0.0, 1.0]
    assert answers[-1]["content"] == "<think>\nfive says it\n</think>\n[2] > [1]"
    assert parse_permutation(answers[-1]["content"], 2) == [1, 0]
    assert training_chat("why", PASSAGES, [0, 1])[-1]["content"] == "[1] > [2]"
    with pytest.raises(DataError, match=r"\[0, 0\] is no permutation of 2"):
        training_chat("why", PASSAGES, [0, 0])


def test_positions_of_passages_are_what_numbers_mean():
    """A shuffled list with its order read back is the same ranking."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        items = rng.permutation(12).tolist()
        texts = [permutation_text(p) for p in oracle([(0, 0, items)])]
        assert [items[i] for i in parse_permutation(texts[0], 12)] == sorted(items)
