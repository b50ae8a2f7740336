"""A pass of the model over a batch, and what it says of the targets."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.data.batch import Batch
from tokjax.models.parameters import Params
from tokjax.models.transformer import Output, Transformer
from tokjax.signals import token_stats
from tokjax.training.objective import Ratio

Stats = Mapping[str, Float[Array, "B T"]]


def forward(model: Transformer, params: Params, batch: Batch, **options: Any) -> Output:
    """Returns the backbone's pass over a batch; options are `Transformer.backbone`'s."""
    return model.backbone(
        params,
        model.embed(params, batch.tokens),
        positions=batch.positions,
        segments=batch.segment_ids,
        **options,
    )


def target_stats(out: Output, head: Any, batch: Batch, want: Collection[str]) -> Stats:
    """Returns the wanted statistics of the targets as constants, 0 where a target has no weight.

    Args:
        out: of the backbone.
        head: the model's.
        batch: whose targets are meant.
        want: names as in `token_stats`.
    """
    if not want:
        return {}
    found = token_stats(
        jax.lax.stop_gradient(out.x),
        jax.lax.stop_gradient(head),
        batch.targets,
        want,
        mask=batch.weights != 0,
    )
    return {name: jax.lax.stop_gradient(getattr(found, name)) for name in want}


def plain_nll(nll: Float[Array, "B T"], batch: Batch) -> dict[str, Ratio]:
    """Returns the metric `nll`: the mean over all targets by the data's weights alone."""
    size = jnp.abs(batch.weights)
    return {"nll": (jnp.where(size == 0, 0.0, nll * size).sum(), size.sum())}
