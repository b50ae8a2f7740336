"""The compiled loop of blocks: one side drafts, the other judges, both take back what is rejected.

A row advances by what it accepts, whatever the rows beside it do. All rows are in the same block at
the same time, so that a row's randomness is that of its own key and its own block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.decoding.context import Context
from tokjax.decoding.engine import Generation
from tokjax.decoding.prompts import Prompts
from tokjax.decoding.samplers import Categorical, Greedy, Sampler
from tokjax.decoding.speculative.blocks import BlockPredictor, Written, read
from tokjax.decoding.speculative.drafters import Drafter
from tokjax.decoding.speculative.verify import speculative_verify
from tokjax.decoding.stops import Stop
from tokjax.decoding.transforms.base import Chain, Stateless, Transform
from tokjax.decoding.transforms.truncation import entropy
from tokjax.errors import ConfigError
from tokjax.parallel.rules import constrain

Swap = Literal["always", "never", "once"]


@struct.dataclass(kw_only=True)
class SpeculativeGeneration(Generation):
    """New tokens, and how many of them were drafts that stood.

    `sampling_logprobs` are those of the target's filtered law; with an exact rule the text follows
    it. In the last block of a row, drafts behind its end are not counted.

    Attributes:
        blocks: passes of the target behind the prompt, of each row.
        accepted: drafted tokens that stood, of each block; zeros behind a row's last block.
        tested: drafted tokens that were decided on, of each block: those that stood, and a
            rejected one if there is.
    """

    blocks: Int[Array, "B"]
    accepted: Int[Array, "B N"]
    tested: Int[Array, "B N"]

    @property
    def acceptance_rate(self) -> Float[Array, "B"]:
        """Share of tested drafts that stood; 0 where none was tested."""
        tested = self.tested.sum(1)
        return self.accepted.sum(1) / jnp.maximum(tested, 1)

    @property
    def tokens_per_pass(self) -> Float[Array, "B"]:
        """New tokens for each pass of the target; plain decoding has 1."""
        return self.lengths / self.blocks

    @property
    def block_of_token(self) -> Int[Array, "B N"]:
        """Which block wrote each token, from 0."""
        ends = jnp.cumsum(self.accepted + 1, axis=1)
        places = jnp.arange(self.tokens.shape[1])
        return (ends[:, None, :] <= places[:, None]).sum(-1)


@struct.dataclass
class Side:
    """One of the two that write together: its prompts, and its state behind them."""

    prompts: Prompts
    state: Any


@struct.dataclass
class Rules:
    """What a text is written by, the same for both sides."""

    transform: Any
    sampler: Any
    acceptance: Any
    stop: Any
    keys: Any
    limits: Any


@struct.dataclass
class _Loop:
    """What one block hands to the next."""

    block: Int[Array, ""]
    drafting: Side
    judging: Side
    done: Bool[Array, "B"]
    found: SpeculativeGeneration


def check_rules(transform: Transform, sampler: Sampler, gamma: Any) -> None:
    """Refuses what cannot be applied to several tokens at once.

    Raises:
        ConfigError: a transform that depends on the text; a sampler of another kind; no gamma.
    """
    if isinstance(gamma, bool) or not isinstance(gamma, int) or gamma < 1:
        raise ConfigError(f"gamma={gamma!r} must be an integer, 1 or more")
    if not isinstance(sampler, Greedy | Categorical):
        raise ConfigError(
            f"sampler={type(sampler).__name__} must be greedy() or categorical(): drafts are "
            f"verified against the law that it draws from"
        )
    for each in transform.transforms if isinstance(transform, Chain) else (transform,):
        if isinstance(each, Chain):
            check_rules(each, sampler, gamma)
        elif not isinstance(each, Stateless):
            raise ConfigError(
                f"transform {type(each).__name__} depends on the text so far: speculative decoding "
                f"takes those of logits alone (temperature, top_k, top_p, min_p, typical, epsilon, "
                f"eta, logit_bias, suppress); use decode"
            )


def write(
    drafter: Drafter,
    judge: BlockPredictor,
    prepared: tuple[Any, Any],
    sides: tuple[Side, Side],
    rules: Rules,
    *,
    width: int,
    gamma: int,
    lag: int,
    swap: Swap = "never",
) -> SpeculativeGeneration:
    """Returns new tokens behind both sides' prompts.

    Args:
        drafter: of the side that drafts.
        judge: of the side that judges.
        prepared: parameters of both.
        sides: the one that drafts the first block, and the one that judges it.
        rules: what the text is written by.
        width: of the returned rows.
        gamma: drafted tokens of a block.
        lag: most tokens that the judging side may be behind.
        swap: after which blocks the sides exchange what they do; both then have one state's form.
    """
    B = sides[0].prompts.tokens.shape[0]
    ids, numbers = jnp.zeros((B, width), jnp.int32), jnp.zeros((B, width), jnp.float32)
    none, nobody = jnp.zeros(B, jnp.int32), jnp.zeros(B, bool)
    found = SpeculativeGeneration(
        tokens=ids,
        lengths=none,
        stopped=nobody,
        logprobs=numbers,
        sampling_logprobs=numbers,
        entropies=numbers,
        blocks=none,
        accepted=ids,
        tested=ids,
    )
    context_prompts = sides[1].prompts

    def turn(loop: _Loop, exchange: bool = swap == "always") -> _Loop:
        found, done = loop.found, loop.done
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(rules.keys, loop.block)
        keys = jax.vmap(jax.random.split)(keys)
        drafting, draft = drafter.propose(
            prepared[0],
            loop.drafting.state,
            Written(loop.drafting.prompts, found.tokens, found.lengths),
            gamma,
            partial(_take, rules, keys[:, 0]),
        )
        judging, logits = read(
            judge,
            prepared[1],
            loop.judging.state,
            Written(loop.judging.prompts, found.tokens, found.lengths),
            draft.tokens,
            lag,
        )
        logits = logits.astype(jnp.float32)
        laws = jax.vmap(partial(_law, rules), in_axes=1, out_axes=1)(logits)
        verdict = speculative_verify(
            keys[:, 1],
            laws,
            certain(draft.tokens, laws.shape[-1]) if draft.logprobs is None else draft.logprobs,
            draft.tokens,
            acceptance=rules.acceptance,
            # One token follows the accepted ones, so that none is cut off at the limit.
            proposed=jnp.minimum(draft.proposed, rules.limits - found.lengths - 1),
        )
        found, done = _append(
            rules, context_prompts, found, done, loop.block, verdict, logits, laws
        )
        next_drafting = Side(loop.drafting.prompts, drafting)
        next_judging = Side(loop.judging.prompts, judging)
        if exchange:
            next_drafting, next_judging = next_judging, next_drafting
        return _Loop(loop.block + 1, next_drafting, next_judging, done, found)

    loop = _Loop(jnp.int32(0), sides[0], sides[1], nobody, found)
    if swap == "once":
        loop = turn(loop, exchange=True)
    loop = jax.lax.while_loop(lambda loop: ~loop.done.all(), turn, loop)
    # Whole on every device, so that each process of several can read it.
    return jax.tree.map(lambda a: constrain(a, (None,) * a.ndim), loop.found)


def certain(tokens: Int[Array, "*B"], vocab_size: int) -> Float[Array, "*B V"]:
    """Returns the log-probabilities of distributions with all mass on one token."""
    return jnp.where(jnp.arange(vocab_size) == tokens[..., None], 0.0, -jnp.inf)


def _law(rules: Rules, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Returns the log-probabilities by which a token is taken."""
    filtered = _filtered(rules.transform, logits)
    if isinstance(rules.sampler, Greedy):
        return certain(jnp.argmax(filtered, axis=-1), logits.shape[-1])
    return jax.nn.log_softmax(filtered, axis=-1)


