"""Which checkpoints are kept: the newest, every so many steps, and the best by a metric."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tokjax.errors import ConfigError
from tokjax.training.manifest import Manifest


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, which are kept, and what happens to a damaged one.

    Raises:
        ConfigError: a number below one, or an unknown mode.
    """

    every_steps: int = 1000  # optimiser steps from one save to the next
    keep: int = 3  # the newest that are kept
    keep_every: int | None = None  # steps divisible by this are kept for ever; None: none
    best_metric: str | None = None  # the best checkpoint by this metric is kept, too
    best_mode: Literal["min", "max"] = "min"  # whether the smallest or the largest is the best
    asynchronous: bool = True  # write in the background while training goes on
    strict: bool = False  # a damaged checkpoint is an error instead of a warning and a fall-back

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"checkpoints.{name} is {value}; it must be at least 1")
        if self.best_mode not in ("min", "max"):
            raise ConfigError(f"checkpoints.best_mode is {self.best_mode!r}; use 'min' or 'max'")


def best_step(manifests: Iterable[Manifest], config: CheckpointConfig) -> int | None:
    """Returns the step with the best finite `best_metric`, the earliest of equals; None if none."""
    if config.best_metric is None:
        return None
    sign = 1.0 if config.best_mode == "min" else -1.0
    scored = [
        (sign * manifest.metrics[config.best_metric], manifest.step)
        for manifest in manifests
        if math.isfinite(manifest.metrics.get(config.best_metric, math.nan))
    ]
    return min(scored)[1] if scored else None


def kept_steps(manifests: Iterable[Manifest], config: CheckpointConfig) -> set[int]:
    """Returns the steps that the configuration keeps.

    The newest are those committed last: after a run was continued from an earlier step, higher
    steps of its first course are older.
    """
    manifests = sorted(manifests, key=lambda manifest: manifest.serial)
    kept = {manifest.step for manifest in manifests[-config.keep :]}
    if config.keep_every is not None:
        kept |= {manifest.step for manifest in manifests if manifest.step % config.keep_every == 0}
    best = best_step(manifests, config)
    return kept if best is None else kept | {best}
