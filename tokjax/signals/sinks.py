"""Attention sinks, massive activations and the direction they share, in one pass of a model.

Attention is collected by a few tokens that say little: the first one, and sometimes others
behind it, the intermediate sinks. Their states point where the first token's does, and hold the
same few features of enormous size.

Reference: Anand et al., "Mitigating Attention Sinks and Massive Activations in Audio-Visual Speech
Recognition with LLMs", arXiv 2510.22603. It gives no thresholds: those here are a recommendation
of tokjax, or of common use.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.errors import ConfigError
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.signals.attention import (
    attention_received,
    attention_sinks,
    head_mean,
    uniform_attention,
    visible_pairs,
)
from tokjax.signals.hidden import MassiveActivations, cosine_to_bos, massive_activations


def first_positions(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns where each token's segment begins, in rows whose segments lie side by side.

    >>> first_positions(jnp.array([[1, 1, 2, 2, 0]])).tolist()
    [[0, 0, 2, 2, 4]]
    """
    T = segments.shape[1]
    begins = segments[:, 1:] != segments[:, :-1]
    begins = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), begins], axis=1)
    return jax.lax.cummax(jnp.where(begins, jnp.arange(T), 0), axis=1)


@struct.dataclass
class SinkRules:
    """What counts as a sink and as a massive activation. Other values compile nothing.

    Attributes:
        over_uniform: a sink's mass, over its share of uniform attention.
        over_median: a sink's mass, over the median of the other candidates.
        activation: absolute size of a massive activation; 0 for small models leaves the relative
            rule alone.
        activation_over_median: its size over the layer's median.
    """

    over_uniform: float = 5.0
    over_median: float = 10.0
    activation: float = 100.0
    activation_over_median: float = 1000.0


@struct.dataclass
class SinkReport:
    """What a pass shows of sinks, by layer and token.

    Attributes:
        first: where each token's segment begins.
        there: real tokens.
        mass: attention that a key gets, averaged over heads and the queries that see it.
        uniform: the mass that it had if attention were uniform.
        sinks: keys that pass both thresholds of mass.
        cosines: of each state with that of its segment's first token; layer 0 is the embeddings,
            the last one what the last block writes.
        before_mlp: the largest activation of each token between attention and feed-forward.
        after_mlp: the same behind the block.
    """

    first: Int[Array, "B T"]
    there: Bool[Array, "B T"]
    mass: Float[Array, "L B T"]
    uniform: Float[Array, "B T"]
    sinks: Bool[Array, "L B T"]
    cosines: Float[Array, "L1 B T"]
    before_mlp: MassiveActivations
    after_mlp: MassiveActivations

    @property
    def behind(self) -> Bool[Array, "B T"]:
        """Real tokens that are not the first of their segment."""
        return self.there & (jnp.arange(self.first.shape[1]) != self.first)

    @property
    def intermediate(self) -> Bool[Array, "L B T"]:
        """Sinks behind the first token."""
        return self.sinks & self.behind

    @property
    def same_feature(self) -> Bool[Array, "L B T"]:
        """Whether a token's largest activation is the feature that is the first token's largest."""
        feature = self.after_mlp.feature
        at = jnp.broadcast_to(self.first, feature.shape)
        return (feature == jnp.take_along_axis(feature, at, axis=-1)) & self.there


def activation_ratio(
    found: MassiveActivations, tokens: Bool[Array, "B T"] | None = None
) -> Float[Array, "*L"]:
    """Returns the largest activation of each layer over its median; 0 where there is none.

    Args:
        found: as of `massive_activations`.
        tokens: whose activations are meant; default all.
    """
    sizes = found.largest if tokens is None else jnp.where(tokens, found.largest, 0.0)
    median = found.median
    ratio = sizes.max((-2, -1)) / jnp.where(median > 0, median, 1.0)
    return jnp.where(median > 0, ratio, 0.0)


@partial(jax.jit, static_argnames=("model", "include_self"))
def find_sinks(
    model: Transformer,
    params: Params,
    x: Float[Array, "B T D"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    candidates: Bool[Array, "B T"] | None = None,
    rules: SinkRules | None = None,
    include_self: bool = True,
) -> SinkReport:
    """Returns sinks, massive activations and cosines of a pass over embeddings.

    Attention is reduced inside each layer: [L, B, H, T, T] never exists. For tokens x is
    `model.embed(params, tokens)`. Shares of uniform attention are those of a layer without sliding
    window.

    Args:
        model: that writes text.
        params: its parameters.
        x: what the first block reads, continuous inputs included.
        positions: of the tokens; default 0, 1, ...
        segments: tokens attend within their own; 0 is filling. Default one a row.
        candidates: keys that may be sinks, the first token included: for speech recognition all
            but the output. Default all real tokens.
        rules: thresholds; default those of `SinkRules`.
        include_self: whether a token's attention to itself counts.

    Raises:
        ConfigError: the model sees both sides: nothing is first there.
    """
    if not model.config.causal:
        raise ConfigError("sinks of first tokens are those of causal models, not of encoders")
    rules = SinkRules() if rules is None else rules
    segments = jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments
    first, there = first_positions(segments), segments > 0
    candidates = there if candidates is None else candidates & there
    visible = visible_pairs(there, segments)
    pairs = visible_pairs(there, segments, include_self)
    uniform = attention_received(uniform_attention(visible), pairs)

    def mass(attention: Array) -> Array:
        return attention_received(head_mean(attention), pairs)

    def activations(states: Array) -> MassiveActivations:
        return massive_activations(
            states,
            there,
            rules.activation,
            rules.activation_over_median,
        )

    cosines: Callable[[Array], Array] = lambda states: cosine_to_bos(states, first)  # noqa: E731
    captured = model.backbone(
        params,
        x,
        positions=positions,
        segments=segments,
        capture={
            "attn_probs": mass,
            "resid_pre": cosines,
            "resid_mid": activations,
            "resid_post": lambda states: (cosines(states), activations(states)),
        },
    ).captured
    behind, after = captured["resid_post"]
    before = captured["resid_pre"]
    masses = captured["attn_probs"]
    return SinkReport(
        first=first,
        there=there,
        mass=masses,
        uniform=uniform,
        sinks=attention_sinks(
            masses,
            uniform,
            candidates,
            rules.over_uniform,
            rules.over_median,
        ),
        cosines=jnp.where(there, jnp.concatenate([before[:1], behind]), 0.0),
        before_mlp=captured["resid_mid"],
        after_mlp=after,
    )
