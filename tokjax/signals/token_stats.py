"""Per-token statistics of a model's predictions, streamed so that [B, T, V] never exists."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.errors import nearest
from tokjax.models.head import Head, as_head
from tokjax.signals.soft_targets import SoftTargets
from tokjax.signals.streamed_stats import PAIRED, Plan, Side, streamed_stats

OF_TARGETS = ("nll", "logprob", "rank")
WANTED = (
    *OF_TARGETS,
    "cross_entropy",
    "entropy",
    "varentropy",
    "max_logprob",
    "margin",
    "top_k",
    *PAIRED,
)


@struct.dataclass
class TokenStats:
    """Statistics of each position; those not asked for are None. Logarithms are natural.

    p is the predicted distribution, r that of `other`, q the soft targets. Sums run over the
    vocabulary; a token of probability 0 adds nothing. Everything but rank and top_ids is
    differentiable.

    Attributes:
        nll: negative log-likelihood of the target, -log p[target], in nats; [B T K] when each
            position has K targets.
        logprob: its negative.
        rank: number of tokens strictly likelier than the target; 0 is the best.
        cross_entropy: sum q * -log p, in nats, whatever q sums to.
        entropy: sum p * -log p, in nats.
        varentropy: variance of -log p under p, in nats squared.
        max_logprob: log-probability of the likeliest token.
        margin: log-probability of the likeliest minus that of the second.
        top_ids: the k likeliest tokens, likeliest first, of equals the lower id first; ids of
            impossible tokens (log-probability -inf) mean nothing.
        top_logprobs: their log-probabilities.
        kl: Kullback-Leibler divergence KL(p || r) = sum p * log(p / r), in nats.
        reverse_kl: KL(r || p), in nats.
        jsd: Jensen-Shannon divergence, (KL(p || m) + KL(r || m)) / 2 with m = (p + r) / 2, in
            nats, at most ln 2.
    """

    nll: Float[Array, "B T"] | Float[Array, "B T K"] | None = None
    logprob: Float[Array, "B T"] | Float[Array, "B T K"] | None = None
    rank: Int[Array, "B T"] | Int[Array, "B T K"] | None = None
    cross_entropy: Float[Array, "B T"] | None = None
    entropy: Float[Array, "B T"] | None = None
    varentropy: Float[Array, "B T"] | None = None
    max_logprob: Float[Array, "B T"] | None = None
    margin: Float[Array, "B T"] | None = None
    top_ids: Int[Array, "B T k"] | None = None
    top_logprobs: Float[Array, "B T k"] | None = None
    kl: Float[Array, "B T"] | None = None
    reverse_kl: Float[Array, "B T"] | None = None
    jsd: Float[Array, "B T"] | None = None


def token_stats(
    x: Float[Array, "B T D"],
    head: Head | Float[Array, "V D"],
    targets: Int[Array, "B T"] | Int[Array, "B T K"] | None = None,
    want: Collection[str] = ("nll",),
    k: int = 5,
    *,
    soft: SoftTargets | None = None,
    other: tuple[Float[Array, "B T E"], Head | Float[Array, "V E"]] | None = None,
    mask: Bool[Array, "B T"] | None = None,
) -> TokenStats:
    """Returns the statistics named by `want`, without ever holding [B, T, V].

    Gradients with respect to x, the head and both parts of `other` are exact, for any cotangent
    of any of the statistics; the backward pass computes the logits again, tile by tile. (A loss
    whose weights are known beforehand is faster by `weighted_nll`.) Statistics are float32;
    bfloat16 inputs are multiplied as they are and added up in float32.

    Args:
        x: final hidden states.
        head: a Head, or the plain table of one row per token id.
        targets: the ids whose likelihood and rank are meant, one or K at each position.
        want: any of nll, logprob, rank (of the targets), cross_entropy (with `soft`), entropy,
            varentropy, max_logprob, margin, top_k, and kl, reverse_kl, jsd (with `other`).
        k: how many tokens `top_k` returns.
        soft: target distributions, for cross_entropy; they are constants of the gradient.
        other: hidden states and head of a second distribution over the same ids (a teacher, an
            amateur, another layer). Stop its gradient where it is a constant: that saves time.
        mask: positions out of use are False: their statistics are 0 and carry no gradient,
            whatever their ids and states hold.

    Raises:
        ValueError: an unknown statistic, one without what it needs, or shapes that do not fit.
    """
    head = as_head(head)
    if other is not None:
        other = (other[0], as_head(other[1]))
    _check(x, head, targets, want, k, soft, other, mask)
    sides = [(x, head)]
    if other is not None and not set(want).isdisjoint(PAIRED):
        sides.append(other)  # type: ignore[arg-type]
    if set(want).isdisjoint(OF_TARGETS):
        targets = None
    one_target = False
    if targets is not None and targets.ndim == 2:
        one_target, targets = True, targets[..., None]
    of_tokens, rows = None, None
    if soft is not None and "cross_entropy" in want:
        of_tokens, rows = soft.split()
    xs, *per_token = _where(mask, ([x for x, _ in sides], targets, of_tokens))
    pair = tuple(Side(x, head) for x, (_, head) in zip(xs, sides, strict=True))
    found = streamed_stats(Plan(frozenset(want), k), pair, tuple(per_token), rows)
    found = _where(mask, found)
    if one_target:
        found |= {name: found[name][..., 0] for name in OF_TARGETS if name in found}
    return TokenStats(**found)


def _where(mask: Bool[Array, "B T"] | None, tree: Any) -> Any:
    """Returns the arrays [B, T, ...] with zeros where the mask is False."""
    if mask is None:
        return tree
    fit = lambda a: mask.reshape(*mask.shape, *(1,) * (a.ndim - 2))  # noqa: E731
    return jax.tree.map(lambda a: jnp.where(fit(a), a, jnp.zeros_like(a)), tree)


def _check(x, head, targets, want, k, soft, other, mask) -> None:
    """Raises ValueError where the arguments of token_stats do not fit together."""
    vocabulary, width = head.table.shape
    if isinstance(want, str):
        raise ValueError(f"want={want!r} must be a collection of names, such as [{want!r}]")
    for name in want:
        if name not in WANTED:
            raise ValueError(f"unknown token statistic {name!r}.{nearest(name, WANTED)}")
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"x {x.shape} must be [B, T, D] for the head's table {head.table.shape}")
    if targets is not None and (targets.ndim not in (2, 3) or targets.shape[:2] != x.shape[:2]):
        raise ValueError(f"targets {targets.shape} must be [B, T] or [B, T, K] for x {x.shape}")
    if mask is not None and mask.shape != x.shape[:2]:
        raise ValueError(f"mask {mask.shape} must be [B, T] for x {x.shape}")
    needs = {"targets": (targets, OF_TARGETS), "soft": (soft, ("cross_entropy",))}
    for argument, (value, names) in (needs | {"other": (other, PAIRED)}).items():
        missing = [name for name in want if name in names and value is None]
        if missing:
            raise ValueError(f"statistic {missing[0]!r} needs the argument {argument}")
    if soft is not None:
        soft.check(x.shape[:2], vocabulary)
    if other is not None:
        shape = other[1].table.shape
        if other[0].shape != (*x.shape[:2], shape[1]):
            raise ValueError(
                f"other's states {other[0].shape} must be [B, T, E] for x {x.shape} and other's "
                f"table {shape}"
            )
        if shape[0] != vocabulary:
            raise ValueError(
                f"other's table {shape} must have a row for each of the {vocabulary} ids of the "
                f"head's table {head.table.shape}"
            )
    least = {"top_k": k, "margin": 2}
    for name in want:
        if not 1 <= least.get(name, 1) <= vocabulary:
            raise ValueError(
                f"statistic {name!r} takes {least[name]} tokens of a vocabulary of {vocabulary}: "
                f"choose k from 1 to {vocabulary}"
            )
