"""The passes over tiles of logits behind `token_stats`, forward and backward.

The gradient needs every logit a second time: one more product than autodiff of the naive form,
which keeps them all.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from tokjax import struct
from tokjax.models.head import Head, logits, logits_vjp
from tokjax.signals.logits_gradient import coefficients, divergence_terms, logits_gradient
from tokjax.signals.soft_targets import Shared, soft_tile
from tokjax.signals.vocabulary import (
    block_ids,
    flat,
    fold_blocks,
    from_chunks,
    head_block,
    in_chunks,
    logits_tile,
    per_shard,
    tile_size,
    unflat,
)

PAIRED = ("kl", "reverse_kl", "jsd")


@dataclass(frozen=True)
class Plan:
    """What to compute: the names of statistics, and how many of the likeliest tokens."""

    want: frozenset[str]
    k: int

    def any(self, *names: str) -> bool:
        """Whether one of the names is wanted."""
        return not self.want.isdisjoint(names)

    @property
    def best(self) -> int:
        """How many of the likeliest tokens the statistics need."""
        wanted = {"top_k": self.k, "margin": 2, "max_logprob": 1}
        return max((n for name, n in wanted.items() if name in self.want), default=0)


@struct.dataclass
class Side:
    """One of the distributions: hidden states, and the head that reads them."""

    x: Float[Array, "B T D"]
    head: Head


@struct.dataclass
class Normaliser:
    """The log-sum-exp in two parts, whose sum would lose digits where logits are large."""

    largest: Float[Array, "n"]
    log_total: Float[Array, "n"]

    def __call__(self, z: Float[Array, "n v"]) -> Float[Array, "n v"]:
        """Returns log-probabilities."""
        return (z - self.largest[:, None]) - self.log_total[:, None]


def streamed_stats(
    plan: Plan, sides: tuple[Side, ...], per_token: Any, table: Shared | None
) -> dict[str, Any]:
    """Returns the statistics by name, each [B, T, ...].

    Args:
        plan: what to compute.
        sides: one distribution, or two to compare; differentiable.
        per_token: (targets [B T K] or None, soft targets without what they share or None).
        table: what soft targets share, or None.
    """
    return _streamed_stats(plan, sides, per_token, table)  # type: ignore[return-value]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _streamed_stats(plan, sides, per_token, table):
    return _forward(plan, sides, per_token, table)[0]


def _forward(plan, sides, per_token, table):
    def local(tokens, shared, _):
        heads, table = shared
        n, size = tile_size(heads[0].table.shape[0], tokens[0][0].shape[0] * tokens[0][0].shape[1])

        def chunk(xs, targets, soft):
            state = _describe(plan, heads[0], xs[0], targets, soft, table, size)
            norms = [state.pop("norm")]
            if plan.any(*PAIRED):
                other = _describe(Plan(frozenset(), 0), heads[1], xs[1], None, None, None, size)
                norms.append(other["norm"])
            state |= _compare(plan, heads, xs, norms, state.get("target"), size)
            return _statistics(plan, norms[0], state), state | {"norms": tuple(norms)}

        chunks, total = in_chunks(flat(tokens), n)
        _, found = jax.lax.scan(lambda _, c: (None, chunk(*c)), None, chunks)
        return unflat(from_chunks(found, total), tokens), ()

    heads = tuple(side.head for side in sides)
    tokens = (tuple(side.x for side in sides), *per_token)
    return per_shard(local, tokens, (heads, table))[0]


def _describe(plan, head, x, targets, soft, table, size) -> dict[str, Any]:
    """Returns what one pass over the blocks finds, by an online log-sum-exp."""
    vocabulary, count = head.table.shape[0], x.shape[0]
    zeros = jnp.zeros(count, jnp.float32)
    state: dict[str, Any] = {"largest": jnp.full(count, -jnp.inf), "total": zeros}
    if plan.any("entropy", "varentropy"):
        state |= {"mean": zeros, "squares": zeros}
    if targets is not None:
        # An id outside the vocabulary is found in no block: its statistics are NaN.
        state["target"] = jnp.full(targets.shape, jnp.nan, jnp.float32)
    if soft is not None:
        state |= {"soft_logit": zeros, "soft_mass": zeros}
    if plan.best:
        ids = jnp.broadcast_to(jnp.arange(plan.best), (count, plan.best))
        state["best"] = (jnp.full(ids.shape, -jnp.inf), ids)

    def step(old, start):
        z = logits_tile(head, x, start, size)
        first = block_ids(start, vocabulary, size)[0][0]
        new, shift, moved = _join_sums(old, z)
        if targets is not None:
            local = targets - first
            value = jnp.take_along_axis(z, jnp.clip(local, 0, size - 1), axis=-1)
            here = (targets >= start) & (local < size)
            new["target"] = jnp.where(here, value, old["target"])
        if soft is not None:
            q = soft_tile(soft, table, start, vocabulary, size)
            product = jnp.where(q != 0, q * (z - shift[:, None]), 0.0).sum(-1)
            new["soft_logit"] = old["soft_logit"] + moved * old["soft_mass"] + product
            new["soft_mass"] = old["soft_mass"] + jnp.broadcast_to(q, z.shape).sum(-1)
        if plan.best:
            new["best"] = _join_best(old["best"], z, first, whole=size == vocabulary)
        return new

    state = fold_blocks(step, state, vocabulary, size)
    state["norm"] = Normaliser(state.pop("largest"), jnp.log(state["total"]))
    return state


def _join_sums(old, z) -> tuple[dict[str, Any], Float[Array, "n"], Float[Array, "n"]]:
    """Returns the sums with a block's logits z, what they are now relative to, and its move.

    `total` is the sum of exp(z - largest); `mean` and `squares` (if asked for) are the mean of
    z - largest and the sum of squared distances from it, both weighted by exp(z - largest).

    Reference: Chan, Golub and LeVeque (1983), equation 2.1, with weights for counts.
    """
    largest = jnp.maximum(old["largest"], z.max(-1))
    # While every token is impossible there is nothing to shift by: -inf - -inf is NaN.
    shift = jnp.where(largest == -jnp.inf, 0.0, largest)
    moved = jnp.where(old["largest"] == -jnp.inf, 0.0, old["largest"] - shift)
    relative = z - shift[:, None]
    e = jnp.exp(relative)
    fade = jnp.exp(moved)
    kept, added = old["total"] * fade, e.sum(-1)
    new = {"largest": largest, "total": kept + added}
    if "mean" in old:
        relative = jnp.where(e > 0, relative, 0.0)
        mean = (e * relative).sum(-1) / jnp.where(added > 0, added, 1.0)
        squares = (e * jnp.square(relative - mean[:, None])).sum(-1)
        share = added / jnp.where(new["total"] > 0, new["total"], 1.0)
        apart = mean - (old["mean"] + moved)
        new["mean"] = old["mean"] + moved + apart * share
        new["squares"] = old["squares"] * fade + squares + kept * share * jnp.square(apart)
    return new, shift, moved


def _join_best(old, z, first, whole: bool):
    """Returns the likeliest tokens' logits and ids, with those of a block that begins at first."""
    k = old[0].shape[-1]
    values, places = jax.lax.top_k(z, min(k, z.shape[-1]))
    if whole:
        return values, places
    values = jnp.concatenate([old[0], values], axis=-1)
    ids = jnp.concatenate([old[1], first + places], axis=-1)
    values, places = jax.lax.top_k(values, k)
    return values, jnp.take_along_axis(ids, places, axis=-1)


