"""Stochastic beam search: continuations drawn without replacement, by Gumbel-top-k."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.decoding.context import Context
from tokjax.decoding.engine import check_prompts
from tokjax.decoding.predictors import StepOutput, as_predictor
from tokjax.decoding.prompts import Prompts, bucket
from tokjax.decoding.search.beam import rows_of
from tokjax.decoding.stops import Stop, never
from tokjax.decoding.transforms import Transform, chain
from tokjax.decoding.transforms.base import check_transform
from tokjax.errors import ConfigError
from tokjax.parallel.rules import constrain

_ROOT = 2**32 - 1  # no step has this number


@struct.dataclass
class StochasticBeams:
    """Different continuations of each prompt, in the order in which they were drawn.

    Where fewer than K have a probability above 0, the last ones have length 0 and -inf as
    `perturbed` and `logprobs`.

    Attributes:
        tokens: ids, the one that stopped the row included.
        lengths: number of new tokens of each.
        stopped: which their stop ended.
        perturbed: log-probability plus Gumbel noise of each, largest first.
        logprobs: of each whole continuation, in the distribution drawn from.
    """

    tokens: Int[Array, "B K N"]
    lengths: Int[Array, "B K"]
    stopped: Bool[Array, "B K"]
    perturbed: Float[Array, "B K"]
    logprobs: Float[Array, "B K"]

    def rows(self) -> list[list[list[int]]]:
        """Returns the tokens of each prompt's continuations (waits for the device)."""
        tokens, lengths = jax.device_get((self.tokens, self.lengths))
        return [
            [each[:n].tolist() for each, n in zip(found, counts, strict=True)]
            for found, counts in zip(tokens, lengths, strict=True)
        ]

    def importance_weights(self) -> Float[Array, "B K-1"]:
        """Returns weights of all but the last, with which sums over them are unbiased.

        sum_i w_i f(y_i) has the mean of f over all continuations; the last one's perturbed
        log-probability is the threshold that all others passed.

        Reference: Kool et al., "Stochastic Beams and Where to Find Them", arXiv 1903.06059,
        section 4.1.
        """
        logprobs, threshold = self.logprobs[:, :-1], self.perturbed[:, -1:]
        passing = -jnp.expm1(-jnp.exp(logprobs - threshold))
        return jnp.where(jnp.isneginf(logprobs), 0.0, jnp.exp(logprobs) / passing)


@struct.dataclass
class _Loop:
    """What one turn of the loop hands to the next; R = B K rows."""

    context: Context
    out: StepOutput
    predictor: Any
    transform: Any
    logprobs: Float[Array, "B K"]
    perturbed: Float[Array, "B K"]
    lengths: Int[Array, "R"]
    stopped: Bool[Array, "R"]


