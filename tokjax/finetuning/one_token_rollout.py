"""One-token rollout: each target is a one-step bandit on tokens that the model itself proposes.

Reference: "One-Token Rollout: Guiding Supervised Fine-Tuning of LLMs with Policy Gradient" (arXiv
2509.26313). A draw from the tempered policy is rewarded 1 where it is the target and `beta` where
it is not, and the loss is that of REINFORCE with draws and rewards held constant. The exact form,
the expectation over draws, and the floor of log-probabilities are recommendations of tokjax.
"""

import math
import typing
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from tokjax import struct
from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError, nearest
from tokjax.finetuning.sft import loss_weights
from tokjax.models.head import Head, logits, logits_vjp
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.signals.vocabulary import (
    chunk_size,
    flat,
    from_chunks,
    in_chunks,
    per_shard,
    unflat,
)
from tokjax.training.objective import Aux, Loss, PerToken, WithoutState
from tokjax.training.passes import forward, plain_nll


@struct.dataclass
class Positions:
    """What is found at each position; all but `loss` are for metrics.

    Attributes:
        loss: of the draws, or its expectation.
        nll: negative log-likelihood of the target, in nats.
        hits: share of the draws that are the target, or the probability of such a draw.
        entropy: of the policy at temperature 1, in nats.
    """

    loss: Float[Array, "*n"]
    nll: Float[Array, "*n"]
    hits: Float[Array, "*n"]
    entropy: Float[Array, "*n"]


@register("objective", "one_token_rollout")
@dataclass(frozen=True)
class OneTokenRollout(PerToken, WithoutState):
    """-(1/K) sum R(a) log pi(a) over K draws a at each target; R is 1 for the target, else beta.

    A target weighs by how often the model proposes it, and what it proposes instead is pushed down
    where beta is negative. That term has no lower bound, so the loss says nothing of progress: see
    the metrics `hit_rate`, `entropy` and `nll`. A target that is never proposed is not learnt from.
    """

    mode: Literal["sampled", "exact"] = "sampled"  # K draws, or their expectation: no variance
    draws: int = 256  # K, with replacement; of no meaning in the exact mode
    beta: float = -0.1  # reward of a draw that is not the target; that of the target is 1
    kappa: float = 1.3  # temperature of the policy that draws are made from
    # a wrong draw below this log-probability, in nats, is pushed down no further
    floor: float = -20.0
    # what the sum is divided by: each sample's weights and then the number of samples, or the
    # weights of all targets
    norm: Literal["sequence", "token"] = "sequence"

    def __post_init__(self):
        if self.draws < 1:
            raise ConfigError(f"draws={self.draws} must be at least 1")
        if not -math.inf < self.beta <= 1:
            raise ConfigError(f"beta={self.beta} must be at most 1, the reward of the target")
        if not 0 < self.kappa < math.inf:
            raise ConfigError(f"kappa={self.kappa} must be above 0 and finite")
        if not -math.inf < self.floor < 0:
            raise ConfigError(f"floor={self.floor} must be below 0 and finite: a log-probability")
        for name, hint in typing.get_type_hints(type(self)).items():
            value, choices = getattr(self, name), typing.get_args(hint)
            if choices and value not in choices:
                raise ConfigError(f"unknown {name}={value!r}.{nearest(str(value), choices)}")

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns sums over the targets; the data's weights multiply the losses."""
        out = forward(model, params, batch)
        weights, divisor = loss_weights(batch, jnp.ones_like(batch.weights), self.norm)
        total, found = rollout_loss(self, out.x, model.head(params), batch.targets, weights, key)
        size = jnp.abs(batch.weights)
        mean = lambda values: (jnp.where(size == 0, 0.0, values * size).sum(), size.sum())  # noqa: E731
        metrics = {"hit_rate": mean(found.hits), "entropy": mean(found.entropy)}
        return Loss(total, divisor, {**plain_nll(found.nll, batch), **metrics}, aux)


def rollout_loss(
    rule: OneTokenRollout,
    x: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    key: jax.Array,
) -> tuple[Float[Array, ""], Positions]:
    """Returns the weighted sum of the positions' losses, and what is found at each, [B, T].

    The sum is differentiable with respect to x and the head. Logits exist for one chunk of
    positions at a time; the gradient is computed on the way forward. Every position has a key of
    its own, so its draws depend neither on chunks nor on devices.

    Args:
        rule: the options.
        x: final hidden states.
        head: the model's.
        targets: ids.
        weights: any real numbers, constants; 0 leaves a target out.
        key: of the draws.
    """
    keys = jax.random.key_data(jax.random.split(key, targets.shape))
    kind = str(jax.random.key_impl(key))

    weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
    total, found = _summed((rule, kind), x, head, (targets, weights, keys))  # type: ignore[misc]
    return total, jax.lax.stop_gradient(found)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(options, x, head, per_token):
    def score(head, chunk):
        x, (targets, weights, keys) = chunk
        found, _ = position_losses(options[0], logits(head, x), targets, _wrapped(keys, options[1]))
        return None, (found, _weighted(weights, found.loss))

    def local(tokens, head, _):
        chunks, n = _chunks(head, flat(tokens))
        _, (found, values) = jax.lax.scan(lambda _, chunk: score(head, chunk), None, chunks)
        return (values.sum()[None], unflat(from_chunks(found, n), tokens)), ()

    (totals, found), _ = per_shard(local, (x, per_token), head)
    return totals.sum(), found


