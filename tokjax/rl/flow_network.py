"""A small conditional flow over hidden states, and how badly a state fits it.

The network learns the velocity h - n of straight paths x_t = t h + (1 - t) n from noise n to a
state h, given another state. Where its error is large, the state is unlike those it was trained on.

Reference: "Extending Reinforcement Learning for LLMs with Flow Environment", arXiv 2510.10201.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from tokjax.data.batch import Batch
from tokjax.errors import ConfigError, nearest
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.training.objective import of_model
from tokjax.training.passes import forward

_SINES = 256  # numbers that a time or a depth is embedded in
_PERIOD = 10_000.0
_PAIRINGS = ("token_post", "token_pre", "identity")
# (x_t, t, condition, depth of the layer) -> velocity
Velocity = Callable[[Array, Array, Array, Array], Array]


@dataclass(frozen=True)
class FlowConfig:
    """The flow network, and the states it is a model of."""

    depth: int = 4  # residual blocks
    layers: tuple[float, ...] = (0.25, 0.5, 0.75)  # places within the model whose states are read
    # what a state is predicted from: "token_post", the state of the token before; "token_pre", that
    # of the token behind; "identity", itself
    pairing: Literal["token_post", "token_pre", "identity"] = "token_post"
    repeats: int = 2  # draws of noise and time for each state and update

    def __post_init__(self):
        for name in ("depth", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.layers or not all(0 <= q <= 1 for q in self.layers):
            raise ConfigError(f"layers={self.layers} must be places from 0 to 1, one at least")
        if self.pairing not in _PAIRINGS:
            raise ConfigError(
                f"unknown pairing={self.pairing!r}.{nearest(self.pairing, _PAIRINGS)}"
            )

    def blocks(self, n_layers: int) -> tuple[int, ...]:
        """Returns which blocks' outputs are read.

        >>> FlowConfig().blocks(8), FlowConfig().blocks(1)
        ((2, 4, 6), (0,))
        """
        return tuple(sorted({min(round(q * n_layers), n_layers - 1) for q in self.layers}))


def init_flow(key: jax.Array, width: int, depth: int) -> dict[str, Any]:
    """Returns the network's parameters; it returns 0 until it is trained.

    Args:
        key: of random values.
        width: of the states, and of the network.
        depth: residual blocks.
    """
    keys = iter(jax.random.split(key, 6 + 2 * depth))

    def linear(inputs: int, outputs: int) -> dict[str, Array]:
        weight = inputs**-0.5 * jax.random.normal(next(keys), (inputs, outputs), jnp.float32)
        return {"weight": weight, "bias": jnp.zeros(outputs, jnp.float32)}

    def zeros(outputs: int) -> dict[str, Array]:
        return {
            "weight": jnp.zeros((width, outputs), jnp.float32),
            "bias": jnp.zeros(outputs, jnp.float32),
        }

    return {
        "input": linear(width, width),
        "condition": linear(width, width),
        "time": [linear(_SINES, width), linear(width, width)],
        "layer": [linear(_SINES, width), linear(width, width)],
        "blocks": [
            {
                "modulation": zeros(3 * width),
                "mlp": [linear(width, width), linear(width, width)],
            }
            for _ in range(depth)
        ],
        "modulation": zeros(2 * width),
        "output": zeros(width),
    }


def velocity(
    flow: Params,
    x: Float[Array, "*n D"],
    t: Float[Array, "*n"],
    condition: Float[Array, "*n D"],
    layer: Float[Array, "*n"],
) -> Float[Array, "*n D"]:
    """Returns the velocity at x.

    Args:
        flow: see `init_flow`.
        x: on the way from noise (t = 0) to a state (t = 1).
        t: where on the way.
        condition: the other state.
        layer: place of the states' block within the model, from 0 to 1.
    """
    given = (
        _mlp(flow["time"], _sines(t))
        + _mlp(flow["layer"], _sines(layer))
        + _linear(flow["condition"], condition)
    )
    given = jax.nn.silu(given)
    x = _linear(flow["input"], x)
    for block in flow["blocks"]:
        shift, scale, gate = jnp.split(_linear(block["modulation"], given), 3, -1)
        x = x + gate * _mlp(block["mlp"], _rms(x) * (1 + scale) + shift)
    shift, scale = jnp.split(_linear(flow["modulation"], given), 2, -1)
    return _linear(flow["output"], _rms(x) * (1 + scale) + shift)


def _linear(layer: Params, x: Array) -> Array:
    return x @ layer["weight"] + layer["bias"]


def _mlp(layers: Sequence[Params], x: Array) -> Array:
    return _linear(layers[1], jax.nn.silu(_linear(layers[0], x)))


def _rms(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def _sines(values: Array) -> Array:
    rates = np.exp(-math.log(_PERIOD) * np.arange(_SINES // 2) / (_SINES // 2))
    angles = values[..., None] * jnp.asarray(rates, jnp.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def flow_errors(
    network: Velocity,
    states: Float[Array, "*n D"],
    condition: Float[Array, "*n D"],
    layer: Float[Array, "*n"],
    noise: Float[Array, "*n D"],
    t: Float[Array, "*n"],
) -> Float[Array, "*n"]:
    """Returns the mean squared error of the velocity over the dimensions of each state.

    Args:
        network: gives velocities.
        states: h.
        condition: what the network is told of them.
        layer: place of their block within the model, from 0 to 1.
        noise: n.
        t: where between noise and state.
    """
    x = t[..., None] * states + (1 - t[..., None]) * noise
    found = network(x, t, condition, layer)
    return jnp.square(found - (states - noise)).mean(-1)


def whole_rows(batch: Batch) -> Batch:
    """Returns rows of a single segment with their last target as a token more."""

    def longer(first: Array, rest: Array) -> Array:
        return jnp.concatenate([first[:, :1], rest], axis=1)

    return batch.replace(  # type: ignore[attr-defined]
        tokens=longer(batch.tokens, batch.targets),
        positions=longer(batch.positions, batch.positions + 1),
        segment_ids=longer(batch.segment_ids, batch.segment_ids),
    )


def state_pairs(
    config: FlowConfig, model: Transformer, params: Params, batch: Batch, *, whole: bool
) -> tuple[Float[Array, "L B T D"], Float[Array, "L B T D"], Float[Array, "L 1 1"]]:
    """Returns the state of each position's target token, its condition and its layer's place.

    All are constants: no gradient goes into the model.

    Args:
        config: of the flow.
        model: whose states are read.
        params: its parameters; heads are not read.
        batch: of T positions.
        whole: rows of a single segment: the states of their last targets are computed too. Else
            the last position has a state of zeros, and that of a segment means nothing.
    """
    read = whole_rows(batch) if whole else batch
    fixed = jax.lax.stop_gradient(of_model(params))
    out = forward(model, fixed, read, capture={"resid_post"}).captured["resid_post"]
    blocks = config.blocks(model.config.n_layers)
    h = jax.lax.stop_gradient(out[jnp.array(blocks)].astype(jnp.float32))
    if not whole:
        h = jnp.pad(h, ((0, 0), (0, 0), (0, 1), (0, 0)))
    before, own = h[:, :, :-1], h[:, :, 1:]
    layer = jnp.array(blocks, jnp.float32)[:, None, None] / model.config.n_layers
    if config.pairing == "token_pre":
        return before, own, layer
    return own, before if config.pairing == "token_post" else own, layer


def flow_loss(
    flow: Params,
    config: FlowConfig,
    pairs: tuple[Array, Array, Array],
    key: jax.Array,
) -> Float[Array, "B T"]:
    """Returns the flow's error at each position, over layers and draws of noise and time.

    Args:
        flow: see `init_flow`; it gets the gradient.
        config: of it.
        pairs: see `state_pairs`.
        key: of noise and times.
    """
    states, condition, layer = pairs

    def once(key: jax.Array) -> Array:
        of_noise, of_time = jax.random.split(key)
        noise = jax.random.normal(of_noise, states.shape, jnp.float32)
        t = jax.nn.sigmoid(jax.random.normal(of_time, states.shape[:-1], jnp.float32))
        layers = jnp.broadcast_to(layer, t.shape)
        return flow_errors(_of(flow), states, condition, layers, noise, t).mean(0)

    return jnp.stack([once(k) for k in jax.random.split(key, config.repeats)]).mean(0)


def flow_scores(
    network: Velocity | Params,
    pairs: tuple[Array, Array, Array],
    keys: UInt[Array, "B"],
    times: Sequence[float],
) -> Float[Array, "B T"]:
    """Returns t / (1 - t) times the flow's error at fixed times, their mean over layers and times.

    The noise is a function of a row's key, the position and the layer, so that a score depends
    neither on the other rows nor on filling.

    Args:
        network: a flow's parameters, or any function that gives velocities.
        pairs: see `state_pairs`.
        keys: a number of each row.
        times: from 0 to below 1.
    """
    states, condition, layer = pairs
    L, _, T, D = states.shape
    call = network if callable(network) else _of(network)

    def noise_of(key: Array) -> Array:
        row = jax.random.fold_in(jax.random.key(0), key)
        each = jax.vmap(lambda t: jax.random.fold_in(row, t))(jnp.arange(T))
        return jax.vmap(lambda k: jax.random.normal(k, (len(times), L, D), jnp.float32))(each)

    noise = jnp.moveaxis(jax.vmap(noise_of)(keys), (2, 3), (0, 1))  # [times L B T D]
    total = jnp.zeros(states.shape[:-1], jnp.float32)
    layers = jnp.broadcast_to(layer, states.shape[:-1])
    for i, t in enumerate(times):
        at = jnp.full(states.shape[:-1], t, jnp.float32)
        errors = flow_errors(call, states, condition, layers, noise[i], at)
        total = total + t / (1 - t) * errors
    return total.mean(0) / len(times)


def _of(flow: Any) -> Velocity:
    return lambda x, t, condition, layer: velocity(flow, x, t, condition, layer)


def row_numbers(tokens: Int[Array, "B T"], real: Array) -> UInt[Array, "B"]:
    """Returns a number of each row that is a function of its real tokens."""
    powers, p = [], 1
    for _ in range(tokens.shape[1]):
        powers.append(p)
        p = p * 0x9E3779B1 % 2**32
    terms = (tokens.astype(jnp.uint32) + jnp.uint32(1)) * jnp.array(powers, jnp.uint32)
    return jnp.where(real, terms, jnp.uint32(0)).sum(1, dtype=jnp.uint32)
