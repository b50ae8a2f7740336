"""Kept tokens of kept samples, moved into fewer rows, so that what is dropped costs nothing.

A dropped target is deleted as if the example had never had it: the target kept next becomes the
label in its place, and positions are counted anew. How many tokens are kept is known on the device
only, but shapes must be known before. So there are a few shapes, each compiled; the smallest into
which the samples fit is run.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.data.batch import Batch
from tokjax.parallel.rules import BATCH_AXES, constrain, current_mesh_shape
from tokjax.signals.packed import packed_spread, packed_sums

Shape = tuple[int, int]  # rows, positions


@struct.dataclass
class Layout:
    """Where the samples of a batch go, each [B, S].

    Attributes:
        row: of the new batch; negative for samples that are dropped.
        offset: position of the first token in that row.
        number: segment id in that row, from 1.
    """

    row: Int[Array, "B S"]
    offset: Int[Array, "B S"]
    number: Int[Array, "B S"]


def shapes(batch: Batch, most: int) -> tuple[Shape, ...]:
    """Returns the shapes to choose from, the smallest first; anything fits into the last.

    Args:
        batch: that samples are kept of. Where each row holds one, `most` rows are enough; of
            packed rows that many samples may be nearly everything.
        most: largest number of samples that can be kept.
    """
    rows, width = batch.tokens.shape
    packed = batch.example_id.shape[1] > 1
    mesh = current_mesh_shape()
    # Devices that share a batch share these rows too.
    shards = math.prod(mesh.get(axis, 1) for axis in BATCH_AXES)
    step = 128 if width % 128 == 0 else 8
    most = math.ceil(most / batch.example_id.shape[1])

    def up(n: float, multiple: int, limit: int) -> int:
        return min(limit, multiple * math.ceil(n / multiple - 1e-9))

    def shape(row_share: float, width_share: float) -> Shape:
        return up(row_share * most, shards, max(rows, shards)), up(width_share * width, step, width)

    found = {(rows, width)} if packed else set()
    for share in (3 / 4, 1, 3 / 2) if packed else (1 / 2, 3 / 4, 1):
        whole = share >= 1 or (share * most) % shards == 0
        found.add(shape(share, 1) if whole else shape(1, share))
    return tuple(sorted(found, key=lambda s: (s[0] * s[1], s[1])))


def first_fit(
    lengths: Int[Array, "B S"], choices: Sequence[Shape], most: int
) -> tuple[Layout, Int[Array, ""]]:
    """Returns places for samples in rows of the first shape that they fit, and its index.

    The longest sample is placed first, each into the first row that has room. Where they fit into
    no shape that way, every sample stays in its own row, which the last shape then must have.

    Args:
        lengths: tokens of each sample that are kept; 0 drops it.
        choices: shapes to choose from.
        most: the largest number of samples that can be kept.
    """
    B, S = lengths.shape
    flat = lengths.reshape(-1)
    order = jnp.argsort(-flat, stable=True)[:most]
    bins = max(rows for rows, _ in choices)
    room = jnp.stack([jnp.where(jnp.arange(bins) < rows, width, 0) for rows, width in choices])

    def place(used, length):
        fits = used[0] + length <= room
        row = jnp.argmax(fits, axis=1)
        placed = fits.any(1) | (length == 0)
        at = jnp.arange(len(choices)), row
        offset, number = used[0][at], used[1][at]
        one = (length > 0).astype(jnp.int32)
        used = used.at[0, *at].add(length).at[1, *at].add(one)
        return used, (row, offset, number + 1, placed)

    start = jnp.zeros((2, *room.shape), jnp.int32)
    _, (row, offset, number, placed) = jax.lax.scan(place, start, flat[order])
    fits = placed.all(0)
    chosen = jnp.where(fits.any(), jnp.argmax(fits), len(choices) - 1)

    def spread(found, own):
        found = jnp.zeros(B * S, jnp.int32).at[order].set(found[:, chosen].astype(jnp.int32))
        return jnp.where(fits.any(), found.reshape(B, S), own)

    kept = lengths > 0
    own_row = jnp.broadcast_to(jnp.arange(B)[:, None], (B, S))
    own_offset = jnp.cumsum(lengths, axis=1) - lengths
    own_number = jnp.cumsum(kept.astype(jnp.int32), axis=1)
    row = jnp.where(kept, spread(row, own_row), -1)
    return Layout(row, spread(offset, own_offset), spread(number, own_number)), chosen


def lengths_of(batch: Batch, keep: Bool[Array, "B T"]) -> Int[Array, "B S"]:
    """Returns how many targets of each sample are kept."""
    sums = packed_sums(keep.astype(jnp.float32), batch.segment_ids, batch.example_id.shape[1])
    return sums.astype(jnp.int32)


def compacted(batch: Batch, keep: Bool[Array, "B T"], layout: Layout, shape: Shape) -> Batch:
    """Returns the batch of the kept targets alone, in rows of the given shape.

    A sample's first input stays; each further input is the target kept before it. A target that is
    not kept thus appears nowhere, neither as a label nor as context.

    Args:
        batch: to take from.
        keep: targets that stay, those of prompts included.
        layout: where their samples go, of `first_fit`.
        shape: rows and positions of the result.
    """
    B, T = batch.tokens.shape
    rows, width = shape
    segments = batch.segment_ids
    num = batch.example_id.shape[1]
    before = jnp.cumsum(keep, axis=1, dtype=jnp.int32) - keep.astype(jnp.int32)
    # Kept targets of the samples further left in the row are not of this one.
    starts = jnp.pad(segments[:, :-1], ((0, 0), (1, 0))) != segments
    base = packed_sums(jnp.where(starts, before, 0).astype(jnp.float32), segments, num)
    rank = before - packed_spread(base.astype(jnp.int32), segments)
    first = packed_sums(jnp.where(starts, batch.tokens, 0).astype(jnp.float32), segments, num)
    row = packed_spread(layout.row, segments, -1)
    place = row * width + packed_spread(layout.offset, segments) + rank
    place = jnp.where(keep & (row >= 0), place, rows * width)
    source = jnp.full(rows * width, B * T, jnp.int32)
    source = source.at[place.reshape(-1)].set(jnp.arange(B * T), mode="drop")

    def taken(a, fill=0):
        found = jnp.take(a.reshape(-1), source, mode="fill", fill_value=fill)
        return constrain(found.reshape(rows, width), ("batch", "tokens"))

    targets, positions = taken(batch.targets), taken(rank)
    first = packed_spread(first.astype(jnp.int32), segments)
    shifted = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
    samples = jnp.full((rows, min(B * num, width)), -1, jnp.int32)
    at = (jnp.where(layout.row < 0, rows, layout.row), layout.number - 1)
    return Batch(
        tokens=jnp.where(positions == 0, taken(first), shifted),
        targets=targets,
        positions=positions,
        segment_ids=taken(packed_spread(layout.number, segments)),
        weights=taken(batch.weights),
        example_id=samples.at[at].set(batch.example_id, mode="drop"),
        channels={name: taken(values) for name, values in batch.channels.items()},
    )


def chosen_loss(
    losses: Sequence[Callable[[Any, Any], Float[Array, ""]]],
    index: Int[Array, ""],
    params: Any,
    data: Any,
) -> Float[Array, ""]:
    """Returns losses[index](params, data), differentiable with respect to the parameters.

    `jax.grad` of `lax.switch` keeps what the backward pass needs of every branch, taken or not.
    Here the gradient is computed inside the branch, on the way forward; parameters that nobody
    differentiates by (a frozen base beside its adapters) have none computed.

    Args:
        losses: functions of the parameters and the data that give one number; they may hold no
            traced array of their own.
        index: which of them.
        params: what to differentiate by.
        data: the rest: arrays that are constants.
    """

    def plain(params, index, data):
        return jax.lax.switch(index, losses, params, data)

    def forward(params, index, data):
        leaves, tree = jax.tree.flatten(params)
        moving = [leaf.perturbed for leaf in leaves]
        values = [leaf.value for leaf in leaves]
        index, data = jax.tree.map(lambda leaf: leaf.value, (index, data))

        def branch(loss):
            def of_moving(moved, values, data):
                rest = iter(moved)
                merged = [next(rest) if m else v for m, v in zip(moving, values, strict=True)]
                return loss(jax.tree.unflatten(tree, merged), data)

            return jax.value_and_grad(of_moving)

        moved = [value for m, value in zip(moving, values, strict=True) if m]
        total, gradient = jax.lax.switch(
            index, [branch(loss) for loss in losses], moved, values, data
        )
        rest = iter(gradient)
        return total, jax.tree.unflatten(tree, [next(rest) if m else None for m in moving])

    def backward(gradient, cotangent):
        if isinstance(cotangent, SymbolicZero):
            return None, None, None
        return jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), gradient), None, None

    run = jax.custom_vjp(plain)
    run.defvjp(forward, backward, symbolic_zeros=True)
    return run(params, index, data)
