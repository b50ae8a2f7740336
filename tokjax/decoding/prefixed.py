"""Continuing prompts that hold continuous features: transcripts of speech, captions of images.

A prompt is ids with gaps, in which vectors stand instead of embeddings. They are read once, in the
pass over the prompts; every step behind it is the model's own, beside its cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax import struct
from tokjax.decoding.predictors import ModelPredictor, StepOutput
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError
from tokjax.models.cache import Cache
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.models.views import placed


@struct.dataclass
class PrefixedParams:
    """What a model continues behind vectors, in the place of its parameters.

    Attributes:
        params: of the model.
        vectors: continuous inputs of each prompt.
        slots: which of them stands at a place of the prompt; -1: its token.
    """

    params: Params
    vectors: Float[Array, "B P D"]
    slots: Int[Array, "B T"]


@dataclass(frozen=True)
class PrefixedPredictor:
    """A model's own predictions behind prompts with vectors; one of its passes a token."""

    model: Transformer

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._plain.vocab_size

    @property
    def max_positions(self) -> int:
        """Longest sequence, vectors, other prompt and new tokens together."""
        return self._plain.max_positions

    @property
    def _plain(self) -> ModelPredictor:
        return ModelPredictor(self.model)

    def check(self, params: PrefixedParams, prompts: Prompts, limits: np.ndarray) -> None:
        """Refuses vectors that do not belong to the prompts.

        Raises:
            ConfigError: as it says.
        """
        rows, slots = len(np.asarray(prompts.lengths)), np.asarray(params.slots)
        longest = int(np.max(prompts.lengths))
        if slots.ndim != 2 or len(slots) != rows or slots.shape[1] < longest:
            raise ConfigError(
                f"slots of shape {slots.shape} must be [rows={rows}, places], with a place for "
                f"each of a prompt's {longest} ids"
            )
        shape = params.vectors.shape
        width = self.model.config.d_model
        if len(shape) != 3 or shape[0] != rows or shape[2] != width or slots.max() >= shape[1]:
            raise ConfigError(
                f"vectors of shape {shape} must be [rows={rows}, vectors, d_model={width}], with "
                f"the vectors that the slots name (up to {slots.max()})"
            )

    def prepare(self, params: PrefixedParams) -> PrefixedParams:
        """Returns the parameters with the model's in the form that it reads fastest."""
        return params.replace(  # type: ignore[attr-defined]
            params=self._plain.prepare(params.params)
        )

    def init(
        self, prepared: PrefixedParams, prompts: Prompts, capacity: int
    ) -> tuple[Cache, StepOutput]:
        """Returns the filled cache and the logits behind each prompt's last place."""
        plain, params = self._plain, prepared.params
        width = prompts.tokens.shape[1]
        slots = prepared.slots[:, :width]
        slots = jnp.pad(slots, ((0, 0), (0, width - slots.shape[1])), constant_values=-1)
        embedded = placed(self.model.embed(params, prompts.tokens), prepared.vectors, slots)
        cache, out = plain.prefill(params, prompts, capacity, embedded=embedded)
        last = jnp.take_along_axis(out.x, (prompts.lengths - 1)[:, None, None], axis=1)
        return cache, StepOutput(plain.logits(params, last)[:, 0])

    def step(
        self, prepared: PrefixedParams, state: Cache, tokens: Int[Array, "B"]
    ) -> tuple[Cache, StepOutput]:
        """Returns the cache with one more token a row, and the logits behind it."""
        return self._plain.step(prepared.params, state, tokens)


def prefixed(
    model: Transformer,
    params: Params,
    vectors: Float[Array, "B P D"],
    slots: Int[Array, "B T"] | Int[np.ndarray, "B T"],
) -> tuple[PrefixedPredictor, PrefixedParams]:
    """Returns what `decode` takes, to continue prompts in whose gaps vectors stand.

    Args:
        model: that writes.
        params: its parameters.
        vectors: continuous inputs of each prompt, as of `FeaturePrefix`.
        slots: as of `slotted_prompts`.
    """
    return PrefixedPredictor(model), PrefixedParams(
        params, jnp.asarray(vectors), jnp.asarray(slots)
    )


def slotted_prompts(
    counts: Sequence[int], before: Sequence[int] = (0,), after: Sequence[int] = ()
) -> tuple[Prompts, Int[np.ndarray, "B T"]]:
    """Returns prompts of some ids, a gap for each vector, and more ids; and the slots.

    Args:
        counts: vectors of each prompt.
        before: ids before them, for example BOS.
        after: ids behind them.

    Raises:
        ConfigError: there is no prompt, or one without ids and vectors.

    >>> prompts, slots = slotted_prompts([2, 1], before=[5], after=[7])
    >>> prompts.tokens.tolist(), prompts.lengths.tolist(), slots.tolist()
    ([[5, 0, 0, 7], [5, 0, 7, 0]], [4, 3], [[-1, 0, 1, -1], [-1, 0, -1, -1]])
    """
    prompts = Prompts.of([[*before, *[0] * int(n), *after] for n in counts])
    place = np.arange(prompts.tokens.shape[1])[None] - len(before)
    there = (place >= 0) & (place < np.asarray(counts)[:, None])
    return prompts, np.where(there, place, -1).astype(np.int32)
