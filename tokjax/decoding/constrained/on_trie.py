"""Decoding within a catalogue: samples and beams that are items, and nothing else."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.decoding.constrained import Automaton, constrained
from tokjax.decoding.constrained.byte_automaton import distinct_columns
from tokjax.decoding.constrained.trie import NOWHERE, CompactTrie, Form, TokenTrie, as_mask
from tokjax.decoding.context import Context
from tokjax.decoding.prompts import Prompts
from tokjax.decoding.search.beam import beam_search
from tokjax.decoding.search.hypotheses import LengthPenalty, gnmt
from tokjax.decoding.stops import on_tokens
from tokjax.decoding.transforms.base import Transform, chain
from tokjax.errors import ConfigError

_TABLE_ENTRIES = 2**24  # nodes x different tokens up to which an automaton's table is made


def heights(trie: TokenTrie) -> Int[np.ndarray, "N"]:
    """Returns the least number of tokens from each node to the end of an item, its end included."""
    found = np.zeros(trie.nodes, np.int32)
    for node in range(trie.nodes - 2, -1, -1):  # children come behind their parents
        part = slice(trie.begin[node], trie.begin[node + 1])
        found[node] = 1 + found[trie.child[part]].min()
    return found


def automaton(trie: TokenTrie, vocab_size: int) -> Automaton:
    """Returns the automaton that allows exactly the items, each with its end token.

    Args:
        trie: of the catalogue.
        vocab_size: of the model.

    Raises:
        ConfigError: an item's id is not in the vocabulary.
    """
    trie.check(vocab_size)
    used, column = np.unique(trie.tokens, return_inverse=True)
    table = np.full((trie.nodes, len(used)), NOWHERE, np.int32)
    table[np.repeat(np.arange(trie.nodes), np.diff(trie.begin)), column] = trie.child
    which, columns = distinct_columns(table)
    classes = np.zeros(vocab_size, np.int32)
    classes[used] = which
    return Automaton(
        name=f"catalogue of {len(trie.items)} items",
        classes=classes,
        next=columns,
        distance=heights(trie),
        complete=np.arange(trie.nodes) == trie.nodes - 1,
    )


@struct.dataclass
class _OnTrie:
    """The transform over a compact tree; its state is the node that each row is in."""

    trie: CompactTrie
    heights: Any  # [N]
    finish: bool = struct.field(pytree_node=False)
    vocab_size: int = struct.field(pytree_node=False)

    def check(self, prompts: Prompts, limits: np.ndarray, vocab_size: int) -> None:
        if vocab_size < self.vocab_size:
            raise ConfigError(
                f"the catalogue is made for {self.vocab_size} token ids, the model has "
                f"{vocab_size}: was it made with another tokenizer?"
            )
        least = int(np.asarray(self.heights)[0])
        if np.min(limits) < least:
            raise ConfigError(
                f"the shortest item of the catalogue has {least} tokens, its end included: raise "
                f"max_new_tokens={np.min(limits)}"
            )

    def init(self, prompts: Prompts, vocab_size: int) -> Int[Array, "B"]:
        return jnp.zeros(prompts.tokens.shape[0], jnp.int32)

    def update(
        self, logits: Float[Array, "B V"], state: Int[Array, "B"], context: Context
    ) -> tuple[Float[Array, "B V"], Int[Array, "B"]]:
        state = jnp.where(context.step > 0, self._behind(state, context), state)
        tokens, child = self.trie.children(state)
        if self.finish and context.limits is not None:
            left = context.limits - context.step - 1
            late = jnp.asarray(self.heights)[jnp.maximum(child, 0)] > left[:, None]
            tokens = jnp.where(late, NOWHERE, tokens)
        allowed = as_mask(tokens, logits.shape[-1])
        masked = jnp.where(allowed, logits, -jnp.inf)
        lost = jnp.isneginf(masked).all(-1, keepdims=True)
        return jnp.where(allowed & lost, 0.0, masked), state

    def ends(self, state: Int[Array, "B"], context: Context) -> Bool[Array, "B"]:
        return self._behind(state, context) == self.heights.shape[0] - 1

    def _behind(self, state: Int[Array, "B"], context: Context) -> Int[Array, "B"]:
        behind = self.trie.step(state, context.last)[0]
        return jnp.where(behind == NOWHERE, state, behind)  # rows that are done: of no meaning


def on_trie(
    trie: TokenTrie, vocab_size: int, *, finish: bool = True, form: Form = "auto"
) -> Transform:
    """Returns the exclusion of every token that leads out of a catalogue.

    A row ends behind the end token of its item. What remains is renormalised token by token:
    samples follow the policy within the tree, from which mass that leaks off it is missing (see
    `tokjax.gflownet.flow`).

    Args:
        trie: of the catalogue.
        vocab_size: of the model.
        finish: exclude also what could not be completed within `max_new_tokens`; else rows may be
            cut off.
        form: "dense" is `tokjax.decoding.constrained` with the tree as an automaton; "compact"
            keeps the edges alone, for catalogues whose table would be too large; "auto" chooses.

    Raises:
        ConfigError: an item's id is not in the vocabulary. In `decode`: no item is short enough.
    """
    if form == "auto":
        small = trie.nodes * len(np.unique(trie.tokens)) <= _TABLE_ENTRIES
        form = "dense" if small else "compact"
    if form == "dense":
        return constrained(automaton(trie, vocab_size), finish=finish)
    arrays = trie.arrays(vocab_size, form)
    return _OnTrie(arrays, jnp.asarray(heights(trie)), finish, vocab_size)


@dataclass(frozen=True)
class Recommended:
    """The best items for each prompt, best first.

    Attributes:
        items: numbers in the catalogue; -1 where there are fewer than K.
        scores: what they are ranked by; -inf there.
    """

    items: Int[np.ndarray, "B K"]
    scores: Float[np.ndarray, "B K"]


def recommend(
    model: Any,
    params: Any,
    prompts: Prompts,
    trie: TokenTrie,
    *,
    k: int = 10,
    beams: int | None = None,
    length_penalty: LengthPenalty | None = None,
    transform: Transform | None = None,
) -> Recommended:
    """Returns the items of largest probability that a beam search within the catalogue finds.

    Args:
        model: a `Transformer` or any `Predictor`.
        params: its parameters.
        prompts: of the users.
        trie: of the catalogue.
        k: items for each prompt.
        beams: default k.
        length_penalty: default none: items are ranked by their log-probability under the model,
            over its whole vocabulary.
        transform: of the logits besides, for example `sequence_bias`.

    Raises:
        ConfigError: what `beam_search` and `on_trie` refuse.
    """
    size = model.vocab_size if hasattr(model, "vocab_size") else model.config.vocabulary
    steps = [on_trie(trie, size)] + ([] if transform is None else [transform])
    found = beam_search(
        model,
        params,
        prompts,
        max_new_tokens=trie.longest + 1,
        beams=k if beams is None else beams,
        num_return=k,
        length_penalty=gnmt(0.0) if length_penalty is None else length_penalty,
        transform=chain(*steps),
        stop=on_tokens([trie.end]),
    )
    items = [[trie.item_of(tokens) for tokens in row] for row in found.rows()]
    scores = np.array(found.scores)
    items = np.array(items, np.int64)
    return Recommended(items, np.where(items < 0, -np.inf, scores))
