"""CAT: fine-tuning whose attention is supervised by annotated causes.

In every row that predicts a token of an annotated effect, the mean attention on the tokens of its
causes must be `alpha` times that on the other visible tokens. Who causes what is written on the
tokens: bit e of the channel `effect` is set on the tokens of effect e, and bit e of the channel
`cause` on the tokens of its causes. So [T, T] masks are never stored.

Reference: "CAT: Causal Attention Tuning For Injecting Fine-grained Causal Knowledge into Large
Language Models", arXiv 2509.01535; the hinge is the form its text describes, the others are those
of its released script.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError, DataError
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.signals import weighted_nll
from tokjax.signals.attention import head_mean
from tokjax.signals.packed import packed_sums
from tokjax.training.objective import Aux, Loss, PerToken
from tokjax.training.passes import forward, plain_nll

Penalty = Literal["hinge", "div", "div2", "nll"]

MOST_EFFECTS = 24  # bits that a float32 holds exactly


def causal_bits(
    ids: Sequence[int], relations: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]
) -> tuple[Float32[np.ndarray, "n"], Float32[np.ndarray, "n"]]:
    """Returns the channels (effect, cause) of an example.

    All occurrences of a phrase count. A cause counts for the occurrences of its effect that begin
    behind the token that follows it; one that occurs nowhere is left out.

    Args:
        ids: of the example.
        relations: (ids of an effect, ids of each of its causes).

    Raises:
        DataError: effects occur more often than there are bits.
    """
    effect, cause = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    bit = 0
    for phrase, causes in relations:
        found = [(c, len(each)) for each in causes for c in _occurrences(ids, each)]
        for e in _occurrences(ids, phrase):
            before = [(c, n) for c, n in found if c + n < e]
            if not before:
                continue
            if bit == MOST_EFFECTS:
                raise DataError(
                    f"the effects occur more than {MOST_EFFECTS} times in one example of "
                    f"{len(ids)} tokens: annotate fewer, or cut the example"
                )
            effect[e : e + len(phrase)] |= 1 << bit
            for c, n in before:
                cause[c : c + n] |= 1 << bit
            bit += 1
    return effect.astype(np.float32), cause.astype(np.float32)


def _occurrences(ids: Sequence[int], phrase: Sequence[int]) -> list[int]:
    wanted, n = list(phrase), len(phrase)
    return [i for i in range(len(ids) - n + 1) if list(ids[i : i + n]) == wanted] if n else []


def causal_pairs(batch: Batch) -> tuple[Bool[Array, "B T T"], Bool[Array, "B T T"]]:
    """Returns which (query, key) pairs are annotated, and which others the query sees.

    A query predicts the target of its position, so a row is annotated when its target is part of
    an effect; keys are inputs. An example's first token is no target and can be no cause.
    """
    slots = jnp.arange(batch.tokens.shape[1])
    same = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
    seen = (slots[:, None] >= slots) & same & (batch.segment_ids[:, :, None] > 0)
    effect = batch.channels["effect"].astype(jnp.int32)
    of_target = batch.channels["cause"].astype(jnp.int32)
    # What belongs to a target belongs to the input of the next position.
    shifted = jnp.pad(of_target, ((0, 0), (1, 0)))[:, :-1]
    cause = jnp.where(batch.positions > 0, shifted, 0)
    annotated = seen & ((effect[:, :, None] & cause[:, None, :]) != 0)
    return annotated, seen & ~annotated


def penalty(
    a1: Float[Array, "*R"], a0: Float[Array, "*R"], alpha: float, kind: Penalty
) -> Float[Array, "*R"]:
    """Returns the penalty of rows; 0 where a1 / a0 is at least alpha.

    Args:
        a1: mean attention on causes.
        a0: mean attention on the other visible tokens.
        alpha: the ratio that is demanded.
        kind: "hinge" is alpha - a1 / a0, the only one that is continuous at alpha.
    """
    safe = jnp.maximum(a0, 1e-12)
    ratio = a1 / safe
    value = {
        "hinge": lambda: alpha - ratio,
        "div": lambda: -jnp.log1p(a1) / jnp.log1p(safe),
        "div2": lambda: -jnp.log1p(a1 / (1 + a0)),
        "nll": lambda: -a1 / (a1 + safe),
    }[kind]()
    return jnp.where(ratio >= alpha, 0.0, value)


@register("objective", "cat_attention")
@dataclass(frozen=True)
class CausalAttention(PerToken):
    """SFT, and beside it the mean penalty of annotated rows (equation of the paper's section 4).

    A row counts when it sees both causes and other tokens. Attention is averaged over layers and
    heads inside the backbone, so that only its sums over a row's causes and others are kept.
    """

    channels: ClassVar[tuple[str, str]] = ("effect", "cause")

    alpha: float = 2.0  # ratio of the mean attention on causes to that on others
    gamma: float = 1.0  # weight of the penalty beside the mean nll
    decay: float = 1.0  # factor of gamma behind each micro-batch; 1 keeps it
    kind: Penalty = "hinge"  # form of the penalty
    per: Literal["row", "sample"] = "row"  # penalties of rows, or of a sample's mean attention

    def __post_init__(self):
        if not self.alpha > 0:
            raise ConfigError(f"alpha={self.alpha} must be above 0")
        if self.gamma < 0:
            raise ConfigError(f"gamma={self.gamma} must not be negative")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"decay={self.decay} must be above 0 and at most 1")

    def init(self, key: jax.Array, model: Transformer, params: Params) -> Aux:
        """Returns the current share of gamma."""
        return jnp.ones(())

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns the weighted sum of nll and, times the weight, gamma times the mean penalty.

        Raises:
            ConfigError: the data have no such channels.
        """
        missing = [name for name in self.channels if name not in batch.channels]
        if missing:
            raise ConfigError(
                f"objective 'cat_attention' needs the channel {missing[0]!r}, but the data have "
                f"{sorted(batch.channels) or 'none'}: write an artifact with `causal_bits` and "
                f"name the file in data.train.0.artifact"
            )
        annotated, others = causal_pairs(batch)

        def sums(probs: Array) -> Array:
            attention = head_mean(probs)
            kept = [jnp.where(m, attention, 0.0).sum(-1) for m in (annotated, others)]
            return jnp.stack(kept, -1)

        out = forward(model, params, batch, capture={"attn_probs": sums})
        weight = jnp.abs(batch.weights).sum()
        total, nll = weighted_nll(
            out.x, model.head(params), batch.targets[..., None], batch.weights[..., None]
        )
        counts = jnp.stack([annotated.sum(-1), others.sum(-1)], -1).astype(jnp.float32)
        means = out.captured["attn_probs"].mean(0) / jnp.maximum(counts, 1.0)
        valid = (counts > 0).all(-1)
        rows, count, ratio = self._penalties(means[..., 0], means[..., 1], valid, batch)
        mean = rows / jnp.maximum(count, 1.0)
        total = total + weight * self.gamma * aux * mean
        metrics = {
            **plain_nll(nll[..., 0], batch),
            "penalty": (rows, count),
            "ratio": (ratio, count),
        }
        return Loss(total, weight, metrics, aux * self.decay)

    def _penalties(
        self, a1: Array, a0: Array, valid: Array, batch: Batch
    ) -> tuple[Array, Array, Array]:
        """Returns the sum of penalties, how many there are, and the sum of the ratios."""
        if self.per == "sample":
            num = batch.example_id.shape[1]
            n = packed_sums(valid.astype(jnp.float32), batch.segment_ids, num)
            a1, a0 = (
                packed_sums(jnp.where(valid, a, 0.0), batch.segment_ids, num) / jnp.maximum(n, 1.0)
                for a in (a1, a0)
            )
            valid = n > 0
        each = penalty(a1, a0, self.alpha, self.kind)
        ratio = a1 / jnp.maximum(a0, 1e-12)
        kept = lambda a: jnp.where(valid, a, 0.0).sum()  # noqa: E731
        return kept(each), valid.sum().astype(jnp.float32), kept(ratio)
