"""At which step of a hyperschedule each text of a batch is trained."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.data.batch import Batch
from tokjax.pretraining.hdlm.schedules import Block, probability


@struct.dataclass
class Step:
    """What each token is at the step that it is trained at.

    Attributes:
        settled: settled tokens (none of the noisy copy, where there are two).
        active: active ones.
        p: noise of active ones.
    """

    settled: Bool[Array, "B T"]
    active: Bool[Array, "B T"]
    p: Float[Array, "B T"]


def draw_blocks(key: jax.Array, batch: Batch, schedule: Block, continuous: bool) -> Step:
    """Returns the step at which all blocks are active, each with noise of its own.

    Args:
        key: of the draws.
        batch: the texts.
        schedule: of the blocks.
        continuous: noise from [0, 1]; else that of a level.
    """
    T = batch.tokens.shape[1]
    filled = batch.segment_ids > 0
    blocks = batch.positions // schedule.block(T)
    return Step(
        jnp.zeros_like(filled), filled, _noise(key, batch, blocks, schedule.levels(T), continuous)
    )


def draw_steps(key: jax.Array, batch: Batch, schedule: Any, continuous: bool) -> Step:
    """Returns a step for each text, drawn evenly from those that the text takes.

    Args:
        key: of the draws.
        batch: the texts.
        schedule: a hyperschedule.
        continuous: noise from [0, 1], one for each text; else that of the step's levels.
    """
    which, when = jax.random.split(key)
    B, T = batch.tokens.shape
    table = schedule.table(T)
    steps = jnp.asarray([table.steps_of(n) for n in range(1, T + 1)], jnp.int32)
    rows, texts = jnp.arange(B)[:, None], batch.segment_ids
    lengths = jnp.zeros((B, T + 1), jnp.int32).at[rows, texts].max(batch.positions)
    share = jax.random.uniform(which, (B, T + 1))
    step = jnp.floor(share * steps[lengths]).astype(jnp.int32)
    step = 1 + jnp.take_along_axis(jnp.minimum(step, steps[lengths] - 1), texts, axis=1)
    level = jnp.asarray(table.levels)[step, batch.positions]
    active = jnp.asarray(table.active)[step, batch.positions] & (texts > 0)
    settled = (batch.positions < jnp.asarray(table.settled)[step]) & (texts > 0)
    if continuous:
        p = _noise(when, batch, jnp.zeros_like(level), table.tau, continuous)
    else:
        p = probability(jnp.minimum(level, table.tau - 1), table.tau)
    return Step(settled, active, p)


def _noise(
    key: jax.Array, batch: Batch, blocks: Int[Array, "B T"], tau: int, continuous: bool
) -> Float[Array, "B T"]:
    """Returns the noise of each token, one for each block of each text."""
    if tau == 1:
        return jnp.ones(blocks.shape, jnp.float32)
    times = spread(key, batch.segment_ids, blocks)
    if continuous:
        return times
    level = jnp.minimum(jnp.floor(times * tau).astype(jnp.int32), tau - 1)
    return probability(level, tau)


def spread(
    key: jax.Array, texts: Int[Array, "B T"], blocks: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Returns a number in [0, 1) for each block of each text, given to all its tokens.

    The numbers are evenly spaced behind a common random start (a low-discrepancy draw), in random
    order, so that blocks of one text are not alike; each is uniform by itself.

    Args:
        key: of the draws.
        texts: which of its row's texts each token belongs to.
        blocks: which of its text's blocks.
    """
    start, order = jax.random.split(key)

    def changes(a: Array) -> Array:
        return a != jnp.pad(a, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]

    new = changes(texts) | changes(blocks)
    number = (jnp.cumsum(new.ravel()) - 1).reshape(new.shape)
    count = number.max() + 1
    score = jax.random.uniform(order, (new.size,))
    score = jnp.where(jnp.arange(new.size) < count, score, 2.0)
    place = jnp.argsort(jnp.argsort(score))[number]
    return (jax.random.uniform(start) + place / count) % 1.0
