"""How likely each of several answers is, with or without an intervention."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tokjax.errors import ConfigError
from tokjax.models.edits import Edits
from tokjax.models.transformer import Transformer
from tokjax.signals.token_stats import token_stats
from tokjax.steering.rows import Rows, batches, rows_of


@dataclass(frozen=True)
class OptionScores:
    """Log-probabilities of one prompt's options, in nats.

    Attributes:
        last: of each option's last token.
        total: of all its tokens.
        lengths: number of its tokens.
    """

    last: Float[np.ndarray, " O"]
    total: Float[np.ndarray, " O"]
    lengths: np.ndarray


def score_options(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    edits: Edits | None = None,
    batch_size: int = 8,
) -> list[OptionScores]:
    """Returns how likely the model finds each prompt's options.

    The reference code of GrAInS judges by `last` alone; `total` is the likelihood of the option.

    Args:
        model: the model.
        params: its parameters.
        prompts: ids, BOS included.
        options: for each prompt, the ids of its options.
        edits: the same for all rows, for example from `steering_edits`.
        batch_size: options computed at a time.

    Raises:
        ConfigError: not one list of options for each prompt, an empty prompt, list or option, one
            longer than the model's positions, or edits for several rows.
        DataError: an id is not in the model's vocabulary.
    """
    if len(prompts) != len(options) or not len(prompts) or not all(map(len, options)):
        raise ConfigError(
            f"{len(prompts)} prompts and {len(options)} lists of options: give each prompt at "
            f"least one option"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(edits):
        if jnp.ndim(leaf) > 1 and leaf.shape[1] != 1:
            raise ConfigError(
                f"Edits{jax.tree_util.keystr(path)} has shape {leaf.shape}: options are scored "
                f"under the same edits, so the second axis must be 1"
            )
    texts = [(prompt, own) for prompt, each in zip(prompts, options, strict=True) for own in each]
    rows = rows_of(texts, model.config)
    found = [
        np.stack(_scores(model, params, rows.take(batch), edits or Edits()))[:, :own]
        for batch, own in batches(len(texts), batch_size)
    ]
    last, total = np.concatenate(found, axis=1)
    lengths = np.asarray(rows.lengths - rows.starts)
    ends = np.cumsum([len(each) for each in options])
    return [
        OptionScores(last[end - len(each) : end], total[end - len(each) : end], own)
        for end, each, own in zip(ends, options, np.split(lengths, ends[:-1]), strict=True)
    ]


@partial(jax.jit, static_argnums=0)
def _scores(
    model: Transformer, params: Any, rows: Rows, edits: Edits
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    out = model.backbone(params, model.embed(params, rows.tokens), edits=edits)
    targets = jnp.roll(rows.tokens, -1, axis=1)
    nll = token_stats(out.x, model.head(params), targets, want=("nll",)).nll
    assert nll is not None
    place = jnp.arange(1, rows.tokens.shape[1] + 1)  # of the token that is predicted
    inside = (place >= rows.starts[:, None]) & (place < rows.lengths[:, None])
    last = jnp.where(place == rows.lengths[:, None] - 1, nll, 0.0)
    return -last.sum(-1), -jnp.where(inside, nll, 0.0).sum(-1)
