"""Budget Guidance: thinking is steered towards an end within a number of tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.decoding.budget.gamma import Reliability, guided_logits
from tokjax.decoding.budget.predictor import LengthPredictor
from tokjax.decoding.context import Context
from tokjax.decoding.predictors import ModelPredictor, StepOutput
from tokjax.decoding.prompts import Prompts
from tokjax.decoding.transforms.base import Memoryless, Transform, setting
from tokjax.errors import ConfigError
from tokjax.models import parameters
from tokjax.models.cache import Cache
from tokjax.models.transformer import Output, Transformer

GUIDED, BUDGET, RELIABLE = "guided", "budget", "reliable"  # names of signals
PAPER = Reliability()


@struct.dataclass
class BudgetGuidedParams:
    """What Budget Guidance decodes from.

    Attributes:
        model: parameters of the language model.
        predictor: parameters of the length predictor.
        budget: tokens of thinking, one number or one for each prompt; 0 or less is no guidance.
        think_end: id of `</think>`.
        breaks: tokens behind which guidance acts.
        reliability: the filter.
    """

    model: Any
    predictor: Any
    budget: Float[Array, "*B"]
    think_end: Int[Array, ""]
    breaks: Bool[Array, "V"]
    reliability: Reliability


@struct.dataclass
class BudgetState:
    """Where each row is.

    Attributes:
        cache: of the language model.
        left: budget of the next token, it included; 0 or less in rows without guidance.
        thinking: rows that have not yet written `</think>`.
    """

    cache: Cache
    left: Float[Array, "B"]
    thinking: Bool[Array, "B"]


@dataclass(frozen=True)
class BudgetGuided:
    """A model's predictions, at some steps times the chance to finish thinking in time.

    Costs one forward pass a token. At steps where any row is guided also the length predictor:
    `linear` two more output heads, `encoder` besides these its pass over the L + 2 states of each
    row; and the Gamma's distribution function over the vocabulary.

    Signals: `guided` says whether guidance acted, `budget` what it counted with, `reliable` how
    many tokens passed the filter there (0: the likeliest was taken).

    Attributes:
        model: the language model.
        predictor: the length predictor.
    """

    model: Transformer
    predictor: LengthPredictor

    @property
    def _plain(self) -> ModelPredictor:
        return ModelPredictor(self.model)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._plain.vocab_size

    @property
    def max_positions(self) -> int:
        """Longest sequence, prompt and new tokens together."""
        return self._plain.max_positions

    def check(self, params: BudgetGuidedParams, prompts: Prompts, limits: np.ndarray) -> None:
        """Refuses budgets of another number than there are prompts.

        Raises:
            ConfigError: they do not fit.
        """
        del limits
        shape, rows = np.shape(params.budget), len(prompts.lengths)
        if shape not in ((), (rows,)):
            raise ConfigError(f"{shape[0]} budgets for {rows} prompts: give one, or {rows}")

    def prepare(self, params: BudgetGuidedParams) -> BudgetGuidedParams:
        """Returns the parameters with both networks' in the form that they are read fastest."""
        predictor = dict(params.predictor)
        if "encoder" in predictor:
            predictor["encoder"] = parameters.unstack(predictor["encoder"])
        return params.replace(  # type: ignore[attr-defined]
            model=self._plain.prepare(params.model), predictor=predictor
        )

    def init(
        self, prepared: BudgetGuidedParams, prompts: Prompts, capacity: int
    ) -> tuple[BudgetState, StepOutput]:
        """Returns the state behind the prompts and what is said of the first new token."""
        at = (prompts.lengths - 1)[:, None, None]
        of_last = lambda x: jnp.take_along_axis(x, at, axis=1)  # noqa: E731
        cache, out = self._plain.prefill(
            prepared.model,
            prompts,
            capacity,
            capture=dict.fromkeys(self.predictor.capture, of_last),
        )
        last = Output(of_last(out.x), None, out.captured)
        everywhere = jnp.ones(prompts.lengths.shape, bool)
        left = jnp.broadcast_to(prepared.budget, everywhere.shape).astype(jnp.float32)
        return self._said(prepared, last, BudgetState(cache, left, everywhere), everywhere)

    def step(
        self, prepared: BudgetGuidedParams, state: BudgetState, tokens: Int[Array, "B"]
    ) -> tuple[BudgetState, StepOutput]:
        """Returns the state behind one more token a row, and what is said of the next one."""
        embedded = self.model.embed(prepared.model, tokens[:, None])
        out = self.model.backbone(
            prepared.model, embedded, cache=state.cache, capture={*self.predictor.capture}
        )
        assert out.cache is not None
        left = jnp.where(state.left > 0, jnp.maximum(state.left - 1, 1.0), state.left)
        thinking = state.thinking & (tokens != prepared.think_end)
        state = BudgetState(out.cache, left, thinking)
        return self._said(prepared, out, state, prepared.breaks[tokens])

    def _said(
        self,
        prepared: BudgetGuidedParams,
        out: Output,
        state: BudgetState,
        at_break: Bool[Array, "B"],
    ) -> tuple[BudgetState, StepOutput]:
        logits = self._plain.logits(prepared.model, out.x)[:, 0].astype(jnp.float32)
        guided = state.thinking & at_break & (state.left > 0)

        def steered() -> tuple[jax.Array, jax.Array]:
            alpha, rate = self.predictor(prepared.predictor, self.predictor.states(out)[:, 0])
            steered = guided_logits(logits, state.left, alpha, rate, prepared.reliability)
            reliable = prepared.reliability.passed(alpha, rate).sum(-1)
            return jnp.where(guided[:, None], steered, logits), jnp.where(guided, reliable, 0)

        nobody = jnp.zeros(guided.shape, jnp.int32)
        logits, reliable = jax.lax.cond(guided.any(), steered, lambda: (logits, nobody))
        signals = {GUIDED: guided, BUDGET: state.left, RELIABLE: reliable}
        return state, StepOutput(logits, signals)


