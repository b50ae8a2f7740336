"""Several continuations, of which one is kept: best of n, rejection sampling, pass@k."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from tokjax.decoding.prompts import Prompts
from tokjax.decoding.search.drawing import (
    Cost,
    Generator,
    Ids,
    Scorer,
    at_least_one,
    lists,
    row_seed,
    scored,
)
from tokjax.errors import ConfigError


@dataclass(frozen=True, eq=False)
class BestOfN:
    """The best continuation of each prompt, and those it was chosen from.

    Attributes:
        tokens: of the best.
        index: which it was.
        scores: of all.
        candidates: their tokens.
        logprobs: of each whole candidate, by the model at temperature 1.
        cost: of drawing them; the scorer's is its own.
    """

    tokens: list[Ids]
    index: Int[np.ndarray, "B"]
    scores: Float[np.ndarray, "B N"]
    candidates: list[list[Ids]]
    logprobs: Float[np.ndarray, "B N"]
    cost: Cost


def best_of_n(
    generator: Generator, prompts: Prompts, score: Scorer, *, n: int, seed: int = 0
) -> BestOfN:
    """Returns the continuation of largest score among n of each prompt; of equals, the earliest.

    Costs one pass over each prompt, n rows of a forward pass for each token, and one call of the
    scorer. A candidate depends on its prompt, the seed, its prompt's place and its own number, so
    that the first n of a larger n are the same.

    Args:
        generator: draws the candidates.
        prompts: what to continue.
        score: of prompts and continuations, a number for each; larger is better.
        n: candidates of each prompt.
        seed: of all randomness.

    Raises:
        ConfigError: n is below 1; what `decode` refuses.
        DataError: the scorer's numbers are not one for each, or NaN.

    Reference: Welleck et al., "From Decoding to Meta-Generation: Inference-time Algorithms for
    Large Language Models", arXiv 2406.16838.
    """
    at_least_one(n=n)
    rows = lists(prompts)
    seeds = [row_seed(seed, b, i) for b in range(len(rows)) for i in range(n)]
    drawn = generator(rows, seeds, samples=n)
    scores = scored(score, [row for row in rows for _ in range(n)], drawn.tokens)
    scores = scores.reshape(len(rows), n)
    index = scores.argmax(1)
    candidates = [drawn.tokens[b * n : (b + 1) * n] for b in range(len(rows))]
    return BestOfN(
        tokens=[own[i] for own, i in zip(candidates, index, strict=True)],
        index=index,
        scores=scores,
        candidates=candidates,
        logprobs=drawn.logprobs.reshape(len(rows), n),
        cost=drawn.cost,
    )


@dataclass(frozen=True, eq=False)
class Accepted:
    """The first acceptable continuation of each prompt.

    Attributes:
        tokens: of it; None where none was found.
        tries: how many continuations it took, itself included; all of them where none was found.
        cost: of drawing them, those behind an accepted one of the same batch included.
    """

    tokens: list[Ids | None]
    tries: Int[np.ndarray, "B"]
    cost: Cost

    @property
    def accepted(self) -> Bool[np.ndarray, "B"]:
        """Which prompts have one."""
        return np.array([tokens is not None for tokens in self.tokens])


def rejection_sampling(
    generator: Generator,
    prompts: Prompts,
    accept: Callable[[Sequence[Ids], Sequence[Ids]], Sequence[bool]],
    *,
    max_tries: int,
    rows: int | None = None,
    seed: int = 0,
) -> Accepted:
    """Returns the first acceptable continuation of each prompt: a draw given that it is acceptable.

    Every call draws the same number of rows, which the prompts still open share, so that nothing
    is compiled again; which try is the first accepted does not depend on it. Each call costs a pass
    over the prompts of its rows and one for each token.

    Args:
        generator: draws the tries.
        prompts: what to continue.
        accept: of prompts and continuations, whether each is acceptable.
        max_tries: of each prompt.
        rows: continuations drawn at a time, of all prompts together; default one for each prompt.
        seed: of all randomness.

    Raises:
        ConfigError: a count is below 1; what `decode` refuses.
        DataError: `accept` does not answer once for each.
    """
    given = lists(prompts)
    rows = len(given) if rows is None else rows
    at_least_one(max_tries=max_tries, rows=rows)
    tokens: list[Ids | None] = [None] * len(given)
    tries, begun, cost = np.zeros(len(given), np.int64), [0] * len(given), Cost()
    while waiting := [b for b, n in enumerate(begun) if n < max_tries and tokens[b] is None]:
        batch: list[tuple[int, int]] = []
        while waiting and len(batch) < rows:
            for b in waiting[: rows - len(batch)]:
                batch.append((b, begun[b]))
                begun[b] += 1
            waiting = [b for b in waiting if begun[b] < max_tries]
        full = batch + [batch[0]] * (rows - len(batch))
        drawn = generator([given[b] for b, _ in full], [row_seed(seed, *one) for one in full])
        cost += drawn.cost
        new = drawn.tokens[: len(batch)]
        verdicts = scored(accept, [given[b] for b, _ in batch], new)
        for (b, number), verdict, ids in zip(batch, verdicts, new, strict=True):
            if tokens[b] is None:
                tries[b] = number + 1
                tokens[b] = ids if verdict else None
    return Accepted(tokens, tries, cost)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Returns the unbiased estimate, from n continuations, that one of k is correct.

    >>> round(pass_at_k(10, 3, 5), 5)
    0.91667

    Raises:
        ConfigError: k or `correct` is not within n.

    Reference: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", arXiv
    2107.03374.
    """
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ConfigError(f"k={k} must be 1 to n={n}, and correct={correct} 0 to n")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def best_of_n_law(
    probabilities: Float[np.ndarray, "X"], scores: Float[np.ndarray, "X"], n: int
) -> Float[np.ndarray, "X"]:
    """Returns with what probability each outcome is the best of n draws (of equals, the earliest).

    >>> best_of_n_law(np.array([0.5, 0.3, 0.2]), np.array([1, 2, 3]), 3).round(3).tolist()
    [0.125, 0.387, 0.488]

    Args:
        probabilities: of each outcome in one draw.
        scores: of each outcome.
        n: number of draws.

    Raises:
        ConfigError: n is below 1.
    """
    at_least_one(n=n)
    p, scores = np.asarray(probabilities, np.float64), np.asarray(scores)
    same = scores[:, None] == scores
    below = ((scores[:, None] > scores) * p).sum(1)
    equal = (same * p).sum(1)
    # The best score is theirs; among those who have it, the first drawn is as in one draw.
    share = np.divide(p, equal, out=np.zeros_like(p), where=equal > 0)
    return ((below + equal) ** n - below**n) * share


def best_of_n_kl_bound(n: int) -> float:
    """Returns ln n - (n - 1) / n, which KL(best of n || one draw) never exceeds.

    >>> round(best_of_n_kl_bound(3), 4)
    0.4319

    Raises:
        ConfigError: n is below 1.

    Reference: Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy",
    arXiv 2401.01879.
    """
    at_least_one(n=n)
    return math.log(n) - (n - 1) / n
