"""Divergences between next-token distributions, and between the layers they are read from.

Distributions are given by natural log-probabilities along the last axis (log-softmax of logits:
raw logits give wrong numbers); -inf is a probability of 0.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.errors import nearest

_TOKENS_AT_A_TIME = 64


def kl_divergence(logp: Float[Array, "*B V"], logq: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """Returns KL(p || q) in nats; +inf where q excludes what p allows."""
    logp, logq = logp.astype(jnp.float32), logq.astype(jnp.float32)
    p = jnp.exp(logp)
    # A probability that is 0, or too small for float32, adds nothing: 0 * inf would be NaN.
    held = p > 0
    difference = jnp.where(held, logp, 0.0) - jnp.where(held, logq, 0.0)
    return (p * difference).sum(-1)


def js_divergence(
    logp: Float[Array, "*B V"],
    logq: Float[Array, "*B V"],
    form: Literal["definition", "dola_code"] = "definition",
) -> Float[Array, "*B"]:
    """Returns the Jensen-Shannon divergence in nats, between 0 and ln 2.

    `form="dola_code"` is what the reference code of DoLa (Chuang et al., "DoLa: Decoding by
    Contrasting Layers Improves Factuality in Large Language Models", arXiv 2309.03883) computes:
    the two Kullback-Leibler divergences taken from the mixture, not to it, and the mean over the
    vocabulary instead of the sum. It is +inf where one of p and q is 0 and the other is not.

    Raises:
        ValueError: another form.
    """
    logp, logq = logp.astype(jnp.float32), logq.astype(jnp.float32)
    mixture = jnp.logaddexp(logp, logq) - jnp.log(jnp.float32(2.0))
    if form == "definition":
        return 0.5 * (kl_divergence(logp, mixture) + kl_divergence(logq, mixture))
    if form == "dola_code":
        total = kl_divergence(mixture, logp) + kl_divergence(mixture, logq)
        return 0.5 * total / logp.shape[-1]
    raise ValueError(f"unknown form {form!r}.{nearest(form, ('definition', 'dola_code'))}")


def total_variation(logp: Float[Array, "*B V"], logq: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """Returns half the L1 distance of two distributions, between 0 and 1."""
    logp, logq = logp.astype(jnp.float32), logq.astype(jnp.float32)
    return 0.5 * jnp.abs(jnp.exp(logp) - jnp.exp(logq)).sum(-1)


def layer_divergences(
    states: Float[Array, "L B T D"],
    others: Float[Array, "#L B T D"],
    unembedding: Float[Array, "V D"],
    divergence: Callable[[Array, Array], Array] = js_divergence,
) -> Float[Array, "L B T"]:
    """Returns, layer by layer, how far the prediction read from a state is from another's.

    Layers against the last: `others = out.x[None]`. Each layer against the next:
    `layer_divergences(states[:-1], states[1:], ...)`. A few tokens are scored at a time, so
    neither [L, B, T, V] nor [B, T, V] exists.

    Args:
        states: hidden states, in the dtype of the unembedding. Apply the model's final norm to
            them or not: the reference code of DoLa (arXiv 2309.03883) does not, though the last
            layer's state carries it.
        others: the states to compare with, one a layer or one for all.
        unembedding: output head, one row per token id.
        divergence: of two arrays of log-probabilities; the first argument is the layer's.

    Raises:
        ValueError: shapes that do not fit.
    """
    L, B, T, D = states.shape
    if others.shape not in ((L, B, T, D), (1, B, T, D)):
        raise ValueError(f"others {others.shape} must be {(L, B, T, D)} or {(1, B, T, D)}")

    def logprobs(x):
        logits = jnp.einsum("d,vd->v", x, unembedding, preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(logits)

    def of_token(pair):
        own_LD, other_LD = pair
        if others.shape[0] == 1:
            fixed = logprobs(other_LD[0])
            return jax.lax.map(lambda x: divergence(logprobs(x), fixed), own_LD)
        both = (own_LD, other_LD)
        return jax.lax.map(lambda xy: divergence(logprobs(xy[0]), logprobs(xy[1])), both)

    by_token = lambda a: jnp.moveaxis(a.reshape(a.shape[0], B * T, D), 0, 1)  # noqa: E731
    pairs = (by_token(states), by_token(others))
    found_NL = jax.lax.map(of_token, pairs, batch_size=_TOKENS_AT_A_TIME)
    return found_NL.T.reshape(L, B, T)


def kl_estimate(log_ratio: Float[Array, "*n"], kind: str) -> Float[Array, "*n"]:
    """Returns the estimate of KL(pi || pi_ref) from one token's log pi / pi_ref, in nats.

    The token is one drawn from pi. k1 is unbiased but may be negative; k3 is neither (Schulman,
    "Approximating KL Divergence", 2020).

    Args:
        log_ratio: r.
        kind: "k1" is r, "k2" is r^2 / 2, "k3" is e^-r - 1 + r.

    >>> [round(float(kl_estimate(jnp.float32(0.2), kind)), 4) for kind in ("k1", "k2", "k3")]
    [0.2, 0.02, 0.0187]
    """
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * jnp.square(log_ratio)
    return jnp.expm1(-log_ratio) + log_ratio
