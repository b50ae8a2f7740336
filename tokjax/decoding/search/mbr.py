"""Minimum Bayes risk: of several candidates, the one that agrees best with all of them."""

import importlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from tokjax.errors import ConfigError, DataError

# Of hypotheses and references, every pair's utility [H, R].
Utility = Callable[[Sequence[Any], Sequence[Any]], np.ndarray]
Tokens = Sequence[Hashable]


@dataclass(frozen=True, eq=False)
class Choice:
    """The candidate of largest expected utility.

    Attributes:
        index: which it is; of equals, the earliest.
        expected: utility of each candidate.
    """

    index: int
    expected: Float[np.ndarray, "N"]


def mbr(
    candidates: Sequence[Any],
    utility: Utility,
    *,
    references: Sequence[Any] | None = None,
    weights: Sequence[float] | None = None,
) -> Choice:
    """Returns the candidate with the largest mean utility against all references.

    >>> mbr(["a b c".split(), "a b d".split(), "a b".split(), "x y".split()], unigram_f1).index
    2

    Args:
        candidates: lists of ids, of words, or texts: what the utility takes.
        utility: such as `unigram_f1`, `exact_match`, `chrf()`, or `pairwise(...)` of a function.
        references: what they are held against; default the candidates, each one's self included.
        weights: of the references, for example p / q where they were drawn from another
            distribution; they need not sum to one. Default equal.

    Raises:
        ConfigError: there is no candidate, or weights that are no weights.
        DataError: the utility gives no finite number for each pair.

    Reference: Eikema & Aziz, "Is MAP Decoding All You Need?", arXiv 2005.10283.
    """
    references = candidates if references is None else references
    if not len(candidates) or not len(references):
        raise ConfigError("give one candidate or more, and as references one or more")
    shares = np.ones(len(references)) if weights is None else np.asarray(weights, np.float64)
    bad = shares.shape != (len(references),) or not np.isfinite(shares).all()
    if bad or shares.min() < 0 or shares.sum() == 0:
        raise ConfigError(
            f"weights={weights!r} must be {len(references)} numbers, 0 or more and not all 0"
        )
    found = np.asarray(utility(candidates, references), np.float64)
    if found.shape != (len(candidates), len(references)) or not np.isfinite(found).all():
        raise DataError(
            f"the utility gave {found.shape} instead of {len(candidates)} x {len(references)} "
            f"finite numbers"
        )
    expected = found @ shares / shares.sum()
    # Sums in another order differ by rounding, which must not decide between equals.
    equal = expected >= expected.max() - 1e-12
    return Choice(int(equal.argmax()), expected)


def pairwise(function: Callable[[Any, Any], float]) -> Utility:
    """Returns the utility that calls a function of (hypothesis, reference) for every pair."""
    return lambda hypotheses, references: np.array(
        [[function(hypothesis, reference) for reference in references] for hypothesis in hypotheses]
    )


def exact_match(hypotheses: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
    """Returns 1 for each equal pair, else 0: with it, MBR is a vote among whole candidates."""
    key = lambda value: value if isinstance(value, str) else tuple(value)  # noqa: E731
    numbers: dict[Any, int] = {}
    h, r = (
        np.array([numbers.setdefault(key(value), len(numbers)) for value in values])
        for values in (hypotheses, references)
    )
    return (h[:, None] == r).astype(np.float64)


def unigram_f1(hypotheses: Sequence[Tokens], references: Sequence[Tokens]) -> np.ndarray:
    """Returns each pair's F1 of tokens, counted as often as they occur; of two empty ones, 1."""
    numbers: dict[Any, int] = {}
    rows = [
        [numbers.setdefault(token, len(numbers)) for token in tokens]
        for tokens in (*hypotheses, *references)
    ]
    counts = np.stack([np.bincount(np.array(row, int), minlength=len(numbers)) for row in rows])
    h, r = counts[: len(hypotheses)], counts[len(hypotheses) :]
    shared = np.stack([np.minimum(row, r).sum(1) for row in h])
    total = h.sum(1)[:, None] + r.sum(1)
    return np.divide(2.0 * shared, total, out=np.ones(total.shape), where=total > 0)


def chrf(**options: Any) -> Utility:
    """Returns sentence chrF of texts, 0 to 1, by sacrebleu; options are those of its `CHRF`.

    Raises:
        ConfigError: sacrebleu is not installed.
    """
    metric = _sacrebleu().CHRF(**options)
    return pairwise(lambda h, r: metric.sentence_score(h, [r]).score / 100)


def bleu(**options: Any) -> Utility:
    """Returns sentence BLEU of texts, 0 to 1, by sacrebleu; options are those of its `BLEU`.

    Raises:
        ConfigError: sacrebleu is not installed.
    """
    metric = _sacrebleu().BLEU(**{"effective_order": True, **options})
    return pairwise(lambda h, r: metric.sentence_score(h, [r]).score / 100)


def _sacrebleu() -> Any:
    try:
        return importlib.import_module("sacrebleu.metrics")
    except ImportError as error:
        raise ConfigError(
            "this utility needs sacrebleu: pip install 'tokjax[eval]', or use unigram_f1"
        ) from error
