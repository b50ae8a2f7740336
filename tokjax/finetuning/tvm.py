"""TVM: a verifier whose every token predicts whether the solution so far will end right.

Reference: "Token-Supervised Value Models for Enhancing Mathematical Problem-Solving Capabilities of
Large Language Models", arXiv 2407.12863. The labels are made by `tokjax.selection.tvm`; searches
are guided by `tokjax.decoding.search.value_scorer`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError, nearest
from tokjax.finetuning.sft import loss_weights
from tokjax.models.parameters import Params
from tokjax.models.scalar_head import init_scalar_head, scalar_head
from tokjax.models.transformer import Transformer
from tokjax.signals import weighted_nll
from tokjax.training.objective import HEADS, Aux, Loss, PerToken, WithoutState

HEAD = "value"  # among the objective's heads


@register("objective", "tvm")
@dataclass(frozen=True)
class TVM(PerToken, WithoutState):
    """Error of the value that a linear head reads from the state of each token of a solution.

    The data are rated answers (source kind "rated"): the targets of right ones weigh more than 0,
    those of wrong ones less, prompts 0. The label of a token is the batch's channel: the value of
    the prefix that ends with it. Without a channel it is the solution's own outcome, which is
    outcome supervision; held-out solutions are evaluated so.

    Expected gradients of both are the same, since within a shared prefix only the mean label
    matters: labels of prefixes take noise away where a problem's solutions lie in different
    batches, and none where one batch holds them all.
    """

    # squared error of the head's number itself, or cross-entropy of its sigmoid with soft labels
    kind: Literal["mse", "bce"] = "mse"
    channel: str | None = "value"  # name of the artifact's channel; None: outcomes are the labels
    # what the error is averaged over: each solution's tokens and then solutions, or all tokens
    norm: Literal["sequence", "token"] = "sequence"
    lambda_lm: float = 0.0  # weight of the next-token loss on right solutions beside it

    def __post_init__(self):
        if not self.lambda_lm >= 0:
            raise ConfigError(f"lambda_lm={self.lambda_lm} must not be negative")
        for name, choices in (("kind", ("mse", "bce")), ("norm", ("sequence", "token"))):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"unknown {name}={value!r}.{nearest(str(value), choices)}")

    @property
    def evaluates(self) -> "TVM":
        """Held-out solutions are judged by their outcomes, whose best prediction is the value."""
        return dataclasses.replace(self, channel=None)

    def init_heads(self, key: jax.Array, model: Transformer) -> dict[str, Any]:
        """Returns the head, `value`."""
        return {HEAD: init_scalar_head(key, model.config.table_width)}

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns sums over the tokens of solutions.

        Metrics: `value` and `label`, their means; `brier`, the mean squared distance of the value
        and the outcome; with `lambda_lm` the `nll` of right solutions.

        Raises:
            ConfigError: the data have no such channel, or rows leave no place for end tokens.
        """
        right = (batch.weights > 0).astype(jnp.float32)
        size = jnp.abs(batch.weights)
        counted = size != 0
        # What has no weight may hold anything, NaN too.
        label = jnp.where(counted, self._labels(batch, right).astype(jnp.float32), 0.0)
        label = jax.lax.stop_gradient(label)
        own = batch.replace(weights=size)  # type: ignore[attr-defined]
        weights, divisor = loss_weights(own, jnp.ones_like(size), self.norm)
        x, at = _read(model, params, batch)
        logit = scalar_head(params[HEADS][HEAD], x)[..., 0]
        # The slot behind an input is the one that has read the input's target.
        logit = jnp.take_along_axis(logit, jnp.minimum(at + 1, x.shape[1] - 1), axis=1)
        if self.kind == "mse":
            value, error = logit, jnp.square(logit - label)
        else:
            value, error = jax.nn.sigmoid(logit), optax.sigmoid_binary_cross_entropy(logit, label)

        def total_of(values: Array, by: Array) -> Array:
            return jnp.where(counted, values * by, 0.0).sum()

        found = total_of(error, weights)
        tokens = size.sum()
        metrics = {
            "value": (total_of(value, size), tokens),
            "label": (total_of(label, size), tokens),
            "brier": (total_of(jnp.square(value - right), size), tokens),
            "value_loss": (found, divisor),
        }
        if self.lambda_lm:
            inputs = jnp.take_along_axis(x, jnp.minimum(at, x.shape[1] - 1)[..., None], axis=1)
            good = weights * right
            nll = weighted_nll(
                inputs, model.head(params), batch.targets[..., None], good[..., None]
            )[0]
            metrics["nll"] = (nll, good.sum())
            found = found + self.lambda_lm * nll
        return Loss(found, divisor, metrics, aux)

    def _labels(self, batch: Batch, right: Array) -> Array:
        if self.channel is None:
            return right
        if self.channel not in batch.channels:
            raise ConfigError(
                f"objective 'tvm' needs the channel {self.channel!r}, but the data have "
                f"{sorted(batch.channels) or 'none'}: label the solutions (python -m tokjax.select "
                f"--method=tvm --kind=rated) and name the file in data.train.0.artifact, or set "
                f"channel=None for outcome supervision"
            )
        return batch.channels[self.channel]


def _read(
    model: Transformer, params: Params, batch: Batch
) -> tuple[Float[Array, "B W D"], Int[Array, "B T"]]:
    """Returns states of all tokens, the last ones of samples included, and the place of each input.

    A batch's inputs end before the last token of a sample, the end token, which is only a target.
    Here it is an input as well: behind each sample there is one slot more. The target of an input
    is in the slot behind it.
    """
    T, S = batch.tokens.shape[1], batch.example_id.shape[1]
    width = -(-(T + S) // 8) * 8
    config = model.config
    if config.positions == "learned" and width > config.max_positions:
        raise ConfigError(
            f"rows of {T} tokens with up to {S} solutions need {width} positions to read end "
            f"tokens, but the model has learned max_positions={config.max_positions}: set "
            f"data.seq_len to {config.max_positions - width + T} or less, or data.packing=none"
        )
    at = jnp.where(batch.segment_ids > 0, jnp.arange(T) + batch.segment_ids - 1, width)

    def placed(at: Array, inputs: Array, behind: Array) -> Array:
        empty = jnp.zeros(width, inputs.dtype)
        return empty.at[at + 1].set(behind, mode="drop").at[at].set(inputs, mode="drop")

    tokens, positions, segments = (
        jax.vmap(placed)(at, inputs, behind)
        for inputs, behind in (
            # A target without weight is not read, and may be anything.
            (batch.tokens, jnp.where(batch.weights != 0, batch.targets, 0)),
            (batch.positions, batch.positions + 1),
            (batch.segment_ids, batch.segment_ids),
        )
    )
    out = model.backbone(
        params, model.embed(params, tokens), positions=positions, segments=segments
    )
    return out.x, at
