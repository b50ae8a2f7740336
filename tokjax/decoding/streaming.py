"""Tokens as they are taken: from inside the compiled loop to a function on the host.

The compiled program holds one function for all; which callback is meant is a number that the
program is given, so that another callback compiles nothing.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Bool, Int


@dataclass(frozen=True, eq=False)
class Streamed:
    """What one turn of a decode took.

    Attributes:
        step: number of the token, from 0.
        tokens: one for each row.
        written: rows whose text the token belongs to; the others ended before.
        done: rows that this token, or one before it, ended.
    """

    step: int
    tokens: Int[np.ndarray, "B"]
    written: Bool[np.ndarray, "B"]
    done: Bool[np.ndarray, "B"]


Callback = Callable[[Streamed], None]


@dataclass
class _Receiver:
    callback: Callback
    error: BaseException | None = field(default=None)


_RECEIVERS: dict[int, _Receiver] = {}
_NUMBERS = itertools.count()


@contextlib.contextmanager
def receiver(callback: Callback | None) -> Iterator[Any]:
    """Gives the number under which a callback is known while the block runs, None for none.

    The block has to wait for what it computes. What the callback raises is raised behind it.
    """
    if callback is None:
        yield None
        return
    number = next(_NUMBERS) % 2**31
    _RECEIVERS[number] = own = _Receiver(callback)
    try:
        yield np.int32(number)
    finally:
        del _RECEIVERS[number]
    if own.error is not None:
        raise own.error


def send(
    number: Any,
    step: Int[Array, ""],
    tokens: Int[Array, "B"],
    written: Bool[Array, "B"],
    done: Bool[Array, "B"],
) -> Bool[Array, ""]:
    """Hands a step to the callback of a number; returns whether to go on."""
    answer = jax.ShapeDtypeStruct((), jnp.bool_)
    return io_callback(_deliver, answer, number, step, tokens, written, done, ordered=True)


def _deliver(number: Any, step: Any, tokens: Any, written: Any, done: Any) -> np.bool_:
    own = _RECEIVERS[int(number)]
    try:
        own.callback(Streamed(int(step), *(np.array(a) for a in (tokens, written, done))))
    except BaseException as error:  # raised again by `receiver`: through the device it cannot go
        own.error = error
    return np.bool_(own.error is None)
