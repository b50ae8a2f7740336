import doctest
import math

import numpy as np
import pytest

from tokjax.signals import frequency_bias as exported
from tokjax.signals.frequency_bias import frequency_bias, frequency_difference

DIFFERENCES = [-2, -1, -0.5, 0, 0.2, 0.9, 1.1, 1.6, 2.5]
CORRECT = [0, 0, 1, 1, 0, 1, 1, 1, 1]


def test_the_toy_has_the_known_bias():
    found = frequency_bias(DIFFERENCES, CORRECT)
    assert found.low_threshold == pytest.approx(-0.18)
    assert found.high_threshold == pytest.approx(0.956)
    assert found.low == pytest.approx(1 / 3, abs=1e-4) and found.high == 1
    assert found.bias == pytest.approx(0.6667, abs=1e-4)
    assert exported is frequency_bias


def test_pairs_that_replace_nothing_are_left_out():
    padded = frequency_bias([*DIFFERENCES, math.nan], [*CORRECT, 1])
    assert padded == frequency_bias(DIFFERENCES, CORRECT)
    with pytest.raises(ValueError, match="at least one"):
        frequency_bias([math.nan], [1])
    with pytest.raises(ValueError, match="must rise"):
        frequency_bias([1.0], [1], low=70)


def test_differences_are_mean_log_ratios_of_each_sides_own_tokens():
    counts = [0, 10, 100, 1000, 0]
    assert frequency_difference([1, 2], [1, 3], counts) == pytest.approx(math.log(0.1))
    found = frequency_difference([1, 2], [3], counts)
    assert found == pytest.approx((math.log(10) + math.log(100)) / 2 - math.log(1000))
    assert math.isnan(frequency_difference([1, 2], [1], counts))
    assert math.isnan(frequency_difference([1], [4], counts))
    assert frequency_difference([1], [4], counts, add=1) == pytest.approx(math.log(11))
    assert frequency_difference([1, 4], [3], counts) == pytest.approx(math.log(0.01))
    assert np.isfinite(frequency_difference([1, 1, 2], [3, 2], counts))


def test_examples_in_docstrings_hold():
    import sys

    assert doctest.testmod(sys.modules[frequency_bias.__module__]).failed == 0
