"""The spurious token game: a risk that three of eight fields cause and three more betray.

A text lists eight fields with their values, in one order, and asks for the risk. Smoking, weight
and exercise cause it; yellow fingers, clothing size and hormones follow from them one by one; a
gene and the size of the room have no part in it. Out of distribution all eight are drawn
independently.

Reference: "CAT: Causal Attention Tuning For Injecting Fine-grained Causal Knowledge into Large
Language Models", arXiv 2509.01535 (its benchmark STG, whose middle class is one value of the sum
and is left out here).
"""

import numpy as np
from jaxtyping import Bool, Int

FIELDS = (
    "smoking",
    "weight",
    "exercise",
    "yellow fingers",
    "clothing size",
    "hormones",
    "gene",
    "room size",
)
CAUSES, SPURIOUS = (0, 1, 2), (3, 4, 5)
ORDER = (6, 3, 0, 4, 1, 7, 5, 2)  # in which a text lists the fields
MOST = 15  # largest value of a field
ASK = len(FIELDS) + MOST + 1  # ids: fields, values 0 to MOST, then these
LOW, HIGH, VOCABULARY = ASK + 1, ASK + 2, ASK + 3
LENGTH = 2 * len(FIELDS) + 2  # ids of a text with its answer


def fields(
    rng: np.random.Generator, count: int, *, independent: bool = False
) -> Int[np.ndarray, "N 8"]:
    """Returns values of the fields, in the order of `FIELDS`."""
    values = rng.integers(1, 11, (count, len(FIELDS)))
    if not independent:
        smoking, weight, exercise = values[:, :3].T
        values[:, 3:6] = np.stack([3 * smoking // 2, weight, exercise // 2], 1)
    return values


def high_risk(values: Int[np.ndarray, "N 8"]) -> Bool[np.ndarray, "N"]:
    """Returns whether 1.2 smoking + 0.7 weight - exercise is above 7.2.

    >>> high_risk(np.array([[8, 4, 2, 12, 4, 1, 1, 1]])).tolist()
    [True]
    """
    # In integers: some sums equal the bound, and floats would decide by rounding.
    return values[:, :3] @ np.array([12, 7, -10]) > 72


def texts(values: Int[np.ndarray, "N 8"]) -> Int[np.ndarray, "N L"]:
    """Returns ids: each field and its value, the question, the answer."""
    pairs = [part for f in ORDER for part in (np.full(len(values), f), len(FIELDS) + values[:, f])]
    answer = np.where(high_risk(values), HIGH, LOW)
    return np.stack([*pairs, np.full(len(values), ASK), answer], 1)


def place_of_value(field: int) -> int:
    """Returns where in a text the value of a field stands.

    >>> place_of_value(6)
    1
    """
    return 2 * ORDER.index(field) + 1
