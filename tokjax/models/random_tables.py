"""Tables of random vectors, one for each token id, that need not be held whole.

The vector of an id is a function of a key and the id alone: a part of a table, and that of one
place or of many, agree with the whole.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def random_rows(
    key: jax.Array, ids: Int[Array, "N"], width: int, std: float = 1.0
) -> Float[Array, "N E"]:
    """Returns the vector of each id: independent normal numbers.

    Args:
        key: of the table.
        ids: any of the vocabulary.
        width: of a vector.
        std: standard deviation of each number.

    >>> key = jax.random.key(0)
    >>> bool((random_rows(key, jnp.arange(9), 4)[7] == random_rows(key, jnp.array([7]), 4)).all())
    True
    """
    return std * jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (width,)))(ids)


def random_choice(key: jax.Array, ids: Int[Array, "N"], share: float) -> Bool[Array, "N"]:
    """Returns which ids are chosen, each by itself with the same probability.

    Args:
        key: of the choice.
        ids: any of the vocabulary.
        share: the probability.
    """
    if share >= 1:
        return jnp.ones(ids.shape, bool)
    draw = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))
    return draw(ids) < share


def random_signs(key: jax.Array, count: int, width: int) -> Float[Array, "N E"]:
    """Returns vectors of signs: a table times one of them is another table, as random as it.

    Args:
        key: of the signs.
        count: how many vectors.
        width: of each.
    """
    return jax.random.rademacher(key, (count, width), jnp.float32)
