"""Everything a training run carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from tokjax.models import parameters
from tokjax.models.transformer import Transformer
from tokjax.parallel.rules import parameter_shardings
from tokjax.training.objective import Aux, Objective


@struct.dataclass
class TrainState:
    """The state of a run; the batch of a step is a function of `step` alone, so no data state.

    Attributes:
        step: steps done.
        params: the model's parameters.
        opt_state: the optimiser's state.
        aux: the objective's own state.
        ema: exponential moving average of the parameters, in float32 whatever their type (a
            narrower one would round its small changes away), or None.
        key: random key of the run; step n uses `fold_in(key, n)`.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    aux: Aux
    ema: Any
    key: jax.Array


def init_state(
    model: Transformer,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    seed: int,
    ema: bool,
) -> TrainState:
    """Returns the state before the first step; a pure function, to be jitted with shardings."""
    init_key, aux_key, run_key = jax.random.split(jax.random.key(seed), 3)
    params = model.init(init_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        aux=objective.init(aux_key, model, params),
        ema=jax.tree.map(lambda p: jnp.copy(p.astype(jnp.float32)), params) if ema else None,
        key=run_key,
    )


def state_shardings(state: TrainState, model: Transformer, mesh: Mesh) -> TrainState:
    """Returns the sharding of every leaf of an abstract state.

    Whatever mirrors the parameters (moments, moving averages, accumulators) is laid out like
    them: a leaf whose path ends in a parameter's path and has its shape takes its sharding. All
    else is replicated.
    """
    axes = parameters.logical_axes(model.config)
    shapes = jax.eval_shape(lambda: state.params)
    shardings = parameter_shardings(axes, shapes, mesh)
    by_path = {
        jax.tree_util.keystr(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
        )
    }
    replicated = NamedSharding(mesh, P())

    def layout(path: tuple, leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            shape, sharding = by_path.get(jax.tree_util.keystr(path[start:]), (None, replicated))
            if shape == leaf.shape:
                return sharding
        return replicated

    return jax.tree_util.tree_map_with_path(layout, state)
