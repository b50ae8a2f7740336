"""When a row is finished: functions of the context right after a token was taken.

Each row also ends at its `max_new_tokens`, which is no stop's business.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from tokjax import struct
from tokjax.decoding.context import Context
from tokjax.errors import ConfigError

_ID_SLOTS = 8  # ids are counted in eights, so that a few more or fewer compile nothing


class Stop(Protocol):
    """Says which rows are finished by their latest token, which stays part of the text."""

    def __call__(self, context: Context) -> Bool[Array, "B"]:
        """Returns true for each row that ends with `context.last`."""
        ...


@struct.dataclass
class _OnTokens:
    ids: Any

    def __call__(self, context: Context) -> Bool[Array, "B"]:
        return (context.last[:, None] == self.ids).any(-1)


def on_tokens(ids: Iterable[int]) -> Stop:
    """Returns the stop behind any of these token ids (the EOS ids); of none, it never stops.

    Raises:
        ConfigError: an id is negative.
    """
    ids = [int(i) for i in ids]
    if any(i < 0 for i in ids):
        raise ConfigError(f"stop ids {ids} must not be negative")
    slots = max(1, -(-len(ids) // _ID_SLOTS)) * _ID_SLOTS
    return _OnTokens(np.array(ids + [-1] * (slots - len(ids)), np.int32))  # -1 is no token's id


def never() -> Stop:
    """Returns the stop that leaves rows to their `max_new_tokens`."""
    return on_tokens(())


@struct.dataclass
class _AnyOf:
    stops: tuple[Any, ...]

    def __call__(self, context: Context) -> Bool[Array, "B"]:
        ended = jnp.zeros(context.last.shape, bool)
        for stop in self.stops:
            ended |= stop(context)
        return ended


def any_of(*stops: Stop) -> Stop:
    """Returns the stop that ends a row when one of the stops does."""
    return _AnyOf(tuple(stops))


@struct.dataclass
class _NotBefore:
    stop: Any
    tokens: Any

    def __call__(self, context: Context) -> Bool[Array, "B"]:
        return self.stop(context) & (context.step >= self.tokens)


def not_before(stop: Stop, tokens: int) -> Stop:
    """Returns the stop that ends no row before it has so many new tokens.

    Raises:
        ConfigError: tokens is negative.
    """
    if tokens < 0:
        raise ConfigError(f"tokens={tokens} must not be negative")
    return _NotBefore(stop, np.int32(tokens))
