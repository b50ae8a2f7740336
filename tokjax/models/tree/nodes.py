"""The nodes of a tree: inner ones summarise their children, from the bottom up.

Reference: "Tree Cross Attention" (arXiv 2309.17388), section 3.1.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax import struct
from tokjax.errors import ConfigError
from tokjax.models.config import ModelConfig
from tokjax.models.parameters import Params
from tokjax.models.stack import StackConfig, init_stack, run_stack
from tokjax.models.tree.shape import TreeShape


@struct.dataclass
class Tree:
    """The nodes of a tree by their numbers (see `tokjax.models.tree.shape`), and its root.

    Attributes:
        vectors: of nodes.
        there: whether a node is, or has under it, a leaf that counts.
        root: what summarises all leaves.
    """

    vectors: Float[Array, "B nodes D"]
    there: Bool[Array, "B nodes"]
    root: Float[Array, "B D"]


@dataclass(frozen=True)
class Aggregator:
    """How siblings become their parent: a small transformer among them, then their mean.

    Siblings have no positions, so that their order means nothing.
    """

    stack: StackConfig
    model: ModelConfig

    def __post_init__(self):
        if self.stack.d_model is not None:
            raise ConfigError(
                f"aggregator.d_model={self.stack.d_model} must be None: parents stand beside "
                f"their children"
            )
        # Rows are a few siblings long and there are many: no kernel for long rows.
        object.__setattr__(self, "model", dataclasses.replace(self.model, attention="dense"))

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Returns initial parameters, which all levels share."""
        return init_stack(self.stack, self.model, key)

    def parents(
        self, params: Params, x: Float[Array, "B G n D"], mask: Bool[Array, "B G n"]
    ) -> Float[Array, "B G D"]:
        """Returns the parent of each group of siblings; zeros where none of them counts."""
        B, G, n, D = x.shape
        # Those that do not count are a segment of their own, which nobody else sees.
        own = mask.reshape(B * G, n).astype(jnp.int32)
        y = run_stack(self.stack, self.model, params, x.reshape(B * G, n, D), own)
        y = jnp.where(mask[..., None], y.reshape(x.shape), 0)
        count = jnp.maximum(mask.sum(-1, keepdims=True), 1)
        return y.sum(2) / count.astype(y.dtype)


def build_tree(
    shape: TreeShape,
    aggregator: Aggregator,
    params: Params,
    leaves: Float[Array, "B L D"],
    real: Bool[Array, "B L"],
    *,
    bptt: bool = False,
) -> Tree:
    """Returns the nodes over leaves that stand in their slots.

    Args:
        shape: of the tree.
        aggregator: makes parents.
        params: from `Aggregator.init`.
        leaves: what each slot holds.
        real: slots that count.
        bptt: gradients of parents reach their children; else parents are made of constants, and a
            loss reaches the states below a node only where it reads them.
    """
    B, _, D = leaves.shape
    levels, theres = [leaves], [real]
    sizes = [shape.per_node, *[shape.branching] * shape.depth]
    for size in sizes:
        children = levels[-1] if bptt else jax.lax.stop_gradient(levels[-1])
        groups, there = children.reshape(B, -1, size, D), theres[-1].reshape(B, -1, size)
        levels.append(aggregator.parents(params, groups, there))
        theres.append(there.any(-1))
    # From the children of the root down, without the root.
    down = slice(-2, None, -1)
    vectors = jnp.concatenate(levels[down], axis=1)
    return Tree(vectors, jnp.concatenate(theres[down], axis=1), levels[-1][:, 0])


def exchange_siblings(shape: TreeShape, tree: Tree, key: jax.Array) -> Tree:
    """Returns the tree with the vectors of inner siblings exchanged at random, as a control.

    Leaves, and which nodes lie under which, stay: a summary then says nothing about what is
    reached through it. The same exchange serves all queries of a row.
    """
    B, _, D = tree.vectors.shape
    b, parts = shape.branching, []
    for level in range(1, shape.depth + 1):
        nodes = slice(shape.first(level), shape.first(level + 1))
        groups = tree.vectors[:, nodes].reshape(B, -1, b, D)
        draws = jax.random.uniform(jax.random.fold_in(key, level), groups.shape[:3])
        order = jnp.argsort(draws, axis=-1)[..., None]
        parts.append(jnp.take_along_axis(groups, order, axis=2).reshape(B, -1, D))
    parts.append(tree.vectors[:, shape.first(shape.depth + 1) :])
    return tree.replace(vectors=jnp.concatenate(parts, axis=1))  # type: ignore[attr-defined]
