"""The shape of a tree over leaves and the numbers of its nodes, in exact integers.

Nodes are numbered level by level: the children of the root, their children, ..., and behind the
lowest inner nodes the slots of the leaves. The root has no number: no query ever reads it.

Reference: "Tree Cross Attention" (arXiv 2309.17388), section 3.1.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax.errors import ConfigError

MOST_LEAVES = 1 << 15  # products of slots and leaves are 32-bit


@dataclass(frozen=True)
class TreeShape:
    """A tree whose inner nodes have `branching` children, and its lowest ones `per_node` leaves.

    >>> shape = TreeShape(1000)
    >>> shape.depth, shape.per_node, shape.slots, shape.retrieved
    (9, 2, 1024, 11)
    """

    leaves: int  # tokens that stand at the bottom
    branching: int = 2  # children of an inner node

    def __post_init__(self):
        if not 1 <= self.leaves <= MOST_LEAVES:
            raise ConfigError(f"leaves={self.leaves} of a tree must be from 1 to {MOST_LEAVES}")
        if self.branching < 2:
            raise ConfigError(f"branching={self.branching} of a tree must be at least 2")

    @property
    def depth(self) -> int:
        """Choices on the way from the root to a leaf: the largest k with b^k < N, else 0."""
        depth, nodes = 0, self.branching
        while nodes < self.leaves:
            depth, nodes = depth + 1, nodes * self.branching
        return depth

    @property
    def per_node(self) -> int:
        """Leaf slots under each of the lowest inner nodes."""
        return -(-self.leaves // self.branching**self.depth)

    @property
    def slots(self) -> int:
        """Leaf slots: the leaves and copies of some, which fill the lowest nodes."""
        return self.per_node * self.branching**self.depth

    @property
    def retrieved(self) -> int:
        """Nodes that a query attends to: siblings of those on its way, and the last one's slots."""
        return self.depth * (self.branching - 1) + self.per_node

    @property
    def nodes(self) -> int:
        """Numbered nodes: all but the root, slots included."""
        return self.first(self.depth + 1) + self.slots

    def first(self, level: int) -> int:
        """Returns the number of a level's first node; the root is level 0, slots are the last."""
        b = self.branching
        return (b**level - b) // (b - 1)


def arranged(
    shape: TreeShape, mask: Bool[Array, "B N"], values: Float[Array, "B N"] | None = None
) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """Returns which token stands in each leaf slot, and which slots count.

    Tokens are spread evenly over the slots, so that every part of the tree holds its share also
    of short rows (recommendation of tokjax). The slots between a token and the next repeat it and
    do not count. A token that is not there stands nowhere.

    Args:
        shape: of the tree.
        mask: tokens that are there.
        values: what tokens are sorted by; default their order in the row.
    """
    if mask.shape[-1] != shape.leaves:
        raise ConfigError(f"{mask.shape[-1]} tokens do not fit a tree of {shape.leaves} leaves")
    if values is None:
        order = jnp.argsort(~mask, axis=-1, stable=True)
    else:
        order = jnp.lexsort((values, ~mask), axis=-1)
    count = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    rank = jnp.arange(shape.slots) * count // shape.slots
    before = jnp.pad(rank, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    real = (rank != before) & mask.any(-1, keepdims=True)
    return jnp.take_along_axis(order, rank, axis=-1), real


def projections(x: Float[Array, "B N C"], seed: int) -> Float[Array, "B N"]:
    """Returns each point's place along a random direction, the same for all rows and calls."""
    direction = jax.random.normal(jax.random.key(seed), (x.shape[-1],))
    return x.astype(jnp.float32) @ direction


def retrieved(shape: TreeShape, path: Int[Array, "*Q k"]) -> Int[Array, "*Q S"]:
    """Returns the numbers of the nodes that a walk leaves to attend to.

    Args:
        shape: of the tree.
        path: the child chosen at each level, 0 to branching - 1.
    """
    b, P = shape.branching, shape.per_node
    node = jnp.zeros(path.shape[:-1], path.dtype)
    found = []
    for level in range(1, shape.depth + 1):
        chosen = path[..., level - 1]
        others = (chosen[..., None] + jnp.arange(1, b)) % b
        found.append(shape.first(level) + b * node[..., None] + others)
        node = b * node + chosen
    found.append(shape.first(shape.depth + 1) + P * node[..., None] + jnp.arange(P))
    return jnp.concatenate(found, axis=-1)


def leaves_under(shape: TreeShape) -> Bool[np.ndarray, "nodes L"]:
    """Returns which slots lie under each numbered node."""
    L = shape.slots
    found = []
    for level in range(1, shape.depth + 1):
        count = shape.branching**level
        found.append(np.arange(L) // (L // count) == np.arange(count)[:, None])
    return np.concatenate([*found, np.eye(L, dtype=bool)])
