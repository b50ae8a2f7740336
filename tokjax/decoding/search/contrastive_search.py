"""Contrastive search: the likeliest tokens compete by how little they repeat the text so far."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.decoding.context import Context
from tokjax.decoding.contrast.branches import Branches
from tokjax.decoding.engine import Generation, check_prompts
from tokjax.decoding.predictors import ModelPredictor
from tokjax.decoding.prompts import Prompts, bucket
from tokjax.decoding.samplers import logprob_of
from tokjax.decoding.stops import Stop, never
from tokjax.decoding.transforms import Transform, chain
from tokjax.decoding.transforms.base import check_transform, column, setting
from tokjax.decoding.transforms.truncation import entropy
from tokjax.errors import ConfigError
from tokjax.models import cache as kv
from tokjax.models.cache import Cache
from tokjax.models.transformer import Transformer
from tokjax.parallel.rules import constrain


def contrastive_search_scores(
    probabilities: Float[Array, "*B K"], penalty: Float[Array, "*B K"], alpha: Any
) -> Float[Array, "*B K"]:
    """Returns (1 - alpha) p - alpha penalty; -inf where a candidate is impossible.

    Args:
        probabilities: of the candidates.
        penalty: the largest cosine of a candidate's hidden state with an earlier one.
        alpha: 0 goes by probability alone.

    Reference: Su et al., "A Contrastive Framework for Neural Text Generation", arXiv 2202.06417,
    equation 5.
    """
    alpha = column(alpha)
    scores = (1 - alpha) * probabilities - alpha * penalty
    return jnp.where(probabilities > 0, scores, -jnp.inf)


@struct.dataclass
class _Loop:
    """What one turn of the loop hands to the next.

    `states` are the normalised hidden states of the tokens so far, by their place.
    """

    context: Context
    logits: Float[Array, "B V"]
    cache: Cache
    states: Float[Array, "B S D"]
    transform: Any
    lengths: Int[Array, "B"]
    stopped: Bool[Array, "B"]
    logprobs: Float[Array, "B N"]
    entropies: Float[Array, "B N"]
    penalties: Float[Array, "B N"]


def contrastive_search(
    model: Transformer,
    params: Any,
    prompts: Prompts,
    *,
    max_new_tokens: Any,
    top_k: int = 4,
    alpha: Any = 0.6,
    transform: Transform | None = None,
    stop: Stop | None = None,
) -> Generation:
    """Returns continuations whose every token is likely and unlike what came before.

    Of the `top_k` likeliest tokens v, the one with the largest
    (1 - alpha) p(v) - alpha max_j cos(h_v, h_j) is taken, where h_v is the final hidden state of v
    behind the text and j runs over prompt and new tokens. (The original has k 4 to 8, alpha 0.6.)
    Costs one forward pass of `top_k` queries a row and token, the last token included: candidates
    stand side by side over one cache, and the chosen one's key stays.

    Args:
        model: a model without token mixer, relative positions or cross-attention.
        params: its parameters.
        prompts: what to continue.
        max_new_tokens: one number, or one for each prompt.
        top_k: number of candidates; 1 is greedy decoding.
        alpha: weight of the penalty, 0 (greedy decoding) to 1; one number, or one for each prompt.
        transform: of the logits, before candidates are found.
        stop: what ends a row besides `max_new_tokens`; default nothing.

    Returns:
        Like `decode`; `recorded["penalty"]` holds each token's cosine.

    Raises:
        ConfigError: a setting is impossible, the model cannot run candidates side by side; what
            `decode` refuses.
        DataError: a prompt's id is not in the model's vocabulary.

    Reference: Su et al., "A Contrastive Framework for Neural Text Generation", arXiv 2202.06417.
    """
    if not isinstance(model, Transformer):
        raise ConfigError(
            f"contrastive search reads hidden states: it needs a Transformer, not a "
            f"{type(model).__name__}"
        )
    predictor = ModelPredictor(model)
    prompts, limits = check_prompts(predictor, prompts, max_new_tokens)
    if not 1 <= top_k <= predictor.vocab_size:
        raise ConfigError(f"top_k={top_k} must be 1 to the {predictor.vocab_size} ids of the model")
    ok = lambda v: (v >= 0) & (v <= 1)  # noqa: E731
    transform = chain() if transform is None else transform
    check_transform(transform, prompts, limits, predictor.vocab_size)
    return _run(
        Branches(model, top_k),
        bucket(int(np.max(limits))),
        params,
        prompts,
        transform,
        never() if stop is None else stop,
        setting("alpha", alpha, np.float32, ok, "between 0 and 1"),
        limits,
    )


@partial(jax.jit, static_argnums=(0, 1))
def _run(branches, width, params, prompts, transform, stop, alpha, limits) -> Generation:
    plain, model = branches.plain, branches.model
    prepared = plain.prepare(params)
    B, P = prompts.tokens.shape
    # Room for the candidates behind the last token; layers with a window keep every key, too.
    slots = P + width + branches.count
    cache, out = plain.prefill(prepared, prompts, slots, chunk=slots)
    at = (prompts.lengths - 1)[:, None]
    last = jnp.take_along_axis(out.x, at[..., None], axis=1)
    empty = jnp.zeros((B, width), jnp.float32)
    loop = _Loop(
        context=Context(
            step=jnp.int32(0),
            last=jnp.take_along_axis(prompts.tokens, at, axis=1)[:, 0],
            generated=jnp.zeros((B, width), jnp.int32),
            done=jnp.zeros(B, bool),
            prompts=prompts,
            last_logprob=jnp.zeros(B, jnp.float32),
            limits=limits,
        ),
        logits=plain.logits(prepared, last)[:, 0],
        cache=cache,
        states=jnp.pad(_unit(out.x), ((0, 0), (0, width), (0, 0))),
        transform=transform.init(prompts, plain.vocab_size),
        lengths=jnp.zeros(B, jnp.int32),
        stopped=jnp.zeros(B, bool),
        logprobs=empty,
        entropies=empty,
        penalties=empty,
    )

    def turn(loop: _Loop) -> _Loop:
        context, cache, step = loop.context, loop.cache, loop.context.step
        logits = loop.logits.astype(jnp.float32)
        before = context.replace(logits=logits)  # type: ignore[attr-defined]
        changed, transform_state = transform.update(logits, loop.transform, before)
        likeliest, ids = jax.lax.top_k(jax.nn.softmax(changed, axis=-1), branches.count)
        found = branches.run(prepared, cache, model.embed(prepared, ids))
        states = _unit(found.x)
        penalty = _largest_cosine(states, loop.states, cache.lengths)
        chosen = jnp.argmax(contrastive_search_scores(likeliest, penalty, alpha), axis=-1)

        def of_chosen(a: Array) -> Array:
            index = chosen.reshape(B, 1, *[1] * (a.ndim - 2))
            return jnp.take_along_axis(a, index, axis=1)

        tokens = of_chosen(ids)[:, 0].astype(jnp.int32)
        likely = logprob_of(logits, tokens)
        active = ~context.done

        def put(buffer: Array, values: Array) -> Array:
            return buffer.at[:, step].set(jnp.where(active, values, 0).astype(buffer.dtype))

        context = context.replace(  # type: ignore[attr-defined]
            step=step + 1,
            last=jnp.where(active, tokens, 0),
            generated=put(context.generated, tokens),
            last_logprob=likely,
        )
        after = context.replace(logits=logits)  # type: ignore[attr-defined]
        ended = active & stop(after)
        if hasattr(transform, "ends"):
            ended |= active & transform.ends(transform_state, after)
        return loop.replace(  # type: ignore[attr-defined]
            context=context.replace(done=context.done | ended | (step + 1 >= limits)),
            logits=plain.logits(prepared, of_chosen(found.x))[:, 0],
            cache=_kept(found.cache, cache.lengths, chosen),
            states=loop.states.at[jnp.arange(B), cache.lengths].set(of_chosen(states)[:, 0]),
            transform=transform_state,
            lengths=loop.lengths + active,
            stopped=loop.stopped | ended,
            logprobs=put(loop.logprobs, likely),
            entropies=put(loop.entropies, entropy(jax.nn.log_softmax(logits, axis=-1))),
            penalties=put(loop.penalties, of_chosen(penalty)[:, 0]),
        )

    loop = jax.lax.while_loop(lambda loop: ~loop.context.done.all(), turn, loop)
    generation = Generation(
        tokens=loop.context.generated,
        lengths=loop.lengths,
        stopped=loop.stopped,
        logprobs=loop.logprobs,
        sampling_logprobs=jnp.zeros_like(loop.logprobs),
        entropies=loop.entropies,
        recorded={"penalty": loop.penalties},
    )
    # Whole on every device, so that each process of several can read it.
    return jax.tree.map(lambda a: constrain(a, (None,) * a.ndim), generation)


def _unit(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    wide = x.astype(jnp.float32)
    size = jnp.linalg.norm(wide, axis=-1, keepdims=True)
    return wide / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)


def _largest_cosine(
    new: Float[Array, "B K D"], earlier: Float[Array, "B S D"], lengths: Int[Array, "B"]
) -> Float[Array, "B K"]:
    cosines = jnp.einsum("bkd,bsd->bks", new, earlier)
    seen = jnp.arange(earlier.shape[1]) < lengths[:, None]
    return jnp.where(seen[:, None], cosines, -jnp.inf).max(-1)


def _kept(cache: Cache | None, lengths: Int[Array, "B"], chosen: Int[Array, "B"]) -> Cache:
    """Returns the cache behind a pass with the chosen candidate's entries as the only new ones."""
    assert cache is not None
    return dataclasses.replace(kv.moved(cache, lengths + chosen, lengths), lengths=lengths + 1)
