"""Smoothing kernels: how a target's mass is spread over tokens of alike syntactic profile.

Reference: Diehl Martinez et al., "Mitigating Frequency Bias and Anisotropy in Language Model
Pre-Training with Syntactic Smoothing", arXiv 2410.11462, section 3, and its code. Whether rows are
divided by their sum or their length, and whether the normaliser has the code's additional term, are
options, for the two differ.
"""

import typing
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax import struct
from tokjax.errors import ConfigError, nearest
from tokjax.signals.soft_targets import inner_product

Kind = Literal["cosine", "kl", "js", "uniform"]
_EPSILON = 1e-8  # added to every count: a token without any has the uniform profile
_NEVER = -1e9  # logarithm of the probability of an id that must not be predicted
_ROUNDING = 1e-5  # divergences up to here are differences of sums that should be equal
_BLOCK = 2**22  # similarities that exist at a time


@dataclass(frozen=True)
class Similarity:
    """How alike two tokens are by their counts of tags, and how sharply that counts."""

    # cosine of profiles; 1 - d / max d with d a divergence of profiles, from the target's; or all
    # alike, which is label smoothing over the other tokens
    kind: Kind = "cosine"
    # weights are exp(similarity / temperature); None: the code's, 0.025 for cosine, else 0.05
    temperature: float | None = None
    # for kl and js: profiles that sum to 1, or, as the code has it, of length 1
    rows: Literal["l1", "l2"] = "l1"
    # exact: a target distribution sums to 1. reference: as the code, whose normaliser counts the
    # true token as one of similarity 0, so that the sum falls short of 1
    normaliser: Literal["exact", "reference"] = "exact"

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for name in ("kind", "rows", "normaliser"):
            value, choices = getattr(self, name), typing.get_args(hints[name])
            if value not in choices:
                raise ConfigError(
                    f"unknown similarity.{name}={value!r}.{nearest(str(value), choices)}"
                )
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(f"similarity.temperature={self.temperature} must be above 0")

    @property
    def sharpness(self) -> float:
        """One over the temperature."""
        default = 0.025 if self.kind == "cosine" else 0.05
        return 1 / (default if self.temperature is None else self.temperature)


@struct.dataclass
class SmoothingTable:
    """What the smoothed distributions of all targets are computed from, 2 (K + 2) numbers an id.

    The weights of target y are exp(log_prob(features[y], keys)), but for y itself.

    Attributes:
        features: of targets.
        keys: of the ids that mass is spread over.
        log_prob: of both.
    """

    features: Float[Array, "V F"]
    keys: Float[Array, "V G"]
    log_prob: typing.Callable[..., typing.Any] = struct.field(
        pytree_node=False, default=inner_product
    )


def profiles(counts: Float[Array, "V K"], norm: Literal["l1", "l2"]) -> Float[Array, "V K"]:
    """Returns the counts of each token with 1e-8 added, divided by their sum or their length."""
    # Scaled before anything is squared: counts may be large.
    raised = counts + _EPSILON
    raised = raised / raised.max(-1, keepdims=True)
    if norm == "l1":
        return raised / raised.sum(-1, keepdims=True)
    return raised / jnp.sqrt(jnp.square(raised).sum(-1, keepdims=True))


def similarities(
    counts: Float[Array, "V K"], similarity: Similarity, targets: Float[Array, "n K"] | None = None
) -> Float[Array, "n V"]:
    """Returns how alike each target is to each token, V x V unless the targets are given.

    For looking at: training never makes this matrix.

    Args:
        counts: of all tokens.
        similarity: which.
        targets: counts of the targets; all tokens if None.
    """
    targets = counts if targets is None else targets
    if similarity.kind == "uniform":
        return jnp.ones((targets.shape[0], counts.shape[0]), jnp.float32)
    if similarity.kind == "cosine":
        return inner_product(profiles(targets, "l2"), profiles(counts, "l2"))
    p, q = (profiles(c, similarity.rows) for c in (targets, counts))
    d = _divergences(similarity.kind, p, q)
    return 1 - d / _largest(d)


