"""Shuffling by computed index: a keyed pseudo-random permutation evaluated where it is needed.

A stored permutation of a billion rows takes gigabytes, has to be drawn again on every resume, and
differs between hosts unless they take care. A bijection that can be evaluated at any index costs
nothing to store and makes the data order a function of (seed, epoch, index) alone.
"""

import hashlib
import math
from typing import Any, overload

import numpy as np
from jaxtyping import Int, UInt64

# Four rounds of an ideal Feistel network pass for a random permutation; the round function here is
# a plain 64-bit mixer and the halves can be tiny, so twice as many are spent.
_ROUNDS = 8


def derive_seed(seed: int, *path: int | str) -> int:
    """Returns a 64-bit seed for the stream named by `path`, unrelated to those of other paths.

    >>> derive_seed(0, "source", 1) == derive_seed(0, "source", 1)
    True
    >>> derive_seed(0, "source", 1) == derive_seed(0, "source", 2)
    False
    """
    text = repr((int(seed), *path)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def mix(values: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """Returns a well-mixed 64-bit hash of each element (a bijection on 64-bit integers)."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@overload
def permute(index: int, size: int, seed: int, epoch: int = 0) -> int: ...
@overload
def permute(
    index: Int[np.ndarray, "*N"],
    size: int,
    seed: int,
    epoch: int | Int[np.ndarray, "*N"] = 0,
) -> Int[np.ndarray, "*N"]: ...
def permute(index: Any, size: int, seed: int, epoch: Any = 0) -> Any:
    """Returns where a pseudo-random permutation of `range(size)` sends `index`.

    For fixed (size, seed, epoch) this is a bijection on `range(size)`; memory and time do not
    depend on `size`.

    Args:
        index: an int, or an integer array of any shape, with values in [0, size).
        size: number of elements permuted, 1 to 2**62.
        seed: any integer.
        epoch: every epoch, an integer from 0, has its own permutation; for an array of indices it
            may be an array of the same shape.

    Returns:
        An int for an int, an int64 array of the same shape for an array.

    Raises:
        ValueError: an index outside [0, size), or a size outside [1, 2**62].

    >>> sorted(permute(i, 5, seed=3) for i in range(5))
    [0, 1, 2, 3, 4]
    """
    if not 1 <= size <= 1 << 62:
        raise ValueError(f"permute: size {size} is not within 1 and 2**62")
    indices = np.asarray(index)
    if indices.size and (int(indices.min()) < 0 or int(indices.max()) >= size):
        raise ValueError(
            f"permute: index {int(indices.min())} to {int(indices.max())} is outside [0, {size})"
        )
    # A near-square grid just above `size`: fewer than sqrt(size) + 1 cells lie outside, so the
    # walk below almost never takes a second step (a power-of-two domain can be four times larger).
    left_size = math.isqrt(size - 1) + 1
    right_size = -(-size // left_size)
    keys = mix(
        np.asarray(epoch).astype(np.uint64).reshape(-1)
        + np.array([derive_seed(seed, "permute")], np.uint64)
    )
    keys = np.broadcast_to(keys, indices.size)
    values = _feistel(indices.astype(np.uint64).ravel(), left_size, right_size, keys)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        # Cycle walking: following the permutation of the grid until it re-enters [0, size) is a
        # bijection on [0, size), and it always re-enters because its cycle began inside.
        values[outside] = _feistel(values[outside], left_size, right_size, keys[outside])
        outside = outside[values[outside] >= size]
    result = values.astype(np.int64).reshape(indices.shape)
    return int(result) if isinstance(index, int | np.integer) else result


def _feistel(
    values: UInt64[np.ndarray, "N"], left_size: int, right_size: int, keys: UInt64[np.ndarray, "N"]
) -> UInt64[np.ndarray, "N"]:
    """Returns the images under a Feistel network on the grid [left_size] x [right_size].

    The halves are added modulo their own sizes instead of xor-ed, so that they need not be
    powers of two nor equal.
    """
    left_mod, right_mod = np.uint64(left_size), np.uint64(right_size)
    left, right = values // right_mod, values % right_mod
    for number in range(_ROUNDS):
        keys = mix(keys + np.uint64(0x9E3779B97F4A7C15))
        if number % 2 == 0:
            left = (left + mix(right + keys) % left_mod) % left_mod
        else:
            right = (right + mix(left + keys) % right_mod) % right_mod
    return left * right_mod + right
