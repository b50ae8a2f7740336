"""Automata over the tokens of a vocabulary, made from automata over bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int

from tokjax.data.tokenizers import Tokenizer
from tokjax.decoding.constrained.byte_automaton import NOWHERE, ByteAutomaton, distinct_columns
from tokjax.errors import ConfigError

UNREACHABLE = np.iinfo(np.int32).max
_MAX_ENTRIES = 2**27  # of the table while it is made: half a gigabyte


@dataclass(frozen=True)
class TokenTable:
    """The bytes of a vocabulary's tokens, and the ids that end a text.

    Attributes:
        identity: equal tables have an equal one.
        eos_ids: what may come where a text is complete.
        tokens: the bytes of each id; b"" for those that a constraint never allows.
    """

    identity: str
    eos_ids: tuple[int, ...]
    tokens: tuple[bytes, ...] = field(repr=False, compare=False)

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        *,
        vocab_size: int | None = None,
        eos_ids: Sequence[int] | None = None,
    ) -> "TokenTable":
        """Returns the table of a tokenizer.

        Args:
            tokenizer: the model's.
            vocab_size: number of ids that the model knows, if it is not the tokenizer's.
            eos_ids: default the tokenizer's EOS id, if it has one.

        Raises:
            ConfigError: an EOS id is not in the vocabulary.
        """
        size = tokenizer.vocab_size if vocab_size is None else vocab_size
        if eos_ids is None:
            eos_ids = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        for i in eos_ids:
            if not 0 <= i < size:
                raise ConfigError(f"EOS id {i} is not in the vocabulary, whose ids are 0 to {size}")
        known = min(size, tokenizer.vocab_size)
        tokens = [tokenizer.token_bytes(i) for i in range(known)] + [b""] * (size - known)
        eos = tuple(sorted({int(i) for i in eos_ids}))
        return cls(f"{tokenizer.fingerprint}-{size}", eos, tuple(tokens))


@dataclass(frozen=True, eq=False)
class Automaton:
    """A deterministic automaton that reads tokens; state 0 is the first.

    Tokens that do the same in every state share a class, so that the table is small whatever the
    vocabulary. From each state a complete text can be reached. An EOS id leads from an accepting
    state to the last one, in which it stays.

    Attributes:
        name: how error messages call the constraint.
        classes: the class of each token id; those of class 0 are never allowed.
        next: the state behind each class, -1 where it is not allowed.
        distance: least number of tokens to an accepting state, 0 in those.
        complete: accepting states behind which no more text can come.
    """

    name: str
    classes: Int[np.ndarray, "V"]
    next: Int[np.ndarray, "S C"]
    distance: Int[np.ndarray, "S"]
    complete: Bool[np.ndarray, "S"]

    @property
    def shortest(self) -> int:
        """Least number of new tokens that make a complete text; at least 1."""
        if self.distance[0] > 0:
            return int(self.distance[0])
        following = self.next[0][self.next[0] >= 0]
        return 1 + int(self.distance[following].min())

    def allowed(self, state: int) -> Bool[np.ndarray, "V"]:
        """Returns which ids may come in a state."""
        return self.next[state][self.classes] >= 0

    def run(self, tokens: Sequence[int]) -> int:
        """Returns the state behind the tokens, -1 if they are not allowed."""
        state = 0
        for token in tokens:
            state = int(self.next[state, self.classes[token]])
            if state == NOWHERE:
                break
        return state

    def matches(self, tokens: Sequence[int]) -> bool:
        """Returns whether the tokens are a complete text."""
        state = self.run(tokens)
        return bool(state != NOWHERE and self.distance[state] == 0)


def over_tokens(name: str, automaton: ByteAutomaton, table: TokenTable) -> Automaton:
    """Returns the automaton over a vocabulary that allows exactly the automaton's texts.

    A token may hold any bytes, parts of characters too; states that no vocabulary's token leads
    on to a complete text are left out.

    Raises:
        ConfigError: the vocabulary can write no such text, or the table would be too large.
    """
    byte_classes, behind_class = automaton.byte_classes()
    words, word_of = _words(table.tokens, byte_classes)
    S, U = len(behind_class), len(words)
    if S * U > _MAX_ENTRIES:
        raise ConfigError(
            f"{name} needs {S} states for {U} kinds of tokens, {S * U:,} entries where "
            f"{_MAX_ENTRIES:,} are possible: shorten its repetitions (a maxLength, {{0,n}})"
        )
    following = _walk(behind_class, words)
    E = min(1, len(table.eos_ids))  # one state and one column more
    full = np.full((S + E, U + E), NOWHERE, np.int32)
    full[:S, :U] = following
    if E:
        full[:S, U] = np.where(automaton.accepting, S, NOWHERE)
        full[S, U] = S
        word_of = word_of.copy()
        word_of[list(table.eos_ids)] = U
    accepting = np.concatenate([automaton.accepting, np.ones(E, bool)])
    class_of, columns = distinct_columns(full)
    return _trimmed(name, class_of[word_of], columns, accepting, S if E else None)


def _words(tokens: Sequence[bytes], byte_classes: np.ndarray) -> tuple[list[bytes], np.ndarray]:
    """Returns the different tokens when bytes are told apart by class only, the first standing
    for all that are never allowed, and which one each token is.
    """
    translation = bytes(byte_classes.tolist())  # of UTF-8 there are fewer than 256
    index: dict[bytes, int] = {b"\0": 0}
    which = np.zeros(len(tokens), np.int64)
    for i, token in enumerate(tokens):
        word = token.translate(translation)
        if word and 0 not in word:
            which[i] = index.setdefault(word, len(index))
    return list(index), which


def _walk(behind_class: np.ndarray, words: Sequence[bytes]) -> Int[np.ndarray, "S U"]:
    """Returns the state behind each word from each state."""
    # One state more, for nowhere: from there everything leads there.
    table = np.pad(behind_class.astype(np.int32).T, ((0, 0), (0, 1)), constant_values=NOWHERE)
    state = np.tile(np.arange(len(behind_class), dtype=np.int32), (len(words), 1))
    lengths = np.array([len(word) for word in words])
    for at in range(int(lengths.max())):
        some = np.flatnonzero(lengths > at).tolist()
        read = np.array([words[i][at] for i in some])
        state[some] = table[read[:, None], state[some]]
    return state.T


def _trimmed(
    name: str, classes: np.ndarray, table: np.ndarray, accepting: np.ndarray, end: int | None
) -> Automaton:
    """Returns the automaton of the states that lead on to a complete text."""
    distance = _distances(table, accepting)
    if distance[0] == UNREACHABLE:
        raise ConfigError(f"{name} matches no text that this vocabulary can write")
    reached = _reached(table, distance < UNREACHABLE)
    new = np.full(len(table) + 1, NOWHERE, np.int32)
    new[:-1][reached] = np.arange(reached.sum())
    table = new[table[reached]]
    class_of, table = distinct_columns(table)  # some have become equal
    distance, accepting = distance[reached], accepting[reached]
    last = NOWHERE if end is None else int(new[end])
    goes_on = ((table != NOWHERE) & (table != last)).any(axis=1)
    if last == NOWHERE and not goes_on[0]:
        raise ConfigError(
            f"{name} matches the empty text only, and there is no EOS id that could say so"
        )
    return Automaton(
        name=name,
        classes=class_of[classes].astype(np.int32),
        next=table,
        distance=distance.astype(np.int32),
        complete=accepting & ~goes_on,
    )


def _edges(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    source, column = np.nonzero(table != NOWHERE)
    pairs = np.unique(source * len(table) + table[source, column])
    return pairs // len(table), pairs % len(table)


def _distances(table: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    """Returns the least number of tokens from each state to an accepting one."""
    source, target = _edges(table)
    distance = np.where(accepting, 0, UNREACHABLE).astype(np.int64)
    frontier, steps = accepting, 0
    while frontier.any():
        steps += 1
        before = np.zeros_like(accepting)
        before[source[frontier[target]]] = True
        frontier = before & (distance == UNREACHABLE)
        distance[frontier] = steps
    return distance


def _reached(table: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Returns which of the allowed states are reached from the first by way of such."""
    source, target = _edges(table)
    kept = allowed[source] & allowed[target]
    source, target = source[kept], target[kept]
    reached = np.zeros(len(table), bool)
    reached[0] = True
    frontier = reached.copy()
    while frontier.any():
        behind = np.zeros_like(reached)
        behind[target[frontier[source]]] = True
        frontier = behind & ~reached
        reached |= frontier
    return reached
