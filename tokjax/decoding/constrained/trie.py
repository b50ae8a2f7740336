"""A catalogue of token sequences as a tree of prefixes, through which its weights flow.

The flow of a prefix is the sum of the weights of the items that begin with it; an edge has the
logarithm of the child's flow over the parent's. Along an item the edges, the last one by the end
token included, add up to the logarithm of its share of all weight.

Reference: "Process-Supervised LLM Recommenders via Flow-guided Tuning", arXiv 2503.07377.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.errors import ConfigError, DataError

NOWHERE = -1
Form = Literal["auto", "dense", "compact"]
_DENSE_ENTRIES = 2**22  # nodes x ids up to which the dense form is chosen


@struct.dataclass
class DenseTrie:
    """The tree as a row for each node; the last node is the one behind every end token.

    Attributes:
        child: the node behind each token, -1 where there is none.
        log_edge: log of the child's flow over the node's, -inf where there is none.
        item: the item that ends in a node, -1 where none does.
        end: id of the end token.
    """

    child: Int[Array, "N V"]
    log_edge: Float[Array, "N V"]
    item: Int[Array, "N"]
    end: Int[Array, ""]

    def step(
        self, nodes: Int[Array, "*B"], tokens: Int[Array, "*B"]
    ) -> tuple[Int[Array, "*B"], Float[Array, "*B"]]:
        """Returns the nodes behind tokens and the logs of the edges: -1 and -inf off the tree."""
        known = (nodes >= 0) & (tokens >= 0) & (tokens < self.child.shape[1])
        at = (jnp.where(known, nodes, 0), jnp.where(known, tokens, 0))
        child = jnp.where(known, self.child[at], NOWHERE)
        return child, jnp.where(known, self.log_edge[at], -jnp.inf)

    def allowed(self, nodes: Int[Array, "*B"], size: int) -> Bool[Array, "*B V"]:
        """Returns which of `size` ids lead on from each node: none from -1."""
        rows = self.child[jnp.maximum(nodes, 0)] != NOWHERE
        more = [(0, 0)] * (rows.ndim - 1) + [(0, size - rows.shape[-1])]
        return jnp.pad(rows, more) & (nodes >= 0)[..., None]


@struct.dataclass
class CompactTrie:
    """The tree as a sorted list of edges, for large vocabularies; see `DenseTrie`.

    Attributes:
        begin: the first edge of each node, and behind the last one their number.
        tokens: of each edge, rising within a node.
        child: the node behind each edge.
        log_edge: log of the child's flow over the node's.
        item: the item that ends in a node, -1 where none does.
        end: id of the end token.
        width: most edges of a node.
    """

    begin: Int[Array, "N1"]
    tokens: Int[Array, "E"]
    child: Int[Array, "E"]
    log_edge: Float[Array, "E"]
    item: Int[Array, "N"]
    end: Int[Array, ""]
    width: int = struct.field(pytree_node=False)

    def step(
        self, nodes: Int[Array, "*B"], tokens: Int[Array, "*B"]
    ) -> tuple[Int[Array, "*B"], Float[Array, "*B"]]:
        """Returns the nodes behind tokens and the logs of the edges: -1 and -inf off the tree."""
        inside = jnp.maximum(nodes, 0)
        low, stop = self.begin[inside], self.begin[inside + 1]
        high, last = stop, self.tokens.shape[0] - 1
        for _ in range(self.width.bit_length()):
            middle = (low + high) // 2
            below = (low < high) & (self.tokens[jnp.minimum(middle, last)] < tokens)
            low, high = jnp.where(below, middle + 1, low), jnp.where(below, high, middle)
        at = jnp.minimum(low, last)
        found = (nodes >= 0) & (low < stop) & (self.tokens[at] == tokens)
        return jnp.where(found, self.child[at], NOWHERE), jnp.where(
            found, self.log_edge[at], -jnp.inf
        )

    def children(self, nodes: Int[Array, "*B"]) -> tuple[Int[Array, "*B W"], Int[Array, "*B W"]]:
        """Returns tokens and nodes behind each node; -1 where it has fewer than the width."""
        inside = jnp.maximum(nodes, 0)[..., None]
        places = self.begin[inside] + jnp.arange(self.width)
        exists = (places < self.begin[inside + 1]) & (nodes >= 0)[..., None]
        places = jnp.minimum(places, self.tokens.shape[0] - 1)
        of = lambda a: jnp.where(exists, a[places], NOWHERE)  # noqa: E731
        return of(self.tokens), of(self.child)

    def allowed(self, nodes: Int[Array, "*B"], size: int) -> Bool[Array, "*B V"]:
        """Returns which of `size` ids lead on from each node: none from -1."""
        return as_mask(self.children(nodes)[0], size)


TrieArrays = DenseTrie | CompactTrie


@dataclass(frozen=True, eq=False)
class TokenTrie:
    """A catalogue as a tree; node 0 is the empty prefix. E edges, N nodes, I items.

    Attributes:
        items: ids of each item, without the end token.
        weights: of each item.
        end: id of the token that ends an item.
        begin: the first edge of each node, and behind the last one E.
        tokens: of each edge; those of a node are neighbours, and rise.
        child: the node behind each edge; the last node is behind every end token.
        log_edge: log of the child's flow over the node's, in float64.
        flow: of each node: the weight of the items that begin so; the last node has all of it.
        item: which item ends in each node, -1 where none does.
    """

    items: tuple[tuple[int, ...], ...]
    weights: Float[np.ndarray, "I"]
    end: int
    begin: Int[np.ndarray, "N1"]
    tokens: Int[np.ndarray, "E"]
    child: Int[np.ndarray, "E"]
    log_edge: Float[np.ndarray, "E"]
    flow: Float[np.ndarray, "N"]
    item: Int[np.ndarray, "N"]

    @classmethod
    def of(
        cls, items: Sequence[Sequence[int]], weights: Sequence[float] | np.ndarray, end: int
    ) -> "TokenTrie":
        """Returns the tree of a catalogue.

        Args:
            items: ids of each, without the end token; one may begin like another or be all of it
                with more behind.
            weights: of each, above 0: counts, or any power of them.
            end: id of the token that ends an item; no item holds it.

        Raises:
            DataError: there is no item, one is empty, holds the end token or occurs twice, or a
                weight is not a positive number.
        """
        told = tuple(tuple(int(t) for t in item) for item in items)
        given = np.asarray(weights, np.float64)
        _check(told, given, end)
        children: list[dict[int, int]] = [{}]
        flow, ends = [0.0], [NOWHERE]
        for i, (item, weight) in enumerate(zip(told, given.tolist(), strict=True)):
            node = 0
            flow[0] += weight
            for token in item:
                if token not in children[node]:
                    children[node][token] = len(children)
                    children.append({})
                    flow.append(0.0)
                    ends.append(NOWHERE)
                node = children[node][token]
                flow[node] += weight
            if ends[node] != NOWHERE:
                raise DataError(
                    f"items {ends[node]} and {i} of the catalogue are the same tokens: make them "
                    f"one item with the sum of their weights"
                )
            ends[node] = i
        return cls._from(told, given, end, children, flow, ends)

    @classmethod
    def _from(cls, items, weights, end, children, flow, ends) -> "TokenTrie":
        last = len(children)
        begin, tokens, child, share = [0], [], [], []
        for node, own in enumerate(children):
            edges = {**own, end: last} if ends[node] != NOWHERE else own
            for token in sorted(edges):
                tokens.append(token)
                child.append(edges[token])
                through = weights[ends[node]] if token == end else flow[edges[token]]
                share.append(through / flow[node])
            begin.append(len(tokens))
        return cls(
            items=items,
            weights=weights,
            end=int(end),
            begin=np.array([*begin, len(tokens)], np.int32),
            tokens=np.array(tokens, np.int32),
            child=np.array(child, np.int32),
            log_edge=np.log(np.array(share)),
            flow=np.array([*flow, flow[0]]),
            item=np.array([*ends, NOWHERE], np.int32),
        )

    def __repr__(self) -> str:
        return f"TokenTrie({len(self.items)} items, {self.nodes} nodes, end={self.end})"

    @property
    def nodes(self) -> int:
        """N, the one behind the end tokens included."""
        return len(self.item)

    @property
    def longest(self) -> int:
        """Tokens of the longest item, without the end token."""
        return max(map(len, self.items))

    @property
    def shares(self) -> Float[np.ndarray, "I"]:
        """Each item's weight over that of all."""
        return self.weights / self.weights.sum()

    @cached_property
    def index(self) -> dict[tuple[int, ...], int]:
        """The number of each item by its tokens."""
        return {item: i for i, item in enumerate(self.items)}

    def edges(self, prefix: Sequence[int] = ()) -> dict[int, float]:
        """Returns the log of each edge behind a prefix by its token; {} off the tree."""
        node = 0
        for token in prefix:
            part = slice(self.begin[node], self.begin[node + 1])
            at = np.searchsorted(self.tokens[part], token)
            if at == len(self.tokens[part]) or self.tokens[part][at] != token:
                return {}
            node = int(self.child[part][at])
        part = slice(self.begin[node], self.begin[node + 1])
        return dict(zip(self.tokens[part].tolist(), self.log_edge[part].tolist(), strict=True))

    def item_of(self, tokens: Sequence[int]) -> int:
        """Returns the number of the item that tokens are, their end token included; -1: none."""
        ended = len(tokens) > 0 and tokens[-1] == self.end
        return self.index.get(tuple(tokens[:-1]), NOWHERE) if ended else NOWHERE

    def arrays(self, vocab_size: int, form: Form = "auto") -> Any:
        """Returns the tree for compiled functions; both forms give the same answers.

        Args:
            vocab_size: of the model.
            form: "dense" holds N x V numbers twice, "compact" finds an edge by bisection; "auto"
                chooses by that size.

        Raises:
            ConfigError: an item's id is not in the vocabulary, or the form is unknown.
        """
        self.check(vocab_size)
        if form not in ("auto", "dense", "compact"):
            raise ConfigError(f"unknown form={form!r} of a trie: dense, compact or auto")
        if form == "auto":
            form = "dense" if self.nodes * vocab_size <= _DENSE_ENTRIES else "compact"
        log_edge, item = self.log_edge.astype(np.float32), jnp.asarray(self.item)
        if form == "compact":
            return CompactTrie(
                begin=jnp.asarray(self.begin),
                tokens=jnp.asarray(self.tokens),
                child=jnp.asarray(self.child),
                log_edge=jnp.asarray(log_edge),
                item=item,
                end=jnp.int32(self.end),
                width=int(np.diff(self.begin).max()),
            )
        child = np.full((self.nodes, vocab_size), NOWHERE, np.int32)
        logs = np.full(child.shape, -np.inf, np.float32)
        source = np.repeat(np.arange(self.nodes), np.diff(self.begin))
        child[source, self.tokens], logs[source, self.tokens] = self.child, log_edge
        return DenseTrie(jnp.asarray(child), jnp.asarray(logs), item, jnp.int32(self.end))

    def check(self, vocab_size: int) -> None:
        """Raises ConfigError where an id is not in a vocabulary of this size."""
        largest = int(self.tokens.max())
        if largest >= vocab_size:
            raise ConfigError(
                f"the catalogue has id {largest}, the model's are 0 to {vocab_size - 1}: was it "
                f"made with another tokenizer?"
            )


