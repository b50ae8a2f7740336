"""The loops of sampling: through the steps of a table, or block by block beside a cache."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from tokjax.models.encoder import Encoder
from tokjax.models.head import logits as logits_of
from tokjax.models.parameters import Params
from tokjax.pretraining.hdlm.gamma import GammaHybrid
from tokjax.pretraining.hdlm.masks import step_mask
from tokjax.pretraining.hdlm.objective import HDLM
from tokjax.pretraining.hdlm.passes import before, head_without, read, step_states
from tokjax.pretraining.hdlm.samplers import Sampler, draws, gumbel_max, update
from tokjax.pretraining.hdlm.schedules import Block, Table, grid_time, transfers


@dataclass(frozen=True)
class Plan:
    """What is static about sampling."""

    model: Encoder
    objective: HDLM
    schedule: Any
    length: int

    @property
    def mask_id(self) -> int:
        """The mask."""
        return self.objective.ids()[0]

    @property
    def attention(self) -> Any:
        """What settled, and what active positions see of each other."""
        return self.objective.settled_attention, self.objective.active_attention

    def logits(self, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns logits, under which the mask is impossible."""
        head = head_without(self.model, params, self.mask_id)
        x = read(self.model, params, x)
        return logits_of(head, x.reshape(-1, x.shape[-1])).reshape(*x.shape[:2], -1)


def walk(
    plan: Plan,
    params: Params,
    tokens: Int[Array, "B L"],
    given: Bool[Array, "B L"],
    sampler: Sampler,
    temperature: Float[Array, ""],
    keys: Key[Array, "B"],
) -> Int[Array, "B L"]:
    """Returns rows written by the steps of a table; every step computes the whole row again.

    Args:
        plan: what is static.
        params: the model's.
        tokens: prompts, and masks behind them.
        given: where the prompts are.
        sampler: the rule.
        temperature: of the draws.
        keys: of each row.
    """
    L = tokens.shape[1]
    table = plan.schedule.table(L)
    places = jnp.arange(L)
    block = plan.schedule.block(L)
    noise = plan.objective.noise
    if isinstance(noise, GammaHybrid):
        first = noise.sigma(jnp.ones(()))
        found = draws(keys, jnp.int32(0), places, plan.model.config.vocabulary)
        away = found.unmask < jnp.exp(-(1 - noise.gamma) * first)
        even = jnp.where(jnp.arange(found.gumbel.shape[-1]) < plan.objective.ids()[1], 0, -jnp.inf)
        even = even.at[plan.mask_id].set(-jnp.inf)
        uniform = gumbel_max(even, jnp.float32(1), found.gumbel)
        tokens = jnp.where(given, tokens, jnp.where(away, uniform, plan.mask_id))

    def step(tokens: Array, row: Any) -> tuple[Array, None]:
        number, levels, following, settled, active, p = row
        may_change = active & ~given

        def changed(tokens: Array) -> Array:
            visible = step_mask(
                places[None], (places < settled)[None], active[None], block, *plan.attention
            )
            x = step_states(
                plan.model,
                params,
                tokens,
                visible,
                jnp.broadcast_to(places, tokens.shape),
                shifted=plan.objective.shifted,
            )
            logits = plan.logits(params, x)
            found = draws(keys, number, places, logits.shape[-1])
            if isinstance(noise, GammaHybrid):
                times = grid_time(levels, table.tau), grid_time(following, table.tau)
                done = levels == 0
                weights = _reverse(noise, logits, tokens, times, done, plan.mask_id)
                drawn = gumbel_max(weights, jnp.float32(1), found.gumbel)
                return jnp.where(may_change, drawn, tokens)
            drawn = gumbel_max(logits, temperature, found.gumbel)
            odds = jnp.broadcast_to(p, tokens.shape)
            return update(sampler, tokens, drawn, may_change, odds, found, plan.mask_id)

        return jax.lax.cond(may_change.any(), changed, lambda t: t, tokens), None

    steps = jax.tree.map(lambda a: a[1:], _rows(table))
    return jax.lax.scan(step, tokens, steps)[0]


