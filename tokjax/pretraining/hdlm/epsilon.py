"""The epsilon-hybrid noise: positions are masked, and some of the visible ones replaced.

Reference: "Unifying Autoregressive and Diffusion-Based Sequence Generation", arXiv 2504.06416;
masking alone is that of MDLM (arXiv 2406.07524).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.config import register
from tokjax.errors import ConfigError

FLOOR = 1e-4  # probabilities that weights are divided by


@struct.dataclass
class Noised:
    """Tokens under the epsilon-hybrid noise.

    Attributes:
        tokens: what the model reads.
        masked: where the mask stands.
        replaced: visible positions that drew a random id, perhaps their own.
    """

    tokens: Int[Array, "B T"]
    masked: Bool[Array, "B T"]
    replaced: Bool[Array, "B T"]


@register("hdlm_noise", "epsilon")
@dataclass(frozen=True)
class EpsilonHybrid:
    """Masks with the schedule's probability, and replaces some of what stays visible.

    With epsilon=0 and visible_weight=0 it is masked diffusion, whose loss bounds the likelihood.
    With more it is no bound: a run's metric `bound` has the masked positions alone.
    """

    epsilon: float = 0.01  # share of the visible active positions that a random id replaces
    visible_weight: float = 1.0  # lambda, of the loss of visible active positions
    # also divide the weights of visible positions by their probability 1 - p, as the authors' code
    # does for diffusion without a hyperschedule
    divide_visible: bool = False

    def __post_init__(self):
        if not 0 <= self.epsilon <= 1:
            raise ConfigError(f"noise.epsilon={self.epsilon} must lie in [0, 1]: it is a share")
        if not self.visible_weight >= 0:
            raise ConfigError(f"noise.visible_weight={self.visible_weight} must not be negative")

    def corrupt(
        self,
        key: jax.Array,
        tokens: Int[Array, "B T"],
        active: Bool[Array, "B T"],
        p: Float[Array, "B T"],
        mask_id: int,
        random_ids: int,
    ) -> Noised:
        """Returns noised tokens.

        Args:
            key: of the draws.
            tokens: ids.
            active: positions that may change.
            p: probability of the mask.
            mask_id: the mask.
            random_ids: random ids are drawn from 0 up to here, exclusive, without the mask.
        """
        mask, replace, draw = jax.random.split(key, 3)
        masked = active & (jax.random.uniform(mask, tokens.shape) < p)
        replaced = jax.random.uniform(replace, tokens.shape) < self.epsilon
        replaced &= active & ~masked
        ids = random_tokens(draw, tokens.shape, mask_id, random_ids)
        found = jnp.where(masked, mask_id, jnp.where(replaced, ids, tokens))
        return Noised(found.astype(tokens.dtype), masked, replaced)

    def weights(
        self, noised: Noised, active: Bool[Array, "B T"], p: Float[Array, "B T"]
    ) -> Float[Array, "B T"]:
        """Returns the weight of each active position's cross entropy, 0 elsewhere."""
        visible = self.visible_weight * jnp.where(noised.replaced, 1 - self.epsilon, self.epsilon)
        if self.divide_visible:
            visible = visible / jnp.maximum(1 - p, FLOOR)
        return jnp.where(active, jnp.where(noised.masked, 1 / jnp.maximum(p, FLOOR), visible), 0.0)


def random_tokens(
    key: jax.Array, shape: tuple[int, ...], mask_id: int, random_ids: int
) -> Int[Array, "..."]:
    """Returns ids drawn evenly from 0 up to `random_ids`, exclusive, without the mask."""
    inside = mask_id < random_ids
    drawn = jax.random.randint(key, shape, 0, random_ids - inside)
    return drawn + (drawn >= mask_id) if inside else drawn
