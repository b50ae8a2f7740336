"""Chains of sums by a teacher that slips, and how confidences over them are judged."""

import runpy

import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.reproduction import Measurements
from tokjax.reproduction.plan import PLANS
from tokjax.reproduction.tasks import slipping_sums as sums
from tokjax.reproduction.tasks.slipping_sums import SlippingSums


def test_a_teacher_slips_as_often_as_its_facts_say_and_goes_on_from_there():
    task, rng = SlippingSums(steps=1), np.random.default_rng(0)
    rates, wrong = task.tables
    assert set(rates.ravel()) == set(task.rates)
    at = tuple(int(i) for i in np.argwhere(rates == 0.6)[0])
    question = (at[1], ((sums.OPERATIONS[at[0]], at[2]),))
    drawn = [task.slipped(question, rng)[0] for _ in range(2000)]
    right = sums.numbers(question)[0]
    assert set(drawn) == {right, int(wrong[at])}
    assert np.mean([n != right for n in drawn]) == pytest.approx(0.6, abs=0.04)
    always = SlippingSums(steps=2, rates=(1.0,))
    question = always.question(rng)
    first, second = always.slipped(question, rng)
    (a, b), (c, d) = question[1]
    wrong = always.tables[1]
    assert first == wrong[sums.OPERATIONS.index(a), question[0], b]
    assert second == wrong[sums.OPERATIONS.index(c), first, d] != sums.result(first, c, d)


def test_no_slip_means_the_right_answer():
    task, rng = SlippingSums(steps=5, rates=(0.0,)), np.random.default_rng(1)
    for _ in range(20):
        question = task.question(rng)
        total = question[0] + sum(d if name == "+" else -d for name, d in question[1])
        assert task.slipped(question, rng) == sums.numbers(question)
        text = sums.response(question)
        assert sums.answer(text, 5) == str(total % 10)
        assert len(text) + 1 == 5 * sums.LINE
        assert sums.answer(text, 4) is None and sums.answer(text + "\n", 5) is None


def test_a_step_is_right_if_all_lines_up_to_it_are():
    question = (2, (("+", 4), ("-", 7)))
    assert sums.step_is_right(question, "+4=6\n") and sums.step_is_right(question, "+4=6\n-7=9")
    assert not sums.step_is_right(question, "+4=7\n")
    assert not sums.step_is_right(question, "+4=7\n-7=0")
    assert not sums.step_is_right(question, "+4=6\n-7=9\n+1=0")
    assert not sums.step_is_right(question, "")


def test_rates_are_shares():
    with pytest.raises(ConfigError, match="rates"):
        SlippingSums(rates=(1.5,))
    with pytest.raises(ConfigError, match="steps"):
        SlippingSums(steps=0)


def test_confidences_that_tell_more_have_the_greater_auroc():
    config = runpy.run_path(str(PLANS / "guided_by_gut.py"))
    rng = np.random.default_rng(0)
    right = (rng.random(800) < 0.5).astype(float)

    def arm(noise):
        return {0: {"confidence": 0.5 + 0.1 * right + noise * rng.random(800), "right": right}}

    search = {0: {"right": np.zeros(100)}}
    found = Measurements({"search": search, "a": arm(0.2), "b": arm(0.4)}, {})
    mean, low, high = config["rank_difference"](found, "a", "b")
    assert 0 < low < mean < high < 0.5
    assert config["rank_difference"](found, "a", "a") == (0.0, 0.0, 0.0)
    found.values["b"][0]["right"] = np.ones(800)
    assert np.isnan(config["rank_difference"](found, "a", "b")).all()


def test_calibration_errors_weigh_bins_by_what_is_in_them():
    error = runpy.run_path(str(PLANS / "guided_by_gut.py"))["calibration_error"]
    assert error(np.array([0.95, 0.95, 0.15]), np.array([1.0, 0.0, 0.0])) == pytest.approx(1.05 / 3)
    assert error(np.array([1.0, 1.0]), np.array([1.0, 1.0])) == 0
