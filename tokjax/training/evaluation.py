"""Evaluation: the next-token loss on each named data set."""

import math
from typing import Any

from tokjax.data.feed import prefetch, to_device
from tokjax.pretraining.next_token import NextToken
from tokjax.training.metrics import Accumulator
from tokjax.training.run import Run
from tokjax.training.state import whole
from tokjax.training.step import make_eval_step

_OBJECTIVE = NextToken()


def bytes_per_token(store: Any) -> float | None:
    """Returns the UTF-8 bytes of a store's texts per target, or None when they were not counted."""
    count = store.manifest.get("counts", {}).get("bytes")
    targets = store.num_tokens - store.num_examples
    return count / targets if count and targets else None


def evaluate(run: Run, params: Any, max_batches: int | None, aux: Any = ()) -> dict[str, float]:
    """Returns `eval/<set>/loss` (nats per token) and `eval/<set>/bits_per_byte` of every set.

    Bits per byte are given where the whole set was read without weights; unlike the loss they
    compare models with different tokenizers. Where the run's last objective evaluates, as those of
    preferences do, its loss and those of its metrics that the set has are returned instead.

    Args:
        run: whose evaluation sets are read.
        params: of the model.
        max_batches: of each set; None reads it all.
        aux: the objective's state.
    """
    found: dict[str, float] = {}
    for name, loader in run.eval_loaders.items():
        last = run.stages[-1].objective
        own = getattr(last, "evaluates", False)
        # It may name another objective to evaluate by.
        objective = _OBJECTIVE if not own else last if own is True else own
        step = make_eval_step(run.model, objective)
        sums = Accumulator()
        batches = len(loader) if max_batches is None else min(max_batches, len(loader))
        make = lambda i, loader=loader: to_device(  # noqa: E731
            lambda rows: loader.batch(i, rows), run.batch_sharding, loader.batch_size
        )
        with prefetch(make, 0, batches, depth=2) as feed:
            for batch in feed:
                sums.add(step(params, aux if own else (), batch))
        means = sums.means()
        if own:
            # A set may have nothing that a metric is of, such as bad answers.
            for metric, (_, weight) in sums.totals().items():
                if weight or metric == "loss":
                    found[f"eval/{name}/{metric}"] = means[metric]
            continue
        loss = means["loss"]
        found[f"eval/{name}/loss"] = loss
        per_token = bytes_per_token(run.eval_stores[name])
        if per_token and batches == len(loader) and not run.eval_stores[name].has_weights:
            found[f"eval/{name}/bits_per_byte"] = loss / math.log(2) / per_token
    return found


def unigram_entropies(run: Run) -> dict[str, float]:
    """Returns the entropy of every evaluation set under its own token frequencies, in nats."""
    return {name: store.unigram_entropy for name, store in run.eval_stores.items()}


def parameters_in_use(state: Any) -> Any:
    """Returns what is evaluated and sampled from: the moving average where there is one."""
    return state.whole if state.ema is None else whole(state.frozen, state.ema)
