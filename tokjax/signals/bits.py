"""Bits per byte, the score that compares language models of different tokenizers."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def bits_per_unit(
    nats: Float[Array, "..."] | float,
    units: Float[Array, "..."] | Int[Array, "..."] | float,
    mask: Bool[Array, "..."] | None = None,
    axis: int | Sequence[int] | None = None,
) -> Float[Array, "..."]:
    """Returns the bits spent per byte, character or other unit: sum of nats / (ln 2 sum of units).

    A ratio of sums, not a mean of ratios. It is 0 where there is no unit. A token that stands
    for no text (an end-of-text or an end-of-group slot) must pay its nats and has 0 units:
    leaving it out flatters the model that has more of them.

    Args:
        nats: negative log-likelihoods, of tokens or of whole texts.
        units: bytes (or characters) that each of them stands for; either argument may be one
            number, nats per token over bytes per token.
        mask: entries that count; by default all.
        axis: axes to sum over; by default all.

    >>> round(float(bits_per_unit(3.2, 4.1)), 4)
    1.126
    """
    nats, units = (jnp.asarray(a).astype(jnp.float32) for a in (nats, units))
    nats, units = jnp.broadcast_arrays(nats, units)
    if mask is not None:
        nats, units = jnp.where(mask, nats, 0.0), jnp.where(mask, units, 0.0)
    axes = axis if axis is None or isinstance(axis, int) else tuple(axis)
    total, size = nats.sum(axes), units.sum(axes)
    return jnp.where(size > 0, total / (math.log(2) * jnp.where(size > 0, size, 1.0)), 0.0)