def _reverse(noise: GammaHybrid, logits, tokens, times, done, mask_id: int) -> Array:
    """Returns log-weights of a step of the reversed chain; a last step leaves no mask."""
    shape = tokens.shape
    sigma, earlier = (jnp.broadcast_to(noise.sigma(t), shape).ravel() for t in times)
    flat = logits.reshape(-1, logits.shape[-1])
    flat = jnp.where(jnp.isfinite(flat), flat, 0.0)
    found = noise.reverse(flat, tokens.ravel(), sigma, earlier, mask_id).reshape(logits.shape)
    is_mask = jnp.arange(logits.shape[-1]) == mask_id
    return jnp.where(done[None, :, None] & is_mask, -jnp.inf, found)


def _rows(table: Table) -> tuple[Any, ...]:
    levels = np.asarray(table.levels)
    # Behind the last step all are clean: level -1 is the end of the grid of times.
    following = np.concatenate([levels[1:], np.zeros_like(levels[:1])])
    following = np.where(levels == 0, -1, following)
    numbers = np.arange(len(levels), dtype=np.int32)
    rows = (numbers, levels, following, table.settled, table.active, transfers(table))
    return tuple(map(jnp.asarray, rows))


def cached_walk(
    plan: Plan,
    params: Params,
    tokens: Int[Array, "B L"],
    given: Bool[Array, "B L"],
    sampler: Sampler,
    temperature: Float[Array, ""],
    keys: Key[Array, "B"],
) -> Int[Array, "B L"]:
    """Returns what `walk` does for blocks, with keys and values of settled blocks kept.

    Each step computes its own block alone; one more pass over a finished block fills the cache. For
    the arguments see `walk`; parameters are unstacked.
    """
    schedule: Block = plan.schedule
    B, L = tokens.shape
    width = schedule.block(L)
    tau, count = schedule.levels(L), -(-L // width)
    odds = transfers(schedule.table(L))[1 : tau + 1, 0]
    pad = ((0, 0), (0, count * width - L))
    tokens = jnp.pad(tokens, pad, constant_values=plan.mask_id)
    given = jnp.pad(given, pad)
    of_settled, of_active = plan.attention

    def states(tokens, cache, start, last, causal: bool):
        """Returns the states of a block, those that predict it, and the cache with it."""
        places = start + jnp.arange(width)
        slots = jnp.arange(count * width)
        visible = slots < jnp.minimum(start + width, L)
        visible = jnp.broadcast_to(visible, (width, len(slots)))
        if causal:
            visible &= slots <= places[:, None]
        # A place behind the end of the row sees itself alone.
        visible |= slots == places[:, None]
        out = plan.model.backbone(
            params,
            plan.model.embed(params, tokens),
            positions=jnp.broadcast_to(places, tokens.shape),
            cache=cache,
            visible=visible[None],
        )
        predicts = before(out.x).at[:, 0].set(last) if plan.objective.shifted else out.x
        return out.x, predicts, out.cache

    def one_block(carry, index):
        tokens, cache, last = carry
        start = index * width
        own = jax.lax.dynamic_slice_in_dim(tokens, start, width, axis=1)
        places = start + jnp.arange(width)
        fixed = jax.lax.dynamic_slice_in_dim(given, start, width, axis=1)
        may_change = ~fixed & (places < L)

        def step(own, row):
            number, p = row
            _, x, _ = states(own, cache, start, last, of_active == "causal")
            logits = plan.logits(params, x)
            found = draws(keys, index * tau + number, places, logits.shape[-1])
            drawn = gumbel_max(logits, temperature, found.gumbel)
            p = jnp.broadcast_to(p, own.shape)
            return update(sampler, own, drawn, may_change, p, found, plan.mask_id), None

        def written(own):
            return jax.lax.scan(step, own, (1 + jnp.arange(tau), odds))[0]

        own = jax.lax.cond(may_change.any(), written, lambda a: a, own)
        x, _, cache = states(own, cache, start, last, of_settled == "causal")
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, own, start, axis=1)
        return (tokens, cache, x[:, -1]), None

    cache = plan.model.init_cache(B, count * width)
    last = jnp.zeros((B, plan.model.config.d_model), jnp.dtype(plan.model.config.dtype))
    carry, _ = jax.lax.scan(one_block, (tokens, cache, last), jnp.arange(count))
    return carry[0][:, :L]
