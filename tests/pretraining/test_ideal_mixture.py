"""The mixture over all names, by brute force."""

import numpy as np
import pytest

from tokjax.pretraining.ideal_mixture import ideal_mixture, markov

START = [0.6, 0.3, 0.1]
ROWS = [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]]
CHAIN = markov(START, ROWS)


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], [1 / 3, 1 / 3, 1 / 3]),
        ([0], [0.71, 0.145, 0.145]),
        ([0, 0], [0.719718, 0.140141, 0.140141]),
        ([0, 1, 0, 1], [0.161154, 0.677308, 0.161538]),
        ([2, 1, 2, 1], [0.161538, 0.677308, 0.161154]),
    ],
)
def test_predictions_of_a_chain_of_three_symbols(history, expected):
    np.testing.assert_allclose(ideal_mixture(CHAIN, history, 3), expected, atol=5e-7)


def test_the_mixture_does_not_depend_on_names():
    history = [0, 1, 1, 0, 2]
    pi = np.array([2, 0, 1])
    one, two = ideal_mixture(CHAIN, history, 3), ideal_mixture(CHAIN, pi[history], 3)
    np.testing.assert_allclose(two[pi], one, rtol=1e-12)


def test_with_a_long_history_it_predicts_as_the_chain_itself():
    rng, history = np.random.default_rng(0), [0]
    for _ in range(400):
        history.append(int(rng.choice(3, p=ROWS[history[-1]])))
    np.testing.assert_allclose(ideal_mixture(CHAIN, history, 3), ROWS[history[-1]], atol=0.01)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="vocabulary=9"):
        ideal_mixture(CHAIN, [], 9)
    with pytest.raises(ValueError, match="outside 0 to 2"):
        ideal_mixture(CHAIN, [3], 3)
    with pytest.raises(ValueError, match="sum to 1"):
        markov([0.5, 0.6], [[1, 0], [0, 1]])
    with pytest.raises(ValueError, match="impossible"):
        ideal_mixture(markov([1.0, 0.0], [[1, 0], [0, 1]]), [0, 1], 2)
