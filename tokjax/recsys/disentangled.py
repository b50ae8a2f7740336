"""What an encoder-decoder over items' codes reads: tokens, and beside them a branch within items.

At the embeddings alone, tokens get positions by their place in the item, attention that stays
within an item, and a gate that mixes what comes out with the plain embeddings. Each part can be
switched off; without any, the embeddings are left as they are (TIGER).

Reference: "DiscRec: Disentangled Semantic-Collaborative Modeling for Generative Recommendation",
arXiv 2506.15576.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax.errors import ConfigError

_EPSILON = 1e-5  # of layer norms


@dataclass(frozen=True)
class Disentangled:
    """The block at the embeddings of encoder and decoder, which each have parameters of their own.

    Attributes:
        d_model: width of the embeddings.
        levels: codes of an item.
        positions: adds a vector for each place in an item.
        branch: the second branch's attention sees the item, or everything; "none" has no branch.
        gate: softmax of two scores mixes the branches; False takes their mean.
        n_heads: of the attention.
        d_ff: of the branch's feed-forward.
        dropout: share of the feed-forward's neurons left out in training.
        shift: tokens by which the encoder's borders of items are moved; 0, except as a control.
        init_scale: standard deviation of the first positions.
    """

    d_model: int
    levels: int
    positions: bool = True
    branch: Literal["local", "full", "none"] = "local"
    gate: bool = True
    n_heads: int = 2
    d_ff: int = 1024
    dropout: float = 0.1
    shift: int = 0
    init_scale: float = 1.0

    def __post_init__(self):
        if self.branch not in ("local", "full", "none"):
            raise ConfigError(f"branch={self.branch!r} must be 'local', 'full' or 'none'")
        if self.gate and self.branch == "none":
            raise ConfigError("gate=True mixes two branches: set branch, or gate=False")
        if self.d_model % self.n_heads:
            raise ConfigError(f"d_model={self.d_model} is not divisible by n_heads={self.n_heads}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} must be at least 0 and below 1")
        if min(self.levels, self.d_ff) < 1 or self.shift < 0:
            raise ConfigError(
                f"levels={self.levels} and d_ff={self.d_ff} must be at least 1, shift={self.shift} "
                f"not negative"
            )

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Returns parameters: {"encoder": ..., "decoder": ...}."""
        sides = zip(("encoder", "decoder"), jax.random.split(key), strict=True)
        return {name: self._init(own) for name, own in sides}

    def _init(self, key: jax.Array) -> dict[str, Array]:
        D, F, found = self.d_model, self.d_ff, {}
        shapes = {"query": (D, D), "key": (D, D), "value": (D, D), "up": (D, F), "down": (F, D)}
        *keys, of_positions, of_gate = jax.random.split(key, len(shapes) + 2)
        if self.positions:
            rows = (self.levels + 2, D)
            found["positions"] = self.init_scale * jax.random.normal(of_positions, rows)
        if self.branch == "none":
            return found
        for own, (name, shape) in zip(keys, shapes.items(), strict=True):
            found[name] = jax.random.normal(own, shape) * shape[0] ** -0.5
        found |= {"up_bias": jnp.zeros(F), "down_bias": jnp.zeros(D)}
        for name in ("norm", "second_norm"):
            found |= {name: jnp.ones(D), f"{name}_bias": jnp.zeros(D)}
        if self.gate:
            found["gate"] = jax.random.normal(of_gate, (2, D)) * D**-0.5
        return found

    def encoder(
        self,
        params: Any,
        e: Float[Array, "B S D"],
        kept: Bool[Array, "B S"],
        key: jax.Array | None = None,
    ) -> Float[Array, "B S D"]:
        """Returns what the encoder reads in the place of the embeddings of items and an end token.

        Args:
            params: the block's.
            e: embeddings.
            kept: where there is a token.
            key: of dropout; None has none.
        """
        items = (e.shape[1] - 1) // self.levels
        mask = None
        if self.branch == "local":
            mask = jnp.asarray(item_mask(items, self.levels, self.shift))[None]
        where = encoder_positions(items, self.levels, self.shift)
        return self._mixed(params["encoder"], e, where, mask, kept, key)

    def decoder(
        self, params: Any, e: Float[Array, "B T D"], key: jax.Array | None = None
    ) -> Float[Array, "B T D"]:
        """Returns what the decoder reads in the place of the embeddings of an item's tokens."""
        T = e.shape[1]
        if self.levels + 2 < T:
            raise ValueError(f"{T} tokens are more than an item of {self.levels} codes has")
        mask = jnp.tril(jnp.ones((T, T), bool))[None]
        kept = jnp.ones(e.shape[:2], bool)
        return self._mixed(params["decoder"], e, np.arange(T), mask, kept, key)

    def _mixed(self, w, e, where, mask, kept, key) -> Float[Array, "B S D"]:
        placed = e
        if self.positions:
            placed = e + w["positions"][where].astype(e.dtype)
        if self.branch == "none":
            return placed
        _, _, c = self.within(w, placed, mask, kept, key)
        if not self.gate:
            return (e + c) / 2
        scores = jnp.stack([e @ w["gate"][0], c @ w["gate"][1]], axis=-1)
        g = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(e.dtype)
        return g[..., :1] * e + g[..., 1:] * c

    def within(
        self,
        w: Any,
        placed: Float[Array, "B S D"],
        mask: Bool[Array, "1 S S"] | None,
        kept: Bool[Array, "B S"],
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B S D"], Float[Array, "B S D"]]:
        """Returns the second branch: its normed input, what attention makes of it, and its output.

        Attention and feed-forward are each added to what they read, which is normed; where there is
        no token attention adds nothing.

        Args:
            w: the parameters of one side.
            placed: embeddings with positions.
            mask: which keys a query sees; None all.
            kept: where there is a token.
            key: of dropout; None has none.
        """
        B, S, D = placed.shape
        u = _norm(w, "norm", placed)
        q, k, v = (
            (u @ w[name].astype(u.dtype)).reshape(B, S, self.n_heads, -1)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bthd,bshd->bhts", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = jnp.where(mask[:, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1) * kept[:, None, :, None]
        found = jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), v).reshape(B, S, D)
        attended = u + found
        read = _norm(w, "second_norm", attended)
        hidden = jax.nn.relu(read @ w["up"] + w["up_bias"])
        hidden = dropped(key, hidden, self.dropout)
        return u, attended, read + hidden @ w["down"] + w["down_bias"]


