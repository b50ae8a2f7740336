"""How far apart the last states of two sequences are, by length: representational collapse.

The next token is predicted from the last token's final state. Two sequences whose states are equal
in the precision of the pass get the same answer, whatever is asked.

Reference: "Transformers need glasses! Information over-squashing in language tasks",
arXiv 2406.04267.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax.analysis.over_squashing.pairs import MakePair
from tokjax.errors import ConfigError, DataError, nearest
from tokjax.models.config import with_dtypes
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer

Norm = Literal["l1", "l2", "max"]
States = Callable[[list[list[int]]], Any]
_BY_LENGTH = ("dynamic", "longrope")  # frequencies that depend on the length of the pass


@dataclass(frozen=True)
class CollapseCurve:
    """Distances of the last states of pairs, by number of elements.

    Attributes:
        ns: numbers of elements.
        distances: between the two states, in float64 of the states as they are.
        sizes: of the first state, by the same norm.
        equal: whether the two are the same bit for bit.
        norm: of the distances.
    """

    ns: Int[np.ndarray, "N"]
    distances: Float[np.ndarray, "N"]
    sizes: Float[np.ndarray, "N"]
    equal: Bool[np.ndarray, "N"]
    norm: str

    @property
    def first_equal(self) -> int | None:
        """The first n whose states are equal, or None."""
        return int(self.ns[self.equal.argmax()]) if self.equal.any() else None

    @property
    def last_unequal(self) -> int | None:
        """The last n whose states differ, or None."""
        return int(self.ns[~self.equal][-1]) if not self.equal.all() else None

    def first_below(self, tolerance: float) -> int | None:
        """Returns the first n whose distance is below a tolerance, or None."""
        below = self.distances < tolerance
        return int(self.ns[below.argmax()]) if below.any() else None

    def slope(self) -> float:
        """Returns the slope of log-distance by log-n: -1 is a distance like 1 / n.

        Raises:
            DataError: fewer than two distances are above 0.
        """
        kept = self.distances > 0
        if kept.sum() < 2:
            raise DataError(
                f"{int(kept.sum())} of {len(kept)} distances are above 0: a slope needs two; "
                f"measure shorter sequences or in higher precision"
            )
        return float(np.polyfit(np.log(self.ns[kept]), np.log(self.distances[kept]), 1)[0])

    @property
    def table(self) -> str:
        """A line for each length."""
        lines = [f"{'n':>6}  {'distance':>11}  {'relative':>11}  equal"]
        for n, distance, size, equal in zip(
            self.ns, self.distances, self.sizes, self.equal, strict=True
        ):
            share = distance / size if size else float("nan")
            lines.append(f"{n:>6}  {distance:>11.4g}  {share:>11.4g}  {'yes' if equal else 'no'}")
        return "\n".join(lines)


def collapse_curve(
    source: Transformer | States,
    make_pair: MakePair,
    ns: Iterable[int],
    *,
    params: Params | None = None,
    dtype: str | None = None,
    norm: Norm = "l1",
    batch_size: int = 8,
) -> CollapseCurve:
    """Returns how far apart the last states of pairs are.

    Args:
        source: a causal model, or a function that returns the states [N, D] of N sequences.
        make_pair: n -> two sequences of ids, such as those of `pairs`.
        ns: numbers of elements, in rising order.
        params: of the model.
        dtype: of the model's activations: "float32" or "bfloat16"; None takes its own.
        norm: sum of absolute differences, Euclidean, or the largest.
        batch_size: sequences of a pass.

    Raises:
        ConfigError: an option is out of range or does not fit the source; a sequence is longer
            than the model's positions.
        DataError: an empty sequence, or an id that is not in the vocabulary.
    """
    if norm not in ("l1", "l2", "max"):
        raise ConfigError(f"unknown norm={norm!r}.{nearest(str(norm), ('l1', 'l2', 'max'))}")
    ns = list(ns)
    if not ns or min(ns) < 1 or any(a >= b for a, b in itertools.pairwise(ns)):
        raise ConfigError(f"ns={ns} must be numbers from 1 on, in rising order")
    sequences = [list(sequence) for n in ns for sequence in make_pair(n)]
    if isinstance(source, Transformer):
        if params is None:
            raise ConfigError("a model's states need its parameters: give params=")
        found = last_states(source, params, sequences, dtype=dtype, batch_size=batch_size)
    elif params is not None or dtype is not None:
        raise ConfigError(
            "params and dtype are for a Transformer: a function has its own (give lm.model and "
            "lm.params of a loaded model)"
        )
    else:
        found = np.asarray(source(sequences))
    first, second = found[::2], found[1::2]
    wide = first.astype(np.float64)
    return CollapseCurve(
        np.array(ns),
        _size(wide - second.astype(np.float64), norm),
        _size(wide, norm),
        (first == second).all(axis=-1),
        norm,
    )


def _size(x: np.ndarray, norm: Norm) -> np.ndarray:
    return np.linalg.norm(x, ord={"l1": 1, "l2": 2, "max": np.inf}[norm], axis=-1)


def last_states(
    model: Transformer,
    params: Params,
    sequences: Sequence[Sequence[int]],
    *,
    dtype: str | None = None,
    batch_size: int = 8,
) -> Float[np.ndarray, "N D"]:
    """Returns the final state of the last token of sequences, in the dtype of the pass.

    All lengths share one program: what fills a row up comes behind its last token, where no token
    of a causal model sees it.

    Args:
        model: a causal one.
        params: its parameters.
        sequences: ids.
        dtype: of the activations; None takes the model's.
        batch_size: sequences of a pass.

    Raises:
        ConfigError: the model is not causal, a sequence is too long, or an option out of range.
        DataError: there is no sequence, an empty one, or an id that is not in the vocabulary.
    """
    model = variant(model, dtype=dtype)
    config = model.config
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    check_sequences(model, sequences)
    fixed = config.positions != "rotary" or config.rope_scaling.kind not in _BY_LENGTH
    longest = max(map(len, sequences))
    found: list[Any] = [None] * len(sequences)
    # Frequencies that depend on the length of the pass would be those of the longest row.
    groups: dict[int, list[int]] = {}
    for at, sequence in enumerate(sequences):
        groups.setdefault(longest if fixed else len(sequence), []).append(at)
    for width, members in groups.items():
        for start in range(0, len(members), batch_size):
            part = members[start : start + batch_size]
            tokens = np.zeros((min(batch_size, len(members)), width), np.int32)
            lengths = np.ones(len(tokens), np.int32)
            for row, at in enumerate(part):
                tokens[row, : len(sequences[at])] = sequences[at]
                lengths[row] = len(sequences[at])
            states = np.asarray(_last(model, params, tokens, lengths))
            for row, at in enumerate(part):
                found[at] = states[row]
    return np.stack(found)


@functools.partial(jax.jit, static_argnums=0)
def _last(
    model: Transformer, params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> Float[Array, "B D"]:
    x = model.backbone(params, model.embed(params, tokens)).x
    return jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]


def check_sequences(model: Transformer, sequences: Sequence[Sequence[int]]) -> None:
    """Refuses what has no last state in a causal model.

    Raises:
        ConfigError: the model is not causal, or a sequence is too long for it.
        DataError: there is no sequence, an empty one, or an id that is not in the vocabulary.
    """
    config = model.config
    if not config.causal:
        raise ConfigError(
            "causal=False: an encoder's last token sees everything at once; this is about the "
            "last token of causal models"
        )
    if not len(sequences) or not all(len(sequence) for sequence in sequences):
        raise DataError("there is no sequence, or an empty one: each needs a last token")
    longest = max(map(len, sequences))
    if longest > config.max_positions:
        raise ConfigError(
            f"a sequence has {longest} tokens, but the model has max_positions="
            f"{config.max_positions}: measure shorter ones"
        )
    for at, sequence in enumerate(sequences):
        if not 0 <= min(sequence) <= max(sequence) < config.vocabulary:
            raise DataError(
                f"sequence {at} has an id that is not within 0 to {config.vocabulary - 1}, the "
                f"model's vocabulary"
            )


def variant(
    model: Transformer, *, dtype: str | None = None, window: int | None = None
) -> Transformer:
    """Returns the model with other activations or a window, for the same parameters.

    Both delay the collapse: more precision tells closer states apart, and with a window few tokens
    share the attention (of what is beyond it, layers above hear indirectly).

    Args:
        model: as it was trained.
        dtype: of activations: "float32" or "bfloat16"; None leaves it.
        window: keys that every layer's queries see, themselves included; None leaves it.

    Raises:
        ConfigError: an option is out of range.
    """
    config = model.config
    if dtype is not None:
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(
                f"dtype={dtype!r}: a model computes in 'float32' or 'bfloat16'."
                f"{nearest(str(dtype), ('float32', 'bfloat16'))}"
            )
        config = with_dtypes(config, config.param_dtype, dtype)
    if window is not None:
        config = dataclasses.replace(config, sliding_window=window, window_pattern=())
    return model if config == model.config else Transformer(config)
