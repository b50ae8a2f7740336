"""The reviews of the reproduction of GrAInS: moods show where they should, and nowhere else."""

import runpy

import numpy as np
import pytest

from tokjax.reproduction.plan import PLANS

PLAN = runpy.run_path(str(PLANS / "grains.py"))
MOODS = {True: set(PLAN["GOOD"]), False: set(PLAN["BAD"])}
ENDINGS = {True: set(PLAN["ENDINGS"][True]), False: set(PLAN["ENDINGS"][False])}


def test_all_words_are_tokens_and_no_word_has_two_meanings():
    words = PLAN["WORDS"]
    assert len(set(words)) == len(words)
    rng = np.random.default_rng(0)
    for _ in range(200):
        record = PLAN["review"](rng)
        text = f"{record['prompt']}{record['response']} {PLAN['timetable'](rng)}"
        assert set(text.split()) <= set(words)


@pytest.mark.parametrize("mood", [True, False, None])
def test_a_prompt_has_one_word_of_its_mood_or_none(mood):
    rng = np.random.default_rng(1)
    for _ in range(200):
        words = PLAN["prompt_of"](rng, mood).split()
        assert len(words) <= 30  # with BOS and an ending no wider than 32
        for own, others in MOODS.items():
            assert sum(word in others for word in words) == (own is mood)
        assert not (ENDINGS[True] | ENDINGS[False]) & set(words)


def test_endings_follow_the_word_of_the_mood():
    rng = np.random.default_rng(2)
    agreed, shown = [], []
    for _ in range(2000):
        record = PLAN["review"](rng)
        ending = record["response"].split()[0] in ENDINGS[True]
        told = [mood for mood, own in MOODS.items() if own & set(record["prompt"].split())]
        shown.append(len(told))
        agreed += [mood == ending for mood in told]
    assert np.mean(agreed) == pytest.approx(PLAN["AGREES"], abs=0.03)
    assert np.mean(shown) == pytest.approx(PLAN["SHOWN"] * (1 - PLAN["BLANKS"]), abs=0.04)


def test_a_train_leaves_at_one_hour_for_each_city_and_day():
    rng = np.random.default_rng(3)
    hours = {}
    for _ in range(500):
        for line in PLAN["timetable"](rng).split(" ."):
            if words := line.split():
                key, hour = (words[1], words[5]), words[-1]
                assert hours.setdefault(key, hour) == hour
    assert len(set(hours.values())) == len(PLAN["HOURS"])
