"""Items as codes: a few tokens each, of which no two items have the same.

Ids: 0 fills up and begins, 1 ends, then the codes of each level behind those of the one before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.optimize
from jaxtyping import Float, Int

from tokjax.decoding.constrained.trie import TokenTrie
from tokjax.errors import DataError

PAD, END, FIRST = 0, 1, 2
Padding = Literal["front", "behind"]


@dataclass(frozen=True, eq=False)
class ItemCodes:
    """The codes of a catalogue.

    Attributes:
        codes: of each item, one a level.
        size: number of codes of a level.
    """

    codes: Int[np.ndarray, "I L"]
    size: int

    def __post_init__(self):
        codes = np.asarray(self.codes)
        if codes.ndim != 2 or not codes.size:
            raise DataError(f"codes have shape {codes.shape}: give a row of codes for each item")
        if codes.min() < 0 or codes.max() >= self.size:
            raise DataError(f"codes are {codes.min()} to {codes.max()}, not 0 to {self.size - 1}")
        _, first, counts = np.unique(codes, axis=0, return_index=True, return_counts=True)
        if (counts > 1).any():
            at = int(first[counts > 1][0])
            twin = int(np.flatnonzero((codes == codes[at]).all(1))[1])
            raise DataError(
                f"items {at} and {twin} have the same codes {codes[at].tolist()}: make them unique "
                f"(`unique_codes`)"
            )

    def __len__(self) -> int:
        return len(self.codes)

    def __repr__(self) -> str:
        return f"ItemCodes({len(self)} items, {self.levels} levels of {self.size})"

    @property
    def levels(self) -> int:
        """Codes of an item."""
        return self.codes.shape[1]

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return FIRST + self.levels * self.size

    @cached_property
    def tokens(self) -> Int[np.ndarray, "I L"]:
        """The ids of each item.

        >>> ItemCodes(np.array([[3, 0], [3, 255]]), 256).tokens.tolist()
        [[5, 258], [5, 513]]
        """
        return (FIRST + self.size * np.arange(self.levels) + self.codes).astype(np.int32)

    @cached_property
    def trie(self) -> TokenTrie:
        """The items as a tree of ids, each with the end token behind."""
        return TokenTrie.of(self.tokens.tolist(), np.ones(len(self)), END)

    def histories(
        self, items: Int[np.ndarray, "B H"], padding: Padding = "front"
    ) -> Int[np.ndarray, "B S"]:
        """Returns what the encoder reads: the codes of each item, then the end token.

        Args:
            items: of each history, the latest last; -1 where there is none.
            padding: filling before the items, or between them and the end token.

        >>> codes = ItemCodes(np.array([[0, 1], [1, 0]]), 2)
        >>> codes.histories(np.array([[-1, 1]])).tolist()
        [[0, 0, 3, 4, 1]]
        >>> codes.histories(np.array([[-1, 1]]), "behind").tolist()
        [[3, 4, 0, 0, 1]]
        """
        items = np.asarray(items)
        if items.size and items.max() >= len(self):
            raise DataError(f"item {items.max()} is not among the {len(self)} that have codes")
        there = items >= 0
        order = np.argsort(there if padding == "front" else ~there, axis=1, kind="stable")
        items = np.take_along_axis(items, order, axis=1)
        tokens = np.where((items >= 0)[..., None], self.tokens[np.maximum(items, 0)], PAD)
        flat = tokens.reshape(len(items), -1)
        return np.concatenate([flat, np.full((len(items), 1), END)], axis=1).astype(np.int32)

    def answers(self, items: Int[np.ndarray, "B"]) -> Int[np.ndarray, "B T"]:
        """Returns the begin token, the item's codes and the end token: input and labels in one."""
        tokens = self.tokens[np.asarray(items)]
        ends = np.full((len(tokens), 1), PAD), np.full((len(tokens), 1), END)
        return np.concatenate([ends[0], tokens, ends[1]], axis=1).astype(np.int32)

    def save(self, path: str | Path) -> None:
        """Writes the codes as a file of NumPy's.

        Raises:
            StorageError: it cannot be written.
        """
        import io

        from tokjax.files import write_atomically

        content = io.BytesIO()
        np.savez(content, codes=self.codes, size=np.int64(self.size))
        write_atomically(Path(path), content.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> "ItemCodes":
        """Returns the codes in a file.

        Raises:
            DataError: it is not there or holds something else.
        """
        try:
            with np.load(path) as found:
                return cls(found["codes"], int(found["size"]))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} holds no codes of items: {error}") from error


