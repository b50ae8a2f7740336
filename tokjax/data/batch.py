"""The training batch: what every objective receives."""

from collections.abc import Mapping

from jaxtyping import Array, Float, Int

from tokjax import struct


@struct.dataclass
class Batch:
    """Packed token rows with real-valued per-token weights.

    Attributes:
        tokens: input ids.
        targets: the id each position predicts, its successor within the same example.
        positions: index of the token within its piece of an example, from 0.
        segment_ids: 1, 2, ... for the pieces packed into a row; 0 is filling. Positions of
            different segments never attend to each other.
        weights: weight of each target in the loss; 0 on filling and wherever a target does not
            count. Never inferred from token ids. Targets of a rejected answer weigh below 0.
        example_id: for segment s of a row, column s - 1 holds the number of its example (an
            index into the loader's list of examples), -1 where there is no such segment. A pair of
            answers is one example and two segments: the chosen one, then the rejected one; so are
            two translations. A ranking is one example with a segment for each passage.
        channels: further values of each target by name (annotations), 0 on filling.
        values: values of each segment by name, 0 where there is no such segment; of rankings how
            relevant each passage is ("label") and perhaps a teacher's "score", of translations
            which of the two a segment is ("side", 0 or 1).
        group: segments of an example; those of one example are neighbours in one row, and the
            first segment of a row begins an example. 1 unless examples are pairs, translations or
            rankings.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    example_id: Int[Array, "B S"]
    channels: Mapping[str, Float[Array, "B T"]] = struct.field(default_factory=dict)
    values: Mapping[str, Float[Array, "B S"]] = struct.field(default_factory=dict)
    group: int = struct.field(pytree_node=False, default=1)
