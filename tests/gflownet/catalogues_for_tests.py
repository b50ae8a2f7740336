"""Small catalogues and the policies that balance their flows."""

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.decoding.constrained.trie import TokenTrie

END = 0
ITEMS = ((1, 2), (1, 3), (4,), (1,))  # one begins like two others
WEIGHTS = (6.0, 3.0, 1.0, 2.0)


def example() -> TokenTrie:
    return TokenTrie.of(ITEMS, WEIGHTS, END)


def drawn(seed: int, items: int = 40, symbols: int = 6, longest: int = 5) -> TokenTrie:
    """A random catalogue over ids 1, 2, ..., many of its items beginning alike."""
    rng = np.random.default_rng(seed)
    found = {}
    while len(found) < items:
        item = tuple(rng.integers(1, symbols + 1, rng.integers(1, longest + 1)).tolist())
        found.setdefault(item, float(rng.integers(1, 20)))
    return TokenTrie.of(list(found), list(found.values()), END)


def padded(paths, length: int):
    """Paths with their end tokens, and end tokens from there on."""
    return jnp.array([[*path, *[END] * (length - len(path))] for path in paths])


def along(table: np.ndarray, nodes, tokens):
    """log_pf and log_pterm of paths under a table of log-probabilities."""
    nodes, tokens = np.asarray(nodes), np.asarray(tokens)
    inside = np.maximum(nodes, 0)
    return jnp.asarray(table[inside, tokens]), jnp.asarray(table[inside, END])


def uniform(shape, vocab: int):
    return jnp.full(shape, -np.log(vocab))


double = jax.enable_x64