def unique_codes(
    x: Float[np.ndarray, "I D"], codebooks: Float[np.ndarray, "L K D"], ids: Int[np.ndarray, "I L"]
) -> Int[np.ndarray, "I L"]:
    """Returns codes of which no two are the same.

    Items that share all codes but the last are given different last ones so that the sum of
    squared distances is least. Only where more items than entries share them do those that are
    farthest off take the nearest other code of the level before that has room.

    This takes the place of Sinkhorn iterations that are repeated on colliding items, which may
    leave some (recommendation of tokjax).

    Args:
        x: vectors of the items.
        codebooks: entries of each level.
        ids: codes of the items.

    Raises:
        DataError: there are more items than codes.
    """
    x, codebooks = np.asarray(x, np.float64), np.asarray(codebooks, np.float64)
    ids, (levels, size) = np.array(ids), codebooks.shape[:2]
    if len(ids) > size**levels:
        raise DataError(f"{len(ids)} items do not fit {size}^{levels} codes: raise levels or size")
    _make_room(x, codebooks, ids, levels - 1)
    for members in _groups(ids[:, :-1]):
        if len(np.unique(ids[members, -1])) == len(members):
            continue
        cost = _squares(_left(x, codebooks, ids, members, levels - 1), codebooks[-1])
        rows, columns = scipy.optimize.linear_sum_assignment(cost)
        ids[members[rows], -1] = columns
    return ids


def _make_room(x: np.ndarray, codebooks: np.ndarray, ids: np.ndarray, level: int) -> None:
    """Changes codes before `level` until no prefix has more items than can be told apart."""
    if level == 0:
        return
    _make_room(x, codebooks, ids, level - 1)
    size, levels = codebooks.shape[1], len(codebooks)
    room = size ** (levels - level)
    for members in _groups(ids[:, : level - 1]):
        counts = np.bincount(ids[members, level - 1], minlength=size)
        left = _left(x, codebooks, ids, members, level - 1)
        cost = _squares(left, codebooks[level - 1])
        for code in np.flatnonzero(counts > room):
            own = np.flatnonzero(ids[members, level - 1] == code)
            farthest = own[np.argsort(-cost[own, code], kind="stable")][: counts[code] - room]
            for i in farthest:
                better = np.where(counts < room, cost[i], np.inf).argmin()
                ids[members[i], level - 1] = better
                counts[code] -= 1
                counts[better] += 1
                if level < levels:  # what follows was chosen for another residual
                    _requantize(x, codebooks, ids, int(members[i]), level)


def _requantize(x: np.ndarray, codebooks: np.ndarray, ids: np.ndarray, i: int, first: int) -> None:
    for level in range(first, len(codebooks)):
        left = _left(x, codebooks, ids, np.array([i]), level)
        ids[i, level] = _squares(left, codebooks[level]).argmin()


def _groups(prefixes: Int[np.ndarray, "I P"]) -> Sequence[Int[np.ndarray, "M"]]:
    """Returns the items of each prefix."""
    if not prefixes.shape[1]:
        return [np.arange(len(prefixes))]
    _, group = np.unique(prefixes, axis=0, return_inverse=True)
    group = group.reshape(-1)
    order = np.argsort(group, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group[order])) + 1)


def _left(x, codebooks, ids, members, level) -> np.ndarray:
    """Returns what the levels before `level` have left of some items."""
    return x[members] - sum(codebooks[i][ids[members, i]] for i in range(level))


def _squares(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.square(x[:, None] - codes[None]).sum(-1)
