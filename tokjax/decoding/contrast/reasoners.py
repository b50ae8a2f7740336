"""Universal Reasoner at inference: small models' logits added to a frozen backbone's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax import struct
from tokjax.decoding.contrast.combine import as_column
from tokjax.decoding.contrast.settings import number, of_rows, shared_vocabulary
from tokjax.decoding.predictors import Predictor, StepOutput, as_predictor
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError


def guided_logits(
    backbone: Float[Array, "*B V"],
    reasoners: Sequence[Float[Array, "*B V"]],
    weights: Sequence[Any],
) -> Float[Array, "*B V"]:
    """Returns backbone + sum of weight * reasoner, in float32.

    Logits and log-probabilities give the same distribution: they differ by a constant a row.

    Reference: Kim et al., "Universal Reasoner", arXiv 2505.19075.
    """
    total = backbone.astype(jnp.float32)
    for logits, weight in zip(reasoners, weights, strict=True):
        total = total + as_column(weight) * logits.astype(jnp.float32)
    return total


@struct.dataclass
class ReasonersParams:
    """What a backbone with reasoners decodes from.

    Attributes:
        backbone: parameters of the backbone.
        reasoners: parameters of each reasoner.
        weights: of each reasoner's logits.
    """

    backbone: Any
    reasoners: tuple[Any, ...]
    weights: tuple[Float[Array, "*B"], ...]


@dataclass(frozen=True)
class Reasoners:
    """A backbone guided by reasoners; costs one pass of each model a token, each with its cache.

    Attributes:
        backbone: the large model.
        reasoners: the small ones, of the same tokenizer.
        vocab_size: number of token ids.
    """

    backbone: Predictor
    reasoners: tuple[Predictor, ...]
    vocab_size: int

    @property
    def max_positions(self) -> int:
        """Longest sequence, prompt and new tokens together."""
        return min(each.max_positions for each in (self.backbone, *self.reasoners))

    def prepare(self, params: ReasonersParams) -> ReasonersParams:
        """Returns the parameters with the models' in the form that they read fastest."""
        pairs = zip(self.reasoners, params.reasoners, strict=True)
        return params.replace(  # type: ignore[attr-defined]
            backbone=self.backbone.prepare(params.backbone),
            reasoners=tuple(each.prepare(own) for each, own in pairs),
        )

    def init(
        self, prepared: ReasonersParams, prompts: Prompts, capacity: int
    ) -> tuple[tuple[Any, ...], StepOutput]:
        """Returns all states behind the prompts, and what is said of the first new token."""
        return self._combined(
            prepared, [each.init(own, prompts, capacity) for each, own in self._all(prepared)]
        )

    def step(
        self, prepared: ReasonersParams, state: tuple[Any, ...], tokens: Int[Array, "B"]
    ) -> tuple[tuple[Any, ...], StepOutput]:
        """Returns all states behind one more token a row, and what is said of the next one."""
        pairs = zip(self._all(prepared), state, strict=True)
        return self._combined(
            prepared, [each.step(own, before, tokens) for (each, own), before in pairs]
        )

    def _all(self, prepared: ReasonersParams) -> list[tuple[Predictor, Any]]:
        models = (self.backbone, *self.reasoners)
        return list(zip(models, (prepared.backbone, *prepared.reasoners), strict=True))

    def _combined(self, prepared: ReasonersParams, results: list[tuple[Any, StepOutput]]):
        backbone, *others = [out.logits[:, : self.vocab_size] for _, out in results]
        weights = [of_rows(weight, backbone.shape[0]) for weight in prepared.weights]
        logits = guided_logits(backbone, others, weights)
        return tuple(state for state, _ in results), StepOutput(logits)


def with_reasoners(
    backbone: tuple[Any, Any],
    reasoners: Sequence[tuple[Any, Any]],
    *,
    weights: Sequence[Any] | None = None,
    vocab_size: int | None = None,
) -> tuple[Reasoners, ReasonersParams]:
    """Returns the predictor of a backbone with reasoners and its parameters, for `decode`.

    The logits are those of the backbone plus each reasoner's times its weight: the product of
    their distributions, each to the power of its weight. Costs one pass of each model a token.

    Args:
        backbone: a model (or predictor) and its parameters.
        reasoners: models of the same tokenizer and their parameters.
        weights: one number for each reasoner (or an array with one for each row); default 1. 0 is
            exactly the backbone.
        vocab_size: the tokenizer's, where the models' tables are padded differently.

    Raises:
        ConfigError: a setting is impossible, or the vocabularies differ.

    Reference: Kim et al., "Universal Reasoner: A Single, Composable Plug-and-Play Reasoner for
    Frozen LLMs", arXiv 2505.19075.
    """
    models = [as_predictor(model) for model, _ in (backbone, *reasoners)]
    weights = [1.0] * len(reasoners) if weights is None else list(weights)
    if len(weights) != len(reasoners):
        raise ConfigError(f"{len(weights)} weights for {len(reasoners)} reasoners")
    names = ["backbone", *(f"reasoner {i}" for i in range(len(reasoners)))]
    size = shared_vocabulary(dict(zip(names, models, strict=True)), vocab_size)
    return Reasoners(models[0], tuple(models[1:]), size), ReasonersParams(
        backbone=backbone[1],
        reasoners=tuple(params for _, params in reasoners),
        weights=tuple(number(f"weights[{i}]", weight) for i, weight in enumerate(weights)),
    )
