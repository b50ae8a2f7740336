"""FIGA: from a poor answer and its revision, the edits alone are learned.

Tokens that the revision added or put in another's place are made likelier, tokens that it deleted
or replaced less likely; what both answers share has no gradient. The pair is (chosen = revised,
rejected = initial), and the weights are found once, before training:

    weights = figa_weights(store, alpha=1.0, beta=0.5)
    write_token_weights("edits.parquet", store, weights, method="figa")

Reference: "Beyond Imitation: Leveraging Fine-grained Quality Signals for Alignment" (arXiv
2311.04072), equations 3 to 5; the bound on bad tokens is that of the authors' code.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.preference.token_weights import (
    AnswerStore,
    counted_targets,
    end_tokens,
    require_pairs,
)
from tokjax.signals import token_stats
from tokjax.signals.edit_script import edit_marks
from tokjax.training.objective import Aux, Loss, PerToken
from tokjax.training.passes import forward


def figa_weights(
    store: AnswerStore, *, alpha: float = 1.0, beta: float = 0.5, gamma: float = 0.0
) -> list[Float32[np.ndarray, "n"]]:
    """Returns what multiplies the data's weights (which are negative on rejected answers).

    The end of a revised answer counts as new, the end of an initial one never as bad.

    Args:
        store: pairs: chosen is the revised answer, rejected the initial one.
        alpha: of new tokens of the revised answer.
        beta: of deleted and replaced tokens of the initial one.
        gamma: of the other tokens of the revised answer.

    Raises:
        ConfigError: a weight is negative.
        DataError: the store holds no pairs.
    """
    require_pairs(store, "FIGA")
    for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        if not value >= 0:
            raise ConfigError(f"{name}={value} must not be negative")
    weights = []
    for i in range(store.num_examples):
        ids, ends, cut = store.tokens(i), end_tokens(store, i), store.cut(i)
        places = np.flatnonzero(counted_targets(store, i))
        revised, initial = places[places < cut], places[places >= cut]
        bad, good = edit_marks(ids[initial], ids[revised])
        own = np.zeros(len(ids), np.float32)
        own[revised] = np.where(good | ends[revised], alpha, gamma)
        own[initial] = np.where(bad & ~ends[initial], beta, 0.0)
        weights.append(own)
    return weights


def revisions_to_keep(
    initial: Float[np.ndarray, "N"],
    revised: Float[np.ndarray, "N"],
    *,
    at_most: float,
    at_least: float,
    gap: float = 0.0,
) -> Bool[np.ndarray, "N"]:
    """Returns which pairs are worth learning from, by the rewards of both answers.

    Args:
        initial: reward of each initial answer.
        revised: reward of each revised (or reference) answer.
        at_most: reward below which an initial answer is poor.
        at_least: reward above which a revised answer is good.
        gap: what the second must be above the first by more than.
    """
    initial, revised = np.asarray(initial, np.float64), np.asarray(revised, np.float64)
    return (initial < at_most) & (revised > at_least) & (revised - initial > gap)


def gated_weights(
    nll: Float[Array, "*B"], weights: Float[Array, "*B"], gate: float | None
) -> Float[Array, "*B"]:
    """Returns the weights without the negative ones of tokens that are unlikely already.

    Args:
        nll: of the targets, in nats.
        weights: above 0 for good tokens, below 0 for bad ones.
        gate: nll above which a bad token is left alone, in nats; None leaves none.
    """
    if gate is None:
        return weights
    passed = (weights < 0) & (jax.lax.stop_gradient(nll) > gate)
    return jnp.where(passed, 0.0, weights)


@register("objective", "figa")
@dataclass(frozen=True)
class FIGA(PerToken):
    """Signed weighted nll of a pair's edited tokens, averaged over tokens with a weight."""

    reads_pairs: ClassVar[bool] = True
    evaluates: ClassVar[bool] = True

    # nll above which a bad token is pushed no further, in nats (0.6 is probability 0.55); with None
    # the loss has no lower bound
    gate: float | None = 0.6

    def __post_init__(self):
        if self.gate is not None and not self.gate >= 0:
            raise ConfigError(f"gate={self.gate} must not be negative; None takes no bound")

    def init(self, key: jax.Array, model: Transformer, params: Params) -> Aux:
        """Returns no state."""
        return ()

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns sums over the targets of a batch that the gate lets pass."""
        out = forward(model, params, batch)
        counted = batch.weights != 0
        stats = token_stats(out.x, model.head(params), batch.targets, ["nll"], mask=counted)
        assert stats.nll is not None
        weights = gated_weights(stats.nll, batch.weights, self.gate)
        # Not a product with 0: an infinite nll of a token that is gated out would make it NaN.
        total = jnp.where(weights != 0, weights * stats.nll, 0.0).sum()
        nll = jax.lax.stop_gradient(stats.nll)
        metrics = {}
        for name, group in (("good_nll", batch.weights > 0), ("bad_nll", batch.weights < 0)):
            metrics[name] = (jnp.where(group, nll, 0.0).sum(), _count(group))
        bad = batch.weights < 0
        metrics["bad_in_use"] = (_count(bad & (weights != 0)), _count(bad))
        return Loss(total, _count(weights != 0), metrics, aux)


def _count(mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    return mask.sum().astype(jnp.float32)
