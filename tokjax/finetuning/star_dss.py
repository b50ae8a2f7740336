"""STAR-DSS: safe tokens are imitated, unsafe ones hold the model to a frozen reference.

Reference: "Shape it Up! Restoring LLM Safety during Finetuning" (arXiv 2505.17196), equation 3. A
guard scores prefixes of every answer beforehand (the STAR scores, one for each chunk of tokens);
`chunk_ends` and `chunk_values` make of them the channel that the loss is shaped by.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError, DataError, nearest
from tokjax.finetuning.sft import loss_weights
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.signals import token_stats
from tokjax.signals.divergences import kl_estimate
from tokjax.training.objective import Aux, Loss, PerToken
from tokjax.training.passes import forward, plain_nll
from tokjax.training.reference import init_reference, reference_pass

_ESTIMATORS = ("k1", "k2", "k3")


@register("objective", "star_dss")
@dataclass(frozen=True)
class StarDSS(PerToken):
    """V nll + (1 - V) lambda KL(pi || pi_ref) of each target, where V says how safe it is.

    V is the batch's channel, in [0, 1], a constant. One value for a whole answer is static shaping:
    with `lambda_kl=0` and values 0 and 1, rejection sampling. The reference is the model before
    this stage: with adapters the model without them, else a copy of the parameters.

    The estimators see the target alone, so they also hold up unsafe tokens that the reference
    likes; "full" compares the whole distributions.
    """

    lambda_kl: float = 1.0  # weight of the pull towards the reference; 0 needs none
    # with r = log pi / pi_ref of the target: k1 is r (its gradient pushes the target down even
    # where pi is the reference), k2 is r^2 / 2, k3 is e^-r - 1 + r; "full" sums over the vocabulary
    kl: Literal["k1", "k2", "k3", "full"] = "k2"
    channel: str = "safety"  # name of the artifact's channel
    # what the sum is divided by: the weights of all targets, or each sample's weights and then the
    # number of samples
    norm: Literal["token", "sequence"] = "token"

    def __post_init__(self):
        if not self.lambda_kl >= 0:
            raise ConfigError(f"lambda_kl={self.lambda_kl} must not be negative")
        for name, choices in (("kl", (*_ESTIMATORS, "full")), ("norm", ("token", "sequence"))):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"unknown {name}={value!r}.{nearest(str(value), choices)}")

    def init(self, key: jax.Array, model: Transformer, params: Params) -> Aux:
        """Returns the reference."""
        return init_reference(model, params) if self.lambda_kl else ()

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns sums over the targets; the metrics `imitation` and `pull` add up to the loss.

        Raises:
            ConfigError: the data have no such channel.
        """
        if self.channel not in batch.channels:
            raise ConfigError(
                f"objective 'star_dss' needs the channel {self.channel!r}, but the data have "
                f"{sorted(batch.channels) or 'none'}: write an artifact with the safety of every "
                f"token (tokjax.finetuning.star_dss.chunk_values gives it from a guard's scores of "
                f"chunks) and name the file in data.train.0.artifact"
            )
        counted = batch.weights != 0
        safety = jax.lax.stop_gradient(batch.channels[self.channel].astype(jnp.float32))
        weights, divisor = loss_weights(batch, jnp.ones_like(safety), self.norm)
        nll, divergence = self._parts(model, params, aux, batch)
        imitation = jnp.where(counted, weights * safety * nll, 0.0).sum()
        held = counted & (safety != 1)
        # Masked before it is computed: k3 of what does not count may overflow.
        pull = jnp.where(held, weights * (1 - safety) * self.lambda_kl, 0.0)
        pull = (pull * self._estimate(jnp.where(held, divergence, 0.0))).sum()
        size = jnp.abs(batch.weights)
        metrics = {
            **plain_nll(nll, batch),
            "imitation": (imitation, divisor),
            "pull": (pull, divisor),
            "safety": (jnp.where(counted, safety * size, 0.0).sum(), size.sum()),
        }
        return Loss(imitation + pull, divisor, metrics, aux)

    def _parts(self, model, params, aux, batch) -> tuple[Array, Array]:
        """Returns each target's nll and log-ratio (with "full", divergence); 0 without weight."""
        counted = batch.weights != 0
        x, head = forward(model, params, batch).x, model.head(params)
        if not self.lambda_kl:
            found = token_stats(x, head, batch.targets, ["nll"], mask=counted)
            return found.nll, jnp.zeros_like(batch.weights)  # type: ignore[return-value]
        fixed = reference_pass(model, params, aux, batch)
        if self.kl == "full":
            want = ["nll", "kl"]
            found = token_stats(x, head, batch.targets, want, other=fixed, mask=counted)
            return found.nll, found.kl  # type: ignore[return-value]
        found = token_stats(x, head, batch.targets, ["nll"], mask=counted)
        reference = token_stats(*fixed, batch.targets, ["nll"], mask=counted)
        return found.nll, reference.nll - found.nll  # type: ignore[return-value, operator]

    def _estimate(self, divergence: Array) -> Array:
        return divergence if self.kl == "full" else kl_estimate(divergence, self.kl)


