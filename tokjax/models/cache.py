"""The key/value cache: one pytree, updated in place when donated, with a length for each row.

A windowed layer keeps a ring of its window plus `chunk` - 1 slots: token p lies in slot p modulo
the ring's size, so that writing up to `chunk` tokens overwrites no key that they still see. Every
other layer has a slot for each token up to the capacity.

A buffer has its heads before its slots, as the products of attention read it: the other way round a
CPU would copy all keys and values at every step. What goes in and comes out is [B, S, K, d].
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.models.config import ModelConfig


@struct.dataclass
class Int8:
    """Numbers kept as 8-bit integers, with a scale for each head's vector (absmax / 127)."""

    values: Int[Array, "B K S d"]
    scale: Float[Array, "B K S 1"]


Buffer = jax.Array | Int8  # [B K S d]


@struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far.

    Attributes:
        keys: one buffer per layer (separate, so that each is updated in place).
        values: like keys.
        mixed: with a token mixer, its inputs in each layer, as those of one head; else empty.
        lengths: number of tokens seen in each row; nothing that counts lies beyond them.
        capacity: most tokens a row may have.
        chunk: most tokens that one pass may add; ring buffers can also undo that many.
    """

    keys: tuple[Buffer, ...]
    values: tuple[Buffer, ...]
    lengths: Int[Array, "B"]
    mixed: tuple[Buffer, ...] = ()
    capacity: int = struct.field(pytree_node=False, default=0)
    chunk: int = struct.field(pytree_node=False, default=1)

    def rewind(self, lengths: Int[Array, "B"]) -> "Cache":
        """Returns the cache with each row cut back to a length (undoing rejected drafts).

        Layers with a ring buffer can go back `chunk` tokens, no further.
        """
        return dataclasses.replace(self, lengths=jnp.minimum(self.lengths, lengths))

    def grow(self, capacity: int, config: ModelConfig) -> "Cache":
        """Returns the cache with room for `capacity` tokens a row.

        Raises:
            ValueError: `capacity` is below the present one.
        """
        if capacity < self.capacity:
            raise ValueError(
                f"cannot shrink a cache of {self.capacity} slots to {capacity}: rewind rows instead"
            )
        kv_slots = ring_slots(config, capacity, self.chunk)

        def extend(buffers: Sequence[Buffer], slots: Sequence[int]) -> tuple[Buffer, ...]:
            return tuple(map(_pad, buffers, slots))

        return dataclasses.replace(
            self,
            keys=extend(self.keys, kv_slots),
            values=extend(self.values, kv_slots),
            mixed=extend(self.mixed, (capacity,) * len(self.mixed)),
            capacity=capacity,
        )


def ring_slots(config: ModelConfig, capacity: int, chunk: int) -> tuple[int, ...]:
    """Returns the number of slots of each layer."""
    return tuple(capacity if w is None else min(capacity, w + chunk - 1) for w in config.windows)


def init_cache(
    config: ModelConfig,
    batch: int,
    capacity: int,
    dtype: Any = None,
    *,
    chunk: int = 1,
    mixer: bool = False,
) -> Cache:
    """Returns an empty cache.

    Args:
        config: the model's.
        batch: number of rows.
        capacity: most tokens a row may have.
        dtype: of keys and values; default the compute dtype; "int8" keeps a quarter of the bytes.
        chunk: most tokens one pass may add; only layers with a window make use of it.
        mixer: also keep what a token mixer reads.
    """
    dtype = jnp.dtype(config.dtype if dtype is None else dtype)
    slots = ring_slots(config, capacity, chunk)

    def empty(n: int, heads: int, size: int, dtype: Any) -> Buffer:
        if dtype == jnp.int8:
            scale = jnp.zeros((batch, heads, n, 1), jnp.float32)
            return Int8(jnp.zeros((batch, heads, n, size), jnp.int8), scale)
        return jnp.zeros((batch, heads, n, size), dtype)

    def per_layer() -> tuple[Buffer, ...]:
        return tuple(empty(n, config.kv_heads, config.head_width, dtype) for n in slots)

    own = jnp.dtype(config.dtype)
    inputs = config.n_layers if mixer else 0
    return Cache(
        keys=per_layer(),
        values=per_layer(),
        mixed=tuple(empty(capacity, 1, config.d_model, own) for _ in range(inputs)),
        lengths=jnp.zeros(batch, jnp.int32),
        capacity=capacity,
        chunk=chunk,
    )


def fill(
    cache: Cache,
    keys: Sequence[Float[Array, "B T K d"]],
    values: Sequence[Float[Array, "B T K d"]],
    lengths: Int[Array, "B"],
    mixed: Sequence[Float[Array, "B T D"]] = (),
) -> Cache:
    """Returns an empty cache filled with the keys and values of a first pass.

    Args:
        cache: an empty cache whose capacity is T or more.
        keys: of each layer, every row's own from the left; what follows its length is filling.
        values: like keys.
        lengths: number of tokens of each row.
        mixed: inputs of the token mixer in each layer, where the cache keeps them.
    """

    def into(buffers: Sequence[Buffer], new: Sequence[jax.Array]) -> tuple[Buffer, ...]:
        return tuple(_fill(b, a, lengths) for b, a in zip(buffers, new, strict=True))

    return dataclasses.replace(
        cache,
        keys=into(cache.keys, keys),
        values=into(cache.values, values),
        mixed=into(cache.mixed, [a[:, :, None] for a in mixed]),
        lengths=lengths,
    )


def _fill(buffer: Buffer, new: jax.Array, lengths: jax.Array) -> Buffer:
    slots = width(buffer)
    if new.shape[1] > slots:
        # A ring shorter than the prompt keeps each row's latest tokens.
        at = jnp.maximum(token_of_slot(slots, lengths), 0)[:, :, None, None]
        new = jnp.take_along_axis(new, at, axis=1)
    packed = _pack(buffer, new)
    return jax.tree.map(lambda old, a: old.at[:, :, : a.shape[2]].set(a), buffer, packed)


def write(
    buffer: Buffer, new: Float[Array, "B T K d"], start: Int[Array, "B"], *, ring: bool
) -> Buffer:
    """Returns the buffer with `new` written as tokens `start`, `start` + 1, ... of each row.

    Without a ring, tokens beyond the capacity are dropped: callers check the capacity before they
    compile.
    """
    slots = start[:, None] + jnp.arange(new.shape[1])
    if ring:
        slots = slots % width(buffer)
    rows, heads = jnp.arange(new.shape[0]), jnp.arange(new.shape[2])
    at = (rows[:, None, None], heads[:, None], slots[:, None])
    return jax.tree.map(lambda old, a: old.at[at].set(a, mode="drop"), buffer, _pack(buffer, new))


def read(buffer: Buffer, dtype: Any) -> Float[Array, "B S K d"]:
    """Returns the buffer's contents."""
    if isinstance(buffer, Int8):
        buffer = buffer.values.astype(jnp.float32) * buffer.scale
    return buffer.astype(dtype).swapaxes(1, 2)


