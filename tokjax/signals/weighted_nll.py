"""The training loss of a vocabulary: weighted negative log-likelihood without [B, T, V]."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.signals.vocabulary import chunk_size, in_chunks, per_shard


def weighted_nll(
    x: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "B T K"],
    weights: Float[Array, "B T K"],
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, "B T K"]]:
    """Returns the weighted sum of the targets' negative log-likelihoods, and each of them.

    One position may have several targets (K = 1 is next-token prediction); they share one
    log-sum-exp. The sum is differentiable with respect to x, the unembedding and the weights; its
    gradient is computed on the way forward, chunk by chunk, so logits are never computed twice
    and never kept. The second result is for metrics and carries no gradient.

    Args:
        x: final hidden states.
        unembedding: output head, one row per token id.
        targets: ids.
        weights: any real numbers; 0 leaves a target out.
        z_loss: coefficient of the squared log-sum-exp (Chowdhery et al. 2022, arXiv 2204.02311,
            section 5), added once per unit of a position's weight.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if targets.shape != weights.shape or targets.shape[:2] != x.shape[:2] or targets.ndim != 3:
        raise ValueError(
            f"targets {targets.shape} and weights {weights.shape} must both be [B, T, K] for "
            f"x {x.shape}"
        )
    fn = lambda *args: _weighted_nll(*args, z_loss)  # noqa: E731
    totals, nll = per_shard(fn, x, unembedding, targets, weights.astype(jnp.float32))
    return totals.sum(), jax.lax.stop_gradient(nll)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted_nll(x, unembedding, targets, weights, z_loss):
    def score(_, chunk):
        x, targets, weights = chunk
        logits = _logits(x, unembedding)
        lse = jax.nn.logsumexp(logits, axis=-1)
        nll = lse[:, None] - jnp.take_along_axis(logits, targets, axis=-1)
        return None, (nll, _penalised(nll, lse, weights, z_loss))

    chunks, n = _chunks(x, unembedding, targets, weights)
    _, (nll, values) = jax.lax.scan(score, None, chunks)
    return _finish(values, nll, n, targets.shape)


def _forward(x, unembedding, targets, weights, z_loss):
    ids = jnp.arange(unembedding.shape[0])

    def score(d_table, chunk):
        x, targets, weights = chunk
        logits = _logits(x, unembedding)
        largest = logits.max(-1, keepdims=True)
        exponentials = jnp.exp(logits - largest)
        total = exponentials.sum(-1, keepdims=True)
        lse = (largest + jnp.log(total))[:, 0]
        nll = lse[:, None] - jnp.take_along_axis(logits, targets, axis=-1)
        mass = weights.sum(-1)
        d_logits = exponentials * ((mass * (1 + 2 * z_loss * lse)) / total[:, 0])[:, None]
        for k in range(targets.shape[1]):
            d_logits -= jnp.where(targets[:, k, None] == ids, weights[:, k, None], 0.0)
        d_logits = d_logits.astype(x.dtype)
        d_x = d_logits @ unembedding
        d_table += jnp.einsum("nv,nd->vd", d_logits, x, preferred_element_type=jnp.float32)
        d_weights = nll + z_loss * jnp.square(lse)[:, None]
        return d_table, (nll, _penalised(nll, lse, weights, z_loss), d_x, d_weights)

    chunks, n = _chunks(x, unembedding, targets, weights)
    start = jnp.zeros(unembedding.shape, jnp.float32)
    d_table, (nll, values, d_x, d_weights) = jax.lax.scan(score, start, chunks)
    d_x = d_x.reshape(-1, x.shape[-1])[:n].reshape(x.shape)
    d_weights = d_weights.reshape(-1, targets.shape[-1])[:n].reshape(targets.shape)
    residuals = (d_x, d_table.astype(unembedding.dtype), d_weights)
    return _finish(values, nll, n, targets.shape), (residuals, targets.shape)


def _backward(z_loss, saved, cotangents):
    (d_x, d_table, d_weights), shape = saved
    scale = cotangents[0][0]
    no_gradient = np.zeros(shape, jax.dtypes.float0)  # of the integer targets
    by = lambda a: (a.astype(jnp.float32) * scale).astype(a.dtype)  # noqa: E731
    return by(d_x), by(d_table), no_gradient, by(d_weights)


_weighted_nll.defvjp(_forward, _backward)


def _logits(x: Float[Array, "N D"], unembedding: Float[Array, "V D"]) -> Float[Array, "N V"]:
    return jnp.einsum("nd,vd->nv", x, unembedding, preferred_element_type=jnp.float32)


def _penalised(nll, lse, weights, z_loss) -> Any:
    value = (weights * nll).sum(-1)
    return value + z_loss * weights.sum(-1) * jnp.square(lse) if z_loss else value


def _chunks(x, unembedding, targets, weights):
    flat = (x.reshape(-1, x.shape[-1]), *(a.reshape(-1, a.shape[-1]) for a in (targets, weights)))
    return in_chunks(flat, chunk_size(unembedding.shape[0], flat[0].shape[0]))


def _finish(values, nll, n, shape):
    return values.sum()[None], nll.reshape(-1, shape[-1])[:n].reshape(shape)
