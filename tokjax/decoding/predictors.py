"""How the next token's logits come to be: one pass over the prompts, then one pass a token.

A predictor is a hashable value without arrays (it is part of the compiled program's identity);
its parameters and state are arguments. Contrast, guidance and damaged passes are other predictors:
see `tokjax.decoding.contrast`. What one sweeps there (weights, thresholds, temperatures, other
prompts) are array leaves of the predictor's parameters, a `struct.dataclass` that holds the
models' own parameters too, so that a new value compiles nothing; a function makes both, in the
order in which `decode` takes them: `decode(*contrastive(...), prompts, max_new_tokens=32)`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from tokjax import struct
from tokjax.decoding import fused
from tokjax.decoding.prompts import Prompts
from tokjax.models import cache as kv
from tokjax.models import parameters
from tokjax.models.cache import Cache
from tokjax.models.edits import Edits
from tokjax.models.encdec import EncoderDecoder
from tokjax.models.head import from_products
from tokjax.models.layers import Memory
from tokjax.models.parameters import Params
from tokjax.models.transformer import Output, Transformer
from tokjax.parallel.rules import current_mesh_shape

_TRANSPOSED = "transposed_head"


@struct.dataclass
class StepOutput:
    """What a predictor says of the next token.

    Attributes:
        logits: unnormalised log-probabilities at temperature 1.
        signals: what else it knows of this step, by name, a row each; transforms, stops and what
            `decode` records read them in `Context.signals`.
    """

    logits: Float[Array, "B V"]
    signals: Mapping[str, Shaped[Array, "B ..."]] = struct.field(default_factory=dict)


class Predictor(Protocol):
    """Where logits come from. Rows must not depend on one another.

    Each leaf of the state leads with an axis of rows (or several a row): `decode` repeats them for
    a prompt's samples. A setting with a value for each prompt is then repeated by the predictor.

    One whose parameters must fit the prompts may also have `check(params, prompts, limits)`:
    `decode` calls it on the host, with each row's largest number of new tokens, before anything is
    compiled.
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
    """One model's own predictions; costs one forward pass a token.

    Attributes:
        model: the model.
        kernels: whether a token's pass is made of the kernels of `tokjax.models.decode_kernels`,
            where the model is one that they know; None means on one NVIDIA GPU, in bfloat16.
            (True runs them on any machine, which without a GPU is slow.)
    """

    model: Transformer
    kernels: bool | None = None

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.model.config.vocabulary

    @property
    def max_positions(self) -> int:
        """Longest sequence, prompt and new tokens together."""
        return self.model.config.max_positions

    def prepare(self, params: Params) -> dict[str, Any]:
        """Returns per-layer parameters (slicing a stack inside the loop is over twice as slow),
        matrices that read the same joined to one; those that are in this form stay as they are.
        """
        prepared = parameters.unstack(params)
        if current_mesh_shape().get("tensor", 1) == 1:  # else their parts would lie anyhow
            prepared = parameters.fuse(prepared)
        if self._wants_kernels:
            return fused.prepare(self.model, prepared)
        if jax.default_backend() == "cpu" and _TRANSPOSED not in prepared:
            # One row times a table of [V, D] runs a tenth of a step slower than times [D, V]; the
            # barrier keeps the compiler from moving the transposition into the loop.
            head = self.model.head(params).table.T
            prepared[_TRANSPOSED] = jax.lax.optimization_barrier(head)
        return prepared

    @property
    def _wants_kernels(self) -> bool:
        config = self.model.config
        wanted = fused.pays(config) if self.kernels is None else self.kernels
        return wanted and fused.supported(config)

    def init(self, prepared: Params, prompts: Prompts, capacity: int) -> tuple[Cache, StepOutput]:
        """Returns the filled cache and the logits behind each prompt's last token."""
        cache, out = self.prefill(prepared, prompts, capacity)
        last = jnp.take_along_axis(out.x, (prompts.lengths - 1)[:, None, None], axis=1)
        return cache, StepOutput(self.logits(prepared, last)[:, 0])

    def prefill(
        self,
        prepared: Params,
        prompts: Prompts,
        capacity: int,
        *,
        chunk: int = 1,
        capture: Mapping[str, Callable | None] | None = None,
        edits: Edits | None = None,
        cache_dtype: Any = None,
        embedded: Float[Array, "B P D"] | None = None,
    ) -> tuple[Cache, Output]:
        """Returns the cache filled with the prompts (lengths may be 0), and the pass's output.

        The pass runs without a cache and captures its keys and values: it may so use a fused
        attention kernel, and never holds probabilities over the whole capacity.

        Args:
            prepared: parameters.
            prompts: what to read.
            capacity: of the cache.
            chunk: most tokens a later pass may add.
            capture: sites to return besides, each with a function applied in its layer or None.
            edits: interventions in this pass.
            cache_dtype: of the cache; default the model's compute dtype.
            embedded: what the blocks read in the place of the tokens' embeddings.
        """
        if embedded is None:
            embedded = self.model.embed(prepared, prompts.tokens)
        mixed = self.model.config.mixer is not None
        sites = dict.fromkeys(["k", "v", "resid_post"] if mixed else ["k", "v"])
        out = self.model.backbone(
            prepared,
            embedded,
            memory=prepared.get("memory"),
            edits=edits,
            capture={**(capture or {}), **sites},
        )
        layers = range(self.model.config.n_layers)
        cache = kv.fill(
            self.model.init_cache(prompts.tokens.shape[0], capacity, cache_dtype, chunk=chunk),
            keys=[out.captured["k"][i] for i in layers],
            values=[out.captured["v"][i] for i in layers],
            lengths=prompts.lengths,
            mixed=[out.captured["resid_post"][i] for i in layers] if mixed else (),
        )
        return cache, out

    def step(
        self, prepared: Params, state: Cache, tokens: Int[Array, "B"]
    ) -> tuple[Cache, StepOutput]:
        """Returns the cache with one more token a row, and the logits behind it."""
        if self._wants_kernels and fused.is_prepared(prepared) and fused.fits(state):
            interpret = jax.default_backend() != "gpu"
            state, x, products = fused.step(
                self.model, prepared, state, tokens, interpret=interpret
            )
            if products is None:
                return state, StepOutput(self.logits(prepared, x[:, None])[:, 0])
            return state, StepOutput(from_products(self.model.head(prepared), products))
        embedded = self.model.embed(prepared, tokens[:, None])
        out = self.model.backbone(prepared, embedded, memory=prepared.get("memory"), cache=state)
        assert out.cache is not None
        return out.cache, StepOutput(self.logits(prepared, out.x)[:, 0])

    def logits(self, prepared: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns the float32 logits of final hidden states."""
        transposed = prepared.get(_TRANSPOSED)
        if transposed is None:
            return self.model.unembed(prepared, x)
        B, T, D = x.shape
        products = jnp.dot(x.reshape(B * T, D), transposed, preferred_element_type=jnp.float32)
        return from_products(self.model.head(prepared), products).reshape(B, T, -1)


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
        copies = tokens.shape[0] // prepared["memory"].x.shape[0]
        if copies > 1:  # samples or beams of a prompt, which read its memory
            repeated = lambda a: jnp.repeat(a, copies, axis=0)  # noqa: E731
            prepared = {**prepared, "memory": jax.tree.map(repeated, prepared["memory"])}
        return self._decoder.step(prepared, state, tokens)


def as_predictor(model: Any) -> Predictor:
    """Returns a model's own predictor; a predictor is returned as it is."""
    if isinstance(model, EncoderDecoder):
        return EncoderDecoderPredictor(model)
    return ModelPredictor(model) if isinstance(model, Transformer) else model


def prepare(model: Any, params: Any) -> Any:
    """Returns parameters in the form that decoding reads fastest.

    `decode` does this in every call, which takes time and a second copy of the parameters while it
    lasts; what is given in this form already is taken as it is. They serve the model's other
    functions too, but training and checkpoints want the form they came in.

    Args:
        model: a `Transformer`, an `EncoderDecoder` or any `Predictor`.
        params: its parameters.
    """
    return jax.jit(as_predictor(model).prepare)(params)
