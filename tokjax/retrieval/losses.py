"""Losses of rankings: of the scores a model gives to the passages of a query.

Scores, labels and a teacher's scores are arrays [... N] with the passages of a query along the last
axis; a loss is returned for each query. Adding a constant to a query's scores changes none of them.

Reference: RankNet, "Learning to Rank using Gradient Descent" (Burges et al. 2005); ListNet,
"Learning to Rank: From Pairwise Approach to Listwise Approach" (Cao et al. 2007); LambdaRank, "From
RankNet to LambdaRank to LambdaMART: An Overview" (Burges 2010), section 4; the distillation and
the mixture of the two as in "DeAR: Dual-Stage Document Reranking with Reasoning Agents via LLM
Distillation" (arXiv 2508.16998) and its code.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tokjax.signals import kl_divergence


def softmax_ce(scores: Float[Array, "*B N"], relevance: Float[Array, "*B N"]) -> Float[Array, "*B"]:
    """Returns the cross-entropy of the most relevant passage, the first of equally relevant ones.

    >>> round(float(softmax_ce(jnp.array([1.0, 0.0, -1.0]), jnp.array([1.0, 0.0, 0.0]))), 6)
    0.407606
    """
    logp = jax.nn.log_softmax(scores.astype(jnp.float32))
    best = jnp.argmax(relevance, axis=-1)[..., None]
    return -jnp.take_along_axis(logp, best, axis=-1)[..., 0]


def ranknet(
    scores: Float[Array, "*B N"], relevance: Float[Array, "*B N"], *, hard: bool = False
) -> Float[Array, "*B"]:
    """Returns the mean over pairs of the cross-entropy of which passage is better.

    Args:
        scores: of the model.
        relevance: r, a teacher's scores or labels.
        hard: the better one of a pair is so with probability 1 (1/2 where they are equal) instead
            of sigmoid(r_i - r_j), which for labels 1 and 0 is .731.

    >>> round(float(ranknet(jnp.array([1.0, 0.0, -1.0]), jnp.array([3.0, 1.0, 2.0]))), 6)
    0.713865
    """
    i, j = np.triu_indices(scores.shape[-1], 1)
    scores, relevance = scores.astype(jnp.float32), relevance.astype(jnp.float32)
    ahead, better = scores[..., i] - scores[..., j], relevance[..., i] - relevance[..., j]
    target = (jnp.sign(better) + 1) / 2 if hard else jax.nn.sigmoid(better)
    return (jax.nn.softplus(ahead) - target * ahead).mean(-1)


def listnet(scores: Float[Array, "*B N"], relevance: Float[Array, "*B N"]) -> Float[Array, "*B"]:
    """Returns KL(softmax(relevance) || softmax(scores)): of the chances to come first."""
    return distillation_kl(scores, relevance, 1.0)


def lambdarank(scores: Float[Array, "*B N"], relevance: Float[Array, "*B N"]) -> Float[Array, "*B"]:
    """Returns LambdaRank's loss for nDCG, with gains 2^relevance - 1.

    The sum over pairs with r_i > r_j of |change of nDCG if the two exchanged places in the order by
    scores| softplus(s_j - s_i). The factor is a constant of the gradient. 0 where all are equally
    relevant.
    """
    scores, relevance = scores.astype(jnp.float32), relevance.astype(jnp.float32)
    n = scores.shape[-1]
    order = jnp.argsort(-jax.lax.stop_gradient(scores), axis=-1)  # stable
    discount = 1 / jnp.log2(jnp.argsort(order, axis=-1) + 2.0)
    gain = jnp.exp2(relevance) - 1
    places = 1 / jnp.log2(jnp.arange(n) + 2.0)
    ideal = (-jnp.sort(-gain, axis=-1) * places).sum(-1)[..., None, None]
    change = jnp.abs(_differences(gain) * _differences(discount))
    change = change / jnp.where(ideal > 0, ideal, 1.0)
    better = _differences(relevance) > 0
    return jnp.where(better, change * jax.nn.softplus(-_differences(scores)), 0.0).sum((-2, -1))


def distillation_kl(
    scores: Float[Array, "*B N"], teacher: Float[Array, "*B N"], temperature: float
) -> Float[Array, "*B"]:
    """Returns KL(softmax(teacher / T) || softmax(scores / T)) T^2; the teacher is a constant.

    >>> s, t = jnp.array([1.0, 0.0, -1.0]), jnp.array([3.0, 1.0, 2.0])
    >>> round(float(distillation_kl(s, t, 2.0)), 6)
    0.241744
    """
    teacher = jax.lax.stop_gradient(teacher.astype(jnp.float32))
    wanted = jax.nn.log_softmax(teacher / temperature)
    found = jax.nn.log_softmax(scores.astype(jnp.float32) / temperature)
    return kl_divergence(wanted, found) * temperature**2


def _differences(values: Float[Array, "*B N"]) -> Float[Array, "*B N N"]:
    return values[..., :, None] - values[..., None, :]
