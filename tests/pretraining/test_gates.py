import doctest

import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.pretraining import gates
from tokjax.pretraining.gates import Gate

COURSES = ("linear", "quad", "root", "exp", "log", "step")


def at(gate, *progress):
    return [float(gate.at(r)) for r in progress]


def test_the_logarithmic_course_has_the_known_values():
    found = at(Gate("log", 0.5, 1.0), 0, 0.01, 0.1, 0.5, 1)
    np.testing.assert_allclose(found, [0.5, 0.76997, 0.88489, 0.96535, 1], atol=5e-6)


def test_the_linear_course_has_the_known_values():
    found = at(Gate("linear", 0.2, 1.0), 0, 0.25, 0.5, 1)
    np.testing.assert_allclose(found, [0.2, 0.4, 0.6, 1], rtol=1e-6)


def test_the_other_courses_follow_their_formulas():
    r = 0.3
    risen = {"quad": r**2, "root": r**0.5, "exp": (np.exp(10 * r) - 1) / (np.exp(10) - 1)}
    for course, share in risen.items():
        np.testing.assert_allclose(at(Gate(course, 0.2, 0.7), r), 0.2 + 0.5 * share, rtol=1e-5)
    assert at(Gate("step", 0.25, 0.75), 0, 0.99, 1) == [0.25, 0.25, 0.75]


@pytest.mark.parametrize("course", COURSES)
def test_gates_rise_between_their_shares_and_end_exactly(course):
    gate = Gate(course, 0.5, 1.0, first=0.25, last=0.75)
    found = at(gate, *np.linspace(0, 1, 21))
    assert found == sorted(found)
    assert found[:6] == [0.5] * 6 and found[15:] == [1.0] * 6


def test_a_constant_gate_has_a_branch_of_its_own():
    assert at(Gate("constant", 0.8), 0, 0.5, 1) == pytest.approx([0.8] * 3)
    assert Gate("constant", 1.0).always_one and not Gate("linear").always_one
    with pytest.raises(ConfigError, match=r"must be below gate\.end"):
        Gate("linear", 0.5, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"course": "liner"}, "linear"),
        ({"start": -0.1}, "start=-0.1 must lie in"),
        ({"first": 0.5, "last": 0.5}, "must be below gate.last"),
    ],
)
def test_impossible_gates_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Gate(**options)


def test_examples_in_docstrings_hold():
    assert doctest.testmod(gates).failed == 0
