"""Q-Tuning: every step trains on the informative samples, and on their informative tokens.

Reference: "Winning the Pruning Gamble: A Unified Approach to Joint Sample and Token Pruning for
Efficient Supervised Fine-Tuning", arXiv 2509.23873, section 4 and Algorithm 1.
"""

import math
import typing
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax import struct
from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError, nearest
from tokjax.finetuning.compaction import chosen_loss, compacted, first_fit, lengths_of, shapes
from tokjax.finetuning.quadrants import (
    Samples,
    Scale,
    Supplement,
    as_fraction,
    choose_samples,
    keep_lowest,
    neighbour_scores,
    perplexity,
)
from tokjax.finetuning.sft import Stats, forward, loss_weights, plain_nll, target_stats
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.signals import weighted_nll
from tokjax.signals.packed import packed_means, packed_spread
from tokjax.training.objective import Aux, Loss, PerToken, Ratio, WithoutState


@struct.dataclass
class Decisions:
    """What a step trains on.

    Attributes:
        samples: decisions about samples, each [B, S].
        tokens: the answer tokens (targets with a weight) that are trained on.
    """

    samples: Samples
    tokens: Bool[Array, "B T"]


@register("objective", "q_tuning")
@dataclass(frozen=True)
class QTuning(PerToken, WithoutState):
    """Mean loss of the kept tokens of the kept samples; see `tokjax.finetuning.quadrants`.

    A sample is a segment of a row. The statistics are those of the current parameters, and the
    samples of one micro-batch, over all devices, are compared with each other: with
    `micro_batches` in parts of the batch, so fewer, larger parts choose better (the paper has 8
    to 32 samples). At least one sample of a micro-batch and one token of a sample are kept.

    With "mask" the labels of what is pruned are taken away and nothing else: one pass of the
    backbone, no time saved. With "drop" a pass without gradients decides; the kept samples, their
    pruned answer tokens deleted, are then packed into fewer rows, and only those are trained.
    """

    sample_ratio: float = 0.25  # share of the samples of a micro-batch to keep
    token_ratio: float = 0.5  # share of the answer tokens to keep in samples of Q2
    neighbor_weight: float = 0.5  # lambda: weight of the neighbours in a token's score
    # the neighbours' perplexities are added up (the paper's equation) or averaged (its prose)
    neighbor: Literal["sum", "mean"] = "sum"
    reverse: bool = False  # ablation: keeps the tokens of highest score instead of the lowest
    # samples kept beyond Q2 and Q4 are pruned as of the quadrant on their side, or keep all tokens
    supplement: Supplement = "by_side"
    # how perplexity and entropy are made comparable in the choice of those samples
    supplement_scale: Scale = "minmax"
    # pruned labels are left out of the loss, or pruned tokens and samples are not computed at all
    mode: Literal["mask", "drop"] = "mask"
    iterations: int = 10  # of the bisection for the quantile level

    def __post_init__(self):
        for name in ("sample_ratio", "token_ratio"):
            # Shares are read as fractions of at most 10,000ths.
            if not 5e-5 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"{name}={getattr(self, name)} must be above 0 (0.0001 or more), at most 1"
                )
        if not 0 <= self.neighbor_weight <= 1:
            raise ConfigError(f"neighbor_weight={self.neighbor_weight} must lie in [0, 1]")
        if self.iterations < 1:
            raise ConfigError(f"iterations={self.iterations} must be at least 1")
        hints = typing.get_type_hints(type(self))
        for name in ("neighbor", "supplement", "supplement_scale", "mode"):
            value, choices = getattr(self, name), typing.get_args(hints[name])
            if value not in choices:
                raise ConfigError(f"unknown {name}={value!r}.{nearest(str(value), choices)}")

    @property
    def relative_cost(self) -> float:
        """A pass forth, and with "drop" at most the kept samples' share of one forth and back."""
        return 1.0 if self.mode == "mask" else 1 / 3 + self.sample_ratio

    def decide(self, stats: Stats, batch: Batch) -> Decisions:
        """Returns what to keep, from each target's `nll` and `entropy`."""
        B, S = batch.example_id.shape
        answers = (batch.weights != 0) & (batch.segment_ids > 0)
        ones = answers.astype(jnp.float32)
        nll, size = packed_means(stats["nll"], ones, batch.segment_ids, S)
        entropy, _ = packed_means(stats["entropy"], ones, batch.segment_ids, S)
        samples = choose_samples(
            perplexity(nll).reshape(-1),
            entropy.reshape(-1),
            (size > 0).reshape(-1),
            self.sample_ratio,
            supplement=self.supplement,
            scale=self.supplement_scale,
            iterations=self.iterations,
        )
        samples = samples.replace(  # type: ignore[attr-defined]
            **{n: getattr(samples, n).reshape(B, S) for n in ("keep", "quadrant", "supplemented")}
        )
        scores = neighbour_scores(
            perplexity(stats["nll"]),
            answers,
            batch.segment_ids,
            self.neighbor_weight,
            self.neighbor,
        )
        kept = keep_lowest(
            scores, answers, batch.segment_ids, S, self.token_ratio, reverse=self.reverse
        )
        pruned = packed_spread(samples.quadrant == 2, batch.segment_ids, False)
        of_kept = packed_spread(samples.keep, batch.segment_ids, False)
        return Decisions(samples, of_kept & answers & (kept | ~pruned))

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns the weighted sum over the kept tokens, and their weight.

        Beside `nll` (of all answer tokens, as plain SFT reports it) the metrics are shares of
        samples and tokens kept, of kept samples that were supplemented, samples in each quadrant,
        the quantile level, and with "drop" the trained positions as a share of the batch's.
        """
        drop = self.mode == "drop"
        scored = jax.lax.stop_gradient(params) if drop else params
        out = forward(model, scored, batch)
        stats = target_stats(out, model.head(scored), batch, ("nll", "entropy"))
        decisions = self.decide(stats, batch)
        metrics = {**plain_nll(stats["nll"], batch), **_metrics(decisions, batch)}
        kept = decisions.tokens.astype(jnp.float32)
        weights, divisor = loss_weights(batch, kept, "kept")
        if drop:
            total, positions = _trained_alone(model, params, batch, decisions, self.sample_ratio)
            metrics["trained_positions"] = (positions, jnp.float32(batch.tokens.size))
        else:
            total, _ = weighted_nll(
                out.x, model.head(params), batch.targets[..., None], weights[..., None]
            )
        return Loss(total, divisor, metrics, aux)


def _trained_alone(
    model: Transformer, params: Params, batch: Batch, decisions: Decisions, ratio: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the weighted sum over kept tokens, computed on them alone, and positions it took."""
    # Prompts stay whole; of the answers, what was decided.
    own = packed_spread(decisions.samples.keep, batch.segment_ids, False)
    keep = own & ((batch.weights == 0) | decisions.tokens)
    most = max(math.floor(as_fraction(ratio) * batch.example_id.size), 1)
    choices = shapes(batch, most)
    layout, index = first_fit(lengths_of(batch, keep), choices, most)

    def trained(shape):
        def total(params, data):
            batch, keep, layout = data
            small = compacted(batch, keep, layout, shape)
            out = forward(model, params, small)
            return weighted_nll(
                out.x, model.head(params), small.targets[..., None], small.weights[..., None]
            )[0]

        return total

    total = chosen_loss([trained(s) for s in choices], index, params, (batch, keep, layout))
    sizes = jnp.asarray([rows * width for rows, width in choices], jnp.float32)
    return total, sizes[index]


def _metrics(decisions: Decisions, batch: Batch) -> dict[str, Ratio]:
    """Returns shares and counts of what is kept."""
    samples = decisions.samples
    count = lambda mask: mask.sum().astype(jnp.float32)  # noqa: E731
    answers = (batch.weights != 0) & (batch.segment_ids > 0)
    ids = jnp.arange(1, batch.example_id.shape[1] + 1)
    exist = ((batch.segment_ids[..., None] == ids) & answers[..., None]).any(1)
    kept, one = count(samples.keep), jnp.float32(1)
    return {
        "kept_samples": (kept, count(exist)),
        "kept_tokens": (count(decisions.tokens), count(answers)),
        "supplemented": (count(samples.supplemented), kept),
        "level": (samples.level, one),
        **{f"q{i + 1}": (samples.counts[i].astype(jnp.float32), one) for i in range(4)},
    }
