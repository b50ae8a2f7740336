"""The reward of calibrated confidence: every number of the paper's rule, and how steps are cut."""

import math
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.config import resolve
from tokjax.errors import ConfigError
from tokjax.rl.advantages import group_advantages
from tokjax.rl.guided_by_gut import Calibration, calibration_reward, confidence, step_confidences
from tokjax.rl.rewards import Episode
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.metrics import read_metrics
from tokjax.verifiers import ExactMatch


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield
    sys.modules.pop("rewards_for_tests", None)


@pytest.mark.parametrize(
    ("c", "correct", "wrong"),
    [
        (0.5, 1.0625, 0.375),
        (0.8, 1.4096, -3.096),
        (0.9, 1.6561, -5.561),
        (1.0, 2.0, -9.0),
        (0.0, 1.0, 1.0),
    ],
)
def test_rewards_by_confidence(c, correct, wrong):
    assert calibration_reward(True, c) == pytest.approx(correct, abs=1e-9)
    assert calibration_reward(False, c) == pytest.approx(wrong, abs=1e-9)


def test_later_steps_weigh_more_and_only_the_last_five_count():
    assert confidence([0.6, 0.7, 0.8, 0.9]) == pytest.approx(0.8)
    seven = [0.0, 0.0, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert confidence(seven) == pytest.approx(confidence(seven[2:]))
    assert confidence(seven) != pytest.approx(confidence([1.0, 1.0, *seven[2:]], last=7))
    assert confidence([]) == 0.8


def test_the_separator_opens_the_next_step():
    pieces = ("a", "b", "\n", "c", "\n", "\n", "d")
    p = [0.1, 0.3, 0.5, 0.7, 0.2, 0.4, 0.8]
    found = step_confidences([math.log(x) for x in p], pieces, "\n")
    np.testing.assert_allclose(found, [0.2, 0.6, 0.2, 0.6], rtol=1e-6)


def test_a_separator_may_be_part_of_a_token_or_several_tokens():
    p = [0.2, 0.4, 0.6, 0.8]
    logprobs = [math.log(x) for x in p]
    np.testing.assert_allclose(
        step_confidences(logprobs, ("x", ".\n\n", "y", "z"), "\n\n"), [0.2, 0.6], rtol=1e-6
    )
    np.testing.assert_allclose(
        step_confidences(logprobs, ("x", "\n", "\n", "z"), "\n\n"), [0.2, 0.6], rtol=1e-6
    )
    # At the very beginning no empty step is made.
    np.testing.assert_allclose(
        step_confidences(logprobs, ("\n\n", "x", "y", ""), "\n\n"), [0.5], rtol=1e-6
    )


def episode(answer, reference="7", p=(0.9, 0.9), **more):
    pieces = tuple(answer[i : i + 1] for i in range(len(p)))
    logprobs = tuple(math.log(x) for x in p)
    return Episode("", answer, reference, tuple(range(len(p))), logprobs, pieces=pieces, **more)


def test_an_episode_is_rewarded():
    reward = Calibration(verifier=ExactMatch(), separator="\n")
    assert reward(episode("7")) == pytest.approx(1 + 0.9**4)
    assert reward(episode("8")) == pytest.approx(1 - 10 * 0.9**4)
    assert reward(episode("8", reference=" ")) == 1.0
    assert reward(episode("7", p=())) == pytest.approx(1.4096)
    assert Calibration(stopped_only=True)(episode("7", stopped=False)) < 0


def test_without_confidence_it_is_the_verifier():
    reward = Calibration(gain=0.0, loss=0.0)
    assert reward(episode("7")) == reward(episode("8")) == 1.0
    linear = Calibration(power=1.0, gain=1.0, loss=2.0)
    assert linear(episode("7")) == pytest.approx(1.9)
    assert linear(episode("8")) == pytest.approx(1 - 1.8)


def test_advantages_are_not_divided_by_the_deviation():
    found = group_advantages(jnp.array([[1.4, 0.4, 1.4, 0.4]]), scale=False)
    np.testing.assert_allclose(found, [[0.5, -0.5, 0.5, -0.5]], atol=1e-6)


def test_it_is_a_reward_of_runs(rl_run, tmp_path):
    run = rl_run(
        objective__rewards=[{"name": "calibration", "separator": "1"}],
        objective__advantage={"name": "group", "scale": False},
        steps=2,
    )
    assert train(run, tmp_path).finished
    table = read_metrics(tmp_path)
    assert table["reward/errors"][0] == 0
    assert -9 <= table["reward/calibration"][0] <= 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"separator": ""}, "separator"), ({"last": 0}, "last=0"), ({"power": -1.0}, "power")],
)
def test_impossible_settings_are_refused(rl_tree, changes, message):
    reward = {"name": "calibration", **changes}
    with pytest.raises(ConfigError, match=message):
        resolve(TrainConfig, rl_tree(objective__rewards=[reward]))
