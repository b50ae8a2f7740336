import itertools
import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.data.tokenizers import TokenizerConfig, build_tokenizer
from tokjax.decoding.constrained import TokenTable, choices, matches, regex
from tokjax.decoding.constrained.byte_automaton import of_texts
from tokjax.decoding.constrained.regex import byte_automaton
from tokjax.errors import ConfigError

pytest.importorskip("outlines_core", reason="the extra 'constrained' is not installed")


def simple_patterns():
    """Small expressions over a and b that mean the same to Python and to Rust."""
    letters = st.sampled_from(["a", "b", "[ab]", ""])
    return st.recursive(
        letters,
        lambda inner: st.one_of(
            st.tuples(inner, inner).map(lambda p: f"(?:{p[0]}|{p[1]})"),
            st.tuples(inner, inner).map("".join),
            st.tuples(inner, st.sampled_from(["*", "?", "{1,2}"])).map(
                lambda p: f"(?:{p[0]}){p[1]}"
            ),
        ),
        max_leaves=5,
    )


@given(simple_patterns())
@settings(max_examples=60, deadline=None)
def test_the_language_is_that_of_the_whole_expression(pattern):
    automaton = byte_automaton(pattern)
    for n in range(5):
        for letters in itertools.product("ab", repeat=n):
            text = "".join(letters)
            assert automaton.matches(text.encode()) == bool(re.fullmatch(pattern, text))


def test_a_later_alternative_that_is_longer_is_kept(by_bytes):
    automaton = regex("a|ab|abc?d", by_bytes)
    for text in ("a", "ab", "abd", "abcd"):
        assert automaton.matches(text.encode())
    assert not automaton.matches(b"abc")


@pytest.mark.parametrize("pattern", ["(?:ab|a)(?:b|ba)*", "[^x]{1,3}", "\\d+"])
def test_tokens_of_several_bytes_write_the_same_texts(pattern, table):
    pieces = (
        b"a",
        b"b",
        b"ab",
        b"ba",
        b"bab",
        b"x",
        b"1",
        b"23",
        "\u00e9".encode(),
        b"\xc3",
        b"\xa9",
    )
    small, bytewise = regex(pattern, table(*pieces)), byte_automaton(pattern)
    seen = set()
    for n in range(4):
        for tokens in itertools.product(range(1, len(pieces) + 1), repeat=n):
            text = b"".join(pieces[t - 1] for t in tokens)
            assert small.matches(tokens) == bytewise.matches(text), text
            seen.add(small.matches(tokens))
    assert seen == {True, False}


def test_parts_of_characters_are_tokens_like_others(table):
    automaton = regex("\u00e9+", table(b"\xc3", b"\xa9", b"\xa9\xc3", b"a", "\u00e9".encode()))
    assert automaton.matches([1, 2]) and automaton.matches([5]) and automaton.matches([1, 3, 2])
    assert not automaton.matches([1]) and automaton.run([2]) == -1 and automaton.run([4]) == -1
    np.testing.assert_array_equal(np.flatnonzero(automaton.allowed(0)), [1, 5])


def test_special_tokens_are_never_allowed_but_an_eos_where_the_text_is_complete(by_bytes):
    tokenizer = ByteTokenizer()
    automaton = regex("(?s).*", by_bytes)
    allowed = automaton.allowed(0)
    assert allowed[tokenizer.eos_id]
    for i in tokenizer.special_tokens.values():
        assert allowed[i] == (i == tokenizer.eos_id)
    inside = automaton.run([0xE6])  # the first of three bytes
    assert not automaton.allowed(inside)[tokenizer.eos_id]
    ended = automaton.run([tokenizer.eos_id])
    np.testing.assert_array_equal(np.flatnonzero(automaton.allowed(ended)), [tokenizer.eos_id])


def test_what_no_token_leads_on_from_is_left_out(table):
    # Without a token for c, "ac" cannot be written: nothing may lead towards it.
    automaton = regex("a(?:c|bb)|c*b", table(b"a", b"b", b"ab"))
    rows = matches(automaton)
    assert sorted(rows) == [[1, 2, 2], [2], [3, 2]]
    automaton = regex("ac|b", table(b"a", b"b"))
    np.testing.assert_array_equal(np.flatnonzero(automaton.allowed(0)), [2])
    with pytest.raises(ConfigError, match="'ac' matches no text that this vocabulary can write"):
        regex("ac", table(b"a", b"b"))


