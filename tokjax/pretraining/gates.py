"""How much of a target's mass a smoothed objective leaves on the true token, as training goes on.

Reference: Diehl Martinez et al., "Mitigating Frequency Bias and Anisotropy in Language Model
Pre-Training with Syntactic Smoothing", arXiv 2410.11462, and its code.
"""

import math
import typing
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.errors import ConfigError, nearest

_STEEP = 10.0  # of the exponential and logarithmic courses


@dataclass(frozen=True)
class Gate:
    """A share that stays as it is, or rises from one value to another during the training."""

    # constant stays at `start`; the others rise from `start` to `end`; step jumps there
    course: Literal["constant", "linear", "quad", "root", "exp", "log", "step"] = "linear"
    start: float = 0.5  # before and at the beginning of the rise
    end: float = 1.0  # at the end of the rise and behind it; 1 trains on the true token alone
    first: float = 0.0  # share of the training's steps at which the rise begins
    last: float = 1.0  # share of the training's steps at which it ends

    def __post_init__(self):
        courses = typing.get_args(type(self).__annotations__["course"])
        if self.course not in courses:
            raise ConfigError(
                f"unknown gate.course={self.course!r}.{nearest(self.course, courses)}"
            )
        for name in ("start", "end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"gate.{name}={getattr(self, name)} must lie in [0, 1]: a share")
        if self.course != "constant" and not self.start < self.end:
            raise ConfigError(
                f"gate.start={self.start} must be below gate.end={self.end} for the course "
                f"{self.course!r}; a gate that stays has the course 'constant'"
            )
        if not 0 <= self.first < self.last <= 1:
            raise ConfigError(
                f"gate.first={self.first} must be below gate.last={self.last}, both in [0, 1]: "
                f"they are shares of the training"
            )

    @property
    def always_one(self) -> bool:
        """Whether the true token keeps all mass throughout."""
        return self.course == "constant" and self.start == 1

    def at(self, progress: float | Float[Array, ""]) -> Float[Array, ""]:
        """Returns the gate after a share of the training, from 0 to 1.

        >>> [round(float(Gate("log").at(r)), 5) for r in (0, 0.01, 0.5, 1)]
        [0.5, 0.76997, 0.96535, 1.0]
        """
        start, end = jnp.float32(self.start), jnp.float32(self.end)
        if self.course == "constant":
            return start
        r = (jnp.asarray(progress, jnp.float32) - self.first) / (self.last - self.first)
        r = jnp.clip(r, 0.0, 1.0)
        if self.course == "step":
            return jnp.where(r < 1, start, end)
        risen = {
            "linear": lambda: r,
            "quad": lambda: jnp.square(r),
            "root": lambda: jnp.sqrt(r),
            "exp": lambda: jnp.expm1(_STEEP * r) / math.expm1(_STEEP),
            "log": lambda: jnp.minimum(1 + jnp.log(r + math.exp(-_STEEP)) / _STEEP, 1.0),
        }[self.course]()
        # Exactly 1 at the end of a gate that goes there: then nothing is smoothed.
        return jnp.where(r < 1, start + (end - start) * risen, end)
