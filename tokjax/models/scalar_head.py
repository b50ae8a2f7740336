"""A linear head that reads numbers from hidden states: values, rewards, scores, tags."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ScalarHead = dict[str, Array]


def init_scalar_head(key: jax.Array, width: int, outputs: int = 1) -> ScalarHead:
    """Returns a head's parameters: `weight` [D, O] of variance 1 / D and `bias` [O] of zeros.

    Args:
        key: of the weights.
        width: D, of the hidden states.
        outputs: O, numbers read at each position.
    """
    weight = jax.random.normal(key, (width, outputs), jnp.float32) * width**-0.5
    return {"weight": weight, "bias": jnp.zeros(outputs, jnp.float32)}


def scalar_head(head: ScalarHead, x: Float[Array, "*shape D"]) -> Float[Array, "*shape O"]:
    """Returns what a head reads at each position, in float32.

    Args:
        head: see `init_scalar_head`.
        x: hidden states.
    """
    return x.astype(jnp.float32) @ head["weight"] + head["bias"]
