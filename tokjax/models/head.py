"""The output head: how final hidden states become logits."""

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
