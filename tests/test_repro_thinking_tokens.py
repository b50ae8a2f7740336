"""Compositions of functions, and what the reproduction of thinking tokens makes of them."""

import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.reproduction.tasks.compositions import Compositions


def test_answers_apply_the_functions_one_after_the_other():
    task = Compositions(values=5, functions=3, length=4)
    questions = task.questions(np.random.default_rng(0), 50)
    for question, worked in zip(questions, task.worked(questions), strict=True):
        assert question[-1] == task.separator == 8 and task.size == 9
        value = question[0]
        for function, step in zip(question[1:-1] - 5, worked, strict=True):
            value = task.tables[function][value]
            assert value == step
    assert all(sorted(table) == list(range(5)) for table in task.tables)


def test_function_0_occurs_as_often_as_wanted_and_tests_share_no_question_with_training():
    task = Compositions()
    questions = task.questions(np.random.default_rng(0), 4000)
    assert (questions == task.values).sum(1).mean() == pytest.approx(1.0, abs=0.05)
    held = task.held_out(questions)
    assert held.mean() == pytest.approx(0.1, abs=0.03)
    test, train = ({tuple(q) for q in questions[part]} for part in (held, ~held))
    assert test and not test & train
    with pytest.raises(ConfigError, match="values=1"):
        Compositions(values=1)
