"""Representation recycling: at chosen tokens, a block reads its own output once more."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.decoding.contrast.settings import of_rows
from tokjax.decoding.predictors import ModelPredictor, StepOutput
from tokjax.decoding.prompts import Prompts
from tokjax.decoding.transforms.base import setting
from tokjax.errors import ConfigError
from tokjax.models.cache import Cache
from tokjax.models.edits import Edits, Write
from tokjax.models.transformer import Transformer

_SITES = {"output": "resid_post", "input": "resid_pre"}


@struct.dataclass
class RecyclingParams:
    """What recycling decodes from.

    Attributes:
        model: parameters of the model.
        thinking: true for the ids at which a block reads its own output.
        layer: index of that block, one or one for each prompt.
        probability: with which such an id is recycled, one or one for each prompt.
        seeds: of that decision, for each prompt or for each row; one 0 if it is certain.
    """

    model: Any
    thinking: Bool[Array, "V"]
    layer: Int[Array, "*B"]
    probability: Float[Array, "*B"]
    seeds: Int[Array, "B"]


@dataclass(frozen=True)
class Recycling:
    """A model that thinks twice before it writes a thinking token.

    Costs one forward pass a token, and a second one where any row recycles.

    Attributes:
        model: the model.
        state: what the block reads in the second pass.
    """

    model: Transformer
    state: Literal["output", "input"] = "output"

    @property
    def _plain(self) -> ModelPredictor:
        return ModelPredictor(self.model)

    @property
    def _site(self) -> str:
        return _SITES[self.state]

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._plain.vocab_size

    @property
    def max_positions(self) -> int:
        """Longest sequence, prompt and new tokens together."""
        return self._plain.max_positions

    def check(self, params: RecyclingParams, prompts: Prompts, limits: np.ndarray) -> None:
        """Refuses settings for another number of prompts.

        Raises:
            ConfigError: they are.
        """
        del limits
        rows = prompts.tokens.shape[0]
        for name in ("layer", "probability"):
            value = getattr(params, name)
            if np.ndim(value) and len(value) != rows:
                raise ConfigError(f"{name} has {len(value)} values for {rows} prompts")
        if len(params.seeds) > 1 and len(params.seeds) % rows:
            raise ConfigError(
                f"{len(params.seeds)} seeds for {rows} prompts: give one for each prompt, or one "
                f"for each of its samples"
            )

    def prepare(self, params: RecyclingParams) -> RecyclingParams:
        """Returns the parameters with the model's in the form that it reads fastest."""
        return params.replace(model=self._plain.prepare(params.model))  # type: ignore[attr-defined]

    def init(
        self, prepared: RecyclingParams, prompts: Prompts, capacity: int
    ) -> tuple[Cache, StepOutput]:
        """Returns the cache and what is said of the first new token: the prompt's last position is
        recycled like any other.
        """
        at = (prompts.lengths - 1)[:, None, None]
        of_last = lambda x: jnp.take_along_axis(x, at, axis=1)  # noqa: E731
        cache, out = self._plain.prefill(
            prepared.model, prompts, capacity, capture={self._site: of_last}
        )
        last = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)[:, 0]
        states = out.captured[self._site]
        logits = self._plain.logits(prepared.model, of_last(out.x))[:, 0]
        return self._recycled(prepared, cache, last, logits, states)

    def step(
        self, prepared: RecyclingParams, state: Cache, tokens: Int[Array, "B"]
    ) -> tuple[Cache, StepOutput]:
        """Returns the cache with one more token a row, and what is said of the next one."""
        embedded = self.model.embed(prepared.model, tokens[:, None])
        out = self.model.backbone(prepared.model, embedded, cache=state, capture={self._site})
        assert out.cache is not None
        logits = self._plain.logits(prepared.model, out.x)[:, 0]
        return self._recycled(prepared, out.cache, tokens, logits, out.captured[self._site])

    def _recycled(
        self,
        prepared: RecyclingParams,
        cache: Cache,
        tokens: Int[Array, "B"],
        logits: Float[Array, "B V"],
        states: Float[Array, "L B 1 D"],
    ) -> tuple[Cache, StepOutput]:
        """Returns the cache and what is said, by a second pass in the rows that recycle."""
        rows = tokens.shape[0]
        chosen = prepared.thinking[jnp.argmax(logits, axis=-1)]
        chosen &= _draws(prepared.seeds, rows, cache.lengths) < of_rows(prepared.probability, rows)
        layer = jnp.broadcast_to(of_rows(prepared.layer, rows), (rows,))
        layers = jnp.arange(self.model.config.n_layers)[:, None, None]
        write = Write(states, (layers == layer[:, None]) & chosen[:, None])

        def second(cache: Cache, logits: jax.Array) -> tuple[Cache, jax.Array]:
            # The token's keys and values are overwritten, not written behind themselves.
            again = self.model.backbone(
                prepared.model,
                self.model.embed(prepared.model, tokens[:, None]),
                cache=cache.rewind(cache.lengths - 1),
                edits=Edits(write={"resid_pre": write}),
            )
            new = self._plain.logits(prepared.model, again.x)[:, 0]

            def of_chosen(a: jax.Array, b: jax.Array) -> jax.Array:
                return jnp.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b)

            # What a row keeps must not depend on whether another one recycles, not by rounding.
            return jax.tree.map(of_chosen, (again.cache, new), (cache, logits))

        cache, logits = jax.lax.cond(chosen.any(), second, lambda *kept: kept, cache, logits)
        return cache, StepOutput(logits, signals={"recycled": chosen})


