"""Interventions as arrays: what to change inside a forward pass.

Every leaf leads with the layer axis, is scanned together with the weights and may be changed
without recompiling. A field left None (or a site left out) is absent from the compiled program.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax import struct
from tokjax.errors import nearest

SITES = (
    "resid_pre",  # [B T D] the residual stream before a block
    "q",  # [B T H d] queries, turned by their positions
    "k",  # [B T K d] keys of this pass, turned by their positions
    "v",  # [B T K d] values of this pass
    "attn_probs",  # [B H T S] attention probabilities
    "attn_heads",  # [B T H d] what each head found, before the output product
    "attn_out",  # [B T D] what attention adds, layer gate included
    "resid_mid",  # [B T D] between attention and feed-forward
    "mlp_hidden",  # [B T F] the feed-forward's neurons, behind activation and gate
    "mlp_out",  # [B T D] what the feed-forward adds, layer gate included
    "resid_post",  # [B T D] the residual stream behind a block
)
# What a decoder beside an encoder has more. S is the encoder's length.
CROSS_SITES = (
    "cross_q",  # [B T H d] queries of cross-attention
    "cross_probs",  # [B H T S] its probabilities
    "cross_heads",  # [B T H d] what each of its heads found, before the output product
    "cross_out",  # [B T D] what it adds, layer gate included
    "resid_cross",  # [B T D] between cross-attention and feed-forward
)


@struct.dataclass
class Write:
    """Values that replace those of a site where the mask is true.

    Attributes:
        value: leads with the layer axis, then as the site; axes may be 1.
        mask: [L B T] (for `attn_probs` and `cross_probs` [L B H T S]); axes may be 1.
    """

    value: Float[Array, "L ..."]
    mask: Bool[Array, "L ..."]


@struct.dataclass
class Steer:
    """A shift of a site's vectors, after which they are given back their length.

    h becomes (h + scale * vector) * |h| / (|h + scale * vector| + 1e-8), lengths taken over the
    last axis in float32. Where the scale is 0, or h and the shift cancel, h is left as it is, bit
    for bit.

    Attributes:
        vector: leads with the layer axis, then as the site; axes may be 1.
        scale: of the vector at each token; axes may be 1.
        keep_norm: False leaves the lengths as the shift makes them.

    Reference: GrAInS, arXiv 2507.18043.
    """

    vector: Float[Array, "L ..."]
    scale: Float[Array, "L B T"]
    keep_norm: bool = struct.field(pytree_node=False, default=True)

    def applied(self, h: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        """Returns one layer's vectors, steered (the layer axis is gone here).

        >>> steer = Steer(jnp.array([[[1.0, 0.0]]]), jnp.array([[5.0]]))
        >>> [round(float(z), 4) for z in steer.applied(jnp.array([[[3.0, 4.0]]]))[0, 0]]
        [4.4721, 2.2361]
        """
        scale = self.scale.reshape(self.scale.shape + (1,) * (h.ndim - self.scale.ndim))
        before = h.astype(jnp.float32)
        shifted = before + scale.astype(jnp.float32) * self.vector.astype(jnp.float32)
        changed = scale != 0
        if self.keep_norm:
            squares = jnp.square(shifted).sum(-1, keepdims=True)
            changed &= squares > 0
            # The root of 0 has no gradient, not even where it is then not used.
            length = jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
            own = jnp.square(before).sum(-1, keepdims=True)
            own = jnp.where(own > 0, jnp.sqrt(jnp.where(own > 0, own, 1.0)), 0.0)
            shifted = shifted * (own / (length + 1e-8))
        return jnp.where(changed, shifted.astype(h.dtype), h)


@struct.dataclass
class Suppression:
    """Keys whose attention scores are overwritten, decided by the attention they get.

    With A the attention probabilities averaged over heads in this very pass, rows are changed for
    which (`by="row"`) the sum of A over `columns` is above `threshold`: all `columns` of that row;
    or (`by="column"`) all `rows` are changed, in each of `columns` that gets more than `threshold`
    from any of them. The causal mask stays; a row that would lose its every key is left alone
    (by all suppressions of a pass together).

    Attributes:
        columns: keys (cache slots) that may be suppressed; the batch axis may be 1.
        rows: queries that may be changed; axes may be 1.
        threshold: on attention mass; above 1 changes nothing, below 0 all.
        score: what the scores are replaced by.
        by: how the threshold is read.

    Reference: LayerCake, arXiv 2507.04404 (concept pass: by="row", threshold 0.05; punctuation
    pass: by="column", threshold 0.1).
    """

    columns: Bool[Array, "L B S"]
    rows: Bool[Array, "L B T"]
    threshold: Float[Array, "L"]
    score: Float[Array, "L"]
    by: Literal["row", "column"] = struct.field(pytree_node=False, default="row")

    def chosen(
        self, probabilities: Float[Array, "B H T S"], visible: Bool[Array, "B 1 T S"]
    ) -> Bool[Array, "B T S"]:
        """Returns which visible scores of one layer the rule takes (the layer axis is gone here),
        also in rows that lose every key by it.
        """
        attention = probabilities.mean(axis=1)
        columns, rows = self.columns[:, None, :], self.rows[:, :, None]
        if self.by == "row":
            mass = jnp.where(columns, attention, 0.0).sum(-1, keepdims=True)
            chosen = columns & (mass > self.threshold)
        else:
            in_rows = jnp.where(rows, attention, 0.0).max(axis=1, keepdims=True)
            chosen = columns & (in_rows > self.threshold)
        return chosen & rows & visible[:, 0]


def suppressed(
    suppressions: Sequence[Suppression],
    logits: Float[Array, "B H T S"],
    probabilities: Float[Array, "B H T S"],
    visible: Bool[Array, "B 1 T S"],
) -> Float[Array, "B H T S"]:
    """Returns one layer's attention scores with the suppressed ones overwritten.

    All decide by the same probabilities; where two take the same score, the later one's stands.
    """
    taken = [each.chosen(probabilities, visible) for each in suppressions]
    together = functools.reduce(jnp.logical_or, taken)
    # A row of nothing but equal scores would attend to the future too.
    kept = (visible[:, 0] & ~together).any(-1, keepdims=True)
    for each, chosen in zip(suppressions, taken, strict=True):
        logits = jnp.where((chosen & kept)[:, None], each.score, logits)
    return logits


@struct.dataclass
class Edits:
    """Changes to a forward pass.

    At one site the addition comes first, then steering, then what is written. With
    `norm_placement="post"` a block normalises what it is left with, so a gate of 0 is no identity
    there.

    Attributes:
        attention_bias: added to the attention scores before the softmax (not to those of
            cross-attention), -inf excludes; heads and rows may be 1. A query whose every key is
            excluded attends to nothing.
        suppression: keys whose scores are overwritten, by the attention they get; several, for
            example one for each of the rows that run a branch of their own.
        layer_gate: multiplies what a block adds to the residual stream; 0 skips the block. The
            batch and token axes may be 1.
        add: site -> values added there; leads with the layer axis, axes may be 1.
        steer: site -> a shift that keeps the length of what is there.
        write: site -> values that replace what is there (patching, transplants).
    """

    attention_bias: Float[Array, "L B H T S"] | None = None
    suppression: tuple[Suppression, ...] = ()
    layer_gate: Float[Array, "L B T"] | None = None
    add: Mapping[str, Float[Array, "L ..."]] = struct.field(default_factory=dict)
    steer: Mapping[str, Steer] = struct.field(default_factory=dict)
    write: Mapping[str, Write] = struct.field(default_factory=dict)

    def check(self, n_layers: int, sites: Sequence[str] = SITES) -> None:
        """Refuses edits that cannot be meant for a model of so many blocks with these sites.

        Not done when they are made: `vmap` and `tree.map` make trees of this type out of anything.

        Raises:
            ValueError: an unknown site; a `write` that is no `Write`, a `steer` that is no `Steer`
                or of probabilities; a bare `Suppression`; a leaf without layer axis.
        """
        if not isinstance(self.suppression, tuple):
            raise ValueError("Edits.suppression must be a tuple of Suppressions: (suppression,)")
        for field in ("add", "steer", "write"):
            for site, value in getattr(self, field).items():
                if site not in sites:
                    raise ValueError(f"Edits.{field}: unknown site {site!r}.{nearest(site, sites)}")
                if field == "write" and not isinstance(value, Write):
                    raise ValueError(f"Edits.write[{site!r}] must be a Write(value, mask)")
                if field == "steer" and not isinstance(value, Steer):
                    raise ValueError(f"Edits.steer[{site!r}] must be a Steer(vector, scale)")
                if field == "steer" and site.endswith("_probs"):
                    raise ValueError(f"Edits.steer: {site!r} holds no vectors whose length to keep")
        for path, leaf in jax.tree_util.tree_leaves_with_path(self):
            # An index beyond the end would silently take the last layer's edit.
            if jnp.ndim(leaf) == 0 or leaf.shape[0] != n_layers:
                raise ValueError(
                    f"Edits{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}: its first "
                    f"axis must be the model's {n_layers} layers"
                )

    @property
    def attention_scores(self) -> bool:
        """Whether scores or probabilities are changed, which fused kernels cannot do."""
        changed = "attn_probs" in self.add or "attn_probs" in self.write
        return self.attention_bias is not None or bool(self.suppression) or changed

    def of_cross_attention(self) -> "Edits":
        """Returns what is changed of cross-attention's probabilities, as if of attention's."""

        def renamed(sites: Mapping[str, Any]) -> dict[str, Any]:
            return {"attn_probs": sites["cross_probs"]} if "cross_probs" in sites else {}

        return Edits(add=renamed(self.add), write=renamed(self.write))

    def at(self, site: str, value: jax.Array) -> jax.Array:
        """Returns a site's value in one layer, edited (the layer axis is gone here)."""
        if site in self.add:
            value = value + self.add[site].astype(value.dtype)
        if site in self.steer:
            value = self.steer[site].applied(value)
        if site in self.write:
            write = self.write[site]
            mask = write.mask.reshape(write.mask.shape + (1,) * (value.ndim - write.mask.ndim))
            value = jnp.where(mask, write.value.astype(value.dtype), value)
        return value


def layer_of(edits: Any, layer: int) -> Any:
    """Returns the edits of one layer."""
    return jax.tree.map(lambda leaf: leaf[layer], edits)
