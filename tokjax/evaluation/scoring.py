"""Log-likelihoods of continuations, in batches of similar length."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax import strategies, struct
from tokjax.decoding.context import Context
from tokjax.decoding.engine import decode
from tokjax.decoding.prompts import Prompts, bucket
from tokjax.decoding.transforms.base import Memoryless
from tokjax.evaluation.requests import Pair
from tokjax.language_model import LanguageModel
from tokjax.models.transformer import Transformer
from tokjax.signals.token_stats import token_stats

EXCLUDED = -1000.0  # log-probability of a token that a strategy excludes: sums stay finite

Scored = tuple[float, bool]


def score_pairs(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 8,
    strategy: str = "sample",
    options: Mapping[str, Any] | None = None,
) -> list[Scored]:
    """Returns for each pair the continuation's log-probability (in nats), and whether greedy
    decoding would write it.

    The model's own predictions take one pass; those of a strategy are what `decode` would have
    predicted behind each of the continuation's tokens, one step a token.

    Args:
        lm: the model.
        pairs: contexts and continuations.
        batch_size: pairs that are computed at a time.
        strategy: whose predictions; see `LanguageModel.generate`.
        options: of the strategy.

    Raises:
        ConfigError: there is no such strategy, or it has no such option.
    """
    run = _plain if strategy == "sample" and not options else partial(_stepwise, strategy, options)
    found: list[Scored] = [(0.0, True)] * len(pairs)
    for some in batches([len(p.context) + len(p.continuation) for p in pairs], batch_size):
        chosen = [pairs[i] for i in some]
        filled = chosen + chosen[:1] * (min(batch_size, len(pairs)) - len(some))
        for i, scored in zip(some, run(lm, filled), strict=False):
            found[i] = scored
    return found


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yields the numbers of some things in batches, the longest first: memory fails at once.

    >>> list(batches([1, 5, 3], 2))
    [[1, 2], [0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for first in range(0, len(order), size):
        yield order[first : first + size]


def _plain(lm: LanguageModel, pairs: Sequence[Pair]) -> list[Scored]:
    rows = [[*p.context, *p.continuation] for p in pairs]
    tokens = np.zeros((len(rows), bucket(max(map(len, rows)) - 1) + 1), np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    logprobs, ranks = jax.device_get(_stats(lm.model, lm.params, tokens))
    found = []
    for b, pair in enumerate(pairs):
        own = slice(len(pair.context) - 1, len(rows[b]) - 1)
        total = float(logprobs[b, own].astype(np.float64).sum())
        found.append((total, bool((ranks[b, own] == 0).all())))
    return found


@partial(jax.jit, static_argnums=0)
def _stats(
    model: Transformer, params: Any, tokens: Int[Array, "B T"]
) -> tuple[Float[Array, "B S"], Int[Array, "B S"]]:
    x = model.backbone(params, model.embed(params, tokens[:, :-1])).x
    stats = token_stats(x, model.head(params), tokens[:, 1:], want=("logprob", "rank"))
    assert stats.logprob is not None and stats.rank is not None
    return stats.logprob, stats.rank


@struct.dataclass
class _Given(Memoryless):
    """Leaves the given token at each step."""

    tokens: Any  # [B, N]

    def update(
        self, logits: Float[Array, "B V"], state: tuple[()], context: Context
    ) -> tuple[Float[Array, "B V"], tuple[()]]:
        token = jnp.asarray(self.tokens)[:, context.step]
        return jnp.where(jnp.arange(logits.shape[-1]) == token[:, None], 0.0, -jnp.inf), state


def _is_greedy(context: Context) -> Array:
    assert context.logits is not None
    return context.logits.argmax(-1) == context.last


def _stepwise(
    strategy: str, options: Mapping[str, Any] | None, lm: LanguageModel, pairs: Sequence[Pair]
) -> list[Scored]:
    contexts = [list(p.context) for p in pairs]
    predictor, params = strategies.build(
        strategy, lm.model, lm.params, lm.tokenizer, contexts, options or {}
    )
    limits = np.array([len(p.continuation) for p in pairs])
    tokens = np.zeros((len(pairs), bucket(int(limits.max()))), np.int32)
    for b, pair in enumerate(pairs):
        tokens[b, : limits[b]] = pair.continuation
    generation = decode(
        predictor,
        params,
        Prompts.of(contexts),
        max_new_tokens=limits,
        transform=_Given(tokens),
        record={"greedy": _is_greedy},
    )
    logprobs, greedy = jax.device_get((generation.logprobs, generation.recorded["greedy"]))
    found = []
    for b, n in enumerate(limits):
        own = np.maximum(np.nan_to_num(logprobs[b, :n], nan=EXCLUDED, neginf=EXCLUDED), EXCLUDED)
        found.append((float(own.astype(np.float64).sum()), bool(greedy[b, :n].all())))
    return found
