"""Who sees whom: attention by classes of positions, of one step or of all blocks at once."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from tokjax.errors import ConfigError, nearest

OfSettled = Literal["block_causal", "causal", "full"]
OfActive = Literal["full", "causal"]
_CHOICES = {"settled": ("block_causal", "causal", "full"), "active": ("full", "causal")}


def check_attention(of_settled: str, of_active: str) -> None:
    """Refuses attentions that do not exist.

    Raises:
        ConfigError: one is unknown.
    """
    for name, value in (("settled", of_settled), ("active", of_active)):
        if value not in _CHOICES[name]:
            raise ConfigError(
                f"unknown attention of {name} positions {value!r}."
                f"{nearest(str(value), _CHOICES[name])}"
            )


def step_mask(
    places: Int[Array, "B T"],
    settled: Bool[Array, "B T"],
    active: Bool[Array, "B T"],
    block: int,
    of_settled: OfSettled = "block_causal",
    of_active: OfActive = "full",
) -> Bool[Array, "B T T"]:
    """Returns which keys each position sees at one step of a hyperschedule.

    Settled positions see settled ones, active ones see themselves and settled ones, and nobody sees
    a worthless one (nor it anybody but itself, which keeps its softmax finite). So the keys of
    settled positions do not depend on what is active, and unless they see all settled ones (`full`)
    they never change again.

    Args:
        places: of the tokens in their text.
        settled: settled positions.
        active: active positions.
        block: positions that settle together.
        of_settled: what settled positions see of each other.
        of_active: what active positions see of each other.
    """
    q, k = places[:, :, None], places[:, None, :]
    among_settled = settled[:, :, None] & settled[:, None] & _before(q, k, block, of_settled)
    near = True if of_active == "full" else k <= q
    of_active_rows = active[:, :, None] & (settled[:, None] | (active[:, None] & near))
    return among_settled | of_active_rows | jnp.eye(places.shape[1], dtype=bool)


def one_pass_mask(
    places: Int[Array, "B T"],
    block: int,
    of_settled: OfSettled = "block_causal",
    of_active: OfActive = "full",
) -> Bool[Array, "B 2*T 2*T"]:
    """Returns which keys each position sees where a clean copy precedes a noisy one.

    The clean copy sees what settled positions see. A noisy block sees itself and the clean blocks
    before it: all blocks of a schedule are in their active step at once.

    Args:
        places: of the tokens in their text, which both copies have.
        block: width of the blocks.
        of_settled: what the clean copy sees of itself; not `full`, which would show later blocks.
        of_active: what a noisy block sees of itself.

    Raises:
        ConfigError: of_settled="full".
    """
    if of_settled == "full":
        raise ConfigError(
            "settled positions that see all settled ones change from block to block: one pass for "
            "all blocks needs settled_attention='block_causal' or 'causal'"
        )
    q, k = places[:, :, None], places[:, None, :]
    own, other = q // block, k // block
    noisy = own == other
    if of_active == "causal":
        noisy &= k <= q
    clean = _before(q, k, block, of_settled)
    upper = jnp.concatenate([clean, jnp.zeros_like(clean)], axis=-1)
    lower = jnp.concatenate([other < own, noisy], axis=-1)
    return jnp.concatenate([upper, lower], axis=1)


def _before(q: Array, k: Array, block: int, of_settled: OfSettled) -> Array:
    if of_settled == "causal":
        return k <= q
    if of_settled == "block_causal":
        return k // block <= q // block
    return jnp.ones(jnp.broadcast_shapes(q.shape, k.shape), bool)
