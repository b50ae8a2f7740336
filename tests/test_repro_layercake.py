"""The invented facts of LayerCake's reproduction, and how its weight is chosen."""

import runpy

import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.reproduction.plan import PLANS


@pytest.fixture(scope="module")
def config():
    return runpy.run_path(str(PLANS / "layercake.py"))


def test_every_object_has_one_fact(config):
    names = [config["object_of"](r, c) for r in config["RELATIONS"] for c in range(20)]
    assert len(set(names)) == len(names) == len(config["RELATIONS"]) * len(config["COUNTRIES"])


def test_questions_offer_objects_of_the_relation_and_documents_tell_them(config):
    rng = np.random.default_rng(0)
    words = set(config["WORDS"])
    told = " ".join(config["encyclopaedia"](rng)["text"] for _ in range(3000))
    assert set(told.split()) <= words
    for item in config["fact_questions"](120, 0):
        relation, country = item["prompt"].split()[-4], item["prompt"].split()[-2]
        answers = [answer.strip() for answer in item["answers"]]
        assert answers[0] == config["object_of"](relation, config["COUNTRIES"].index(country))
        assert len(set(answers)) == 4
        assert all(answer.startswith(relation[:3]) for answer in answers)
        assert f"the {relation} of {country} is {answers[0]} ." in told
        assert item["prompt"].split()[0] in words


def test_a_weight_is_chosen_on_the_other_half(config):
    # Weight 0 is right on the even questions, weight 1 on the odd ones.
    even = np.array([1.0, 0.0] * 5)
    of_weight = {0.0: {"mc1": even, "mc2": even}, 1.0: {"mc1": 1 - even, "mc2": 1 - even}}
    judged, weights = config["crossed"](of_weight)
    np.testing.assert_array_equal(weights, [1.0, 0.0] * 5)
    np.testing.assert_array_equal(judged["mc1"], np.zeros(10))


def test_a_missing_data_set_is_named(config, monkeypatch, tmp_path):
    monkeypatch.setenv("TOKJAX_TEST_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match=r"TruthfulQA.*TOKJAX_TEST_DATA"):
        config["questions"](3)
