"""Per-token statistics of a model's predictions, streamed so that [B, T, V] never exists."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from tokjax.errors import nearest
from tokjax.signals.vocabulary import chunk_size, in_chunks, per_shard

WANTED = ("nll", "logprob", "entropy", "max_logprob", "margin", "rank", "top_k")


@struct.dataclass
class TokenStats:
    """Statistics of each position; those not asked for are None. Logarithms are natural.

    Attributes:
        nll: negative log-likelihood of the target.
        logprob: its negative.
        entropy: of the predicted distribution, in nats.
        max_logprob: of the likeliest token.
        margin: log-probability of the likeliest minus that of the second.
        rank: number of tokens strictly likelier than the target; 0 is the best.
        top_ids: the k likeliest tokens, likeliest first.
        top_logprobs: their log-probabilities.
    """

    nll: Float[Array, "B T"] | None = None
    logprob: Float[Array, "B T"] | None = None
    entropy: Float[Array, "B T"] | None = None
    max_logprob: Float[Array, "B T"] | None = None
    margin: Float[Array, "B T"] | None = None
    rank: Int[Array, "B T"] | None = None
    top_ids: Int[Array, "B T k"] | None = None
    top_logprobs: Float[Array, "B T k"] | None = None


def token_stats(
    x: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    want: Collection[str] = ("nll",),
    k: int = 5,
) -> TokenStats:
    """Returns the statistics named by `want`; differentiable with exact gradients.

    Args:
        x: final hidden states.
        unembedding: output head, one row per token id.
        targets: the id whose likelihood and rank are meant at each position.
        want: any of nll, logprob, entropy, max_logprob, margin, rank, top_k.
        k: how many tokens `top_k` returns.

    Raises:
        ValueError: an unknown statistic; targets of another shape than x.
    """
    if targets.shape != x.shape[:-1]:
        raise ValueError(f"targets {targets.shape} must be [B, T] for x {x.shape}")
    for name in want:
        if name not in WANTED:
            raise ValueError(f"unknown token statistic {name!r}.{nearest(name, WANTED)}")

    def local(x, table, targets):
        flat = (x.reshape(-1, x.shape[-1]), targets.reshape(-1))
        chunks, n = in_chunks(flat, chunk_size(table.shape[0], flat[0].shape[0]))
        # In float32 outside the loop, so that the chunks' gradients add up in float32.
        wide = table.astype(jnp.float32)
        # Rematerialised: the backward pass recomputes a chunk's logits rather than keep them all.
        score = jax.checkpoint(
            lambda x, targets: _score(x, wide.astype(table.dtype), targets, want, k)
        )
        _, found = jax.lax.scan(lambda _, c: (None, score(*c)), None, chunks)
        shape = targets.shape
        return jax.tree.map(
            lambda a: a.reshape(-1, *a.shape[2:])[:n].reshape(*shape, *a.shape[2:]), found
        )

    return TokenStats(**per_shard(local, x, unembedding, targets))


def _score(x, table, targets, want, k) -> dict[str, Any]:
    logits = jnp.einsum("nd,vd->nv", x, table, preferred_element_type=jnp.float32)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    of_target = jnp.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0]
    found: dict[str, Any] = {}
    if "nll" in want:
        found["nll"] = -of_target
    if "logprob" in want:
        found["logprob"] = of_target
    if "entropy" in want:
        # A token of probability 0 has log-probability -inf; its term is 0, not NaN.
        finite = jnp.where(jnp.isfinite(logprobs), logprobs, 0.0)
        found["entropy"] = -(jnp.exp(logprobs) * finite).sum(-1)
    if "max_logprob" in want:
        found["max_logprob"] = logprobs.max(-1)
    if "rank" in want:
        found["rank"] = (logprobs > of_target[:, None]).sum(-1)
    if "margin" in want:
        best = jax.lax.top_k(logprobs, 2)[0]
        found["margin"] = best[:, 0] - best[:, 1]
    if "top_k" in want:
        found["top_logprobs"], found["top_ids"] = jax.lax.top_k(logprobs, k)
    return found
