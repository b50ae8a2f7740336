"""Hyperschedules: the noise level of every position at every step, as tables of integers.

Level 0 is clean and level tau, the highest, is nothing but noise ("worthless"). At step s positions
below `settled[s]` are settled; those at level tau are worthless; the others are active, also those
that have just reached level 0.

Reference: "Unifying Autoregressive and Diffusion-Based Sequence Generation", arXiv 2504.06416.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.config import register
from tokjax.errors import ConfigError

EPSILON = 1e-4  # noise of settled positions; active ones keep ten times as far from 0 and 1
FIRST, LAST = 1.0, 1e-5  # ends of a grid of times


@dataclass(frozen=True, eq=False)
class Table:
    """A hyperschedule for rows of L positions: R - 1 steps behind a beginning of pure noise.

    Attributes:
        levels: of each position at each step.
        settled: number of settled positions at each step.
        tau: the highest level.
    """

    levels: Int[np.ndarray, "R L"]
    settled: Int[np.ndarray, "R"]
    tau: int

    @property
    def active(self) -> np.ndarray:
        """Which positions are active at each step, [R L]."""
        unsettled = np.arange(self.levels.shape[1]) >= self.settled[:, None]
        return unsettled & (self.levels < self.tau)

    @property
    def steps(self) -> int:
        """R - 1, the passes of the model that the schedule takes."""
        return len(self.settled) - 1

    def steps_of(self, length: int) -> int:
        """Returns how many steps the first `length` positions take."""
        done = (self.levels[:, :length] == 0).all(1)
        return int(done.argmax()) if done.any() else self.steps


class Hyperschedule(Protocol):
    """What makes tables; registered under the kind "hyperschedule"."""

    def table(self, length: int) -> Table:
        """Returns the table for rows of `length` positions."""
        ...

    def block(self, length: int) -> int:
        """Returns how many positions settle together."""
        ...


@register("hyperschedule", "block")
@dataclass(frozen=True)
class Block:
    """Blocks of positions that go from noise to clean together, one block after the other.

    With width=1 and tau=1 it is autoregression; a width of the whole row is plain diffusion.

    >>> Block(2, 3).table(4).levels.tolist()[2:5]
    [[1, 1, 3, 3], [0, 0, 3, 3], [0, 0, 2, 2]]
    """

    width: int | None = None  # positions of a block; None takes the whole row
    tau: int | None = None  # levels, which are the steps of a block; None takes the width

    def __post_init__(self):
        _check_sizes(self.width, self.tau)

    def block(self, length: int) -> int:
        """Returns the width for rows of `length` positions."""
        return length if self.width is None else min(self.width, length)

    def levels(self, length: int) -> int:
        """Returns tau for rows of `length` positions."""
        return self.tau or self.width or length

    def table(self, length: int) -> Table:
        """Returns the table for rows of `length` positions.

        Raises:
            ConfigError: the length is not positive.
        """
        _check_length(length)
        width, tau = self.block(length), self.levels(length)
        rows = [(np.full(length, tau), 0)]
        for start in range(0, length, width):
            for level in reversed(range(tau)):
                row = np.full(length, tau)
                row[:start], row[start : start + width] = 0, level
                rows.append((row, start))
        return _table(rows, tau)


@register("hyperschedule", "simple_annealing")
@dataclass(frozen=True)
class SimpleAnnealing:
    """A ramp of levels that slides over the row, one position a step.

    Position i of the ramp has the level round(i (tau - 1) / (width - 1)), halves to even. The ramp
    enters with its noisy end.
    """

    width: int = 16  # positions of the ramp
    tau: int | None = None  # levels; None takes the width

    def __post_init__(self):
        _check_sizes(self.width, self.tau)
        if self.width == 1 and (self.tau or 1) > 1:
            raise ConfigError(
                f"width=1 with tau={self.tau}: a ramp of one position never gets clean; set tau=1"
            )

    def block(self, length: int) -> int:
        """Returns 1: positions settle one by one."""
        return 1

    def table(self, length: int) -> Table:
        """Returns the table for rows of `length` positions.

        Raises:
            ConfigError: the length is not positive.
        """
        _check_length(length)
        width, tau = self.width, self.tau or self.width
        ramp = [round(Fraction(i * (tau - 1), max(width - 1, 1))) for i in range(width)]
        whole = np.concatenate([np.zeros(length, int), ramp, np.full(length, tau)])
        rows = [
            (whole[length + width - step :][:length], max(step - width, 0))
            for step in range(length + width)
        ]
        return _table(rows, tau)


@register("hyperschedule", "hybrid")
@dataclass(frozen=True)
class Hybrid:
    """Ramps inside blocks: each position of a block descends one step behind its neighbour.

    A block takes tau + width - 1 steps and settles as a whole. Its positions are active from its
    first step, those that wait at level tau - 1.
    """

    width: int = 16  # positions of a block
    tau: int | None = None  # levels; None takes the width

    def __post_init__(self):
        _check_sizes(self.width, self.tau)

    def block(self, length: int) -> int:
        """Returns the width for rows of `length` positions."""
        return min(self.width, length)

    def table(self, length: int) -> Table:
        """Returns the table for rows of `length` positions.

        Raises:
            ConfigError: the length is not positive.
        """
        _check_length(length)
        width, tau = self.block(length), self.tau or self.width
        rows = [(np.full(length, tau), 0)]
        for start in range(0, length, width):
            size = min(width, length - start)
            for step in range(tau + size - 1):
                row = np.full(length, tau)
                descended = np.maximum(step - np.arange(size), 0)
                row[:start] = 0
                row[start : start + size] = np.maximum(tau - 1 - descended, 0)
                rows.append((row, start))
        return _table(rows, tau)


def autoregressive() -> Block:
    """Returns the hyperschedule of one token after the other."""
    return Block(1, 1)


def full_diffusion(tau: int | None = None) -> Block:
    """Returns the hyperschedule in which all positions get clean together, in tau steps."""
    return Block(None, tau)


def probability(level: Int[Array, "..."], tau: int) -> Float[Array, "..."]:
    """Returns the noise of active positions at a level; with a single level they are all noise.

    >>> [round(float(p), 6) for p in probability(jnp.arange(4), 4)]
    [0.001, 0.333667, 0.666333, 0.999]
    """
    level = jnp.asarray(level)
    if tau == 1:
        return jnp.ones(level.shape, jnp.float32)
    return 10 * EPSILON + level.astype(jnp.float32) * ((1 - 20 * EPSILON) / (tau - 1))


def grid_time(level: Int[Array, "..."], tau: int) -> Float[Array, "..."]:
    """Returns times on an even grid: FIRST at level tau - 1, LAST below level 0 (at -1)."""
    return LAST + (jnp.asarray(level).astype(jnp.float32) + 1) * ((FIRST - LAST) / tau)


def transfers(table: Table) -> Float[Array, "R L"]:
    """Returns the probability that a masked position is unmasked at each step, 0 where not active.

    That is 1 - s / t between the grid's times of this step and the next; at level 0 it is 1.
    """
    levels, active = jnp.asarray(table.levels), jnp.asarray(table.active)
    following = jnp.concatenate([levels[1:], jnp.zeros_like(levels[:1])])
    ratio = grid_time(following, table.tau) / grid_time(levels, table.tau)
    return jnp.where(active, jnp.where(levels == 0, 1.0, 1 - ratio), 0.0)


def _table(rows: list, tau: int) -> Table:
    levels, settled = zip(*rows, strict=True)
    return Table(np.array(levels, np.int32), np.array(settled, np.int32), tau)


def _check_sizes(width: int | None, tau: int | None) -> None:
    for name, value in (("width", width), ("tau", tau)):
        if value is not None and value < 1:
            raise ConfigError(f"hyperschedule {name}={value} must be at least 1, or None")


def _check_length(length: int) -> None:
    if length < 1:
        raise ConfigError(f"a hyperschedule needs rows of at least 1 position, not {length}")
