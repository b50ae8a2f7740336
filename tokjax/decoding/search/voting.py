"""Votes among answers: self-consistency, plain or weighted."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

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
from tokjax.errors import DataError

Answer = Hashable


@dataclass(frozen=True, eq=False)
class Vote:
    """The answer with the largest total.

    Attributes:
        answer: it; None where nothing was parsed.
        index: the first candidate that gave it; -1 where nothing was parsed.
        totals: votes or weights of each answer, in the order of their first appearance.
        unparsed: number of candidates without an answer; they have no vote.
    """

    answer: Any
    index: int
    totals: Mapping[Any, float]
    unparsed: int


def vote(answers: Sequence[Answer | None], weights: Sequence[float] | None = None) -> Vote:
    """Returns the answer with the most votes, or the largest sum of weights; of equals, the first.

    >>> vote(["A", "A", "B", None, "B"]).answer
    'A'
    >>> vote(["A", "A", "B", "B", "C"], [0.2, 0.2, 0.45, 0.3, 0.9]).answer
    'C'

    Args:
        answers: of each candidate, None where it has none.
        weights: of each candidate, such as a verifier's score; default 1.

    Raises:
        DataError: weights are too many, too few, or not finite.

    Reference: Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language
    Models", arXiv 2203.11171.
    """
    given = np.ones(len(answers)) if weights is None else np.asarray(weights, np.float64)
    if given.shape != (len(answers),) or not np.isfinite(given).all():
        raise DataError(f"weights={weights!r} must be {len(answers)} finite numbers")
    totals: dict[Any, float] = {}
    for answer, weight in zip(answers, given, strict=True):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + float(weight)
    unparsed = sum(answer is None for answer in answers)
    if not totals:
        return Vote(None, -1, totals, unparsed)
    best = max(totals, key=lambda answer: totals[answer])  # the first of equals
    return Vote(best, list(answers).index(best), totals, unparsed)


@dataclass(frozen=True, eq=False)
class SelfConsistency:
    """Each prompt's vote, and the candidates that voted.

    Attributes:
        votes: of each prompt.
        answers: of each candidate.
        candidates: their tokens.
        index: each prompt's first candidate with the chosen answer; -1 where none was parsed.
        cost: of drawing them.
    """

    votes: list[Vote]
    answers: list[list[Any]]
    candidates: list[list[Ids]]
    index: Int[np.ndarray, "B"]
    cost: Cost


def self_consistency(
    generator: Generator,
    prompts: Prompts,
    extract: Callable[[Ids], Answer | None],
    *,
    n: int,
    weigh: Scorer | None = None,
    seed: int = 0,
) -> SelfConsistency:
    """Returns the answer that most of n continuations give, for each prompt.

    Costs one pass over each prompt, and n rows of a forward pass for each token.

    Args:
        generator: draws the candidates.
        prompts: what to continue.
        extract: a continuation's answer, in a form in which equal answers are equal, or None.
        n: candidates of each prompt.
        weigh: of prompts and continuations, how much each vote counts; default 1.
        seed: of all randomness; candidates are those of `best_of_n`.

    Raises:
        ConfigError: n is below 1; what `decode` refuses.
        DataError: the weights are not one for each, or not finite.

    Reference: Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language
    Models", arXiv 2203.11171; weighted: Li et al., "Making Large Language Models Better Reasoners
    with Step-Aware Verifier", arXiv 2206.02336.
    """
    at_least_one(n=n)
    rows = lists(prompts)
    seeds = [row_seed(seed, b, i) for b in range(len(rows)) for i in range(n)]
    drawn = generator(rows, seeds, samples=n)
    weights = np.ones(len(seeds))
    if weigh is not None:
        weights = scored(weigh, [row for row in rows for _ in range(n)], drawn.tokens)
    answers = [extract(ids) for ids in drawn.tokens]
    own = [slice(b * n, (b + 1) * n) for b in range(len(rows))]
    votes = [vote(answers[at], weights[at]) for at in own]  # type: ignore[arg-type]
    return SelfConsistency(
        votes=votes,
        answers=[answers[at] for at in own],
        candidates=[drawn.tokens[at] for at in own],
        index=np.array([each.index for each in votes]),
        cost=drawn.cost,
    )
