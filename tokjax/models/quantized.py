"""Parameters whose matrices are 8-bit integers: a quarter of the memory of float32.

The matrices of attention and feed-forward are kept as int8 with one scale for each output; norms,
biases, adapters, embeddings and the output head stay as they are. Products take the compute dtype:
what is saved is memory, and time where that is bound by reading weights and the compiler reads them
as integers (a GPU; XLA's CPU backend widens a matrix before it multiplies).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from tokjax import struct
from tokjax.errors import ConfigError

_PARTS = ("attention", "cross", "mlp")
_MATRICES = ("query", "key", "value", "out", "gate", "up", "down")
_MOST = 127


@struct.dataclass
class Int8Matrix:
    """A matrix [N, M] as values * scale, in the place of a parameter.

    Attributes:
        values: whole numbers of -127 to 127.
        scale: of each output.
    """

    values: Int8[Array, "*L N M"]
    scale: Float[Array, "*L M"]

    @classmethod
    def of(cls, matrix: Float[Array, "*L N M"]) -> "Int8Matrix":
        """Returns the nearest such matrix, its scales chosen by each output's largest weight.

        An entry is off by at most half a scale.
        """
        wide = matrix.astype(jnp.float32)
        scale = jnp.abs(wide).max(axis=-2) / _MOST
        divisor = jnp.where(scale > 0, scale, 1.0)[..., None, :]
        return cls(jnp.round(wide / divisor).astype(jnp.int8), scale)

    def astype(self, dtype: Any) -> "Int8Matrix":
        """Returns itself: products take the dtype of what is multiplied."""
        del dtype
        return self

    def after(self, x: Float[Array, "... N"]) -> Float[Array, "... M"]:
        """Returns x times the matrix."""
        return (x @ self.values.astype(x.dtype)) * self.scale.astype(x.dtype)

    def widened(self, dtype: Any) -> Float[Array, "*L N M"]:
        """Returns the matrix itself."""
        return (self.values.astype(jnp.float32) * self.scale[..., None, :]).astype(dtype)


def quantize(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters with the blocks' matrices as int8, for every function of the model.

    Gradients of what is not quantised (adapters, say) go through them.

    Args:
        params: of a decoder, an encoder or an encoder-decoder, stacked or not.

    Raises:
        ConfigError: they are quantised already.
    """
    if is_quantized(params):
        raise ConfigError("the parameters are quantised already")
    return _mapped(params, lambda w: jax.jit(Int8Matrix.of)(w))


def dequantize(params: Mapping[str, Any], dtype: Any = jnp.float32) -> dict[str, Any]:
    """Returns the parameters with plain matrices, which the int8 ones stand for."""
    return _mapped(params, lambda w: w.widened(dtype) if isinstance(w, Int8Matrix) else w)


def is_quantized(params: Mapping[str, Any]) -> bool:
    """Returns whether there is an int8 matrix among the parameters."""
    leaves = jax.tree.leaves(params, is_leaf=lambda w: isinstance(w, Int8Matrix))
    return any(isinstance(leaf, Int8Matrix) for leaf in leaves)


def _mapped(params: Mapping[str, Any], change: Any) -> dict[str, Any]:
    if "layers" not in params:
        return {
            name: _mapped(child, change) if isinstance(child, Mapping) else child
            for name, child in params.items()
        }

    def of_block(block: Mapping[str, Any]) -> dict[str, Any]:
        return {
            part: {
                name: change(w) if part in _PARTS and name in _MATRICES else w
                for name, w in weights.items()
            }
            for part, weights in block.items()
        }

    layers = params["layers"]
    changed = tuple(map(of_block, layers)) if isinstance(layers, tuple) else of_block(layers)
    return {**params, "layers": changed}
