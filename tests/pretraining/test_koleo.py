"""KoLeo: its numbers, its epsilons, and what it ignores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.pretraining.koleo import koleo, nearest_others, unit_vectors

X = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])


def test_the_known_batch():
    unit = unit_vectors(X)
    found = nearest_others(unit)
    assert found[jnp.array([0, 1, 3])].tolist() == [2, 2, 1] and int(found[2]) in (0, 1)
    distances = np.linalg.norm(np.asarray(unit - unit[found]), axis=-1)
    np.testing.assert_allclose(distances, [0.765367, 0.765367, 0.765367, 1.414214], atol=1e-6)
    assert float(koleo(X)) == pytest.approx(0.113907, abs=1e-6)


def test_duplicates_have_a_finite_loss_and_gradient():
    twice = jnp.array([[0.6, 0.8], [0.6, 0.8]])
    value, gradient = jax.value_and_grad(koleo)(twice)
    assert float(value) == pytest.approx(17.539307, abs=1e-4)
    assert np.isfinite(gradient).all()
    wide = jnp.ones((2, 1024))
    assert float(koleo(wide)) == pytest.approx(-np.log((32 + 1) * 1e-8), abs=1e-3)


def test_the_length_of_vectors_does_not_matter():
    assert float(koleo(3 * X)) == pytest.approx(float(koleo(X)), abs=1e-6)


def test_gradients_reach_the_anchor_and_the_neighbour():
    """Row 3 is nobody's neighbour, row 1 is row 3's: both move when row 3's distance does."""
    gradient = jax.grad(lambda x: koleo(x))(X)
    assert (np.abs(np.asarray(gradient)).max(-1) > 1e-3).all()

    def of_three(x):
        unit = unit_vectors(x)
        return -jnp.log(jnp.linalg.norm(unit[3] - unit[nearest_others(unit)[3]]))

    assert (np.abs(np.asarray(jax.grad(of_three)(X))).max(-1) > 1e-3).tolist() == [
        *(False, True, False, True)
    ]


def test_rows_that_are_not_there_and_single_vectors_have_no_neighbours():
    there = jnp.array([True, True, True, True, False])
    with_junk = jnp.concatenate([X, X[:1]])
    assert float(koleo(with_junk, there)) == pytest.approx(0.113907, abs=1e-6)
    for alone in (jnp.array([True, False, False, False]), jnp.zeros(4, bool)):
        value, gradient = jax.value_and_grad(koleo)(X, alone)
        assert float(value) == 0 and np.abs(gradient).max() == 0
    assert float(koleo(X[:1])) == 0


def test_opposite_vectors_are_each_others_neighbours():
    assert float(koleo(jnp.array([[2.0, 0.0], [-1.0, 0.0]]))) == pytest.approx(-np.log(2), abs=1e-6)
