import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokjax.errors import ConfigError, DataError
from tokjax.evaluation.requests import Pair, Writing, fitted, rolling_pairs, split_pair, writing


def by_words(text):
    """Ids of words with the blank before each, as most tokenizers cut."""
    ids, word = [], ""
    for letter in text:
        if letter == " " and word.strip():
            ids.append(word)
            word = ""
        word += letter
    return [*ids, word] if word else ids


def test_a_pair_is_encoded_together_and_blanks_go_with_the_continuation():
    for context, continuation in (("to be", " or not"), ("to be ", "or not")):
        assert split_pair(by_words, context, continuation, 0) == (
            ["to", " be"],
            [" or", " not"],
        )
    with_bos = lambda text: ["<s>", *by_words(text)]  # noqa: E731
    assert split_pair(with_bos, "a", " b", "<s>") == (["<s>", "a"], [" b"])


def test_the_prefix_takes_the_place_of_an_empty_context():
    assert split_pair(by_words, "", "a b", 0) == ([0], ["a", " b"])
    assert split_pair(lambda text: [0, *by_words(text)], "", "a b", 0) == ([0], ["a", " b"])
    assert split_pair(by_words, " ", "a", 0) == ([0], [" a"])


def test_contexts_are_cut_from_the_left_and_it_is_told():
    # The last id is read by nobody: 4 positions hold 5 ids.
    assert fitted([1, 2, 3], [4, 5], 4) == Pair((1, 2, 3), (4, 5), 0)
    assert fitted([0, 1, 2, 3], [4, 5], 4) == Pair((1, 2, 3), (4, 5), 1)
    assert fitted([0, 1], [2, 3, 4, 5], 4) == Pair((1,), (2, 3, 4, 5), 1)
    for bad in ([], [1, 2, 3, 4, 5]):
        with pytest.raises(DataError, match="must have 1 to 4"):
            fitted([0], bad, 4)


def test_windows_are_the_harnesss():
    pairs = rolling_pairs(list(range(10)), -1, 4)
    assert pairs == [
        Pair((-1,), (0, 1, 2, 3)),
        Pair((3,), (4, 5, 6, 7)),
        Pair((5, 6, 7), (8, 9)),
    ]
    assert rolling_pairs([], -1, 4) == []


@given(st.integers(0, 40), st.integers(1, 9))
def test_each_id_is_scored_once_behind_all_that_fits(n, positions):
    ids, found = list(range(n)), []
    for pair in rolling_pairs(ids, -1, positions):
        whole = [*pair.context, *pair.continuation]
        assert len(pair.context) >= 1 and len(whole) <= positions + 1
        start = pair.continuation[0]
        assert (
            whole == [-1, *ids][start + 1 - len(pair.context) : start + 1 + len(pair.continuation)]
        )
        assert len(whole) == positions + 1 or pair.context[0] == -1
        found += pair.continuation
    assert found == ids


def test_generation_arguments_are_understood_or_refused():
    greedy = (("temperature", 0.0),)
    assert writing({}) == Writing((), 256, greedy)
    assert writing({"until": "\n", "do_sample": False, "temperature": 0.7}).settings == greedy
    given = {"until": ["\n", "", "\n", "Q:"], "max_gen_toks": 9, "do_sample": True, "top_p": 0.9}
    assert writing(given) == Writing(("\n", "Q:"), 9, (("temperature", 1.0), ("top_p", 0.9)))
    assert writing({"temperature": 0.5, "max_tokens": 3}).settings == (("temperature", 0.5),)
    assert writing({"num_beams": 1, "top_k": None}) == Writing((), 256, greedy)
    with pytest.raises(ConfigError, match="num_beams must be 1"):
        writing({"num_beams": 2})
    with pytest.raises(ConfigError, match="'until'"):
        writing({"untill": "x"})
