"""What a run computes, without its data: model, mesh, stages, state and step.

Enough to compile the run's programs, here or ahead of time for devices that are not there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tokjax.data.batch import Batch
from tokjax.models import lora
from tokjax.models.transformer import Transformer
from tokjax.parallel.rules import BATCH_AXES
from tokjax.training.config import TrainConfig
from tokjax.training.frozen import FrozenModel, frozen_models
from tokjax.training.initial import Initial
from tokjax.training.objective import Objective
from tokjax.training.state import TrainState, init_state, state_shardings, with_models
from tokjax.training.step import StepConfig, make_train_step


@dataclass(frozen=True)
class Stage:
    """A part of the run: which steps, and what is minimised."""

    name: str
    objective: Objective
    first_step: int
    steps: int
    keep_optimizer: bool
    rate: float = 1.0

    @property
    def end(self) -> int:
        """The step after the last."""
        return self.first_step + self.steps


@dataclass(frozen=True)
class Program:
    """The part of a run that is compiled."""

    config: TrainConfig
    model: Transformer
    mesh: Mesh
    stages: tuple[Stage, ...]
    initial: Initial | None = None

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return self.stages[-1].end

    def stage_at(self, step: int) -> Stage:
        """Returns the stage that step number `step` (from 0) belongs to."""
        return next(stage for stage in reversed(self.stages) if stage.first_step <= step)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optax transformation, at learning rate 1."""
        return self.config.optimizer.build(self.model.config)

    @cached_property
    def batch_sharding(self) -> NamedSharding:
        """Rows over `data` and `fsdp`, positions over `sequence`."""
        return NamedSharding(self.mesh, P(BATCH_AXES, "sequence"))

    def initial_params(self) -> Any:
        """Returns the parameters of `init_from`, on the devices; None where there is none."""
        if self.initial is None:
            return None
        return self.initial.load(self.model.config, self.mesh)

    def frozen_models(self, stage: Stage) -> Mapping[str, FrozenModel]:
        """Returns the models that a stage's objective reads beside the run's, by name."""
        return frozen_models(stage.objective, self.model)

    def frozen_params(self, stage: Stage) -> dict[str, Any]:
        """Returns the parameters of the stage's frozen models, on the devices."""
        return {name: each.load(self.mesh) for name, each in self.frozen_models(stage).items()}

    def init_state(self, stage: Stage, initial: Any = None) -> TrainState:
        """Returns the state a run starts with in this stage (pure; see `abstract_state`).

        The objective's frozen models are put into it afterwards: see `with_models`.

        Args:
            stage: of the run.
            initial: what `initial_params` returns.
        """
        return init_state(
            self.model,
            stage.objective,
            self.optimizer,
            self.config.seed,
            self.config.ema_decay is not None,
            initial,
        )

    def abstract_state(self, stage: Stage) -> TrainState:
        """Returns shapes, dtypes and shardings of the state."""
        base = None if self.initial is None else lora.off(self.model).abstract_params()
        shapes = jax.eval_shape(lambda initial: self.init_state(stage, initial), base)
        shardings = state_shardings(shapes, self.model, self.mesh)
        state = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            shapes,
            shardings,
        )
        models = self.frozen_models(stage).items()
        return with_models(state, {name: each.abstract_params(self.mesh) for name, each in models})

    def train_step(self, stage: Stage) -> Any:
        """Returns the stage's step function (state, batch) -> (state, metrics), not compiled."""
        config = self.config
        step_config = StepConfig(
            peak_lr=config.optimizer.peak_lr * stage.rate,
            schedule=config.schedule,
            first_step=stage.first_step,
            stage_steps=stage.steps,
            micro_batches=config.micro_batches,
            clip_norm=config.clip_norm,
            ema_decay=config.ema_decay,
        )
        return make_train_step(self.model, stage.objective, self.optimizer, step_config)

    def abstract_batch(
        self,
        rows: int,
        tokens: int,
        segments: int,
        channels: Sequence[str] = (),
        values: Sequence[str] = (),
        group: int = 1,
    ) -> Batch:
        """Returns shapes and shardings of a batch.

        Args:
            rows: of all devices.
            tokens: of a row.
            segments: examples that a row has room for.
            channels: names of the values beside each target.
            values: names of the values of each example.
            group: examples that belong together.
        """
        by_token = self.batch_sharding
        by_row = NamedSharding(by_token.mesh, P(*by_token.spec[:1]))

        def array(columns: int, dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((rows, columns), dtype, sharding=sharding)

        ints = array(tokens, jnp.int32, by_token)
        floats = array(tokens, jnp.float32, by_token)
        examples = array(segments, jnp.int32, by_row)
        by_segment = dict.fromkeys(values, array(segments, jnp.float32, by_row))
        beside = dict.fromkeys(channels, floats)
        parts: Any = (ints, ints, ints, ints, floats, examples, beside, by_segment, group)
        return Batch(*parts)

    def compile_step(self, stage: Stage, batch: Batch) -> Any:
        """Returns a stage's training step, compiled for the state and a batch of these shapes."""
        return self.lower_step(stage, batch).compile()

    def lower_step(self, stage: Stage, batch: Batch) -> Any:
        """Returns a stage's training step, traced but not compiled. Needs the mesh in force."""
        abstract = self.abstract_state(stage)
        shardings = jax.tree.map(lambda s: s.sharding, abstract)
        step = self.train_step(stage)
        return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(
            abstract, batch
        )
