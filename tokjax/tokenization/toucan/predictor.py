"""Decoding of Toucan: the last stack runs a symbol, all others once a group."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax import struct
from tokjax.decoding.predictors import StepOutput
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError
from tokjax.models import parameters
from tokjax.models.cache import Cache
from tokjax.models.head import logits
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer, padding
from tokjax.tokenization.rows import chosen, read_prompts
from tokjax.tokenization.toucan.objective import Toucan
from tokjax.tokenization.toucan.parts import Parts
from tokjax.training.objective import HEADS

BACKBONE_STEPS = "backbone_steps"  # signal: groups that the backbone has read in a row


@struct.dataclass
class ToucanParams:
    """Parameters of Toucan.

    Attributes:
        model: of the backbone.
        heads: of the objective, as a run leaves them.
    """

    model: Any
    heads: Any


@struct.dataclass
class ToucanState:
    """What decoding remembers of each row.

    Attributes:
        read: cache of the stack over characters.
        groups: the backbone's cache.
        spelled: cache of the last stack, over characters and ends.
        vector: what the backbone says to the present group.
        buffer: characters of the group that the first stack has not read yet.
        size: how many there are.
        total: sum of the first stack's states of the group, of the characters it has read.
        counted: how many those are.
        steps: groups the backbone has read, the null one included.
    """

    read: Cache
    groups: Cache
    spelled: Cache
    vector: Float[Array, "B D"]
    buffer: Int[Array, "B M"]
    size: Int[Array, "B"]
    total: Float[Array, "B D"]
    counted: Int[Array, "B"]
    steps: Int[Array, "B"]


@dataclass(frozen=True)
class ToucanPredictor:
    """Predictions of characters and ends of groups; one pass of the backbone a group.

    Groups are as the ends say, those of the prompt too (see `expanded_rows`). The first stack reads
    a group's characters when it ends, or `chunk` at a time.
    """

    model: Transformer
    objective: Toucan
    chunk: int = 8

    @property
    def vocab_size(self) -> int:
        """Number of symbols: characters and the end."""
        return self.model.config.vocabulary + 1

    @property
    def max_positions(self) -> int:
        """Longest sequence of symbols."""
        return self.model.config.max_positions

    @property
    def parts(self) -> Parts:
        """The stacks around the backbone."""
        return self.objective.parts(self.model)

    def prepare(self, params: ToucanParams) -> dict[str, Any]:
        """Returns per-layer parameters."""
        return {
            "model": parameters.unstack(params.model),
            "toucan": self.parts.ready(params.heads["toucan"]),
        }

    def init(
        self, prepared: Any, prompts: Prompts, capacity: int
    ) -> tuple[ToucanState, StepOutput]:
        """Returns the state behind the prompts, and what is said of the first new symbol."""
        B, model, parts = prompts.tokens.shape[0], self.model, self.parts
        width, dtype = model.config.d_model, jnp.dtype(model.config.dtype)
        nobody = jnp.zeros(B, jnp.int32)
        state = ToucanState(
            read=parts.before.init_cache(B, max(capacity, self.chunk), chunk=self.chunk),
            groups=model.init_cache(B, capacity + 1),
            spelled=parts.behind.init_cache(B, capacity),
            vector=jnp.zeros((B, width), dtype),
            buffer=jnp.zeros((B, self.chunk), jnp.int32),
            size=nobody,
            total=jnp.zeros((B, width), jnp.float32),
            counted=nobody,
            steps=nobody,
        )
        null = prepared["toucan"]["null"].astype(dtype)
        state = self._say(prepared, state, jnp.broadcast_to(null, (B, width)))
        return read_prompts(partial(self.step, prepared), state, prompts)

    def step(
        self, prepared: Any, state: ToucanState, tokens: Int[Array, "B"]
    ) -> tuple[ToucanState, StepOutput]:
        """Returns the state behind one more symbol a row, and what is said of the next one."""
        parts, w, rows = self.parts, prepared["toucan"], jnp.arange(tokens.shape[0])
        ends = tokens == parts.end
        own = self.model.embed(prepared["model"], jnp.where(ends, 0, tokens))
        own = jnp.where(ends[:, None], parts.end_vector(w), own)
        # The end still stands beside what was said to the group that it ends.
        x = (state.vector + own)[:, None]
        out = parts.behind.backbone(w["behind"], x, cache=state.spelled)
        z = logits(parts.head(prepared["model"], w), out.x[:, 0])
        place = jnp.where(ends, self.chunk, state.size)
        state = state.replace(  # type: ignore[attr-defined]
            spelled=out.cache,
            buffer=state.buffer.at[rows, place].set(tokens, mode="drop"),
            size=state.size + ~ends,
        )
        due = (state.size > 0) & (ends | (state.size >= self.chunk))

        def read(state: ToucanState) -> ToucanState:
            return chosen(due, self._read(prepared, state), state)

        state = jax.lax.cond(due.any(), read, lambda state: state, state)
        # An end right behind an end, or before everything, ends nothing.
        ended = ends & (state.counted > 0)

        def say(state: ToucanState) -> ToucanState:
            mean = state.total / jnp.maximum(state.counted, 1)[:, None]
            return chosen(ended, self._say(prepared, state, mean), state)

        state = jax.lax.cond(ended.any(), say, lambda state: state, state)
        return state, StepOutput(z, {BACKBONE_STEPS: state.steps})

    def _read(self, prepared: Any, state: ToucanState) -> ToucanState:
        """Returns the state behind the first stack's pass over the characters that wait."""
        parts, before = self.parts, state.read.lengths
        x = self.model.embed(prepared["model"], state.buffer)
        out = parts.before.backbone(prepared["toucan"]["before"], x, cache=state.read)
        assert out.cache is not None
        there = jnp.arange(self.chunk) < state.size[:, None]
        read = jnp.where(there[..., None], out.x.astype(jnp.float32), 0.0).sum(1)
        return state.replace(  # type: ignore[attr-defined]
            read=out.cache.rewind(before + state.size),
            total=state.total + read,
            counted=state.counted + state.size,
            size=jnp.zeros_like(state.size),
        )

    def _say(self, prepared: Any, state: ToucanState, pooled: Float[Array, "B D"]) -> ToucanState:
        """Returns the state behind the backbone's pass over a group, with no characters yet."""
        dtype = state.vector.dtype
        x = self.parts.entering(prepared["toucan"], pooled.astype(dtype)[:, None])
        out = self.model.backbone(prepared["model"], x, cache=state.groups)
        vector = out.x[:, 0]
        return state.replace(  # type: ignore[attr-defined]
            groups=out.cache,
            vector=jnp.zeros_like(vector) if self.objective.control == "zero" else vector,
            total=jnp.zeros_like(state.total),
            counted=jnp.zeros_like(state.counted),
            steps=state.steps + 1,
        )


