"""The loss of a run by how frequent tokens are: what weight decay does to the rare ones.

The average over tokens hardly moves with the weight decay while the loss of rare tokens, most of
the vocabulary, rises.

Reference: Pinto, Galanti and Balestriero, "The Fair Language Model Paradox", arXiv 2410.11985.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from tokjax.data.batch import Batch
from tokjax.data.loader import EvalLoader
from tokjax.errors import ConfigError, nearest
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.signals.type_learning import Fairness, fairness
from tokjax.signals.type_statistics import (
    TypeStats,
    frequency_bins,
    init_type_stats,
    update_type_stats,
)
from tokjax.training.passes import forward, target_stats
from tokjax.training.run import build_run
from tokjax.training.trained import load_trained, read_trained

TRAIN = "train"


@dataclass(frozen=True)
class ByFrequency:
    """The loss of each token type of a set, and its averages.

    Attributes:
        stats: of each type, in nats.
        counts: occurrences of each type in the training data.
        bins: of each type: 0 the rarest; -1 those that the training data do not have.
        averages: over all tokens, over types, and by bin.
    """

    stats: TypeStats
    counts: Int[np.ndarray, " V"]
    bins: Int[np.ndarray, " V"]
    averages: Fairness

    @property
    def table(self) -> str:
        """A line for each bin."""
        num = len(self.averages.bins.types)
        lines = ["bin  trained on  types seen   targets   by token   by type"]
        for b in range(num):
            found = [np.asarray(getattr(self.averages.bins, n))[b] for n in _COLUMNS]
            trained = int(self.counts[self.bins == b].sum())
            types, count, micro, macro = found
            lines.append(
                f"{b:>3}  {trained:>10,}  {types:>10,}  {count:>8,}  {micro:>9.4f} {macro:>9.4f}"
            )
        a = self.averages
        lines.append(f"by token {a.micro:.4f}, by type {a.macro:.4f}, gap {a.gap:+.4f} nats")
        return "\n".join(lines)


_COLUMNS = ("types", "count", "micro", "macro")


def loss_by_type(model: Transformer, params: Params, batches: Iterable[Batch]) -> TypeStats:
    """Returns the next-token loss of each type as a target, over the targets that have weight.

    Args:
        model: a causal one.
        params: its parameters.
        batches: of one shape, such as those of an `EvalLoader`.
    """
    stats = init_type_stats(model.config.vocabulary)
    for batch in batches:
        stats = _add(model, stats, params, batch)
    return stats


@functools.partial(jax.jit, static_argnums=0)
def _add(model: Transformer, stats: TypeStats, params: Params, batch: Batch) -> TypeStats:
    out = forward(model, params, batch)
    nll = target_stats(out, model.head(params), batch, ("nll",))["nll"]
    return update_type_stats(stats, batch.targets, nll, jnp.asarray(batch.weights != 0))


def by_frequency(
    workdir: str | Path,
    num: int = 10,
    by: Literal["types", "mass"] = "types",
    max_batches: int | None = 50,
) -> dict[str, ByFrequency]:
    """Returns what a run has learned of rare and of frequent tokens, on each set and on `train`.

    Rare tokens overfit: the loss on training data is the one that the paradox is about.

    Args:
        workdir: of the run; the newest checkpoint is read.
        num: number of bins.
        by: bins of equally many types, or of equal shares of the training data.
        max_batches: of each set; None reads it all.

    Raises:
        ConfigError: the run's model predicts no next token, or an option is out of range.
        CheckpointError: the folder is no run's, or has no checkpoint.
        DataError: its data cannot be prepared.
    """
    if by not in ("types", "mass"):
        raise ConfigError(f"unknown by={by!r}.{nearest(str(by), ('types', 'mass'))}")
    if num < 1 or (max_batches is not None and max_batches < 1):
        raise ConfigError(f"num={num} and max_batches={max_batches} must be at least 1")
    workdir = Path(workdir)
    config = read_trained(workdir).config
    found = load_trained(workdir)
    if not found.model.config.causal:
        raise ConfigError(
            f"{workdir} trained a model with causal=False, which predicts no next one"
        )
    run = build_run(config, devices=jax.devices()[:1], show_progress=False)
    data = config.data
    own = EvalLoader(
        run.stores,
        seq_len=data.seq_len,
        batch_size=data.batch_size,
        packing=data.packing,
        long_examples="split",
    )
    counts = training_counts(run.stores, found.model.config.vocabulary)
    bins = frequency_bins(counts, num, by)
    sets: dict[str, Any] = {**run.eval_loaders, TRAIN: own}
    results = {}
    for name, loader in sets.items():
        batches = len(loader) if max_batches is None else min(max_batches, len(loader))
        stats = loss_by_type(found.model, found.params, (loader.batch(i) for i in range(batches)))
        results[name] = ByFrequency(stats, counts, bins, fairness(stats, bins, num))
    return results


def training_counts(stores: Iterable[Any], vocabulary: int) -> Int[np.ndarray, " V"]:
    """Returns how often each id occurs in stores; stores count whole, whatever their rates.

    Args:
        stores: of a run.
        vocabulary: number of ids of the model, which may be more than the tokenizer's.
    """
    counts = np.zeros(vocabulary, np.int64)
    for store in stores:
        own = np.asarray(getattr(store, "store", store).unigram_counts)
        counts[: len(own)] += own
    return counts


def decay_exposure(
    peak_lr: float, schedule: Any, steps: int, weight_decay: float
) -> Float[np.ndarray, ""]:
    """Returns the sum of learning rate times weight decay over a stage.

    A parameter without gradient shrinks to about exp(-exposure) of its size: what compares runs of
    other lengths, rates and schedules, rather than the decay alone.

    Args:
        peak_lr: learning rate at the top.
        schedule: of the run.
        steps: of the stage.
        weight_decay: of AdamW.
    """
    factors = jax.vmap(lambda step: schedule.factor(step, steps))(jnp.arange(steps, dtype=float))
    return peak_lr * weight_decay * np.asarray(factors, float).sum()
