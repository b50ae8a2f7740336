"""Decoding: one compiled pass over the prompts and one `lax.while_loop` over the new tokens."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from tokjax import struct
from tokjax.decoding.context import Context
from tokjax.decoding.predictors import Predictor, StepOutput, as_predictor
from tokjax.decoding.prompts import Prompts, bucket
from tokjax.decoding.samplers import Sampler, greedy, logprob_of
from tokjax.decoding.stops import Stop, never
from tokjax.decoding.streaming import Callback, receiver, send
from tokjax.decoding.transforms import Transform, chain
from tokjax.decoding.transforms.base import check_transform
from tokjax.decoding.transforms.truncation import entropy
from tokjax.errors import ConfigError, DataError
from tokjax.parallel.rules import constrain

Recorder = Callable[[Context], Shaped[Array, "B ..."]]


@struct.dataclass
class Generation:
    """New tokens. N is the largest `max_new_tokens`, rounded up to a bucket.

    Slots from a row's length on hold zeros and mean nothing; use `lengths` or `mask`.

    Attributes:
        tokens: ids, the one that stopped the row included.
        lengths: number of new tokens of each row.
        stopped: rows that their stop ended; the others were cut at their `max_new_tokens`.
        logprobs: the model's log-probability of each token at temperature 1, before any transform.
        sampling_logprobs: log-probability with which the sampler took it, behind all transforms.
        entropies: of the model's distribution at temperature 1, in nats.
        recorded: what `decode` was asked to record at each token, by name.
    """

    tokens: Int[Array, "B N"]
    lengths: Int[Array, "B"]
    stopped: Bool[Array, "B"]
    logprobs: Float[Array, "B N"]
    sampling_logprobs: Float[Array, "B N"]
    entropies: Float[Array, "B N"]
    recorded: Mapping[str, Shaped[Array, "B N ..."]] = struct.field(default_factory=dict)

    @property
    def mask(self) -> Bool[Array, "B N"]:
        """True where there is a token."""
        return jnp.arange(self.tokens.shape[1]) < self.lengths[:, None]

    def rows(self) -> list[list[int]]:
        """Returns each row's own tokens (waits for the device)."""
        tokens, lengths = jax.device_get((self.tokens, self.lengths))
        return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]


@struct.dataclass
class _Loop:
    """What one turn of the loop hands to the next."""

    context: Context
    out: StepOutput
    predictor: Any
    transform: Any
    lengths: Int[Array, "B"]
    stopped: Bool[Array, "B"]
    logprobs: Float[Array, "B N"]
    sampling_logprobs: Float[Array, "B N"]
    entropies: Float[Array, "B N"]
    recorded: dict[str, Shaped[Array, "B N ..."]]


@struct.dataclass
class _Function:
    """A plain function as something that `jit` takes."""

    call: Recorder = struct.field(pytree_node=False)

    def __call__(self, context: Context) -> jax.Array:
        return self.call(context)


def decode(
    model: Any,
    params: Any,
    prompts: Prompts,
    *,
    max_new_tokens: Any,
    samples: int = 1,
    transform: Transform | None = None,
    sampler: Sampler | None = None,
    stop: Stop | None = None,
    seeds: Any = None,
    key: Any = None,
    record: Mapping[str, Recorder] | None = None,
    stream: Callback | None = None,
) -> Generation:
    """Returns continuations of the prompts, computed without a host round trip.

    One program is compiled for each bucket of prompt length and of new tokens, each batch size,
    and each structure of transform, sampler and stop; their values never compile anything. A row's
    text depends on its own prompt, seed and settings, not on the rows beside it (to the rounding
    of matrix products, whose order of summation may change with the number of rows).

    Args:
        model: a `Transformer`, or any `Predictor`.
        params: the model's parameters; each call puts them into the form that decoding reads
            fastest, which takes their memory a second time while it lasts, unless `prepare` did.
        prompts: what to continue.
        max_new_tokens: one number, or one for each prompt.
        samples: continuations of each prompt; they share the pass over the prompt, and their rows
            are neighbours: row b * samples + i is the i-th of prompt b.
        transform: of the logits, for example `chain(temperature(0.8), top_p(0.95))`; default none.
        sampler: default greedy.
        stop: what ends a row besides `max_new_tokens`; default nothing.
        seeds: one integer for each row (so samples for each prompt), 0 to 2^32 - 1; equal seed,
            prompt and settings give equal text.
        key: a random key from which each row's own is derived, instead of seeds.
        record: name -> function of the `Context` right behind each token (its `last` is the token,
            its `logits` and `signals` are those the token was taken from), returning a value for
            each row; the values come back in `Generation.recorded`. A function that holds arrays
            must be a `struct.dataclass`, like a stop; any other is part of the program: pass the
            same object again, or it is compiled again.
        stream: called on the host right behind each token, with a `Streamed`; it must not call
            JAX. What it raises ends the decode and is raised here. Another function compiles
            nothing; without one, nothing is added to the program.

    Raises:
        ConfigError: a prompt without tokens; prompt and new tokens exceed the model's positions;
            sizes that do not fit together; a sampler that draws without seeds and key; a constraint
            that no text of `max_new_tokens` satisfies.
        DataError: a prompt's id is not in the model's vocabulary.
    """
    predictor = as_predictor(model)
    sampler = greedy() if sampler is None else sampler
    prompts, limits = check_prompts(predictor, prompts, max_new_tokens)
    check = getattr(predictor, "check", None)
    if check is not None:
        check(params, prompts, limits)
    if samples < 1:
        raise ConfigError(f"samples={samples} must be at least 1")
    limits = np.repeat(limits, samples)
    width = bucket(int(np.max(limits)))
    transform = chain() if transform is None else transform
    check_transform(transform, prompts, limits, predictor.vocab_size)
    with receiver(stream) as number:
        generation = _run(
            predictor,
            width,
            samples,
            params,
            prompts,
            transform,
            sampler,
            never() if stop is None else stop,
            _row_keys(len(limits), seeds, key, needed=sampler.draws),
            limits,
            {name: _as_pytree(recorder) for name, recorder in (record or {}).items()},
            number,
        )
        return generation if stream is None else jax.block_until_ready(generation)


