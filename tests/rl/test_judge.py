"""Rewards that raise, hang or die cost their own answer, are counted, and nothing else."""

import sys
from pathlib import Path

import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.rl.judge import Judge, names_of
from tokjax.rl.rewards import Episode, Format, Overlong, RewardFunction, Verified
from tokjax.verifiers import Numeric


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    folder = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", folder)
    yield
    sys.modules.pop("rewards_for_tests", None)


def function(name):
    return RewardFunction(path=f"rewards_for_tests:{name}")


def episodes(*answers):
    return [Episode("", answer, "7", tokens=(i,)) for i, answer in enumerate(answers)]


def test_rewards_are_called_by_name_in_another_process():
    rewards = (Verified(Numeric(), weight=2.0), Format(r"\d+"), Format("[a-z]+"))
    assert names_of(rewards) == ["verifier", "format_1", "format_2"]
    with Judge(rewards, timeout_s=20) as judge:
        for _ in range(2):  # the process stays
            found = judge(episodes("7", "8", "x"))
            np.testing.assert_array_equal(found.scores["verifier"], [1, 0, 0])
            np.testing.assert_array_equal(found.scores["format_1"], [1, 1, 0])
            np.testing.assert_array_equal(found.scores["format_2"], [0, 0, 1])
            assert (found.errors, found.timeouts, found.first_error) == (0, 0, "")


def test_one_that_raises_counts_as_zero():
    with Judge((function("failing"), Format(".*")), timeout_s=20) as judge:
        found = judge(episodes("a", "b", "c"))
    np.testing.assert_array_equal(found.scores["function"], [0, 1, 0])
    np.testing.assert_array_equal(found.scores["format"], [1, 1, 1])
    assert found.errors == 2
    assert "ValueError: an even token" in found.first_error
    assert "'a'" in found.first_error


def test_one_that_is_not_finite_counts_as_zero():
    with Judge((function("infinite"),), timeout_s=20) as judge:
        found = judge(episodes("a"))
    assert found.scores["function"][0] == 0
    assert found.errors == 1


@pytest.mark.parametrize(("name", "word"), [("hanging", "hang"), ("dying", "die")])
def test_one_that_hangs_or_dies_costs_its_answer_and_the_next_ones_go_on(name, word):
    with Judge((function(name),), timeout_s=2) as judge:
        found = judge(episodes("a", word, "b", "c"))
    np.testing.assert_array_equal(found.scores["function"], [1, 0, 1, 1])
    assert (found.timeouts, found.errors) == ((1, 0) if name == "hanging" else (0, 1))
    assert repr(word) in found.first_error


def test_no_answers_need_no_process():
    with Judge((function("dying"),), timeout_s=2) as judge:
        assert judge([]).scores["function"].shape == (0,)


def test_overlong_falls_to_minus_one():
    reward = Overlong(free=0.5)
    found = [reward(Episode("", "", "", tokens=(0,) * n, limit=8)) for n in (0, 4, 6, 8)]
    assert found == [0, 0, -0.5, -1]


def test_answers_that_were_cut_can_count_as_wrong():
    cut = Episode("", "7", "7", stopped=False)
    assert Verified()(cut) == 1
    assert Verified(stopped_only=True)(cut) == 0


def test_bad_settings_are_told():
    with pytest.raises(ConfigError, match="names no function"):
        RewardFunction(path="rewards_for_tests:missing")
    with pytest.raises(ConfigError, match="no regular expression"):
        Format("(")
    with pytest.raises(ConfigError, match="free=1"):
        Overlong(free=1.0)
