import collections
import importlib.util

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tokjax.decoding.search import bleu, chrf, exact_match, mbr, pairwise, unigram_f1, vote
from tokjax.errors import ConfigError, DataError

WORKED = [text.split() for text in ("a b c", "a b d", "a b", "x y")]
INSTALLED = importlib.util.find_spec("sacrebleu") is not None


def test_the_most_central_candidate_is_chosen_itself_included():
    found = mbr(WORKED, unigram_f1)
    np.testing.assert_allclose(found.expected, [0.6167, 0.6167, 0.65, 0.25], atol=5e-5)
    assert found.index == 2


def plain_f1(hypothesis, reference):
    shared = sum((collections.Counter(hypothesis) & collections.Counter(reference)).values())
    total = len(hypothesis) + len(reference)
    return 2 * shared / total if total else 1.0


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=6))
def test_vectorised_utilities_equal_plain_ones(candidates):
    np.testing.assert_allclose(
        unigram_f1(candidates, candidates[:3]), pairwise(plain_f1)(candidates, candidates[:3])
    )
    equal = pairwise(lambda h, r: float(h == r))
    np.testing.assert_array_equal(
        exact_match(candidates, candidates), equal(candidates, candidates)
    )
    # With exact match it is a vote, ties to the earliest.
    texts = [tuple(ids) for ids in candidates]
    assert mbr(candidates, exact_match).index == vote(texts).index


def test_equal_candidates_go_to_the_earliest_whatever_the_rounding():
    for n in range(2, 30):
        candidates = [[i % 7, 50 + i % 3] for i in range(n)]
        found = mbr(candidates, unigram_f1)
        equal = np.flatnonzero(np.isclose(found.expected, found.expected.max()))
        assert found.index == equal[0]


def test_weights_stand_for_repeated_references():
    weighted = mbr(WORKED, unigram_f1, weights=[1, 0, 0, 3])
    repeated = mbr(WORKED, unigram_f1, references=[WORKED[0], WORKED[3], WORKED[3], WORKED[3]])
    np.testing.assert_allclose(weighted.expected, repeated.expected)
    assert weighted.index == 3
    np.testing.assert_allclose(mbr(WORKED, unigram_f1, weights=[5] * 4).expected[2], 0.65)


def test_nonsense_is_refused():
    for weights in ([1, 1], [0] * 4, [1, 1, 1, -1], [1, 1, 1, np.nan]):
        with pytest.raises(ConfigError, match="must be 4 numbers, 0 or more and not all 0"):
            mbr(WORKED, unigram_f1, weights=weights)
    with pytest.raises(ConfigError, match="give one candidate or more"):
        mbr([], unigram_f1)
    with pytest.raises(DataError, match="instead of 4 x 4 finite numbers"):
        mbr(WORKED, lambda h, r: np.full((4, 4), np.nan))


@pytest.mark.skipif(INSTALLED, reason="sacrebleu is installed")
def test_without_sacrebleu_its_utilities_say_what_to_install():
    for make in (chrf, bleu):
        with pytest.raises(ConfigError, match=r"pip install 'tokjax\[eval\]'"):
            make()


@pytest.mark.skipif(not INSTALLED, reason="sacrebleu is not installed")
def test_sacrebleus_utilities_are_its_sentence_scores():
    texts = ["the cat sat on the mat", "the cat sat on a mat", "a dog ran away from home"]
    for make in (chrf, bleu):
        found = mbr(texts, make())
        assert found.index in (0, 1) and found.expected[2] < 0.5
        np.testing.assert_allclose(np.diag(make()(texts, texts)), 1, atol=1e-6)
        assert (make()(texts, texts) <= 1 + 1e-9).all()
