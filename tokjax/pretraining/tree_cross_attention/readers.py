"""How queries read a context: by a tree, through a few latents, or all of it.

They share one interface, registered under the kind "context_reader". Their queries may be any
vectors: positions of a text, coordinates of an image.

Reference: "Tree Cross Attention" (arXiv 2309.17388); the latents are those of Perceiver IO
(arXiv 2107.14795).
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.config import register
from tokjax.errors import ConfigError, nearest
from tokjax.models.config import ModelConfig
from tokjax.models.parameters import Params
from tokjax.models.stack import StackConfig, init_stack, run_stack
from tokjax.models.tree import (
    Aggregator,
    CrossAttention,
    Tree,
    TreeShape,
    arranged,
    attention_policy,
    build_tree,
    exchange_siblings,
    projections,
    retrieved,
    uniform_policy,
    walk,
)
from tokjax.models.tree.walk import rows

_ORDERS = ("sequence", "coordinate", "projection")
_CONTROLS = ("none", "random_path", "exchanged")


@struct.dataclass
class Reading:
    """What queries read.

    Attributes:
        x: what they know now.
        used: vectors that each attended to.
        whole: what they would know had they attended to all leaves with the same weights, or None.
        log_probs: of a query's choices together, or None where nothing is chosen.
        entropy: of the policy, a mean over a query's choices in nats, or None.
        path: the choices, or None.
    """

    x: Float[Array, "B M D"]
    used: Int[Array, "B M"]
    whole: Float[Array, "B M D"] | None = None
    log_probs: Float[Array, "B M"] | None = None
    entropy: Float[Array, "B M"] | None = None
    path: Int[Array, "B M k"] | None = None


class ContextReader(Protocol):
    """Something by which queries read a context."""

    def budget(self, tokens: int) -> int:
        """Returns how many vectors a query attends to in a context of so many tokens."""
        ...

    def init(self, key: jax.Array, model: ModelConfig, tokens: int) -> dict[str, Any]:
        """Returns initial parameters beside a model, for contexts of so many tokens at most."""
        ...

    def read(
        self,
        model: ModelConfig,
        params: Params,
        queries: Float[Array, "B M D"],
        states: Float[Array, "B N D"],
        mask: Bool[Array, "B N"],
        key: jax.Array,
        *,
        draws: bool = True,
        whole: bool = False,
    ) -> Reading:
        """Returns what queries read of a context.

        Args:
            model: whose states they are.
            params: from `init`.
            queries: as wide as the states.
            states: of the context.
            mask: tokens that are there.
            key: of whatever is random.
            draws: choices are drawn, as in training; else the likeliest are taken.
            whole: also read all leaves.
        """
        ...


@register("context_reader", "tree")
@dataclass(frozen=True)
class TreeReader:
    """Tree Cross Attention: a walk to one leaf, and attention to what lies beside the way."""

    branching: int = 2  # children of an inner node; as many as tokens make it plain attention
    aggregator: StackConfig = StackConfig(n_layers=1)  # among siblings; 0 layers take their mean
    # how tokens stand at the bottom: as in the row; by one coordinate; by a random projection
    order: Literal["sequence", "coordinate", "projection"] = "sequence"
    coordinate: int = 0  # of order "coordinate"
    order_seed: int = 0  # of order "projection"
    bptt: bool = False  # gradients pass from a summary to what it summarises
    n_heads: int | None = None  # heads of attention; None: as many as the model has
    d_ff: int | None = None  # feed-forward width; None: the model's
    # as controls: the way is random, also in tests; or the vectors of siblings are exchanged at
    # random above the leaves, so that they say nothing about what lies under them
    control: Literal["none", "random_path", "exchanged"] = "none"

    def __post_init__(self):
        TreeShape(1, self.branching)
        for name, choices in (("order", _ORDERS), ("control", _CONTROLS)):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"unknown {name}={value!r}.{nearest(str(value), choices)}")
        if self.coordinate < 0:
            raise ConfigError(f"coordinate={self.coordinate} must not be negative")

    def shape(self, tokens: int) -> TreeShape:
        """Returns the shape of the tree over so many tokens."""
        return TreeShape(tokens, self.branching)

    def budget(self, tokens: int) -> int:
        """Returns how many nodes a query attends to."""
        return self.shape(tokens).retrieved

    def _parts(self, model: ModelConfig) -> tuple[CrossAttention, Aggregator]:
        block = CrossAttention.beside(model, self.n_heads, self.d_ff)
        return block, Aggregator(self.aggregator, model)

    def init(self, key: jax.Array, model: ModelConfig, tokens: int) -> dict[str, Any]:
        """Returns initial parameters of the attention and of the aggregator.

        Raises:
            ConfigError: a shape is impossible.
        """
        self.shape(tokens)
        keys = jax.random.split(key)
        block, aggregator = self._parts(model)
        return {"cross": block.init(keys[0]), "aggregator": aggregator.init(keys[1])}

    def tree(
        self,
        model: ModelConfig,
        params: Params,
        states: Float[Array, "B N D"],
        mask: Bool[Array, "B N"],
        coordinates: Float[Array, "B N C"] | None = None,
    ) -> Tree:
        """Returns the tree over the states of a context.

        Args:
            model: whose states they are.
            params: from `init`.
            states: of the context.
            mask: tokens that are there.
            coordinates: what tokens are ordered by, unless as in the row; default their states.

        Raises:
            ConfigError: there is no such coordinate.
        """
        shape, values = self.shape(states.shape[1]), None
        if self.order != "sequence":
            points = jax.lax.stop_gradient(states) if coordinates is None else coordinates
            if self.order == "projection":
                values = projections(points, self.order_seed)
            elif self.coordinate >= points.shape[-1]:
                raise ConfigError(
                    f"reader.coordinate={self.coordinate}, but there are {points.shape[-1]}, "
                    f"counted from 0"
                )
            else:
                values = points[..., self.coordinate]
        places, real = arranged(shape, mask, values)
        aggregator = self._parts(model)[1]
        leaves = rows(states, places)
        return build_tree(shape, aggregator, params["aggregator"], leaves, real, bptt=self.bptt)

    def read(
        self,
        model: ModelConfig,
        params: Params,
        queries: Float[Array, "B M D"],
        states: Float[Array, "B N D"],
        mask: Bool[Array, "B N"],
        key: jax.Array,
        *,
        draws: bool = True,
        whole: bool = False,
        coordinates: Float[Array, "B N C"] | None = None,
        path: Int[Array, "B M k"] | None = None,
    ) -> Reading:
        """Returns what queries read of a context; see `ContextReader.read`.

        Args:
            model: see there.
            params: see there.
            queries: see there.
            states: see there.
            mask: see there.
            key: see there.
            draws: see there.
            whole: see there.
            coordinates: see `tree`.
            path: choices to be taken instead of the policy's.
        """
        shape, block = self.shape(states.shape[1]), self._parts(model)[0]
        tree = self.tree(model, params, states, mask, coordinates)
        keys = jax.random.split(key)
        if self.control == "exchanged":
            tree = exchange_siblings(shape, tree, keys[0])
        w = params["cross"]
        q, (k, v) = block.queries(w, queries), block.keys_values(w, tree.vectors)
        random = self.control == "random_path"
        walked = walk(
            shape,
            uniform_policy if random else attention_policy(block, q, k),
            tree.there,
            queries.shape[1],
            keys[1] if draws or random else None,
            path,
        )
        nodes = retrieved(shape, walked.path)
        there = rows(tree.there, nodes)
        x = block.attend(w, queries, q, rows(k, nodes), rows(v, nodes), there)
        every = None
        if whole:
            at = slice(shape.first(shape.depth + 1), None)
            seen = tree.there[:, None, at]
            every = block.attend(w, queries, q, k[:, at], v[:, at], seen)
        return Reading(x, there.sum(-1), every, walked.log_probs, walked.entropy, walked.path)


@register("context_reader", "full")
@dataclass(frozen=True)
class FullReader:
    """Cross attention to every token."""

    n_heads: int | None = None  # heads of attention; None: as many as the model has
    d_ff: int | None = None  # feed-forward width; None: the model's

    def budget(self, tokens: int) -> int:
        """Returns the number of tokens."""
        return tokens

    def init(self, key: jax.Array, model: ModelConfig, tokens: int) -> dict[str, Any]:
        """Returns initial parameters of the attention.

        Raises:
            ConfigError: a shape is impossible.
        """
        return {"cross": CrossAttention.beside(model, self.n_heads, self.d_ff).init(key)}

    def read(
        self,
        model: ModelConfig,
        params: Params,
        queries: Float[Array, "B M D"],
        states: Float[Array, "B N D"],
        mask: Bool[Array, "B N"],
        key: jax.Array,
        *,
        draws: bool = True,
        whole: bool = False,
    ) -> Reading:
        """Returns what queries read of a context; see `ContextReader.read`."""
        del key, draws, whole
        block, w = CrossAttention.beside(model, self.n_heads, self.d_ff), params["cross"]
        q, (k, v) = block.queries(w, queries), block.keys_values(w, states)
        x = block.attend(w, queries, q, k, v, mask[:, None])
        used = jnp.broadcast_to(mask.sum(-1, keepdims=True), queries.shape[:2])
        return Reading(x, used)


@register("context_reader", "latents")
@dataclass(frozen=True)
class LatentReader:
    """Latent vectors that read the context once; queries attend to them alone (Perceiver IO)."""

    latents: int | None = None  # how many; None: as many as a binary tree's query attends to
    among: StackConfig = StackConfig(n_layers=1)  # blocks in which latents attend to each other
    n_heads: int | None = None  # heads of attention; None: as many as the model has
    d_ff: int | None = None  # feed-forward width; None: the model's

    def __post_init__(self):
        if self.latents is not None and self.latents < 1:
            raise ConfigError(f"latents={self.latents} must be at least 1, or None")
        if self.among.d_model is not None:
            raise ConfigError(
                f"among.d_model={self.among.d_model} must be None: latents are as wide as states"
            )

    def budget(self, tokens: int) -> int:
        """Returns the number of latents."""
        return TreeShape(tokens).retrieved if self.latents is None else self.latents

    def init(self, key: jax.Array, model: ModelConfig, tokens: int) -> dict[str, Any]:
        """Returns initial parameters: latents, those that read for them, and that read them.

        Raises:
            ConfigError: a shape is impossible.
        """
        keys = jax.random.split(key, 4)
        block = CrossAttention.beside(model, self.n_heads, self.d_ff)
        size = (self.budget(tokens), model.table_width)
        latents = model.init_scale * jax.random.normal(keys[3], size)
        return {
            "latents": latents.astype(jnp.dtype(model.param_dtype)),
            "collect": block.init(keys[0]),
            "among": init_stack(self.among, model, keys[1]),
            "cross": block.init(keys[2]),
        }

    def read(
        self,
        model: ModelConfig,
        params: Params,
        queries: Float[Array, "B M D"],
        states: Float[Array, "B N D"],
        mask: Bool[Array, "B N"],
        key: jax.Array,
        *,
        draws: bool = True,
        whole: bool = False,
    ) -> Reading:
        """Returns what queries read of a context; see `ContextReader.read`."""
        del key, draws, whole
        block = CrossAttention.beside(model, self.n_heads, self.d_ff)
        size = (states.shape[0], *params["latents"].shape)
        latents = jnp.broadcast_to(params["latents"].astype(states.dtype), size)
        w = params["collect"]
        q, (k, v) = block.queries(w, latents), block.keys_values(w, states)
        latents = block.attend(w, latents, q, k, v, mask[:, None])
        latents = run_stack(self.among, model, params["among"], latents)
        w = params["cross"]
        q, (k, v) = block.queries(w, queries), block.keys_values(w, latents)
        x = block.attend(w, queries, q, k, v, jnp.ones((1, 1, size[1]), bool))
        return Reading(x, jnp.full(queries.shape[:2], size[1], jnp.int32))
