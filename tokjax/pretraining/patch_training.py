"""Patch-level training: one position reads the mean of K tokens and predicts the next K.

Reference: Shao et al., "Patch-Level Training for Large Language Models", arXiv 2407.12665,
section 2. A run trains on patches first and on tokens afterwards (two stages of one
configuration); the parameters carry over, the optimiser and its schedule start afresh.
"""

import typing
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError, nearest
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.pretraining.predictions import Predictions, scored
from tokjax.training.objective import Aux, Loss


def relative_cost(k: int, share: float) -> float:
    """Returns the compute of a two-stage run over that of token-only training on the same data.

    Args:
        k: tokens a patch.
        share: share of the data read in patches.

    >>> relative_cost(4, 2 / 3), relative_cost(2, 0.5)
    (0.5, 0.75)
    """
    return round(share / k + 1 - share, 12)


def patch_embeddings(
    x: Float[Array, "B N D"], mask: Float[Array, "B N"], k: int
) -> Float[Array, "B T D"]:
    """Returns the mean embedding of each run of k tokens, over those whose mask is 1.

    The mean is taken in float32. Where a patch holds no token at all it is zero. Averaging over
    real tokens only is a recommendation of tokjax; the paper has no filling.

    Raises:
        ConfigError: k does not divide N.
    """
    B, N, D = x.shape
    _check_length(N, k)
    grouped = x.reshape(B, N // k, k, D).astype(jnp.float32)
    weights = mask.reshape(B, N // k, k, 1).astype(jnp.float32)
    mean = (grouped * weights).sum(2) / jnp.maximum(weights.sum(2), 1.0)
    return mean.astype(x.dtype)


def next_patch_targets(batch: Batch, k: int) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"]]:
    """Returns the tokens of the next patch for every patch, and their weights.

    Token j of the patch after patch i stands in the batch as the target of position
    i k + (k - 1) + j. Targets of another document, or behind the row's end, weigh nothing.
    Every document of a row must start at a multiple of k.

    Raises:
        ConfigError: k does not divide the row length N.
    """
    B, N = batch.tokens.shape
    _check_length(N, k)
    patches = N // k

    def shifted(a: jax.Array) -> jax.Array:
        ahead = jnp.pad(a, ((0, 0), (0, k)))[:, k - 1 : k - 1 + N]
        return ahead.reshape(B, patches, k)

    # Documents start at multiples of k, so a patch's first token tells its document.
    own = batch.segment_ids.reshape(B, patches, k)[:, :, :1]
    weights = jnp.where(shifted(batch.segment_ids) == own, shifted(batch.weights), 0.0)
    return shifted(batch.targets), weights


def _check_length(tokens: int, k: int) -> None:
    if tokens % k:
        raise ConfigError(
            f"rows of {tokens} tokens are not whole patches of k={k}: make the row length a "
            f"multiple of {k}"
        )


def _offset_means(weights: Float[Array, "B T K"]) -> Float[Array, "B T K"]:
    """Returns the weights, scaled so that the sum over them is a mean of the offsets' means.

    Their total stays as it was, so dividing by it gives that mean. Signed weights may sum to a
    negative number; an offset whose weights sum to 0 has no mean and is left out.
    """
    by_offset = weights.sum((0, 1))
    present = by_offset != 0
    share = weights.sum() / jnp.maximum(present.sum(), 1).astype(weights.dtype)
    return weights * jnp.where(present, share / jnp.where(present, by_offset, 1.0), 0.0)


def _of_another_row(batch: Batch, k: int, targets: jax.Array, weights: jax.Array):
    """Returns targets and weights of the row above, for the patches that hold tokens."""
    if targets.shape[0] < 2:
        raise ConfigError(
            "targets='shuffled' takes the targets of another row, but a micro-batch holds one "
            "row only: raise batch_size or lower micro_batches"
        )
    # Weights move along, so that filling of the other row never becomes a target.
    weights = jnp.roll(weights, 1, axis=0)
    real = batch.segment_ids[:, ::k, None] > 0
    return jnp.roll(targets, 1, axis=0), jnp.where(real, weights, 0.0)


@register("objective", "patch")
@dataclass(frozen=True)
class Patch:
    """Next-patch prediction. With k = 1 it is next-token prediction."""

    k: int = 4  # tokens a patch
    z_loss: float = 0.0  # coefficient of the squared log-sum-exp of the logits
    # the mean over all targets (the paper's formula), or over the offsets of each offset's mean
    # (the authors' code); they differ only where offsets have unequally many targets, and then
    # 'offset' depends on the micro-batches
    average: Literal["token", "offset"] = "token"
    # what a patch predicts: the next patch; or as controls only its first token, or the next
    # patch of another row
    targets: Literal["patch", "token", "shuffled"] = "patch"

    def __post_init__(self):
        if self.k < 1:
            raise ConfigError(f"k={self.k} must be at least 1")
        if self.z_loss < 0:
            raise ConfigError(f"z_loss={self.z_loss} must not be negative")
        for name in ("average", "targets"):
            value, choices = getattr(self, name), typing.get_args(type(self).__annotations__[name])
            if value not in choices:
                raise ConfigError(f"unknown {name}={value!r}.{nearest(str(value), choices)}")

    @property
    def tokens_per_position(self) -> int:
        """Each position consumes a patch."""
        return self.k

    def init(self, key: jax.Array, model: Transformer, params: Params) -> Aux:
        """Returns nothing: there is no state."""
        return ()

    def predictions(
        self, model: Transformer, params: Params, batch: Batch, key: jax.Array
    ) -> Predictions:
        """Returns what each patch predicts: the tokens of the next one.

        Raises:
            ConfigError: rows that are no whole number of patches; `targets="shuffled"` with
                micro-batches of one row, which would shuffle nothing.
        """
        real = (batch.segment_ids > 0).astype(jnp.float32)
        x = patch_embeddings(model.embed(params, batch.tokens), real, self.k)
        out = model.backbone(
            params,
            x,
            positions=batch.positions[:, :: self.k] // self.k,
            segments=batch.segment_ids[:, :: self.k],
        )
        targets, weights = next_patch_targets(batch, self.k)
        if self.targets == "token":
            weights = weights.at[:, :, 1:].set(0.0)
        elif self.targets == "shuffled":
            targets, weights = _of_another_row(batch, self.k, targets, weights)
        weight = weights.sum()
        if self.average == "offset":
            weights = _offset_means(weights)
        return Predictions(
            x=out.x,
            head=model.head(params),
            targets=targets,
            weights=weights,
            weight=weight,
            offsets=1 if self.targets == "token" else self.k,
        )

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns the weighted sum over the targets of every patch, and their weight.

        Raises:
            ConfigError: as `predictions`.
        """
        return scored(self.predictions(model, params, batch, key), self.z_loss, aux)
