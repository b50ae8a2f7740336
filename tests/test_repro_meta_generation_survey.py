"""The reproduction of the survey's facts: its measures, and candidates chosen from a pool."""

import runpy

import numpy as np
import pytest

from tokjax.decoding.prompts import Prompts
from tokjax.decoding.search import best_of_n
from tokjax.errors import ConfigError
from tokjax.reproduction import Measurements
from tokjax.reproduction.plan import PLANS

config = runpy.run_path(str(PLANS / "meta_generation_survey.py"))


def test_repetition_counts_n_grams_that_occurred_before():
    assert config["repetition"](list(range(10))) == 0
    assert config["repetition"]([7] * 13) == pytest.approx(9 / 10)


def test_right_scratchpads_have_no_wrong_step_and_each_fault_is_one():
    question = config["question_of"](np.random.default_rng(0))
    words = config["response_to"](question).split()
    assert config["wrong_steps"](words) == 0
    assert config["given_answer"](words) == config["answer_to"](question)
    assert set(words) | set(config["prompt_of"](question).split()) <= set(config["WORDS"])
    assert len(words) + 1 <= config["NEW_TOKENS"]  # and the end of the text
    changed = list(words)
    changed[4] = str((int(words[4]) + 1) % config["MODULUS"])
    assert config["wrong_steps"](changed) == 1  # the next line follows from its own numbers
    assert config["wrong_steps"]([*words[:4], *words[5:]]) == 1  # a line without its result
    assert config["wrong_steps"](words[:3]) == 1  # cut within a line
    assert config["wrong_steps"](["=", *words]) == 1
    assert config["wrong_steps"]([";", *words]) == 1


def test_replayed_candidates_are_the_first_of_each_row():
    pool = [[[b, i] for i in range(4)] for b in range(3)]
    prompts = Prompts.of([[1], [2], [3]])
    found = best_of_n(config["Replayed"](pool), prompts, lambda p, c: [ids[1] for ids in c], n=2)
    assert found.tokens == [[0, 1], [1, 1], [2, 1]]
    with pytest.raises(ConfigError, match="candidates"):
        best_of_n(config["Replayed"](pool), prompts, lambda p, c: [0] * len(c), n=5)


def test_samplers_of_one_law_pass_and_others_are_told_apart():
    rng = np.random.default_rng(3)

    def texts(rate):
        wrong = rng.binomial(6, rate, 800).astype(float)
        return {0: {"wrong_steps": wrong, "answer": rng.integers(-1, config["MODULUS"], 800)}}

    found = Measurements({"a": texts(0.1), "b": texts(0.1), "c": texts(0.2)}, {})
    assert min(config["p_values"](found, "a", "b")) > 0.005
    assert min(config["p_values"](found, "a", "c")) < 1e-6
    same = Measurements({a: {0: {"wrong_steps": [0.0] * 9, "answer": [2] * 9}} for a in "ab"}, {})
    assert config["p_values"](same, "a", "b") == [1.0, 1.0]
