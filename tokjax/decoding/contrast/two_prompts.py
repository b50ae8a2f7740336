"""One model behind two different prompts, the same new tokens behind both."""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax import struct
from tokjax.decoding.contrast.combine import contrast, log_probabilities, plausible, restrict
from tokjax.decoding.contrast.settings import of_rows
from tokjax.decoding.engine import check_prompts
from tokjax.decoding.predictors import Predictor, StepOutput
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError


@struct.dataclass
class TwoPromptsParams:
    """What a contrast of two prompts decodes from.

    Attributes:
        model: parameters of the model.
        other: the other prompts, one for each row or one for all; None takes the last token of
            each prompt alone.
        alpha: the logits are expert + alpha (expert - amateur), in log-probabilities.
        plausibility: least probability of a token over that of the likeliest, by the expert.
    """

    model: Any
    other: Prompts | None
    alpha: Float[Array, "*B"]
    plausibility: Float[Array, "*B"]


@dataclass(frozen=True)
class TwoPrompts:
    """Contrast of one model's predictions behind two prompts, ragged and of different lengths.

    Costs two rows of one forward pass a token: both prompts of a row are rows of one batch of 2 B,
    with a cache and positions each.

    Attributes:
        model: any predictor whose parameters are not of single rows.
        expert: whose predictions count for: those behind the prompts given to `decode`, or
            behind the other ones.
    """

    model: Predictor
    expert: Literal["prompts", "other"] = "prompts"

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.model.vocab_size

    @property
    def max_positions(self) -> int:
        """Longest sequence, prompt and new tokens together."""
        return self.model.max_positions

    def check(self, params: TwoPromptsParams, prompts: Prompts, limits: np.ndarray) -> None:
        """Refuses other prompts that are too many, too few, too long or of another vocabulary.

        Raises:
            ConfigError: other prompts that do not fit.
            DataError: one of their ids is not in the vocabulary.
        """
        if params.other is None:
            return
        rows, others = len(prompts.lengths), len(params.other.lengths)
        if others not in (1, rows):
            raise ConfigError(f"{others} other prompts for {rows} prompts: give one, or {rows}")
        limit = int(limits.max()) if others == 1 else limits
        try:
            check_prompts(self.model, params.other, limit)
        except ValueError as error:
            raise type(error)(f"of the other prompts: {error}") from error

    def prepare(self, params: TwoPromptsParams) -> TwoPromptsParams:
        """Returns the parameters with the model's in the form that it reads fastest."""
        return params.replace(model=self.model.prepare(params.model))  # type: ignore[attr-defined]

    def init(
        self, prepared: TwoPromptsParams, prompts: Prompts, capacity: int
    ) -> tuple[Any, StepOutput]:
        """Returns the state behind both prompts, and what is said of the first new token."""
        other = _last_token(prompts) if prepared.other is None else prepared.other
        both = stacked(prompts, other)
        longer = both.tokens.shape[1] - prompts.tokens.shape[1]
        state, out = self.model.init(prepared.model, both, capacity + longer)
        return state, self._combined(prepared, out)

    def step(
        self, prepared: TwoPromptsParams, state: Any, tokens: Int[Array, "B"]
    ) -> tuple[Any, StepOutput]:
        """Returns the state behind one more token of both, and what is said of the next one."""
        state, out = self.model.step(prepared.model, state, jnp.concatenate([tokens, tokens]))
        return state, self._combined(prepared, out)

    def _combined(self, prepared: TwoPromptsParams, out: StepOutput) -> StepOutput:
        expert, amateur = jnp.split(log_probabilities(out.logits), 2)
        if self.expert == "other":
            expert, amateur = amateur, expert
        rows = expert.shape[0]
        scores = contrast(expert, amateur, of_rows(prepared.alpha, rows))
        kept = plausible(expert, of_rows(prepared.plausibility, rows))
        return StepOutput(restrict(scores, kept))


def stacked(first: Prompts, second: Prompts) -> Prompts:
    """Returns the rows of both, one behind the other; one row of `second` stands for all."""
    B = first.tokens.shape[0]
    width = max(first.tokens.shape[1], second.tokens.shape[1])

    def padded(prompts: Prompts) -> jnp.ndarray:
        tokens = jnp.broadcast_to(prompts.tokens, (B, prompts.tokens.shape[1]))
        return jnp.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))

    lengths = jnp.concatenate([first.lengths, jnp.broadcast_to(second.lengths, (B,))])
    return Prompts(jnp.concatenate([padded(first), padded(second)]), lengths)


def _last_token(prompts: Prompts) -> Prompts:
    last = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)
    return Prompts(last, jnp.ones_like(prompts.lengths))