def _filtered(transform: Any, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    if not isinstance(transform, Chain):
        return transform.apply(logits)
    for each in transform.transforms:
        logits = _filtered(each, logits)
    return logits


def _take(rules: Rules, keys: jax.Array, logits: Float[Array, "B V"], index: Any):
    """Returns a draft's next tokens and the log-probabilities they were drawn with."""
    law = _law(rules, logits.astype(jnp.float32))
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
    return rules.sampler(keys, law)[0], law


def _append(rules, prompts, found: SpeculativeGeneration, done, block, verdict, logits, laws):
    """Returns what is found with a block's tokens, up to where a row ends, and which rows do."""
    rows = jnp.arange(done.shape[0])
    at, width = jnp.arange(verdict.tokens.shape[1]), found.tokens.shape[1]
    active = ~done

    def put(buffer: jax.Array, values: jax.Array, count: jax.Array) -> jax.Array:
        shown = (at < count[:, None]) & active[:, None]
        places = jnp.where(shown, found.lengths[:, None] + at, width)
        return buffer.at[rows[:, None], places].set(values.astype(buffer.dtype), mode="drop")

    def chosen(logprobs: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logprobs, verdict.tokens[..., None], axis=-1)[..., 0]

    own = jax.nn.log_softmax(logits, axis=-1)
    logprobs, count = chosen(own), verdict.accepted + 1
    whole = put(found.tokens, verdict.tokens, count)
    texts = prompts, whole, rules.limits
    ends = _stops(rules.stop, texts, found.lengths, verdict.tokens, logits, logprobs)
    ends &= (at < count[:, None]) & active[:, None]
    stopped = ends.any(1)
    count = jnp.where(stopped, jnp.argmax(ends, axis=1) + 1, count)
    lengths = found.lengths + jnp.where(active, count, 0)
    logged = partial(jnp.where, active)
    found = found.replace(  # type: ignore[attr-defined]
        tokens=put(found.tokens, verdict.tokens, count),
        lengths=lengths,
        stopped=found.stopped | stopped,
        logprobs=put(found.logprobs, logprobs, count),
        sampling_logprobs=put(found.sampling_logprobs, chosen(laws), count),
        entropies=put(found.entropies, entropy(own), count),
        blocks=found.blocks + active,
        accepted=found.accepted.at[:, block].set(logged(jnp.minimum(verdict.accepted, count), 0)),
        tested=found.tested.at[:, block].set(logged(jnp.minimum(verdict.tested, count), 0)),
    )
    return found, done | stopped | (lengths >= rules.limits)


def _stops(
    stop: Stop,
    texts: tuple[Prompts, Int[Array, "B N"], Int[Array, "B"]],
    before: Int[Array, "B"],
    tokens: Int[Array, "B C"],
    logits: Float[Array, "B C V"],
    logprobs: Float[Array, "B C"],
) -> Bool[Array, "B C"]:
    """Returns at which tokens of a block a stop ends each row.

    A context has one step for all rows, and rows advance at different speeds here: each gets a
    context of its own. (Texts are prompts, new tokens and limits.)
    """

    def behind_token(of_row, step, token, logits, logprob):
        prompt, generated, limit = jax.tree.map(lambda a: a[None], of_row)
        ended = stop(
            Context(
                step=step,
                last=token[None],
                generated=generated,
                done=jnp.zeros(1, bool),
                prompts=prompt,
                last_logprob=logprob[None],
                logits=logits[None],
                limits=limit,
            )
        )
        if ended.shape != (1,):
            raise ConfigError(
                f"stop {type(stop).__name__} says {ended.shape} of one row: in speculative "
                f"decoding a stop cannot have settings for each row"
            )
        return ended[0]

    along_block: Callable = jax.vmap(behind_token, in_axes=(None, 0, 0, 0, 0))
    steps = before[:, None] + 1 + jnp.arange(tokens.shape[1])
    return jax.vmap(along_block)(texts, steps, tokens, logits, logprobs)
