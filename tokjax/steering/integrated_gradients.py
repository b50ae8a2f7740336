"""Integrated gradients: how much each input token moves the log-probability of an answer."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax import struct
from tokjax.errors import ConfigError
from tokjax.models.transformer import Transformer
from tokjax.signals.token_stats import token_stats

Rule = Literal["gauss", "midpoint", "right"]
Target = Literal["last", "response"]


def quadrature(steps: int, rule: Rule = "gauss") -> tuple[np.ndarray, np.ndarray]:
    """Returns points and weights that integrate over 0 to 1.

    >>> points, weights = quadrature(3)
    >>> round(float((weights * points**4).sum()), 6)
    0.2

    Args:
        steps: number of points.
        rule: "gauss" (Gauss-Legendre), "midpoint", or "right": the right end of each of `steps`
            equal parts, of which 1 is gradient times input.

    Raises:
        ConfigError: no step, or an unknown rule.
    """
    if steps < 1:
        raise ConfigError(f"steps={steps} must be at least 1")
    if rule == "gauss":
        points, weights = np.polynomial.legendre.leggauss(steps)
        return (points + 1) / 2, weights / 2
    if rule not in ("midpoint", "right"):
        raise ConfigError(f"rule={rule!r} must be 'gauss', 'midpoint' or 'right'")
    shift = 0.5 if rule == "midpoint" else 1.0
    return (np.arange(steps) + shift) / steps, np.full(steps, 1 / steps)


def integrated_gradients(
    function: Callable[[Float[Array, "..."]], Float[Array, "..."]],
    x: Float[Array, "..."],
    baseline: Float[Array, "..."] | None = None,
    *,
    steps: int = 20,
    rule: Rule = "gauss",
) -> Float[Array, "..."]:
    """Returns (x - baseline) times the mean gradient on the way from the baseline to x, in float32.

    Their sum is function(x) - function(baseline), up to the error of the rule.

    >>> function = lambda x: x[0] * x[1] + 2 * x[2]
    >>> integrated_gradients(function, jnp.array([1.0, 2.0, -1.0])).round(5).tolist()
    [1.0, 1.0, -2.0]

    Args:
        function: if it returns several values, each row of x must act on its own value only.
        x: the input.
        baseline: default zeros.
        steps: number of gradients; computed one after the other.
        rule: where on the way; see `quadrature`.

    Reference: Sundararajan et al., "Axiomatic Attribution for Deep Networks", arXiv 1703.01365.
    """
    points, weights = (jnp.asarray(a, jnp.float32) for a in quadrature(steps, rule))
    start = jnp.zeros_like(x) if baseline is None else baseline
    start, way = start.astype(jnp.float32), (x - start).astype(jnp.float32)
    slope = jax.grad(lambda inputs: function(inputs.astype(x.dtype)).sum())

    def add(total, node):
        point, weight = node
        return total + weight * slope(start + point * way), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(way), (points, weights))
    return way * total


def answer_logprob(
    model: Transformer,
    params: Any,
    x: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    starts: Int[Array, "B"],
    target: Target = "last",
) -> Float[Array, "B"]:
    """Returns each row's log-probability of its last token, or of all tokens of its response.

    Both are read from the logits one position earlier than the token.

    Args:
        model: the model.
        params: its parameters.
        x: embeddings of the tokens, or what takes their place.
        tokens: ids; what follows a row's length has no effect.
        lengths: number of tokens of each row, at least 2.
        starts: where each row's response begins, at least 1.
        target: "last" or "response".
    """
    out = model.backbone(params, x)
    T = tokens.shape[1]
    targets = jnp.roll(tokens, -1, axis=1)  # at position t the token that comes next
    at = jnp.arange(T)
    chosen = (at + 1 < lengths[:, None]) & (at + 1 >= starts[:, None])
    states = out.x
    if target == "last":
        last = (lengths - 2)[:, None]
        states = jnp.take_along_axis(states, last[..., None], axis=1)
        targets, chosen = jnp.take_along_axis(targets, last, axis=1), jnp.ones_like(last, bool)
    nll = token_stats(states, model.head(params), targets, want=("nll",)).nll
    assert nll is not None
    return -jnp.where(chosen, nll, 0.0).sum(-1)


@struct.dataclass
class Attribution:
    """What each token adds to a log-probability.

    Attributes:
        scores: of each token; 0 behind a row's length.
        change: of the log-probability from the baseline to the text: what a row's scores add up
            to, but for the error of the integration.
    """

    scores: Float[Array, "B T"]
    change: Float[Array, "B"]


def attribute_tokens(
    model: Transformer,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    starts: Int[Array, "B"],
    *,
    baseline_id: int | Int[Array, ""] | None = None,
    target: Target = "last",
    steps: int = 20,
    rule: Rule = "gauss",
) -> Attribution:
    """Returns what each token adds to the log-probability of its row's answer.

    In a decoder with RMSNorm and no learned absolute positions the log-probability does not depend
    on the scale of the embeddings: at zero embeddings it jumps, and more steps do not help. There
    the sum of the scores misses `change`; a baseline of PAD embeddings does not have this fault.

    Args:
        model: the model.
        params: its parameters.
        tokens: ids; what follows a row's length has no effect.
        lengths: number of tokens of each row, at least 2.
        starts: where each row's response begins, at least 1.
        baseline_id: id whose embedding is the baseline at every position; None takes zeros.
        target: log-probability of the "last" token, or of the whole "response".
        steps: number of gradients.
        rule: of the integration; "right" with 1 step is gradient times input.

    Reference: GrAInS, arXiv 2507.18043.
    """
    x = model.embed(params, tokens)
    baseline = jnp.zeros_like(x)
    if baseline_id is not None:
        baseline = model.embed(params, jnp.full_like(tokens, baseline_id))

    def function(inputs):
        return answer_logprob(model, params, inputs, tokens, lengths, starts, target)

    parts = integrated_gradients(function, x, baseline, steps=steps, rule=rule)
    scores = jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], parts.sum(-1), 0.0)
    return Attribution(scores, function(x) - function(baseline))
