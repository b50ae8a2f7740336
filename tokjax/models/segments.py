"""Rows of slots cut into segments: pooled to one vector each, and handed back to the slots.

A segment begins at a slot that is marked and reaches to the next mark. How many there are differs
by row; arrays have room for S of them, and what does not fit is told, never mixed up.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from tokjax import struct


@struct.dataclass
class Segments:
    """Where the segments of each row lie. S is the room for them.

    Attributes:
        ids: which segment each slot belongs to, from 0 in each row; S where the row has more
            segments than room, or for filling.
        first: slot each segment begins at; T where there is no such segment.
        count: how many segments each row has, those without room included.
        document: of each segment, copied from its slots; 0 where there is no such segment.
        index: number of the segment within its document, from 0.
    """

    ids: Int[Array, "B T"]
    first: Int[Array, "B S"]
    count: Int[Array, "B"]
    document: Int[Array, "B S"]
    index: Int[Array, "B S"]

    @classmethod
    def of(cls, begins: Bool[Array, "B T"], documents: Int[Array, "B T"], room: int) -> "Segments":
        """Returns the segments that begin at marked slots and at the first slot of a document.

        Args:
            begins: the marks; those of filling are ignored.
            documents: 1, 2, ... for the documents packed into a row; 0 is filling.
            room: most segments of a row.
        """
        B, T = begins.shape
        real = documents > 0
        begins = (begins | first_of_documents(documents)) & real
        running = jnp.cumsum(begins, axis=1) - 1
        fits = real & (running >= 0) & (running < room)
        ids = jnp.where(fits, running, room)
        rows = jnp.arange(B)[:, None]
        slots = jnp.broadcast_to(jnp.arange(T), (B, T))
        place = jnp.where(begins, ids, room)
        first = jnp.full((B, room), T, jnp.int32).at[rows, place].set(slots, mode="drop")
        document = _at(documents, first, 0)
        new = (first < T) & (document != jnp.pad(document, ((0, 0), (1, 0)))[:, :room])
        place = jnp.arange(room)
        index = place - jax.lax.cummax(jnp.where(new, place, 0), axis=1)
        return cls(ids, first, begins.sum(axis=1), document, index)

    @property
    def room(self) -> int:
        """Most segments of a row."""
        return self.first.shape[1]

    @property
    def exists(self) -> Bool[Array, "B S"]:
        """Which segments there are."""
        return self.document > 0

    @property
    def fits(self) -> Bool[Array, "B T"]:
        """Which slots belong to a segment that has room."""
        return self.ids < self.room

    @property
    def offset(self) -> Int[Array, "B T"]:
        """Place of each slot within its segment, from 0; 0 where it has none."""
        T = self.ids.shape[1]
        offset = jnp.arange(T) - self.unpool(self.first)
        return jnp.where(self.fits, offset, 0)

    def pool(
        self, x: Float[Array, "B T D"], weights: Float[Array, "B T"] | None = None
    ) -> Float[Array, "B S D"]:
        """Returns the mean of each segment's slots, computed in float32; 0 where there is none.

        Args:
            x: values of the slots.
            weights: of the slots in the mean; default equal.
        """
        member = self.ids[:, None] == jnp.arange(self.room)[:, None]
        share = member.astype(jnp.float32)
        if weights is not None:
            share = share * weights.astype(jnp.float32)[:, None]
        total = share.sum(-1, keepdims=True)
        # One product in place of a scatter: the same sum on every run, and a gradient that gathers.
        sums = jnp.einsum("bst,btd->bsd", share, x.astype(jnp.float32))
        return (sums / jnp.where(total == 0, 1.0, total)).astype(x.dtype)

    def at_first(self, x: Shaped[Array, "B T ..."], fill: int = 0) -> Shaped[Array, "B S ..."]:
        """Returns the value of each segment's first slot; `fill` where there is no segment."""
        return _at(x, self.first, fill)

    def shift(
        self, pooled: Float[Array, "B S D"], start: Float[Array, "D"]
    ) -> Float[Array, "B S D"]:
        """Returns for each segment what the one before it in its document has, else `start`.

        What reaches a slot is then of slots before its segment alone.
        """
        before = jnp.pad(pooled, ((0, 0), (1, 0), (0, 0)))[:, : self.room]
        return jnp.where((self.index > 0)[..., None], before, start.astype(pooled.dtype))

    def unpool(self, pooled: Shaped[Array, "B S ..."]) -> Shaped[Array, "B T ..."]:
        """Returns each slot's segment's value; of slots without one the value means nothing."""
        ids = jnp.minimum(self.ids, self.room - 1)
        return jnp.take_along_axis(pooled, ids.reshape(*ids.shape, *[1] * (pooled.ndim - 2)), 1)


def first_of_documents(documents: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Returns which slots are the first of a document."""
    before = jnp.pad(documents, ((0, 0), (1, 0)))[:, :-1]
    return (documents > 0) & (documents != before)


def room_for(share: float, slots: int) -> int:
    """Returns the room for segments in rows of so many slots, at least 1.

    >>> room_for(0.5, 9), room_for(1.0, 4)
    (5, 4)
    """
    return min(slots, max(1, int(-(-share * slots // 1))))


def _at(x: jax.Array, places: jax.Array, fill: int) -> jax.Array:
    """Returns x at places of its second axis; `fill` beyond its end."""
    beyond = places >= x.shape[1]
    at = jnp.minimum(places, x.shape[1] - 1)
    extra = [1] * (x.ndim - 2)
    found = jnp.take_along_axis(x, at.reshape(*at.shape, *extra), axis=1)
    return jnp.where(beyond.reshape(*beyond.shape, *extra), jnp.asarray(fill, x.dtype), found)
