"""What the vector of one token is asked for: gradients of embedding rows, context by context.

Gradients here are those of the input: a row's part in the softmax of a tied head is left out.

Reference: Vennam et al., "Rethinking Thinking Tokens: Understanding Why They Underperform in
Practice" (arXiv 2411.11371), which finds that a token in many unlike contexts gets gradients that
cancel. The measures are recommendations of tokjax.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from tokjax import struct
from tokjax.data.batch import Batch
from tokjax.models.edits import Edits
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.signals.hidden import cosine, l2_norm
from tokjax.signals.weighted_nll import weighted_nll

EditsOf = Callable[[Int[Array, "B T"]], Edits]


def context_gradients(
    model: Transformer,
    params: Params,
    batch: Batch,
    ids: Sequence[int],
    *,
    mean: bool = True,
    edits: EditsOf | None = None,
) -> Float[Array, "B R W"]:
    """Returns the gradient of the next-token loss of each row of a batch by some embedding rows.

    Args:
        model: a causal language model.
        params: its parameters.
        batch: each row is one context.
        ids: of the rows, each once.
        mean: of a context's loss over its weights; otherwise the sum. Means, weighted by each
            context's sum of weights, average to the gradient of the batch's mean loss.
        edits: function from a batch's tokens to interventions in the pass over it.
    """
    table = params["embedding"]
    own = jnp.asarray(ids, jnp.int32)

    def loss(rows: Float[Array, "R W"], one: Batch) -> Float[Array, ""]:
        hits = one.tokens[..., None] == own
        which = hits.argmax(-1).astype(jnp.int32)
        x = model.embed({**params, "embedding": table}, one.tokens)
        chosen = model.embed({**params, "embedding": rows}, which)
        return _loss(model, params, jnp.where(hits.any(-1)[..., None], chosen, x), one, mean, edits)

    def of_context(one: Batch) -> Float[Array, "R W"]:
        return jax.grad(loss)(table[own], jax.tree.map(lambda leaf: leaf[None], one))

    return jax.vmap(of_context)(batch)


def occurrence_gradients(
    model: Transformer,
    params: Params,
    batch: Batch,
    *,
    mean: bool = True,
    edits: EditsOf | None = None,
) -> Float[Array, "B T W"]:
    """Returns the gradient of each row's loss by a copy of its own of each token's embedding.

    Those of a token's occurrences add up to what `context_gradients` says of its row.

    Args:
        model: a causal language model.
        params: its parameters.
        batch: each row is one context.
        mean: as in `context_gradients`.
        edits: as in `context_gradients`.
    """
    B, T = batch.tokens.shape
    places = jnp.arange(B * T, dtype=jnp.int32).reshape(B, T)

    def loss(copies: Float[Array, "N W"]) -> Float[Array, ""]:
        x = model.embed({**params, "embedding": copies}, places)
        return _loss(model, params, x, batch, mean, edits)

    copies = params["embedding"][batch.tokens.reshape(-1)]
    # No context sees another, so that one backward pass finds the gradients of all.
    return jax.grad(loss)(copies).reshape(B, T, -1)


def _loss(
    model: Transformer,
    params: Params,
    x: Float[Array, "B T D"],
    batch: Batch,
    mean: bool,
    edits: EditsOf | None,
) -> Float[Array, ""]:
    """Returns the sum over rows of their next-token losses."""
    weights = batch.weights.astype(jnp.float32)
    if mean:
        sums = weights.sum(-1, keepdims=True)
        weights = weights / jnp.where(sums == 0, 1.0, sums)
    out = model.backbone(
        params,
        x,
        positions=batch.positions,
        segments=batch.segment_ids,
        edits=None if edits is None else edits(batch.tokens),
    )
    return weighted_nll(out.x, model.head(params), batch.targets[..., None], weights[..., None])[0]


def pairwise_cosine(
    gradients: Float[Array, "*N W"] | Float[np.ndarray, "*N W"],
) -> Float[Array, ""]:
    """Returns the mean cosine over all pairs of vectors; zeros are left out, 0 without a pair.

    With u the n vectors scaled to length 1 it is (|sum u|^2 - n) / (n (n - 1)).

    >>> round(float(pairwise_cosine(jnp.array([[1.0, 0.0], [-2.0, 0.0]]))), 4)
    -1.0
    """
    g = jnp.asarray(gradients, jnp.float32).reshape(-1, gradients.shape[-1])
    # Lengths first by the largest coordinate: tiny gradients must not be lost when squared.
    size = jnp.abs(g).max(-1, keepdims=True)
    scaled = g / jnp.where(size > 0, size, 1.0)
    length = l2_norm(scaled)[:, None]
    unit = scaled / jnp.where(length > 0, length, 1.0)
    n = (size > 0).sum().astype(jnp.float32)
    pairs = n * (n - 1)
    return (jnp.square(unit.sum(0)).sum() - n) / jnp.where(pairs > 0, pairs, 1.0) * (pairs > 0)


@struct.dataclass
class Cumulative:
    """Sums over steps of the vectors of R rows.

    Attributes:
        total: their sum.
        length: the sum of their lengths.
        steps: how many were not zero.
    """

    total: Float[Array, "R W"]
    length: Float[Array, "R"]
    steps: Int[Array, "R"]


def init_cumulative(rows: int, width: int) -> Cumulative:
    """Returns the sums of no step."""
    return Cumulative(
        jnp.zeros((rows, width), jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(rows, jnp.int32),
    )


def add_step(sums: Cumulative, vectors: Float[Array, "R W"]) -> Cumulative:
    """Returns the sums with the vectors of one more step."""
    vectors = vectors.astype(jnp.float32)
    length = l2_norm(vectors)
    return Cumulative(
        sums.total + vectors,
        sums.length + length,
        sums.steps + (length > 0).astype(jnp.int32),
    )


def cancellation(sums: Cumulative) -> Float[Array, "R"]:
    """Returns rho, how long the sum is beside the sum of the lengths; 0 where all are zero.

    1 says that all steps point one way, 0 that they cancel. Of n random directions it is about
    1 / sqrt(n), so compare what has equally many steps (`Cumulative.steps`).

    >>> sums = add_step(init_cumulative(1, 2), jnp.array([[3.0, 4.0]]))
    >>> cancellation(add_step(sums, jnp.array([[-3.0, -4.0]]))).tolist()
    [0.0]
    """
    some = sums.length > 0
    return l2_norm(sums.total) / jnp.where(some, sums.length, 1.0) * some


def displacement(
    now: Float[Array, "R W"], start: Float[Array, "R W"]
) -> tuple[Float[Array, "R"], Float[Array, "R"]]:
    """Returns how far rows are from their start, and the cosine with it (0 for a row of zeros).

    >>> far, cosine = displacement(jnp.array([[0.0, 2.0]]), jnp.array([[0.0, 1.0]]))
    >>> far.tolist(), cosine.tolist()
    ([1.0], [1.0])
    """
    now, start = now.astype(jnp.float32), start.astype(jnp.float32)
    return l2_norm(now - start), cosine(now, start)


@struct.dataclass
class RowHistory:
    """What happened to R embedding rows in training.

    Attributes:
        start: the rows before the first step.
        now: the rows behind the latest one.
        gradients: sums of the raw gradients of the steps.
        updates: sums of what the optimiser did to the rows.
        cosine: sum over steps of the mean pairwise cosine of the contexts' gradients.
        measured: steps in which a row had gradients in two contexts or more.
    """

    start: Float[Array, "R W"]
    now: Float[Array, "R W"]
    gradients: Cumulative
    updates: Cumulative
    cosine: Float[Array, "R"]
    measured: Int[Array, "R"]

    @property
    def mean_cosine(self) -> Float[Array, "R"]:
        """The mean over steps of the mean pairwise cosine; 0 without any."""
        some = jnp.maximum(self.measured, 1).astype(jnp.float32)
        return self.cosine / some


def begin_history(rows: Float[Array, "R W"]) -> RowHistory:
    """Returns the history of rows before the first step."""
    rows = jnp.asarray(rows, jnp.float32)
    R, W = rows.shape
    return RowHistory(
        rows,
        rows,
        init_cumulative(R, W),
        init_cumulative(R, W),
        jnp.zeros(R, jnp.float32),
        jnp.zeros(R, jnp.int32),
    )


def observe(
    history: RowHistory,
    gradients: Float[Array, "B R W"],
    scored: Float[Array, "B"],
    rows: Float[Array, "R W"],
) -> RowHistory:
    """Returns the history with one more step.

    Args:
        history: so far.
        gradients: of the contexts' mean losses, as of `context_gradients`, before the step.
        scored: each context's sum of weights.
        rows: behind the step.
    """
    share = scored.astype(jnp.float32) / jnp.maximum(scored.sum(), 1e-12)
    rows = rows.astype(jnp.float32)
    there = (jnp.abs(gradients).max(-1) > 0).sum(0)
    cosines = jax.vmap(pairwise_cosine, in_axes=1)(gradients)
    return dataclasses.replace(
        history,
        now=rows,
        gradients=add_step(history.gradients, jnp.einsum("b,brw->rw", share, gradients)),
        updates=add_step(history.updates, rows - history.now),
        cosine=history.cosine + cosines,
        measured=history.measured + (there > 1).astype(jnp.int32),
    )


def matched_tokens(
    counts: Shaped[np.ndarray, "V"] | Sequence[int],
    token: int,
    *,
    exclude: Sequence[int] = (),
    most: int = 1,
    within: float = 2.0,
) -> list[int]:
    """Returns the tokens nearest to one in how often they occur, the nearest first.

    Args:
        counts: occurrences of each id.
        token: to be matched; it must occur.
        exclude: ids that are no control, for example all thinking tokens.
        most: how many tokens at most.
        within: largest ratio of the two counts, either way.

    Raises:
        ValueError: the token does not occur, or no other is within the ratio.

    >>> matched_tokens([8, 2, 7, 100], 0)
    [2]
    """
    found = np.asarray(counts, float)
    if not 0 <= token < found.size or not found[token] > 0:
        raise ValueError(f"token {token} does not occur: nothing is as frequent")
    if not within >= 1:
        raise ValueError(f"within={within} must be at least 1")
    apart = np.abs(np.log(np.maximum(found, 1e-9)) - np.log(found[token]))
    apart[found <= 0] = np.inf
    apart[[token, *exclude]] = np.inf
    order = np.argsort(apart, kind="stable")
    chosen: list[Any] = order[apart[order] <= np.log(within) + 1e-9][:most].tolist()
    if not chosen:
        raise ValueError(
            f"no token occurs within {within:g} times as often as token {token} "
            f"({found[token]:g} times): allow a larger ratio"
        )
    return chosen
