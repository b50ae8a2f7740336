"""Optimisers and learning-rate schedules by configuration; optax does the work.

Optimisers are built for a learning rate of 1; the training step multiplies by the schedule's
value, so that a schedule is a function of the step within its stage and needs no state.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from optax import contrib

from tokjax.config import register
from tokjax.errors import ConfigError, nearest
from tokjax.models import lora, parameters
from tokjax.models.config import ModelConfig
from tokjax.training.objective import HEADS


def decay_mask(config: ModelConfig, embeddings: bool) -> Callable[[Any], Any]:
    """Returns the function of the trained parameters that says which ones weight decay applies to.

    To matrices, those of an objective's heads included, and to embeddings if asked for.
    """

    def decays(path: str, p: Any, stacked: int) -> bool:
        return len(p.shape) > 1 and bool(stacked or embeddings or path.startswith(HEADS))

    return of_trained(config, decays)


def of_trained(config: ModelConfig, function: Callable[..., Any]) -> Callable[[Any], Any]:
    """Returns the function that gives a value to each trained parameter.

    Those are the model's (of a model with adapters, the adapters) and, where the objective has
    some, its heads'.

    Args:
        config: of the model.
        function: see `parameters.map_table`; it is also asked for arrays of heads.
    """
    values = parameters.map_table(config, function)
    if config.lora is not None:
        values = lora.split(values)[1]

    def of(params: Any) -> Any:
        if HEADS not in params:
            return values
        of_head = jax.tree.map(lambda leaf: function(HEADS, leaf, 0), params[HEADS])
        return {**values, HEADS: of_head}

    return of


class Optimizer(Protocol):
    """A configuration that builds an optax transformation."""

    peak_lr: float

    def build(self, config: ModelConfig) -> optax.GradientTransformation:
        """Returns the transformation at learning rate 1."""
        ...


def _check(config: Any, **limits: tuple[float, float]) -> None:
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if not low <= value < high:
            above = "" if high == _INFINITE else f" and below {high}"
            raise ConfigError(f"{name}={value} must be at least {low}{above}")


def _check_share(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"{name}={getattr(config, name)} must lie within 0 and 1")


_INFINITE = float("inf")
EMBEDDING = "embedding"  # path of the table of the tokens' vectors


@register("optimizer", "adamw")
@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

    peak_lr: float = 1e-3  # learning rate at the top of the schedule
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # times the learning rate, each step
    decay_embeddings: bool = True  # weight decay on embeddings and output head too
    # rows of the embedding table that decay in a step: all; or only those with a gradient, of
    # tokens that were read, so that rare tokens decay as rarely as they learn (untied tables)
    decay_rows: Literal["all", "touched"] = "all"

    def __post_init__(self):
        _check(
            self,
            peak_lr=(0, _INFINITE),
            b1=(0, 1),
            b2=(0, 1),
            eps=(0, _INFINITE),
            weight_decay=(0, _INFINITE),
        )
        if self.decay_rows not in ("all", "touched"):
            raise ConfigError(
                f"unknown decay_rows={self.decay_rows!r}."
                f"{nearest(str(self.decay_rows), ('all', 'touched'))}"
            )

    def build(self, config: ModelConfig) -> optax.GradientTransformation:
        """Returns the transformation at learning rate 1.

        Raises:
            ConfigError: `decay_rows="touched"` for a table that is the output head too, whose rows
                all have a gradient in every step.
        """
        mask = decay_mask(config, self.decay_embeddings)
        adamw = optax.adamw(
            1.0, self.b1, self.b2, self.eps, weight_decay=self.weight_decay, mask=mask
        )
        if self.decay_rows == "all":
            return adamw
        if config.tie_embeddings:
            raise ConfigError(
                "optimizer.decay_rows='touched' needs model.tie_embeddings=False: each token has a "
                "gradient in every step where its vector is in the softmax too"
            )
        by = self.weight_decay if self.decay_embeddings else 0.0
        return _sparing_untouched(adamw, by)


def _sparing_untouched(
    adamw: optax.GradientTransformation, weight_decay: float
) -> optax.GradientTransformation:
    """Returns AdamW that does not decay rows of the embedding table without gradient."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        found: Any
        found, state = adamw.update(updates, state, params)
        if EMBEDDING not in params:
            return found, state
        untouched = (updates[EMBEDDING] == 0).all(-1, keepdims=True)
        table = params[EMBEDDING]
        given_back = (weight_decay * table.astype(jnp.float32)).astype(table.dtype)
        spared = found[EMBEDDING] + jnp.where(untouched, given_back, 0)
        return {**found, EMBEDDING: spared}, state

    return optax.GradientTransformation(adamw.init, update)


