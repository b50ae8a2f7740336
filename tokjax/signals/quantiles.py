"""Quantiles and top fractions of masked values, for use under jit with masks and levels traced."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax.errors import nearest

METHODS = ("linear", "lower", "higher", "nearest")


def masked_quantile(
    values: Float[Array, "..."],
    q: float | Sequence[float] | Float[Array, "*Q"],
    mask: Bool[Array, "..."],
    axis: int | Sequence[int] | None = -1,
    method: Literal["linear", "lower", "higher", "nearest"] = "linear",
    empty: float = 0.0,
) -> Float[Array, "..."]:
    """Returns quantiles of the masked values along an axis; the axes of q come first.

    The q-quantile of n sorted values lies at place q (n - 1), as in NumPy. `lower`, `higher` and
    `nearest` (halves go to the even place) return one of the values, `linear` interpolates. For
    those three, a place within four float32 roundings of a whole or half number counts as that
    number, so that 0.53 of 101 values is place 53, not 52.999996.

    Args:
        values: not NaN where the mask is True; for `linear` finite.
        q: levels in [0, 1], a number or an array of any shape; may be traced.
        mask: which values count; broadcast to values.
        axis: one axis, several taken together, or None for all.
        method: the convention between two values.
        empty: what a slice without any value gives.

    Raises:
        ValueError: another method; a level outside [0, 1].
    """
    if method not in METHODS:
        raise ValueError(f"unknown quantile method {method!r}.{nearest(method, METHODS)}")
    if not isinstance(q, jax.Array) and not np.all((np.asarray(q) >= 0) & (np.asarray(q) <= 1)):
        raise ValueError(f"quantile levels lie in [0, 1], not {q}")
    values, mask = _along_last(values, mask, axis)
    levels = jnp.asarray(q, jnp.float32)
    ordered = jnp.sort(jnp.where(mask, values, jnp.inf), axis=-1)
    n = mask.sum(-1, keepdims=True)
    last = jnp.maximum(n - 1, 0)
    place = levels.reshape(-1) * last.astype(jnp.float32)  # [..., Q]

    def at(index):
        index = jnp.clip(index.astype(jnp.int32), 0, last)
        return jnp.take_along_axis(ordered, index, axis=-1)

    if method == "linear":
        below = jnp.floor(place)
        low, high = at(below), at(below + 1)
        found = jnp.where(place == below, low, low + (high - low) * (place - below))
    else:
        rounded = {"lower": jnp.floor, "higher": jnp.ceil, "nearest": jnp.round}[method]
        found = at(rounded(_snapped(place)))
    found = jnp.where(n > 0, found, empty)
    return jnp.moveaxis(found, -1, 0).reshape(*levels.shape, *found.shape[:-1])


def fraction_count(
    n: int | Int[Array, "*B"],
    fraction: float | Fraction | Float[Array, ""],
    rounding: Literal["ceil", "floor"] = "ceil",
) -> int | Int[Array, "*B"]:
    """Returns how many a fraction of n things is, rounded up or down without a float's error.

    A Python number means the decimal it is written as: 0.07 is 7/100, and 29 % of 100 is 29,
    not the 28 of `int(0.29 * 100)`. A traced fraction (a schedule's) is float32: a product within
    four roundings of a whole number counts as that number.

    Args:
        n: how many there are; a Python int, or an array, traced or not.
        fraction: in [0, 1].
        rounding: `ceil` or `floor`.

    Raises:
        ValueError: a fraction outside [0, 1] or, for an array n, with so many digits that int32
            overflows; another rounding.

    >>> fraction_count(361, 0.07), fraction_count(100, 0.29, "floor")
    (26, 29)
    """
    if rounding not in ("ceil", "floor"):
        raise ValueError(f"unknown rounding {rounding!r}.{nearest(rounding, ('ceil', 'floor'))}")
    if isinstance(fraction, jax.Array):
        product = _snapped(jnp.asarray(n, jnp.float32) * fraction.astype(jnp.float32))
        rounded = jnp.ceil(product) if rounding == "ceil" else jnp.floor(product)
        return rounded.astype(jnp.int32)
    exact = fraction if isinstance(fraction, Fraction) else Fraction(str(fraction))
    if not 0 <= exact <= 1:
        raise ValueError(f"a fraction lies in [0, 1], not {fraction}")
    top, bottom = exact.numerator, exact.denominator
    if not isinstance(n, int) and top * bottom >= 2**31:
        raise ValueError(f"{fraction} has too many digits for int32: give Fraction(1, 3), say")
    # Whole multiples of the denominator apart, so that the product below stays small.
    rest = (n % bottom) * top
    part = -(-rest // bottom) if rounding == "ceil" else rest // bottom
    return n // bottom * top + part


def top_mask(
    scores: Float[Array, "*B N"],
    count: int | Int[Array, "*#B"],
    mask: Bool[Array, "*#B N"],
    largest: bool = True,
) -> Bool[Array, "*B N"]:
    """Returns a mask of the `count` best-scored masked entries; ties go to the lower index.

    Exactly min(count, masked entries) are chosen. Reshape first to choose over several axes.

    Args:
        scores: any numbers, infinities included.
        count: how many; may be traced.
        mask: entries that may be chosen.
        largest: choose the highest scores, not the lowest.
    """
    scores = scores.astype(jnp.float32)
    mask = jnp.broadcast_to(mask, scores.shape)
    # Masked entries last, whatever they score; lexsort is stable.
    order = jnp.lexsort((-scores if largest else scores, ~mask), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    return mask & (rank < jnp.asarray(count, jnp.int32)[..., None])


def _snapped(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x, moved to the nearest whole or half number if rounding may have moved it away."""
    near = jnp.round(2 * x) / 2
    tolerance = 4 * jnp.finfo(jnp.float32).eps * jnp.maximum(jnp.abs(x), 1.0)
    return jnp.where(jnp.abs(x - near) <= tolerance, near, x)


def _along_last(values, mask, axis) -> tuple[Array, Array]:
    """Returns float32 values and their mask with the chosen axes flattened into the last."""
    values = jnp.asarray(values).astype(jnp.float32)
    mask = jnp.broadcast_to(mask, values.shape)
    if axis is None:
        return values.reshape(-1), mask.reshape(-1)
    axes = [a % values.ndim for a in ([axis] if isinstance(axis, int) else axis)]
    rest = [a for a in range(values.ndim) if a not in axes]
    shape = [*(values.shape[a] for a in rest), -1]
    return tuple(a.transpose(*rest, *axes).reshape(shape) for a in (values, mask))  # type: ignore
