"""What can be computed exactly: balanced policies, and a model's distribution over a catalogue."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.decoding.constrained.trie import TokenTrie, TrieArrays, walk
from tokjax.decoding.prompts import bucket
from tokjax.gflownet.path_rewards import FLOOR
from tokjax.models.transformer import Transformer


def flow_policy(trie: TokenTrie, vocab_size: int, floor: float = FLOOR) -> Float[np.ndarray, "N V"]:
    """Returns the log-probabilities of the policy whose flows balance, in float64.

    Ending in a node that is no item has the reward of its flow times exp(floor), so the policy
    ends there with a tiny probability; off the tree it never goes.

    Args:
        trie: of the catalogue.
        vocab_size: V.
        floor: as in `path_rewards`.
    """
    trie.check(vocab_size)
    table = np.full((trie.nodes, vocab_size), -np.inf)
    reached = np.log(trie.flow / trie.flow[0])
    total = np.full(trie.nodes, -np.inf)  # of all rewards in a node and behind it
    for node in range(trie.nodes - 2, -1, -1):  # children come behind their parents
        part = slice(trie.begin[node], trie.begin[node + 1])
        tokens, child = trie.tokens[part], trie.child[part]
        table[node, tokens] = total[child]
        own = trie.log_edge[part][tokens == trie.end]
        table[node, trie.end] = reached[node] + (own[0] if own.size else floor)
        total[node] = np.logaddexp.reduce(table[node])
        table[node] -= total[node]
    return table


def item_logprobs(
    model: Transformer,
    params: Any,
    prompt: tuple[int, ...],
    trie: TokenTrie,
    *,
    rows: int = 128,
    within: bool = True,
) -> Float[np.ndarray, "I"]:
    """Returns the log-probability of each item behind a prompt, its end token included.

    Costs a pass over every item.

    Args:
        model: the policy.
        params: its parameters.
        prompt: ids, at least one.
        trie: of the catalogue.
        rows: items of a pass.
        within: of the policy that draws within the tree (its probabilities sum to 1 over the
            catalogue); else of the policy as it is.
    """
    P, length = len(prompt), bucket(len(prompt) + trie.longest)
    tokens = np.full((len(trie.items), length + 1), trie.end, np.int32)
    lengths = np.array([len(item) + 1 for item in trie.items], np.int32)
    for i, item in enumerate(trie.items):
        tokens[i, : P + len(item)] = (*prompt, *item)
    arrays = trie.arrays(model.config.vocabulary)
    found = []
    for first in range(0, len(tokens), rows):
        place = np.minimum(np.arange(first, first + rows), len(tokens) - 1)
        part = _item_logprobs(model, within, params, arrays, tokens[place], lengths[place], P)
        found.append(np.asarray(part))
    return np.concatenate(found)[: len(tokens)].astype(np.float64)


@partial(jax.jit, static_argnums=(0, 1))
def _item_logprobs(
    model: Transformer,
    within: bool,
    params: Any,
    trie: TrieArrays,
    tokens: Int[Array, "R T1"],
    lengths: Int[Array, "R"],
    prompt: Int[Array, ""],
) -> Float[Array, "R"]:
    x = model.backbone(params, model.embed(params, tokens[:, :-1])).x
    at = jnp.minimum(prompt + jnp.arange(tokens.shape[1] - 1), tokens.shape[1] - 1)
    actions = tokens[:, at]
    states = x[:, jnp.minimum(at - 1, x.shape[1] - 1)]
    logits = model.unembed(params, states).astype(jnp.float32)
    if within:
        nodes, _ = walk(trie, actions)
        allowed = trie.allowed(nodes[:, :-1], logits.shape[-1])
        # Behind an item nothing is allowed: of no account.
        logits = jnp.where(allowed | ~allowed.any(-1, keepdims=True), logits, -jnp.inf)
    logp = jax.nn.log_softmax(logits, axis=-1)
    logp = jnp.take_along_axis(logp, actions[..., None], axis=-1)[..., 0]
    counted = jnp.arange(actions.shape[1]) < lengths[:, None]
    return jnp.where(counted, logp, 0.0).sum(1)
