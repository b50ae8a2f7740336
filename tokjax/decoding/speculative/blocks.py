"""Predictions at several tokens in one pass, which can be taken back."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax import struct
from tokjax.decoding.predictors import ModelPredictor
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError
from tokjax.models.cache import Cache
from tokjax.models.transformer import Transformer


class BlockPredictor(Protocol):
    """Where logits come from: like a `Predictor`, but several tokens at a time, and backwards.

    A hashable value without arrays; every leaf of its state leads with the axis of rows.
    """

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def max_positions(self) -> int:
        """Longest sequence, prompt and new tokens together."""
        ...

    def prepare(self, params: Any) -> Any:
        """Returns the parameters in the form that is read fastest."""
        ...

    def start(self, prepared: Any, prompts: Prompts, capacity: int, chunk: int) -> Any:
        """Returns the state behind the prompts.

        Args:
            prepared: parameters.
            prompts: what to read.
            capacity: most tokens of a row.
            chunk: most tokens of one `extend`, and most that a `rewind` takes back.
        """
        ...

    def extend(
        self,
        prepared: Any,
        state: Any,
        tokens: Int[Array, "B T"],
        first: Int[Array, "B"],
        count: int,
    ) -> tuple[Any, Float[Array, "B N V"]]:
        """Returns the state behind the tokens, and the logits behind `count` of them from `first`
        on.
        """
        ...

    def rewind(self, state: Any, lengths: Int[Array, "B"]) -> Any:
        """Returns the state with each row cut back to a length."""
        ...


@dataclass(frozen=True)
class ModelBlocks:
    """A model's own predictions beside a cache.

    Attributes:
        model: the model.
        cache_dtype: of keys and values; default the model's compute dtype, "int8" takes a quarter
            of the memory.
    """

    model: Transformer
    cache_dtype: str | None = None

    @property
    def _plain(self) -> ModelPredictor:
        return ModelPredictor(self.model)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._plain.vocab_size

    @property
    def max_positions(self) -> int:
        """Longest sequence, prompt and new tokens together."""
        return self._plain.max_positions

    def prepare(self, params: Any) -> dict[str, Any]:
        """Returns per-layer parameters."""
        return self._plain.prepare(params)

    def start(self, prepared: Any, prompts: Prompts, capacity: int, chunk: int) -> Cache:
        """Returns the filled cache."""
        cache, _ = self._plain.prefill(
            prepared, prompts, capacity, chunk=chunk, cache_dtype=self.cache_dtype
        )
        return cache

    def extend(
        self, prepared: Any, state: Cache, tokens: jax.Array, first: jax.Array, count: int
    ) -> tuple[Cache, Float[Array, "B N V"]]:
        """Returns the cache behind the tokens, and the logits behind `count` of them."""
        # Drafts may reach beyond the last position, where a learned table has none: such rows of
        # it would read as NaN, and stay in the cache.
        positions = state.lengths[:, None] + jnp.arange(tokens.shape[1])
        out = self.model.backbone(
            prepared,
            self.model.embed(prepared, tokens),
            positions=jnp.minimum(positions, self.max_positions - 1),
            memory=prepared.get("memory"),
            cache=state,
        )
        assert out.cache is not None
        at = first[:, None] + jnp.arange(count)
        x = jnp.take_along_axis(out.x, at[:, :, None], axis=1)
        return out.cache, self._plain.logits(prepared, x)

    def rewind(self, state: Cache, lengths: Int[Array, "B"]) -> Cache:
        """Returns the cache with each row cut back to a length."""
        return state.rewind(lengths)


@struct.dataclass
class Written:
    """What is there of each row: its prompt, and its new tokens so far.

    Attributes:
        prompts: what is continued.
        generated: the new tokens; what follows a row's `new` is filling.
        new: number of new tokens.
    """

    prompts: Prompts
    generated: Int[Array, "B N"]
    new: Int[Array, "B"]

    @property
    def lengths(self) -> Int[Array, "B"]:
        """Number of tokens of each row, prompt included."""
        return self.prompts.lengths + self.new

    def at(self, places: Int[Array, "B K"]) -> Int[Array, "B K"]:
        """Returns the tokens at places of each row; of no meaning outside of what is written."""
        tokens, lengths = self.prompts.tokens, self.prompts.lengths[:, None]
        within = jnp.clip(places, 0, tokens.shape[1] - 1)
        behind = jnp.clip(places - lengths, 0, self.generated.shape[1] - 1)
        return jnp.where(
            places < lengths,
            jnp.take_along_axis(tokens, within, axis=1),
            jnp.take_along_axis(self.generated, behind, axis=1),
        )


def read(
    model: BlockPredictor,
    prepared: Any,
    state: Any,
    written: Written,
    draft: Int[Array, "B G"],
    lag: int,
) -> tuple[Any, Float[Array, "B G+1 V"]]:
    """Returns the state behind what is written and the draft, and the logits from the last written
    token on.

    Args:
        model: which reads.
        prepared: its parameters.
        state: knows at least what is written but its last `lag` tokens; what it knows beyond that
            is read again.
        written: each row's text.
        draft: tokens behind it.
        lag: static, so that rows whose state knows more read tokens twice.
    """
    ends, G = written.lengths[:, None], draft.shape[1]
    start = jnp.maximum(ends - lag, 0)
    places = start + jnp.arange(lag + G)
    tokens = written.at(places)
    if G:
        drafted = jnp.take_along_axis(draft, jnp.clip(places - ends, 0, G - 1), axis=1)
        tokens = jnp.where(places < ends, tokens, drafted)
    state = model.rewind(state, start[:, 0])
    state, logits = model.extend(prepared, state, tokens, (ends - 1 - start)[:, 0], G + 1)
    return model.rewind(state, ends[:, 0] + G), logits


def as_blocks(model: Any) -> BlockPredictor:
    """Returns a model's own predictions; a `BlockPredictor` is returned as it is.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(model, Transformer):
        return ModelBlocks(model)
    if not hasattr(model, "extend"):
        raise ConfigError(
            f"{type(model).__name__} predicts one token at a time: speculative decoding needs a "
            f"Transformer or a BlockPredictor"
        )
    return model
