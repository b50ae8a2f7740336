"""What stands around the backbone of a hierarchical model: an encoder and a speller of words."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.data.word_tokenizer import TEXT_END, WORD_END
from tokjax.models.head import Head
from tokjax.models.own_stack import in_layers, init_own_stack, own_stack
from tokjax.models.parameters import Params
from tokjax.models.stack import StackConfig
from tokjax.models.transformer import Transformer


@dataclass(frozen=True)
class Parts:
    """The two small stacks and the two maps between them and the backbone.

    Attributes:
        model: the backbone; of its embedding table only the rows of special symbols are read, and
            the row of `<|endoftext|>` begins every sequence of words.
        encoder: reads the bytes of a word; they all see each other.
        decoder: spells a word, causally.
        shared: whether both read one table of bytes.
    """

    model: Transformer
    encoder: Transformer
    decoder: Transformer
    shared: bool

    @classmethod
    def of(
        cls, model: Transformer, encoder: StackConfig, decoder: StackConfig, shared: bool
    ) -> "Parts":
        """Returns the parts of given shapes.

        Raises:
            ConfigError: a shape is impossible.
        """
        config, symbols = model.config, model.config.vocabulary
        return cls(
            model,
            own_stack(encoder, config, causal=False, symbols=symbols),
            own_stack(decoder, config, causal=True, symbols=symbols),
            shared,
        )

    @property
    def start(self) -> int:
        """The symbol that begins a text: `<|endoftext|>`, or the end of a word without it."""
        return min(TEXT_END, self.model.config.vocabulary - 1)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Returns initial parameters."""
        keys = jax.random.split(key, 4)
        outer, dtype = self.model.config.d_model, jnp.dtype(self.model.config.param_dtype)
        reads, spells = self.encoder.config.d_model, self.decoder.config.d_model

        def matrix(key: jax.Array, rows: int, columns: int) -> jax.Array:
            return (rows**-0.5 * jax.random.normal(key, (rows, columns))).astype(dtype)

        found = {
            "encoder": init_own_stack(self.encoder, keys[0]),
            "decoder": init_own_stack(self.decoder, keys[1]),
            "up": matrix(keys[2], reads, outer),
            "down": matrix(keys[3], outer, spells),
        }
        if self.shared:
            del found["encoder"]["embedding"]
        return found

    def ready(self, w: Params) -> dict[str, Any]:
        """Returns parameters of `init` in the form that the other methods take."""
        encoder, decoder = in_layers(w["encoder"]), in_layers(w["decoder"])
        if self.shared:
            encoder["embedding"] = decoder["embedding"]
        return {**w, "encoder": encoder, "decoder": decoder}

    def encoded(
        self,
        w: Params,
        symbols: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        words: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """Returns what the encoder says at every symbol, as wide as the backbone.

        A word's vector is what stands at its end symbol, which sees all its bytes.

        Args:
            w: from `ready`.
            symbols: bytes and end symbols.
            positions: in the word: 0 of the end symbol, 1, 2, ... of the bytes.
            words: numbers of words; symbols see those of their own word alone.
        """
        x = self.encoder.embed(w["encoder"], symbols)
        x = self.encoder.backbone(w["encoder"], x, positions=positions, segments=words).x
        return x @ w["up"].astype(x.dtype)

    def entering(
        self,
        params: Params,
        symbols: Int[Array, "B S"],
        vectors: Float[Array, "B S D"],
    ) -> Float[Array, "B S D"]:
        """Returns what the backbone reads where a word begins.

        Args:
            params: the backbone's.
            symbols: that the word is begun behind; a byte where the beginning was cut off.
            vectors: of the words that end symbols end.
        """
        special = self.model.embed(params, jnp.where(symbols < WORD_END, self.start, symbols))
        return jnp.where((symbols == WORD_END)[..., None], vectors.astype(special.dtype), special)

    def told(self, w: Params, said: Float[Array, "B S D"]) -> Float[Array, "B S _"]:
        """Returns what the backbone says, as wide as the decoder."""
        dtype = jnp.dtype(self.decoder.config.dtype)
        return said.astype(dtype) @ w["down"].astype(dtype)

    def spelling(
        self,
        w: Params,
        symbols: Int[Array, "B T"],
        begins: Bool[Array, "B T"],
        told: Float[Array, "B T D"],
    ) -> Float[Array, "B T D"]:
        """Returns what the decoder reads: what it is told where a word begins, then bytes.

        Args:
            w: from `ready`.
            symbols: bytes and special symbols.
            begins: where a word begins.
            told: of the word that begins.
        """
        x = self.decoder.embed(w["decoder"], jnp.minimum(symbols, WORD_END))
        x = jnp.where((symbols < WORD_END)[..., None], x, 0)
        return x + jnp.where(begins[..., None], told, 0)

    def head(self, w: Params) -> Head:
        """Returns the decoder's output head."""
        return self.decoder.head(w["decoder"])
