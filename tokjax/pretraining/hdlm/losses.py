"""What noised tokens cost: weighted cross entropy, score entropy, and that of settled tokens."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax.models.encoder import Encoder
from tokjax.models.head import logits as logits_of
from tokjax.models.parameters import Params
from tokjax.pretraining.hdlm.epsilon import FLOOR, EpsilonHybrid, Noised
from tokjax.pretraining.hdlm.gamma import GammaHybrid
from tokjax.pretraining.hdlm.passes import head_without, read
from tokjax.signals import weighted_nll
from tokjax.training.objective import Loss, Ratio

_CHUNK_LOGITS = 2**22  # of the score entropy at a time


def cross_entropy(
    model: Encoder,
    params: Params,
    x: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    noised: Noised,
    p: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    noise: EpsilonHybrid,
    mask_id: int,
) -> Loss:
    """Returns the weighted cross entropy of active tokens under the epsilon-hybrid noise.

    Metrics: `bound`, that of masked tokens over p, by active token (nats; with continuous times and
    blocks it bounds the negative log-likelihood), `nll` of masked and `nll_visible` of visible
    tokens, and the share that is `masked`.

    Args:
        model: the model.
        params: its parameters.
        x: states that predict.
        tokens: the clean ones.
        noised: the same under noise.
        p: probability of the mask.
        weights: of active tokens; 0 elsewhere.
        noise: of the tokens.
        mask_id: the mask, which is never predicted.
    """
    by_kind = noise.weights(noised, weights != 0, p)
    head = head_without(model, params, mask_id)
    total, nll = weighted_nll(
        read(model, params, x), head, tokens[..., None], (by_kind * weights)[..., None]
    )
    active = weights.sum()
    masked = jnp.where(noised.masked, weights, 0.0)
    visible = jnp.where(noised.masked, 0.0, weights)
    nll = jnp.where(weights == 0, 0.0, nll[..., 0])
    metrics: dict[str, Ratio] = {
        "bound": ((masked * nll / jnp.maximum(p, FLOOR)).sum(), active),
        "nll": ((masked * nll).sum(), masked.sum()),
        "nll_visible": ((visible * nll).sum(), visible.sum()),
        "masked": (masked.sum(), active),
    }
    return Loss(total, active, metrics)


def score_entropy(
    model: Encoder,
    params: Params,
    x: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    noised: Noised,
    p: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    noise: GammaHybrid,
    mask_id: int,
) -> Loss:
    """Returns the score entropy of active tokens under the gamma-hybrid noise, at times p.

    For the arguments see `cross_entropy`. Logits exist for one chunk of tokens at a time and are
    computed again for the gradient.
    """
    head = head_without(model, params, mask_id)
    assert head.bias is not None  # it makes the mask impossible
    # The mask's own logit is not read, and must not be infinite where differences are taken.
    head = replace(head, bias=jnp.where(jnp.isfinite(head.bias), head.bias, 0.0))
    time = jnp.maximum(p, FLOOR)

    @partial(jax.checkpoint, prevent_cse=False)
    def one(inputs: Any) -> Array:
        state, present, clean, t = inputs
        z = logits_of(head, state[None])
        sigma = noise.sigma(t)[None]
        return noise.score_entropy(z, present[None], clean[None], sigma, mask_id)[0]

    states = read(model, params, x)
    flat = (states.reshape(-1, states.shape[-1]), noised.tokens.ravel(), tokens.ravel())
    size = max(1, min(_CHUNK_LOGITS // head.table.shape[0], tokens.size))
    found = jax.lax.map(one, (*flat, time.ravel()), batch_size=size).reshape(tokens.shape)
    found = jnp.where(weights == 0, 0.0, noise.rate(time) * found * weights)
    active, masked = weights.sum(), jnp.where(noised.masked, weights, 0.0)
    replaced = jnp.where(noised.replaced, weights, 0.0)
    metrics: dict[str, Ratio] = {
        "score_entropy": (jax.lax.stop_gradient(found.sum()), active),
        "masked": (masked.sum(), active),
        "replaced": (replaced.sum(), active),
    }
    return Loss(found.sum(), active, metrics)


def mean_of_settled(
    model: Encoder,
    params: Params,
    x: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    mask_id: int,
) -> tuple[Float[Array, ""], dict[str, Ratio]]:
    """Returns the mean cross entropy of settled tokens, 0 where there are none, and a metric."""
    head = head_without(model, params, mask_id)
    total, _ = weighted_nll(read(model, params, x), head, tokens[..., None], weights[..., None])
    count = weights.sum()
    metrics = {"nll_settled": (jax.lax.stop_gradient(total), count)}
    return total / jnp.maximum(count, 1e-9), metrics