def _compare(plan, heads, xs, norms, target, size) -> dict[str, Any]:
    """Returns the sums that need normalised log-probabilities: a second pass over the blocks."""
    vocabulary, count = heads[0].table.shape[0], xs[0].shape[0]
    state: dict[str, Any] = {}
    if plan.any("rank"):
        state["rank"] = jnp.zeros(target.shape, jnp.int32)
    for name in ("kl", "reverse_kl", "to_mixture", "other_to_mixture"):
        if plan.any("jsd" if "mixture" in name else name):
            state[name] = jnp.zeros(count, jnp.float32)

    def step(old, start):
        z = logits_tile(heads[0], xs[0], start, size)
        new = dict(old)
        if "rank" in old:
            above = [(z > target[:, k, None]).sum(-1) for k in range(target.shape[1])]
            new["rank"] = old["rank"] + jnp.stack(above, -1)
        if len(norms) > 1:
            a, b = norms[0](z), norms[1](logits_tile(heads[1], xs[1], start, size))
            terms = divergence_terms(a, b)
            new |= {name: old[name] + terms[name].sum(-1) for name in terms if name in old}
        return new

    return fold_blocks(step, state, vocabulary, size) if state else state


def _statistics(plan, norm, state) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "target" in state:
        found["logprob"] = norm(state["target"])
        found["nll"] = -found["logprob"]
    if "mean" in state:
        found["entropy"] = norm.log_total - state["mean"]
        found["varentropy"] = state["squares"] / state["total"]
    if "soft_mass" in state:
        found["cross_entropy"] = state["soft_mass"] * norm.log_total - state["soft_logit"]
    if "best" in state:
        values = norm(state["best"][0])
        found |= {"max_logprob": values[:, 0], "top_logprobs": values[:, : plan.k]}
        found["top_ids"] = state["best"][1][:, : plan.k]
        if "margin" in plan.want:
            found["margin"] = values[:, 0] - values[:, 1]
    if "to_mixture" in state:
        state = state | {"jsd": 0.5 * (state["to_mixture"] + state["other_to_mixture"])}
    # Their terms are not negative, but the rounding of a sum near 0 may be.
    found |= {name: jnp.maximum(state[name], 0.0) for name in PAIRED if name in state}
    if "rank" in state:
        found["rank"] = state["rank"]
    names = plan.want | ({"top_ids", "top_logprobs"} if "top_k" in plan.want else set())
    return {name: value for name, value in found.items() if name in names}