def _forward(options, x, head, per_token):
    def score(head, d_head, chunk):
        x, (targets, weights, keys) = chunk
        z = logits(head, x)
        found, d_z = position_losses(options[0], z, targets, _wrapped(keys, options[1]))
        d_x, d_part = logits_vjp(head, x, z, d_z * weights[:, None])
        d_head = jax.tree.map(jnp.add, d_head, d_part)
        return d_head, (found, _weighted(weights, found.loss), d_x.astype(x.dtype))

    def local(tokens, head, summed):
        chunks, n = _chunks(head, flat(tokens))
        start = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), head)
        d_head, (found, values, d_x) = jax.lax.scan(partial(score, head), start, chunks)
        return (values.sum()[None], unflat(from_chunks((found, d_x), n), tokens)), summed(d_head)

    (totals, (found, d_x)), d_head = per_shard(local, (x, per_token), head)
    d_head = jax.tree.map(lambda d, a: d.astype(a.dtype), d_head, head)
    return (totals.sum(), found), (d_x, d_head)


def _backward(options, gradients, cotangents):
    scale = cotangents[0]
    by = lambda a: (a.astype(jnp.float32) * scale).astype(a.dtype)  # noqa: E731
    return *jax.tree.map(by, gradients), None


_summed.defvjp(_forward, _backward)


def _chunks(head: Head, tokens: Any) -> tuple[Any, int]:
    return in_chunks(tokens, chunk_size(head.table.shape[0], tokens[0].shape[0]))


def _wrapped(keys: UInt32[Array, "n 2"], kind: str) -> jax.Array:
    """Returns the keys that the numbers stand for."""
    return jax.random.wrap_key_data(keys, impl=kind)


def _weighted(weights: Array, losses: Array) -> Array:
    # A loss that means nothing must not pass a weight of 0.
    return jnp.where(weights == 0, 0.0, weights * losses).sum()


def position_losses(
    rule: OneTokenRollout, z: Float[Array, "n V"], targets: Int[Array, "n"], keys: Any
) -> tuple[Positions, Float[Array, "n V"]]:
    """Returns what is found at each position, and its loss's gradient by the logits.

    Args:
        rule: the options.
        z: logits.
        targets: ids.
        keys: one for each position.
    """
    logp = jax.nn.log_softmax(z)
    p = jnp.exp(logp)
    known = (targets >= 0) & (targets < z.shape[-1])
    clipped = jnp.where(known, targets, 0)[:, None]
    nll = jnp.where(known, -jnp.take_along_axis(logp, clipped, 1)[:, 0], jnp.nan)
    exact = rule.mode == "exact"
    terms = _expected(rule, z, logp, clipped) if exact else _drawn(rule, z, logp, clipped, keys)
    loss, hits, pulls = terms
    # Of -sum pull(a) log pi(a): a is pulled up, and all ids are pushed down by their probability.
    d_z = p * pulls.sum(-1, keepdims=True) - pulls
    entropy = -jnp.where(p > 0, p * logp, 0.0).sum(-1)
    return Positions(jnp.where(known, loss, jnp.nan), nll, hits, entropy), d_z


def _expected(rule, z, logp, targets) -> tuple[Array, Array, Array]:
    """Returns the loss, the share of hits and the coefficients of log pi, as expectations."""
    proposal = jax.nn.softmax(z / rule.kappa)
    right = jnp.arange(z.shape[-1]) == targets
    hits = jnp.take_along_axis(proposal, targets, 1)[:, 0]
    rewards = proposal * jnp.where(right, 1.0, rule.beta).astype(z.dtype)
    # What is never proposed adds nothing, however unlikely it is.
    value = jnp.where(right & (proposal > 0), logp, jnp.maximum(logp, rule.floor))
    pulls = jnp.where(right | (logp > rule.floor), rewards, 0.0)
    return -(rewards * value).sum(-1), hits, pulls


def _drawn(rule, z, logp, targets, keys) -> tuple[Array, Array, Array]:
    """Returns the same of K draws; in the size of [n, V] there are only sums over draws."""
    ids = draw(jax.nn.softmax(z / rule.kappa), rule.draws, keys)
    right = ids == targets
    rewards = jnp.where(right, 1.0, rule.beta).astype(z.dtype) / rule.draws
    at = jnp.take_along_axis(logp, ids, 1)
    loss = -(rewards * jnp.where(right, at, jnp.maximum(at, rule.floor))).sum(-1)
    rows = jnp.arange(z.shape[0])[:, None]
    kept = jnp.where(right | (at > rule.floor), rewards, 0.0)
    pulls = jnp.zeros_like(z).at[rows, ids].add(kept)
    return loss, right.mean(-1, dtype=z.dtype), pulls


def draw(probs: Float[Array, "n V"], count: int, keys: Any) -> Int[Array, "n K"]:
    """Returns `count` independent ids from each row's distribution, in float32.

    They are found in the cumulative sums, so no [n, K, V] is needed; ids of a probability below
    about 1e-7 are drawn with the precision of such sums.

    Args:
        probs: distributions.
        count: K, draws of each row.
        keys: one for each row.
    """
    sums = jnp.cumsum(probs.astype(jnp.float32), axis=-1)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (count,), jnp.float32))(keys)
    # The first id whose sum lies above: one of probability 0 adds nothing and is never the first.
    found = jax.vmap(partial(jnp.searchsorted, side="right"))(sums, uniform * sums[:, -1:])
    return jnp.minimum(found, probs.shape[-1] - 1).astype(jnp.int32)
