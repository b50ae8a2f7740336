"""Shared set-up of the tests of signals."""

import jax
import pytest


@pytest.fixture
def strict_dtypes():
    """Mixing dtypes without saying so is an error while this is in use."""
    with jax.numpy_dtype_promotion("strict"):
        yield
