"""What a transform of logits is: an (init, update) pair that composes with `chain`.

Each value is an array leaf of its transform, either one number or one for each row: setting another
number compiles nothing. Excluded tokens get the logit -inf.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.decoding.context import Context
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError


class Transform(Protocol):
    """A change to logits that may keep a state.

    One that must fit the prompts may also have `check(prompts, limits, vocab_size)`: `decode` calls
    it on the host, with each row's largest number of new tokens, before anything is compiled. One
    that knows when a text is complete may also have `ends(state, context) -> Bool[B]`: it is asked
    right behind each token, with the state of the latest `update`, and its rows end.
    """

    def init(self, prompts: Prompts, vocab_size: int) -> Any:
        """Returns the state before the first new token."""
        ...

    def update(
        self, logits: Float[Array, "B V"], state: Any, context: Context
    ) -> tuple[Float[Array, "B V"], Any]:
        """Returns the changed logits and the next state."""
        ...


class Memoryless:
    """A transform that keeps nothing between tokens; subclasses define `update`."""

    def init(self, prompts: Prompts, vocab_size: int) -> tuple[()]:
        """Returns the empty state."""
        del prompts, vocab_size
        return ()


class Stateless(Memoryless):
    """A transform of logits alone; subclasses define `apply`."""

    def update(
        self, logits: Float[Array, "B V"], state: tuple[()], context: Context
    ) -> tuple[Float[Array, "B V"], tuple[()]]:
        """Returns the changed logits and the empty state."""
        del context
        return self.apply(logits), state

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Returns the changed logits."""
        raise NotImplementedError


@struct.dataclass
class Chain:
    """Transforms one after the other."""

    transforms: tuple[Any, ...]

    def init(self, prompts: Prompts, vocab_size: int) -> tuple[Any, ...]:
        """Returns the states of all."""
        return tuple(t.init(prompts, vocab_size) for t in self.transforms)

    def update(
        self, logits: Float[Array, "B V"], state: tuple[Any, ...], context: Context
    ) -> tuple[Float[Array, "B V"], tuple[Any, ...]]:
        """Returns the logits behind the last transform, and the states of all."""
        states = []
        for transform, own in zip(self.transforms, state, strict=True):
            logits, own = transform.update(logits, own, context)
            states.append(own)
        return logits, tuple(states)

    def check(self, prompts: Prompts, limits: Any, vocab_size: int) -> None:
        """Lets each transform find what cannot be."""
        for transform in self.transforms:
            check_transform(transform, prompts, limits, vocab_size)

    def ends(self, state: tuple[Any, ...], context: Context) -> Bool[Array, "B"]:
        """Returns the rows that one of the transforms ends."""
        ended = jnp.zeros(context.last.shape, bool)
        for transform, own in zip(self.transforms, state, strict=True):
            if hasattr(transform, "ends"):
                ended |= transform.ends(own, context)
        return ended


def check_transform(transform: Any, prompts: Prompts, limits: Any, vocab_size: int) -> None:
    """Calls a transform's `check`, if it has one."""
    if hasattr(transform, "check"):
        transform.check(prompts, limits, vocab_size)


def chain(*transforms: Transform) -> Chain:
    """Returns the transforms as one, applied from left to right; none leaves logits as they are.

    The usual order: what concerns single tokens (biases, penalties, forced and forbidden ones),
    then `temperature`, then truncation (`top_k`, `top_p`, `min_p`, ...).
    """
    return Chain(tuple(transforms))


def column(value: Any) -> Any:
    """Returns a setting as it meets [B, V]: one number, or a column of one number a row."""
    return value[..., None] if jnp.ndim(value) else value


def sequences(context: Context) -> tuple[Int[Array, "B S"], Int[Array, "B"]]:
    """Returns each row's prompt and new tokens one behind the other, and their number."""
    prompts, lengths = context.prompts.tokens, context.prompts.lengths[:, None]
    at = jnp.arange(prompts.shape[1] + context.generated.shape[1])[None]
    behind = jnp.clip(at - lengths, 0, context.generated.shape[1] - 1)
    tokens = jnp.where(
        at < lengths,
        jnp.take_along_axis(prompts, jnp.minimum(at, prompts.shape[1] - 1), axis=1),
        jnp.take_along_axis(context.generated, behind, axis=1),
    )
    return tokens, lengths[:, 0] + context.step


def slots(values: Sequence[Any], fill: Any, dtype: Any, size: int = 8) -> np.ndarray:
    """Returns values filled up to a multiple of `size`, so that a few more compile nothing."""
    room = max(1, -(-len(values) // size)) * size
    return np.array([*values, *[fill] * (room - len(values))], dtype)


def setting(name: str, value: Any, dtype: Any, ok: Callable[[Any], Any], wanted: str) -> Any:
    """Returns a value, or one for each row, as an array.

    Raises:
        ConfigError: the value is not what is wanted.
    """
    if isinstance(value, jax.core.Tracer):  # built inside a compiled function: unknown until run
        return value.astype(dtype)
    given = np.asarray(value)
    array = given.astype(dtype)
    exact = np.issubdtype(dtype, np.floating) or np.array_equal(array, given)
    if given.ndim > 1 or not exact or not np.all(ok(array)):
        raise ConfigError(f"{name}={value!r} must be {wanted}, or an array of one for each row")
    return array
