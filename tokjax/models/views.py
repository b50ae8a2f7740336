"""Views of a model, for objectives that run its passes themselves.

A view is a model with other embeddings, or one that reports what its blocks hold. It is made and
used within one call of a loss and takes the place of the model there.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax.errors import ConfigError
from tokjax.models.head import Head
from tokjax.models.parameters import Params
from tokjax.models.transformer import Output, Transformer


@dataclass(frozen=True, eq=False)
class View(Transformer):
    """The model `inner`, and equal to nothing else, whatever its configuration."""

    inner: Transformer = dataclasses.field(kw_only=True)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def embed(
        self, params: Params, tokens: Int[Array, "B T"], types: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Returns the embeddings of tokens; see `Transformer.embed`."""
        return self.inner.embed(params, tokens, types)

    def head(self, params: Params) -> Head:
        """Returns the output head."""
        return self.inner.head(params)

    def backbone(self, params: Params, x: Float[Array, "B T D"], **options: Any) -> Output:
        """Returns the final hidden states of embeddings x; see `Transformer.backbone`."""
        return self.inner.backbone(params, x, **options)


@dataclass(frozen=True, eq=False)
class Prefilled(View):
    """A model at some of whose positions vectors stand instead of embeddings of tokens.

    Attributes:
        vectors: continuous inputs of each row.
        slots: which of them stands at a position; -1 leaves the token there.
    """

    vectors: Float[Array, "B P D"] = dataclasses.field(kw_only=True)
    slots: Int[Array, "B T"] = dataclasses.field(kw_only=True)

    @classmethod
    def of(
        cls, model: Transformer, vectors: Float[Array, "B P D"], slots: Int[Array, "B T"]
    ) -> "Prefilled":
        """Returns the view of a model."""
        return cls(model.config, inner=model, vectors=vectors, slots=slots)

    def embed(
        self, params: Params, tokens: Int[Array, "B T"], types: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Returns the embeddings of tokens, with the vectors in their places.

        Raises:
            ConfigError: these are other tokens than those the slots were made for.
        """
        if tokens.shape != self.slots.shape:
            raise ConfigError(
                f"continuous inputs have places among {self.slots.shape} tokens, but "
                f"{tokens.shape} are embedded: choose an objective that reads each row once"
            )
        return placed(self.inner.embed(params, tokens, types), self.vectors, self.slots)


@dataclass(frozen=True, eq=False)
class Observed(View):
    """A model whose passes note what is read inside their blocks.

    What is read is reduced inside the layer loop, whether that is a scan or unrolled, so that no
    stack of states is kept. Passes must not run inside a loop, a branch or a checkpoint of the
    loss: what they note would not exist outside.

    Attributes:
        reads: site -> function of its values in one layer.
        found: one mapping for each pass, site -> results stacked over layers.
    """

    reads: Mapping[str, Callable[[jax.Array], Any]] = dataclasses.field(kw_only=True)
    found: list[dict[str, Any]] = dataclasses.field(kw_only=True)

    @classmethod
    def of(cls, model: Transformer, reads: Mapping[str, Callable[[jax.Array], Any]]) -> "Observed":
        """Returns the view of a model; nothing is noted yet."""
        return cls(model.config, inner=model, reads=reads, found=[])

    def backbone(
        self,
        params: Params,
        x: Float[Array, "B T D"],
        *,
        capture: Mapping[str, Callable | None] | frozenset[str] | set[str] = frozenset(),
        **options: Any,
    ) -> Output:
        """Returns the pass, as if nobody listened."""
        asked = dict(capture) if isinstance(capture, Mapping) else dict.fromkeys(capture)

        def reader(site: str) -> Callable[[jax.Array], dict[str, Any]]:
            def read(value: jax.Array) -> dict[str, Any]:
                found = {}
                if site in asked:
                    reduce = asked[site]
                    found["asked"] = value if reduce is None else reduce(value)
                if site in self.reads:
                    found["noted"] = self.reads[site](value)
                return found

            return read

        sites = {site: reader(site) for site in {**asked, **self.reads}}
        out = self.inner.backbone(params, x, capture=sites, **options)
        self.found.append({site: out.captured[site]["noted"] for site in self.reads})
        return dataclasses.replace(
            out, captured={site: out.captured[site]["asked"] for site in asked}
        )


def placed(
    x: Float[Array, "B T D"], vectors: Float[Array, "B P D"], slots: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Returns embeddings with continuous inputs in the place of some.

    Args:
        x: embeddings of tokens.
        vectors: continuous inputs of each row.
        slots: which of them stands at a position; -1 leaves the token there.

    >>> x, vectors = jnp.zeros((1, 3, 1)), jnp.array([[[5.0], [7.0]]])
    >>> placed(x, vectors, jnp.array([[-1, 1, 0]]))[0, :, 0].tolist()
    [0.0, 7.0, 5.0]
    """
    at = jnp.maximum(slots, 0)[..., None]
    found = jnp.take_along_axis(vectors, at, axis=1).astype(x.dtype)
    return jnp.where(slots[..., None] >= 0, found, x)
