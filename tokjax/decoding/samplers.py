"""How a token is taken from logits, and how likely it was to be taken."""

from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax import struct


class Sampler(Protocol):
    """Takes one token a row.

    Attributes:
        draws: whether the random keys are used.
    """

    draws: ClassVar[bool]

    def __call__(
        self, keys: Any, logits: Float[Array, "B V"]
    ) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
        """Returns the tokens and the log-probability with which each was taken."""
        ...


@struct.dataclass
class Greedy:
    """Takes the likeliest token, with certainty; of several equally likely the lowest id."""

    draws: ClassVar[bool] = False

    def __call__(
        self, keys: Any, logits: Float[Array, "B V"]
    ) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
        """Returns the likeliest tokens and zeros."""
        del keys
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros(logits.shape[0])


@struct.dataclass
class Categorical:
    """Draws from the softmax of the logits, each row with a key of its own."""

    draws: ClassVar[bool] = True

    def __call__(
        self, keys: Any, logits: Float[Array, "B V"]
    ) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
        """Returns the drawn tokens and their log-probabilities."""
        tokens = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
        return tokens, logprob_of(logits, tokens)


def greedy() -> Sampler:
    """Returns the sampler that takes the likeliest token."""
    return Greedy()


def categorical() -> Sampler:
    """Returns the sampler that draws from the softmax of the logits."""
    return Categorical()


def logprob_of(logits: Float[Array, "B V"], tokens: Int[Array, "B"]) -> Float[Array, "B"]:
    """Returns each row's log-probability of its token under the softmax of the logits."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
