"""Everything a training run carries from step to step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from tokjax import struct
from tokjax.models import lora, parameters
from tokjax.models.transformer import Transformer
from tokjax.parallel.rules import parameter_shardings
from tokjax.training.objective import FROZEN, HEADS, Aux, Objective, init_heads, of_model


@struct.dataclass
class TrainState:
    """The state of a run; the batch of a step is a function of `step` alone, so no data state.

    Attributes:
        step: steps done.
        params: the parameters that are trained: all, or the adapters of a model that has them;
            and under `heads` those of the objective, if it has any.
        opt_state: the optimiser's state.
        aux: the objective's own state.
        ema: exponential moving average of the parameters, in float32 whatever their type (a
            narrower one would round its small changes away), or None.
        key: random key of the run; step n uses `fold_in(key, n)`.
        frozen: the parameters that are not trained, else (): all but the adapters of a model that
            has them, and under `frozen` the models that the objective reads. They are read from
            their checkpoints at every start and are in none of the run's.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    aux: Aux
    ema: Any
    key: jax.Array
    frozen: Any = ()

    @property
    def whole(self) -> Any:
        """All parameters of the model."""
        return whole(self.frozen, self.params)


def whole(frozen: Any, trained: Any) -> Any:
    """Returns all parameters of a model, of which some are frozen or, with (), none.

    Heads of an objective and the models that it reads stay beside them.
    """
    if not frozen:
        return trained
    base = of_model(frozen)
    beside = {HEADS: trained[HEADS]} if HEADS in trained else {}
    beside |= {FROZEN: frozen[FROZEN]} if FROZEN in frozen else {}
    return (lora.join(base, trained) if base else trained) | beside


def with_models(state: TrainState, models: Mapping[str, Any]) -> TrainState:
    """Returns a state with the parameters of an objective's models in the place of any others."""
    frozen = of_model(state.frozen or {}) | ({FROZEN: dict(models)} if models else {})
    return dataclasses.replace(state, frozen=frozen or ())


def begun(params: Any, objective: Objective, key: jax.Array, model: Transformer) -> Any:
    """Returns trained parameters as an objective begins with them.

    Its own heads are fresh, in the place of any others; where it says `keeps_heads`, those of the
    same shapes are taken on.
    """
    own = of_model(params)
    if hasattr(objective, "begin"):
        own = objective.begin(model, own)  # type: ignore[attr-defined]
    fresh = init_heads(objective, key, model)
    if getattr(objective, "keeps_heads", False) and HEADS in params:
        old, new = (jax.tree.map(jnp.shape, heads) for heads in (params[HEADS], fresh[HEADS]))
        fresh = {HEADS: params[HEADS]} if old == new else fresh
    return own | fresh


def init_state(
    model: Transformer,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    seed: int,
    ema: bool,
    initial: Any = None,
) -> TrainState:
    """Returns the state before the first step; a pure function, to be jitted with shardings.

    Args:
        model: with adapters, they are trained and all else is frozen.
        objective: of the first stage.
        optimizer: of the trained parameters.
        seed: of everything random.
        ema: whether a moving average of the trained parameters is kept.
        initial: parameters to start with, without adapters; None draws them.
    """
    init_key, aux_key, run_key = jax.random.split(jax.random.key(seed), 3)
    head_key = jax.random.fold_in(aux_key, 1)
    params, frozen = model.init(init_key) if initial is None else initial, ()
    if model.config.lora is not None:
        frozen = lora.split(params)[0]
        params = lora.split(model.init(init_key))[1]  # what is not used of it is not computed
    params = begun(params, objective, head_key, model)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        aux=objective.init(aux_key, model, whole(frozen, params)),
        ema=jax.tree.map(lambda p: jnp.copy(p.astype(jnp.float32)), params) if ema else None,
        key=run_key,
        frozen=frozen,
    )


def state_shardings(state: TrainState, model: Transformer, mesh: Mesh) -> TrainState:
    """Returns the sharding of every leaf of an abstract state.

    Whatever mirrors the parameters (moments, moving averages, accumulators) is laid out like
    them: a leaf whose path ends in a parameter's path and has its shape takes its sharding. All
    else is replicated.
    """
    axes = parameters.logical_axes(model.config)
    shapes = jax.eval_shape(lambda: of_model(state.whole))
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
