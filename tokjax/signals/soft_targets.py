"""Targets that are distributions over the vocabulary: label smoothing, distillation, mixtures."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax import struct
from tokjax.signals.vocabulary import block_ids


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
    """

    ids: Int[Array, "B T K"] | None = None
    probs: Float[Array, "B T K"] | None = None
    rows: Float[Array, "R V"] | Float[Array, "B T V"] | None = None
    row_ids: Int[Array, "B T"] | None = None
    row_probs: Float[Array, "B T"] | None = None
    uniform: Float[Array, "B T"] | None = None

    def weighted(self, weights: Float[Array, "B T"]) -> "SoftTargets":
        """Returns the targets with every mass of a position times its weight."""
        row_probs = weights if self.row_probs is None else weights * self.row_probs
        return replace(
            self,
            probs=None if self.probs is None else weights[..., None] * self.probs,
            row_probs=None if self.rows is None else row_probs,
            uniform=None if self.uniform is None else weights * self.uniform,
        )

    def check(self, leading: tuple[int, ...], vocabulary: int) -> None:
        """Raises ValueError when the parts do not fit positions [B, T], V ids or each other."""
        if self.ids is None and self.rows is None and self.uniform is None:
            raise ValueError("soft targets need ids with probs, rows, or a uniform mass")
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

    def split(self) -> tuple["SoftTargets", jax.Array | None]:
        """Returns what belongs to single positions, and the table that they share."""
        if self.row_ids is None:
            return self, None
        return replace(self, rows=None), self.rows


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
    table: Float[Array, "R V"] | None,
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
    rows = soft.rows if table is None else table
    if rows is not None:
        rows = jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1).astype(jnp.float32)
        rows = rows if table is None else rows[soft.row_ids]
        q = q + (rows if soft.row_probs is None else soft.row_probs[:, None] * rows)
    return jnp.where(fresh, q, 0.0) if vocabulary % size else q


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
