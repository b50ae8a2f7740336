"""Small things that nested decoding needs: rows that wait while others go on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from tokjax.decoding.predictors import StepOutput
from tokjax.decoding.prompts import Prompts


def chosen(rows: Bool[Array, "B"], new: Any, old: Any) -> Any:
    """Returns a tree whose leaves lead with rows: new in the rows that are chosen, else old."""
    return jax.tree.map(
        lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old
    )


def read_prompts(
    step: Callable[[Any, Int[Array, "B"]], tuple[Any, StepOutput]], state: Any, prompts: Prompts
) -> tuple[Any, StepOutput]:
    """Returns the state behind prompts of different lengths and what is said there.

    One step a symbol, as decoding does it: what is decoded and what is read are then the same.

    Args:
        step: of the predictor.
        state: before any symbol.
        prompts: what to read.
    """
    columns = jnp.moveaxis(prompts.tokens, 1, 0)
    shapes = jax.eval_shape(step, state, columns[0])[1]
    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    def one(carried: Any, column: Any) -> tuple[Any, None]:
        place, symbols = column
        return chosen(place < prompts.lengths, step(carried[0], symbols), carried), None

    places = jnp.arange(columns.shape[0])
    return jax.lax.scan(one, (state, nothing), (places, columns))[0]