@register("optimizer", "lion")
@dataclass(frozen=True)
class Lion:
    """Lion (Chen et al. 2023, arXiv 2302.06675)."""

    peak_lr: float = 1e-4  # learning rate at the top of the schedule
    b1: float = 0.9  # interpolation of the update
    b2: float = 0.99  # decay of the moment
    weight_decay: float = 1.0  # times the learning rate, each step
    decay_embeddings: bool = True  # weight decay on embeddings and output head too

    def __post_init__(self):
        _check(self, peak_lr=(0, _INFINITE), b1=(0, 1), b2=(0, 1), weight_decay=(0, _INFINITE))

    def build(self, config: ModelConfig) -> optax.GradientTransformation:
        """Returns the transformation at learning rate 1."""
        mask = decay_mask(config, self.decay_embeddings)
        return optax.lion(1.0, self.b1, self.b2, weight_decay=self.weight_decay, mask=mask)


@register("optimizer", "adafactor")
@dataclass(frozen=True)
class Adafactor:
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235): factored second moments."""

    peak_lr: float = 1e-2  # learning rate at the top of the schedule, relative to each scale
    decay_rate: float = 0.8  # exponent of the second moment's decay
    clipping_threshold: float = 1.0  # largest root mean square of an update
    weight_decay: float = 0.0  # times the learning rate, each step
    decay_embeddings: bool = True  # weight decay on embeddings and output head too

    def __post_init__(self):
        _check(
            self,
            peak_lr=(0, _INFINITE),
            decay_rate=(0, 1),
            clipping_threshold=(1e-6, _INFINITE),
            weight_decay=(0, _INFINITE),
        )

    def build(self, config: ModelConfig) -> optax.GradientTransformation:
        """Returns the transformation at learning rate 1."""
        return optax.adafactor(
            1.0,
            decay_rate=self.decay_rate,
            clipping_threshold=self.clipping_threshold,
            weight_decay_rate=self.weight_decay or None,
            weight_decay_mask=decay_mask(config, self.decay_embeddings),
        )


@register("optimizer", "muon")
@dataclass(frozen=True)
class Muon:
    """Muon (Jordan et al. 2024) on the blocks' matrices, AdamW on everything else."""

    peak_lr: float = 1e-2  # learning rate of the matrices at the top of the schedule
    beta: float = 0.95  # decay of the momentum
    ns_steps: int = 5  # Newton-Schulz iterations
    weight_decay: float = 0.1  # of the matrices, times the learning rate, each step
    adam_lr_ratio: float = 0.1  # AdamW's learning rate over Muon's
    adam_b1: float = 0.9  # decay of AdamW's first moment
    adam_b2: float = 0.95  # decay of AdamW's second moment
    adam_weight_decay: float = 0.0  # of embeddings and output head, times AdamW's learning rate

    def __post_init__(self):
        _check(
            self,
            peak_lr=(0, _INFINITE),
            beta=(0, 1),
            ns_steps=(1, 100),
            weight_decay=(0, _INFINITE),
            adam_lr_ratio=(0, _INFINITE),
            adam_b1=(0, 1),
            adam_b2=(0, 1),
            adam_weight_decay=(0, _INFINITE),
        )

    def build(self, config: ModelConfig) -> optax.GradientTransformation:
        """Returns the transformation at learning rate 1."""
        # Not `contrib.muon`: its AdamW takes Nesterov steps and decays norms and biases too.
        muon = optax.chain(
            contrib.scale_by_muon(
                beta=self.beta,
                ns_steps=self.ns_steps,
                weight_dimension_numbers=_layer_matrices,
            ),
            optax.stateless(_scale_by_shape),
            optax.add_decayed_weights(self.weight_decay),
            optax.scale(-1.0),
        )
        rest = (self.adam_lr_ratio, self.adam_b1, self.adam_b2)
        transforms: dict[Hashable, optax.GradientTransformation] = {
            "muon": muon,
            "tables": optax.adamw(*rest, weight_decay=self.adam_weight_decay),
            "vectors": optax.adam(*rest),
        }

        def label(path: str, p: parameters.Parameter, layers: int) -> str:
            if len(p.shape) < 2:
                return "vectors"
            return "muon" if layers else "tables"

        return optax.partition(transforms, of_trained(config, label))


