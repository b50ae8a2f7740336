"""How likely candidates are behind what was chosen, by a model with a shared cache or a function.

A state stands for `beams` contexts. `score` gives the log-probability of each candidate behind each
context, in nats, and a state from which `choose` goes on with some of them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax import struct
from tokjax.errors import ConfigError
from tokjax.language_model import LanguageModel
from tokjax.models.cache import Cache, fork
from tokjax.models.parameters import unstack
from tokjax.models.transformer import Transformer
from tokjax.signals.token_stats import token_stats

Context = str | Sequence[int]


class Scorer(Protocol):
    """Scores of candidates behind what was chosen before them."""

    def count(self, text: str) -> int:
        """Returns the length of a text, in tokens."""
        ...

    def extended(self, context: Context, text: str) -> Context:
        """Returns a context with a text behind it."""
        ...

    def room(self, context: Context) -> float:
        """Returns how many tokens may follow a context."""
        ...

    def begin(self, context: Context, beams: int, longest: int, room: int) -> Any:
        """Returns the state of `beams` equal contexts.

        Args:
            context: what comes before the trace, as text or ids.
            beams: number of contexts.
            longest: most tokens of a candidate.
            room: most tokens behind the context, all chosen candidates together.
        """
        ...

    def score(
        self, state: Any, candidates: Sequence[str], width: int
    ) -> tuple[Float[np.ndarray, "B N"], Any]:
        """Returns the log-probability of each candidate behind each context, and the next state.

        Args:
            state: of the contexts.
            candidates: texts.
            width: number that the candidates are filled up to, so that programs are shared.
        """
        ...

    def choose(self, state: Any, beams: Sequence[int], candidates: Sequence[int]) -> Any:
        """Returns the state of the named contexts, each continued by a candidate just scored."""
        ...


@dataclasses.dataclass(frozen=True)
class FunctionScorer:
    """Scores by a function of (context, texts chosen, candidate) -> log-probability.

    Attributes:
        function: called once for each context and candidate.
        length: of a text, in tokens; default its number of words.
    """

    function: Callable[[Context, tuple[str, ...], str], float]
    length: Callable[[str], int] = lambda text: len(text.split())

    def count(self, text: str) -> int:
        """See `Scorer`."""
        return self.length(text)

    def extended(self, context: Context, text: str) -> Context:
        """See `Scorer`; ids cannot be continued by a text, so they stay as they are."""
        return context + text if isinstance(context, str) else context

    def room(self, context: Context) -> float:
        """See `Scorer`."""
        return math.inf

    def begin(self, context: Context, beams: int, longest: int, room: int) -> Any:
        """See `Scorer`."""
        return context, [()] * beams, ()

    def score(self, state: Any, candidates: Sequence[str], width: int) -> tuple[np.ndarray, Any]:
        """See `Scorer`."""
        context, chosen, _ = state
        scores = [[self.function(context, c, text) for text in candidates] for c in chosen]
        return np.array(scores, np.float64), (context, chosen, tuple(candidates))

    def choose(self, state: Any, beams: Sequence[int], candidates: Sequence[int]) -> Any:
        """See `Scorer`."""
        context, chosen, texts = state
        pairs = zip(beams, candidates, strict=True)
        return context, [(*chosen[b], texts[c]) for b, c in pairs], ()


@struct.dataclass
class Contexts:
    """What a model has read: all but the last id of each context, which predicts what follows.

    Attributes:
        cache: of the ids read.
        last: of each context.
        ids: of the candidates just scored, for each of their rows.
        lengths: of the candidates.
    """

    cache: Cache
    last: Int[Array, "B"]
    ids: Int[Array, "R T"] | None = None
    lengths: Int[Array, "R"] | None = None


class LMScorer:
    """Scores by a language model; each context is read once, whatever follows it.

    Texts are encoded one by one, so that what is read of a trace does not depend on what follows.
    """

    def __init__(self, lm: LanguageModel):
        """Wraps a model from `tokjax.load`."""
        self.lm, self._params = lm, unstack(lm.params)

    def count(self, text: str) -> int:
        """Returns the number of tokens of a text."""
        return len(self.lm.tokenizer.encode(text))

    def extended(self, context: Context, text: str) -> Context:
        """See `Scorer`."""
        return [*self._ids(context), *self.lm.tokenizer.encode(text)]

    def room(self, context: Context) -> float:
        """See `Scorer`."""
        return self.lm.model.config.max_positions - len(self._ids(context))

    def begin(self, context: Context, beams: int, longest: int, room: int) -> Contexts:
        """See `Scorer`.

        Raises:
            ConfigError: the context has no id, or with what follows exceeds the model's positions.
        """
        ids = self._ids(context)
        if not ids:
            raise ConfigError(
                "nothing comes before the trace: this model expects no BOS, so give a prompt"
            )
        if room > self.room(ids):
            raise ConfigError(
                f"{len(ids)} tokens of the prompt and {room} of the trace exceed the model's "
                f"max_positions={self.lm.model.config.max_positions}"
            )
        before = np.zeros((1, self._rounded(len(ids))), np.int32)
        before[0, : len(ids)] = ids
        widest = self._rounded(longest)
        slots = _doubled(len(ids) + room + widest)  # behind the last token lies filling of a pass
        model = self.lm.model
        cache = model.init_cache(1, slots, chunk=max(before.shape[1], widest))
        cache = _read(model, self._params, cache, before, np.array([len(ids) - 1], np.int32))
        return Contexts(fork(cache, beams), jnp.full(beams, ids[-1], jnp.int32))

    def score(
        self, state: Contexts, candidates: Sequence[str], width: int
    ) -> tuple[np.ndarray, Contexts]:
        """See `Scorer`."""
        beams = state.last.shape[0]
        rows = [self.lm.tokenizer.encode(text) for text in candidates]
        tokens = np.zeros((width, self._rounded(max(map(len, rows)))), np.int32)
        for r, row in enumerate(rows):
            tokens[r, : len(row)] = row
        lengths = np.array([len(row) for row in rows] + [1] * (width - len(rows)), np.int32)
        tokens, lengths = np.tile(tokens, (beams, 1)), np.tile(lengths, beams)
        found, cache = _score(self.lm.model, self._params, state, tokens, lengths)
        mask = np.arange(tokens.shape[1]) < lengths[:, None]
        totals = np.where(mask, np.asarray(found, np.float64), 0.0).sum(1)
        return (
            totals.reshape(beams, width)[:, : len(rows)],
            Contexts(cache, state.last, jnp.asarray(tokens), jnp.asarray(lengths)),
        )

    def choose(self, state: Contexts, beams: Sequence[int], candidates: Sequence[int]) -> Contexts:
        """See `Scorer`."""
        assert state.ids is not None
        width = state.ids.shape[0] // state.last.shape[0]
        rows = np.asarray(beams, np.int32) * width + np.asarray(candidates, np.int32)
        return _choose(state, rows)

    def _ids(self, context: Context) -> list[int]:
        return self.lm.encode(context) if isinstance(context, str) else list(context)

    def _rounded(self, length: int) -> int:
        return min(_doubled(length), self.lm.model.config.max_positions)


def _doubled(length: int) -> int:
    """Returns a length rounded up to a power of two, so that few programs are compiled."""
    return max(16, 1 << (length - 1).bit_length())


@functools.partial(jax.jit, static_argnums=0)
def _read(
    model: Transformer,
    params: Any,
    cache: Cache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
) -> Cache:
    _, found = _pass(model, params, cache, tokens)
    return found.rewind(lengths)


def _pass(model: Transformer, params: Any, cache: Cache, tokens: jax.Array) -> tuple[Any, Cache]:
    # Filling may lie beyond the last position, where a learned embedding would be NaN.
    most = model.config.max_positions - 1
    at = jnp.minimum(cache.lengths[:, None] + jnp.arange(tokens.shape[1]), most)
    out = model.backbone(params, model.embed(params, tokens), positions=at, cache=cache)
    assert out.cache is not None
    return out.x, out.cache


@functools.partial(jax.jit, static_argnums=0)
def _score(
    model: Transformer,
    params: Any,
    state: Contexts,
    tokens: Int[Array, "R T"],
    lengths: Int[Array, "R"],
) -> tuple[Float[Array, "R T"], Cache]:
    """Returns log-probabilities of candidates behind each context, and the cache of all rows."""
    copies = tokens.shape[0] // state.last.shape[0]
    cache = fork(state.cache, copies)
    inputs = jnp.concatenate([jnp.repeat(state.last, copies)[:, None], tokens[:, :-1]], axis=1)
    x, after = _pass(model, params, cache, inputs)
    logprob = token_stats(x, model.head(params), tokens, want=("logprob",)).logprob
    assert logprob is not None
    # The last id of a candidate is not read yet: it predicts what follows.
    return logprob, after.rewind(cache.lengths + lengths)


@jax.jit
def _choose(state: Contexts, rows: Int[Array, "B"]) -> Contexts:
    assert state.ids is not None and state.lengths is not None
    last = state.ids[rows, state.lengths[rows] - 1]
    return Contexts(jax.tree.map(lambda a: a[rows], state.cache), last)
