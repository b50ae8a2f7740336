"""Likelihoods of one ending behind many prefixes of a text, whose keys and values are shared."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax.decoding.predictors import ModelPredictor
from tokjax.decoding.prompts import Prompts
from tokjax.models import parameters
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.signals import token_stats


def prefix_rewards(
    model: Transformer,
    params: Params,
    texts: Prompts,
    starts: Int[Array, "B"],
    anchors: Int[Array, "B A"],
    endings: Int[Array, "B S"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B A"]:
    """Returns log P(text[start:start + anchor], ending | text[:start]) for each anchor, in nats.

    Costs one pass over each text, and for each anchor one over the ending.

    Args:
        model: of the likelihood.
        params: its parameters, which get no gradient.
        texts: a question and a rationale, without what closes it.
        starts: tokens of the question, at least 1.
        anchors: tokens of the rationale that count; at most the rationale's.
        endings: what comes behind each prefix: marker and answer; filling behind their lengths.
        lengths: of the endings, at least 1.
    """
    prepared = parameters.unstack(jax.lax.stop_gradient(params))
    S = endings.shape[1]
    capacity = texts.tokens.shape[1] + S
    cache, out = ModelPredictor(model).prefill(prepared, texts, capacity, chunk=S)
    head = model.head(prepared)

    def logprob(x: Array, targets: Array) -> Array:
        found = token_stats(x, head, targets, ["logprob"]).logprob
        assert found is not None
        return found

    behind = logprob(out.x[:, :-1], texts.tokens[:, 1:])  # of token t + 1, at place t
    places = jnp.arange(behind.shape[1])[None]
    embedded = model.embed(prepared, endings)
    counted = jnp.arange(S - 1) + 1 < lengths[:, None]

    def of(anchor: Int[Array, "B"]) -> Float[Array, "B"]:
        stop = starts + anchor
        rationale = (places >= starts[:, None] - 1) & (places < stop[:, None] - 1)
        before = jnp.take_along_axis(out.x, (stop - 1)[:, None, None], axis=1)
        first = logprob(before, endings[:, :1])[:, 0]
        # Filling may reach beyond the last position, where a learned table has none.
        positions = jnp.minimum(stop[:, None] + jnp.arange(S), model.config.max_positions - 1)
        later = model.backbone(prepared, embedded, positions=positions, cache=cache.rewind(stop)).x[
            :, :-1
        ]
        rest = jnp.where(counted, logprob(later, endings[:, 1:]), 0.0) if S > 1 else 0.0
        return jnp.where(rationale, behind, 0.0).sum(1) + first + jnp.sum(rest, axis=-1)

    return jax.lax.map(of, anchors.T).T
