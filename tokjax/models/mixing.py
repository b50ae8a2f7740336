"""Token mixers: causal filters over the tokens, between blocks.

A mixer is a frozen dataclass registered under the kind "mixer" and named by `ModelConfig.mixer`.
It is a function of each token and a fixed number of tokens before it, so that the same code runs
over a whole sequence, over packed documents and over one new token beside a cache.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NOT_A_TOKEN = -1  # segment of places before a row's first token


class TokenMixer(Protocol):
    """A change to the residual stream behind a block."""

    @property
    def reach(self) -> int:
        """Number of earlier tokens that it reads."""
        ...

    def parameters(self, d_model: int) -> Mapping[str, Any]:
        """Returns its parameters in each layer, name -> `parameters.Parameter`."""
        ...

    def __call__(
        self,
        x: Float[Array, "B R+T D"],
        segments: Int[Array, "B R+T"],
        weights: Mapping[str, jax.Array],
        layer: Int[Array, ""],
        n_layers: int,
    ) -> Float[Array, "B T D"]:
        """Returns the last T tokens mixed with tokens before them, of the same segment.

        Args:
            x: block outputs; the first `reach` of them come before the T that are asked for.
            segments: of each; `NOT_A_TOKEN` where nothing is.
            weights: of this layer.
            layer: index of the block, traced in a scan.
            n_layers: number of blocks.
        """
        ...


def with_history(
    x: Float[Array, "B T D"],
    segments: Int[Array, "B T"] | None,
    before: Float[Array, "B R D"] | None,
    exists: Bool[Array, "B R"] | None,
    reach: int,
) -> tuple[Float[Array, "B R+T D"], Int[Array, "B R+T"]]:
    """Returns what a mixer is given: earlier tokens (zeros where there are none), then these."""
    B, T, D = x.shape
    own = jnp.zeros((B, T), jnp.int32) if segments is None else segments
    if before is None or exists is None:
        before = jnp.zeros((B, reach, D), x.dtype)
        exists = jnp.zeros((B, reach), bool)
    earlier = jnp.where(exists, 0, NOT_A_TOKEN)
    return (
        jnp.concatenate([jnp.where(exists[..., None], before, 0.0), x], axis=1),
        jnp.concatenate([earlier, own], axis=1),
    )
