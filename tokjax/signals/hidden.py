"""Hidden states compared: changes along text and depth, cosines, massive activations.

All arithmetic is in float32, whatever the states' dtype: the difference of two bfloat16 states
has few correct digits unless they are widened first.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.signals.quantiles import masked_quantile


def l2_norm(x: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """Returns the Euclidean norm over the last axis; its gradient at zero is 0, not NaN."""
    squares = jnp.square(x.astype(jnp.float32)).sum(-1)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def cosine(
    a: Float[Array, "*B D"], b: Float[Array, "*#B D"], floor: float = 1e-8
) -> Float[Array, "*B"]:
    """Returns the cosine similarity over the last axis; 0 with a vector of zeros.

    Args:
        a: vectors.
        b: vectors; axes of length 1 are repeated.
        floor: least norm that a vector is divided by.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    a = a / jnp.maximum(l2_norm(a), floor)[..., None]
    b = b / jnp.maximum(l2_norm(b), floor)[..., None]
    return (a * b).sum(-1)


def cosine_to_bos(
    states: Float[Array, "*L B T D"], bos: Int[Array, "B T"] | None = None
) -> Float[Array, "*L B T"]:
    """Returns the cosine of every state with that of its sequence's first token.

    As a capture function, `capture={"resid_post": cosine_to_bos}`, it returns [L, B, T] and no
    state is kept. Gradients reach both sides.

    Args:
        states: of one or several layers.
        bos: position of each token's BOS, for packed rows; by default position 0.

    Reference: Anand et al., "Mitigating Attention Sinks and Massive Activations in Audio-Visual
    Speech Recognition with LLMs", arXiv 2510.22603.
    """
    if bos is None:
        return cosine(states, states[..., :1, :])
    place = bos.reshape(*(1,) * (states.ndim - 3), *bos.shape, 1)
    return cosine(states, jnp.take_along_axis(states, place, axis=-2))


def previous_states(
    states: Float[Array, "*L B T D"],
    segments: Int[Array, "B T"] | None = None,
    shift: int = 1,
) -> tuple[Float[Array, "*L B T D"], Bool[Array, "B T"]]:
    """Returns the state `shift` tokens earlier, zeros where there is none, and whether there is.

    Args:
        states: of one or several layers.
        segments: documents of packed rows; by default one a row.
        shift: tokens back, at least 1.

    Raises:
        ValueError: a shift below 1.

    Reference: the `token_post` pairing of "RLFR: Extending Reinforcement Learning for LLMs with
    Flow Environment", arXiv 2510.10201.
    """
    if shift < 1:
        raise ValueError(f"shift={shift} must be at least 1")
    B, T, D = states.shape[-3:]
    shift = min(shift, T)
    exists = jnp.broadcast_to(jnp.arange(T) >= shift, (B, T))
    if segments is not None:
        exists = exists & (segments == jnp.roll(segments, shift, axis=-1))
    filling = jnp.zeros((*states.shape[:-2], shift, D), states.dtype)
    earlier = jnp.concatenate([filling, states[..., : T - shift, :]], axis=-2)
    return jnp.where(exists[..., None], earlier, jnp.zeros((), states.dtype)), exists


def token_deltas(
    states: Float[Array, "*L B T D"],
    segments: Int[Array, "B T"] | None = None,
    shift: int = 1,
) -> Float[Array, "*L B T D"]:
    """Returns how each state differs from the one `shift` tokens earlier; 0 where there is none."""
    earlier, exists = previous_states(states, segments, shift)
    change = states.astype(jnp.float32) - earlier.astype(jnp.float32)
    return jnp.where(exists[..., None], change, 0.0)


def layer_deltas(states: Float[Array, "L B T D"]) -> Float[Array, "L-1 B T D"]:
    """Returns what each layer adds: the states behind it minus those before it."""
    states = states.astype(jnp.float32)
    return states[1:] - states[:-1]


def position_deltas(
    states: Float[Array, "*L B T D"], start: Int[Array, "B"], end: Int[Array, "B"]
) -> Float[Array, "*L B D"]:
    """Returns the state at `end` minus the state at `start`, of each row and layer.

    Reference: "CLUE: Non-parametric Verification from Experience via Hidden-State Clustering",
    arXiv 2510.01591, where the two are the ends of the opening and of the closing tag of the
    reasoning.
    """

    def at(positions):
        place = positions.reshape(*(1,) * (states.ndim - 3), -1, 1, 1)
        return jnp.take_along_axis(states, place, axis=-2)[..., 0, :].astype(jnp.float32)

    return at(end) - at(start)


@struct.dataclass
class MassiveActivations:
    """The largest activation of every token, and what it is measured against.

    Attributes:
        largest: greatest absolute value among a token's features; 0 for masked tokens.
        feature: the index of that feature.
        median: median absolute value of the layer, over real tokens and features.
        massive: whether `largest` passes both thresholds.
    """

    largest: Float[Array, "*L B T"]
    feature: Int[Array, "*L B T"]
    median: Float[Array, "*L"]
    massive: Bool[Array, "*L B T"]


def massive_activations(
    states: Float[Array, "*L B T D"],
    mask: Bool[Array, "B T"],
    over_zero: float = 100.0,
    over_median: float = 1000.0,
) -> MassiveActivations:
    """Returns where a layer's states hold activations far larger than its others.

    The thresholds are the usual ones for large models; small models call for the relative rule
    alone (`over_zero=0`) or for `largest.max() / median`. As a capture function it reduces each
    layer's [B, T, D] to [B, T]. Without a real token, median and largest are 0. The median sorts
    every value: meant for analysis, not for each training step.

    Args:
        states: of one or several layers; each layer has its own median.
        mask: real tokens.
        over_zero: absolute value to exceed.
        over_median: multiple of the median to exceed.

    Reference: Anand et al., "Mitigating Attention Sinks and Massive Activations in Audio-Visual
    Speech Recognition with LLMs", arXiv 2510.22603; the thresholds are not in the paper but of
    common use.
    """
    sizes = jnp.where(mask[..., None], jnp.abs(states.astype(jnp.float32)), 0.0)
    largest, feature = sizes.max(-1), sizes.argmax(-1)
    everywhere = jnp.broadcast_to(mask[..., None], states.shape)
    median = masked_quantile(sizes, 0.5, everywhere, axis=(-3, -2, -1))
    massive = (largest > over_zero) & (largest > over_median * median[..., None, None])
    return MassiveActivations(largest, feature, median, massive & mask)