def token_of_slot(slots: int, lengths: Int[Array, "B"]) -> Int[Array, "B S"]:
    """Returns which token lies in each slot of a ring behind `lengths` tokens; negative: none."""
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(slots)) % slots


def latest(
    buffer: Buffer, count: int, lengths: Int[Array, "B"], dtype: Any
) -> tuple[Float[Array, "B R K d"], Bool[Array, "B R"]]:
    """Returns each row's last `count` tokens and which of them exist."""
    at = lengths[:, None] - count + jnp.arange(count)
    slots = jnp.maximum(at, 0)[:, None, :, None]
    kept = jax.tree.map(lambda a: jnp.take_along_axis(a, slots, axis=2), buffer)
    return read(kept, dtype), at >= 0


def moved(cache: Cache, source: Int[Array, "B"], target: Int[Array, "B"]) -> Cache:
    """Returns the cache with each row's token `source` also as its token `target`.

    For buffers that are no rings.
    """
    heads = jnp.arange(jax.tree.leaves(cache.keys)[0].shape[1])
    rows = jnp.arange(source.shape[0])[:, None]

    def copied(a: jax.Array) -> jax.Array:
        return a.at[rows, heads, target[:, None]].set(a[rows, heads, source[:, None]])

    return dataclasses.replace(
        cache, keys=jax.tree.map(copied, cache.keys), values=jax.tree.map(copied, cache.values)
    )


def fork(cache: Cache, copies: int) -> Cache:
    """Returns the cache with every row repeated `copies` times, neighbours together."""
    return jax.tree.map(lambda a: jnp.repeat(a, copies, axis=0), cache)


def width(buffer: Buffer) -> int:
    """Returns the number of slots."""
    return jax.tree.leaves(buffer)[0].shape[2]


def _pack(buffer: Buffer, new: jax.Array) -> Buffer:
    """Returns new entries [B T K d] in the form in which the buffer keeps its own."""
    new = new.swapaxes(1, 2)
    if not isinstance(buffer, Int8):
        return new.astype(buffer.dtype)
    wide = new.astype(jnp.float32)
    scale = jnp.abs(wide).max(-1, keepdims=True) / 127
    whole = jnp.round(wide / jnp.where(scale == 0, 1.0, scale))
    return Int8(whole.astype(jnp.int8), scale)


def _pad(buffer: Buffer, slots: int) -> Buffer:
    extra = slots - width(buffer)
    return jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, extra), (0, 0))), buffer)
