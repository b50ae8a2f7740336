"""Characters with a slot before each group's first: where the end of the group before stands."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from tokjax import struct
from tokjax.models.segments import first_of_documents


@struct.dataclass
class Expansion:
    """Places in the expanded sequence of N slots; one that has no room stands at N.

    Attributes:
        characters: slot of each character.
        ends: slot of the end that stands before each character; N where there is none.
        slots: N.
    """

    characters: Int[Array, "B T"]
    ends: Int[Array, "B T"]
    slots: int = struct.field(pytree_node=False, default=0)

    @classmethod
    def of(
        cls, boundaries: Bool[Array, "B T"], documents: Int[Array, "B T"], slots: int
    ) -> "Expansion":
        """Returns where characters and ends stand.

        Args:
            boundaries: characters before which a slot is put.
            documents: 1, 2, ... for the documents packed into a row; 0 is filling, without slots.
            slots: of the expanded row.
        """
        T, real = boundaries.shape[1], documents > 0
        boundaries = boundaries & real
        places = jnp.arange(T) + jnp.cumsum(boundaries, axis=1)
        characters = jnp.where(real & (places < slots), places, slots)
        ends = jnp.where(boundaries & (places < slots), places - 1, slots)
        return cls(characters, ends, slots)

    def spread(
        self, of_characters: Shaped[Array, "B T ..."], of_ends: Shaped[Array, "B T ..."]
    ) -> Shaped[Array, "B N ..."]:
        """Returns values of characters and of the ends before them at their slots, else 0."""
        rows = jnp.arange(self.characters.shape[0])[:, None]
        shape = (of_characters.shape[0], self.slots, *of_characters.shape[2:])
        found = jnp.zeros(shape, of_characters.dtype)
        found = found.at[rows, self.characters].set(of_characters, mode="drop")
        return found.at[rows, self.ends].set(of_ends.astype(found.dtype), mode="drop")


def slot_targets(
    targets: Int[Array, "B T"],
    tokens: Int[Array, "B T"],
    boundaries: Bool[Array, "B T"],
    documents: Int[Array, "B T"],
    end: int,
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Returns what characters, and the ends before them, are to predict.

    A group's last character predicts the end; the end predicts the next group's first. Whether
    what follows a row begins a group is not known: the last character predicts its target itself.

    Args:
        targets: the character behind each.
        tokens: the characters.
        boundaries: which of them begin a group.
        documents: as in `Expansion.of`.
        end: id of the end.
    """
    begins = boundaries & ~first_of_documents(documents)
    followed = jnp.pad(begins, ((0, 0), (0, 1)))[:, 1:]
    return jnp.where(followed, end, targets), tokens
