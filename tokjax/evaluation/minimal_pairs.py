"""Scores of whole sentences, for minimal pairs: log-likelihoods and pseudo-log-likelihoods."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int

from tokjax.decoding.prompts import bucket
from tokjax.errors import ConfigError
from tokjax.models.encoder import Encoder
from tokjax.models.transformer import Transformer, padding
from tokjax.signals.token_stats import token_stats


def score_sentences(
    model: Transformer,
    params: Any,
    sentences: Sequence[Sequence[int]],
    *,
    mask_id: int | None = None,
    unscored: Sequence[int] = (),
    batch_size: int = 64,
) -> Float64[np.ndarray, "N"]:
    """Returns the score of each sentence in nats; the higher, the likelier.

    A causal model gives the log-likelihood of all tokens behind the first, an encoder the
    pseudo-log-likelihood of all tokens (see `pseudo_logprobs`).

    Args:
        model: causal, or an `Encoder`.
        params: its parameters.
        sentences: ids, with whatever begins and ends a sequence in training.
        mask_id: id of the mask, for encoders.
        unscored: ids whose own probabilities do not count, such as special ones.
        batch_size: sentences computed at a time.

    Raises:
        ConfigError: an encoder without a mask, or an empty sentence.
    """
    if any(not len(ids) for ids in sentences):
        raise ConfigError("a sentence has no token: there is nothing to score")
    masked = isinstance(model, Encoder)
    if masked and mask_id is None:
        raise ConfigError("an encoder's pseudo-log-likelihood needs mask_id, the id of the mask")
    order = sorted(range(len(sentences)), key=lambda i: -len(sentences[i]))
    found = np.zeros(len(sentences))
    skipped = np.asarray(list(unscored), np.int64)
    for first in range(0, len(order), batch_size):
        some = order[first : first + batch_size]
        length = bucket(len(sentences[some[0]]))
        tokens = np.zeros((min(batch_size, len(order)), length), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, i in enumerate(some):
            tokens[row, : len(sentences[i])] = sentences[i]
            mask[row, : len(sentences[i])] = True
        if masked:
            logprobs = pseudo_logprobs(model, params, tokens, mask, mask_id)
        else:
            logprobs = _logprobs(model, params, tokens, mask)
        counted = mask & ~np.isin(tokens, skipped)
        sums = np.where(counted, np.asarray(logprobs, np.float64), 0.0).sum(-1)
        found[some] = sums[: len(some)]
    return found


@partial(jax.jit, static_argnums=0)
def _logprobs(
    model: Transformer, params: Any, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    positions, segments = padding(mask)
    x = model.embed(params, tokens)
    x = model.backbone(params, x, positions=positions, segments=segments).x
    stats = token_stats(x[:, :-1], model.head(params), tokens[:, 1:], ["logprob"], mask=mask[:, 1:])
    assert stats.logprob is not None
    return jnp.pad(stats.logprob, ((0, 0), (1, 0)))


@partial(jax.jit, static_argnums=0)
def pseudo_logprobs(
    model: Encoder,
    params: Any,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    mask_id: int | Int[Array, ""],
) -> Float[Array, "B T"]:
    """Returns the log-probability of each token where it alone is masked; 0 on filling.

    Their sum is the pseudo-log-likelihood (Salazar et al., "Masked Language Model Scoring", arXiv
    1910.14659). One pass for each position.

    Args:
        model: with or without a layer of its own before the output head.
        params: its parameters.
        tokens: ids.
        mask: true where there is a token.
        mask_id: id of the mask.
    """
    positions, segments = padding(mask)
    head = model.head(params)

    def score(t):
        hidden = jnp.where(jnp.arange(tokens.shape[1]) == t, mask_id, tokens)
        x = model.embed(params, hidden.astype(tokens.dtype))
        x = model.backbone(params, x, positions=positions, segments=segments).x
        x = jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1)
        if model.config.mlm_head is not None:
            x = model.mlm_hidden(params, x)
        own = jax.lax.dynamic_slice_in_dim(tokens, t, 1, axis=1)
        stats = token_stats(x, head, own, ["logprob"])
        assert stats.logprob is not None
        return stats.logprob[:, 0]

    found = jax.lax.map(score, jnp.arange(tokens.shape[1])).T
    return jnp.where(mask, found, 0.0)
