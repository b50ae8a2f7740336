"""What the best lexinvariant predictor says, by brute force over all names of a small vocabulary.

For texts from a distribution q it predicts by the mixture of q over all relabellings: it infers the
key and the text at once. What a lexinvariant model learns can be compared with it.

Reference: Huang et al., "Lexinvariant Language Models", arXiv 2305.16349, section 3.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float64, Int

_LARGEST = 8  # 40,320 relabellings

LogProb = Callable[[Int[np.ndarray, "P T"]], Float64[np.ndarray, "P"]]


def markov(
    start: Sequence[float] | np.ndarray, transition: Sequence[Sequence[float]] | np.ndarray
) -> LogProb:
    """Returns the log-probability of sequences of a Markov chain.

    Args:
        start: probabilities of the first symbol.
        transition: of the next symbol, a row for each symbol.

    Raises:
        ValueError: they are no probabilities of one vocabulary.
    """
    first, rows = np.asarray(start, float), np.asarray(transition, float)
    if rows.shape != (len(first), len(first)):
        raise ValueError(f"transition {rows.shape} must be [V, V] for start {first.shape}")
    if not (np.allclose(first.sum(), 1) and np.allclose(rows.sum(1), 1)) or (
        min(first.min(), rows.min()) < 0
    ):
        raise ValueError("start and the rows of transition must be probabilities that sum to 1")
    with np.errstate(divide="ignore"):
        log_first, log_rows = np.log(first), np.log(rows)

    def log_prob(ids: Int[np.ndarray, "P T"]) -> Float64[np.ndarray, "P"]:
        if not ids.shape[1]:
            return np.zeros(len(ids))
        return log_first[ids[:, 0]] + log_rows[ids[:, :-1], ids[:, 1:]].sum(1)

    return log_prob


def ideal_mixture(
    log_prob: LogProb, history: Sequence[int] | np.ndarray, vocabulary: int
) -> Float64[np.ndarray, "V"]:
    """Returns the mixture's distribution of the next symbol.

    p(v | x) is the sum over relabellings of q(relabelled x v), over that of q(relabelled x).

    Args:
        log_prob: of sequences [P T] under q, in nats; see `markov`.
        history: x, may be empty.
        vocabulary: number of symbols, at most 8.

    Raises:
        ValueError: a larger vocabulary, a symbol outside it, or a history that q never writes under
            any names.

    >>> q = markov([0.6, 0.3, 0.1], [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]])
    >>> [round(p, 3) for p in ideal_mixture(q, [0], 3).tolist()]
    [0.71, 0.145, 0.145]
    """
    if not 1 <= vocabulary <= _LARGEST:
        raise ValueError(
            f"vocabulary={vocabulary} must be from 1 to {_LARGEST}: all names are tried"
        )
    seen = np.asarray(history, int).reshape(-1)
    if seen.size and not 0 <= seen.min() <= seen.max() < vocabulary:
        raise ValueError(f"history {seen.tolist()} has symbols outside 0 to {vocabulary - 1}")
    names = np.array(list(itertools.permutations(range(vocabulary))))
    joint = np.stack([log_prob(names[:, np.append(seen, v)]) for v in range(vocabulary)], axis=1)
    largest = joint.max()
    if largest == -np.inf:
        raise ValueError(f"history {seen.tolist()} is impossible under all names")
    weights = np.exp(joint - largest).sum(0)
    return weights / weights.sum()
