"""Beam search, plain and diverse: one compiled loop in which all beams are rows of one batch."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.decoding.context import Context
from tokjax.decoding.engine import check_prompts
from tokjax.decoding.predictors import Predictor, StepOutput, as_predictor
from tokjax.decoding.prompts import Prompts, bucket
from tokjax.decoding.search.hypotheses import Beams, LengthPenalty, gnmt
from tokjax.decoding.stops import Stop, never
from tokjax.decoding.transforms import Transform, chain
from tokjax.decoding.transforms.base import check_transform, column, setting
from tokjax.errors import ConfigError
from tokjax.parallel.rules import constrain

EarlyStopping = Literal["never"] | bool

# A stop may end so many of a beam's best continuations and still leave it one to go on with.
_STOPPING = 8


@struct.dataclass
class _Loop:
    """What one turn of the loop hands to the next; R = B G W rows, W beams in each group."""

    context: Context
    out: StepOutput
    predictor: Any
    transform: Any
    logprobs: Float[Array, "R N"]
    scores: Float[Array, "B G W"]
    found: Beams  # [B G W ...]
    open: Bool[Array, "B G"]


@struct.dataclass
class _Settings:
    """The arrays that the search reads and never changes."""

    transform: Any
    stop: Any
    length_penalty: Any
    diversity: Any
    limits: Int[Array, "B"]


def beam_search(
    model: Any,
    params: Any,
    prompts: Prompts,
    *,
    max_new_tokens: Any,
    beams: int = 4,
    groups: int = 1,
    diversity: Any = 0.0,
    length_penalty: LengthPenalty | None = None,
    early_stopping: EarlyStopping = "never",
    transform: Transform | None = None,
    renormalize: bool = False,
    stop: Stop | None = None,
    num_return: int | None = None,
) -> Beams:
    """Returns the continuations of highest score that a beam search finds.

    At each token the `beams` best continuations of all beams go on; of those among the best that
    their stop ends, the best `beams` ever seen are kept. A score is the sum of log-probabilities
    over the length penalty. Costs one forward pass of `beams` rows a prompt and token; the pass
    over the prompt is shared. One program is compiled as in `decode`, and for each number of beams
    and groups; the values of penalty, diversity, transform and stop compile nothing.

    With groups, each is a beam search of its own with `beams / groups` beams. They take their
    tokens one behind the other, and a token that earlier groups have just taken c times costs
    diversity * c, which stays in the score.

    Args:
        model: a `Transformer`, an `EncoderDecoder`, or any `Predictor`.
        params: the model's parameters.
        prompts: what to continue.
        max_new_tokens: one number, or one for each prompt.
        beams: number of beams, of all groups together.
        groups: number of groups; must divide `beams`.
        diversity: one number, or one for each prompt; 0 or more.
        length_penalty: default `gnmt(0.6)`; `power(1.0)` is transformers' default.
        early_stopping: "never" goes on as long as a beam could still win: what it will have lost
            is unknown, so its score now is held against the worst kept one at the most favourable
            length. False holds it at the present length and may stop too early. True stops at
            `beams` finished continuations. (As in transformers.)
        transform: of the log-probabilities; a setting for each row needs one for each beam of each
            prompt. Scores are sums of what it returns, so it should not raise them above 0.
        renormalize: make what the transform returns log-probabilities again; else what it leaves
            keeps its value, and forbidden tokens only narrow the search.
        stop: what ends a continuation besides `max_new_tokens`; default nothing. (It sees each
            beam's 9 best continuations; should it end all of those, the beam ends.)
        num_return: how many of the `beams` found to return; default all.

    Raises:
        ConfigError: a setting is impossible; what `decode` refuses.
        DataError: a prompt's id is not in the model's vocabulary.

    Reference: diverse groups: Vijayakumar et al., "Diverse Beam Search", arXiv 1610.02424 (Hamming
    diversity).
    """
    predictor = as_predictor(model)
    prompts, limits = check_prompts(predictor, prompts, max_new_tokens)
    check = getattr(predictor, "check", None)
    if check is not None:
        check(params, prompts, limits)
    num_return = beams if num_return is None else num_return
    if beams < 1 or groups < 1 or beams % groups:
        raise ConfigError(f"groups={groups} must divide beams={beams}, and both be at least 1")
    if not 1 <= num_return <= beams:
        raise ConfigError(f"num_return={num_return} must be 1 to beams={beams}")
    if early_stopping != "never" and not isinstance(early_stopping, bool):
        raise ConfigError(f"early_stopping={early_stopping!r} must be True, False or 'never'")
    ok = lambda v: (v >= 0) & np.isfinite(v)  # noqa: E731
    settings = _Settings(
        transform=chain() if transform is None else transform,
        stop=never() if stop is None else stop,
        length_penalty=gnmt() if length_penalty is None else length_penalty,
        diversity=setting("diversity", diversity, np.float32, ok, "0 or more"),
        limits=limits,  # type: ignore[arg-type]
    )
    check_transform(settings.transform, prompts, limits, predictor.vocab_size)
    search = _Search(
        predictor,
        beams // groups,
        groups,
        min(1 if stop is None and transform is None else 1 + _STOPPING, predictor.vocab_size),
        str(early_stopping).lower(),
        renormalize,
    )
    return _run(search, bucket(int(np.max(limits))), num_return, params, prompts, settings)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(search, width, num_return, params, prompts, settings) -> Beams:
    predictor, W, G = search.predictor, search.width, search.groups
    prepared = predictor.prepare(params)
    state, out = predictor.init(prepared, prompts, prompts.tokens.shape[1] + width)
    B, R = prompts.tokens.shape[0], prompts.tokens.shape[0] * W * G
    each = lambda a: jnp.repeat(a, W * G, axis=0)  # noqa: E731
    state, out, prompts = jax.tree.map(each, (state, out, prompts))
    last = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)[:, 0]
    nothing = jnp.full((B, G, W), -jnp.inf)
    loop = _Loop(
        context=Context(
            step=jnp.int32(0),
            last=last,
            generated=jnp.zeros((R, width), jnp.int32),
            done=jnp.zeros(R, bool),
            prompts=prompts,
            last_logprob=jnp.zeros(R, jnp.float32),
            limits=jnp.repeat(settings.limits, W * G),
        ),
        out=out,
        predictor=state,
        transform=settings.transform.init(prompts, predictor.vocab_size),
        logprobs=jnp.zeros((R, width), jnp.float32),
        # All beams are the same before the first token: one goes on.
        scores=nothing.at[:, :, 0].set(0.0),
        found=Beams(
            tokens=jnp.zeros((B, G, W, width), jnp.int32),
            lengths=jnp.zeros((B, G, W), jnp.int32),
            stopped=jnp.zeros((B, G, W), bool),
            scores=nothing,
            logprobs=jnp.zeros((B, G, W, width), jnp.float32),
        ),
        open=jnp.ones((B, G), bool),
    )

    def turn(loop: _Loop) -> _Loop:
        state, out = predictor.step(prepared, loop.predictor, loop.context.last)
        return search.take(settings, loop.replace(predictor=state, out=out))  # type: ignore[attr-defined]

    loop = jax.lax.while_loop(lambda loop: loop.open.any(), turn, search.take(settings, loop))
    together = jax.tree.map(lambda a: a.reshape(B, G * W, *a.shape[3:]), loop.found)
    # Whole on every device, so that each process of several can read it.
    return jax.tree.map(lambda a: constrain(a, (None,) * a.ndim), together.best(num_return))


def rows_of(tree: Any, rows: Int[Array, "R"], total: int) -> Any:
    """Returns the chosen rows of a state whose leaves have one of `total` rows, or several.

    Several a row lie one whole set of rows behind the other.
    """

    def of(a: jax.Array) -> jax.Array:
        several = a.shape[0] // total
        if several == 1:
            return a[rows]
        sets = a.reshape(several, total, *a.shape[1:])[:, rows]
        return sets.reshape(several * rows.shape[0], *a.shape[1:])

    return jax.tree.map(of, tree)


@dataclass(frozen=True)
class _Search:
    """The structure of a search: what a compiled program is made for.

    Attributes:
        predictor: where log-probabilities come from.
        width: beams of a group.
        groups: number of groups.
        spread: how many continuations of each beam a group looks at.
        early_stopping: "never", "false" or "true".
        renormalize: whether transformed log-probabilities are made ones again.
    """

    predictor: Predictor
    width: int
    groups: int
    spread: int
    early_stopping: str
    renormalize: bool

    def take(self, settings: _Settings, loop: _Loop) -> _Loop:
        """Returns the loop with one more token in each beam."""
        W, G, context = self.width, self.groups, loop.context
        R, V = loop.out.logits.shape
        B = R // (W * G)
        logits = loop.out.logits.astype(jnp.float32)
        before = context.replace(logits=logits, signals=loop.out.signals)  # type: ignore[attr-defined]
        logp = jax.nn.log_softmax(logits, axis=-1)
        changed, transform = settings.transform.update(logp, loop.transform, before)
        if self.renormalize:
            changed = jax.nn.log_softmax(changed, axis=-1)
        added = changed.reshape(B, G, W, V)

        taken, parents, tokens, scores, found = jnp.zeros((B, V)), [], [], [], []
        for g in range(G):
            cost = column(settings.diversity) * taken
            total = loop.scores[:, g, :, None] + added[:, g] - cost[:, None]
            best, at = jax.lax.top_k(total.reshape(B, W * V), W * self.spread)
            first = jnp.arange(B)[:, None] * (G * W) + g * W
            candidates = _Candidates(best, first + at // V, (at % V).astype(jnp.int32), logp)
            ended = candidates.ended(settings, transform, before)
            found.append(self._finished(settings, loop, g, candidates, ended))
            going, order = jax.lax.top_k(jnp.where(ended, -jnp.inf, best), W)
            parents.append(jnp.take_along_axis(candidates.rows, order, axis=1))
            tokens.append(jnp.take_along_axis(candidates.tokens, order, axis=1))
            scores.append(going)
            counted = jnp.isfinite(going) & loop.open[:, g, None]
            taken = taken.at[jnp.arange(B)[:, None], tokens[-1]].add(counted)

        rows, new = (jnp.stack(each, axis=1).reshape(R) for each in (parents, tokens))
        likely, step = logp[rows, new], context.step
        loop = loop.replace(  # type: ignore[attr-defined]
            context=context.replace(  # type: ignore[attr-defined]
                step=step + 1,
                last=new,
                generated=context.generated[rows].at[:, step].set(new),
                last_logprob=likely,
            ),
            predictor=rows_of(loop.predictor, rows, R),
            transform=rows_of(transform, rows, R),
            logprobs=loop.logprobs[rows].at[:, step].set(likely),
            scores=jnp.stack(scores, axis=1),
            found=jax.tree.map(lambda *each: jnp.stack(each, axis=1), *found),
        )
        is_open = loop.open & self._promising(settings, loop)
        done = jnp.repeat(~is_open, W, axis=1).reshape(R)
        return loop.replace(  # type: ignore[attr-defined]
            open=is_open,
            context=loop.context.replace(done=done),  # type: ignore[attr-defined]
        )

    def _finished(
        self,
        settings: _Settings,
        loop: _Loop,
        g: int,
        candidates: "_Candidates",
        ended: Bool[Array, "B M"],
    ) -> Beams:
        """Returns the best of what the group had found and what now ends among its W best."""
        W, step = self.width, loop.context.step
        limit = step + 1 >= settings.limits[:, None]
        new = candidates.first(W).texts(loop.context.generated, loop.logprobs, step)
        counts = (ended[:, :W] | limit) & loop.open[:, g, None]
        divisor = settings.length_penalty((step + 1.0) * jnp.ones(limit.shape[0]))
        new = new.replace(  # type: ignore[attr-defined]
            stopped=ended[:, :W],
            scores=jnp.where(counts, new.scores / divisor[:, None], -jnp.inf),
        )
        empty = jnp.isneginf(new.scores)
        new = new.replace(  # type: ignore[attr-defined]
            lengths=jnp.where(empty, 0, new.lengths),
            stopped=new.stopped & ~empty,
            tokens=jnp.where(empty[..., None], 0, new.tokens),
            logprobs=jnp.where(empty[..., None], 0, new.logprobs),
        )
        old = jax.tree.map(lambda a: a[:, g], loop.found)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), old, new)
        return both.best(W)

    def _promising(self, settings: _Settings, loop: _Loop) -> Bool[Array, "B G"]:
        """Returns which groups may still find something better."""
        limits = settings.limits
        length = loop.context.step * jnp.ones(limits.shape)
        divisor = settings.length_penalty(length)
        if self.early_stopping == "never":
            divisor = jnp.maximum(divisor, settings.length_penalty(1.0 * limits))
        worst = loop.found.scores[..., -1]
        better = loop.scores[..., 0] / divisor[:, None] > worst
        if self.early_stopping == "true":
            better &= jnp.isneginf(worst)
        return better & (loop.context.step < limits)[:, None]


@struct.dataclass
class _Candidates:
    """Continuations of a group's beams by one token, best first: of which row, and by which token.

    `logp` are the log-probabilities of all rows.
    """

    scores: Float[Array, "B M"]
    rows: Int[Array, "B M"]
    tokens: Int[Array, "B M"]
    logp: Float[Array, "R V"]

    def first(self, count: int) -> "_Candidates":
        return _Candidates(
            self.scores[:, :count], self.rows[:, :count], self.tokens[:, :count], self.logp
        )

    def ended(self, settings: _Settings, state: Any, before: Context) -> Bool[Array, "B M"]:
        """Returns which of them their stop or the transform ends, whose state is given."""
        rows, tokens = self.rows.reshape(-1), self.tokens.reshape(-1)
        mine = partial(jax.tree.map, lambda a: a[rows])
        after = before.replace(  # type: ignore[attr-defined]
            step=before.step + 1,
            last=tokens,
            generated=before.generated[rows].at[:, before.step].set(tokens),
            done=before.done[rows],
            prompts=mine(before.prompts),
            last_logprob=self.logp[rows, tokens],
            logits=mine(before.logits),
            signals=mine(before.signals),
            limits=mine(before.limits),
        )
        ended = settings.stop(after)
        if hasattr(settings.transform, "ends"):
            own = rows_of(state, rows, self.logp.shape[0])
            ended |= settings.transform.ends(own, after)
        return ended.reshape(self.rows.shape)

    def texts(
        self, generated: Int[Array, "R N"], logprobs: Float[Array, "R N"], step: Int[Array, ""]
    ) -> Beams:
        """Returns the whole continuations."""
        likely = self.logp[self.rows, self.tokens]
        return Beams(
            tokens=generated[self.rows].at[:, :, step].set(self.tokens),
            lengths=jnp.full(self.rows.shape, step + 1),
            stopped=jnp.zeros(self.rows.shape, bool),
            scores=self.scores,
            logprobs=logprobs[self.rows].at[:, :, step].set(likely),
        )
