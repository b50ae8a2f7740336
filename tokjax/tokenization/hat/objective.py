"""Hierarchical autoregressive transformer: a backbone over words, bytes within them.

Reference: Neitemeier et al., "Hierarchical Autoregressive Transformers: Combining Byte- and
Word-Level Processing for Robust, Adaptable Language Models" (arXiv 2501.10322).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.data.word_tokenizer import WORD_END, WordTokenizer
from tokjax.errors import ConfigError, nearest
from tokjax.models.parameters import Params
from tokjax.models.segments import Segments, room_for
from tokjax.models.stack import StackConfig
from tokjax.models.transformer import Transformer
from tokjax.tokenization.hat.parts import Parts
from tokjax.tokenization.scoring import Slots, scored
from tokjax.training.objective import HEADS, Aux, Loss, Materials, PerToken, WithoutState

_CONTEXT = ("words", "none")


@register("objective", "hat")
@dataclass(frozen=True)
class Hat(PerToken, WithoutState):
    """Negative log-likelihood of bytes and ends of words, spelled from a backbone over words.

    The run's model is the backbone; encoder and decoder belong to the objective. Needs the
    tokenizer "words". Each byte is predicted from the words before its own and from the bytes
    before it in its word. Held-out data are evaluated by the same loss.
    """

    encoder: StackConfig = StackConfig(n_layers=2, d_model=64)  # of a word's bytes
    decoder: StackConfig = StackConfig(n_layers=2, d_model=64)  # that spells words
    shared_bytes: bool = False  # encoder and decoder read one table of bytes
    # words of a row over its symbols, at most: the backbone runs over so many. Symbols of words
    # beyond are left out (metric `left_out`); half is the most where words have a byte and an end
    room: float = 0.5
    # what the decoder knows of the text before a word: what the backbone says; or as a control
    # nothing
    context: Literal["words", "none"] = "words"
    z_loss: float = 0.0  # coefficient of the squared log-sum-exp of the logits

    evaluates: ClassVar[bool] = True
    heads_write: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("encoder", "decoder"):
            if getattr(self, name).n_layers < 1:
                raise ConfigError(f"objective 'hat': {name}.n_layers must be at least 1")
        if not 0 < self.room <= 1:
            raise ConfigError(f"room={self.room} must be above 0 and at most 1")
        if self.context not in _CONTEXT:
            raise ConfigError(
                f"unknown context={self.context!r}.{nearest(str(self.context), _CONTEXT)}"
            )
        if self.z_loss < 0:
            raise ConfigError(f"z_loss={self.z_loss} must not be negative")

    def parts(self, model: Transformer) -> Parts:
        """Returns encoder, decoder and the maps between them and a backbone.

        Raises:
            ConfigError: a shape is impossible, or the model cannot be used.
        """
        if model.config.vocabulary <= WORD_END:
            raise ConfigError(
                f"objective 'hat' needs {WORD_END + 1} symbols, 256 bytes and the end of a word, "
                f"but model.vocab_size={model.config.vocabulary}"
            )
        if model.config.embedding_rows is not None or not model.config.causal:
            raise ConfigError(
                "objective 'hat' needs model.embedding_rows=None and model.causal=True"
            )
        return Parts.of(model, self.encoder, self.decoder, self.shared_bytes)

    def prepared(self, materials: Materials) -> "Hat":
        """Returns the objective itself.

        Raises:
            ConfigError: the tokenizer has no words, or the model cannot be used.
        """
        if not isinstance(materials.tokenizer, WordTokenizer):
            raise ConfigError(
                f"objective 'hat' reads words of bytes, but the tokenizer is "
                f"{materials.tokenizer.title}: set data.tokenizer.name='words'"
            )
        self.parts(materials.model)
        return self

    def init_heads(self, key: jax.Array, model: Transformer) -> dict[str, Any]:
        """Returns the parameters of encoder and decoder.

        Raises:
            ConfigError: as `parts`.
        """
        return {"hat": self.parts(model).init(key)}

    def predictions(
        self, model: Transformer, params: Params, batch: Batch, key: jax.Array
    ) -> Slots:
        """Returns what each symbol predicts: the next byte of its word, or the word's end.

        Raises:
            ConfigError: as `parts`.
        """
        parts = self.parts(model)
        w = parts.ready(params[HEADS]["hat"])
        words, said = self.said(parts, params, w, batch)
        x = parts.spelling(w, batch.tokens, words.offset == 0, words.unpool(parts.told(w, said)))
        x = parts.decoder.backbone(
            w["decoder"],
            x,
            positions=words.offset,
            segments=jnp.where(words.fits, words.ids + 1, 0),
        ).x
        weights = jnp.where(words.fits, batch.weights, 0.0)
        ends = batch.targets == WORD_END
        of_bytes = jnp.where(batch.targets < WORD_END, weights, 0.0)
        return Slots(
            x=x,
            head=parts.head(w),
            targets=batch.targets[..., None],
            weights=weights[..., None],
            weight=weights.sum(),
            metrics={
                "left_out": ((batch.weights - weights).sum(), batch.weights.sum()),
                "bytes_per_word": (of_bytes.sum(), jnp.where(ends, weights, 0.0).sum()),
            },
        )

    def said(
        self, parts: Parts, params: Params, w: Params, batch: Batch
    ) -> tuple[Segments, Float[Array, "B S D"]]:
        """Returns the words as they are spelled, each begun by the symbol that ends the one before
        it, and what the backbone says where each begins.
        """
        symbols, documents = batch.tokens, batch.segment_ids
        T = symbols.shape[1]
        ended = symbols >= WORD_END
        words = Segments.of(ended, documents, room_for(self.room, T))
        begun = words.at_first(symbols, parts.start)
        if self.context == "none":
            # The vector that begins a text, for every word.
            return words, parts.model.embed(params, jnp.full_like(begun, parts.start))
        # As they are read: bytes first, then their end symbol.
        read = Segments.of(jnp.pad(ended, ((0, 0), (1, 0)))[:, :T], documents, T)
        places = jnp.where(ended, 0, read.offset + 1)
        vectors = parts.encoded(w, symbols, places, read.ids + 1)
        entering = parts.entering(params, begun, words.at_first(vectors))
        out = parts.model.backbone(params, entering, positions=words.index, segments=words.document)
        return words, out.x

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns the sum of w * nll and the sum of w over bytes and ends of words.

        Raises:
            ConfigError: as `parts`.
        """
        found = self.predictions(model, params, batch, key)
        return scored(found, batch.targets < WORD_END, self.z_loss)