def item_mask(items: int, levels: int, shift: int = 0) -> Bool[np.ndarray, "S S"]:
    """Returns which tokens of a history and its end token see each other.

    Those of an item do, and the end token, itself and the last `levels` tokens.

    Args:
        items: number of them.
        levels: tokens of each.
        shift: tokens by which the borders are moved.

    >>> int(item_mask(2, 4).sum())
    41
    """
    last = items * levels
    block = np.append((np.arange(last) + shift) // levels, -1)
    seen = block[:, None] == block[None]
    behind = slice(max(last - levels, 0), last)
    seen[last, behind] = seen[behind, last] = True
    return seen


def encoder_positions(items: int, levels: int, shift: int = 0) -> Int[np.ndarray, "S"]:
    """Returns the place of each token in its item, from 1; that of the end token is the last.

    >>> encoder_positions(2, 3).tolist()
    [1, 2, 3, 1, 2, 3, 4]
    """
    return np.append((np.arange(items * levels) + shift) % levels + 1, levels + 1)


def dropped(key: jax.Array | None, x: Float[Array, "*B D"], share: float) -> Float[Array, "*B D"]:
    """Returns x with a share of its numbers left out and the others scaled up; None leaves all."""
    if key is None or share == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - share, x.shape)
    return jnp.where(kept, x / (1 - share), 0.0)


def _norm(w: Any, name: str, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + _EPSILON)
    return (wide * w[name] + w[f"{name}_bias"]).astype(x.dtype)
