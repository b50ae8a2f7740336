"""The objective of ReTreever: an encoder whose context is read by queries through a tree.

Reference: "Tree Cross Attention" (arXiv 2309.17388), section 3.3.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.config import Choice, register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError, nearest
from tokjax.models.head import Head
from tokjax.models.layers import norm, ready
from tokjax.models.parameters import Params
from tokjax.models.stack import init_norm
from tokjax.models.transformer import Transformer
from tokjax.pretraining.tree_cross_attention.readers import Reading, TreeReader
from tokjax.signals import token_stats
from tokjax.training.objective import HEADS, Aux, Loss, Materials, PerToken, Ratio, WithoutState

_REWARDS = ("accuracy", "likelihood")


@struct.dataclass
class Queries:
    """What is asked of the contexts of a batch.

    Attributes:
        mask: tokens that belong to the context.
        positions: of the tokens that are asked for, less one.
        targets: their ids.
        weights: of the targets; 0 where nothing is asked.
        left_out: weight of targets that have no place.
    """

    mask: Bool[Array, "B N"]
    positions: Int[Array, "B M"]
    targets: Int[Array, "B M"]
    weights: Float[Array, "B M"]
    left_out: Float[Array, ""]


@register("objective", "tree_cross_attention")
@dataclass(frozen=True)
class TreeCrossAttention(PerToken, WithoutState):
    """Negative log-likelihood of the tokens of answers, each read from its prompt by its position.

    An example is a row (`data.packing="none"`). Its context is what stands before the first target
    with weight (a prompt); each target with weight is asked for by a learned query of its
    position, all at once. The run's model encodes the context (`model.causal=False`, with
    positions); the reader is the objective's own.

    With a tree three losses are added: of the answers as read; of those read from all leaves with
    the same weights; and REINFORCE on the choices, with an entropy bonus. Held-out data are
    evaluated by the first alone, with the likeliest choices.
    """

    reader: Annotated[Any, Choice("context_reader")] = TreeReader()  # tree, latents or full
    # tokens of a context; rows with more of them weigh nothing, which the metric `left_out` tells
    context: int = 128
    queries: int | None = None  # of a row; None: as many as the row has behind a whole context
    policy_weight: float = 1.0  # coefficient of REINFORCE
    whole_weight: float = 1.0  # coefficient of the loss of reading all leaves
    entropy_weight: float = 0.01  # coefficient of the entropy within REINFORCE
    # of a query's choices: 1 for a right answer, with baseline 0; or the answer's log-likelihood,
    # with that of a guess among `classes` as baseline
    reward: Literal["accuracy", "likelihood"] = "accuracy"
    classes: int | None = None  # kinds of targets; None: the whole vocabulary
    draws: bool = True  # choices are drawn; False takes the likeliest

    bidirectional: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("policy_weight", "whole_weight", "entropy_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("queries", "classes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1, or None")
        if self.reward not in _REWARDS:
            raise ConfigError(
                f"unknown reward={self.reward!r}.{nearest(str(self.reward), _REWARDS)}"
            )
        if self.context < 1:
            raise ConfigError(f"context={self.context} must be at least 1")
        self.reader.budget(self.context)

    @property
    def evaluates(self) -> Any:
        """What evaluates held-out data: the answers' loss, with the likeliest choices."""
        return dataclasses.replace(self, draws=False, policy_weight=0.0, whole_weight=0.0)

    def prepared(self, materials: Materials) -> "TreeCrossAttention":
        """Returns the objective itself.

        Raises:
            ConfigError: the model cannot be used.
        """
        self._check_model(materials.model)
        return self

    def init_heads(self, key: jax.Array, model: Transformer) -> dict[str, Any]:
        """Returns the parameters of the queries and of the reader.

        Raises:
            ConfigError: a shape is impossible.
        """
        config = model.config
        keys, width = jax.random.split(key), config.table_width
        queries = config.init_scale * jax.random.normal(keys[0], (config.max_positions, width))
        return {
            "queries": queries.astype(jnp.dtype(config.param_dtype)),
            "reader": self.reader.init(keys[1], config, self.context),
            "leave": init_norm(config, width),
        }

    def read(
        self,
        model: Transformer,
        params: Params,
        batch: Batch,
        asked: Queries,
        key: jax.Array,
        **options: Any,
    ) -> Reading:
        """Returns what the queries of a batch read of its contexts.

        Args:
            model: encodes the contexts.
            params: its parameters, with the objective's under "heads".
            batch: of prompts with answers.
            asked: from `queries_of`.
            key: of the draws.
            options: of the reader's `read`.
        """
        N, w = self.context, params[HEADS]
        states = model.backbone(
            params,
            model.embed(params, batch.tokens[:, :N]),
            positions=batch.positions[:, :N],
            segments=asked.mask.astype(jnp.int32),
        ).x
        queries = jnp.take(w["queries"], asked.positions, axis=0).astype(states.dtype)
        return self.reader.read(
            model.config,
            w["reader"],
            queries,
            states,
            asked.mask,
            key,
            draws=self.draws,
            **options,
        )

    def answers(
        self,
        model: Transformer,
        params: Params,
        batch: Batch,
        key: jax.Array | None = None,
    ) -> tuple[Int[Array, "B M"], Queries]:
        """Returns the likeliest id of each target, and what was asked.

        Args:
            model: encodes the contexts.
            params: its parameters, with the objective's under "heads".
            batch: of prompts with answers; the answers are not read.
            key: of the draws; None takes the likeliest choices.
        """
        asked = queries_of(batch, self.context, self.queries)
        objective = dataclasses.replace(self, draws=key is not None)
        key = jax.random.key(0) if key is None else key
        read = objective.read(model, params, batch, asked, key)
        return self.likeliest(model, params, read.x), asked

    def likeliest(
        self, model: Transformer, params: Params, x: Float[Array, "B M D"]
    ) -> Int[Array, "B M"]:
        """Returns the likeliest id by what queries know."""
        x, head = self.scored(model, params, x)
        found = token_stats(x, head, want=("top_k",), k=1).top_ids
        assert found is not None
        return found[..., 0]

    def scored(
        self, model: Transformer, params: Params, x: Float[Array, "B M D"]
    ) -> tuple[Float[Array, "B M D"], Head]:
        """Returns what the output head reads of what queries know, and the head."""
        w = ready(model.config, params[HEADS]["leave"])
        return norm(model.config, w, x), model.head(params)

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns the sum of w * loss and the sum of w over the answers' tokens.

        Raises:
            ConfigError: the model or the rows cannot be used.
        """
        self._check_model(model)
        asked = queries_of(batch, self.context, self.queries)
        found = self.read(model, params, batch, asked, key, whole=self.whole_weight > 0)
        weights = asked.weights
        there = weights != 0

        parts = [found.x] if found.whole is None else [found.x, found.whole]
        # Side by side in the row: the head is read once.
        again = lambda a: jnp.concatenate([a] * len(parts), axis=1)  # noqa: E731
        x, head = self.scored(model, params, jnp.concatenate(parts, axis=1))
        stats = token_stats(x, head, again(asked.targets), ("nll", "rank"), mask=again(there))
        assert stats.nll is not None and stats.rank is not None
        nll, *of_all = jnp.split(stats.nll, len(parts), axis=1)

        def mean(values: Array) -> Ratio:
            kept = jnp.where(there, jax.lax.stop_gradient(values).astype(jnp.float32), 0.0)
            return (kept * weights).sum(), weights.sum()

        right = (stats.rank[:, : nll.shape[1]] == 0).astype(jnp.float32)
        each = nll
        size = asked.mask.sum(-1, keepdims=True).astype(jnp.float32)
        metrics = {
            "nll": mean(nll),
            "accuracy": mean(right),
            "used": mean(found.used),
            "share": mean(found.used.astype(jnp.float32) / jnp.maximum(size, 1.0)),
            "left_out": (asked.left_out, asked.left_out + jnp.abs(weights).sum()),
        }
        if of_all:
            each += self.whole_weight * of_all[0]
            metrics["whole_nll"] = mean(of_all[0])
        if found.log_probs is not None and found.entropy is not None:
            metrics["policy_entropy"] = mean(found.entropy)
            if self.policy_weight:
                guess = math.log(self.classes or model.config.vocabulary)
                reward, baseline = (right, 0.0) if self.reward == "accuracy" else (-nll, -guess)
                each += self.policy_weight * reinforce(
                    found.log_probs, found.entropy, reward, baseline, self.entropy_weight
                )
        total = jnp.where(there, each * weights, 0.0).sum()
        return Loss(total, weights.sum(), metrics, aux)

    def _check_model(self, model: Transformer) -> None:
        config = model.config
        if config.causal:
            raise ConfigError(
                "objective 'tree_cross_attention' needs a model that sees both sides: set "
                "model.causal=False"
            )
        if config.positions == "none":
            raise ConfigError(
                "objective 'tree_cross_attention' asks for tokens by their positions, of which "
                "the states must know: set model.positions='learned'"
            )


def reinforce(
    log_probs: Float[Array, "*N"],
    entropy: Float[Array, "*N"],
    reward: Float[Array, "*N"],
    baseline: float,
    entropy_weight: float,
) -> Float[Array, "*N"]:
    """Returns -(reward - baseline) log pi - entropy_weight * entropy of each query.

    Its gradient is an estimate of that of the negative expected reward, without bias; rewards are
    constants and need no gradient of their own.

    Args:
        log_probs: of a query's choices together.
        entropy: of its policy.
        reward: of its choices.
        baseline: reward that changes nothing.
        entropy_weight: coefficient of the entropy.
    """
    return -jax.lax.stop_gradient(reward - baseline) * log_probs - entropy_weight * entropy


def queries_of(batch: Batch, context: int, queries: int | None = None) -> Queries:
    """Returns what a batch of prompts with answers asks of its contexts.

    Args:
        batch: an example a row.
        context: tokens of a context; a row that has more asks nothing.
        queries: of a row; None: as many as it has behind a whole context.

    Raises:
        ConfigError: rows are too short, or hold several examples.
    """
    T = batch.tokens.shape[1]
    if context > T:
        raise ConfigError(
            f"rows of {T} tokens hold no context of {context}: lower objective.context or raise "
            f"data.seq_len"
        )
    if batch.example_id.shape[1] > 1:
        raise ConfigError(
            "objective 'tree_cross_attention' reads one example a row: set data.packing='none'"
        )
    asks = (batch.weights != 0) & (batch.segment_ids > 0)
    first = jnp.argmax(asks, axis=-1)[:, None]
    fits = asks.any(-1, keepdims=True) & (first < context)
    mask = (jnp.arange(context) <= first) & (batch.segment_ids[:, :context] > 0) & fits
    M = min(T, T + 1 - context if queries is None else queries)
    places = jnp.argsort(~asks, axis=-1, stable=True)[:, :M]
    positions, targets, weights = (
        jnp.take_along_axis(a, places, axis=1)
        for a in (batch.positions, batch.targets, jnp.where(asks & fits, batch.weights, 0.0))
    )
    left_out = jnp.where(asks, jnp.abs(batch.weights), 0.0).sum() - jnp.abs(weights).sum()
    return Queries(mask, positions, targets, weights, left_out)
