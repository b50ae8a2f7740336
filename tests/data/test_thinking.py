"""Thinking tokens, from records to ids: where they go, what counts, what is refused."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from tokjax.config import resolve
from tokjax.data.arithmetic import ArithmeticSource, solved, text_of
from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.data.config import DataConfig
from tokjax.data.encoding import Encoder
from tokjax.data.prepare import Request
from tokjax.data.records import BadRecord, to_document
from tokjax.data.sources import JsonlSource
from tokjax.data.thinking import Insertion, Thinking, inserted
from tokjax.data.tokenizer_base import Tokenizer
from tokjax.data.tokenizers import TokenizerConfig, build_tokenizer
from tokjax.errors import ConfigError

PLAIN = ByteTokenizer()
GROWN = PLAIN.with_added(["<T>", "<U>"])
T1, T2, END = 257, 258, 256
RECORD = {"prompt": "one two=", "rationale": " 3;", "response": "é4"}
COT = "{prompt}{rationale}{response}"


def encoded(record: Any = RECORD, tokenizer: Tokenizer = GROWN, **settings: Any) -> Any:
    thinking = Thinking(**settings.pop("thinking", {}))
    settings = {"kind": "reasoned", "thinking": thinking, **settings}
    document = to_document(record, JsonlSource(files=("x.jsonl",), **settings), "x:1")
    return Encoder(tokenizer, (END,), (END,)).encode([document])[0]


def without(example):
    """Ids and weights of what is no thinking token."""
    own = ~np.isin(example.tokens, [T1, T2])
    return example.tokens[own].tolist(), example.weights[own].tolist()


def test_no_thinking_tokens_are_the_baseline_id_for_id():
    baseline = encoded(kind="response", tokenizer=PLAIN)
    for tokenizer in (PLAIN, GROWN):
        found = encoded(thinking={"count": 0}, tokenizer=tokenizer)
        np.testing.assert_array_equal(found.tokens, baseline.tokens)
        np.testing.assert_array_equal(found.weights, baseline.weights)
        assert found.num_bytes == baseline.num_bytes
    # An empty rationale matches none.
    found = encoded({**RECORD, "rationale": ""}, thinking={"count": "matched"})
    np.testing.assert_array_equal(found.tokens, baseline.tokens)


def test_a_run_lies_between_question_and_answer_and_its_last_token_predicts_the_answer():
    found = encoded(thinking={"count": 3})
    assert found.tokens.tolist() == [END, *b"one two=", T1, T1, T1, *"é4".encode(), END]
    assert found.weights.tolist() == [0] * 9 + [0] * 3 + [1] * 3 + [1]
    first = int(np.flatnonzero(found.weights)[0])
    assert found.tokens[first - 1] == T1 and found.tokens[first] == "é".encode()[0]


def test_the_scored_tokens_are_the_same_whatever_the_number_and_place_of_thinking_tokens():
    places = ("question", "rationale", "words", "all_words")
    for template, count in itertools.product(("{prompt}{response}", COT), (0, 1, 2, 8)):
        baseline = encoded(template=template)
        for place in places[:: 1 if template == COT else 2]:
            found = encoded(template=template, thinking={"count": count, "place": place})
            assert without(found) == without(baseline)
            runs = {"question": 1, "rationale": 1, "words": 2, "all_words": 3}[place]
            thinking = np.isin(found.tokens, [T1])
            assert thinking.sum() == runs * count
            assert not found.weights[thinking].any()


def test_with_a_rationale_both_count_and_the_run_comes_before_behind_or_among_its_words():
    question, rationale, answer = b"one two=", b" 3;", "é4".encode()
    cases = {
        "question": [*question, T1, *rationale, *answer],
        "rationale": [*question, *rationale, T1, *answer],
        "words": [*b"one", T1, *b" two=", T1, *rationale, *answer],
        "all_words": [*b"one", T1, *b" two=", T1, *rationale, T1, *answer],
    }
    for place, tokens in cases.items():
        found = encoded(template=COT, thinking={"count": 1, "place": place})
        assert found.tokens.tolist() == [END, *tokens, END]
        assert found.weights.sum() == len(rationale) + len(answer) + 1
    # What stands between rationale and answer is written by the model too.
    found = encoded(template="{prompt}{rationale}#{response}", thinking={"count": 1})
    assert found.weights.sum() == len(rationale) + 1 + len(answer) + 1


def test_a_matched_run_is_as_long_as_the_rationale_whether_that_is_kept_or_not():
    for template in ("{prompt}{response}", COT):
        found = encoded(template=template, thinking={"count": "matched"})
        assert (found.tokens == T1).sum() == len(b" 3;")
    assert len(encoded(thinking={"count": "matched"}).tokens) == len(encoded(template=COT).tokens)
    with pytest.raises(BadRecord, match="'rationale' is missing"):
        encoded({"prompt": "a", "response": "b"}, thinking={"count": "matched"})


def test_several_thinking_tokens_take_turns_by_their_position_in_the_run():
    found = encoded(thinking={"count": 3, "tokens": ("<T>", "<U>")})
    assert found.tokens[9:12].tolist() == [T1, T2, T1]
    found = encoded(thinking={"count": 2, "tokens": ("<U>", "<T>"), "place": "words"})
    assert [i for i in found.tokens.tolist() if i > END] == [T2, T1, T2, T1]


def test_rationale_and_answer_may_lie_in_one_field():
    record = {"prompt": "q", "response": "a #### b #### 42"}
    settings: dict[str, Any] = {"rationale_end": "#### ", "thinking": {"count": "matched"}}
    found = encoded(record, **settings)
    assert found.tokens.tolist() == [END, *b"q", *[T1] * len("a #### b "), *b"42", END]
    found = encoded(record, template="{prompt}{rationale}=> {response}", **settings)
    assert bytes(i for i in found.tokens.tolist() if i < END) == b"qa #### b => 42"
    with pytest.raises(BadRecord, match="has no '#### '"):
        encoded({"prompt": "q", "response": "42"}, **settings)


def test_a_record_may_weigh_its_answer_by_itself():
    record = {**RECORD, "response": "456", "weights": [[1, 2, 0.5]]}
    found = encoded(record, template=COT, thinking={"count": 2})
    assert found.weights.tolist() == [0] * 9 + [0] * 2 + [1, 1, 1] + [1, 0.5, 1] + [1]
    by_token = {**record, "weights": [0.25, 2.0, -1.0]}
    found = encoded(by_token, template=COT, thinking={"count": 2, "place": "rationale"})
    assert found.weights.tolist() == [0] * 9 + [1, 1, 1] + [0] * 2 + [0.25, 2, -1] + [-1]


def test_tokens_that_straddle_a_border_are_not_cut():
    # The text "ab cd": one token holds the blank with what is before it, one with what is behind.
    ids, weights = [1, 2, 3], np.array([0, 0, 1], np.float32)
    for offsets, behind_first_word in (
        ([(0, 1), (1, 3), (3, 5)], 2),
        ([(0, 2), (2, 4), (4, 5)], 1),
    ):
        wanted = Insertion(("<T>",), 1, behind=(1,))
        tokens, found = inserted(GROWN, ids, weights, offsets, wanted)
        assert tokens.tolist() == [*ids[:behind_first_word], T1, *ids[behind_first_word:]]
        assert found.sum() == 1
        # A run goes before the token that brings the first character that counts.
        tokens, _ = inserted(GROWN, ids, weights, offsets, Insertion(("<T>",), 1, before=(3,)))
        assert tokens.tolist() == ([1, 2, T1, 3] if behind_first_word == 2 else [1, T1, 2, 3])
    # A character of several tokens has its run behind the last of them.
    wanted = Insertion(("<T>",), 1, behind=(0,))
    assert inserted(GROWN, ids, weights, [(0, 1)] * 3, wanted)[0].tolist() == [1, 2, 3, T1]
    # Words that end in one token share a run.
    wanted = Insertion(("<T>",), 2, behind=(0, 1))
    tokens, _ = inserted(GROWN, ids, weights, [(0, 2), (2, 4), (4, 5)], wanted)
    assert tokens.tolist() == [1, T1, T1, 2, 3]


def test_sums_have_steps_and_thinking_tokens():
    source = ArithmeticSource(
        examples=200, digits=(1, 2), operations=("+", "-", "*"), terms=4, rationale=True
    )
    for found in solved(source):
        parts = (found.question + found.rationale).split("=")[:-1]
        assert len(parts) == 3  # one operation is left to the answer
        assert {eval(part) for part in parts} == {int(found.answer)}
        for before, after in itertools.pairwise(parts):
            assert len(after) < len(before) or "*" in before
    first = next(solved(source))
    for kept in (True, False):
        each = dataclasses.replace(source, rationale=kept, thinking=Thinking(count="matched"))
        text, start, placed = text_of(each, first)
        assert text == first.question + (first.rationale if kept else "") + first.answer
        assert start == len(first.question)
        assert placed == Insertion(("<T>",), None, before=(start,), like=first.rationale)
    assert text_of(source, first)[2] is None
    with pytest.raises(ConfigError, match="needs rationale=True"):
        ArithmeticSource(thinking=Thinking(count=1, place="rationale"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"thinking": {"count": -1}}, "count=-1"),
        ({"thinking": {"count": "match"}}, "'matched'"),
        ({"thinking": {"place": "word"}}, "Did you mean 'words'"),
        ({"thinking": {"count": "matched", "place": "words"}}, "one behind each word"),
        ({"thinking": {"tokens": ()}}, "must name some"),
        ({"thinking": {"tokens": ("<T>", "<T>")}}, "each once"),
        ({"kind": "response", "thinking": {"count": 1}}, "for kind='reasoned'"),
        ({"kind": "text", "rationale_end": "#"}, "for kind='reasoned'"),
        ({"thinking": {"count": 1, "place": "rationale"}}, "needs {rationale} in the template"),
        ({"template": "{rationale}{prompt}{response}"}, "must end in"),
        ({"rationale": ""}, "rationale is empty"),
    ],
)
def test_impossible_settings_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        encoded(**settings)


def test_a_tokenizer_without_the_thinking_token_is_refused_before_anything_is_read():
    def request(added: tuple[str, ...], count: Any) -> Request:
        source = {"name": "arithmetic", "thinking": {"count": count}}
        tree = {"tokenizer": {"name": "bytes", "added": added}, "train": [{"source": source}]}
        data = resolve(DataConfig, tree)
        return Request.of(data.train[0].source, data)

    with pytest.raises(ConfigError, match=r"'<T>' is no special token.*tokenizer\.added"):
        request((), 2).encoder()
    assert request((), 0).encoder().tokenizer.vocab_size == 257
    assert request(("<T>",), 2).encoder().tokenizer.special_tokens["<T>"] == 257


def test_added_tokens_come_behind_all_others_and_no_text_is_read_as_one(tmp_path):
    config = TokenizerConfig(name="bytes", added=("<T>", "<U>"))
    found = build_tokenizer(config, tmp_path)
    assert (found.vocab_size, found.special_tokens["<T>"], found.special_tokens["<U>"]) == (
        *(259, T1, T2),
    )
    assert PLAIN.vocab_size == 257 and "<T>" not in PLAIN.special_tokens
    text = "a<T>é<|endoftext|>"
    ids = found.encode(text)
    assert ids == PLAIN.encode(text)
    assert found.decode([T1, *ids, T2]) == text
    assert (found.token_text(T1), found.token_bytes(T2)) == ("<T>", b"")
    assert found.encode_parts(text, found.find_specials(text))[0] == [97, T1, 195, 169, END]
    assert found.fingerprint == GROWN.fingerprint != PLAIN.fingerprint
    assert found.fingerprint == PLAIN.with_added(["<T>"]).with_added(["<U>"]).fingerprint
    assert PLAIN.with_added([]) is PLAIN
    found.save(tmp_path / "saved")
    back = Tokenizer.load(tmp_path / "saved")
    assert back.fingerprint == found.fingerprint
    assert back.special_tokens == found.special_tokens
    for added in (("",), ("<T>", "<T>"), ("<|endoftext|>",)):
        with pytest.raises(ConfigError, match="cannot be added"):
            build_tokenizer(TokenizerConfig(name="bytes", added=added), tmp_path)
