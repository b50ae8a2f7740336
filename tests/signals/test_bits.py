import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.signals import bits_per_unit

pytestmark = pytest.mark.usefixtures("strict_dtypes")
bits = jax.jit(bits_per_unit, static_argnames="axis")


def test_known_conversions():
    # 3.2 nats and 4.1 bytes a token; 4 nats a word of five characters.
    np.testing.assert_allclose(bits_per_unit(3.2, 4.1), 1.1260, atol=5e-5)
    np.testing.assert_allclose(bits_per_unit(4.0, 5), 1.1542, atol=5e-5)
    # Uniform over 256 bytes.
    np.testing.assert_allclose(bits(jnp.full(7, np.log(256)), jnp.ones(7, jnp.int32)), 8, rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_is_a_ratio_of_sums_over_the_mask(seed):
    rng = np.random.default_rng(seed)
    nats, units, mask = rng.random((2, 5)), rng.integers(0, 4, (2, 5)), rng.random((2, 5)) < 0.6
    found = bits(jnp.asarray(nats, jnp.float32), jnp.asarray(units, jnp.int32), mask)
    size = units[mask].sum()
    expected = nats[mask].sum() / np.log(2) / size if size else 0
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # How a text is cut into tokens does not matter, only its total.
    together = bits_per_unit(jnp.float32(nats[mask].sum()), jnp.int32(size))
    np.testing.assert_allclose(together, expected, rtol=1e-5)


def test_slots_without_text_pay_their_nats():
    nats, units = jnp.array([1.0, 0.5, 1.0]), jnp.array([1, 0, 1])
    np.testing.assert_allclose(bits(nats, units), 2.5 / np.log(2) / 2, rtol=1e-6)


def test_rows_apart_and_nothing_to_count():
    nats, units = jnp.array([[2.0, 1.0], [3.0, 3.0]]), jnp.array([[1, 2], [5, 5]])
    mask = jnp.array([[True, True], [False, False]])
    np.testing.assert_allclose(bits(nats, units, mask, -1), [1 / np.log(2), 0], rtol=1e-6)
    assert bits_per_unit(3.0, 0) == 0
