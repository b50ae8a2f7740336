"""One step of sampling: which positions take a drawn token, and how tokens are drawn.

Reference: "Unifying Autoregressive and Diffusion-Based Sequence Generation", arXiv 2504.06416
(original, ACS); remasking is like that of ReMDM (arXiv 2503.00307).
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from tokjax import struct
from tokjax.errors import ConfigError

Kind = Literal["original", "acs", "remask", "reverse"]


@struct.dataclass
class Sampler:
    """How positions change at a step.

    Attributes:
        eta: of ACS, how often visible tokens are drawn again.
        visible_too: of remasking, whether tokens of earlier steps may be masked again.
        kind: the rule.
    """

    eta: Float[Array, ""]
    visible_too: bool = struct.field(pytree_node=False, default=True)
    kind: Kind = struct.field(pytree_node=False, default="original")


def original() -> Sampler:
    """Returns the sampler of masked diffusion: a token that is drawn once stays."""
    return Sampler(jnp.float32(0))


def acs(eta: float = 0.01) -> Sampler:
    """Returns the adaptive correction sampler, which also draws visible tokens again.

    Each with probability eta (1 - p), where p is that of unmasking: never at the last step.

    Args:
        eta: the paper's code takes 0.01 for blocks and 0.015 for whole rows.

    Raises:
        ConfigError: eta is no probability.
    """
    if not 0 <= eta <= 1:
        raise ConfigError(f"acs: eta={eta} must lie in [0, 1]: it is a probability")
    return Sampler(jnp.float32(eta), kind="acs")


def remask(visible_too: bool = True) -> Sampler:
    """Returns the sampler that fills every mask and then masks tokens again.

    Args:
        visible_too: also tokens of earlier steps, as the paper's code does; otherwise it has the
            law of `original`.
    """
    return Sampler(jnp.float32(0), visible_too, kind="remask")


def reverse() -> Sampler:
    """Returns the sampler of the gamma-hybrid noise: steps of the reversed chain (Tweedie)."""
    return Sampler(jnp.float32(0), kind="reverse")


@struct.dataclass
class Draws:
    """The randomness of one step, the same for a position whatever is computed beside it.

    Attributes:
        unmask: number in [0, 1) that decides whether a mask is replaced.
        again: one that decides whether a visible token is drawn again.
        gumbel: standard Gumbel noise of each id.
    """

    unmask: Float[Array, "B T"]
    again: Float[Array, "B T"]
    gumbel: Float[Array, "B T V"]


def draws(rows: Key[Array, "B"], step: Array, places: Int[Array, "T"], vocabulary: int) -> Draws:
    """Returns the randomness of a step.

    Args:
        rows: key of each row.
        step: number of the step.
        places: positions that are computed.
        vocabulary: number of ids.
    """

    def of_place(key: Array, place: Array) -> tuple[Array, Array]:
        uniform, gumbel = jax.random.split(jax.random.fold_in(key, place))
        # Plain float32 noise has no tail beyond 16.6, which makes rare tokens rarer.
        noise = jax.random.gumbel(gumbel, (vocabulary,), mode="high")
        return jax.random.uniform(uniform, (2,)), noise

    keys = jax.vmap(jax.random.fold_in, (0, None))(rows, step)
    uniform, gumbel = jax.vmap(jax.vmap(of_place, (None, 0)), (0, None))(keys, places)
    return Draws(uniform[..., 0], uniform[..., 1], gumbel)


def gumbel_max(
    logits: Float[Array, "B T V"], temperature: Float[Array, ""], gumbel: Float[Array, "B T V"]
) -> Int[Array, "B T"]:
    """Returns ids drawn by softmax(logits / temperature); temperature 0 takes the likeliest."""
    return jnp.argmax(logits + temperature * gumbel, axis=-1).astype(jnp.int32)


def update(
    sampler: Sampler,
    tokens: Int[Array, "B T"],
    drawn: Int[Array, "B T"],
    may_change: Bool[Array, "B T"],
    p: Float[Array, "B T"],
    found: Draws,
    mask_id: int,
) -> Int[Array, "B T"]:
    """Returns tokens behind a step of a sampler of masks.

    Args:
        sampler: original, ACS or remask.
        tokens: before the step.
        drawn: from the model's distribution at each position.
        may_change: active positions that are no prompt.
        p: probability that a mask is replaced.
        found: the randomness.
        mask_id: the mask.
    """
    masked = tokens == mask_id
    stays_masked = found.unmask >= p
    if sampler.kind == "remask":
        filled = jnp.where(may_change & masked, drawn, tokens)
        back = may_change & stays_masked & (masked | sampler.visible_too)
        return jnp.where(back, mask_id, filled)
    takes = masked & ~stays_masked
    if sampler.kind == "acs":
        takes |= ~masked & (found.again < sampler.eta * (1 - p))
    return jnp.where(may_change & takes, drawn, tokens)
