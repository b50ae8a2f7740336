"""Batches whose rows begin with continuous features: speech, images, series before their text."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Float, Int

from tokjax import struct
from tokjax.data.batch import Batch
from tokjax.errors import DataError
from tokjax.models.feature_prefix import pooled_count


@struct.dataclass(kw_only=True)
class FeatureBatch(Batch):
    """A batch at some of whose positions vectors stand that are made from frames.

    The ids at these positions are filling and mean nothing, and their targets weigh nothing but
    for the last one before the text, which predicts its first token.

    Attributes:
        frames: continuous features of each row, its own from the left.
        frame_counts: how many frames are a row's own.
        slots: which vector stands at a position (as `FeaturePrefix` numbers them); -1: a token.
    """

    frames: Float[Array, "B F C"]
    frame_counts: Int[Array, "B"]
    slots: Int[Array, "B T"]


@dataclass(frozen=True)
class FeatureExample:
    """Frames and the text that is to be written of them.

    Attributes:
        frames: at least one.
        text: ids that count as targets, the end included.
        before: ids before the frames, at least the BOS.
        prompt: ids between the frames and the text.
    """

    frames: Float[np.ndarray, "F C"]
    text: Sequence[int]
    before: Sequence[int] = (0,)
    prompt: Sequence[int] = ()


def feature_batch(
    examples: Sequence[FeatureExample],
    factor: int,
    *,
    width: int | None = None,
    frames: int | None = None,
) -> FeatureBatch:
    """Returns a batch, a row for each example, filled up on the right; arrays of the host.

    A row reads `before`, vectors of its frames, `prompt`, and its text but for the last id.

    Args:
        examples: of the rows.
        factor: frames that a vector stands for.
        width: positions of a row; by default those of the longest.
        frames: room for frames in a row; by default those of the longest.

    Raises:
        DataError: an example has no frames, no text or no token before them, frames of different
            sizes, or more than there is room for.
    """
    if not examples:
        raise DataError("a batch needs an example")
    for number, each in enumerate(examples):
        shape = np.shape(each.frames)
        if len(shape) != 2 or not shape[0] or shape[1] != np.shape(examples[0].frames)[1]:
            raise DataError(
                f"example {number} has frames of shape {shape}, which must be [frames, features] "
                f"with at least one frame and as many features as the first example has"
            )
        if not each.text or not each.before:
            raise DataError(
                f"example {number} needs a text and a token before its frames, for example BOS"
            )
    sizes = [len(each.frames) for each in examples]
    vectors = [pooled_count(n, factor) for n in sizes]
    lengths = [
        len(each.before) + n + len(each.prompt) + len(each.text) - 1
        for each, n in zip(examples, vectors, strict=True)
    ]
    width = max(lengths) if width is None else width
    frames = max(sizes) if frames is None else frames
    if max(lengths) > width or max(sizes) > frames:
        raise DataError(
            f"an example takes {max(lengths)} positions and {max(sizes)} frames, but there is room "
            f"for width={width} and frames={frames}"
        )
    B, C = len(examples), np.shape(examples[0].frames)[1]
    tokens, targets = np.zeros((B, width), np.int32), np.zeros((B, width), np.int32)
    slots, weights = np.full((B, width), -1, np.int32), np.zeros((B, width), np.float32)
    values = np.zeros((B, frames, C), np.float32)
    for b, each in enumerate(examples):
        first, behind = len(each.before), len(each.before) + vectors[b]
        row = [*each.before, *[0] * vectors[b], *each.prompt, *each.text]
        tokens[b, : lengths[b]], targets[b, : lengths[b]] = row[:-1], row[1:]
        slots[b, first:behind] = np.arange(vectors[b])
        weights[b, behind + len(each.prompt) - 1 : lengths[b]] = 1.0
        values[b, : sizes[b]] = each.frames
    there = np.arange(width) < np.array(lengths)[:, None]
    arrays = {
        "tokens": tokens,
        "targets": targets,
        "positions": np.where(there, np.arange(width), 0).astype(np.int32),
        "segment_ids": there.astype(np.int32),
        "weights": weights,
        "example_id": np.arange(B, dtype=np.int32)[:, None],
        "frames": values,
        "frame_counts": np.array(sizes, np.int32),
        "slots": slots,
    }
    return FeatureBatch(**arrays)  # type: ignore[arg-type]
