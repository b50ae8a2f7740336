"""Decoding under an intervention that is the same at every token: steering, skipped layers."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from tokjax import struct
from tokjax.decoding.predictors import ModelPredictor, StepOutput
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError
from tokjax.models.cache import Cache
from tokjax.models.edits import Edits
from tokjax.models.transformer import Transformer


@struct.dataclass
class EditedParams:
    """What an edited model decodes from.

    Attributes:
        model: parameters of the model.
        edits: every leaf [L B 1 ...], where B is the number of prompts or 1.
    """

    model: Any
    edits: Edits


@dataclass(frozen=True)
class Edited:
    """One model's predictions under constant edits; costs one forward pass a token.

    Attributes:
        model: the model.
    """

    model: Transformer

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

    def check(self, params: EditedParams, prompts: Prompts, limits: np.ndarray) -> None:
        """Refuses edits that fit another number of prompts.

        Raises:
            ConfigError: they do.
        """
        del limits
        rows = prompts.tokens.shape[0]
        for path, leaf in jax.tree_util.tree_leaves_with_path(params.edits):
            if leaf.shape[1] not in (1, rows):
                raise ConfigError(
                    f"Edits{jax.tree_util.keystr(path)} has shape {leaf.shape}: its second axis "
                    f"must be 1 or the {rows} prompts"
                )

    def prepare(self, params: EditedParams) -> EditedParams:
        """Returns the parameters with the model's in the form that it reads fastest."""
        return params.replace(model=self._plain.prepare(params.model))  # type: ignore[attr-defined]

    def init(
        self, prepared: EditedParams, prompts: Prompts, capacity: int
    ) -> tuple[Cache, StepOutput]:
        """Returns the cache of the edited prompts and what is said of the first new token."""
        cache, out = self._plain.prefill(prepared.model, prompts, capacity, edits=prepared.edits)
        last = jnp.take_along_axis(out.x, (prompts.lengths - 1)[:, None, None], axis=1)
        return cache, StepOutput(self._plain.logits(prepared.model, last)[:, 0])

    def step(
        self, prepared: EditedParams, state: Cache, tokens: Int[Array, "B"]
    ) -> tuple[Cache, StepOutput]:
        """Returns the cache with one more token a row, and what is said of the next one."""
        embedded = self.model.embed(prepared.model, tokens[:, None])
        edits = _of_rows(prepared.edits, tokens.shape[0])
        out = self.model.backbone(prepared.model, embedded, cache=state, edits=edits)
        assert out.cache is not None
        return out.cache, StepOutput(self._plain.logits(prepared.model, out.x)[:, 0])


def _of_rows(edits: Edits, rows: int) -> Edits:
    """Returns edits for each row: those of a prompt are repeated for the prompt's samples."""

    def repeated(leaf: jax.Array) -> jax.Array:
        return leaf if leaf.shape[1] == 1 else jnp.repeat(leaf, rows // leaf.shape[1], axis=1)

    return jax.tree.map(repeated, edits)


def edited(model: Transformer, params: Any, edits: Edits) -> tuple[Edited, EditedParams]:
    """Returns the predictor of an edited model and its parameters, for `decode`.

    The edits hold at every token of the prompts and of the new text. New values compile nothing;
    edits that are absent cost nothing, and none at all decode as the plain model does, bit for
    bit. Costs one forward pass a token.

    >>> from tokjax.models import ModelConfig
    >>> model = Transformer(ModelConfig(vocab_size=8, d_model=8, n_layers=2, n_heads=1))
    >>> edited(model, {}, Edits(layer_gate=jnp.ones((2, 1, 1))))[0].vocab_size
    8

    Args:
        model: the model.
        params: its parameters.
        edits: every leaf [L B 1 ...]: one value for all tokens, for each prompt or for all.

    Raises:
        ConfigError: edits of another number of layers or of single tokens; changed attention
            scores or probabilities, whose axes are positions of the text.
    """
    try:
        edits.check(model.config.n_layers)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if edits.attention_scores:
        raise ConfigError(
            "edits of attention scores or probabilities change as the text grows: a predictor of "
            "their own makes them anew at each token (see tokjax.decoding.contrast.layercake)"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(edits):
        if jnp.ndim(leaf) < 3 or leaf.shape[2] != 1:
            raise ConfigError(
                f"Edits{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, but the same "
                f"edit is made at every token: give [L, prompts or 1, 1, ...]"
            )
    return Edited(model), EditedParams(model=params, edits=edits)
