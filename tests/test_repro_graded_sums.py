"""Controls of advantages: what moves stays within its answer or its position."""

import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.reproduction.tasks.rl_controls import noise, shuffled


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    mask = jnp.asarray(np.arange(9) < rng.integers(1, 9, (40, 1)))
    return jnp.asarray(rng.normal(size=(40, 9)), jnp.float32), mask


def test_shuffled_values_are_the_same_ones_at_the_same_places(rows):
    values, mask = rows
    found = np.asarray(shuffled(values, mask, noise(values)))
    np.testing.assert_array_equal(found[~mask], values[~mask])
    for row, before, own in zip(found, np.asarray(values), np.asarray(mask), strict=True):
        np.testing.assert_array_equal(np.sort(row[own]), np.sort(before[own]))
    assert (found != values).any(-1).mean() > 0.5


def test_noise_tells_nothing_of_the_values_but_is_theirs(rows):
    values, _ = rows
    found = np.asarray(noise(values))
    np.testing.assert_array_equal(found, noise(values))
    assert np.any(found != noise(values + 0.1))
    assert abs(np.corrcoef(found.reshape(-1), np.asarray(values).reshape(-1))[0, 1]) < 0.2
