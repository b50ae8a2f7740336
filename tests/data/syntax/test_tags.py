import doctest

import numpy as np

from tokjax.data.syntax import tags
from tokjax.data.syntax.tags import UNIVERSAL, Word, count_tags, tag_index, tagged

NOUN, VERB, DOT, X = (UNIVERSAL.index(t) for t in ("NOUN", "VERB", ".", "X"))


def counted(text, offsets, words, ids=None):
    counts = np.zeros((len(offsets), len(UNIVERSAL)))
    count_tags(counts, range(len(offsets)) if ids is None else ids, offsets, text, words)
    return counts


def test_the_order_of_tags_is_that_of_the_reference():
    assert " ".join(UNIVERSAL) == "NOUN VERB ADJ ADV PRON DET ADP NUM CONJ PRT . X"


def test_every_tag_of_universal_dependencies_has_a_universal_one():
    upos = "ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X"
    named = {tag: UNIVERSAL[tag_index(tag) or 0] for tag in upos.split()}
    assert named["PROPN"] == "NOUN" and named["AUX"] == "VERB" and named["PUNCT"] == "."
    assert named["CCONJ"] == named["SCONJ"] == "CONJ" and named["PART"] == "PRT"
    assert all(tag_index(tag) is not None for tag in upos.split())
    assert doctest.testmod(tags).failed == 0


def test_subwords_have_their_words_tag_and_blanks_do_not_matter():
    text = "cats ran.\n"
    offsets = [(0, 2), (2, 4), (4, 8), (8, 9), (9, 10)]  # ca|ts| ran|.|\n
    words = [tagged(0, 4, NOUN), tagged(5, 8, VERB), tagged(8, 9, DOT)]
    found = counted(text, offsets, words)
    assert found.argmax(-1).tolist() == [NOUN, NOUN, VERB, DOT, X] and found.sum() == 5


def test_a_prefix_of_the_next_word_does_not_advance():
    """`a` + `a` + `aa`: a rule by prefixes would give the second subword to the next word."""
    text = "aa aa"
    words = [tagged(0, 2, NOUN), tagged(3, 5, VERB)]
    found = counted(text, [(0, 1), (1, 2), (2, 5)], words)
    assert found.argmax(-1).tolist() == [NOUN, NOUN, VERB]


def test_a_token_over_several_words_belongs_to_the_longest_or_is_shared():
    words = [tagged(0, 2, NOUN), tagged(2, 6, VERB)]
    assert counted("abcdef", [(0, 6)], words)[0, VERB] == 1
    shared = counted("abcd", [(0, 4)], [tagged(0, 2, NOUN), tagged(2, 4, VERB)])[0]
    assert shared[NOUN] == shared[VERB] == 0.5
    contracted = [tagged(0, 2, NOUN), tagged(0, 2, VERB)]  # written as one
    assert counted("du", [(0, 2)], contracted)[0, [NOUN, VERB]].tolist() == [0.5, 0.5]


def test_special_tokens_are_not_counted_and_gaps_are_x():
    found = counted("a b", [(0, 0), (0, 1), (1, 3), (3, 3)], [tagged(0, 1, NOUN)])
    assert found.sum(-1).tolist() == [0, 1, 1, 0] and found[2, X] == 1


def test_uncertain_tags_are_shared_and_repeated_tokens_add_up():
    word = Word(0, 2, ((NOUN, 0.25), (VERB, 0.75)))
    found = counted("ab", [(0, 1), (1, 2)], [word], ids=[1, 1])
    assert found[1, NOUN] == 0.5 and found[1, VERB] == 1.5
