"""A block of cross attention whose keys are shared by all queries or each query's own."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax.models import parameters
from tokjax.models.config import ModelConfig
from tokjax.models.layers import feed_forward, heads, linear, norm, ready
from tokjax.models.parameters import Params
from tokjax.models.stack import StackConfig, init_norm

_EXCLUDED = -1e30  # finite, so that a query without any key gives numbers, not NaN


@dataclass(frozen=True)
class CrossAttention:
    """Attention of queries to states, added to the queries, and a feed-forward with a GELU gate.

    Both sides are normalised first. A query without any key is left to the feed-forward alone.
    """

    config: ModelConfig  # of the block

    @classmethod
    def beside(
        cls, model: ModelConfig, n_heads: int | None = None, d_ff: int | None = None
    ) -> "CrossAttention":
        """Returns a block as wide as the states of a model, with its kind of norms and dtypes.

        Args:
            model: whose states it reads.
            n_heads: heads of attention; None: as many as the model has.
            d_ff: feed-forward width; None: the model's.

        Raises:
            ConfigError: the shape is impossible.
        """
        shape = StackConfig(1, n_heads=n_heads, d_ff=d_ff).of(model)
        return cls(
            dataclasses.replace(
                shape,
                cross_attention=True,
                qk_norm=False,
                attention_softcap=None,
                attention_scale=None,
                norm_placement="pre",
                gated=True,
                activation="gelu",
            )
        )

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Returns initial parameters."""
        block = parameters.unstack(parameters.init_parameters(self.config, key))["layers"][0]
        context = init_norm(self.config, self.config.d_model)
        return {"attention": block["cross"], "mlp": block["mlp"], "context": context}

    def queries(self, w: Params, x: Float[Array, "B M D"]) -> Float[Array, "B M H d"]:
        """Returns the heads' queries."""
        part = ready(self.config, w["attention"])
        return heads(self.config, part, "query", norm(self.config, part, x))

    def keys_values(
        self, w: Params, x: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "B S H d"], Float[Array, "B S H d"]]:
        """Returns the heads' keys and values of states."""
        part = ready(self.config, w["attention"])
        x = norm(self.config, ready(self.config, w["context"]), x)
        return heads(self.config, part, "key", x), heads(self.config, part, "value", x)

    def probabilities(
        self,
        q: Float[Array, "B M H d"],
        k: Float[Array, "B S H d"] | Float[Array, "B M S H d"],
        mask: Bool[Array, "B 1 S"] | Bool[Array, "B M S"],
    ) -> Float[Array, "B M H S"]:
        """Returns float32 probabilities of keys, of all queries or of each; 0 where masked."""
        of = "bshd" if k.ndim == 4 else "bmshd"
        scores = jnp.einsum(f"bmhd,{of}->bmhs", q, k, preferred_element_type=jnp.float32)
        seen = mask[:, :, None]
        scores = jnp.where(seen, scores * self.config.score_scale, _EXCLUDED)
        return jnp.where(seen, jax.nn.softmax(scores, axis=-1), 0.0)

    def attend(
        self,
        w: Params,
        x: Float[Array, "B M D"],
        q: Float[Array, "B M H d"],
        k: Float[Array, "B S H d"] | Float[Array, "B M S H d"],
        v: Float[Array, "B S H d"] | Float[Array, "B M S H d"],
        mask: Bool[Array, "B 1 S"] | Bool[Array, "B M S"],
    ) -> Float[Array, "B M D"]:
        """Returns the block's output for queries that attend to keys.

        Args:
            w: from `init`.
            x: what the queries were made of.
            q: from `queries`.
            k: from `keys_values`, of all queries or a set for each.
            v: likewise.
            mask: keys that count.
        """
        config = self.config
        of = "bshd" if k.ndim == 4 else "bmshd"
        read = jnp.einsum(f"bmhs,{of}->bmhd", self.probabilities(q, k, mask).astype(v.dtype), v)
        x = x + linear(ready(config, w["attention"]), "out", read.reshape(*x.shape[:2], -1))
        mlp = ready(config, w["mlp"])
        return x + feed_forward(config, mlp, norm(config, mlp, x), lambda _, value: value)
