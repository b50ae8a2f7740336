"""Models that an objective reads and does not train: a backbone, a teacher, a critic, a detector.

An objective names them by its method `frozen(model) -> {name: FrozenModel}`; a run reads their
parameters at every start and puts them where `loss` finds them: `params["frozen"][name]`. They are
in no gradient, no optimiser and no checkpoint, but their fingerprints belong to the run's identity.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tokjax.data.cache import cache_directory
from tokjax.data.tokenizers import Tokenizer, build_tokenizer, same_tokens
from tokjax.errors import ConfigError
from tokjax.models import parameters
from tokjax.models.config import ModelConfig
from tokjax.models.transformer import Transformer
from tokjax.parallel.rules import parameter_shardings
from tokjax.training.initial import Initial, find_initial
from tokjax.training.objective import HEADS, Objective


@dataclass(frozen=True)
class FrozenModel:
    """A checkpoint that an objective reads beside the model in training.

    Attributes:
        initial: the checkpoint.
        model: what it holds; it computes in the type of the model in training, and its parameters
            are held in that type.
        heads: whether the heads that its run trained are read too; they lie under `heads` among
            its parameters.
    """

    initial: Initial
    model: Transformer
    heads: bool = False

    @property
    def parameters(self) -> int:
        """Number of the model's parameters."""
        return sum(parameters.count_parameters(self.model.config).values())

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""
        return _tokenizer(self.initial)

    def abstract_params(self, mesh: Mesh) -> dict[str, Any]:
        """Returns shapes, dtypes and shardings of the parameters."""
        shapes = self.model.abstract_params()
        axes = parameters.logical_axes(self.model.config)
        shardings = parameter_shardings(axes, shapes, mesh)
        if self.heads:
            heads = self.initial.abstract_heads(self.model)
            shapes = {**shapes, HEADS: heads}
            shardings = {
                **shardings,
                HEADS: jax.tree.map(lambda _: NamedSharding(mesh, P()), heads),
            }
        return jax.tree.map(
            lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), shapes, shardings
        )

    def load(self, mesh: Mesh) -> dict[str, Any]:
        """Returns the parameters on the devices.

        Raises:
            CheckpointError: files are missing or damaged.
        """
        return dict(self.initial.load(self.model.config, mesh, heads=self.heads))


def frozen_model(name: str, beside: Transformer, *, heads: bool = False) -> FrozenModel:
    """Returns the frozen model of a checkpoint, described; its parameters are not read yet.

    Args:
        name: of the checkpoint: whatever `init_from` takes.
        beside: the model in training, whose type and kernels are used.
        heads: see `FrozenModel`.

    Raises:
        CheckpointError: there is no such checkpoint.
        ConfigError: it holds no causal language model.
    """
    initial = find_initial(name)
    own = _described(initial)
    config = dataclasses.replace(
        own,
        dtype=beside.config.dtype,
        param_dtype=beside.config.dtype,
        attention=beside.config.attention,
        unroll=beside.config.unroll,
        remat="none",
    )
    return FrozenModel(initial, Transformer(config), heads)


@functools.lru_cache(maxsize=16)  # objectives ask at every trace and every collection
def _described(initial: Initial) -> ModelConfig:
    return initial.model_config()


@functools.lru_cache(maxsize=16)
def _tokenizer(initial: Initial) -> Tokenizer:
    return build_tokenizer(initial.tokenizer(), cache_directory())


def frozen_models(objective: Objective, model: Transformer) -> Mapping[str, FrozenModel]:
    """Returns the models that an objective reads, by name."""
    make = getattr(objective, "frozen", None)
    return {} if make is None else make(model)


def check_frozen(
    objective: Objective, model: Transformer, tokenizer: Tokenizer, seq_len: int
) -> None:
    """Does nothing if the models that an objective reads can read what the run's model does.

    Raises:
        CheckpointError: one does not exist.
        ConfigError: one has another tokenizer, too few positions, or none of the heads that are
            asked for.
    """
    for name, each in frozen_models(objective, model).items():
        if each.heads:
            each.initial.abstract_heads(each.model)
        if not same_tokens(each.tokenizer, tokenizer):
            raise ConfigError(
                f"objective.{name}={each.initial.name!r} has another tokenizer "
                f"({each.tokenizer.title}) than this run ({tokenizer.title}): both must give the "
                f"same ids"
            )
        if seq_len > each.model.config.max_positions:
            raise ConfigError(
                f"data.seq_len={seq_len} is longer than the {each.model.config.max_positions} "
                f"positions of objective.{name}={each.initial.name!r}"
            )