def _forward_and_save(plan, sides, per_token, table):
    inputs = jax.tree.map(lambda leaf: leaf.value, (sides, per_token, table))
    found, state = _forward(plan, *inputs)
    return found, (inputs, found, state)


def _backward(plan, saved, cotangents):
    (sides, per_token, table), found, state = saved
    given = {
        name: c.astype(jnp.float32)
        for name, c in cotangents.items()
        if not isinstance(c, SymbolicZero) and jnp.issubdtype(c.dtype, jnp.floating)
    }
    heads = tuple(side.head for side in sides)
    xs = tuple(side.x for side in sides)
    tokens = (xs, given, found, state, per_token)
    d_xs, d_heads = per_shard(_gradients, tokens, (heads, table))
    d_sides = tuple(Side(d_x, d_head) for d_x, d_head in zip(d_xs, d_heads, strict=True))
    return d_sides, None, None


def _gradients(tokens, shared, summed):
    """Returns the gradients of one device's states, and of the heads over all devices."""
    heads, table = shared
    xs, given, found, state, (targets, soft) = flat(tokens)
    per_position = coefficients(given, found, state, targets)
    vocabulary = heads[0].table.shape[0]
    n, size = tile_size(vocabulary, xs[0].shape[0])
    per_chunk, total = in_chunks((xs, state["norms"], soft, per_position), n)

    def block(carry, start):
        parts = [head_block(head, start, size) for head in heads]
        zeros = _zeros(parts)

        def chunk(d_parts, one):
            xs, norms, soft, c = one
            z = [logits(part, x) for part, x in zip(parts, xs, strict=True)]
            logprobs = [norm(a) for norm, a in zip(norms, z, strict=True)]
            q = None if soft is None else soft_tile(soft, table, start, vocabulary, size)
            ids, fresh = block_ids(start, vocabulary, size)
            d_z = logits_gradient(c, logprobs, q, ids)
            if vocabulary % size:
                d_z = [jnp.where(fresh, d, 0.0) for d in d_z]
            d_sides = [logits_vjp(*args) for args in zip(parts, xs, z, d_z, strict=True)]
            d_xs = tuple(d_x for d_x, _ in d_sides)
            return jax.tree.map(jnp.add, d_parts, [d for _, d in d_sides]), d_xs

        d_parts, d_xs = jax.lax.scan(chunk, zeros, per_chunk)
        d_xs = jax.tree.map(jnp.add, carry[0], d_xs)
        add = partial(_add_block, start=start, size=size)
        # Over devices block by block: in float32, without a float32 copy of the whole head.
        return d_xs, jax.tree.map(add, carry[1], tuple(summed(d_parts)))

    shapes = jax.eval_shape(lambda: summed(_zeros(heads)))
    d_heads = jax.tree.map(lambda s, a: jnp.zeros(s.shape, a.dtype), shapes, heads)
    d_xs = _zeros(per_chunk[0])
    d_xs, d_heads = fold_blocks(block, (d_xs, d_heads), vocabulary, size)
    d_xs = jax.tree.map(lambda d, x: d.astype(x.dtype), from_chunks(d_xs, total), xs)
    return unflat(d_xs, tokens), d_heads


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), tree)


def _add_block(whole, part, start, size):
    # Added, not written: the last block begins before `start` and brings zeros for those ids.
    old = jax.lax.dynamic_slice_in_dim(whole, start, size)
    new = (old.astype(jnp.float32) + part).astype(whole.dtype)
    return jax.lax.dynamic_update_slice_in_dim(whole, new, start, 0)


_streamed_stats.defvjp(_forward_and_save, _backward, symbolic_zeros=True)
