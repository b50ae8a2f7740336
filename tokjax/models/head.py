"""The output head: how final hidden states become logits."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax import struct


@struct.dataclass
class Head:
    """A linear map to the vocabulary, with what some families add to it.

    logits = cap(scale * (x @ table.T + bias)), where cap(z) = softcap * tanh(z / softcap).

    Attributes:
        table: one row per token id, in the dtype of the hidden states.
        bias: added to the products; without a softcap, -inf makes a token impossible.
        softcap: bound on the size of a logit (Gemma 2, arXiv 2408.00118, section 2); None leaves
            logits as they are.
        scale: factor of the products and the bias (Cohere's logit_scale, or 1 / temperature).
    """

    table: Float[Array, "V D"]
    bias: Float[Array, "V"] | None = None
    softcap: float | None = struct.field(pytree_node=False, default=None)
    scale: float = struct.field(pytree_node=False, default=1.0)


def as_head(head: Head | Float[Array, "V D"]) -> Head:
    """Returns the head itself, or the plain head of a table.

    Raises:
        ValueError: a table or bias of another shape, or a softcap that is not positive.
    """
    head = head if isinstance(head, Head) else Head(head)
    if head.table.ndim != 2:
        raise ValueError(f"the head's table {head.table.shape} must be [V, D]")
    if head.bias is not None and head.bias.shape != head.table.shape[:1]:
        raise ValueError(
            f"the head's bias {head.bias.shape} must be [V] for its table {head.table.shape}"
        )
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"softcap={head.softcap} must be positive; None leaves logits uncapped")
    return head


def logits(head: Head, x: Float[Array, "N D"]) -> Float[Array, "N V"]:
    """Returns float32 logits of hidden states.

    >>> head = Head(jnp.eye(2), bias=jnp.array([0.0, 1.0]), softcap=2.0)
    >>> [round(float(z), 3) for z in logits(head, jnp.array([[1.0, 0.0]]))[0]]
    [0.924, 0.924]
    """
    z = jnp.einsum("nd,vd->nv", x, head.table, preferred_element_type=jnp.float32)
    return from_products(head, z)


def from_products(head: Head, z: Float[Array, "N V"]) -> Float[Array, "N V"]:
    """Returns logits from the float32 products x @ table.T, however those were computed."""
    if head.bias is not None:
        z = z + head.bias.astype(jnp.float32)
    if head.scale != 1.0:
        z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * jnp.tanh(z / head.softcap)
    return z


def sum_of_logits(
    parts: Sequence[tuple[Float[Array, "B T _"], Head]], weights: Sequence[float], vocab_size: int
) -> tuple[Float[Array, "B T D"], Head]:
    """Returns hidden states and a head whose logits are the weighted sum of others'.

    States lie side by side, and so do the tables: the product adds up all widths in float32.

    Args:
        parts: hidden states of models over the same ids, each with its head.
        weights: of the logits of each.
        vocab_size: ids that are kept, from 0.

    Raises:
        ValueError: a head caps its logits: those are no products.

    >>> one = jnp.ones((1, 1, 2)), Head(jnp.eye(2))
    >>> two = jnp.ones((1, 1, 1)), Head(jnp.ones((3, 1)))
    >>> x, head = sum_of_logits([one, two], [1.0, 2.0], 2)
    >>> logits(head, x[0]).tolist()
    [[3.0, 3.0]]
    """
    dtype = jnp.result_type(*(x.dtype for x, _ in parts))
    scale = parts[0][1].scale
    states, tables, bias = [], [], None
    for (x, head), weight in zip(parts, weights, strict=True):
        if head.softcap is not None:
            raise ValueError(f"softcap={head.softcap}: capped logits are no products to be added")
        factor = weight * head.scale / scale
        x = x.astype(dtype)
        states.append(x if factor == 1.0 else (x * jnp.asarray(factor, dtype)))
        tables.append(head.table[:vocab_size].astype(dtype))
        if head.bias is not None:
            own = factor * head.bias[:vocab_size].astype(jnp.float32)
            bias = own if bias is None else bias + own
    table = jnp.concatenate(tables, axis=-1)
    return jnp.concatenate(states, axis=-1), Head(table, bias, scale=scale)


def logits_vjp(
    head: Head, x: Float[Array, "N D"], z: Float[Array, "N V"], d_z: Float[Array, "N V"]
) -> tuple[Float[Array, "N D"], Head]:
    """Returns the gradients of x and of the head in float32, from that of its logits z.

    Whoever streams over the vocabulary calls this once per block, with logits just computed. In
    bfloat16 the products take bfloat16 factors and add up in float32.
    """
    if head.softcap is not None:
        d_z = d_z * (1.0 - jnp.square(z / head.softcap))
    if head.scale != 1.0:
        d_z = d_z * head.scale
    factor = d_z.astype(x.dtype)
    d_x = jnp.einsum("nv,vd->nd", factor, head.table, preferred_element_type=jnp.float32)
    d_table = jnp.einsum("nv,nd->vd", factor, x, preferred_element_type=jnp.float32)
    d_bias = None if head.bias is None else d_z.sum(0)
    return d_x, Head(d_table, d_bias, head.softcap, head.scale)