def toucan(
    model: Transformer,
    params: Any,
    heads: Any,
    objective: Toucan | None = None,
    *,
    chunk: int = 8,
) -> tuple[ToucanPredictor, ToucanParams]:
    """Returns predictor and parameters of Toucan, as `decode` takes them.

    `decode(*toucan(model, params, heads), prompts, max_new_tokens=64)`; prompts hold the ends of
    their groups (`expanded_rows`), and so do the answers (`without_ends`).

    Args:
        model: the backbone.
        params: its parameters.
        heads: the objective's own, as a run leaves them (`load_trained(...).heads`).
        objective: of the training; default the defaults.
        chunk: characters that the first stack reads at most at a time.

    Raises:
        ConfigError: the heads are of another objective; one that has no ends, or leaks, cannot
            decode group by group; `chunk` is below 1.
    """
    objective = objective or Toucan()
    if "toucan" not in heads:
        raise ConfigError(
            f"these heads ({', '.join(heads) or 'none'}) are not those of objective 'toucan'"
        )
    if not objective.ends or objective.control == "leak":
        raise ConfigError(
            f"a model trained with ends={objective.ends}, control={objective.control!r} does not "
            f"decode group by group: train it with ends=True and without leak"
        )
    if chunk < 1:
        raise ConfigError(f"chunk={chunk} characters must be at least 1")
    return ToucanPredictor(model, objective, chunk), ToucanParams(params, heads)


def expanded_rows(
    predictor: ToucanPredictor, params: ToucanParams, rows: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Returns rows of characters with the ends of their groups, as the objective decides them.

    Args:
        predictor: from `toucan`.
        params: from `toucan`.
        rows: ids of the characters.
    """
    longest = max(map(len, rows))
    tokens = np.zeros((len(rows), longest), np.int32)
    there = np.zeros(tokens.shape, bool)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
        there[b, : len(row)] = True
    begins = np.asarray(_begins(predictor.model, predictor.objective, params, tokens, there))
    end = predictor.parts.end
    return [
        [i for at, symbol in enumerate(row) for i in ([end] * int(begins[b, at]) + [int(symbol)])]
        for b, row in enumerate(rows)
    ]


def without_ends(predictor: ToucanPredictor, row: Sequence[int]) -> list[int]:
    """Returns a row's characters alone."""
    return [int(i) for i in row if i != predictor.parts.end]


@partial(jax.jit, static_argnums=(0, 1))
def _begins(model: Transformer, objective: Toucan, params: ToucanParams, tokens, there):
    positions, documents = padding(there)
    whole: Params = {**params.model, HEADS: params.heads}
    found = objective.grouped(model, whole, tokens, documents, positions, None)
    return found.boundaries
