"""How the next token's logits come to be: one pass over the prompts, then one pass a token.

A predictor is a hashable value without arrays (it is part of the compiled program's identity);
its parameters and state are arguments. Contrast, guidance and damaged passes are other predictors.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from tokjax.decoding.prompts import Prompts
from tokjax.models import cache as kv
from tokjax.models import parameters
from tokjax.models.cache import Cache
from tokjax.models.encdec import EncoderDecoder
from tokjax.models.head import from_products
from tokjax.models.layers import Memory
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer


@struct.dataclass
class StepOutput:
    """What a predictor says of the next token.

    Attributes:
        logits: unnormalised log-probabilities at temperature 1.
    """

    logits: Float[Array, "B V"]


class Predictor(Protocol):
    """Where logits come from. Rows must not depend on one another."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def max_positions(self) -> int:
        """Longest sequence, prompt and new tokens together."""
        ...

    def prepare(self, params: Any) -> Any:
        """Returns the parameters in the form `init` and `step` read fastest."""
        ...

    def init(self, prepared: Any, prompts: Prompts, capacity: int) -> tuple[Any, StepOutput]:
        """Returns the state behind the prompts, with room for `capacity` tokens a row, and what
        is said of the first new token.
        """
        ...

    def step(self, prepared: Any, state: Any, tokens: Int[Array, "B"]) -> tuple[Any, StepOutput]:
        """Returns the state behind one more token a row, and what is said of the next one."""
        ...


@dataclass(frozen=True)
class ModelPredictor:
    """One model's own predictions; costs one forward pass a token."""

    model: Transformer

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.model.config.vocabulary

    @property
    def max_positions(self) -> int:
        """Longest sequence, prompt and new tokens together."""
        return self.model.config.max_positions

    def prepare(self, params: Params) -> dict[str, Any]:
        """Returns per-layer parameters (slicing a stack inside the loop is over twice as slow)."""
        prepared = parameters.unstack(params)
        if jax.default_backend() == "cpu":
            # One row times a table of [V, D] runs a tenth of a step slower than times [D, V]; the
            # barrier keeps the compiler from moving the transposition into the loop.
            head = self.model.head(params).table.T
            prepared["transposed_head"] = jax.lax.optimization_barrier(head)
        return prepared

    def init(self, prepared: Params, prompts: Prompts, capacity: int) -> tuple[Cache, StepOutput]:
        """Returns the filled cache and the logits behind each prompt's last token.

        The pass runs without a cache and captures its keys and values: it may so use a fused
        attention kernel, and never holds probabilities over the whole capacity.
        """
        embedded = self.model.embed(prepared, prompts.tokens)
        mixed = {"resid_post"} if self.model.config.mixer is not None else set()
        out = self.model.backbone(
            prepared, embedded, memory=prepared.get("memory"), capture={"k", "v"} | mixed
        )
        layers = range(self.model.config.n_layers)
        cache = kv.fill(
            self.model.init_cache(prompts.tokens.shape[0], capacity),
            keys=[out.captured["k"][i] for i in layers],
            values=[out.captured["v"][i] for i in layers],
            lengths=prompts.lengths,
            mixed=[out.captured["resid_post"][i] for i in layers] if mixed else (),
        )
        last = jnp.take_along_axis(out.x, (prompts.lengths - 1)[:, None, None], axis=1)
        return cache, self._say(prepared, last)

    def step(
        self, prepared: Params, state: Cache, tokens: Int[Array, "B"]
    ) -> tuple[Cache, StepOutput]:
        """Returns the cache with one more token a row, and the logits behind it."""
        embedded = self.model.embed(prepared, tokens[:, None])
        out = self.model.backbone(prepared, embedded, memory=prepared.get("memory"), cache=state)
        assert out.cache is not None
        return out.cache, self._say(prepared, out.x)

    def _say(self, prepared: Params, x: Float[Array, "B 1 D"]) -> StepOutput:
        transposed = prepared.get("transposed_head")
        if transposed is None:
            return StepOutput(self.model.unembed(prepared, x)[:, 0])
        products = jnp.dot(x[:, 0], transposed, preferred_element_type=jnp.float32)
        return StepOutput(from_products(self.model.head(prepared), products))


@struct.dataclass
class Conditioned:
    """What an encoder-decoder decodes from, in the place of its parameters.

    Attributes:
        params: of the model.
        memory: from `EncoderDecoder.encode`, a row for each prompt.
    """

    params: Params
    memory: Memory


@dataclass(frozen=True)
class EncoderDecoderPredictor:
    """Predictions of an encoder-decoder's decoder beside a memory; one of its passes a token.

    Its parameters are `Conditioned`; prompts are the decoder's, usually a start token each.
    """

    model: EncoderDecoder

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._decoder.vocab_size

    @property
    def max_positions(self) -> int:
        """Longest sequence, prompt and new tokens together."""
        return self._decoder.max_positions

    @property
    def _decoder(self) -> ModelPredictor:
        return ModelPredictor(self.model.decoder)

    def prepare(self, params: Conditioned) -> dict[str, Any]:
        """Returns the decoder's per-layer parameters, and the memory's keys and values."""
        memory = self.model.remember(params.params, params.memory)
        return {**self._decoder.prepare(params.params["decoder"]), "memory": memory}

    def init(self, prepared: Params, prompts: Prompts, capacity: int) -> tuple[Cache, StepOutput]:
        """Returns the filled cache and the logits behind each prompt's last token."""
        return self._decoder.init(prepared, prompts, capacity)

    def step(
        self, prepared: Params, state: Cache, tokens: Int[Array, "B"]
    ) -> tuple[Cache, StepOutput]:
        """Returns the cache with one more token a row, and the logits behind it."""
        return self._decoder.step(prepared, state, tokens)


def as_predictor(model: Any) -> Predictor:
    """Returns a model's own predictor; a predictor is returned as it is."""
    if isinstance(model, EncoderDecoder):
        return EncoderDecoderPredictor(model)
    return ModelPredictor(model) if isinstance(model, Transformer) else model
