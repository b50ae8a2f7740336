"""The stacks of a character model around a backbone over groups."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.models.head import Head
from tokjax.models.layers import norm
from tokjax.models.own_stack import in_layers, init_own_stack, own_stack
from tokjax.models.parameters import Params
from tokjax.models.stack import StackConfig, init_norm
from tokjax.models.transformer import Transformer
from tokjax.tokenization.toucan.boundaries import Boundaries


@dataclass(frozen=True)
class Parts:
    """What stands around the backbone.

    Attributes:
        model: the backbone, over groups; characters are read and predicted by its table.
        before: a causal stack over characters, whose states are pooled.
        behind: a causal stack over characters and ends, which predicts them.
        boundaries: how groups are made.
    """

    model: Transformer
    before: Transformer
    behind: Transformer
    boundaries: Boundaries

    @classmethod
    def of(
        cls, model: Transformer, before: StackConfig, behind: StackConfig, boundaries: Boundaries
    ) -> "Parts":
        """Returns the parts of given shapes.

        Raises:
            ConfigError: a shape is impossible.
        """
        config = model.config
        reads, predicts = (own_stack(shape, config, causal=True) for shape in (before, behind))
        return cls(model, reads, predicts, boundaries)

    @property
    def end(self) -> int:
        """Id of the end of a group: the one behind the characters'."""
        return self.model.config.vocabulary

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Returns initial parameters."""
        config, keys = self.model.config, jax.random.split(key, 5)
        width, dtype = config.d_model, jnp.dtype(config.param_dtype)

        def vector(key: jax.Array) -> jax.Array:
            return (config.init_scale * jax.random.normal(key, (width,))).astype(dtype)

        found = {
            "before": init_own_stack(self.before, keys[0]),
            "behind": init_own_stack(self.behind, keys[1]),
            "null": vector(keys[3]),
            "enter": init_norm(config, width),
            "end": vector(keys[4]),
        }
        if self.boundaries.kind == "learned":
            found["boundaries"] = self.boundaries.init(keys[2], width, dtype)
        if not config.tie_embeddings:
            found["end_head"] = vector(jax.random.fold_in(keys[4], 1))
        return found

    def ready(self, w: Params) -> dict[str, Any]:
        """Returns parameters of `init` in the form that the other methods take."""
        return {**w, "before": in_layers(w["before"]), "behind": in_layers(w["behind"])}

    def entering(self, w: Params, pooled: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Returns what the backbone reads of pooled states or of the null vector."""
        return norm(self.model.config, w["enter"], pooled)

    def end_vector(self, w: Params) -> Float[Array, "D"]:
        """Returns the embedding of the end of a group."""
        scale = self.model.config.embedding_scale
        vector = w["end"].astype(jnp.dtype(self.model.config.dtype))
        return vector if scale is None else vector * jnp.asarray(scale, vector.dtype)

    def head(self, params: Params, w: Params) -> Head:
        """Returns the head over characters and the end."""
        head = self.model.head(params)
        row = w["end" if self.model.config.tie_embeddings else "end_head"]
        table = jnp.concatenate([head.table, row[None].astype(head.table.dtype)])
        bias = head.bias
        if bias is not None:
            bias = jnp.pad(bias, (0, 1))
        return Head(table, bias, head.softcap, head.scale)
