"""The contract between an objective and the training step.

An objective is a frozen dataclass (its fields are its configuration), registered under the kind
"objective". It returns sums, never means: the training step adds the sums of all micro-batches
and devices and divides once, so that k micro-batches give exactly what one large batch gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
from jaxtyping import Array, Float

from tokjax import struct
from tokjax.data.batch import Batch
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer

if TYPE_CHECKING:
    from tokjax.data.tokenizers import Tokenizer

HEADS = "heads"  # the key of an objective's own parameters among those that are trained
FROZEN = "frozen"  # the key of the models that an objective reads, beside those parameters
Aux = Any  # extra trainable or running state of an objective; () when it has none
Ratio = tuple[Float[Array, ""], Float[Array, ""]]


@dataclass(frozen=True)
class Materials:
    """What a run has before its first step, for objectives that are prepared with it.

    Attributes:
        tokenizer: the run's.
        model: in training.
        stores: the training data, in the order of the configuration.
        cache: folder for what is made once.
        show_progress: whether people are shown what takes long.
    """

    tokenizer: "Tokenizer"
    model: Transformer
    stores: Sequence[Any]
    cache: Path
    show_progress: bool = True


@struct.dataclass
class Loss:
    """What an objective returns for one micro-batch.

    Attributes:
        total: sum of weighted losses, the quantity that is differentiated.
        weight: what the accumulated total is divided by.
        metrics: name -> (sum, weight); reported as the ratio of the accumulated sums.
        aux: the objective's state after this micro-batch.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: dict[str, Ratio] = struct.field(default_factory=dict)
    aux: Aux = ()


class Objective(Protocol):
    """Something a model can be trained on.

    More attributes are read where an objective has them: `reads_pairs`, `reads_rankings` and
    `reads_translations` (it takes pairs of answers, queries with passages, or pairs of
    translations, and nothing else), `evaluates` (held-out data are evaluated by it, not by the
    next-token loss) and `relative_cost` (model FLOPs of a step over those of next-token
    prediction).

    An objective with parameters of its own (a head of values or scores) has the method
    `init_heads(key, model) -> dict`: they are trained beside the model's by the same optimiser,
    kept in checkpoints, and given to `loss` as `params["heads"]`. With the attribute `head_rate`
    they learn at that multiple of the learning rate and are clipped by themselves (a mapping gives
    each head its own, and each is clipped by itself); one that says `keeps_heads` takes on those of
    the stage before where they have the same shapes.

    One that reads other models (a backbone, a teacher, a critic) has the method
    `frozen(model) -> dict`, which names them; `loss` is given their parameters as
    `params["frozen"]`, `init` is not. See `tokjax.training.frozen`.

    One that depends on the tokenizer or on statistics of the training data has the method
    `prepared(materials) -> objective`: what it returns takes its place in the run. Its attribute
    `content`, if it has one, maps those of its fields that stand for files to digests of them:
    they belong to the run's identity in the place of the paths.

    One whose loss changes as training goes on has the method `advance(aux, progress) -> aux`: it is
    given the share of the stage's steps that are done (a scalar in [0, 1)) before each step.

    One that needs a model that sees both sides says `bidirectional = True`, one that takes either
    `None`; all others need a causal one.

    One whose model writes text only together with the objective's own heads says `heads_write`.

    One whose stage does not begin with the parameters as they are has the method
    `begin(model, params) -> params`, which is given those that are trained.
    """

    @property
    def tokens_per_position(self) -> int:
        """Data tokens that one position of the model consumes (1 except for patches)."""
        ...

    def init(self, key: jax.Array, model: Transformer, params: Params) -> Aux:
        """Returns the objective's initial state."""
        ...

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns the loss of a micro-batch as sums."""
        ...


class Collector(Protocol):
    """Makes the batches of a stage from the model in training.

    An objective whose data the model makes itself (reinforcement learning) has the method
    `collector(run, stage, workdir) -> Collector`, a context manager that is open while the stage
    runs. A collection serves `period` steps: the run stops and saves only between collections,
    which are functions of the seed, the step and the parameters, so that it resumes exactly.

    Attributes:
        period: steps that one collection serves.
        channels: names of the values beside each target, as in `Batch.channels`.
    """

    period: int
    channels: tuple[str, ...]

    def batch(self, state: Any, step: int) -> tuple[Batch, dict[str, float], list[str]]:
        """Returns the batch of a step of the stage (from 0) on the devices.

        And, with the first batch of a collection, its metrics and what people should be warned of.

        Args:
            state: before the step.
            step: within the stage; the same collection's steps are asked for in order.
        """
        ...

    def __enter__(self) -> "Collector": ...

    def __exit__(self, *error: Any) -> None: ...


def init_heads(objective: Objective, key: jax.Array, model: Transformer) -> dict[str, Any]:
    """Returns the objective's own parameters as a part of those that are trained, or nothing.

    Args:
        objective: of a stage.
        key: of random values.
        model: that they are trained beside.
    """
    make = getattr(objective, "init_heads", None)
    return {} if make is None else {HEADS: make(key, model)}


def of_model(params: Params) -> dict[str, Any]:
    """Returns a model's own parameters: those without what belongs to the objective."""
    return {name: value for name, value in params.items() if name not in (HEADS, FROZEN)}


class PerToken:
    """An objective whose positions each consume one data token."""

    @property
    def tokens_per_position(self) -> int:
        """One token a position."""
        return 1


class WithoutState:
    """An objective, or a part of one, that carries nothing from step to step."""

    def init(self, key: jax.Array, model: Transformer, params: Params) -> Aux:
        """Returns nothing: there is no state."""
        return ()