def _draws(seeds: jax.Array, rows: int, lengths: Int[Array, "B"]) -> Float[Array, "B"]:
    """Returns a number from 0 to 1 for each row, by its seed and the length of its text."""
    each = seeds.shape[0]
    # Before the samples of a prompt part, the first one's seed decides for all.
    of_row = seeds[:: each // rows] if each > rows else jnp.repeat(seeds, rows // each)
    draw = lambda seed, at: jax.random.uniform(  # noqa: E731
        jax.random.fold_in(jax.random.key(seed), at)
    )
    return jax.vmap(draw)(of_row, lengths)


def recycling(
    model: Transformer,
    params: Any,
    thinking: Iterable[int],
    *,
    layer: Any,
    probability: Any = 1.0,
    seeds: Any = None,
    state: Literal["output", "input"] = "output",
) -> tuple[Recycling, RecyclingParams]:
    """Returns the predictor of representation recycling and its parameters, for `decode`.

    Where the likeliest next token is one of `thinking`, the last token is run a second time with
    block `layer` reading the output that it had in the first run; the second run's logits count,
    and its keys and values replace the first one's. The prompt's last position is recycled like
    any other. The likeliest token is that of the model, before transforms. The signal "recycled"
    says where it happened. Costs one forward pass a token, and a second where any row recycles.

    Args:
        model: the model.
        params: its parameters.
        thinking: ids of the thinking tokens (see `thinking_ids`); none decodes as the plain model.
        layer: index of the block, one or one for each prompt; the reference code's is 23 of 32.
        probability: with which a thinking token is recycled, one or one for each prompt; the
            reference code's is 0.5.
        seeds: for a probability below 1, an integer for each prompt or for each row of `decode`
            (the first one of a prompt then decides at the prompt's last position for all its
            samples).
        state: "input" has the block read what it read anyway, which changes nothing: a control.

    Raises:
        ConfigError: there is no such layer or id, or a setting is impossible.

    Reference: "Demystifying Reasoning Dynamics with Mutual Information: Thinking Tokens are
    Information Peaks in LLM Reasoning", arXiv 2506.02867.
    """
    if state not in _SITES:
        raise ConfigError(f"state={state!r} must be 'output' or 'input'")
    depth, vocabulary = model.config.n_layers, model.config.vocabulary
    ids = [int(i) for i in thinking]
    wrong = [i for i in ids if not 0 <= i < vocabulary]
    if wrong:
        raise ConfigError(f"thinking has ids {wrong}, but the model's are 0 to {vocabulary - 1}")
    table = np.zeros(vocabulary, bool)
    table[ids] = True
    chance = setting(
        "probability", probability, np.float32, lambda v: (v >= 0) & (v <= 1), "from 0 to 1"
    )
    if seeds is None:
        if np.any(chance < 1):
            raise ConfigError(f"probability={probability!r} draws at random: give seeds")
        seeds = [0]
    seeds = np.asarray(seeds)
    if seeds.ndim != 1 or not len(seeds) or not np.issubdtype(seeds.dtype, np.integer):
        raise ConfigError(f"seeds must be integers, one for each prompt or row, not {seeds!r}")
    if seeds.min() < 0 or seeds.max() >= 2**32:
        raise ConfigError(f"seeds must be 0 to {2**32 - 1}, not {seeds.min()} to {seeds.max()}")
    wanted = f"an integer from 0 to {depth - 1}"
    return Recycling(model, state), RecyclingParams(
        model=params,
        thinking=table,  # type: ignore[arg-type]
        layer=setting("layer", layer, np.int32, lambda v: (v >= 0) & (v < depth), wanted),
        probability=chance,
        seeds=seeds.astype(np.uint32),  # type: ignore[arg-type]
    )
