"""Automata over bytes: what a constraint on text is before a tokenizer comes in."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

NOWHERE = -1


@dataclass(frozen=True, eq=False)
class ByteAutomaton:
    """A deterministic automaton that reads bytes; state 0 is the first.

    Attributes:
        next: the state behind each byte, -1 where there is none.
        accepting: states in which the text may end.
    """

    next: Int[np.ndarray, "S 256"]
    accepting: Bool[np.ndarray, "S"]

    def matches(self, text: bytes) -> bool:
        """Returns whether the whole text is in the language."""
        state = 0
        for byte in text:
            state = int(self.next[state, byte])
            if state == NOWHERE:
                return False
        return bool(self.accepting[state])

    def byte_classes(self) -> tuple[Int[np.ndarray, "256"], Int[np.ndarray, "S C"]]:
        """Returns the class of each byte, 0 for those that lead nowhere from anywhere, and the
        state behind each class.
        """
        return distinct_columns(self.next)


def distinct_columns(
    table: Int[np.ndarray, "S N"],
) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "S C"]]:
    """Returns which of the different columns each column is, and these; column 0 leads nowhere."""
    columns = np.ascontiguousarray(table.T)
    index = {np.full(len(table), NOWHERE, table.dtype).tobytes(): 0}
    which = np.array([index.setdefault(column.tobytes(), len(index)) for column in columns])
    different = np.frombuffer(b"".join(index), table.dtype).reshape(len(index), len(table))
    return which, np.ascontiguousarray(different.T)


def of_texts(texts: Sequence[bytes]) -> ByteAutomaton:
    """Returns the automaton of a finite set of texts: a trie."""
    rows: list[dict[int, int]] = [{}]
    ends = set()
    for text in texts:
        state = 0
        for byte in text:
            if byte not in rows[state]:
                rows[state][byte] = len(rows)
                rows.append({})
            state = rows[state][byte]
        ends.add(state)
    table = np.full((len(rows), 256), NOWHERE, np.int32)
    for state, row in enumerate(rows):
        for byte, to in row.items():
            table[state, byte] = to
    return ByteAutomaton(table, np.isin(np.arange(len(rows)), list(ends)))
