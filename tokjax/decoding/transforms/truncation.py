"""Temperature, and restrictions to likely tokens."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tokjax import struct
from tokjax.decoding.context import Context
from tokjax.decoding.prompts import Prompts
from tokjax.decoding.transforms.base import Stateless, Transform, column, setting


@struct.dataclass
class _Temperature(Stateless):
    value: Any

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        value = column(self.value)
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        only_best = jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
        return jnp.where(value > 0, logits / jnp.where(value > 0, value, 1.0), only_best)


def temperature(value: Any) -> Transform:
    """Returns the division of logits by `value`; 0 keeps the likeliest token alone (greedy).

    Raises:
        ConfigError: a value is negative or not finite.
    """
    ok = lambda v: (v >= 0) & np.isfinite(v)  # noqa: E731
    return _Temperature(setting("temperature", value, np.float32, ok, "0 or a positive number"))


@struct.dataclass
class _TopK(Stateless):
    k: Any

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        k = self.k[..., None] if jnp.ndim(self.k) else self.k
        k = jnp.where(k > 0, k, logits.shape[-1])
        kept = keep_highest(logits, lambda kept: kept.sum(-1, keepdims=True) >= k)
        return jnp.where(kept, logits, -jnp.inf)


def top_k(k: Any) -> Transform:
    """Returns the restriction to the k likeliest tokens and those as likely as the k-th.

    0 restricts nothing.

    Raises:
        ConfigError: a value is negative or no integer.
    """
    return _TopK(setting("top_k", k, np.int32, lambda v: v >= 0, "an integer, 0 or above"))


@struct.dataclass
class _TopP(Stateless):
    p: Any

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        p = column(self.p)
        probabilities = jax.nn.softmax(logits, axis=-1)

        def enough(kept):
            return jnp.where(kept, probabilities, 0.0).sum(-1, keepdims=True) >= p

        # Rounding may let the sum reach 1 before the last token: 1 means all of them.
        return jnp.where((p >= 1) | keep_highest(logits, enough), logits, -jnp.inf)


def top_p(p: Any) -> Transform:
    """Returns the restriction to the fewest tokens that together have probability p or more.

    Tokens as likely as the last of them are kept too. 1 restricts nothing.

    Raises:
        ConfigError: a value is not above 0 and at most 1.

    Reference: Holtzman et al. 2019, arXiv 1904.09751, section 3.1.
    """
    ok = lambda v: (v > 0) & (v <= 1)  # noqa: E731
    return _TopP(setting("top_p", p, np.float32, ok, "above 0 and at most 1"))


@struct.dataclass
class _MinP(Stateless):
    p: Any

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        # In logarithms: p(token) >= p p(best) without the softmax. log 0 = -inf keeps everything.
        floor = logits.max(-1, keepdims=True) + jnp.log(column(self.p))
        return jnp.where(logits >= floor, logits, -jnp.inf)


def min_p(p: Any) -> Transform:
    """Returns the restriction to tokens at least p times as likely as the likeliest.

    Raises:
        ConfigError: a value is not between 0 and 1.

    Reference: Nguyen et al. 2024, arXiv 2407.01082, section 3.
    """
    ok = lambda v: (v >= 0) & (v <= 1)  # noqa: E731
    return _MinP(setting("min_p", p, np.float32, ok, "between 0 and 1"))


@struct.dataclass
class _Typical(Stateless):
    mass: Any

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        mass = column(self.mass)
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        probabilities = jnp.exp(logprobs)
        surprise = -logprobs - entropy(logprobs)[:, None]

        def enough(kept):
            return jnp.where(kept, probabilities, 0.0).sum(-1, keepdims=True) >= mass

        return jnp.where(keep_highest(-jnp.abs(surprise), enough), logits, -jnp.inf)


def typical(mass: Any) -> Transform:
    """Returns the restriction to tokens whose surprise is nearest the entropy, of that mass.

    Raises:
        ConfigError: a value is not between 0 and 1.

    Reference: Meister et al. 2022, arXiv 2202.00666, section 5.
    """
    ok = lambda v: (v > 0) & (v < 1)  # noqa: E731
    return _Typical(setting("typical", mass, np.float32, ok, "above 0 and below 1"))


@struct.dataclass
class _Floor(Stateless):
    epsilon: Any
    adaptive: bool = struct.field(pytree_node=False)

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        floor = jnp.broadcast_to(column(self.epsilon), (logits.shape[0], 1))
        if self.adaptive:
            spread = jnp.exp(-entropy(logprobs))[:, None]
            floor = jnp.minimum(floor, jnp.sqrt(floor) * spread)
        kept = (jnp.exp(logprobs) >= floor) | (logits >= logits.max(-1, keepdims=True))
        return jnp.where(kept, logits, -jnp.inf)


def epsilon(value: Any) -> Transform:
    """Returns the restriction to tokens of at least this probability, and the likeliest.

    Raises:
        ConfigError: a value is not between 0 and 1.

    Reference: Hewitt et al. 2022, arXiv 2210.15191, section 3.2.
    """
    return _Floor(_probability("epsilon", value), False)


def eta(value: Any) -> Transform:
    """Returns the restriction to tokens of probability min(value, sqrt(value) exp(-entropy)).

    Raises:
        ConfigError: a value is not between 0 and 1.

    Reference: Hewitt et al. 2022, arXiv 2210.15191, section 3.3.
    """
    return _Floor(_probability("eta", value), True)


def _probability(name: str, value: Any) -> Any:
    ok = lambda v: (v > 0) & (v < 1)  # noqa: E731
    return setting(name, value, np.float32, ok, "above 0 and below 1")


@struct.dataclass
class _Mirostat:
    tau: Any
    rate: Any

    def init(self, prompts: Prompts, vocab_size: int) -> Float[Array, "B"]:
        del vocab_size
        tau = jnp.broadcast_to(self.tau, prompts.lengths.shape)
        return 2 * tau.astype(jnp.float32)

    def update(
        self, logits: Float[Array, "B V"], state: Float[Array, "B"], context: Context
    ) -> tuple[Float[Array, "B V"], Float[Array, "B"]]:
        assert context.last_logprob is not None
        observed = -context.last_logprob / np.log(2)
        moved = state - self.rate * (observed - self.tau)
        limit = jnp.where(context.step > 0, moved, state)
        surprise = -jax.nn.log_softmax(logits, axis=-1) / np.log(2)
        kept = (surprise <= limit[:, None]) | (logits >= logits.max(-1, keepdims=True))
        return jnp.where(kept, logits, -jnp.inf), limit


def mirostat(tau: Any, rate: Any = 0.1) -> Transform:
    """Returns the restriction that steers the text's surprise to `tau` bits a token.

    Tokens more surprising than a limit are excluded; behind each token the limit moves by `rate`
    times the surprise wanted minus that of the token. It starts at twice `tau`. (The simplified
    form of the paper's method, known as version 2, which does not estimate Zipf's exponent.) The
    surprise of a taken token is that under the model at temperature 1.

    Raises:
        ConfigError: a value is not positive.

    Reference: Basu et al. 2020, arXiv 2007.14966, section 4.
    """
    ok = lambda v: (v > 0) & np.isfinite(v)  # noqa: E731
    return _Mirostat(
        setting("tau", tau, np.float32, ok, "a positive number of bits"),
        setting("rate", rate, np.float32, ok, "a positive number"),
    )


def entropy(logprobs: Float[Array, "B V"]) -> Float[Array, "B"]:
    """Returns the entropy in nats; tokens of probability 0 add nothing."""
    return -jnp.where(jnp.isfinite(logprobs), jnp.exp(logprobs) * logprobs, 0.0).sum(-1)


def keep_highest(
    values: Float[Array, "B V"], enough: Callable[[Bool[Array, "B V"]], Bool[Array, "B 1"]]
) -> Bool[Array, "B V"]:
    """Returns the smallest sufficient set of highest values, those equal to its lowest included.

    The threshold is found bit by bit from the top. Its 32 sums over the vocabulary took a
    thirteenth of a sort's time on a CPU with 8,192 tokens, a thirtieth with 150,000.

    Args:
        values: what to choose by.
        enough: says of a set of highest values whether it suffices.
    """
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    # Unsigned integers in the order of the floating-point numbers they stand for.
    ordered = jnp.where(bits >= sign, ~bits, bits | sign)

    def try_bit(i, threshold):
        higher = threshold | (sign >> i.astype(jnp.uint32))
        return jnp.where(enough(ordered >= higher), higher, threshold)

    start = jnp.zeros((values.shape[0], 1), jnp.uint32)
    threshold = jax.lax.fori_loop(0, 32, try_bit, start)
    return ordered >= threshold