def _layer_matrices(params: Any) -> Any:
    # Blocks are stacked along axis 0: each layer's matrix is orthogonalised by itself.
    matrix = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree.map(lambda _: matrix, params)


def _scale_by_shape(updates: Any, _: Any) -> Any:
    # A matrix [L, inputs, outputs] that widens takes larger steps (Jordan et al. 2024).
    return jax.tree.map(lambda u: u * max(1.0, u.shape[2] / u.shape[1]) ** 0.5, updates)


class Schedule(Protocol):
    """A configuration that gives the learning rate's factor at a step of a stage."""

    def factor(self, step: Float[Array, ""], steps: int) -> Float[Array, ""]:
        """Returns the factor, 1 at the peak, at `step` of a stage of `steps` steps."""
        ...


def _warmup(step: Float[Array, ""], steps: int) -> jax.Array:
    # Step 0 already learns: a rate of exactly zero would waste its batch.
    return jnp.minimum(1.0, (step + 1.0) / max(steps, 1))


def _check_warmup(config: Any) -> None:
    if config.warmup_steps < 0:
        raise ConfigError(f"warmup_steps={config.warmup_steps} must not be negative")


@register("schedule", "constant")
@dataclass(frozen=True)
class Constant:
    """Warm-up, then the peak."""

    warmup_steps: int = 0  # steps of linear rise

    def __post_init__(self):
        _check_warmup(self)

    def factor(self, step: Float[Array, ""], steps: int) -> Float[Array, ""]:
        """Returns the factor at a step."""
        return _warmup(step, self.warmup_steps)


@register("schedule", "cosine")
@dataclass(frozen=True)
class Cosine:
    """Warm-up, then half a cosine down to a share of the peak at the end of the stage."""

    warmup_steps: int = 100  # steps of linear rise
    final_factor: float = 0.1  # learning rate at the end over the peak

    def __post_init__(self):
        _check_warmup(self)
        _check_share(self, "final_factor")

    def factor(self, step: Float[Array, ""], steps: int) -> Float[Array, ""]:
        """Returns the factor at a step."""
        progress = (step - self.warmup_steps) / max(steps - self.warmup_steps, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
        decayed = self.final_factor + (1 - self.final_factor) * cosine
        return _warmup(step, self.warmup_steps) * decayed


@register("schedule", "wsd")
@dataclass(frozen=True)
class WarmupStableDecay:
    """Warm-up, the peak, and a linear decay over the last share of the stage."""

    warmup_steps: int = 100  # steps of linear rise
    decay_share: float = 0.2  # share of the stage's steps spent decaying
    final_factor: float = 0.0  # learning rate at the end over the peak

    def __post_init__(self):
        _check_warmup(self)
        _check_share(self, "decay_share", "final_factor")

    def factor(self, step: Float[Array, ""], steps: int) -> Float[Array, ""]:
        """Returns the factor at a step."""
        decay_steps = max(round(self.decay_share * steps), 1)
        left = jnp.clip((steps - step) / decay_steps, 0.0, 1.0)
        return _warmup(step, self.warmup_steps) * (
            self.final_factor + (1 - self.final_factor) * left
        )