def smoothing_table(
    counts: Float[Array, "V K"], allowed: Bool[Array, "V"], similarity: Similarity
) -> SmoothingTable:
    """Returns the table of a vocabulary; similarities are computed block by block and not kept.

    Args:
        counts: of each token with each tag.
        allowed: tokens that mass may be spread over.
        similarity: how alike tokens are.
    """
    V = counts.shape[0]
    counts = counts.astype(jnp.float32)
    bias = jnp.where(allowed, 0.0, _NEVER)[:, None]
    ones, zeros = jnp.ones((V, 1), jnp.float32), jnp.zeros((V, 1), jnp.float32)
    sharpness = jnp.float32(similarity.sharpness)
    log_prob = inner_product
    if similarity.kind == "uniform":
        # One profile for all: what is left is the number of tokens.
        features, keys = [], []
        offset = zeros
    elif similarity.kind == "cosine":
        unit = profiles(counts, "l2")
        features, keys, offset = [sharpness * unit], [unit], zeros
    else:
        p = profiles(counts, similarity.rows)
        largest = _in_blocks(lambda rows: _largest(_divergences(similarity.kind, rows, p)), p, V)
        scale = sharpness / largest
        own = (p * jnp.log(p)).sum(-1, keepdims=True)
        if similarity.kind == "kl":
            features, keys = [p * scale], [jnp.log(p)]
            offset = sharpness - own * scale
        else:
            features, keys = [p, own, scale], [p, own]
            offset, log_prob = sharpness * ones, _js_log_prob
    # Last come the normaliser, against a 1 of each key, and the keys' bias, against a 1.
    keys = jnp.concatenate([*keys, ones, bias], axis=-1)
    raw = jnp.concatenate([*features, offset, ones], axis=-1)
    ids = jnp.arange(V)

    def normalisers(block):
        rows, own = block
        logs = log_prob(rows, keys)
        logs = jnp.where(own[:, None] == ids, -jnp.inf, logs)
        total = jax.nn.logsumexp(logs, axis=-1, keepdims=True)
        if similarity.normaliser == "reference":
            total = jnp.logaddexp(total, 0.0)
        return total

    normaliser = _in_blocks(normalisers, (raw, ids), V)
    return SmoothingTable(raw.at[:, -2:-1].add(-normaliser), keys, log_prob)


def _divergences(kind: str, p: Float[Array, "n K"], q: Float[Array, "V K"]) -> Float[Array, "n V"]:
    """Returns KL(p || q), or the Jensen-Shannon divergence, of each pair."""
    own = (p * jnp.log(p)).sum(-1, keepdims=True)
    if kind == "kl":
        return own - inner_product(p, jnp.log(q))
    other = (q * jnp.log(q)).sum(-1, keepdims=True)
    return _jensen_shannon(p, own, q, other)


def _jensen_shannon(p, p_logs, q, q_logs) -> Float[Array, "n V"]:
    """Returns the divergence of each pair; a tag at a time, so that [n, V, K] never exists."""
    found = 0.5 * (p_logs + q_logs.T)
    for k in range(p.shape[1]):
        mean = 0.5 * (p[:, k, None] + q[None, :, k])
        found = found - mean * jnp.log(mean)
    return found


def _js_log_prob(features: Float[Array, "n F"], keys: Float[Array, "v G"]) -> Float[Array, "n v"]:
    """Returns the logarithms of the weights, of features (p, sum p log p, scale, offset, 1)."""
    p, own, scale, offset = (features[:, i] for i in _PARTS)
    q, other, bias = keys[:, :-3], keys[:, -3:-2], keys[:, -1]
    return offset - scale * _jensen_shannon(p, own, q, other) + bias


_PARTS = (slice(None, -4), slice(-4, -3), slice(-3, -2), slice(-2, -1))


def _largest(d: Float[Array, "n V"]) -> Float[Array, "n 1"]:
    """Returns the largest of each row; 1 where all are 0 but for rounding: all tokens are alike."""
    largest = d.max(-1, keepdims=True)
    return jnp.where(largest > _ROUNDING, largest, 1.0)


def _in_blocks(fn, arrays, count: int):
    """Returns fn of the rows of arrays, so many at a time that V x V never exists."""
    return jax.lax.map(
        lambda row: jax.tree.map(lambda a: a[0], fn(jax.tree.map(lambda a: a[None], row))),
        arrays,
        batch_size=max(1, min(count, _BLOCK // count)),
    )