def _as_pytree(recorder: Recorder) -> Any:
    leaf = jax.tree_util.all_leaves([recorder])
    return _Function(recorder) if leaf else recorder


def check_prompts(
    predictor: Predictor, prompts: Prompts, max_new_tokens: Any
) -> tuple[Prompts, np.ndarray]:
    """Returns the prompts in a bucket's shape and each row's limit, both on the host.

    `decode` does this first; whoever decodes much later (samples during training) can do it early.

    Raises:
        ConfigError: a prompt without tokens; prompt and new tokens exceed the model's positions;
            sizes that do not fit together.
        DataError: a prompt's id is not in the model's vocabulary.
    """
    tokens, lengths = np.asarray(prompts.tokens), np.asarray(prompts.lengths)
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1] or not len(tokens):
        raise ConfigError(
            f"prompts need tokens [B, P] and lengths [B], not {tokens.shape} and {lengths.shape}"
        )
    B, P = tokens.shape
    if lengths.min() < 1 or lengths.max() > P:
        raise ConfigError(
            f"prompt lengths must be 1 to {P}, not {lengths.min()} to {lengths.max()}: begin an "
            f"empty prompt with the BOS id"
        )
    limits = np.asarray(max_new_tokens)
    if limits.shape not in ((), (B,)) or not np.issubdtype(limits.dtype, np.integer):
        raise ConfigError(f"max_new_tokens={max_new_tokens!r} must be an integer or {B} of them")
    limits = np.broadcast_to(limits, (B,)).astype(np.int32)
    if limits.min() < 1:
        raise ConfigError(f"max_new_tokens={limits.min()} must be at least 1")
    b = int(np.argmax(lengths + limits))
    if lengths[b] + limits[b] > predictor.max_positions:
        raise ConfigError(
            f"prompt {b} has {lengths[b]} tokens; with max_new_tokens={limits[b]} that makes "
            f"{lengths[b] + limits[b]}, but the model has max_positions={predictor.max_positions}: "
            f"shorten the prompt or lower max_new_tokens"
        )
    used = np.arange(P) < lengths[:, None]
    wrong = used & ((tokens < 0) | (tokens >= predictor.vocab_size))
    if wrong.any():
        b, at = np.argwhere(wrong)[0]
        raise DataError(
            f"prompt {b} has id {tokens[b, at]} at position {at}, but the model's ids are 0 to "
            f"{predictor.vocab_size - 1}: was it made with another tokenizer?"
        )
    padded = np.zeros((B, bucket(int(lengths.max()))), np.int32)
    shared = min(P, padded.shape[1])
    padded[:, :shared] = np.where(used, tokens, 0)[:, :shared]
    return Prompts(padded, lengths.astype(np.int32)), limits  # type: ignore[arg-type]


def _row_keys(batch: int, seeds: Any, key: Any, needed: bool) -> Any:
    if seeds is not None and key is not None:
        raise ConfigError("give seeds or key, not both")
    if key is not None:
        return _keys_from_key(key, np.arange(batch))
    if seeds is None:
        if needed:
            raise ConfigError("this sampler draws at random: give seeds (one a row) or key")
        seeds = np.zeros(batch, np.uint32)
    seeds = np.asarray(seeds)
    if seeds.shape != (batch,) or not np.issubdtype(seeds.dtype, np.integer):
        raise ConfigError(f"seeds must be {batch} integers, one for each prompt, not {seeds!r}")
    if seeds.min() < 0 or seeds.max() >= 2**32:
        raise ConfigError(f"seeds must be 0 to {2**32 - 1}, not {seeds.min()} to {seeds.max()}")
    return _keys_from_seeds(seeds.astype(np.uint32))


