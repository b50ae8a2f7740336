"""Constraints at decoding: automata on the device, one for each row."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.decoding.constrained.automaton import Automaton
from tokjax.decoding.constrained.byte_automaton import NOWHERE
from tokjax.decoding.context import Context
from tokjax.decoding.prompts import Prompts, bucket
from tokjax.decoding.transforms.base import Transform
from tokjax.errors import ConfigError

_SMALLEST = 1024  # entries of a table: most constraints then share a program

# What a row without a constraint follows: one state, in which everything is allowed.
_FREE = Automaton(
    name="no constraint",
    classes=np.zeros(1, np.int32),
    next=np.zeros((1, 1), np.int32),
    distance=np.zeros(1, np.int32),
    complete=np.zeros(1, bool),
)


@dataclass(frozen=True)
class _Names:
    """Of the automata, for messages; all are equal, since no program depends on them."""

    names: tuple[str, ...] = field(compare=False)


@struct.dataclass
class _Constrained:
    """All automata one behind the other; a state's number counts through them.

    Sizes are rounded up, so that few constraints compile anything.
    """

    classes: Any  # [A, V]
    next: Any  # [N], a row for each state: the state behind each class
    begin: Any  # [S], where a state's row begins
    distance: Any  # [S]
    complete: Any  # [S]
    start: Any  # [A]
    shortest: Any  # [A]
    rows: Any  # [B], which automaton each row follows
    finish: bool = struct.field(pytree_node=False)
    told: _Names = struct.field(pytree_node=False)

    def check(self, prompts: Prompts, limits: np.ndarray, vocab_size: int) -> None:
        """Finds on the host what cannot be: called before anything is compiled."""
        if vocab_size < self.classes.shape[1]:
            raise ConfigError(
                f"the constraint is made for {self.classes.shape[1]} token ids, the model has "
                f"{vocab_size}: was it made with another tokenizer?"
            )
        B = prompts.tokens.shape[0]
        if self.rows.shape[0] not in (1, B):
            raise ConfigError(
                f"there are {self.rows.shape[0]} constraints for {B} prompts: give one for all, or "
                f"one for each"
            )
        rows, short = self._rows(len(limits)), np.asarray(self.shortest)
        for b, limit in enumerate(limits):
            least = short[rows[b]]
            if limit < least:
                raise ConfigError(
                    f"prompt {b * B // len(limits)}: the shortest text of "
                    f"{self.told.names[rows[b]]} has {least} tokens: raise max_new_tokens={limit}"
                )

    def init(self, prompts: Prompts, vocab_size: int) -> Int[Array, "B"]:
        """Returns the first states."""
        return jnp.asarray(self.start)[self._rows(prompts.tokens.shape[0])]

    def update(
        self, logits: Float[Array, "B V"], state: Int[Array, "B"], context: Context
    ) -> tuple[Float[Array, "B V"], Int[Array, "B"]]:
        """Returns -inf for what may not come, and the states behind the latest tokens."""
        B, V = logits.shape
        state = jnp.where(context.step > 0, self._behind(state, context), state)
        classes = jnp.asarray(self.classes)[self._rows(B)]
        # Ids that only the model knows are of class 0, as all are that no text holds.
        classes = jnp.pad(classes, ((0, 0), (0, V - classes.shape[1])))
        following = jnp.asarray(self.next)[jnp.asarray(self.begin)[state][:, None] + classes]
        allowed = following != NOWHERE
        if self.finish and context.limits is not None:
            left = context.limits - context.step - 1
            allowed &= jnp.asarray(self.distance)[following] <= left[:, None]
        masked = jnp.where(allowed, logits, -jnp.inf)
        # Where all that may come was excluded before, the constraint alone decides.
        lost = jnp.isneginf(masked).all(-1, keepdims=True)
        return jnp.where(allowed & lost, 0.0, masked), state

    def ends(self, state: Int[Array, "B"], context: Context) -> Bool[Array, "B"]:
        """Returns which rows are complete by their latest token, and cannot go on."""
        return jnp.asarray(self.complete)[self._behind(state, context)]

    def _behind(self, state: Int[Array, "B"], context: Context) -> Int[Array, "B"]:
        rows = self._rows(context.last.shape[0])
        last = context.last
        known = last < self.classes.shape[1]
        own = jnp.asarray(self.classes)[rows, jnp.where(known, last, 0)]
        own = jnp.where(known, own, 0)
        behind = jnp.asarray(self.next)[jnp.asarray(self.begin)[state] + own]
        return jnp.where(behind == NOWHERE, state, behind)  # rows that are done: of no meaning

    def _rows(self, batch: int) -> Any:
        """Returns each row's automaton; samples of a prompt are neighbours and share it."""
        repeat = np.repeat if isinstance(self.rows, np.ndarray) else jnp.repeat
        return repeat(self.rows, batch // self.rows.shape[0])


def constrained(
    automata: Automaton | Sequence[Automaton | None], *, finish: bool = True
) -> Transform:
    """Returns the exclusion of every token behind which the text could not be completed.

    A row ends when its text is complete and cannot go on, or by an EOS id, which is allowed where
    the text is complete. With `finish`, tokens are excluded too that would leave too little of
    `max_new_tokens` to complete the text, so that every row is a complete one; without, a row
    may be cut off. Put it before temperature and truncation.

    Where a predictor or an earlier transform excluded all that the constraint allows, these tokens
    are equally likely.

    Tokens are excluded step by step and the rest is renormalised. This is not the model's
    distribution given that the text satisfies the constraint: it favours beginnings that are
    likely but hard to complete. For samples at temperature 1 without other transforms,
    `(logprobs - sampling_logprobs).sum` over a row's tokens is the logarithm of the weight by
    which resampling corrects it; for few texts, see `matches`.

    Args:
        automata: one for all rows, or one for each prompt, None for no constraint.
        finish: complete the text within `max_new_tokens`.

    Raises:
        ConfigError: there is none, or they are made for different vocabularies. In `decode`: their
            number is not that of the prompts, or no text is short enough.

    Reference:
        Willard and Louf, "Efficient Guided Generation for Large Language Models" (arXiv
        2307.09702), section 3.
    """
    each = [automata] if isinstance(automata, Automaton) else list(automata)
    if not each:
        raise ConfigError("constrained needs one automaton, or one for each prompt")
    different = list(dict.fromkeys(_FREE if a is None else a for a in each))
    sizes = {len(a.classes) for a in different if a is not _FREE}
    if len(sizes) > 1:
        raise ConfigError(
            f"the constraints are made for different vocabularies: {sorted(sizes)} ids"
        )
    size = max(sizes, default=1)
    index = {id(a): i for i, a in enumerate(different)}
    tables, begins, starts, states, entries = [], [], [], 0, 0
    for a in different:
        S, C = a.next.shape
        tables.append(np.where(a.next == NOWHERE, NOWHERE, a.next + states).reshape(-1))
        begins.append(entries + C * np.arange(S))
        starts.append(states)
        states, entries = states + S, entries + S * C
    if entries > np.iinfo(np.int32).max:
        raise ConfigError(f"the constraints need {entries:,} entries together: use fewer at a time")
    return _Constrained(
        classes=np.stack([np.resize(a.classes, size) for a in different]),
        next=_filled(np.concatenate(tables), NOWHERE),
        begin=_filled(np.concatenate(begins)),
        distance=_filled(np.concatenate([a.distance for a in different])),
        complete=_filled(np.concatenate([a.complete for a in different])),
        start=np.array(starts, np.int32),
        shortest=np.array([a.shortest for a in different], np.int32),
        rows=np.array([index[id(_FREE if a is None else a)] for a in each], np.int32),
        finish=finish,
        told=_Names(tuple(a.name for a in different)),
    )


def _filled(values: np.ndarray, fill: Any = 0) -> np.ndarray:
    dtype = bool if values.dtype == bool else np.int32
    room = bucket(max(_SMALLEST, len(values))) - len(values)
    return np.pad(values.astype(dtype), (0, room), constant_values=fill)
