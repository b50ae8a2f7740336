"""Lists of addends as rationales: the question names a sum, the answer says if the list makes it.

A third and more of the examples hold a list that does not add up, and answer "no": what is likely
given the question differs from what is likely given the answer "yes" as well.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

SUMS = (4, 5, 6, 7, 8)
ADDENDS = (1, 2, 3)
LONGEST = 6  # addends of a list
MARKER = "so"  # between list and answer
WORDS = (*(f"sum{n}" for n in SUMS), *map(str, ADDENDS), "so", "yes", "no")


def every_list() -> list[tuple[int, ...]]:
    """Returns all lists there are.

    >>> len(every_list())
    1092
    """
    return [z for n in range(1, LONGEST + 1) for z in itertools.product(ADDENDS, repeat=n)]


def right_lists(total: int) -> list[tuple[int, ...]]:
    """Returns the lists that make a sum.

    >>> len(right_lists(4))
    7
    """
    return [z for z in every_list() if sum(z) == total]


def words(addends: Sequence[int]) -> str:
    """Returns a list as text."""
    return " ".join(map(str, addends))


def examples(rng: np.random.Generator, count: int, wrong: float = 0.4) -> list[dict[str, str]]:
    """Returns questions with lists and answers.

    Args:
        rng: where they come from.
        count: how many.
        wrong: share of lists that do not add up, and say so.
    """
    right = {n: right_lists(n) for n in SUMS}
    found = []
    for _ in range(count):
        total = SUMS[rng.integers(len(SUMS))]
        if rng.random() >= wrong:
            addends, answer = right[total][rng.integers(len(right[total]))], "yes"
        else:
            addends, answer = (), "no"
            while not addends or sum(addends) == total:
                addends = tuple(
                    ADDENDS[i] for i in rng.integers(0, len(ADDENDS), rng.integers(1, LONGEST + 1))
                )
        found.append({"prompt": f"sum{total}", "response": f" {words(addends)} {MARKER} {answer}"})
    return found


def adds_up(episode: Any) -> float:
    """Returns 1 for an answer whose list makes the question's sum, and says so, else 0.

    Args:
        episode: of `tokjax.rl.rewards`.
    """
    parts = episode.answer.split()
    if parts[-2:] != ["so", "yes"] or not all(p in map(str, ADDENDS) for p in parts[:-2]):
        return 0.0
    return float(f"sum{sum(map(int, parts[:-2]))}" == episode.prompt.split()[-1])
