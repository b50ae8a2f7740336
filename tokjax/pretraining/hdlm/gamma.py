"""The gamma-hybrid noise: a Markov chain that masks and replaces, trained by score entropy.

Rates are (1 - gamma) times those of masking plus gamma times those of a uniform draw, so a token
may be replaced and masked later, never the other way round. Behind total noise sigma all
probabilities are known in closed form.

Reference: "Unifying Autoregressive and Diffusion-Based Sequence Generation", arXiv 2504.06416;
score entropy is that of SEDD (arXiv 2310.16834).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.config import register
from tokjax.errors import ConfigError, nearest
from tokjax.pretraining.hdlm.epsilon import Noised, random_tokens

_IMPOSSIBLE = -1e30  # finite, so that differences of logits are numbers
_READINGS = ("score", "denoiser")


@struct.dataclass
class Transition:
    """What becomes of a token behind some noise; the three sum to 1 with V - 1 others.

    Attributes:
        stay: probability that it is the same token.
        other: probability of each other token.
        mask: probability of the mask.
    """

    stay: Float[Array, "..."]
    other: Float[Array, "..."]
    mask: Float[Array, "..."]


def transition(gamma: float, sigma: Float[Array, "..."], vocabulary: int) -> Transition:
    """Returns the chain's transition from a token behind total noise sigma.

    Args:
        gamma: share of the uniform draws.
        sigma: total noise.
        vocabulary: number of tokens, the mask not counted.

    >>> found = transition(0.25, jnp.float32(0.7), 4)
    >>> [round(float(p), 6) for p in (found.stay, found.other, found.mask)]
    [0.520328, 0.023743, 0.408445]
    """
    sigma = jnp.asarray(sigma, jnp.float32)
    kept = jnp.exp(-(1 - gamma) * sigma)
    other = -kept * jnp.expm1(-gamma * sigma) / vocabulary
    return Transition(
        kept * jnp.exp(-gamma * sigma) + other, other, -jnp.expm1(-(1 - gamma) * sigma)
    )


@register("hdlm_noise", "gamma")
@dataclass(frozen=True)
class GammaHybrid:
    """A chain between masking (gamma=0) and uniform draws (gamma=1), trained by score entropy.

    How logits stand for scores is a choice of tokjax. `score`: they are the logarithms of the
    ratios themselves, at a mask shifted by the logarithm of A / (1 - A) with A the probability of
    no mask, so that a model without an input for the time can be right at all of them. `denoiser`:
    they predict the clean token, and ratios follow by the closed form; with gamma=0 the loss is
    then the weighted cross entropy of masked diffusion.
    """

    gamma: float = 0.1  # share of the uniform draws among the rates
    reading: Literal["score", "denoiser"] = "score"  # what logits mean
    clip: float = 5e-3  # noise is -log(1 - (1 - clip) t): it stays finite at t = 1

    def __post_init__(self):
        if not 0 <= self.gamma <= 1:
            raise ConfigError(f"noise.gamma={self.gamma} must lie in [0, 1]: it is a share")
        if self.reading not in _READINGS:
            raise ConfigError(
                f"unknown noise.reading={self.reading!r}.{nearest(str(self.reading), _READINGS)}"
            )
        if not 0 < self.clip < 1:
            raise ConfigError(f"noise.clip={self.clip} must lie between 0 and 1")

    def sigma(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the total noise at a time in [0, 1]."""
        return -jnp.log1p(-(1 - self.clip) * t)

    def rate(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the derivative of the total noise by time."""
        return (1 - self.clip) / (1 - (1 - self.clip) * t)

    def corrupt(
        self,
        key: jax.Array,
        tokens: Int[Array, "B T"],
        active: Bool[Array, "B T"],
        p: Float[Array, "B T"],
        mask_id: int,
        random_ids: int,
    ) -> Noised:
        """Returns noised tokens; for the arguments see `EpsilonHybrid.corrupt`, p is the time."""
        mask, replace, draw = jax.random.split(key, 3)
        sigma = self.sigma(p)
        kept = jnp.exp(-(1 - self.gamma) * sigma)
        masked = active & (jax.random.uniform(mask, tokens.shape) >= kept)
        moved = jax.random.uniform(replace, tokens.shape) >= jnp.exp(-self.gamma * sigma)
        replaced = active & moved & ~masked
        ids = random_tokens(draw, tokens.shape, mask_id, random_ids)
        found = jnp.where(masked, mask_id, jnp.where(replaced, ids, tokens))
        return Noised(found.astype(tokens.dtype), masked, replaced)

    def log_scores(
        self,
        logits: Float[Array, "N V"],
        tokens: Int[Array, "N"],
        sigma: Float[Array, "N"],
        mask_id: int,
    ) -> Float[Array, "N V"]:
        """Returns log p(y) / p(x) of each id y against the present one x, at total noise sigma.

        Those of the mask and of x itself mean nothing.
        """
        V = logits.shape[-1]
        masked = (tokens == mask_id)[:, None]
        found = transition(self.gamma, sigma[:, None], V - 1)
        if self.reading == "score":
            absorbed = (1 - self.gamma) * sigma[:, None]
            shift = jnp.where(masked, -jnp.log(jnp.maximum(jnp.expm1(absorbed), 1e-30)), 0.0)
            return logits + shift
        logits = jnp.where(jnp.arange(V) == mask_id, _IMPOSSIBLE, logits)
        log_p = jax.nn.log_softmax(logits)
        # Ratios to a probability of 0 are asked for nowhere; they must be numbers all the same.
        other = jnp.maximum(found.other, 1e-30)
        at_mask = jnp.logaddexp(
            log_p + jnp.log(jnp.maximum(found.stay - found.other, 1e-30)), jnp.log(other)
        ) - jnp.log(jnp.maximum(found.mask, 1e-30))
        present = jnp.take_along_axis(log_p, jnp.minimum(tokens, V - 1)[:, None], 1)
        ratio = jnp.log(jnp.maximum(found.stay, 1e-30)) - jnp.log(other)
        rest = jnp.log(jnp.maximum(1 - jnp.exp(present) - jnp.exp(log_p), 1e-30))
        at_token = jnp.logaddexp(jnp.logaddexp(present - ratio, log_p + ratio), rest)
        return jnp.where(masked, at_mask, at_token)

    def score_entropy(
        self,
        logits: Float[Array, "N V"],
        tokens: Int[Array, "N"],
        clean: Int[Array, "N"],
        sigma: Float[Array, "N"],
        mask_id: int,
    ) -> Float[Array, "N"]:
        """Returns the score entropy of each position per unit of noise; 0 where scores are right.

        Args:
            logits: the model's; that of the mask is not read.
            tokens: present ids.
            clean: ids that were there.
            sigma: total noise.
            mask_id: the mask.
        """
        V = logits.shape[-1]
        ids = jnp.arange(V)
        masked = (tokens == mask_id)[:, None]
        found = transition(self.gamma, sigma[:, None], V - 1)
        from_y = jnp.where(ids == clean[:, None], found.stay, found.other)
        here = jnp.where((tokens == clean)[:, None], found.stay, found.other)
        here = jnp.where(masked, found.mask, here)
        rates = jnp.where(masked, 1 - self.gamma, self.gamma / (V - 1))
        counts = (ids != mask_id) & (ids != tokens[:, None]) & (rates > 0) & (here > 0)
        ratio = jnp.where(counts, from_y / jnp.where(here > 0, here, 1.0), 0.0)
        scores = jnp.where(counts, self.log_scores(logits, tokens, sigma, mask_id), 0.0)
        log_ratio = jnp.log(jnp.where(ratio > 0, ratio, 1.0))
        entropy = jnp.exp(scores) - ratio * scores + ratio * (log_ratio - 1)
        return jnp.where(counts, rates * entropy, 0.0).sum(-1)

    def reverse(
        self,
        logits: Float[Array, "N V"],
        tokens: Int[Array, "N"],
        sigma: Float[Array, "N"],
        earlier: Float[Array, "N"],
        mask_id: int,
    ) -> Float[Array, "N V"]:
        """Returns log-weights of the ids at an earlier noise, the mask among them.

        Tweedie's step of SEDD: the scores moved back to the earlier noise, times the probability
        of the present id.

        Args:
            logits: the model's.
            tokens: present ids.
            sigma: present total noise.
            earlier: total noise to go back to.
            mask_id: the mask.
        """
        V = logits.shape[-1]
        ids = jnp.arange(V)
        is_mask, is_present = ids == mask_id, ids == tokens[:, None]
        scores = jnp.exp(self.log_scores(logits, tokens, sigma, mask_id))
        scores = jnp.where(is_present, 1.0, jnp.where(is_mask, 0.0, scores))
        step = (sigma - earlier)[:, None]
        back = transition(self.gamma, -step, V - 1)  # the closed form inverts itself
        of_tokens = jnp.where(is_mask, 0.0, scores).sum(-1, keepdims=True)
        moved = (back.stay - back.other) * scores + back.other * of_tokens
        at_mask = jnp.where(is_mask, scores, 0.0).sum(-1, keepdims=True) + back.mask * of_tokens
        moved = jnp.where(is_mask, at_mask, moved)
        forward = transition(self.gamma, step, V - 1)
        came = jnp.where(is_present, forward.stay, forward.other)
        masked = (tokens == mask_id)[:, None]
        came = jnp.where(masked, jnp.where(is_mask, 1.0, forward.mask), came)
        came = jnp.where(is_mask & ~masked, 0.0, came)
        weights = moved * came
        return jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1.0)), -jnp.inf)
