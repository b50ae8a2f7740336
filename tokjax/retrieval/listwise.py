"""DeAR, second stage: a language model writes the order of passages, window by window.

Reference: "DeAR: Dual-Stage Document Reranking with Reasoning Agents via LLM Distillation" (arXiv
2508.16998), section 3, and its released code; the windows are those of "Is ChatGPT Good at Search?"
(RankGPT, arXiv 2304.09542), except that the window nearest the front is moved back to fit instead
of being left out.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tokjax.data.rankings import Passage
from tokjax.errors import ConfigError, DataError

T = TypeVar("T")
Message = dict[str, Any]

_ROLE = (
    "You rank passages by how well they answer a query. First work out what the query needs to "
    "know, then which passage covers which of these needs."
)
_THINK_END = "</think>"


@dataclass(frozen=True)
class Windows:
    """Which places of a list are put in order, some at a time, from the back to the front.

    Attributes:
        start: first place.
        end: one past the last place; a shorter list ends it.
        size: places of a window.
        step: how far the next window lies before this one; at most `size`.
    """

    start: int = 0
    end: int = 30
    size: int = 20
    step: int = 10

    def __post_init__(self):
        if not 0 <= self.start < self.end:
            raise ConfigError(f"places {self.start} to {self.end} are no stretch of a list")
        if not 1 <= self.step <= self.size or self.size < 2:
            raise ConfigError(
                f"windows of {self.size} places, {self.step} apart: take at least 2 places and a "
                f"step of 1 to that many, or places would be left out"
            )

    def of(self, n: int) -> list[tuple[int, int]]:
        """Returns the windows [first, last) of a list of n items, in the order they are sorted.

        The last one is moved back so that it begins at `start`.

        >>> Windows().of(100), Windows(end=25).of(100)
        ([(10, 30), (0, 20)], [(5, 25), (0, 15)])
        """
        found, last = [], min(self.end, n)
        if last - self.start < 2:
            return []
        while True:
            first = max(self.start, last - self.size)
            found.append((first, last))
            if first == self.start:
                return found
            last = max(last - self.step, self.start + 2)


def parse_permutation(text: str, n: int) -> list[int]:
    """Returns the order of n passages that a text names, as indices from 0.

    All whole numbers behind a closing think tag count, from 1; impossible and repeated ones are
    left out, and missing passages follow in their old order.

    Args:
        text: what the model wrote, such as "[2] > [1]".
        n: passages that it was shown.

    >>> parse_permutation("[3] > [1] > [3] > [9]", 4)
    [2, 0, 1, 3]
    """
    named = (int(digits) - 1 for digits in re.findall(r"[0-9]+", text.split(_THINK_END)[-1]))
    order = list(dict.fromkeys(i for i in named if 0 <= i < n))
    return order + [i for i in range(n) if i not in order]


def permutation_text(order: Sequence[int]) -> str:
    """Returns how an order of passages is written.

    >>> permutation_text([1, 0, 2])
    '[2] > [1] > [3]'
    """
    return " > ".join(f"[{i + 1}]" for i in order)


def ranking_chat(query: str, passages: Sequence[Passage], *, words: int = 300) -> list[Message]:
    """Returns the conversation that asks for the order of passages.

    Args:
        query: what is asked for.
        passages: in their present order.
        words: most words of a passage.
    """
    n = len(passages)
    chat: list[Message] = [
        {"role": "system", "content": _ROLE},
        {
            "role": "user",
            "content": f"I will show you {n} passages, each with a number in brackets. Rank them "
            f"for the query: {query}",
        },
        {"role": "assistant", "content": "Please show me the passages."},
    ]
    for number, passage in enumerate(passages, 1):
        told = " ".join(part for part in (passage.title, passage.text) if part)
        told = " ".join(told.split()[:words])
        chat.append({"role": "user", "content": f"[{number}] {told}"})
        chat.append({"role": "assistant", "content": f"I have read passage [{number}]."})
    chat.append(
        {
            "role": "user",
            "content": f"Query: {query}\nList what must be known to answer it, match the passages "
            f"to these needs, and rank all {n} passages by how much they cover, the best first. "
            f"Then write only the numbers, as in {permutation_text([1, 0])}.",
        }
    )
    return chat


def training_chat(
    query: str,
    passages: Sequence[Passage],
    order: Sequence[int],
    reasoning: str = "",
    *,
    words: int = 300,
) -> list[Message]:
    """Returns the conversation with its answer: a record's `messages` for fine-tuning.

    Only the answer has weight: the reasoning between think tags, then the order.

    Args:
        query: what is asked for.
        passages: as they are shown.
        order: indices of the passages, the best first.
        reasoning: why; "" leaves the tags out.
        words: most words of a passage.

    Raises:
        DataError: the order is none of these passages.
    """
    if sorted(order) != list(range(len(passages))):
        raise DataError(f"the order {list(order)} is no permutation of {len(passages)} passages")
    chat = [
        {**message, "weight": 0.0} if message["role"] == "assistant" else message
        for message in ranking_chat(query, passages, words=words)
    ]
    thought = f"<think>\n{reasoning}\n{_THINK_END}\n" if reasoning else ""
    return [*chat, {"role": "assistant", "content": thought + permutation_text(order)}]


def rerank(
    lists: Sequence[Sequence[T]],
    order: Callable[[Sequence[tuple[int, int, list[T]]]], Sequence[Sequence[int]]],
    windows: Windows | None = None,
) -> list[list[T]]:
    """Returns lists whose windows have been put in order, one after the other.

    Args:
        lists: of each query, the best so far first.
        order: from (number of the list, number of the window, its items) of several windows to a
            permutation of each one's items; asked once for the next window of all lists.
        windows: which places; default those of DeAR.

    Raises:
        DataError: `order` gave what is no permutation.
    """
    windows = Windows() if windows is None else windows
    found = [list(items) for items in lists]
    spans = [windows.of(len(items)) for items in found]
    for step in range(max((len(own) for own in spans), default=0)):
        asked = [
            (i, step, found[i][slice(*own[step])]) for i, own in enumerate(spans) if step < len(own)
        ]
        for (i, _, items), permutation in zip(asked, order(asked), strict=True):
            if sorted(permutation) != list(range(len(items))):
                raise DataError(
                    f"{list(permutation)} is no permutation of a window of {len(items)} items"
                )
            found[i][slice(*spans[i][step])] = [items[j] for j in permutation]
    return found
