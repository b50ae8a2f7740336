"""The sums of the reproduction of information peaks: mistakes are noticed, answers are right."""

import runpy

import numpy as np
import pytest

from tokjax.reproduction.plan import PLANS

PLAN = runpy.run_path(str(PLANS / "mi_peaks.py"))
THINKING, FILLERS = PLAN["THINKING"], PLAN["FILLERS"]


def texts(count, mistakes=PLAN["MISTAKES"]):
    rng = np.random.default_rng(0)
    for _ in range(count):
        words = PLAN["question"](rng)
        yield words, PLAN["scratchpad"](words, rng, mistakes)


def test_all_words_are_tokens():
    assert len(set(PLAN["WORDS"])) == len(PLAN["WORDS"])
    for words, written in texts(200):
        assert {*words, *written} <= set(PLAN["WORDS"])


def test_a_scratchpad_ends_with_the_answer_and_every_mistake_is_put_right():
    for words, written in texts(300):
        value = int(words[0])
        for operation in words[2::2]:
            value = (value + int(operation)) % PLAN["MODULUS"]
        assert written[-2:] == ["answer", str(value)]
        assert PLAN["answer_of"](words) == str(value)
        for at, word in enumerate(written):
            if word != "=":
                continue
            before, operation, found, after = (written[at + i] for i in (-2, -1, 1, 2))
            right = PLAN["result"](before, operation)
            assert (found in PLAN["TOO_LARGE"]) == (after in THINKING)
            if after not in THINKING:
                assert found == right
            else:
                assert written[at + 3 : at + 8] == [*written[at - 3 : at + 1], right]


def test_fillers_are_as_frequent_as_thinking_words():
    counts = np.array(
        [
            [sum(word in kind for word in written) for kind in (THINKING, FILLERS)]
            for _, written in texts(2000)
        ]
    )
    expected = PLAN["MISTAKES"] * PLAN["STEPS"]
    np.testing.assert_allclose(counts.mean(0), expected, rtol=0.06)
    assert not any({*THINKING, *FILLERS} & {*written} for _, written in texts(50, 0.0))


def test_enrichment_is_against_the_same_places_of_all_texts():
    rows = [[7, 1, 1, 7], [1, 7, 1], [7, 1, 1, 1]]
    found = PLAN["enrichment"](rows, [np.array([0, 3]), np.array([0]), np.array([], int)], [7])
    assert found[:2] == pytest.approx([(1 - 2 / 3 + 1 - 1 / 2) / 2, 0 - 2 / 3])
    assert np.isnan(found[2])
    # Places that do not look at the words are not enriched on average.
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 3, 20).tolist() for _ in range(400)]
    places = [rng.permutation(20)[:3] for _ in rows]
    assert abs(PLAN["enrichment"](rows, places, [2]).mean()) < 0.05
