"""The splitter loses nothing, and a text's beginning is split as the text is."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.data.tokenizer_base import Tokenizer
from tokjax.data.tokenizers import TokenizerConfig, build_tokenizer
from tokjax.data.word_splitter import cut, fixed_patches, split_words
from tokjax.data.word_tokenizer import TEXT_END, WORD_END, WordTokenizer
from tokjax.errors import ConfigError

# Characters that combine with the one before them are kept out: behind a space and a tab they make
# one word of both.
ORDINARY = "abzABZéßñ漢字あ019 \t\n.,;:!?'\"-_()[]{}/@#%&*“”…👍🎉"
ordinary = st.text(st.sampled_from(ORDINARY), max_size=24)
unicode = st.text(st.characters(codec="utf-8"), max_size=24)


def words(text, longest=None):
    return [word.decode() for word in split_words(text, longest)]


def test_words_spaces_punctuation_and_cases():
    assert words("Hello, world!") == ["Hello,", " world!"]
    assert words("howAreYou") == ["how", "Are", "You"]
    assert words("how_are_you") == ["how_", "are_", "you"]
    assert words("a  b") == ["a", "  ", "b"]
    assert words("can't 3.14") == ["can'", "t", " 3.", "14"]
    assert words("") == []


def test_long_words_are_cut_between_characters():
    assert words("verylongword", 10) == ["verylongwo", "rd"]
    assert words("Hello, world!", 4) == ["Hell", "o,", " wor", "ld!"]
    assert words("für", 2) == ["f", "ü", "r"]
    assert cut("a👍b", 2) == [b"a", "👍".encode()[:2], "👍".encode()[2:], b"b"]
    assert fixed_patches("für", 2) == [b"f\xc3", b"\xbcr"]


@settings(max_examples=60, deadline=None)
@given(unicode, st.integers(1, 9) | st.none())
def test_words_joined_are_the_text(text, longest):
    found = split_words(text, longest)
    assert b"".join(found) == text.encode()
    assert all(0 < len(word) <= (longest or 10**6) for word in found)


@settings(max_examples=60, deadline=None)
@given(ordinary, st.data())
def test_a_beginning_is_split_as_the_whole_up_to_its_last_word(text, data):
    whole = split_words(text)
    part = split_words(text[: data.draw(st.integers(0, len(text)))])
    assert part[:-1] == whole[: max(len(part) - 1, 0)]


@settings(max_examples=60, deadline=None)
@given(unicode)
def test_the_tokenizer_loses_nothing_and_ends_every_word(text):
    tokenizer = WordTokenizer(longest=5)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.count(WORD_END) == len(split_words(text, 5))


def test_the_tokenizer_is_built_saved_and_loaded(tmp_path):
    config = TokenizerConfig(name="words", word_bytes=4, word_pieces="patches")
    tokenizer = build_tokenizer(config, tmp_path)
    assert tokenizer.encode("abcde") == [*b"abcd", WORD_END, *b"e", WORD_END]
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert isinstance(again, WordTokenizer)
    assert (again.longest, again.pieces) == (4, "patches")
    assert again.fingerprint == tokenizer.fingerprint != WordTokenizer(4).fingerprint
    assert tokenizer.eos_id == tokenizer.bos_id == TEXT_END
    assert tokenizer.vocab_size == 258


def test_ranges_of_characters_and_open_prompts():
    tokenizer = WordTokenizer()
    ids, ranges = tokenizer.encode_with_offsets("é b")
    assert ids == [0xC3, 0xA9, WORD_END, *b" b", WORD_END]
    assert ranges == [(0, 1), (0, 1), (1, 1), (1, 2), (2, 3), (3, 3)]
    assert tokenizer.begin("The ca") == [*b"The", WORD_END, *b" ca"]
    assert tokenizer.begin("") == []


@pytest.mark.parametrize("wrong", [{"longest": 0}, {"pieces": "wrods"}])
def test_impossible_words_are_refused(wrong):
    with pytest.raises(ConfigError):
        WordTokenizer(**wrong)
    with pytest.raises(ConfigError):
        split_words("a", 0)
