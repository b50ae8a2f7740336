"""The key/value cache: one pytree, updated in place when donated, with a length for each row."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from tokjax.models.config import ModelConfig


@struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far.

    Attributes:
        keys: one array per layer (separate buffers, so that each is updated in place).
        values: like keys.
        lengths: number of slots in use in each row; slots from there on hold nothing that counts.
    """

    keys: tuple[Float[Array, "B S K d"], ...]
    values: tuple[Float[Array, "B S K d"], ...]
    lengths: Int[Array, "B"]

    @property
    def capacity(self) -> int:
        """Number of slots a row has."""
        return self.keys[0].shape[1]

    def rewind(self, lengths: Int[Array, "B"]) -> "Cache":
        """Returns the cache with each row cut back to a length (undoing rejected drafts)."""
        return dataclasses.replace(self, lengths=jnp.minimum(self.lengths, lengths))

    def grow(self, capacity: int) -> "Cache":
        """Returns the cache with room for `capacity` slots a row.

        Raises:
            ValueError: `capacity` is below the present one.
        """
        extra = capacity - self.capacity
        if extra < 0:
            raise ValueError(f"cannot shrink a cache of {self.capacity} slots to {capacity}")
        pad = lambda a: jnp.pad(a, ((0, 0), (0, extra), (0, 0), (0, 0)))  # noqa: E731
        keys, values = (tuple(map(pad, buffers)) for buffers in (self.keys, self.values))
        return dataclasses.replace(self, keys=keys, values=values)


def init_cache(config: ModelConfig, batch: int, capacity: int, dtype: Any = None) -> Cache:
    """Returns an empty cache with `capacity` slots for each of `batch` rows."""
    shape = (batch, capacity, config.kv_heads, config.head_width)
    dtype = jnp.dtype(config.dtype if dtype is None else dtype)
    empty = lambda: tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers))  # noqa: E731
    return Cache(keys=empty(), values=empty(), lengths=jnp.zeros(batch, jnp.int32))


def write(
    buffer: Float[Array, "B S K d"], new: Float[Array, "B T K d"], start: Int[Array, "B"]
) -> Float[Array, "B S K d"]:
    """Returns the buffer with `new` written from slot `start` of each row on.

    Slots beyond the capacity are dropped: callers check the capacity before they compile.
    """
    rows = jnp.arange(buffer.shape[0])[:, None]
    slots = start[:, None] + jnp.arange(new.shape[1])
    return buffer.at[rows, slots].set(new.astype(buffer.dtype), mode="drop")


def fork(cache: Cache, copies: int) -> Cache:
    """Returns the cache with every row repeated `copies` times, neighbours together."""
    return jax.tree.map(lambda a: jnp.repeat(a, copies, axis=0), cache)
