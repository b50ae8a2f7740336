"""KoLeo: vectors of a batch are pushed away from their nearest neighbours.

Reference: Sablayrolles et al., "Spreading vectors for similarity search" (arXiv 1806.03198), with
the epsilons of "MEXMA: Token-level objectives improve sentence representations" (arXiv 2409.12737).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.signals.hidden import l2_norm

EPSILON = 1e-8  # added to every coordinate of a difference, and to a distance
_NEVER = -2.0  # below any cosine


def koleo(
    x: Float[Array, "N D"], there: Bool[Array, "N"] | None = None, epsilon: float = EPSILON
) -> Float[Array, ""]:
    """Returns minus the mean log distance of vectors, scaled to length 1, to their nearest other.

    Gradients flow through both ends; at exact duplicates they are finite, for which the epsilon
    inside the norm is there. With fewer than two vectors there is no neighbour: 0.

    Args:
        x: vectors of any length, but not zero.
        there: which rows count; default all.
        epsilon: see `EPSILON`.

    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
    >>> round(float(koleo(x)), 6)
    0.113907
    """
    there = jnp.ones(len(x), bool) if there is None else there
    unit = unit_vectors(x)
    apart = unit - unit[nearest_others(unit, there)] + epsilon
    losses = jnp.where(there, -jnp.log(l2_norm(apart) + epsilon), 0.0)
    count = there.sum()
    return jnp.where(count > 1, losses.sum() / jnp.maximum(count, 1), 0.0)


def unit_vectors(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Returns float32 vectors of length 1; zeros stay zeros."""
    return x.astype(jnp.float32) / jnp.maximum(l2_norm(x), EPSILON)[..., None]


def nearest_others(
    unit: Float[Array, "N D"], there: Bool[Array, "N"] | None = None
) -> Int[Array, "N"]:
    """Returns for each vector which other one has the largest product with it.

    Args:
        unit: vectors of length 1.
        there: which rows can be neighbours; default all.
    """
    there = jnp.ones(len(unit), bool) if there is None else there
    fixed = jax.lax.stop_gradient(unit)
    products = jnp.einsum("nd,md->nm", fixed, fixed, precision="highest")
    others = there[None] & ~jnp.eye(len(unit), dtype=bool)
    return jnp.where(others, products, _NEVER).argmax(-1)
