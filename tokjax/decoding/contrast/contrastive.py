"""Contrastive decoding: a strong model against a weak one."""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax import struct
from tokjax.decoding.contrast.combine import (
    IMPOSSIBLE,
    as_column,
    log_probabilities,
    plausible,
    restrict,
    weighted_sum,
)
from tokjax.decoding.contrast.settings import (
    number,
    of_rows,
    positive,
    share_of_best,
    shared_vocabulary,
)
from tokjax.decoding.predictors import Predictor, StepOutput, as_predictor
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError


def contrastive_scores(
    expert: Float[Array, "*B V"],
    amateur: Float[Array, "*B V"],
    weight: Any = 1.0,
    plausibility: Any = 0.1,
    *,
    min_keep: int = 1,
    sentinel: float = IMPOSSIBLE,
) -> Float[Array, "*B V"]:
    """Returns expert - weight amateur where the expert finds a token plausible.

    Args:
        expert: log-probabilities.
        amateur: log-probabilities, at the amateur's temperature.
        weight: of the amateur.
        plausibility: least probability over that of the likeliest.
        min_keep: number of tokens always kept (the reference code keeps 2 in beam search).
        sentinel: what other tokens get; see `combine.restrict`.

    Reference: Li et al., "Contrastive Decoding", arXiv 2210.15097.
    """
    scores = weighted_sum([expert, amateur], [1.0, -jnp.asarray(weight)])
    return restrict(scores, plausible(expert, plausibility, min_keep), sentinel)


@struct.dataclass
class ContrastiveParams:
    """What contrastive decoding decodes from.

    Attributes:
        expert: parameters of the strong model.
        amateur: parameters of the weak one.
        weight: of the amateur's log-probabilities.
        temperature: the amateur's logits are divided by it.
        plausibility: least probability of a token over that of the likeliest, by the expert.
    """

    expert: Any
    amateur: Any
    weight: Float[Array, "*B"]
    temperature: Float[Array, "*B"]
    plausibility: Float[Array, "*B"]


@dataclass(frozen=True)
class Contrastive:
    """A strong model's predictions against a weak one's; costs one pass of each a token.

    Attributes:
        expert: the strong model.
        amateur: the weak one.
        vocab_size: number of token ids.
        context: what the amateur sees before the new tokens.
        min_keep: number of tokens always plausible.
    """

    expert: Predictor
    amateur: Predictor
    vocab_size: int
    context: Literal["last", "all"] = "last"
    min_keep: int = 1

    @property
    def max_positions(self) -> int:
        """Longest sequence, prompt and new tokens together."""
        if self.context == "last":
            return self.expert.max_positions
        return min(self.expert.max_positions, self.amateur.max_positions)

    def check(self, params: ContrastiveParams, prompts: Prompts, limits: np.ndarray) -> None:
        """Refuses more new tokens than the amateur has positions.

        Raises:
            ConfigError: too many.
        """
        del params, prompts
        if self.context == "last" and 1 + limits.max() > self.amateur.max_positions:
            raise ConfigError(
                f"max_new_tokens={limits.max()} exceeds the amateur's "
                f"max_positions={self.amateur.max_positions} (one is taken by the prompt's last "
                f"token): lower max_new_tokens"
            )

    def prepare(self, params: ContrastiveParams) -> ContrastiveParams:
        """Returns the parameters with the models' in the form that they read fastest."""
        return params.replace(  # type: ignore[attr-defined]
            expert=self.expert.prepare(params.expert), amateur=self.amateur.prepare(params.amateur)
        )

    def init(
        self, prepared: ContrastiveParams, prompts: Prompts, capacity: int
    ) -> tuple[Any, StepOutput]:
        """Returns both states behind the prompts, and what is said of the first new token."""
        expert, expert_out = self.expert.init(prepared.expert, prompts, capacity)
        if self.context == "last":
            last = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)
            capacity += 1 - prompts.tokens.shape[1]
            prompts = Prompts(last, jnp.ones_like(prompts.lengths))
        amateur, amateur_out = self.amateur.init(prepared.amateur, prompts, capacity)
        return (expert, amateur), self._combined(prepared, expert_out, amateur_out)

    def step(
        self, prepared: ContrastiveParams, state: Any, tokens: Int[Array, "B"]
    ) -> tuple[Any, StepOutput]:
        """Returns both states behind one more token, and what is said of the next one."""
        expert, expert_out = self.expert.step(prepared.expert, state[0], tokens)
        amateur, amateur_out = self.amateur.step(prepared.amateur, state[1], tokens)
        return (expert, amateur), self._combined(prepared, expert_out, amateur_out)

    def _combined(
        self, prepared: ContrastiveParams, expert: StepOutput, amateur: StepOutput
    ) -> StepOutput:
        rows = expert.logits.shape[0]
        temperature = as_column(of_rows(prepared.temperature, rows))
        softened = amateur.logits[:, : self.vocab_size] / temperature
        scores = contrastive_scores(
            log_probabilities(expert.logits[:, : self.vocab_size]),
            log_probabilities(softened),
            of_rows(prepared.weight, rows),
            of_rows(prepared.plausibility, rows),
            min_keep=self.min_keep,
        )
        return StepOutput(scores)


def contrastive(
    expert: tuple[Any, Any],
    amateur: tuple[Any, Any],
    *,
    weight: Any = 1.0,
    temperature: Any = 1.0,
    plausibility: Any = 0.1,
    context: Literal["last", "all"] = "last",
    min_keep: int = 1,
    vocab_size: int | None = None,
) -> tuple[Contrastive, ContrastiveParams]:
    """Returns the predictor of contrastive decoding and its parameters, for `decode`.

    The logits are log p_expert(x) - weight log p_amateur(x) where p_expert(x) is at least
    `plausibility` of its maximum, -inf elsewhere. Costs one pass of each model a token.

    Args:
        expert: the strong model (or predictor) and its parameters.
        amateur: the weak one of the same tokenizer, and its parameters.
        weight: of the amateur; 0 is the expert, restricted to what it finds plausible.
        temperature: divides the amateur's logits; the paper has 0.5 for GPT-2, 1 for OPT.
        plausibility: 0 excludes no token.
        context: "last" shows the amateur the prompt's last token and the new ones alone, as the
            paper does; "all" shows it everything.
        min_keep: number of tokens always plausible; the reference code has 2 in beam search.
        vocab_size: the tokenizer's, where the models' tables are padded differently.

    Raises:
        ConfigError: a setting is impossible, or the vocabularies differ.

    Reference: Li et al., "Contrastive Decoding: Open-ended Text Generation as Optimization", arXiv
    2210.15097. (Its search is a beam of 5; here any sampler may follow.)
    """
    strong, weak = as_predictor(expert[0]), as_predictor(amateur[0])
    size = shared_vocabulary({"expert": strong, "amateur": weak}, vocab_size)
    if min_keep < 1:
        raise ConfigError(f"min_keep={min_keep} must be at least 1")
    if context not in ("last", "all"):
        raise ConfigError(f"context={context!r} must be 'last' or 'all'")
    return Contrastive(strong, weak, size, context, min_keep), ContrastiveParams(
        expert=expert[1],
        amateur=amateur[1],
        weight=number("weight", weight),
        temperature=positive("temperature", temperature),
        plausibility=share_of_best(plausibility),
    )
