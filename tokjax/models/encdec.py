"""The encoder-decoder: two stacks of the same blocks, the second attending to the first."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.models import parameters
from tokjax.models.cache import Cache
from tokjax.models.config import EncDecConfig
from tokjax.models.encoder import Encoder
from tokjax.models.head import Head
from tokjax.models.layers import ACTIVATIONS, Memory, heads, ready
from tokjax.models.parameters import Params
from tokjax.models.transformer import Output, Transformer, padding

Inputs = Int[Array, "B S"] | Float[Array, "B S D"]


@dataclass(frozen=True)
class EncoderDecoder:
    """An encoder of tokens, frames or any embeddings, and a decoder of tokens.

    The parameters are `{"encoder": ..., "decoder": ...}`: those of two stacks, of which the decoder
    is a whole `Transformer`, and the encoder reads tokens through the decoder's table.
    """

    config: EncDecConfig

    @property
    def encoder(self) -> Encoder:
        """The encoder's stack."""
        return Encoder(self.config.encoder)

    @property
    def decoder(self) -> Transformer:
        """The decoder, a model of its own whose `backbone` needs a memory."""
        return Transformer(self.config.decoder)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Returns initial parameters."""
        return parameters.init_parameters(self.config, key)

    def abstract_params(self) -> dict[str, Any]:
        """Returns the shapes and dtypes of the parameters."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def encode(
        self,
        params: Params,
        inputs: Inputs,
        mask: Bool[Array, "B S"] | None = None,
        **backbone: Any,
    ) -> Memory:
        """Returns what the encoder found, for `decode`; for the arguments see `run_encoder`."""
        out = self.run_encoder(params, inputs, mask, **backbone)
        return Memory(out.x, jnp.ones(out.x.shape[:2], bool) if mask is None else mask)

    def run_encoder(
        self,
        params: Params,
        inputs: Inputs,
        mask: Bool[Array, "B S"] | None = None,
        **backbone: Any,
    ) -> Output:
        """Returns the encoder's hidden states, with what was captured.

        Args:
            params: the model's.
            inputs: tokens, or embeddings in the compute dtype (of frames: `embed_frames`).
            mask: true where there is an input; default everywhere. Positions count inputs; some
                models were trained with those of padded rows counted otherwise: give `positions`.
            backbone: see `Transformer.backbone`.
        """
        x = inputs
        if jnp.issubdtype(inputs.dtype, jnp.integer):
            if self.config.inputs != "tokens":
                raise ValueError(f"this encoder reads {self.config.inputs}, not tokens")
            table = {"embedding": params["decoder"]["embedding"]}
            x = self.encoder.embed({**params["encoder"], **table}, inputs)
        if mask is not None:
            positions, segments = padding(mask)
            backbone = {"positions": positions, "segments": segments} | backbone
        return self.encoder.backbone(params["encoder"], x, **backbone)

    def embed_frames(
        self, params: Params, frames: Float[Array, "B F M"]
    ) -> Float[Array, "B F/2 D"]:
        """Returns the embeddings of frames: two convolutions over three of them, GELU behind each,
        of which the second takes every other one.

        Reference: Radford et al. 2022, arXiv 2212.04356, section 2.2 (Whisper).
        """
        if self.config.inputs != "frames":
            raise ValueError(f"this encoder reads {self.config.inputs}, not frames")
        w = params["encoder"]["frames"]
        x = frames.astype(jnp.dtype(self.config.encoder.dtype))
        for name, stride in (("first", 1), ("second", 2)):
            x = jax.lax.conv_general_dilated(
                x,
                w[name].astype(x.dtype),
                (stride,),
                ((1, 1),),
                dimension_numbers=("NWC", "WIO", "NWC"),
            )
            x = ACTIVATIONS["gelu"](x + w[f"{name}_bias"].astype(x.dtype))
        return x

    def remember(self, params: Params, memory: Memory) -> Memory:
        """Returns the memory with every layer's keys and values, computed once for many steps."""
        config = self.config.decoder
        layers = parameters.unstack(params["decoder"])["layers"]
        weights = [ready(config, layer["cross"]) for layer in layers]

        def of_all_layers(name: str) -> tuple[jax.Array, ...]:
            return tuple(heads(config, w, name, memory.x) for w in weights)

        return replace(memory, keys=of_all_layers("key"), values=of_all_layers("value"))

    def decode(
        self, params: Params, tokens: Int[Array, "B T"], memory: Memory, **backbone: Any
    ) -> tuple[Float[Array, "B T V"], Output]:
        """Returns (logits, output) of the decoder's tokens.

        Args:
            params: the model's.
            tokens: ids; the first is usually the model's start token.
            memory: from `encode`; beside a cache better from `remember`.
            backbone: see `Transformer.backbone`; a cache continues each row.
        """
        return self.decoder(params["decoder"], tokens, memory=memory, **backbone)

    def __call__(
        self,
        params: Params,
        inputs: Inputs,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B S"] | None = None,
        **decoder: Any,
    ) -> tuple[Float[Array, "B T V"], Output]:
        """Returns (logits, output) of the decoder's tokens beside the encoder's inputs."""
        return self.decode(params, tokens, self.encode(params, inputs, mask), **decoder)

    def head(self, params: Params) -> Head:
        """Returns the output head: what `tokjax.signals` score tokens by."""
        return self.decoder.head(params["decoder"])

    def init_cache(self, batch: int, capacity: int, dtype: Any = None, *, chunk: int = 1) -> Cache:
        """Returns an empty cache of the decoder's own keys and values; see `cache.init_cache`."""
        return self.decoder.init_cache(batch, capacity, dtype, chunk=chunk)
