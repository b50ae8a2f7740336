import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.steering import direction, steering_direction

SHIFTS = np.array([[1, 0.1], [1.2, -0.1], [0.8, 0], [1, 0.2]])


def test_the_principal_direction_need_not_point_along_the_shift():
    np.testing.assert_allclose(direction(SHIFTS, "mean"), [1, 0.05])
    found = direction(SHIFTS, "pca")
    np.testing.assert_allclose(found, [0.8944, -0.4472], atol=5e-5)


def test_the_sign_follows_the_mean_and_layers_are_apart():
    rng = np.random.default_rng(0)
    differences = rng.normal(size=(5, 8, 6)) + rng.normal(size=(5, 1, 6))
    for method in ("pca", "mean"):
        found = direction(differences, method)
        assert ((found * differences.mean(1)).sum(-1) >= 0).all()
        np.testing.assert_allclose(direction(-differences, method), -found)
        np.testing.assert_allclose(found[3], direction(differences[3], method))
    unit = direction(differences, "pca")
    np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1)
    # No other direction carries more of the spread.
    spread = lambda v: np.square((differences - differences.mean(1, keepdims=True)) @ v)  # noqa: E731
    for layer in range(5):
        best = spread(unit[layer])[layer].sum()
        for other in np.linalg.qr(rng.normal(size=(6, 6)))[0].T:
            assert spread(other)[layer].sum() <= best + 1e-9


def test_where_nothing_varies_it_is_the_mean():
    same = np.tile([3.0, 4.0], (4, 1))
    np.testing.assert_allclose(direction(same), [3, 4])
    np.testing.assert_allclose(direction(SHIFTS[:1]), SHIFTS[0])
    np.testing.assert_allclose(direction(np.zeros((3, 2))), [0, 0])
    # In one layer of two.
    both = direction(np.stack([same, SHIFTS]))
    np.testing.assert_allclose(both, [[3, 4], direction(SHIFTS)])


def test_both_sets_are_the_sum_of_either_alone():
    rng = np.random.default_rng(1)
    positive, negative = rng.normal(size=(2, 3, 8, 6))
    for method in ("pca", "mean"):
        pos, neg, both = (
            steering_direction(positive, negative, method, mode) for mode in ("pos", "neg", "both")
        )
        np.testing.assert_allclose(both, pos + neg)
        np.testing.assert_allclose(pos, direction(positive, method))
        # Exchanged sets point the other way.
        np.testing.assert_allclose(steering_direction(negative, positive, method), -both)


def test_unknown_choices_are_refused():
    with pytest.raises(ConfigError, match="method='median'"):
        direction(SHIFTS, "median")
    with pytest.raises(ConfigError, match="mode='all'"):
        steering_direction(SHIFTS, SHIFTS, mode="all")
    with pytest.raises(ConfigError, match=r"\(0, 2\) must be"):
        direction(SHIFTS[:0])
