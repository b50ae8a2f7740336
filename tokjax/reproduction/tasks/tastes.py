"""A made-up catalogue whose meaning says nothing about taste: clusters, and chains between groups.

Reference: the small setting of "DiscRec: Disentangled Semantic-Collaborative Modeling for
Generative Recommendation", arXiv 2506.15576.
"""

import numpy as np
from jaxtyping import Float, Int


def embeddings(seed: int, items: int, width: int = 32) -> Float[np.ndarray, "I E"]:
    """Returns embeddings of items in clusters of clusters."""
    rng = np.random.default_rng([seed, 1])
    coarse, fine = rng.normal(size=(12, width)), rng.normal(size=(60, width))
    of_coarse = rng.integers(0, len(coarse), items)
    of_fine = of_coarse * 5 + rng.integers(0, 5, items)
    noise = rng.normal(size=(items, width))
    return (coarse[of_coarse] + 0.6 * fine[of_fine] + 0.3 * noise).astype(np.float32)


def groups(seed: int, items: int, count: int) -> Int[np.ndarray, "I"]:
    """Returns the taste group of each item, drawn without a look at its meaning; all are alike."""
    return np.random.default_rng([seed, 2]).permutation(np.arange(items) % count)


def sequences(
    seed: int, users: int, length: int, items: int, count: int, faithful: float = 0.8
) -> list[list[int]]:
    """Returns what users took: each group has one that follows it, within which items are alike.

    Args:
        seed: of everything.
        users: how many.
        length: items of each.
        items: of the catalogue.
        count: of groups.
        faithful: probability of the group that follows; else any.
    """
    own = groups(seed, items, count)
    members = [np.flatnonzero(own == g) for g in range(count)]
    rng = np.random.default_rng([seed, 3])
    order = rng.permutation(count)  # a cycle: each group is followed by the next in this order
    follows = np.empty(count, int)
    follows[order] = np.roll(order, -1)
    found = []
    for _ in range(users):
        group, taken = int(rng.integers(count)), []
        for _ in range(length):
            taken.append(int(rng.choice(members[group])))
            group = follows[group] if rng.random() < faithful else int(rng.integers(count))
        found.append(taken)
    return found
