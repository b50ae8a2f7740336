"""The graph: signals along the edges of a text, and the energy with which each candidate answers.

Letters: B rows, L tokens of a row, E edges with parameters of their own, C candidates, N
transitions, d the width of a signal.

Reference: "BriLLM: Brain-inspired Large Language Model", arXiv 2503.11299; where text and code of
the authors differ, see the options.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax import struct
from tokjax.errors import ConfigError, DataError, nearest

Params = Mapping[str, Any]
History = Literal["mix", "latest", "none"]
Start = Literal["scaled", "ones"]
Positions = Literal["divided", "multiplied"]

TABLE = "table"  # the one entry of the parameters that is not trained
_INIT = 0.5  # parameters begin uniform within this of 0
_BASE = 10_000.0
_TINY = 1e-12  # under the root of an energy: at 0 a norm has no gradient
_FLOATS = 1 << 22  # numbers of edge matrices gathered at a time
# 2 GB of float32, of which training needs four times as much.
_MOST_DENSE = 1 << 29


@struct.dataclass
class Memory:
    """The stored signals' weighted sum; weights are relative to the largest so far.

    Attributes:
        total: of weights times signals.
        mass: of weights.
        largest: history weight.
        latest: signal.
    """

    total: Float[Array, "B d"]
    mass: Float[Array, "B"]
    largest: Float[Array, "B"]
    latest: Float[Array, "B d"]


@dataclass(frozen=True)
class BriLLM:
    """A fully connected directed graph of tokens; parameters are always arguments.

    A signal starts at the first token, passes the edges of the text (a matrix, a bias and a
    position code each, then GELU), and the next token is the one at which it arrives with the
    largest energy, its Euclidean norm.

    Attributes:
        vocab_size: nodes.
        width: of the signal.
        max_length: tokens of the longest row.
        history: what enters the next edge: the stored signals mixed by learned weights, the latest
            of them (a control), or always the start (a control: no more than a bigram model).
        start: the first signal before its bias: ones / width, as in the authors' code, or the
            ones of the paper.
        positions: sinusoids whose frequencies fall along the width, as usual, or grow ("multiplied"
            by powers of 10000), as in the authors' code.
    """

    vocab_size: int
    width: int = 32
    max_length: int = 32
    history: History = "mix"
    start: Start = "scaled"
    positions: Positions = "divided"

    def __post_init__(self):
        for name, least in (("vocab_size", 2), ("width", 2), ("max_length", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.width % 2:
            raise ConfigError(f"width={self.width} must be even: sines and cosines come in pairs")
        for name, kind in (("history", History), ("start", Start), ("positions", Positions)):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise ConfigError(f"unknown {name}={value!r}.{nearest(str(value), get_args(kind))}")

    def init(self, key: jax.Array, table: Int[np.ndarray, "V V"] | None = None) -> dict[str, Any]:
        """Returns initial parameters.

        Args:
            key: of the draws.
            table: the edge of each ordered pair of tokens, such as `seen_edges` gives; None has
                one of its own for each.

        Raises:
            ConfigError: a dense graph of this size would not fit; a table of another shape or with
                numbers below 0.
        """
        V, d = self.vocab_size, self.width
        edges = V * V
        if table is not None:
            table = np.asarray(table)
            if table.shape != (V, V) or table.min() < 0:
                raise ConfigError(
                    f"table has shape {table.shape} and least number {table.min()}: it must be "
                    f"({V}, {V}), from 0 on"
                )
            edges = int(table.max()) + 1
        if edges * d * d > _MOST_DENSE:
            raise ConfigError(
                f"{edges:,} edges of {d} x {d} are {edges * d * d:,} parameters, more than "
                f"{_MOST_DENSE:,}: share the edges of unseen pairs (table=seen_edges(...)), or "
                f"take fewer tokens or a smaller width"
            )
        keys = jax.random.split(key, 3)
        uniform = lambda k, *shape: jax.random.uniform(k, shape, minval=-_INIT, maxval=_INIT)  # noqa: E731
        params = {
            "edge_weight": uniform(keys[0], edges, d, d),
            "edge_bias": uniform(keys[1], edges, d),
            "node_bias": uniform(keys[2], V, d),
            "history": jnp.ones(self.max_length),
        }
        return params if table is None else {**params, TABLE: jnp.asarray(table, jnp.int32)}

    def codes(self) -> Float[np.ndarray, "Lmax d"]:
        """Returns the position codes; their arguments may be millions, so float64 computes them."""
        powers = _BASE ** (np.arange(0, self.width, 2) / self.width)
        powers = powers if self.positions == "multiplied" else 1 / powers
        angles = np.arange(self.max_length)[:, None] * powers
        found = np.zeros((self.max_length, self.width))
        found[:, 0::2], found[:, 1::2] = np.sin(angles), np.cos(angles)
        return found.astype(np.float32)

    def code(self, at: Int[Array, "*B"]) -> Float[Array, "*B d"]:
        """Returns the codes of places; those behind the last get the last one's."""
        return jnp.take(jnp.asarray(self.codes()), at, axis=0, mode="clip")

    def edges(self, params: Params, u: Any, v: Any) -> Any:
        """Returns the edges of ordered pairs of tokens."""
        return params[TABLE][u, v] if TABLE in params else u * self.vocab_size + v

    def first(self, params: Params, u: Int[Array, "B"]) -> Float[Array, "B d"]:
        """Returns the signal at the first token."""
        start = jnp.ones(self.width) / (self.width if self.start == "scaled" else 1)
        return _gelu(start + params["node_bias"][u] + self.code(jnp.int32(0)))

    def remember(self, rows: int) -> Memory:
        """Returns the memory without any signal."""
        none = jnp.zeros((rows, self.width))
        return Memory(none, jnp.zeros(rows), jnp.full(rows, -1e30), none)

    def stored(
        self, params: Params, memory: Memory, at: Int[Array, "B"], signal: Float[Array, "B d"]
    ) -> Memory:
        """Returns the memory with the output of the edge of transition `at`."""
        weight = jnp.take(params["history"], at, mode="clip")
        largest = jax.lax.stop_gradient(jnp.maximum(memory.largest, weight))
        kept, new = jnp.exp(memory.largest - largest), jnp.exp(weight - largest)
        total = memory.total * kept[:, None] + signal * new[:, None]
        return Memory(total, memory.mass * kept + new, largest, signal)

    def incoming(
        self,
        params: Params,
        memory: Memory,
        at: Int[Array, "B"],
        first: Float[Array, "B d"],
    ) -> Float[Array, "B d"]:
        """Returns the signal that enters the edges of transition `at`."""
        if self.history == "none":
            start = 1.0 / (self.width if self.start == "scaled" else 1)
            return jnp.full_like(first, start)
        mixed = memory.latest
        if self.history == "mix":
            # At the start there is no mass: what is divided by is then of no account.
            mixed = memory.total / jnp.where(memory.mass > 0, memory.mass, 1.0)[:, None]
        return jnp.where((at == 0)[:, None], first, mixed)

    def signals(self, params: Params, tokens: Int[Array, "B L"]) -> Float[Array, "B N d"]:
        """Returns the signal that enters the edges of each transition, along the text itself."""
        B, L = tokens.shape
        edge = self.edges(params, tokens[:, :-1], tokens[:, 1:]).T
        # All edges of the text at once: gathered within the scan, each step of the backward pass
        # would add up gradients as large as the whole graph.
        weights, biases = params["edge_weight"][edge], params["edge_bias"][edge]
        first = self.first(params, tokens[:, 0])

        def step(memory: Memory, given):
            i, weight, bias = given
            at = jnp.full(B, i)
            x = self.incoming(params, memory, at, first)
            out = _gelu(jnp.einsum("bd,bde->be", x, weight) + bias + self.code(i + 1))
            return self.stored(params, memory, at, out), x

        over = (jnp.arange(L - 1), weights, biases)
        return jax.lax.scan(step, self.remember(B), over)[1].transpose(1, 0, 2)

    def arriving(
        self,
        params: Params,
        x: Float[Array, "N d"],
        u: Int[Array, "N"],
        code: Float[Array, "N d"],
        candidates: Int[Array, "N C"] | None = None,
    ) -> Float[Array, "N C"]:
        """Returns the energies with which a signal arrives at candidates.

        Args:
            params: of the graph.
            x: signals.
            u: nodes that they leave.
            code: position codes.
            candidates: nodes; None is all of them.
        """
        V, d = self.vocab_size, self.width
        dense = TABLE not in params and candidates is None
        if dense:
            weight = params["edge_weight"].reshape(V, V, d, d)
            bias = params["edge_bias"].reshape(V, V, d)

        def some(x, u, code, candidates):
            if dense:
                own, added = weight[u], bias[u]
            else:
                every = jnp.arange(V)[None] if candidates is None else candidates
                edge = self.edges(params, u[:, None], every)
                own, added = params["edge_weight"][edge], params["edge_bias"][edge]
            z = _gelu(jnp.einsum("nd,ncde->nce", x, own) + added + code[:, None])
            return jnp.sqrt(jnp.square(z).sum(-1) + _TINY)

        N, C = len(x), V if candidates is None else candidates.shape[1]
        size = max(1, _FLOATS // (C * d * d))
        if size >= N:
            return some(x, u, code, candidates)
        parts = -(-N // size)

        def cut(a: jax.Array) -> jax.Array:
            filled = jnp.pad(a, [(0, parts * size - N), (0, 0)][: a.ndim])
            return filled.reshape(parts, size, *a.shape[1:])

        # The backward pass gathers the matrices again instead of keeping those of all parts.
        given = jax.tree.map(cut, (x, u, code, candidates))
        found = jax.lax.map(lambda part: jax.checkpoint(some)(*part), given)
        return found.reshape(parts * size, C)[:N]

    def energies(
        self,
        params: Params,
        tokens: Int[Array, "B L"],
        candidates: Int[Array, "B N C"] | None = None,
    ) -> Float[Array, "B N C"]:
        """Returns the energies of candidates for the token behind each but the last.

        They are the logits of the model's distribution. A token may follow itself.

        Args:
            params: of the graph.
            tokens: rows of text; the true tokens lead the signal.
            candidates: ids; None is all of them, in order.

        Raises:
            ConfigError: rows of fewer than 2 tokens or more than `max_length`.
        """
        B, L = tokens.shape
        self.check_length(L)
        x = self.signals(params, tokens).reshape(B * (L - 1), -1)
        code = jnp.tile(self.code(jnp.arange(1, L)), (B, 1))
        if candidates is not None:
            candidates = candidates.reshape(B * (L - 1), -1)
        found = self.arriving(params, x, tokens[:, :-1].reshape(-1), code, candidates)
        return found.reshape(B, L - 1, -1)

    def nll(self, params: Params, tokens: Int[Array, "B L"]) -> Float[Array, "B N"]:
        """Returns the negative log-probability of each token but the first, among all tokens.

        Raises:
            ConfigError: as `energies`.
        """
        logp = jax.nn.log_softmax(self.energies(params, tokens))
        return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]

    def check_length(self, length: int) -> None:
        """Refuses rows without a transition, or too long for the position codes.

        Raises:
            ConfigError: there are fewer than 2 tokens or more than `max_length`.
        """
        if not 2 <= length <= self.max_length:
            raise ConfigError(
                f"rows of {length} tokens: a transition needs 2, and the graph was made for "
                f"max_length={self.max_length}"
            )

    def check_tokens(self, tokens: Int[np.ndarray, "*N"]) -> None:
        """Refuses ids that are no nodes.

        Raises:
            DataError: there is such an id.
        """
        tokens = np.asarray(tokens)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise DataError(
                f"ids from {tokens.min()} to {tokens.max()} do not lie within 0 to "
                f"{self.vocab_size - 1}, the graph's nodes"
            )


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def parameter_count(model: BriLLM, edges: int | None = None) -> int:
    """Returns the number of trained parameters; the text's length adds one scalar a token.

    >>> parameter_count(BriLLM(4000, width=32, max_length=32))
    16896128032

    Args:
        model: the graph.
        edges: those with parameters of their own; None is all ordered pairs.
    """
    V, d = model.vocab_size, model.width
    return model.max_length + V * d + (V * V if edges is None else edges) * (d * d + d)
