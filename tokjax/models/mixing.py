"""Token mixers: causal filters over the tokens, between blocks.

A mixer is a frozen dataclass registered under the kind "mixer" and named by `ModelConfig.mixer`.
It is a function of each token and a fixed number of tokens before it, so that the same code runs
over a whole sequence, over packed documents and over one new token beside a cache.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.errors import ConfigError

if TYPE_CHECKING:
    from tokjax.models.config import ModelConfig

NOT_A_TOKEN = -1  # segment of places before a row's first token


class TokenMixer(Protocol):
    """A change to the residual stream behind a block.

    Two more methods are optional: `check(config)` refuses models that the mixer is not for, and
    `products(d_model)` gives the multiplications a token that `tokjax.models.cost` cannot tell
    from the shapes of parameters.
    """

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


def earlier(
    a: Float[Array, "B S ..."], segments: Int[Array, "B S"], lag: int
) -> Float[Array, "B S ..."]:
    """Returns what stands `lag` places before each place, zero where that is another segment.

    A negative lag looks ahead. Beyond the ends of the row there is nothing: zero.
    """
    if not lag:
        return a
    S = a.shape[1]
    ahead = max(-lag, 0)

    def moved(values: jax.Array, filling: int) -> jax.Array:
        pad = ((0, 0), (max(lag, 0), ahead), *((0, 0),) * (values.ndim - 2))
        return jnp.pad(values, pad, constant_values=filling)[:, ahead : ahead + S]

    # No segment has the number of the filling: `NOT_A_TOKEN` is the lowest there is.
    same = moved(segments, NOT_A_TOKEN - 1) == segments
    return jnp.where(same.reshape(same.shape + (1,) * (a.ndim - 2)), moved(a, 0), 0.0)


def between_blocks(
    mix: Callable[[], jax.Array],
    x: Float[Array, "B T D"],
    layer: Int[Array, ""] | int,
    n_layers: int,
    apply_last: bool,
) -> Float[Array, "B T D"]:
    """Returns `mix()` behind every block but the last, where x stays unless `apply_last`."""
    if apply_last:
        return mix()
    return jax.lax.cond(layer < n_layers - 1, mix, lambda: x)


def check_place(
    config: "ModelConfig", *, centered: bool, allow_leak: bool, apply_last: bool
) -> None:
    """Refuses models in which a filter would see what it must not, or nothing at all.

    Args:
        config: of the model.
        centered: the filter reads later tokens too.
        allow_leak: a causal model may have such a filter: a control, whose loss means nothing.
        apply_last: it also stands behind the last block.

    Raises:
        ConfigError: a centred filter in a causal model, a causal one in an encoder, or no place
            between blocks.
    """
    if centered and config.causal and not allow_leak:
        raise ConfigError(
            "mixer.centered=True shows later tokens to a causal model, which would predict what it "
            "reads: set centered=False, or allow_leak=True for a control of leak tests"
        )
    if not config.causal and not centered:
        raise ConfigError(
            "model.causal=False has tokens that see each other, but this mixer reads earlier ones "
            "only: set mixer.centered=True, or leave the mixer out of encoders"
        )
    if config.n_layers == 1 and not apply_last:
        raise ConfigError(
            "a mixer stands between blocks, and n_layers=1 has no such place: set "
            "mixer.apply_last=True"
        )
