"""Several variants of a model's next step in one forward pass over one cache.

The branches of a row are queries at the same position: each sees the cached keys and a new key of
its own, not the others'. The first branch is the intact one; its key is written first and is the
only one that stays behind the pass, so the keys of damaged branches are never seen again.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.decoding.predictors import ModelPredictor
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError
from tokjax.models.cache import Cache
from tokjax.models.edits import Edits
from tokjax.models.transformer import Output, Transformer


@dataclass(frozen=True)
class Branches:
    """A model with `count` branches; costs one forward pass of `count` queries a row and token.

    What the branches differ in are edits whose query axis is the branch: a `layer_gate` of
    [L, B, count], `Suppression.rows` of [L, B, count].

    Attributes:
        model: the model, without token mixer, relative positions or cross-attention.
        count: number of branches, the intact one included.
    """

    model: Transformer
    count: int

    def __post_init__(self) -> None:
        """Refuses models whose next step depends on where in the pass a query stands.

        Raises:
            ConfigError: such a model.
        """
        config = self.model.config
        for there, name in (
            (config.mixer is not None, "a token mixer"),
            (config.positions == "relative", "relative positions"),
            (config.cross_attention, "cross-attention"),
        ):
            if there:
                raise ConfigError(f"branches cannot run a model with {name}")

    @property
    def plain(self) -> ModelPredictor:
        """The model without branches."""
        return ModelPredictor(self.model)

    @property
    def _stepped(self) -> Transformer:
        """The model as branches run it: they stand side by side, so the last one's window must
        reach as far back as the first one's. `_seen` narrows it again.
        """
        config = self.model.config
        if config.sliding_window is None:
            return self.model
        wider = config.sliding_window + self.count - 1
        return Transformer(dataclasses.replace(config, sliding_window=wider))

    def prefill(
        self, prepared: Any, prompts: Prompts, capacity: int
    ) -> tuple[Cache, Int[Array, "B"]]:
        """Returns the cache behind all but each prompt's last token, and those last tokens.

        The last token is for the first step, so that the first new token has branches too.
        """
        before = prompts.lengths - 1
        last = jnp.take_along_axis(prompts.tokens, before[:, None], axis=1)[:, 0]
        # Layers with a window keep every key, too: as if one pass could add a whole row.
        slots = capacity + self.count - 1
        all_but_last = Prompts(prompts.tokens, before)
        cache, _ = self.plain.prefill(prepared, all_but_last, slots, chunk=slots)
        return cache, last

    def step(
        self, prepared: Any, cache: Cache, tokens: Int[Array, "B"], edits: Edits
    ) -> tuple[Cache, Float[Array, "N B V"]]:
        """Returns the cache with one more intact token a row, and each branch's logits behind it.

        Args:
            prepared: from `ModelPredictor.prepare`.
            cache: behind the tokens before.
            tokens: one a row, the same in each branch.
            edits: what branches differ in.
        """
        embedded = self.model.embed(prepared, tokens[:, None])
        same = jnp.broadcast_to(embedded, (*tokens.shape, self.count, embedded.shape[-1]))
        out = self.run(prepared, cache, same, edits)
        assert out.cache is not None
        logits = jnp.moveaxis(self.plain.logits(prepared, out.x), 1, 0)
        return out.cache.rewind(cache.lengths + 1), logits

    def run(
        self, prepared: Any, cache: Cache, x: Float[Array, "B N D"], edits: Edits | None = None
    ) -> Output:
        """Returns one pass of the branches; its cache holds the new keys of all, side by side.

        Args:
            prepared: from `ModelPredictor.prepare`.
            cache: behind the tokens before.
            x: embeddings of each branch's next token.
            edits: what branches differ in besides.
        """
        edits = edits or Edits()
        bias = self._seen(cache)
        if edits.attention_bias is not None:
            bias = bias + edits.attention_bias
        return self._stepped.backbone(
            prepared,
            x,
            positions=jnp.broadcast_to(cache.lengths[:, None], x.shape[:2]),
            cache=cache,
            edits=edits.replace(attention_bias=bias),  # type: ignore[attr-defined]
        )

    def columns(self, cache: Cache, mask: Bool[Array, "B S"], branch: int) -> Bool[Array, "B S"]:
        """Returns the slots in which a branch of the next step finds the tokens of a mask.

        Args:
            cache: before the step.
            mask: of each row's tokens by their place, the step's own token included.
            branch: its number; the key of its own token lies so many slots behind the intact one.
        """
        slots, now = jnp.arange(cache.capacity), cache.lengths[:, None]
        own = jnp.take_along_axis(mask, now, axis=1)
        return jnp.where(slots == now + branch, own, mask & (slots < now))

    def _seen(self, cache: Cache) -> Float[Array, "L B 1 N S"]:
        """Returns the bias that hides the other branches' new keys."""
        slots, now = jnp.arange(cache.capacity), cache.lengths[:, None, None]
        own = slots == now + jnp.arange(self.count)[:, None]

        def of(window: int | None) -> Float[Array, "B 1 N S"]:
            before = slots < now if window is None else (slots < now) & (slots > now - window)
            return jnp.where(before | own, 0.0, -jnp.inf)[:, None]

        windows = self.model.config.windows
        biases = {window: of(window) for window in set(windows)}
        return jnp.stack([biases[window] for window in windows])
