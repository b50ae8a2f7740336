"""The chains of the reproduction of TVM: the teacher's habit, and which solutions are right."""

import runpy

import numpy as np

from tokjax.reproduction.plan import PLANS

PLAN = runpy.run_path(str(PLANS / "tvm.py"))


def test_the_teacher_errs_at_subtractions_alone_and_by_one():
    rng = np.random.default_rng(0)
    prompts = PLAN["problems"](rng, 500)
    minus = prompts[:, 2:-1] >= PLAN["MINUS"]
    assert 0.1 < minus.mean() < 0.25
    written = PLAN["solutions"](prompts, rng)
    assert written.shape == (500, PLAN["LENGTH"]) and (written[:, -1] == PLAN["END"]).all()
    digits = written[:, 1::3]
    before = np.concatenate([prompts[:, 1:2], digits[:, :-1]], 1)
    step = prompts[:, 2:-1] % 10
    error = (digits - np.where(minus, before - step, before + step)) % 10
    assert not error[~minus].any()
    assert set(error[minus].tolist()) == {0, 1} and 0.5 < error[minus].mean() < 0.7


def test_right_solutions_end_in_the_right_digit():
    prompts = np.array([[PLAN["BOS"], 3, 14, 22, 10, 19, 11, PLAN["EQUALS"]]])
    assert PLAN["results"](prompts).tolist() == [[7, 5, 5, 4, 5]]  # + 4, - 2, + 0, + 9, + 1
    written = PLAN["solutions"](prompts, np.random.default_rng(0))
    for digit, right in ((5, True), (6, False)):
        written[0, -2] = digit
        assert PLAN["is_right"](prompts, written).tolist() == [right]
    written[0, -2:] = 5, PLAN["NEXT"]  # not ended
    assert not PLAN["is_right"](prompts, written)[0]