def chunk_ends(prompt: int, length: int, size: int) -> np.ndarray:
    """Returns where the chunks of an answer end, exclusive; the last one ends the example.

    Args:
        prompt: tokens before the answer.
        length: tokens of the example.
        size: tokens of a chunk.

    Raises:
        DataError: numbers that leave no chunk.

    >>> chunk_ends(prompt=3, length=10, size=4).tolist()
    [7, 10]
    """
    if not 0 <= prompt <= length or size < 1:
        raise DataError(
            f"no chunks of {size} tokens in an example of {length} tokens with a prompt of "
            f"{prompt}: sizes must be at least 1, and prompts no longer than examples"
        )
    return np.append(np.arange(prompt + size, length, size), length)


def chunk_values(
    values: Sequence[float] | np.ndarray,
    positions: Sequence[int] | np.ndarray | None,
    length: int,
) -> np.ndarray:
    """Returns the score of each token of an example, float32 [length]: an artifact's channel.

    Value i belongs to token i as a target (an artifact's channels are aligned so; the loader shifts
    them as it shifts the tokens). The first chunk takes in the prompt, which has no weight. A
    single value is that of the whole example.

    Args:
        values: of the chunks, in [0, 1]: how safe the answer is up to the end of each.
        positions: where the chunks end, exclusive, from the example's beginning; -1 is filling.
            Tokens behind the last one get 0. May be None beside a single value.
        length: tokens of the example.

    Raises:
        DataError: scores outside [0, 1], or ends that do not rise or do not fit.

    >>> chunk_values([0.5, 0.25], [2, 4], 5).tolist()
    [0.5, 0.5, 0.25, 0.25, 0.0]
    """
    scores = np.asarray(values, np.float32).reshape(-1)
    ends = np.array([length]) if positions is None else np.asarray(positions, np.int64).reshape(-1)
    if scores.size != ends.size:
        raise DataError(f"{scores.size} scores of chunks need as many ends, not {ends.size}")
    scores, ends = scores[ends != -1], ends[ends != -1]
    bad = scores[~((scores >= 0) & (scores <= 1))]
    if bad.size:
        raise DataError(f"the score {bad[0]} of a chunk must lie in [0, 1]: a probability of safe")
    if scores.size == 1:
        return np.full(length, scores[0], np.float32)
    if (np.diff(ends, prepend=0) < 0).any() or (ends > length).any():
        raise DataError(f"ends of chunks {ends.tolist()} must rise, to {length} at most")
    found = np.zeros(length, np.float32)
    covered = int(ends[-1]) if ends.size else 0
    found[:covered] = np.repeat(scores, np.diff(ends, prepend=0))
    return found