def as_mask(tokens: Int[Array, "*B W"], size: int) -> Bool[Array, "*B V"]:
    """Returns which of `size` ids are among the tokens; -1 is none."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    places = jnp.where(flat < 0, size, flat)  # beyond the vocabulary: dropped
    rows = jnp.arange(flat.shape[0])[:, None]
    mask = jnp.zeros((flat.shape[0], size), bool).at[rows, places].set(True, mode="drop")
    return mask.reshape(*tokens.shape[:-1], size)


def walk(trie: TrieArrays, tokens: Int[Array, "B L"]) -> tuple[Array, Array]:
    """Returns the nodes [B L+1] before and behind each token, and the edges' logs [B L].

    Off the tree nodes are -1 and logs -inf, as behind the end token, from which nothing leads on.
    """

    def step(nodes: Array, token: Array) -> tuple[Array, tuple[Array, Array]]:
        behind, log_edge = trie.step(nodes, token)
        return behind, (behind, log_edge)

    first = jnp.zeros(tokens.shape[0], jnp.int32)
    _, (nodes, logs) = jax.lax.scan(step, first, tokens.T)
    return jnp.concatenate([first[None], nodes]).T, logs.T


def _check(items: tuple[tuple[int, ...], ...], weights: np.ndarray, end: int) -> None:
    if not items:
        raise DataError("the catalogue is empty: a trie needs at least one item")
    if weights.shape != (len(items),):
        raise DataError(f"there are {weights.size} weights for {len(items)} items")
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights > 0)))
    if wrong.size:
        raise DataError(
            f"item {wrong[0]} of the catalogue has weight {weights[wrong[0]]}: weights are above "
            f"0; leave items out that should not be recommended"
        )
    for i, item in enumerate(items):
        if not item:
            raise DataError(f"item {i} of the catalogue has no tokens")
        if end in item:
            raise DataError(f"item {i} of the catalogue holds the end token {end}")
        if min(item) < 0:
            raise DataError(f"item {i} of the catalogue has the negative id {min(item)}")
