import numpy as np
import pytest

from tokjax.decoding.contrast import token_classes
from tokjax.decoding.contrast.token_classes import class_of_word, guess_tags, merge_words
from tokjax.errors import DataError


@pytest.mark.parametrize(
    ("word", "tag", "expected"),
    [
        ('"', "``", "P"),
        (":", ":", "P"),
        (".", ".", "P"),
        (",", ",", "P"),
        ("?", ".", "P"),
        ("\n", "NN", "P"),
        ("\n\n", "NN", "P"),
        ("", "NN", "P"),
        ("__", "NN", "P"),
        ("<s>", "NN", "P"),
        ("of", "IN", "F"),
        ("The", "DT", "F"),
        ("to", "TO", "F"),
        ("must", "MD", "F"),
        ("and", "CC", "F"),
        ("who", "WP", "F"),
        ("which", "WDT", "F"),
        ("He", "PRP", "F"),
        ("its", "PRP$", "F"),
        ("Was", "VBD", "F"),
        ("did", "VBD", "F"),
        ("according", "VBG", "F"),
        ("Q", "NN", "F"),
        ("Japan", "NNP", "C"),
        ("'tower", "NN", "C"),
        ("-blue", "JJ", "C"),
        ("walked", "VBD", "C"),
        ("1969", "CD", "C"),
        ("'s", "POS", "C"),
        ("quickly", "RB", None),
        ("oh", "UH", None),
    ],
)
def test_the_first_rule_that_matches_gives_the_class(word, tag, expected):
    assert class_of_word(word, tag, bos="<s>") == expected


@pytest.mark.parametrize(
    "pieces",
    [
        ["<s>", "▁The", "▁cap", "ital", "▁of", "▁Japan", ",", "▁Tok", "yo", ".", "<0x0A>"],
        ["<s>", "ĠThe", "Ġcap", "ital", "Ġof", "ĠJapan", ",", "ĠTok", "yo", ".", "Ċ"],
        ["<s>", " The", " cap", "ital", " of", " Japan", ",", " Tok", "yo", ".", "\n"],
    ],
)
def test_all_tokens_of_a_word_share_its_class_in_every_tokenizers_spelling(pieces):
    found = token_classes(pieces, bos="<s>")
    assert np.flatnonzero(found.punctuation).tolist() == [0, 6, 9, 10]
    assert np.flatnonzero(found.concept).tolist() == [2, 3, 5, 7, 8]
    assert np.flatnonzero(found.functional).tolist() == [1, 4]


def test_the_first_token_is_punctuation_whatever_it_is():
    found = token_classes(["Tok", "yo", "▁is"])
    assert found.punctuation.tolist() == [True, False, False]
    assert found.concept.tolist() == [False, True, False]
    assert token_classes([]).concept.shape == (0,)


def test_a_tagger_decides():
    def tagger(words):
        assert words == ["They", "soon", "left"]
        return ["PRP", "RB", "VBD"]

    found = token_classes(["▁They", "▁soon", "▁le", "ft"], tagger)
    assert found.concept.tolist() == [False, False, True, True]
    assert not found.functional[1:].any()
    with pytest.raises(DataError, match="gave 1 tags for 2 words"):
        token_classes(["▁a", "▁b"], lambda words: ["NN"])


def test_words_begin_at_spaces_and_punctuation_stands_alone():
    assert merge_words(["▁", "Tok", "yo", "...", "x", "▁y"])[0] == ["Tokyo", "...", "x", "y"]
    assert merge_words(["▁don", "'", "t"])[1] == [[0], [1], [2]]


def test_without_a_tagger_what_is_no_function_word_is_a_noun():
    assert guess_tags(["Of", "could", "runs", "3rd", "--", "not"]) == [
        *("IN", "MD", "NN", "CD", ".", "RB"),
    ]
