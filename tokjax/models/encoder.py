"""The bidirectional encoder: the same blocks, no causal mask, and a head for masked tokens."""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.errors import ConfigError
from tokjax.models.config import ModelConfig
from tokjax.models.layers import ACTIVATIONS, linear, norm, ready
from tokjax.models.parameters import Params
from tokjax.models.transformer import Output, Transformer, padding


@dataclass(frozen=True)
class Encoder(Transformer):
    """A stack of blocks whose tokens all see each other.

    Logits of masked tokens come from `mlm_hidden` and the output head; to score many, give
    `signals.token_stats` those two instead of calling `unembed`.
    """

    def __post_init__(self):
        if self.config.causal:
            raise ConfigError("an Encoder needs causal=False; for causal=True use Transformer")

    def mlm_hidden(self, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns what the output head reads of the backbone's x, to predict masked tokens.

        Raises:
            ConfigError: the model has no such head.
        """
        activation = self.config.mlm_head
        if activation is None:
            raise ConfigError(
                "this encoder has no head for masked tokens (mlm_head=None): use its hidden states"
            )
        w = ready(self.config, params["mlm"])
        return norm(self.config, w, ACTIVATIONS[activation](linear(w, "dense", x)))

    def unembed(self, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns float32 logits of masked tokens."""
        return super().unembed(params, self.mlm_hidden(params, x))

    def encode(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
        *,
        types: Int[Array, "B T"] | None = None,
        **backbone: Any,
    ) -> Output:
        """Returns the final hidden states of tokens, of rows padded on either side.

        Args:
            params: the model's.
            tokens: ids.
            mask: true where there is a token; default everywhere. Positions count tokens.
            types: segment types, for models that have them; default 0.
            backbone: see `Transformer.backbone`.
        """
        if mask is not None:
            positions, segments = padding(mask)
            backbone = {"positions": positions, "segments": segments} | backbone
        return self.backbone(params, self.embed(params, tokens, types), **backbone)

    def __call__(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
        **encode: Any,
    ) -> tuple[Float[Array, "B T V"], Output]:
        """Returns (logits, output) of tokens; for the arguments see `encode`."""
        out = self.encode(params, tokens, mask, **encode)
        return self.unembed(params, out.x), out

    def embed_sentences(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
        *,
        how: Literal["mean", "first"] = "mean",
        **encode: Any,
    ) -> Float[Array, "B D"]:
        """Returns one float32 vector of length 1 a row; their products are cosine similarities."""
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        pooled = pool(self.encode(params, tokens, mask, **encode).x, mask, how)
        # A row of zeros stays one.
        return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)


def decoder_or_encoder(config: ModelConfig) -> Transformer:
    """Returns the model of a single stack's configuration: causal, or an `Encoder`."""
    return Transformer(config) if config.causal else Encoder(config)


def pool(
    x: Float[Array, "B T D"], mask: Bool[Array, "B T"], how: Literal["mean", "first"] = "mean"
) -> Float[Array, "B D"]:
    """Returns one float32 vector a row: the mean of its tokens, or the first of them.

    >>> x = jnp.array([[[9.0], [1.0], [3.0]]])
    >>> mask = jnp.array([[False, True, True]])
    >>> pool(x, mask).tolist(), pool(x, mask, "first").tolist()
    ([[2.0]], [[1.0]])
    """
    x = x.astype(jnp.float32)
    if how == "first":
        return jnp.take_along_axis(x, jnp.argmax(mask, axis=1)[:, None, None], axis=1)[:, 0]
    if how != "mean":
        raise ValueError(f"how={how!r} must be 'mean' or 'first'")
    kept = mask[..., None]
    return jnp.where(kept, x, 0.0).sum(1) / jnp.maximum(kept.sum(1), 1)
