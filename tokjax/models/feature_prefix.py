"""Continuous features as inputs of a decoder: frames, compressed in time and projected.

The vectors stand in a row like embeddings of tokens, usually behind its first token; see
`tokjax.data.feature_batch` for rows to train on and `tokjax.decoding.prefixed` for prompts.

Reference: Anand et al., "Mitigating Attention Sinks and Massive Activations in Audio-Visual Speech
Recognition with LLMs", arXiv 2510.22603, whose encoders are frozen and stand before this.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax.errors import ConfigError, nearest

_POOLINGS = ("mean", "stack")
_EPSILON = 1e-5  # of the layer norm


def pooled_count(frames: int, factor: int) -> int:
    """Returns how many vectors frames become; a last group may be short.

    >>> pooled_count(9, 4), pooled_count(8, 4), pooled_count(0, 4)
    (3, 2, 0)
    """
    return -(-frames // factor)


def pool_frames(
    frames: Float[Array, "B F C"],
    counts: Int[Array, "B"],
    factor: int,
    pooling: Literal["mean", "stack"] = "mean",
) -> Float[Array, "B P C2"]:
    """Returns each group of `factor` frames as their mean, or side by side; in float32.

    Of a short last group the mean is over the frames that there are, and the rest of a stack is
    zeros: a recommendation of tokjax. A group without any frame is zeros.

    Args:
        frames: of each row, its own from the left.
        counts: how many frames are a row's own; what stands behind them has no effect.
        factor: frames a group.
        pooling: how groups are compressed.
    """
    B, F, C = frames.shape
    P = pooled_count(F, factor)
    mask = jnp.arange(P * factor) < counts[:, None]
    padded = jnp.pad(frames.astype(jnp.float32), ((0, 0), (0, P * factor - F), (0, 0)))
    kept = jnp.where(mask[..., None], padded, 0.0).reshape(B, P, factor, C)
    if pooling == "stack":
        return kept.reshape(B, P, factor * C)
    own = mask.reshape(B, P, factor, 1).sum(2)
    return kept.sum(2) / jnp.maximum(own, 1).astype(jnp.float32)


@dataclass(frozen=True)
class FeaturePrefix:
    """Groups of frames, pooled, through linear, ReLU and linear to the width of a decoder."""

    features: int  # numbers in a frame
    factor: int = 1  # frames a vector stands for
    # a group's mean, or its frames side by side
    pooling: Literal["mean", "stack"] = "mean"
    hidden: int | None = None  # width between the two linear layers; None: the decoder's
    layer_norm: bool = False  # whether a layer norm follows

    def __post_init__(self):
        for name in ("features", "factor"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.hidden is not None and self.hidden < 1:
            raise ConfigError(f"hidden={self.hidden} must be at least 1, or None")
        if self.pooling not in _POOLINGS:
            raise ConfigError(
                f"unknown pooling={self.pooling!r}.{nearest(str(self.pooling), _POOLINGS)}"
            )

    def count(self, frames: int) -> int:
        """Returns how many vectors a row of so many frames becomes."""
        return pooled_count(frames, self.factor)

    def init(self, key: jax.Array, width: int, dtype: str = "float32") -> dict[str, Array]:
        """Returns initial parameters: matrices of variance 1 / inputs, biases of zeros.

        Args:
            key: of random values.
            width: of the decoder.
            dtype: of the parameters.
        """
        inputs = self.features * (self.factor if self.pooling == "stack" else 1)
        hidden = width if self.hidden is None else self.hidden
        keys = jax.random.split(key)
        found = {}
        for name, k, rows, columns in (
            ("enter", keys[0], inputs, hidden),
            ("leave", keys[1], hidden, width),
        ):
            found[name] = (rows**-0.5 * jax.random.normal(k, (rows, columns))).astype(dtype)
            found[f"{name}_bias"] = jnp.zeros(columns, dtype)
        if self.layer_norm:
            found["norm"] = jnp.ones(width, dtype)
            found["norm_bias"] = jnp.zeros(width, dtype)
        return found

    def __call__(
        self,
        params: dict[str, Array],
        frames: Float[Array, "B F C"],
        counts: Int[Array, "B"],
    ) -> Float[Array, "B P D"]:
        """Returns the vectors of each row, in float32; those behind its own mean nothing.

        Args:
            params: what `init` returns.
            frames: of each row, its own from the left.
            counts: how many frames are a row's own.

        Raises:
            ConfigError: frames of another size.
        """
        if frames.ndim != 3 or frames.shape[-1] != self.features:
            raise ConfigError(
                f"frames of shape {frames.shape} must be [rows, frames, features={self.features}]"
            )
        w = {name: value.astype(jnp.float32) for name, value in params.items()}
        x = pool_frames(frames, counts, self.factor, self.pooling)
        x = jax.nn.relu(x @ w["enter"] + w["enter_bias"]) @ w["leave"] + w["leave_bias"]
        if not self.layer_norm:
            return x
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + _EPSILON)
        return x * w["norm"] + w["norm_bias"]
