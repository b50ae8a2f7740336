"""How sure a model was of what it wrote: the mean entropy of its likeliest next tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tokjax import struct
from tokjax.decoding.context import Context
from tokjax.errors import ConfigError


def renormalised_entropy(
    logprobs: Float[Array, "*B k"], *, renormalise: bool = True
) -> Float[Array, "*B"]:
    """Returns the entropy in nats of the k likeliest tokens, from their log-probabilities alone.

    Args:
        logprobs: taken at temperature 1 (a sampling temperature would rescale them); logits do
            too where they are renormalised. -inf counts as probability 0.
        renormalise: divide by their sum first, so that ln k is the most; else -sum p log p.

    Reference: "Think Just Enough", arXiv 2510.08146.
    """
    if renormalise:
        logprobs = jax.nn.log_softmax(logprobs, axis=-1)
    terms = jnp.exp(logprobs) * jnp.where(jnp.isfinite(logprobs), logprobs, 0.0)
    return jnp.maximum(-terms.sum(-1), 0.0)


@struct.dataclass
class TopEntropy:
    """The entropy of the k likeliest tokens, as something that `decode` records."""

    k: int = struct.field(pytree_node=False)
    renormalise: bool = struct.field(pytree_node=False)

    def __call__(self, context: Context) -> Float[Array, "B"]:
        """Returns each row's entropy in nats, of the distribution its token was taken from."""
        assert context.logits is not None
        k = min(self.k, context.logits.shape[-1])
        logprobs = jax.nn.log_softmax(context.logits, axis=-1)
        return renormalised_entropy(jax.lax.top_k(logprobs, k)[0], renormalise=self.renormalise)


def top_entropy(k: int = 20, *, renormalise: bool = True) -> TopEntropy:
    """Returns what records the entropy of the k likeliest tokens: `decode(record={"h": ...})`.

    In nats, of the predictor's logits before any transform: temperature 1 whatever the sampler
    does. A k above the vocabulary takes all of it.

    Args:
        k: number of tokens.
        renormalise: make their probabilities sum to 1 first.

    Raises:
        ConfigError: k is not a positive whole number.

    Reference: "Think Just Enough", arXiv 2510.08146 (k = 20).
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ConfigError(f"k={k!r} must be a whole number, 1 or more")
    return TopEntropy(k, renormalise)


def sequence_entropy(
    entropies: Float[np.ndarray, "B N"] | Any, mask: Bool[np.ndarray, "B N"] | Any
) -> Float[np.ndarray, "B"]:
    """Returns the mean entropy of each row's own tokens, in float64; +inf for a row without any.

    Args:
        entropies: of each new token.
        mask: true where there is one (`Generation.mask`).

    Reference: "Think Just Enough", arXiv 2510.08146.
    """
    kept = np.asarray(mask, bool)
    total = np.where(kept, np.asarray(entropies, np.float64), 0.0).sum(-1)
    count = kept.sum(-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.inf)
