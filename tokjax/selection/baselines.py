"""What selections are compared with: chance, length, loss, and similarity of whole examples."""

import functools
import hashlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tokjax.config import register
from tokjax.errors import ConfigError, DataError
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.selection.rows import Rows, Scope
from tokjax.selection.scoring import Found, RowScorer, Target
from tokjax.signals.hidden import l2_norm
from tokjax.signals.token_stats import token_stats


@register("selector", "random")
@dataclass(frozen=True)
class Random:
    """A number drawn from each example's key: adding examples leaves those of the others."""

    needs_target: ClassVar[bool] = False
    memory: ClassVar[int] = 1

    seed: int = 0  # another seed draws others, at least 0

    def __post_init__(self):
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must not be negative")

    def prepare(self, model: Transformer, params: Params, target: Target | None) -> RowScorer:
        """Returns what draws a number in [0, 1) for each row."""

        def score(rows: Rows) -> Found:
            drawn = [hashlib.sha256(f"{self.seed}\0{key}".encode()).digest() for key in rows.keys]
            whole = [int.from_bytes(data[:6], "big") / 2**48 for data in drawn]
            return np.array(whole), {}

        return score


@register("selector", "longest")
@dataclass(frozen=True)
class Longest:
    """The number of tokens that count."""

    needs_target: ClassVar[bool] = False
    memory: ClassVar[int] = 1

    scope: Scope = "response"  # tokens that count: those with a weight in training, others, all

    def prepare(self, model: Transformer, params: Params, target: Target | None) -> RowScorer:
        """Returns what counts each row's tokens."""

        def score(rows: Rows) -> Found:
            count = rows.scope(self.scope).sum(1)
            return np.where(count > 0, count, -np.inf), {}

        return score


@register("selector", "loss")
@dataclass(frozen=True)
class Loss:
    """The mean negative log-likelihood of the tokens that count, in nats."""

    needs_target: ClassVar[bool] = False
    memory: ClassVar[int] = 1

    prefer: Literal["high", "low"] = "high"  # low: the score is its negative
    scope: Scope = "response"  # tokens that count: those with a weight in training, others, all

    def prepare(self, model: Transformer, params: Params, target: Target | None) -> RowScorer:
        """Returns what scores rows by the model's loss."""

        def score(rows: Rows) -> Found:
            mean, nll = jax.device_get(losses(model, params, rows.tokens, rows.scope(self.scope)))
            none = ~np.isfinite(mean)
            scores = np.where(none, -np.inf, mean if self.prefer == "high" else -mean)
            return scores, {"nll": nll}

        return score


@register("selector", "rds")
@dataclass(frozen=True)
class Rds:
    """Representation similarity: cosine of an example's mean last state with the target's."""

    needs_target: ClassVar[bool] = True
    memory: ClassVar[int] = 1

    over: Literal["mean", "max"] = "mean"  # over the cosines with the target's examples
    scope: Scope = "response"  # tokens that count: those with a weight in training, others, all
    end: bool = False  # whether the end token counts: its state is one that training never reads

    def prepare(self, model: Transformer, params: Params, target: Target | None) -> RowScorer:
        """Returns what scores rows by the states of a target.

        Raises:
            DataError: no token of the target counts.
        """
        assert target is not None  # as `needs_target` says
        of_target = []
        for rows in target.batches():
            scope = rows.scope(self.scope, end=self.end)
            found = np.asarray(_pooled(model, params, rows.tokens, scope))
            of_target.append(found[scope.any(1)])
        directions = np.concatenate(of_target)
        if not len(directions):
            raise DataError(f"no token of the target counts (scope={self.scope!r})")

        def score(rows: Rows) -> Found:
            scope = rows.scope(self.scope, end=self.end)
            found = np.asarray(_pooled(model, params, rows.tokens, scope)) @ directions.T
            scores = found.mean(1) if self.over == "mean" else found.max(1)
            return np.where(scope.any(1), scores, -np.inf), {}

        return score


@functools.partial(jax.jit, static_argnames="model")
def losses(
    model, params, tokens, scope: Bool[Array, "B T"]
) -> tuple[Float[Array, "B"], Float[Array, "B T"]]:
    """Returns each row's mean loss, NaN without a token in scope, and the loss of each token."""
    x = model.backbone(params, model.embed(params, tokens)).x
    stats = token_stats(x[:, :-1], model.head(params), tokens[:, 1:], mask=scope[:, 1:])
    nll = jnp.pad(jnp.asarray(stats.nll), ((0, 0), (1, 0)))
    count = scope.sum(1)
    return jnp.where(count > 0, nll.sum(1) / jnp.maximum(count, 1), jnp.nan), nll


@functools.partial(jax.jit, static_argnames="model")
def _pooled(model, params, tokens, scope) -> Float[Array, "B D"]:
    """Returns the direction of each row's mean last state over the tokens in scope."""
    x = model.backbone(params, model.embed(params, tokens)).x.astype(jnp.float32)
    total = jnp.where(scope[..., None], x, 0.0).sum(1)
    return total / jnp.maximum(l2_norm(total), 1e-8)[:, None]