@given(simple_patterns())
@settings(max_examples=40, deadline=None)
def test_distances_are_those_of_the_shortest_texts(pattern):
    pieces = (b"a", b"b", b"ba")
    table = TokenTable("distances", (), (b"", *pieces))
    if not any(
        re.fullmatch(pattern, "".join(t)) for n in (1, 2) for t in itertools.product("ab", repeat=n)
    ):
        assume(not byte_automaton(pattern).matches(b""))
    automaton = regex(pattern, table)
    for state in range(len(automaton.next)):
        reached, steps = {state}, 0
        while not any(automaton.distance[s] == 0 for s in reached):
            reached = {int(t) for s in reached for t in automaton.next[s] if t >= 0}
            steps += 1
            assert reached  # never a dead end
        assert steps == automaton.distance[state]
    lengths = [n for n in range(1, 7) if _has_text(automaton, n)]
    assert automaton.shortest == lengths[0]


def _has_text(automaton, n):
    states = {0}
    for _ in range(n):
        states = {int(t) for s in states for t in automaton.next[s] if t >= 0}
    return any(automaton.distance[s] == 0 for s in states)


def test_choices_allow_exactly_the_texts(by_bytes, table):
    automaton = choices(["yes", "yesterday", "\u00e9"], by_bytes)
    for text, found in (("yes", True), ("yesterday", True), ("\u00e9", True), ("yest", False)):
        assert automaton.matches(text.encode()) is found
    assert automaton.shortest == 2
    rows = matches(choices(["ab", "a"], table(b"a", b"b", b"ab")))
    assert sorted(rows) == [[1, 0], [1, 2], [3]]  # "a" could go on, and so ends with EOS
    for bad in ([], "yes", [1]):
        with pytest.raises(ConfigError, match="must be a list of one or more texts"):
            choices(bad, by_bytes)


def test_few_matches_are_listed_and_many_are_an_error(table):
    letters = table(b"a", b"b", b"ab", eos=())
    assert sorted(matches(choices(["ab", "ba"], letters))) == [[1, 2], [2, 1], [3]]
    with pytest.raises(ConfigError, match="more than 5 sequences"):
        matches(regex("[ab]*", letters), at_most=5)


@pytest.mark.parametrize("pattern", ["[", "a)(b", "^a", "a$", "x(?=y)", r"\bfoo", "(a)\\1"])
def test_expressions_that_cannot_be_meant_are_refused(pattern, by_bytes):
    with pytest.raises(ConfigError, match=r"cannot be used|matches no text"):
        regex(pattern, by_bytes)


def test_an_empty_text_needs_an_eos(by_bytes, table):
    assert regex("", by_bytes).shortest == 1
    with pytest.raises(ConfigError, match="matches the empty text only"):
        regex("", table(b"a", eos=()))
    assert regex("a*", table(b"a", eos=())).shortest == 1


def test_the_table_is_small_whatever_the_vocabulary(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat sat on the mat and the dog sat on the log 12 345\n" * 40)
    tokenizer = build_tokenizer(TokenizerConfig(vocab_size=280, corpus=str(corpus)), tmp_path)
    automaton = regex('[^"]{0,40}', TokenTable.of(tokenizer, vocab_size=5000))
    assert automaton.next.shape[1] < 100 and automaton.classes.shape == (5000,)
    assert not automaton.allowed(0)[tokenizer.vocab_size :].any()
    ids = tokenizer.encode("the cat \u65e5")
    assert automaton.matches(ids) and not automaton.matches(tokenizer.encode('a"'))


def test_a_constraint_that_needs_too_much_says_what_to_do(monkeypatch, by_bytes):
    monkeypatch.setattr("tokjax.decoding.constrained.automaton._MAX_ENTRIES", 1000)
    with pytest.raises(ConfigError, match=r"states for .* kinds of tokens.*shorten"):
        regex("[a-z][0-9]{0,999}", by_bytes)


def test_eos_ids_must_be_in_the_vocabulary():
    with pytest.raises(ConfigError, match="EOS id 999"):
        TokenTable.of(ByteTokenizer(), eos_ids=[999])


def test_equal_constraints_are_made_once(by_bytes):
    again = TokenTable.of(ByteTokenizer())
    assert regex("ab*", by_bytes) is regex("ab*", again)
    assert choices(["a", "b"], by_bytes) is choices(["a", "b"], again)


def test_a_trie_reads_what_it_was_made_of():
    automaton = of_texts([b"ab", b"", b"a"])
    assert [automaton.matches(t) for t in (b"", b"a", b"ab", b"b")] == [True] * 3 + [False]
