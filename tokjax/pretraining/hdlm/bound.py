"""How likely a model finds texts: a bound on their negative log-likelihood, by random masks.

Reference: "Unifying Autoregressive and Diffusion-Based Sequence Generation", arXiv 2504.06416; the
bound of masked diffusion is that of MDLM (arXiv 2406.07524).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax import struct
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.models.encoder import Encoder
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.pretraining.hdlm.draws import Step, spread
from tokjax.pretraining.hdlm.epsilon import FLOOR, EpsilonHybrid
from tokjax.pretraining.hdlm.objective import HDLM
from tokjax.pretraining.hdlm.passes import check_model, head_without, read
from tokjax.pretraining.hdlm.schedules import Block, grid_time, transfers
from tokjax.pretraining.masked_lm import own_weights
from tokjax.signals import weighted_nll


@struct.dataclass
class Bound:
    """An estimate of how likely a model finds texts.

    Attributes:
        nats: upper bound on the negative log-likelihood of each row, up to the noise of the draws.
        tokens: number of predicted tokens of each row (by data weight).
    """

    nats: Float[Array, "B"]
    tokens: Float[Array, "B"]

    @property
    def perplexity(self) -> float:
        """exp of the nats by token, over all rows."""
        return float(jnp.exp(self.nats.sum() / self.tokens.sum()))


def likelihood_bound(
    objective: HDLM,
    model: Transformer,
    params: Params,
    batch: Batch,
    *,
    draws: int = 100,
    seed: int = 0,
) -> Bound:
    """Returns a bound on the negative log-likelihood of texts under a hyperschedule.

    Only masks are drawn: visible tokens are never replaced and do not count, whatever the model was
    trained with. For blocks it is the integral over t of the masked tokens' cross entropy over t,
    at evenly spread times; with tau=1 there is one time, and with width=1 besides the bound is the
    likelihood itself. For ramps it is that of the sampler `original` in the schedule's own steps:
    at each of them the cross entropy of masked tokens times the probability that they are unmasked.

    Args:
        objective: with the schedule and the attention; its ids must be known.
        model: the model.
        params: its parameters.
        batch: the texts, one a row for ramps.
        draws: of masks, for each block, or each row.
        seed: of the draws.

    Raises:
        ConfigError: the model cannot be used, or draws is not positive.
    """
    if draws < 1:
        raise ConfigError(f"draws={draws} must be at least 1")
    noise = EpsilonHybrid(epsilon=0.0, visible_weight=0.0)
    plain = dataclasses.replace(objective, noise=noise, times="auto", settled_weight=0.0)
    if isinstance(plain.schedule, Block):
        if plain.settled_attention == "full":
            raise ConfigError(
                "a bound for settled_attention='full' is not known to likelihood_bound: it goes "
                "through all blocks in one pass, where settled positions must not change"
            )
        plain = dataclasses.replace(plain, passes="auto")
    return _bound(plain, check_model(model), draws, params, batch, jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _bound(
    objective: HDLM, model: Encoder, draws: int, params: Params, batch: Batch, key: jax.Array
) -> Bound:
    start, masks = jax.random.split(key)
    counted = jnp.where(objective.eligible(batch), own_weights(batch), 0.0)
    find = _of_blocks if isinstance(objective.schedule, Block) else _of_steps
    head = head_without(model, params, objective.ids()[0])

    def one(total: Array, number: Array) -> tuple[Array, None]:
        step, over = find(objective, batch, start, number / draws)
        noised = objective.noised(batch, step, jax.random.fold_in(masks, number))
        x, _, _ = objective.states(model, params, batch, step, noised.tokens)
        _, nll = weighted_nll(
            read(model, params, x),
            head,
            batch.tokens[..., None],
            jnp.zeros((*batch.tokens.shape, 1)),
        )
        weights = jnp.where(noised.masked, counted * over, 0.0)
        return total + jnp.where(weights == 0, 0.0, weights * nll[..., 0]).sum(-1), None

    rows = jnp.zeros(batch.tokens.shape[0], jnp.float32)
    total, _ = jax.lax.scan(one, rows, jnp.arange(draws))
    return Bound(total / draws, counted.sum(-1))


def _of_blocks(objective: HDLM, batch: Batch, key: jax.Array, share: Array) -> tuple[Step, Any]:
    """Returns all blocks at times that are shifted by a share of [0, 1), and what nll weighs."""
    schedule, T = objective.schedule, batch.tokens.shape[1]
    filled = batch.segment_ids > 0
    if schedule.levels(T) == 1:
        p = jnp.ones(filled.shape, jnp.float32)
    else:
        times = spread(key, batch.segment_ids, batch.positions // schedule.block(T))
        p = jnp.maximum((times + share) % 1.0, FLOOR)
    return Step(jnp.zeros_like(filled), filled, p), 1 / p


def _of_steps(objective: HDLM, batch: Batch, key: jax.Array, share: Array) -> tuple[Step, Any]:
    """Returns a step of each row, and what nll weighs in the sum over all steps."""
    T = batch.tokens.shape[1]
    table = objective.schedule.table(T)
    u = (jax.random.uniform(key, (batch.tokens.shape[0], 1)) + share) % 1.0
    number = 1 + jnp.minimum((u * table.steps).astype(jnp.int32), table.steps - 1)
    levels = jnp.asarray(table.levels)[number, batch.positions]
    filled = batch.segment_ids > 0
    active = jnp.asarray(table.active)[number, batch.positions] & filled
    settled = (batch.positions < jnp.asarray(table.settled)[number]) & filled
    p = grid_time(jnp.minimum(levels, table.tau - 1), table.tau)
    over = table.steps * transfers(table)[number, batch.positions]
    return Step(settled, active, p), over
