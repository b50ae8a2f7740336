"""The training loss of a vocabulary: weighted negative log-likelihood without [B, T, V]."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax.models.head import Head, as_head, logits, logits_vjp
from tokjax.signals.soft_targets import SoftTargets, at_ids, soft_tile
from tokjax.signals.vocabulary import (
    chunk_size,
    flat,
    from_chunks,
    in_chunks,
    per_shard,
    unflat,
)


def weighted_nll(
    x: Float[Array, "B T D"],
    head: Head | Float[Array, "V D"],
    targets: Int[Array, "B T K"],
    weights: Float[Array, "B T K"],
    z_loss: float = 0.0,
    *,
    soft: SoftTargets | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T K"]]:
    """Returns the weighted sum of the targets' negative log-likelihoods, and each of them.

    One position may have several targets (K = 1 is next-token prediction); they share one
    log-sum-exp. The sum is differentiable with respect to x, the head and the weights; its
    gradient is computed on the way forward, chunk by chunk, so logits are never computed twice
    and never kept. The second result is for metrics and carries no gradient.

    Args:
        x: final hidden states.
        head: a Head, or the plain table of one row per token id.
        targets: ids.
        weights: any real numbers; 0 leaves a target out, whatever its id.
        z_loss: coefficient of the squared log-sum-exp (Chowdhery et al. 2022, arXiv 2204.02311,
            section 5), added once per unit of a position's weight.
        soft: target distributions whose cross entropy is added to the sum. Their masses weigh
            positions (`SoftTargets.weighted`), for `weights` does not touch them.

    Raises:
        ValueError: shapes that do not fit together.
    """
    head = as_head(head)
    if x.ndim != 3 or x.shape[-1] != head.table.shape[1]:
        raise ValueError(f"x {x.shape} must be [B, T, D] for the head's table {head.table.shape}")
    if targets.shape != weights.shape or targets.shape[:2] != x.shape[:2] or targets.ndim != 3:
        raise ValueError(
            f"targets {targets.shape} and weights {weights.shape} must both be [B, T, K] for "
            f"x {x.shape}"
        )
    soft_of_tokens, rows = None, None
    if soft is not None:
        soft.check(x.shape[:2], head.table.shape[0])
        soft_of_tokens, rows = soft.split()

    tokens = (x, weights.astype(jnp.float32), (targets, soft_of_tokens))
    total, nll = _weighted_nll(z_loss, *tokens[:2], head, tokens[2], rows)  # type: ignore[misc]
    return total, jax.lax.stop_gradient(nll)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_nll(z_loss, x, weights, head, targets, rows):
    def score(head, rows, chunk):
        x, weights, (targets, soft) = chunk
        z = logits(head, x)
        lse = jax.nn.logsumexp(z, axis=-1)
        nll = lse[:, None] - _at(z, targets)
        value, _ = _value(z_loss, weights, nll, lse, _soft_terms(soft, rows, z, lse))
        return None, (nll, value)

    def local(tokens, shared, _):
        head, rows = shared
        chunks, n = _chunks(head, flat(tokens))
        _, (nll, values) = jax.lax.scan(lambda _, chunk: score(head, rows, chunk), None, chunks)
        return (values.sum()[None], unflat(from_chunks(nll, n), tokens)), ()

    (totals, nll), _ = per_shard(local, (x, weights, targets), (head, rows))
    return totals.sum(), nll


def _forward(z_loss, x, weights, head, targets, rows):
    def score(head, rows, d_head, chunk):
        x, weights, (targets, soft) = chunk
        z = logits(head, x)
        largest = z.max(-1, keepdims=True)
        exponentials = jnp.exp(z - largest)
        total = exponentials.sum(-1, keepdims=True)
        lse = (largest + jnp.log(total))[:, 0]
        nll = lse[:, None] - _at(z, targets)
        terms = _soft_terms(soft, rows, z, lse)
        value, mass = _value(z_loss, weights, nll, lse, terms)
        d_z = exponentials * ((mass * (1 + 2 * z_loss * lse)) / total[:, 0])[:, None]
        d_z -= at_ids(targets, weights, jnp.arange(head.table.shape[0]))
        if terms is not None:
            d_z -= terms[0]
        d_x, d_part = logits_vjp(head, x, z, d_z)
        d_weights = nll + z_loss * jnp.square(lse)[:, None]
        d_head = jax.tree.map(jnp.add, d_head, d_part)
        return d_head, (nll, value, d_x.astype(x.dtype), d_weights)

    def local(tokens, shared, summed):
        head, rows = shared
        chunks, n = _chunks(head, flat(tokens))
        start = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), head)
        step = partial(score, head, rows)
        d_head, (nll, values, d_x, d_weights) = jax.lax.scan(step, start, chunks)
        found = unflat(from_chunks((nll, d_x, d_weights), n), tokens)
        return (values.sum()[None], found), summed(d_head)

    tokens = (x, weights, targets)
    (totals, (nll, d_x, d_weights)), d_head = per_shard(local, tokens, (head, rows))
    # Rounded behind the sum over devices, not before.
    d_head = jax.tree.map(lambda d, a: d.astype(a.dtype), d_head, head)
    return (totals.sum(), nll), (d_x, d_weights, d_head)


def _backward(z_loss, gradients, cotangents):
    scale = cotangents[0]
    by = lambda a: (a.astype(jnp.float32) * scale).astype(a.dtype)  # noqa: E731
    return *jax.tree.map(by, gradients), None, None


_weighted_nll.defvjp(_forward, _backward)


def _at(z, targets) -> Float[Array, "n K"]:
    """Returns the logits of the targets; NaN for ids outside the vocabulary."""
    found = jnp.take_along_axis(z, jnp.clip(targets, 0, z.shape[-1] - 1), axis=-1)
    return jnp.where((targets >= 0) & (targets < z.shape[-1]), found, jnp.nan)


def _soft_terms(soft, rows, z, lse) -> Any:
    """Returns the soft targets over the vocabulary, their mass and their cross entropy."""
    if soft is None:
        return None
    q = jnp.broadcast_to(soft_tile(soft, rows, 0, z.shape[-1], z.shape[-1]), z.shape)
    return q, q.sum(-1), jnp.where(q != 0, q * (lse[:, None] - z), 0.0).sum(-1)


def _value(z_loss, weights, nll, lse, terms) -> Any:
    """Returns the loss of each position, and its weight."""
    mass = weights.sum(-1)
    # The NaN of an id that means nothing must not pass a weight of 0.
    value = jnp.where(weights == 0, 0.0, weights * nll).sum(-1)
    if terms is not None:
        mass = mass + terms[1]
        value = value + terms[2]
    return value + z_loss * mass * jnp.square(lse) if z_loss else value, mass


def _chunks(head, tokens):
    return in_chunks(tokens, chunk_size(head.table.shape[0], tokens[0].shape[0]))
