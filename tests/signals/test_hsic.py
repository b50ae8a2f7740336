import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.signals.hsic import normalised_hsic

X = np.arange(4.0)


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    return rng.normal(size=64), rng.normal(size=64)


def as_defined(x, y, sigma, eps=1e-5):
    """The paper's formula with its one-sided centring, by full matrices."""
    m = len(x)

    def whitened(v):
        kernel = np.exp(-np.square(v[:, None] - v) / (2 * sigma**2))
        centred = kernel @ (np.eye(m) - np.ones((m, m)) / m)
        return centred @ np.linalg.inv(centred + eps * m * np.eye(m))

    return (whitened(x) * whitened(y).T).sum()


def test_four_points_give_the_cards_numbers():
    assert normalised_hsic(X, X, sigma=1) == pytest.approx(2.99920, abs=5e-6)
    assert normalised_hsic(X, np.array([0.0, 1, 0, 1]), sigma=1) == pytest.approx(0.99967, abs=5e-6)
    assert normalised_hsic(X, np.full(4, 7.0), sigma=1) == 0.0
    assert normalised_hsic(np.full(4, 7.0), X, sigma=1) == 0.0


def test_gaussian_vectors_give_the_cards_numbers(pair):
    x, y = pair
    expected = {1: (6.5152, 0.8187, 4.7485), 50: (0.9426, 0.0285)}
    for sigma, values in expected.items():
        found = [float(normalised_hsic(x, v, sigma=sigma)) for v in (x, y, x**2)]
        np.testing.assert_allclose(found[: len(values)], values, atol=5e-5)
        assert found[0] == max(found)


@pytest.mark.parametrize("sigma", [0.01, 0.3, 1.0, 50.0])
def test_low_rank_factors_give_the_value_of_the_full_matrices(pair, sigma):
    x, y = pair
    for a, b in ((x, y), (x, x), (x, x**2), (30 * x, y)):
        expected = as_defined(a, b, sigma)
        assert normalised_hsic(a, b, sigma=sigma) == pytest.approx(expected, rel=1e-6)


def test_invariances(pair):
    x, y = pair
    value = normalised_hsic(x, y, sigma=1)
    order = np.random.default_rng(1).permutation(len(x))
    for a, b in ((y, x), (x[order], y[order]), (x + 3, y), (x, y - 5), (-x, y)):
        assert normalised_hsic(a, b, sigma=1) == pytest.approx(float(value), rel=1e-8)
    assert abs(normalised_hsic(x[order], y, sigma=1) - value) > 0.01


def test_many_states_at_once_are_each_as_alone(pair):
    x, y = pair
    # Of different ranks: constant, two values, narrow, wide.
    states = np.stack([0 * x, np.sign(x), 0.1 * x, 100 * x])
    found = normalised_hsic(states.reshape(2, 2, -1), y, sigma=1)
    assert found.shape == (2, 2)
    alone = [normalised_hsic(state, y, sigma=1) for state in states]
    np.testing.assert_allclose(found.ravel(), alone, rtol=1e-8)
    assert found[0, 0] == 0 and np.isfinite(found).all()
    assert normalised_hsic(np.zeros((0, 64)), y).shape == (0,)


def test_what_cannot_be_compared_is_refused(pair):
    x, y = pair
    with pytest.raises(ConfigError, match=r"\(64,\) and \(63,\) must be"):
        normalised_hsic(x, y[:-1])
    with pytest.raises(ConfigError, match="sigma=0"):
        normalised_hsic(x, y, sigma=0)
    with pytest.raises(ConfigError, match="not finite"):
        normalised_hsic(x * np.inf, y)