def budget_guided(
    model: Transformer,
    params: Any,
    predictor: LengthPredictor,
    weights: Mapping[str, Any],
    *,
    budget: Any,
    think_end: int,
    breaks: Any,
    reliability: Reliability | None = PAPER,
) -> tuple[BudgetGuided, BudgetGuidedParams]:
    """Returns the predictor of Budget Guidance and its parameters, for `decode`.

    At a guided step the logits are those of p(x) Pr(no more than b tokens of thinking are left,
    x included), where b starts at `budget` and falls by one with each token, down to 1; all other
    steps are the plain model's. Guided are the first new token and those behind a token of
    `breaks`, until `</think>` is written. A token whose prediction the filter rejects has
    probability 0 there; where that leaves none, the model's likeliest is taken.

    Transforms given to `decode` apply to these logits too. In the paper's code they do not at
    guided steps: put `raw_at_guided_steps()` last in the chain.

    Costs one forward pass a token, and at guided steps the length predictor.

    Args:
        model: the language model.
        params: its parameters.
        predictor: the length predictor, from `train_predictor` or `load`.
        weights: its parameters.
        budget: tokens of thinking, `</think>` included: a whole number or one for each prompt; 0
            or less does not guide, infinity leaves only the filter.
        think_end: id of `</think>`.
        breaks: [V], tokens behind which a paragraph begins; see `newline_tokens`.
        reliability: the filter; None is none.

    Raises:
        ConfigError: a setting is impossible, or the predictor was made for another model.

    Reference: Li et al., "Steering LLM Thinking with Budget Guidance", arXiv 2506.13752.
    """
    predictor.check(model.config)
    size = model.config.vocabulary
    if not 0 <= think_end < size:
        raise ConfigError(f"think_end={think_end} must be an id of the model's, 0 to {size - 1}")
    table = np.asarray(breaks)
    if table.shape != (size,) or table.dtype != bool:
        raise ConfigError(
            f"breaks must be {size} booleans, one for each id, not {table.dtype} {table.shape}: "
            f"see newline_tokens"
        )
    ok = lambda v: np.floor(v) == v  # noqa: E731 (infinity is whole, NaN is not)
    return BudgetGuided(model, predictor), BudgetGuidedParams(
        model=params,
        predictor=weights,
        budget=setting("budget", budget, np.float32, ok, "a whole number of tokens, or infinity"),
        think_end=np.int32(think_end),  # type: ignore[arg-type]
        breaks=table,  # type: ignore[arg-type]
        reliability=Reliability.of(reliability),
    )


@struct.dataclass
class _RawAtGuidedSteps(Memoryless):
    def update(
        self, logits: Float[Array, "B V"], state: tuple[()], context: Context
    ) -> tuple[Float[Array, "B V"], tuple[()]]:
        if GUIDED not in context.signals or context.logits is None:
            raise ConfigError(
                "raw_at_guided_steps reads what the predictor of `budget_guided` says: give decode "
                "that predictor"
            )
        return jnp.where(context.signals[GUIDED][:, None], context.logits, logits), state


def raw_at_guided_steps() -> Transform:
    """Returns the transform that undoes those before it at guided steps: the last of a chain.

    `decode(*budget_guided(...), prompts, transform=chain(temperature(0.6), top_p(0.95),
    raw_at_guided_steps()), ...)` samples as the paper's code does: neither temperature nor
    truncation where guidance acts. Without it they apply there too, to the guided distribution.

    Reference: the code of Li et al., arXiv 2506.13752.
    """
    return _RawAtGuidedSteps()