def stochastic_beam_search(
    model: Any,
    params: Any,
    prompts: Prompts,
    *,
    max_new_tokens: Any,
    beams: int,
    seeds: Any,
    transform: Transform | None = None,
    stop: Stop | None = None,
) -> StochasticBeams:
    """Returns `beams` different continuations of each prompt, drawn without replacement.

    The first is a draw from the distribution of whole continuations, the second from what the first
    leaves of it, and so on. Costs one forward pass of `beams` rows a prompt and token.

    Args:
        model: a `Transformer`, an `EncoderDecoder`, or any `Predictor`.
        params: the model's parameters.
        prompts: what to continue.
        max_new_tokens: one number, or one for each prompt.
        beams: number of continuations of each prompt.
        seeds: one integer for each prompt, 0 to 2^32 - 1.
        transform: of the logits, such as a temperature.
        stop: what ends a continuation besides `max_new_tokens`; default nothing.

    Raises:
        ConfigError: a setting is impossible; what `decode` refuses.
        DataError: a prompt's id is not in the model's vocabulary.

    Reference: Kool et al., "Stochastic Beams and Where to Find Them: The Gumbel-Top-k Trick for
    Sampling Sequences Without Replacement", arXiv 1903.06059, algorithm 1.
    """
    predictor = as_predictor(model)
    prompts, limits = check_prompts(predictor, prompts, max_new_tokens)
    check = getattr(predictor, "check", None)
    if check is not None:
        check(params, prompts, limits)
    seeds = np.asarray(seeds)
    if beams < 1:
        raise ConfigError(f"beams={beams} must be at least 1")
    if seeds.shape != limits.shape or not np.issubdtype(seeds.dtype, np.integer):
        raise ConfigError(f"seeds must be {len(limits)} integers, one for each prompt")
    if seeds.min() < 0 or seeds.max() >= 2**32:
        raise ConfigError(f"seeds must be 0 to {2**32 - 1}, not {seeds.min()} to {seeds.max()}")
    transform = chain() if transform is None else transform
    check_transform(transform, prompts, limits, predictor.vocab_size)
    return _run(
        predictor,
        bucket(int(np.max(limits))),
        beams,
        params,
        prompts,
        transform,
        never() if stop is None else stop,
        seeds.astype(np.uint32),
        np.repeat(limits, beams),
    )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    predictor, width, beams, params, prompts, transform, stop, seeds, limits
) -> StochasticBeams:
    prepared = predictor.prepare(params)
    state, out = predictor.init(prepared, prompts, prompts.tokens.shape[1] + width)
    B = prompts.tokens.shape[0]
    R, V, K = B * beams, predictor.vocab_size, beams
    each = lambda a: jnp.repeat(a, K, axis=0)  # noqa: E731
    state, out, prompts = jax.tree.map(each, (state, out, prompts))
    last = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)[:, 0]
    keys = jax.vmap(jax.random.key)(seeds)
    # All beams are the same before the first token: one goes on. Its noise is that of the largest
    # perturbed log-probability of all.
    first = jnp.full((B, K), -jnp.inf).at[:, 0].set(0.0)
    root = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, _ROOT)))(keys)
    context = Context(
        step=jnp.int32(0),
        last=last,
        generated=jnp.zeros((R, width), jnp.int32),
        done=jnp.zeros(R, bool),
        prompts=prompts,
        last_logprob=jnp.zeros(R, jnp.float32),
        limits=limits,
    )
    loop = _Loop(
        context=context,
        out=out,
        predictor=state,
        transform=transform.init(prompts, V),
        logprobs=first,
        perturbed=first + root[:, None],
        lengths=jnp.zeros(R, jnp.int32),
        stopped=jnp.zeros(R, bool),
    )

    def take(loop: _Loop) -> _Loop:
        context, step = loop.context, loop.context.step
        logits = loop.out.logits.astype(jnp.float32)
        before = context.replace(logits=logits, signals=loop.out.signals)  # type: ignore[attr-defined]
        changed, transform_state = transform.update(logits, loop.transform, before)
        # A finished continuation is its own only child.
        own = jnp.where(jnp.arange(V) == 0, 0.0, -jnp.inf)
        done = context.done[:, None]
        added = jnp.where(done, own, jax.nn.log_softmax(changed, axis=-1)).reshape(B, K, V)
        logprobs = loop.logprobs[:, :, None] + added
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (K, V)))(step_keys)
        perturbed = _with_maximum(logprobs + noise, loop.perturbed)
        best, at = jax.lax.top_k(perturbed.reshape(B, K * V), K)
        rows = (jnp.arange(B)[:, None] * K + at // V).reshape(R)
        tokens = (at % V).reshape(R).astype(jnp.int32)

        here = partial(rows_of, rows=rows, total=R)
        active = ~context.done[rows]
        written = jnp.where(active, tokens, context.generated[rows, step])
        likely = jax.nn.log_softmax(logits, axis=-1)[rows, tokens]
        context = context.replace(  # type: ignore[attr-defined]
            step=step + 1,
            last=jnp.where(active, tokens, 0),
            generated=context.generated[rows].at[:, step].set(written),
            done=~active,
            last_logprob=likely,
        )
        after = context.replace(logits=here(logits), signals=here(loop.out.signals))
        ended = active & stop(after)
        own = here(transform_state)
        if hasattr(transform, "ends"):
            ended |= active & transform.ends(own, after)
        return loop.replace(  # type: ignore[attr-defined]
            context=context.replace(done=context.done | ended | (step + 1 >= limits)),
            predictor=here(loop.predictor),
            transform=own,
            logprobs=jnp.take_along_axis(logprobs.reshape(B, K * V), at, axis=1),
            perturbed=best,
            lengths=loop.lengths[rows] + active,
            stopped=loop.stopped[rows] | ended,
        )

    def turn(loop: _Loop) -> _Loop:
        state, out = predictor.step(prepared, loop.predictor, loop.context.last)
        return take(loop.replace(predictor=state, out=out))  # type: ignore[attr-defined]

    loop = jax.lax.while_loop(lambda loop: ~loop.context.done.all(), turn, take(loop))
    exists = ~jnp.isneginf(loop.perturbed)
    found = StochasticBeams(
        tokens=jnp.where(exists[..., None], loop.context.generated.reshape(B, K, width), 0),
        lengths=jnp.where(exists, loop.lengths.reshape(B, K), 0),
        stopped=exists & loop.stopped.reshape(B, K),
        perturbed=loop.perturbed,
        logprobs=loop.logprobs,
    )
    # Whole on every device, so that each process of several can read it.
    return jax.tree.map(lambda a: constrain(a, (None,) * a.ndim), found)


def _with_maximum(
    perturbed: Float[Array, "B K V"], maximum: Float[Array, "B K"]
) -> Float[Array, "B K V"]:
    """Returns the noisy values of children, as they are given that the largest is `maximum`.

    Reference: Kool et al., arXiv 1903.06059, appendix B.3 (the numerically stable form).
    """
    found, target = perturbed.max(-1, keepdims=True), maximum[..., None]
    possible = ~jnp.isneginf(perturbed) & ~jnp.isneginf(target)
    # Stand-ins keep what is impossible free of infinity minus infinity.
    value, top, target = (jnp.where(possible, a, 0.0) for a in (perturbed, found, target))
    # log(1 - exp(x)) of x <= 0, by whichever form keeps its digits.
    x = value - top
    log1mexp = jnp.where(
        x > -0.693, jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(jnp.minimum(x, -0.693)))
    )
    v = target - value + log1mexp
    # The largest itself has v = -inf and becomes the target.
    shifted = target - jnp.maximum(v, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(v)))
    return jnp.where(possible, shifted, -jnp.inf)
