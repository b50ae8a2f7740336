"""A recommender that writes the codes of the next item: an encoder-decoder over codes of items.

Reference: TIGER, arXiv 2305.05065; with `tokjax.recsys.disentangled` DiscRec, arXiv 2506.15576.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax import struct
from tokjax.decoding.predictors import (
    Conditioned,
    EncoderDecoderPredictor,
    ModelPredictor,
    StepOutput,
)
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError
from tokjax.models.cache import Cache
from tokjax.models.config import EncDecConfig, ModelConfig
from tokjax.models.encdec import EncoderDecoder
from tokjax.models.layers import Memory
from tokjax.recsys.codes import PAD, ItemCodes, Padding
from tokjax.recsys.disentangled import Disentangled, dropped


@dataclass(frozen=True)
class RecommenderConfig:
    """A recommender; the defaults are DiscRec's."""

    d_model: int = 128  # width of the residual stream
    d_ff: int = 1024  # width of the blocks' feed-forward
    n_heads: int = 6  # of the blocks
    head_dim: int = 64  # width of a head
    n_layers: int = 4  # blocks of the encoder, and of the decoder
    positions: bool = True  # a vector for each place in an item
    # a second branch, whose attention stays within items or sees everything; or none
    branch: Literal["local", "full", "none"] = "local"
    gate: bool = True  # mixes the branch with the plain embeddings; False takes the mean
    branch_heads: int = 2  # of the branch
    branch_d_ff: int = 1024  # width of the branch's feed-forward
    shift: int = 0  # tokens by which borders of items are moved (a control)
    dropout: float = 0.1  # at the embeddings, behind both stacks and in the branch
    # where short histories are filled up: in front, so that the end token follows the last item,
    # or between items and end token, as in the authors' code
    padding: Padding = "front"

    def __post_init__(self):
        for name in ("d_model", "d_ff", "n_heads", "head_dim", "n_layers", "branch_d_ff"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.padding not in ("front", "behind"):
            raise ConfigError(f"padding={self.padding!r} must be 'front' or 'behind'")

    def model(self, codes: ItemCodes) -> "Recommender":
        """Returns the recommender over a catalogue's codes."""
        return self.of(codes.levels, codes.size)

    def of(self, levels: int, size: int) -> "Recommender":
        """Returns the recommender over codes of so many levels of so many entries."""
        stack: dict[str, Any] = {
            "d_model": self.d_model,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "head_dim": self.head_dim,
            "d_ff": self.d_ff,
            "norm_eps": 1e-6,
            "positions": "relative",
            "activation": "relu",
            "gated": False,
            "remat": "none",  # the models are small
        }
        decoder = ModelConfig(
            **stack,
            vocab_size=2 + levels * size,
            cross_attention=True,
            init_scale=1.0,
            logit_scale=self.d_model**-0.5,
        )
        block = Disentangled(
            self.d_model,
            levels,
            self.positions,
            self.branch,
            self.gate,
            self.branch_heads,
            self.branch_d_ff,
            self.dropout,
            self.shift,
        )
        encoder = ModelConfig(**stack, causal=False)
        return Recommender(EncDecConfig(encoder, decoder), block, self.padding)


@dataclass(frozen=True)
class Recommender:
    """An encoder-decoder of codes; its parameters are {"stacks", "block"}.

    Attributes:
        config: of the two stacks.
        block: at their embeddings.
        padding: where histories are filled up.
    """

    config: EncDecConfig
    block: Disentangled
    padding: Padding = "front"

    @property
    def stacks(self) -> EncoderDecoder:
        """The encoder-decoder behind the embeddings."""
        return EncoderDecoder(self.config)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Returns initial parameters."""
        of_stacks, of_block = jax.random.split(key)
        return {"stacks": self.stacks.init(of_stacks), "block": self.block.init(of_block)}

    def parameter_count(self) -> int:
        """Returns the number of parameters."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))

    def encode(
        self, params: Any, histories: Int[Array, "B S"], key: jax.Array | None = None
    ) -> Memory:
        """Returns what the encoder makes of histories (`ItemCodes.histories`).

        Args:
            params: the model's.
            histories: ids.
            key: of dropout; None has none.
        """
        kept = histories != PAD
        keys = _keys(key)
        e = self.stacks.decoder.embed(params["stacks"]["decoder"], histories)
        x = self.block.encoder(params["block"], e, kept, keys[0])
        memory = self.stacks.encode(params["stacks"], self._drop(keys[1], x), kept)
        return memory.replace(x=self._drop(keys[2], memory.x))  # type: ignore[attr-defined]

    def __call__(
        self,
        params: Any,
        histories: Int[Array, "B S"],
        tokens: Int[Array, "B T"],
        key: jax.Array | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns the logits of the token behind each of an item's tokens.

        Args:
            params: the model's.
            histories: ids of `ItemCodes.histories`.
            tokens: the begin token and codes, from `ItemCodes.answers`.
            key: of dropout; None has none.
        """
        keys = _keys(key)
        memory = self.encode(params, histories, keys[0])
        decoder, own = self.stacks.decoder, params["stacks"]["decoder"]
        x = self.block.decoder(params["block"], decoder.embed(own, tokens), keys[1])
        out = decoder.backbone(own, self._drop(keys[2], x), memory=memory)
        return decoder.unembed(own, self._drop(keys[3], out.x))

    def losses(
        self,
        params: Any,
        histories: Int[Array, "B S"],
        answers: Int[Array, "B T"],
        key: jax.Array | None = None,
    ) -> Float[Array, "B"]:
        """Returns each answer's mean cross-entropy over its codes and end token."""
        logits = self(params, histories, answers[:, :-1], key)
        logp = jax.nn.log_softmax(logits, axis=-1)
        return -jnp.take_along_axis(logp, answers[:, 1:, None], axis=-1)[..., 0].mean(-1)

    def _drop(self, key: jax.Array | None, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return dropped(key, x, self.block.dropout)

    @property
    def predictor(self) -> "RecommenderPredictor":
        """The model for `decode` and `beam_search`; its parameters are `Conditioned`."""
        return RecommenderPredictor(self)


@struct.dataclass
class _Item:
    """An item half written: the decoder's cache, and the tokens so far."""

    cache: Cache
    tokens: Int[Array, "R T"]


@dataclass(frozen=True)
class RecommenderPredictor:
    """Predictions of the next code of an item; every prompt is the begin token alone.

    Its parameters are `Conditioned(params, model.encode(params, histories))`. The block sees all
    tokens of an item, few as they are, anew at each step.
    """

    model: Recommender

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.model.config.decoder.vocabulary

    @property
    def max_positions(self) -> int:
        """An item's tokens with the begin and the end token."""
        return self.model.block.levels + 2

    def check(self, params: Conditioned, prompts: Prompts, limits: Any) -> None:
        """Refuses prompts other than the begin token, and other than one for each history."""
        if np.any(np.asarray(prompts.lengths) != 1):
            raise ConfigError("the prompts of a recommender are the begin token alone: `[0]` each")
        if len(params.memory.x) != len(prompts.lengths):
            raise ConfigError(
                f"there are {len(params.memory.x)} histories for {len(prompts.lengths)} prompts"
            )

    def prepare(self, params: Conditioned) -> dict[str, Any]:
        """Returns the stacks' per-layer parameters with the memory's keys and values."""
        inner = Conditioned(params.params["stacks"], params.memory)
        stacks = EncoderDecoderPredictor(self.model.stacks).prepare(inner)
        return {"stacks": stacks, "block": params.params["block"]}

    def init(self, prepared: Any, prompts: Prompts, capacity: int) -> tuple[_Item, StepOutput]:
        """Returns the state behind the begin tokens and the logits of the first codes."""
        B = prompts.tokens.shape[0]
        decoder = self.model.stacks.decoder
        tokens = jnp.zeros((B, self.model.block.levels + 2), jnp.int32)
        cache = decoder.init_cache(B, capacity)
        return self.step(prepared, _Item(cache, tokens), jnp.asarray(prompts.tokens)[:, 0])

    def step(
        self, prepared: Any, state: _Item, tokens: Int[Array, "B"]
    ) -> tuple[_Item, StepOutput]:
        """Returns the state behind one more token a row, and the logits of the next one."""
        stacks, decoder = prepared["stacks"], self.model.stacks.decoder
        memory, rows = stacks["memory"], jnp.arange(tokens.shape[0])
        copies = tokens.shape[0] // memory.x.shape[0]
        if copies > 1:  # samples or beams of a history
            memory = jax.tree.map(lambda a: jnp.repeat(a, copies, axis=0), memory)
        # Behind the longest item rows may be stepped on, whose tokens have no meaning any more.
        at = jnp.minimum(state.cache.lengths, state.tokens.shape[1] - 1)
        written = state.tokens.at[rows, at].set(tokens)
        e = decoder.embed(stacks, written)
        x = self.model.block.decoder(prepared["block"], e)[rows, at][:, None]
        out = decoder.backbone(stacks, x, memory=memory, cache=state.cache)
        assert out.cache is not None
        logits = ModelPredictor(decoder).logits(stacks, out.x)[:, 0]
        return _Item(out.cache, written), StepOutput(logits)


def _keys(key: jax.Array | None) -> list[Any]:
    return [None] * 4 if key is None else list(jax.random.split(key, 4))
