"""How many dimensions real tokens and the mask fill in each layer of an encoder.

Reference: Meng et al., "Representation Deficiency in Masked Language Modeling" (arXiv 2302.02060):
a model trained with the mask among its inputs keeps directions for it that real tokens do not use.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.errors import DataError
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.signals.representation import (
    Moments,
    effective_rank,
    merge_moments,
    spectrum,
    state_moments,
)


@struct.dataclass
class MaskRanks:
    """Effective ranks of states, from what the first block reads to what the last one writes.

    Attributes:
        real: of real tokens, [L + 1].
        mask: of the mask's places; 0 where there are none.
    """

    real: Float[Array, "L1"]
    mask: Float[Array, "L1"]


@struct.dataclass
class MaskMoments:
    """Moments of the states of real tokens and of the mask, [L + 1] each."""

    real: Moments
    mask: Moments


@partial(jax.jit, static_argnums=0)
def mask_moments(
    model: Transformer,
    params: Params,
    tokens: Int[Array, "B T"],
    masks: Bool[Array, "B T"],
    segments: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
) -> MaskMoments:
    """Returns the moments of a batch's states.

    Args:
        model: an encoder (or a causal model).
        params: its parameters.
        tokens: what it reads, the mask included.
        masks: where the mask stands.
        segments: tokens attend within their own; 0 is filling, which counts for nothing.
        positions: of the tokens; default 0, 1, ...
    """
    there = segments > 0

    def both(states: Array) -> tuple[Moments, Moments]:
        return state_moments(states, there & ~masks), state_moments(states, there & masks)

    out = model.backbone(
        params,
        model.embed(params, tokens),
        positions=positions,
        segments=segments,
        capture={"resid_pre": both, "resid_post": both},
    )
    before, behind = out.captured["resid_pre"], out.captured["resid_post"]
    return MaskMoments(*jax.tree.map(lambda a, b: jnp.concatenate([a[:1], b]), before, behind))


def mask_ranks(
    model: Transformer,
    params: Params,
    batches: Iterable[tuple[Any, ...]],
    share: float = 0.9,
) -> MaskRanks:
    """Returns the effective ranks over all batches, of states from which no mean is removed.

    The rank is the number of leading directions that hold a share of the energy. Compare a masked
    language model on inputs with masks, the same model without, and an encoder that never saw one.

    Args:
        model: an encoder.
        params: its parameters.
        batches: arguments of `mask_moments` behind the parameters: tokens, masks, segments and,
            where wanted, positions.
        share: of the energy.

    Raises:
        DataError: there is no batch.
    """
    total: MaskMoments | None = None
    for batch in batches:
        found = mask_moments(model, params, *batch)
        total = found if total is None else _merged(total, found)
    if total is None:
        raise DataError("mask_ranks was given no batch: there are no states to measure")
    real, mask = (
        effective_rank(spectrum(each, centred=False), share=share)
        for each in (total.real, total.mask)
    )
    return MaskRanks(real, mask)


@jax.jit
def _merged(a: MaskMoments, b: MaskMoments) -> MaskMoments:
    return MaskMoments(merge_moments(a.real, b.real), merge_moments(a.mask, b.mask))
