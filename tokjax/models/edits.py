"""Interventions as arrays: what to change inside a forward pass.

Every leaf leads with the layer axis, is scanned together with the weights and may be changed
without recompiling. A field left None is absent from the compiled program.
"""

import dataclasses

from flax import struct
from jaxtyping import Array, Bool, Float


@struct.dataclass
class Edits:
    """Changes to a forward pass, applied in every block in the order of the fields.

    Attributes:
        attention_bias: added to the attention scores before the softmax, -inf excludes; heads and
            rows may be 1. A query whose every key is excluded attends to nothing.
        layer_gate: multiplies what a block adds to the residual stream; 0 skips the block. The
            batch and token axes may be 1.
        residual_add: added to the residual stream behind the block (steering); the batch and token
            axes may be 1.
        write: replaces the residual stream behind the block where `write_mask` is true (patching).
        write_mask: where `write` applies; the batch and token axes may be 1.
    """

    attention_bias: Float[Array, "L B H T S"] | None = None
    layer_gate: Float[Array, "L B T"] | None = None
    residual_add: Float[Array, "L B T D"] | None = None
    write: Float[Array, "L B T D"] | None = None
    write_mask: Bool[Array, "L B T"] | None = None

    def check(self, n_layers: int) -> None:
        """Refuses edits that cannot be meant for a model of so many blocks.

        Not done when they are made: `vmap` and `tree.map` make trees of this type out of anything.

        Raises:
            ValueError: `write` without `write_mask` or the reverse; a leaf without the layer axis.
        """
        if (self.write is None) != (self.write_mask is None):
            raise ValueError("Edits.write and Edits.write_mask go together: give both or neither")
        for field in dataclasses.fields(self):
            leaf = getattr(self, field.name)
            # An index beyond the end would silently take the last layer's edit.
            if leaf is not None and leaf.shape[0] != n_layers:
                raise ValueError(
                    f"Edits.{field.name} has shape {leaf.shape}: its first axis must be the "
                    f"model's {n_layers} layers"
                )
