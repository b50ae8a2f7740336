"""Thinking on: a thinking token where the reasoning would end, while the budget lasts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from tokjax import struct
from tokjax.decoding.context import Context
from tokjax.decoding.contrast.settings import of_rows
from tokjax.decoding.engine import Generation, decode
from tokjax.decoding.predictors import Predictor, StepOutput, as_predictor
from tokjax.decoding.prompts import Prompts
from tokjax.decoding.samplers import Sampler
from tokjax.decoding.transforms import Transform
from tokjax.decoding.transforms.base import setting, slots
from tokjax.errors import ConfigError

_UNLIMITED = np.iinfo(np.int32).max


@struct.dataclass
class MoreThinkingParams:
    """What thinking on is decoded from; numbers are one, or one for each prompt.

    Attributes:
        inner: parameters of the predictor that is made to think on.
        ends: ids that end the reasoning, -1 for none.
        thinking: ids appended in turn; those from `thinking_count` on mean nothing.
        thinking_count: number of them.
        cue: ids that ask for the answer; those from `cue_count` on mean nothing.
        cue_count: number of them.
        base_budget: most tokens before a thinking token is appended.
        token_budget: most tokens of all the reasoning.
        appends: most thinking tokens appended.
        answer_tokens: most tokens behind the cue.
    """

    inner: Any
    ends: Int[Array, "E"]
    thinking: Int[Array, "K"]
    thinking_count: Int[Array, ""]
    cue: Int[Array, "C"]
    cue_count: Int[Array, ""]
    base_budget: Int[Array, "*B"]
    token_budget: Int[Array, "*B"]
    appends: Int[Array, "*B"]
    answer_tokens: Int[Array, "*B"]

    def more(self, written: jax.Array, appended: jax.Array) -> Bool[Array, "B"]:
        """Returns the rows with room for a thinking token and a token behind it."""
        rows = written.shape[0]
        return (written + 1 < of_rows(self.token_budget, rows)) & (
            appended < of_rows(self.appends, rows)
        )

    def over(self, written: jax.Array, segment: jax.Array, appended: jax.Array) -> Bool[Array, "B"]:
        """Returns the rows whose reasoning must not go on."""
        rows = written.shape[0]
        spent = (appended > 0) & (written >= of_rows(self.token_budget, rows))
        full = segment >= of_rows(self.base_budget, rows)
        return spent | (full & ~self.more(written, appended))

    def next_thinking(self, appended: jax.Array) -> Int[Array, "B"]:
        """Returns the thinking token whose turn it is."""
        return self.thinking[appended % self.thinking_count]


@struct.dataclass
class _State:
    inner: Any
    written: Int[Array, "B"]  # tokens of reasoning
    segment: Int[Array, "B"]  # of them since the last thinking token that was appended
    appended: Int[Array, "B"]
    cue_at: Int[Array, "B"]
    answering: Bool[Array, "B"]  # the cue has begun
    answered: Int[Array, "B"]  # tokens behind the cue
    forced: Bool[Array, "B"]  # whether the token that comes now was


@dataclass(frozen=True)
class MoreThinking:
    """A predictor whose reasoning is made to go on.

    Where an end of the reasoning is taken, the model reads another token in its place. Costs what
    the inner predictor does. `think_longer` decodes with it, and reads its signals:

    - answering: the cue has begun;
    - forced: the token is not the model's to choose;
    - instead: what is read in the place of an end of the reasoning, -1 where an end is one;
    - more: whether that is a thinking token (else it begins the cue);
    - final: the row ends with this token, unless it is an end that another takes the place of.

    Attributes:
        inner: the predictor.
    """

    inner: Predictor

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.inner.vocab_size

    @property
    def max_positions(self) -> int:
        """Longest sequence, prompt and new tokens together."""
        return self.inner.max_positions

    def check(self, params: MoreThinkingParams, prompts: Prompts, limits: np.ndarray) -> None:
        """Refuses settings for another number of prompts, and what the inner predictor refuses.

        Raises:
            ConfigError: they are.
        """
        rows = prompts.tokens.shape[0]
        for name in ("base_budget", "token_budget", "appends", "answer_tokens"):
            value = getattr(params, name)
            if np.ndim(value) and len(value) != rows:
                raise ConfigError(f"{name} has {len(value)} values for {rows} prompts")
        check = getattr(self.inner, "check", None)
        if check is not None:
            check(params.inner, prompts, limits)

    def prepare(self, params: MoreThinkingParams) -> MoreThinkingParams:
        """Returns the parameters with the inner ones prepared."""
        return params.replace(inner=self.inner.prepare(params.inner))  # type: ignore[attr-defined]

    def init(
        self, prepared: MoreThinkingParams, prompts: Prompts, capacity: int
    ) -> tuple[_State, StepOutput]:
        """Returns the state behind the prompts and what is said of the first new token."""
        inner, out = self.inner.init(prepared.inner, prompts, capacity)
        none = jnp.zeros(prompts.tokens.shape[0], jnp.int32)
        nowhere = none.astype(bool)
        state = _State(inner, none, none, none, none, nowhere, none, nowhere)
        return _directed(prepared, state, out)

    def step(
        self, prepared: MoreThinkingParams, state: _State, tokens: Int[Array, "B"]
    ) -> tuple[_State, StepOutput]:
        """Returns the state behind one more token a row, and what is said of the next one."""
        p = prepared
        ended = (tokens[:, None] == p.ends).any(-1) & ~state.forced & ~state.answering
        on = ended & p.more(state.written, state.appended)
        cued = ended & ~on & (p.cue_count > 0)
        fed = jnp.where(on, p.next_thinking(state.appended), jnp.where(cued, p.cue[0], tokens))
        reasoning = ~state.answering & ~cued
        inner, out = self.inner.step(p.inner, state.inner, fed)
        state = _State(
            inner=inner,
            written=state.written + reasoning,
            segment=jnp.where(on, 0, state.segment + reasoning),
            appended=state.appended + on,
            cue_at=jnp.where(cued, 1, state.cue_at),
            answering=state.answering | cued,
            answered=state.answered + (state.answering & ~state.forced),
            forced=state.forced,
        )
        return _directed(p, state, out)


def _directed(p: MoreThinkingParams, s: _State, out: StepOutput) -> tuple[_State, StepOutput]:
    """Returns the state and what is said, with the next token forced where it is not the model's
    to choose.
    """
    over = p.over(s.written, s.segment, s.appended)
    full = s.segment >= of_rows(p.base_budget, s.segment.shape[0])
    answering = s.answering | (over & (p.cue_count > 0))
    cueing = answering & (s.cue_at < p.cue_count)
    pushed = ~answering & full & ~over
    cue = p.cue[jnp.minimum(s.cue_at, p.cue.shape[0] - 1)]
    token = jnp.where(cueing, cue, p.next_thinking(s.appended))
    forced = cueing | pushed
    state = s.replace(  # type: ignore[attr-defined]
        segment=jnp.where(pushed, -1, s.segment),  # the pushed token is not one of its own segment
        appended=s.appended + pushed,
        cue_at=s.cue_at + cueing,
        answering=answering,
        forced=forced,
    )
    only = jnp.where(jnp.arange(out.logits.shape[-1]) == token[:, None], 0.0, -jnp.inf)
    last_answer = s.answered + 1 >= of_rows(p.answer_tokens, s.answered.shape[0])
    last_thought = p.over(state.written + 1, state.segment + 1, state.appended)
    more = p.more(state.written, state.appended)
    instead = jnp.where(
        more,
        p.next_thinking(state.appended),
        jnp.where(p.cue_count > 0, p.cue[0], -1),
    )
    signals = {
        "answering": answering,
        "forced": forced,
        "instead": jnp.where(answering | forced, -1, instead),
        "more": more,
        "final": jnp.where(answering, ~cueing & last_answer, (p.cue_count == 0) & last_thought),
    }
    logits = jnp.where(forced[:, None], only, out.logits.astype(jnp.float32))
    return state, StepOutput(logits, {**out.signals, **signals})


@struct.dataclass
class _Ends:
    """Which rows end with their latest token."""

    ends: Any

    def __call__(self, context: Context) -> Bool[Array, "B"]:
        signals, ended = context.signals, (context.last[:, None] == self.ends).any(-1)
        ended &= ~signals["forced"]
        return jnp.where(ended, signals["instead"] < 0, signals["final"])


@struct.dataclass
class _Read:
    """What the model reads as its latest token, and where that came from."""

    ends: Any
    what: str = struct.field(pytree_node=False)

    def __call__(self, context: Context) -> jax.Array:
        signals = context.signals
        replaced = (context.last[:, None] == self.ends).any(-1) & (signals["instead"] >= 0)
        if self.what == "tokens":
            return jnp.where(replaced, signals["instead"], context.last)
        if self.what == "appended":
            return replaced | signals["forced"]
        return signals["answering"] | (replaced & ~signals["more"])


@struct.dataclass
class Thoughts:
    """Reasoning that was made to go on, and the answers behind it.

    Attributes:
        generation: what the model read, its `tokens` with thinking tokens and cue in their places.
            Where one of them took the place of an end, `logprobs` holds that of the end; elsewhere
            0 for it.
        appended: tokens that the model did not choose.
        answering: tokens of the cue and the answer.
    """

    generation: Generation
    appended: Bool[Array, "B N"]
    answering: Bool[Array, "B N"]

    def reasoning(self) -> list[list[int]]:
        """Returns each row's reasoning, thinking tokens included (waits for the device)."""
        return self._rows(~self.answering)

    def answers(self) -> list[list[int]]:
        """Returns each row's tokens behind the cue (waits for the device)."""
        return self._rows(self.answering & ~self.appended)

    def _rows(self, chosen: jax.Array) -> list[list[int]]:
        kept = np.asarray(chosen & self.generation.mask)
        tokens = np.asarray(self.generation.tokens)
        return [row[own].tolist() for row, own in zip(tokens, kept, strict=True)]


