"""Searches guided by a value model: the value of a text is that of its last token.

Reference: "Token-Supervised Value Models for Enhancing Mathematical Problem-Solving Capabilities of
Large Language Models", arXiv 2407.12863.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.decoding.prompts import bucket
from tokjax.decoding.search.drawing import Ids, Scorer, at_least_one
from tokjax.errors import ConfigError, nearest
from tokjax.models.parameters import Params
from tokjax.models.scalar_head import ScalarHead, scalar_head
from tokjax.models.transformer import Transformer

Kind = Literal["mse", "bce"]


@functools.partial(jax.jit, static_argnames=("model", "kind"))
def token_values(
    model: Transformer,
    params: Params,
    head: ScalarHead,
    tokens: Int[Array, "B T"],
    *,
    kind: Kind = "mse",
) -> Float[Array, "B T"]:
    """Returns the value of every prefix of rows: entry t is that of tokens 0 to t.

    Args:
        model: the value model's backbone.
        params: its parameters.
        head: a scalar head, read from the final states.
        tokens: ids from the left; filling behind them changes nothing before it.
        kind: what the head was trained by: "mse" gives its number, "bce" the sigmoid of it.
    """
    x = model.backbone(params, model.embed(params, tokens)).x
    found = scalar_head(head, x)[..., 0]
    return jax.nn.sigmoid(found) if kind == "bce" else found


def value_scorer(
    model: Transformer,
    params: Params,
    head: ScalarHead,
    *,
    kind: Kind = "mse",
    clip: bool = False,
    batch_tokens: int = 16384,
) -> Scorer:
    """Returns the scorer of prompts and continuations by the value of their last token.

    It guides `step_beam` and `rebase`, chooses in `best_of_n`, and weighs the votes of
    `self_consistency`. Every call reads the texts anew: a pass over their tokens. Texts are padded
    to a few shapes, so that few programs are compiled. Generator and value model must have the same
    tokens.

    Args:
        model: the value model's backbone, of any size.
        params: its parameters.
        head: a scalar head, as `load_trained(...).heads["value"]` after training with `tvm`.
        kind: what the head was trained by, "mse" or "bce".
        clip: cut values to [0, 1]: for votes, whose weights should not be negative; in a ranking
            values beyond 1 would be equal.
        batch_tokens: places computed at a time, filling included.

    Raises:
        ConfigError: an unknown kind, a head of another width; in a call, a text that is longer than
            the model's positions.
    """
    at_least_one(batch_tokens=batch_tokens)
    if kind not in ("mse", "bce"):
        raise ConfigError(f"unknown kind={kind!r}.{nearest(str(kind), ('mse', 'bce'))}")
    if head["weight"].shape != (model.config.table_width, 1):
        raise ConfigError(
            f"the head's weight {head['weight'].shape} must be "
            f"({model.config.table_width}, 1): one number read from the model's states"
        )
    limit = model.config.max_positions

    def score(prompts: Sequence[Ids], continuations: Sequence[Ids]) -> Sequence[float]:
        texts = [[*p, *c] for p, c in zip(prompts, continuations, strict=True)]
        longest = max(map(len, texts))
        if longest > limit:
            raise ConfigError(
                f"a text has {longest} tokens, but the value model has max_positions={limit}"
            )
        width = min(bucket(longest), limit)
        most = max(1, batch_tokens // width)
        # Powers of two, as the number of texts changes from turn to turn of a search.
        size = min(1 << (len(texts) - 1).bit_length(), 1 << (most.bit_length() - 1))
        found: list[float] = []
        for first in range(0, len(texts), size):
            own = texts[first : first + size]
            tokens = np.zeros((size, width), np.int32)
            for b, text in enumerate(own):
                tokens[b, : len(text)] = text
            values = np.asarray(token_values(model, params, head, jnp.asarray(tokens), kind=kind))
            found += [float(values[b, len(text) - 1]) for b, text in enumerate(own)]
        return np.clip(found, 0, 1).tolist() if clip else found

    return score
