"""Sums made on the fly: right, all different, and held out by themselves."""

import pytest

from tokjax.data.arithmetic import ArithmeticSource, problems
from tokjax.errors import ConfigError


def test_answers_are_right_with_products_first():
    source = ArithmeticSource(examples=300, digits=(1, 3), operations=("+", "-", "*"), terms=4)
    found = list(problems(source))
    assert len(found) == 300
    for question, answer in found:
        assert question.endswith("=")
        assert eval(question[:-1]) == int(answer)


def test_none_occurs_twice_and_the_splits_share_none():
    parts = {
        split: [q for q, _ in problems(ArithmeticSource(digits=(1, 1), split=split))]
        for split in ("train", "validation", "all")
    }
    for questions in parts.values():
        assert len(set(questions)) == len(questions)
    assert not set(parts["train"]) & set(parts["validation"])
    # There are a hundred sums of two digits: all are found, though more were asked for.
    assert set(parts["train"]) | set(parts["validation"]) == set(parts["all"])
    assert len(parts["all"]) == 100


def test_numbers_have_the_digits_that_were_asked_for():
    for question, _ in problems(ArithmeticSource(examples=100, digits=(2, 2))):
        a, b = question[:-1].split("+")
        assert len(a) == len(b) == 2


def test_another_seed_gives_other_questions_and_the_same_the_same():
    first, again, other = (
        list(problems(ArithmeticSource(examples=50, digits=(3, 3), seed=s))) for s in (0, 0, 1)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"digits": (2, 1)}, "digits"),
        ({"operations": ("/",)}, "operations"),
        ({"terms": 1}, "terms=1"),
        ({"validation_share": 2}, "validation_share"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ArithmeticSource(**settings)
