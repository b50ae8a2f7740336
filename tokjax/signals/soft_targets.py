"""Targets that are distributions over the vocabulary: label smoothing, distillation, mixtures."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax import struct
from tokjax.signals.vocabulary import block_ids


def inner_product(features: Float[Array, "n F"], keys: Float[Array, "v F"]) -> Float[Array, "n v"]:
    """Returns the products of features in full float32: they are logarithms."""
    return jnp.einsum("nf,vf->nv", features, keys, precision="highest")


@struct.dataclass
class Kernel:
    """Dense distributions that are functions of a few features of a position and of each id.

    They are computed tile by tile, so that neither [B, T, V] nor a table [R, V] exists. With K of
    them at a position, they add up.

    Attributes:
        features: of the positions.
        keys: of the ids.
        mass: of each distribution.
        omitted: the id that each distribution gives nothing, or None.
        log_prob: (features, keys) -> the log-probability of each id, normalised by the features.
    """

    features: Float[Array, "B T K F"]
    keys: Float[Array, "V G"] | None
    mass: Float[Array, "B T K"]
    omitted: Int[Array, "B T K"] | None = None
    log_prob: Callable[..., Any] = struct.field(pytree_node=False, default=inner_product)


@struct.dataclass
class SoftTargets:
    """A target distribution at each position, as the sum of the parts that are given.

    Its cross entropy with the model is `sum_v q_v * -logprob_v`, whatever q sums to. Targets are
    constants: no gradient flows into them.

    The mass that a sparse distribution leaves over is dropped, unless `uniform` takes it:
    `SoftTargets(ids, probs, uniform=1 - probs.sum(-1))`.

    Attributes:
        ids: the ids of a sparse distribution; an id may repeat, its masses add up.
        probs: their masses.
        rows: dense distributions. [R V]: a table that `row_ids` points into, so that positions
            share rows (a smoothing kernel of each syntactic class, say). [B T V]: one of its own
            for each position, for vocabularies small enough to hold that.
        row_ids: the row of each position; only with a table of rows.
        row_probs: the mass on the row; 1 when absent.
        uniform: mass spread evenly over all V ids (label smoothing, Szegedy et al. 2016,
            arXiv 1512.00567, section 7). Infinite loss where a token is impossible.
        kernel: dense distributions that are computed where they are needed, for vocabularies too
            large for rows.
    """

    ids: Int[Array, "B T K"] | None = None
    probs: Float[Array, "B T K"] | None = None
    rows: Float[Array, "R V"] | Float[Array, "B T V"] | None = None
    row_ids: Int[Array, "B T"] | None = None
    row_probs: Float[Array, "B T"] | None = None
    uniform: Float[Array, "B T"] | None = None
    kernel: Kernel | None = None

    def weighted(self, weights: Float[Array, "B T"]) -> "SoftTargets":
        """Returns the targets with every mass of a position times its weight."""
        row_probs = weights if self.row_probs is None else weights * self.row_probs
        kernel = self.kernel
        if kernel is not None:
            kernel = replace(kernel, mass=weights[..., None] * kernel.mass)
        return replace(
            self,
            probs=None if self.probs is None else weights[..., None] * self.probs,
            row_probs=None if self.rows is None else row_probs,
            uniform=None if self.uniform is None else weights * self.uniform,
            kernel=kernel,
        )

    def check(self, leading: tuple[int, ...], vocabulary: int) -> None:
        """Raises ValueError when the parts do not fit positions [B, T], V ids or each other."""
        parts = (self.ids, self.rows, self.uniform, self.kernel)
        if all(part is None for part in parts):
            raise ValueError("soft targets need ids with probs, rows, a uniform mass, or a kernel")
        self._check_kernel(leading, vocabulary)
        if (self.ids is None) != (self.probs is None):
            raise ValueError("soft targets need both ids and probs, or neither")
        expected = {"ids": 3, "probs": 3, "row_ids": 2, "row_probs": 2, "uniform": 2}
        for name, ndim in expected.items():
            a = getattr(self, name)
            if a is not None and (a.ndim != ndim or a.shape[:2] != leading):
                axes = "[B, T, K]" if ndim == 3 else "[B, T]"
                raise ValueError(
                    f"soft targets' {name} {a.shape} must be {axes} for x of {leading}"
                )
        if self.ids is not None and self.probs is not None and self.ids.shape != self.probs.shape:
            raise ValueError(
                f"soft targets' ids {self.ids.shape} and probs {self.probs.shape} must be alike"
            )
        if self.rows is None:
            if self.row_ids is not None or self.row_probs is not None:
                raise ValueError("soft targets' row_ids and row_probs need rows")
        elif self.row_ids is None and self.rows.shape != (*leading, vocabulary):
            raise ValueError(
                f"soft targets' rows {self.rows.shape} without row_ids must be [B, T, V] = "
                f"{(*leading, vocabulary)}; for a table of rows give row_ids"
            )
        elif self.row_ids is not None and self.rows.shape[1:] != (vocabulary,):
            raise ValueError(
                f"soft targets' rows {self.rows.shape} with row_ids must be [R, V] for a "
                f"vocabulary of {vocabulary}"
            )

    def _check_kernel(self, leading: tuple[int, ...], vocabulary: int) -> None:
        if self.kernel is None:
            return
        for name, ndim in {"features": 4, "mass": 3, "omitted": 3}.items():
            a = getattr(self.kernel, name)
            if a is not None and (a.ndim != ndim or a.shape[:3] != self.kernel.mass.shape[:3]):
                raise ValueError(
                    f"the kernel's {name} {a.shape} must lead with the axes [B, T, K] of its mass "
                    f"{self.kernel.mass.shape}"
                )
        if self.kernel.mass.shape[:2] != leading:
            raise ValueError(f"the kernel's mass {self.kernel.mass.shape} must be of x {leading}")
        keys = self.kernel.keys
        if keys is None or keys.shape[0] != vocabulary:
            raise ValueError(
                f"the kernel needs keys of all {vocabulary} ids, not "
                f"{None if keys is None else keys.shape}"
            )

    def split(self) -> tuple["SoftTargets", "Shared"]:
        """Returns what belongs to single positions, and what they share."""
        own, rows, keys = self, None, None
        if self.row_ids is not None:
            own, rows = replace(own, rows=None), self.rows
        if self.kernel is not None:
            own, keys = replace(own, kernel=replace(self.kernel, keys=None)), self.kernel.keys
        return own, Shared(rows, keys)


@struct.dataclass
class Shared:
    """What the soft targets of all positions have in common.

    Attributes:
        rows: the table that `row_ids` points into.
        keys: of the kernel.
    """

    rows: Float[Array, "R V"] | None = None
    keys: Float[Array, "V G"] | None = None


def label_smoothing(
    targets: Int[Array, "B T"],
    epsilon: float,
    rows: Float[Array, "R V"] | None = None,
    row_ids: Int[Array, "B T"] | None = None,
) -> SoftTargets:
    """Returns 1 - epsilon on the target and epsilon on a row of the table, or on all ids evenly.

    >>> label_smoothing(jnp.array([[3]]), 0.25).uniform.tolist()
    [[0.25]]
    """
    rest = jnp.full(targets.shape, epsilon, jnp.float32)
    hard = SoftTargets(ids=targets[..., None], probs=1.0 - rest[..., None])
    if rows is None:
        return replace(hard, uniform=rest)
    return replace(hard, rows=rows, row_ids=row_ids, row_probs=rest)


def soft_tile(
    soft: SoftTargets,
    shared: Shared,
    start: int | Int[Array, ""],
    vocabulary: int,
    size: int,
) -> Float[Array, "n v"]:
    """Returns the targets [n ...] over the block of ids at `start`; 0 where ids came before."""
    ids, fresh = block_ids(start, vocabulary, size)
    q = jnp.zeros((1, size), jnp.float32)
    if soft.ids is not None and soft.probs is not None:
        q = q + at_ids(soft.ids, soft.probs, ids)
    if soft.uniform is not None:
        q = q + soft.uniform[:, None].astype(jnp.float32) / vocabulary
    table = shared.rows
    rows = soft.rows if table is None else table
    if rows is not None:
        rows = jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1).astype(jnp.float32)
        rows = rows if table is None else rows[soft.row_ids]
        q = q + (rows if soft.row_probs is None else soft.row_probs[:, None] * rows)
    if soft.kernel is not None and shared.keys is not None:
        keys = jax.lax.dynamic_slice_in_dim(shared.keys, start, size)
        q = q + _kernel_tile(soft.kernel, keys, ids)
    return jnp.where(fresh, q, 0.0) if vocabulary % size else q


def _kernel_tile(kernel: Kernel, keys: Float[Array, "v G"], ids: Int[Array, "v"]) -> Any:
    """Returns the kernel's distributions over a block of ids, added up."""
    found = jnp.zeros((1, ids.shape[0]), jnp.float32)
    for k in range(kernel.mass.shape[1]):
        logs = kernel.log_prob(kernel.features[:, k], keys)
        if kernel.omitted is not None:
            logs = jnp.where(kernel.omitted[:, k, None] == ids, -jnp.inf, logs)
        found = found + kernel.mass[:, k, None] * jnp.exp(logs)
    return found


def at_ids(
    targets: Int[Array, "n K"], values: Float[Array, "n K"], ids: Int[Array, "v"]
) -> Float[Array, "n v"]:
    """Returns the values at their targets' columns, added up, and 0 elsewhere.

    One comparison of the tile per target: it fuses with what uses the tile, which a scatter does
    not, and the scatter of a CPU is serial.
    """
    found = jnp.zeros((1, ids.shape[0]), jnp.float32)
    for k in range(targets.shape[1]):
        hit = targets[:, k, None] == ids
        found = found + jnp.where(hit, values[:, k, None].astype(jnp.float32), 0.0)
    return found
