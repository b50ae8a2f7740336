"""The walk of queries from the root to a leaf, one choice a level.

Reference: "Tree Cross Attention" (arXiv 2309.17388), section 3.2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.models.tree.cross import CrossAttention
from tokjax.models.tree.shape import TreeShape

# (numbers of the children, which of them are there) -> their probabilities
Policy = Callable[[Int[Array, "B M b"], Bool[Array, "B M b"]], Float[Array, "B M b"]]


@struct.dataclass
class Walk:
    """Where queries went, and how likely that was.

    Attributes:
        path: the child chosen at each level.
        log_probs: of all choices together.
        entropy: of the policy, a mean over the levels, in nats.
    """

    path: Int[Array, "B M k"]
    log_probs: Float[Array, "B M"]
    entropy: Float[Array, "B M"]


def rows(a: Array, at: Int[Array, "B ..."]) -> Array:
    """Returns the entries `at` of each row's array."""
    return jax.vmap(lambda own, index: own[index])(a, at)


def attention_policy(
    block: CrossAttention, q: Float[Array, "B M H d"], k: Float[Array, "B nodes H d"]
) -> Policy:
    """Returns the policy that goes where the block would look: its heads' mean over the children.

    Args:
        block: of cross attention.
        q: the heads' queries.
        k: the heads' keys of all nodes.
    """

    def policy(nodes: Int[Array, "B M b"], there: Bool[Array, "B M b"]) -> Float[Array, "B M b"]:
        return block.probabilities(q, rows(k, nodes), there).mean(2)

    return policy


def uniform_policy(
    nodes: Int[Array, "B M b"], there: Bool[Array, "B M b"]
) -> Float[Array, "B M b"]:
    """Returns equal probabilities of the children that are there: a random path, as a control."""
    del nodes
    real = there.astype(jnp.float32)
    return real / jnp.maximum(real.sum(-1, keepdims=True), 1.0)


def walk(
    shape: TreeShape,
    policy: Policy,
    there: Bool[Array, "B nodes"],
    queries: int,
    key: jax.Array | None = None,
    path: Int[Array, "B M k"] | None = None,
) -> Walk:
    """Returns a walk of each query. A node without a leaf that counts is never chosen.

    Choices are whole numbers: no gradient passes through them, only through their probabilities.

    Args:
        shape: of the tree.
        policy: gives the probabilities of children.
        there: nodes that are or hold leaves that count.
        queries: of a row.
        key: of the draws; None takes the likeliest child, of equals the first.
        path: choices to be taken instead.
    """
    b, B = shape.branching, there.shape[0]
    node = jnp.zeros((B, queries), jnp.int32)
    log_prob = jnp.zeros((B, queries))
    entropies, choices = [], []
    for level in range(1, shape.depth + 1):
        nodes = shape.first(level) + b * node[..., None] + jnp.arange(b)
        probs = policy(nodes, rows(there, nodes))
        possible = probs > 0
        logs = jnp.log(jnp.where(possible, probs, 1.0))
        if path is not None:
            chosen = path[..., level - 1].astype(jnp.int32)
        elif key is None:
            chosen = jnp.argmax(probs, axis=-1).astype(jnp.int32)
        else:
            scores = jnp.where(possible, logs, -jnp.inf)
            drawn = jax.random.categorical(jax.random.fold_in(key, level), scores)
            chosen = drawn.astype(jnp.int32)
        log_prob += jnp.take_along_axis(logs, chosen[..., None], axis=-1)[..., 0]
        entropies.append(-(probs * logs).sum(-1))
        choices.append(chosen)
        node = b * node + chosen
    if not choices:
        return Walk(jnp.zeros((B, queries, 0), jnp.int32), log_prob, jnp.zeros((B, queries)))
    return Walk(jnp.stack(choices, axis=-1), log_prob, jnp.stack(entropies).mean(0))
