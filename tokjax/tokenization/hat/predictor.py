"""Decoding of a hierarchical model: the decoder runs a byte, the backbone once a word."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax import struct
from tokjax.data.word_tokenizer import WORD_END
from tokjax.decoding.predictors import StepOutput
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError
from tokjax.models import parameters
from tokjax.models.cache import Cache
from tokjax.models.transformer import Transformer
from tokjax.tokenization.hat.objective import Hat
from tokjax.tokenization.hat.parts import Parts
from tokjax.tokenization.rows import chosen, read_prompts

BACKBONE_STEPS = "backbone_steps"  # signal: words that the backbone has read in a row
_IMPOSSIBLE = -1e9


@struct.dataclass
class HatParams:
    """Parameters of a hierarchical model.

    Attributes:
        model: of the backbone.
        heads: of the objective, as a run leaves them.
    """

    model: Any
    heads: Any


@struct.dataclass
class HatState:
    """What decoding remembers of each row.

    Attributes:
        words: the backbone's cache.
        spelled: the decoder's cache, of the present word.
        said: the backbone's last output.
        buffer: bytes of the present word.
        size: how many there are.
        steps: words the backbone has read.
    """

    words: Cache
    spelled: Cache
    said: Float[Array, "B D"]
    buffer: Int[Array, "B M"]
    size: Int[Array, "B"]
    steps: Int[Array, "B"]


@dataclass(frozen=True)
class HatPredictor:
    """Predictions of bytes and ends of words; one pass of the backbone a word.

    The backbone waits while no row's word ends, and rows whose word goes on stay as they are.
    Where a word has `longest` bytes its end or the text's is all that is possible: the splitter
    makes none that is longer.
    """

    model: Transformer
    objective: Hat
    longest: int = 16

    @property
    def vocab_size(self) -> int:
        """Number of symbols."""
        return self.model.config.vocabulary

    @property
    def max_positions(self) -> int:
        """Longest sequence of symbols; there are fewer words."""
        return self.model.config.max_positions

    @property
    def parts(self) -> Parts:
        """Encoder, decoder and what lies between them and the backbone."""
        return self.objective.parts(self.model)

    def check(self, params: HatParams, prompts: Prompts, limits: Any) -> None:
        """Refuses prompts with words that have no room.

        Raises:
            ConfigError: says where.
        """
        del params, limits
        tokens, lengths = np.asarray(prompts.tokens), np.asarray(prompts.lengths)
        for b, (row, length) in enumerate(zip(tokens, lengths, strict=True)):
            size = 0
            for at, symbol in enumerate(row[:length]):
                size = size + 1 if symbol < WORD_END else 0
                if size > self.longest:
                    raise ConfigError(
                        f"prompt {b} has a word of more than longest={self.longest} bytes at "
                        f"position {at}: encode it with a tokenizer of words of that length"
                    )

    def prepare(self, params: HatParams) -> dict[str, Any]:
        """Returns per-layer parameters."""
        return {
            "model": parameters.unstack(params.model),
            "hat": self.parts.ready(params.heads["hat"]),
        }

    def init(self, prepared: Any, prompts: Prompts, capacity: int) -> tuple[HatState, StepOutput]:
        """Returns the state behind the prompts, and what is said of the first new symbol."""
        B, model, parts = prompts.tokens.shape[0], self.model, self.parts
        nobody = jnp.zeros(B, jnp.int32)
        state = HatState(
            words=model.init_cache(B, capacity),
            # A word that begins in the middle has no symbol before its first byte.
            spelled=parts.decoder.init_cache(B, self.longest + 1),
            said=jnp.zeros((B, model.config.d_model), jnp.dtype(model.config.dtype)),
            buffer=jnp.zeros((B, self.longest), jnp.int32),
            size=nobody,
            steps=nobody,
        )
        return read_prompts(lambda *given: self.step(prepared, *given), state, prompts)

    def step(
        self, prepared: Any, state: HatState, tokens: Int[Array, "B"]
    ) -> tuple[HatState, StepOutput]:
        """Returns the state behind one more symbol a row, and what is said of the next one."""
        parts, w = self.parts, prepared["hat"]
        begins = (tokens >= WORD_END) | (state.steps == 0)

        def read(state: HatState) -> HatState:
            return chosen(begins, self._read(prepared, state, tokens), state)

        state = jax.lax.cond(begins.any(), read, lambda state: state, state)
        told = parts.told(w, state.said[:, None])
        x = parts.spelling(w, tokens[:, None], begins[:, None], told)
        spelled = state.spelled.rewind(jnp.where(begins, 0, state.spelled.lengths))
        out = parts.decoder.backbone(w["decoder"], x, cache=spelled)
        of_byte = tokens < WORD_END
        size = jnp.where(tokens >= WORD_END, 0, state.size)
        rows = jnp.arange(tokens.shape[0])
        place = jnp.where(of_byte, size, self.longest)
        state = state.replace(  # type: ignore[attr-defined]
            spelled=out.cache,
            buffer=state.buffer.at[rows, place].set(tokens, mode="drop"),
            size=jnp.minimum(size + of_byte, self.longest),
        )
        logits = parts.decoder.unembed(w["decoder"], out.x)[:, 0]
        full = (state.size >= self.longest)[:, None] & (jnp.arange(logits.shape[1]) < WORD_END)
        logits = jnp.where(full, _IMPOSSIBLE, logits)
        return state, StepOutput(logits, {BACKBONE_STEPS: state.steps})

    def _read(self, prepared: Any, state: HatState, tokens: Int[Array, "B"]) -> HatState:
        """Returns the state behind a pass of the backbone over the word that has ended."""
        parts, M = self.parts, self.longest
        places = jnp.arange(M + 1)
        ends = jnp.full_like(state.buffer[:, :1], WORD_END)
        symbols = jnp.concatenate([ends, state.buffer], axis=1)
        present = (places <= state.size[:, None]).astype(jnp.int32)
        where = jnp.broadcast_to(places, symbols.shape)
        vectors = parts.encoded(prepared["hat"], symbols, where, present)[:, :1]
        if self.objective.context == "none":
            begun = jnp.full_like(tokens, parts.start)[:, None]
            said = self.model.embed(prepared["model"], begun)[:, 0]
            return state.replace(said=said, steps=state.steps + 1)  # type: ignore[attr-defined]
        entering = parts.entering(prepared["model"], tokens[:, None], vectors)
        out = self.model.backbone(prepared["model"], entering, cache=state.words)
        return state.replace(  # type: ignore[attr-defined]
            words=out.cache, said=out.x[:, 0], steps=state.steps + 1
        )


def hat(
    model: Transformer, params: Any, heads: Any, objective: Hat | None = None, *, longest: int = 16
) -> tuple[HatPredictor, HatParams]:
    """Returns predictor and parameters of a hierarchical model, as `decode` takes them.

    `decode(*hat(model, params, heads), prompts, max_new_tokens=64)`; prompts are ids of the
    tokenizer "words" (its `begin` leaves the last word open).

    Args:
        model: the backbone.
        params: its parameters.
        heads: the objective's own, as a run leaves them (`load_trained(...).heads`).
        objective: of the training; default the defaults.
        longest: most bytes of a word, as the tokenizer has it.

    Raises:
        ConfigError: the heads are of another objective.
    """
    if "hat" not in heads:
        raise ConfigError(
            f"these heads ({', '.join(heads) or 'none'}) are not those of objective 'hat'"
        )
    predictor = HatPredictor(model, objective or Hat(), longest)
    return predictor, HatParams(params, heads)
