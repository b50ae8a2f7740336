"""Rewards of token paths through a catalogue's tree, in every state.

Reference: "Process-Supervised LLM Recommenders via Flow-guided Tuning", arXiv 2503.07377.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.decoding.constrained.trie import TrieArrays, walk
from tokjax.gflownet.balance import action_mask

FLOOR = -15.0  # log-reward of what is no item, and of every edge that is not in the tree


@struct.dataclass
class PathRewards:
    """What the tree says of each state of a path.

    Attributes:
        log_r: log of the reward of ending in the state; 0 behind the path's end.
        states: which states there are, those within an action of several tokens left out.
        nodes: of the tree; -1 off it.
        item: the item that the path is, -1 where it is none.
    """

    log_r: Float[Array, "B L"]
    states: Bool[Array, "B L"]
    nodes: Int[Array, "B L"]
    item: Int[Array, "B"]


def ending(trie: TrieArrays, tokens: Int[Array, "B L"]) -> Int[Array, "B"]:
    """Returns the item that each path is, -1 where it is none; see `path_rewards`."""
    nodes, _ = walk(trie, tokens)
    last = jnp.argmax(tokens == trie.end, axis=1)
    node = jnp.take_along_axis(nodes, last[:, None], axis=1)[:, 0]
    ended = (tokens == trie.end).any(1) & (node >= 0)
    return jnp.where(ended, trie.item[jnp.maximum(node, 0)], -1)


def path_rewards(
    trie: TrieArrays,
    tokens: Int[Array, "B L"],
    *,
    floor: float = FLOOR,
    compat: bool = False,
    granularity: int = 1,
    divisor: Float[Array, "B"] | float = 1.0,
    bonus: Float[Array, "B"] | float = 0.0,
) -> PathRewards:
    """Returns the rewards of paths.

    A state has the sum of the edges up to it and of its own end edge; where it is no item, `floor`
    instead of the end edge; and every edge off the tree counts `floor`.

    Args:
        trie: of the catalogue.
        tokens: of each path, an end token behind its last one, and end tokens from there on.
        floor: log-reward of what is not in the tree.
        compat: give a state that is an item its own reward only where the path ends there, and
            `floor` elsewhere, as the authors' code does. The reward of "Alien" then depends on
            whether the path goes on to "Alien 3", and no policy balances the flow. Default: the
            reward is a function of the state.
        granularity: tokens of one action; what is between actions is no state. An action that
            leaves the tree, and a state that is no item, count floor x granularity.
        divisor: the logs of all edges of a path are divided by it (the variant div_s); `floor` is
            not.
        bonus: added to the logs of all edges in the tree (the variant add_logs).
    """
    states = action_mask(tokens, trie.end, offset=1)
    moves = action_mask(tokens, trie.end)
    nodes, logs = walk(trie, tokens)
    nodes, on = nodes[:, :-1], jnp.isfinite(logs)
    by_row = lambda a: a[:, None] if jnp.ndim(a) else a  # noqa: E731
    of_edges = lambda a: a / by_row(divisor) + by_row(bonus)  # noqa: E731
    edges = jnp.where(on, of_edges(jnp.where(on, logs, 0.0)), floor)
    edges = jnp.where(moves, edges, 0.0)
    ends = tokens == trie.end
    if granularity > 1:
        edges = _by_action(edges, moves, on, floor, granularity)
        states &= (jnp.arange(tokens.shape[1]) % granularity == 0) | ends
    before = jnp.cumsum(edges, axis=1) - edges
    _, log_end = trie.step(nodes, jnp.broadcast_to(trie.end, nodes.shape))
    is_item = jnp.isfinite(log_end)
    if compat:
        is_item &= ends
    own = of_edges(jnp.where(is_item, log_end, 0.0))
    log_r = before + jnp.where(is_item, own, floor * granularity)
    log_r = jnp.where(states, log_r, 0.0)
    return PathRewards(jax.lax.stop_gradient(log_r), states, nodes, ending(trie, tokens))


def _by_action(
    edges: Array, moves: Array, on: Array, floor: float, size: int
) -> Float[Array, "B L"]:
    """Returns the edges such that those of an action off the tree add up to floor x size."""
    B, L = edges.shape
    fill = [(0, 0), (0, -L % size)]
    split = lambda a: jnp.pad(a, fill).reshape(B, -1, size)  # noqa: E731
    off = (split(moves) & ~split(on)).any(-1, keepdims=True)
    count = split(moves).sum(-1, keepdims=True)
    spread = jnp.where(split(moves), floor * size / jnp.maximum(count, 1), 0.0)
    return jnp.where(off, spread, split(edges)).reshape(B, -1)[:, :L]


def personal_divisors(p: Float[np.ndarray, "*U I"]) -> Float[np.ndarray, "*U I"]:
    """Returns s = (p - mean p) / (max p - min p) + 1 of each item, for the variant div_s.

    An item that the user likes above average has s > 1, and its reward R^(1/s) grows. Where all
    items are liked alike, s is 1.

    Args:
        p: how likely a user takes each item.

    >>> personal_divisors(np.array([0.5, 0.3, 0.15, 0.05])).round(4).tolist()
    [1.5556, 1.1111, 0.7778, 0.5556]
    """
    p = np.asarray(p, np.float64)
    span = p.max(-1, keepdims=True) - p.min(-1, keepdims=True)
    flat = span == 0
    return (p - p.mean(-1, keepdims=True)) / np.where(flat, 1.0, span) + 1.0


def personal_bonuses(p: Float[np.ndarray, "*U I"], strength: float = 1.0) -> np.ndarray:
    """Returns strength x log(minmax(p) + 1e-20) of each item, for the variant add_logs.

    Args:
        p: how likely a user takes each item.
        strength: S. How large it should be is not published in the code's defaults.
    """
    p = np.asarray(p, np.float64)
    low, high = p.min(-1, keepdims=True), p.max(-1, keepdims=True)
    flat = high == low
    scaled = np.where(flat, 1.0, (p - low) / np.where(flat, 1.0, high - low))
    return strength * np.log(scaled + 1e-20)
