"""Matrices kept with a row for each output, as the kernels of decoding on a GPU read them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax import struct
from tokjax.models.quantized import Int8Matrix


@struct.dataclass
class Transposed:
    """A matrix [N, M], kept as [M, N], in the place of a parameter.

    Attributes:
        values: of the matrix, or whole numbers that its scale multiplies.
        scale: of each output, where the values are 8-bit integers.
    """

    values: Float[Array, "M N"]
    scale: Float[Array, "M"] | None = None

    @classmethod
    def of(cls, matrix: Any, dtype: Any) -> "Transposed":
        """Returns a matrix or `Int8Matrix` transposed; whole numbers stay, others take the dtype.

        The barrier keeps the compiler from moving the transposition into a loop.
        """
        if isinstance(matrix, Transposed):
            return matrix
        if isinstance(matrix, Int8Matrix):
            values, scale = jax.lax.optimization_barrier((matrix.values.T, matrix.scale))
            return cls(values, scale)
        return cls(jax.lax.optimization_barrier(matrix.astype(dtype).T))

    def astype(self, dtype: Any) -> "Transposed":
        """Returns itself: products take the dtype of what is multiplied."""
        del dtype
        return self

    def after(self, x: Float[Array, "... N"]) -> Float[Array, "... M"]:
        """Returns x times the matrix."""
        y = jnp.einsum("...n,mn->...m", x, self.values.astype(x.dtype))
        return y if self.scale is None else y * self.scale.astype(x.dtype)