def think_longer(
    model: Any,
    params: Any,
    prompts: Prompts,
    *,
    thinking: Sequence[int],
    ends: Sequence[int],
    base_budget: Any,
    token_budget: Any,
    cue: Sequence[int] = (),
    answer_tokens: Any = 16,
    appends: Any = None,
    samples: int = 1,
    transform: Transform | None = None,
    sampler: Sampler | None = None,
    seeds: Any = None,
    key: Any = None,
) -> Thoughts:
    """Returns texts in which a thinking token stands wherever the reasoning would have ended.

    The reasoning is written up to an end or `base_budget` tokens. While it has fewer than
    `token_budget` tokens, a thinking token is then appended, in the place of the end if there was
    one, and it goes on, again up to an end or `base_budget` tokens. Last, the cue is appended and
    the answer written. All of it is one compiled loop: rows think on and answer at their own times,
    nothing is read twice, and other budgets, tokens and cues compile nothing as long as the room
    for new tokens rounds to the same bucket.

    A `token_budget` up to the length of the first reasoning appends nothing. An end is told by its
    id; transforms also see the logits that force a token, and must not forbid it.

    Args:
        model: a `Transformer`, or any `Predictor` (for example of `recycling`).
        params: its parameters.
        prompts: what to continue.
        thinking: ids of thinking tokens, appended in turn; the paper takes one.
        ends: ids that end the reasoning, and the answer.
        base_budget: most tokens before a thinking token is appended; one number or one a prompt.
        token_budget: most tokens of all the reasoning; one number or one a prompt.
        cue: ids that ask for the final answer; of none, the text ends with its reasoning.
        answer_tokens: most tokens behind the cue; one number or one a prompt.
        appends: most thinking tokens appended, one number or one a prompt; the reference code
            appends 1, None as many as the budget allows.
        samples: continuations of each prompt.
        transform: of the logits.
        sampler: default greedy.
        seeds: as for `decode`.
        key: as for `decode`.

    Raises:
        ConfigError: an impossible setting, no thinking token, an id that the model does not have or
            that also ends the reasoning, or whatever `decode` refuses.

    Reference: "Demystifying Reasoning Dynamics with Mutual Information: Thinking Tokens are
    Information Peaks in LLM Reasoning", arXiv 2506.02867 (TTTS).
    """
    inner = as_predictor(model)
    _check_ids(inner.vocab_size, thinking=thinking, ends=ends, cue=cue)
    if not len(thinking):
        raise ConfigError("thinking has no ids: give at least one thinking token")
    both = sorted(set(ends) & {*thinking, *cue})
    if both:
        raise ConfigError(f"ids {both} would be appended, but they also end the reasoning")

    def count(name: str, value: Any, least: int) -> Any:
        wanted = f"an integer, {least} or above"
        return setting(name, value, np.int32, lambda v: v >= least, wanted)

    given = MoreThinkingParams(
        inner=params,
        ends=slots(list(ends), -1, np.int32),  # type: ignore[arg-type]
        thinking=slots(list(thinking), -1, np.int32),  # type: ignore[arg-type]
        thinking_count=np.int32(len(thinking)),  # type: ignore[arg-type]
        cue=slots(list(cue), -1, np.int32),  # type: ignore[arg-type]
        cue_count=np.int32(len(cue)),  # type: ignore[arg-type]
        base_budget=count("base_budget", base_budget, 1),
        token_budget=count("token_budget", token_budget, 0),
        appends=count("appends", _UNLIMITED if appends is None else appends, 0),
        answer_tokens=count("answer_tokens", answer_tokens, 1),
    )
    room = np.maximum(given.base_budget, given.token_budget)
    room = room + len(cue) + (given.answer_tokens if len(cue) else 0)
    ended = given.ends
    generation = decode(
        MoreThinking(inner),
        given,
        prompts,
        max_new_tokens=room,
        samples=samples,
        transform=transform,
        sampler=sampler,
        stop=_Ends(ended),
        seeds=seeds,
        key=key,
        record={what: _Read(ended, what) for what in ("tokens", "appended", "answering")},
    )
    recorded = dict(generation.recorded)
    tokens, appended, answering = (
        recorded.pop(name) for name in ("tokens", "appended", "answering")
    )
    read = generation.replace(tokens=tokens, recorded=recorded)  # type: ignore[attr-defined]
    return Thoughts(read, appended, answering)


def _check_ids(vocab_size: int, **given: Sequence[int]) -> None:
    for name, ids in given.items():
        wrong = [int(i) for i in ids if not 0 <= i < vocab_size]
        if wrong:
            raise ConfigError(f"{name} has ids {wrong}, but the model's are 0 to {vocab_size - 1}")