_keys_from_seeds = jax.jit(jax.vmap(jax.random.key))
_keys_from_key = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    predictor,
    width,
    samples,
    params,
    prompts,
    transform,
    sampler,
    stop,
    keys,
    limits,
    record,
    number,
) -> Generation:
    prepared = predictor.prepare(params)
    state, out = predictor.init(prepared, prompts, prompts.tokens.shape[1] + width)
    if samples > 1:
        each = lambda a: jnp.repeat(a, samples, axis=0)  # noqa: E731
        state, out, prompts = jax.tree.map(each, (state, out, prompts))
    B = prompts.tokens.shape[0]
    last = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)[:, 0]
    empty = jnp.zeros((B, width), jnp.float32)
    nobody = jnp.zeros(B, bool)
    written = jnp.zeros((B, width), jnp.int32)
    context = Context(
        step=jnp.int32(0),
        last=last,
        generated=written,
        done=nobody,
        prompts=prompts,
        last_logprob=jnp.zeros(B, jnp.float32),
        limits=limits,
    )
    loop = _Loop(
        context=context,
        out=out,
        predictor=state,
        transform=transform.init(prompts, predictor.vocab_size),
        lengths=jnp.zeros(B, jnp.int32),
        stopped=nobody,
        logprobs=empty,
        sampling_logprobs=empty,
        entropies=empty,
        recorded={
            name: _room(width, partial(recorder, _with_step(context, out)))
            for name, recorder in record.items()
        },
    )
    take = partial(_take, transform, sampler, stop, keys, record, number)

    def turn(loop: _Loop) -> _Loop:
        state, out = predictor.step(prepared, loop.predictor, loop.context.last)
        return take(loop.replace(predictor=state, out=out))  # type: ignore[attr-defined]

    # The first token is taken before the loop, so that no pass is run behind the last one.
    loop = jax.lax.while_loop(lambda loop: ~loop.context.done.all(), turn, take(loop))
    generation = Generation(
        tokens=loop.context.generated,
        lengths=loop.lengths,
        stopped=loop.stopped,
        logprobs=loop.logprobs,
        sampling_logprobs=loop.sampling_logprobs,
        entropies=loop.entropies,
        recorded=loop.recorded,
    )
    # Whole on every device, so that each process of several can read it.
    return jax.tree.map(lambda a: constrain(a, (None,) * a.ndim), generation)


def _with_step(context: Context, out: StepOutput) -> Context:
    """Returns the context with what the predictor said; it does not travel to the next turn."""
    return context.replace(  # type: ignore[attr-defined]
        logits=out.logits.astype(jnp.float32), signals=out.signals
    )


def _room(width: int, of_step: Callable[[], jax.Array]) -> jax.Array:
    """Returns zeros for a value at each step."""
    value = jax.eval_shape(of_step)
    return jnp.zeros((value.shape[0], width, *value.shape[1:]), value.dtype)


def _take(transform, sampler, stop, keys, record, number, loop: _Loop) -> _Loop:
    """Returns the loop with one more token in each row that is not done."""
    context, step = loop.context, loop.context.step
    before = _with_step(context, loop.out)
    logits = loop.out.logits.astype(jnp.float32)
    changed, transform_state = transform.update(logits, loop.transform, before)
    tokens, sampling_logprobs = sampler(
        jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step), changed
    )
    active = ~context.done

    def put(buffer: jax.Array, values: jax.Array) -> jax.Array:
        shown = active.reshape(-1, *[1] * (values.ndim - 1))
        return buffer.at[:, step].set(jnp.where(shown, values, 0).astype(buffer.dtype))

    logprobs = logprob_of(logits, tokens)
    context = context.replace(  # type: ignore[attr-defined]
        step=step + 1,
        last=jnp.where(active, tokens, 0),
        generated=put(context.generated, tokens),
        last_logprob=logprobs,
    )
    after = _with_step(context, loop.out)
    ended = active & stop(after)
    if hasattr(transform, "ends"):
        ended |= active & transform.ends(transform_state, after)
    done = context.done | ended | (step + 1 >= context.limits)
    if number is not None:
        done |= ~send(number, step, tokens, active, done)
    return loop.replace(  # type: ignore[attr-defined]
        context=context.replace(done=done),
        transform=transform_state,
        lengths=loop.lengths + active,
        stopped=loop.stopped | ended,
        logprobs=put(loop.logprobs, logprobs),
        sampling_logprobs=put(loop.sampling_logprobs, sampling_logprobs),
        entropies=put(loop.entropies, entropy(jax.nn.log_softmax(logits, axis=-1))),
        recorded={
            name: put(loop.recorded[name], recorder(after)) for name, recorder in record.items()
        },
    )
