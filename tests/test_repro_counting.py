"""Questions that count and copy."""

import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.reproduction.tasks.counting import ASK, PLUS, SEPARATOR, Counting, absolute_error


@pytest.mark.parametrize("kind", ["count", "sum", "first", "last"])
@pytest.mark.parametrize("every", [None, 3])
def test_answers_are_what_the_elements_say(kind, every):
    rng = np.random.default_rng(0)
    task = Counting(kind, separator_every=every)
    for n in (1, 2, 7, 30):
        words, answer = task.question(n, rng)
        assert words[-1] == ASK
        elements = [word for word in words[:-1] if word not in (PLUS, SEPARATOR)]
        expected = {"first": elements[0], "last": elements[-1]}
        assert answer == expected.get(kind, str(elements.count("1")))
        assert len(elements) == n
        assert words.count(SEPARATOR) == (0 if every is None else (n - 1) // 3)
        assert {*words, answer} <= set(task.words(30))


def test_patterns_have_their_zeros_where_they_say():
    rng = np.random.default_rng(0)
    assert Counting(pattern="ones").question(3, rng) == (["1", "1", "1", ASK], "3")
    assert Counting(pattern="zeros_last").question(3, rng) == (["1", "1", "0", ASK], "2")
    assert Counting(pattern="zeros_spread").elements(8, rng) == list("11101110")


def test_errors_are_of_numbers():
    assert absolute_error("7", "10") == 3.0
    assert np.isnan(absolute_error(SEPARATOR, "10"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Counting("counting"),
        lambda: Counting(pattern="one"),
        lambda: Counting(separator_every=0),
        lambda: Counting().question(0, np.random.default_rng(0)),
    ],
)
def test_impossible_questions_are_refused(make):
    with pytest.raises(ConfigError):
        make()
