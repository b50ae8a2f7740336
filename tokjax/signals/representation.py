"""The geometry of a set of hidden states: anisotropy and effective rank, gathered in a stream.

Two small accumulators, each made from a batch, merged over batches and read at the end:
`state_moments` (for everything spectral) and `pair_cosines`. Both also serve as capture
functions, so that every layer is reduced inside the backbone; leaves then lead with a layer axis:

    gather = lambda states: pair_cosines(states, mask)
    found = model.backbone(params, x, capture={"resid_post": gather}).captured["resid_post"]
    total = merge_pair_cosines(total, found)
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.errors import nearest
from tokjax.signals.hidden import l2_norm

KINDS = ("threshold", "entropy", "participation")


@struct.dataclass
class Moments:
    """First and second moments of states.

    Attributes:
        count: number of states.
        mean: their mean.
        scatter: sum of the outer products of their deviations from the mean.
    """

    count: Int[Array, "*L"]
    mean: Float[Array, "*L D"]
    scatter: Float[Array, "*L D D"]


def init_moments(width: int, *leading: int) -> Moments:
    """Returns the moments of no state, of the given width and leading (layer) axes."""
    return Moments(
        count=jnp.zeros(leading, jnp.int32),
        mean=jnp.zeros((*leading, width), jnp.float32),
        scatter=jnp.zeros((*leading, width, width), jnp.float32),
    )


def state_moments(states: Float[Array, "*L B T D"], mask: Bool[Array, "B T"]) -> Moments:
    """Returns the moments of the masked states of a batch."""
    states = states.astype(jnp.float32)
    count = mask.sum().astype(jnp.int32)
    kept = mask[..., None]
    mean = jnp.where(kept, states, 0.0).sum((-3, -2)) / jnp.maximum(count, 1).astype(jnp.float32)
    deviation = jnp.where(kept, states - mean[..., None, None, :], 0.0)
    scatter = jnp.einsum("...btd,...bte->...de", deviation, deviation, precision="highest")
    return Moments(jnp.broadcast_to(count, mean.shape[:-1]), mean, scatter)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Returns the moments of both sets together, from deviations: nothing cancels in float32.

    Reference: Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance" (1983).
    """
    count = a.count + b.count
    share = b.count.astype(jnp.float32) / jnp.maximum(count, 1).astype(jnp.float32)
    apart = b.mean - a.mean
    between = (a.count.astype(jnp.float32) * share)[..., None, None]
    outer = apart[..., :, None] * apart[..., None, :]
    return Moments(
        count=count,
        mean=a.mean + apart * share[..., None],
        scatter=a.scatter + b.scatter + between * outer,
    )


def spectrum(found: Moments, centred: bool) -> Float[Array, "*L D"]:
    """Returns the eigenvalues of the states' second moment, largest first; none is negative.

    They are the squared singular values of the matrix of states, divided by the count.

    Args:
        found: moments of the states.
        centred: take the mean out first (the covariance), as arXiv 2502.15007 does and arXiv
            2302.02060 does not.
    """
    count = jnp.maximum(found.count, 1).astype(jnp.float32)[..., None, None]
    second = found.scatter / count
    if not centred:
        second = second + found.mean[..., :, None] * found.mean[..., None, :]
    return jnp.maximum(jnp.linalg.eigvalsh(second)[..., ::-1], 0.0)


def effective_rank(
    energies: Float[Array, "*L D"],
    kind: Literal["threshold", "entropy", "participation"] = "threshold",
    share: float | Float[Array, ""] = 0.9,
) -> Float[Array, "*L"]:
    """Returns how many dimensions a spectrum effectively has; 0 where it is all zeros.

    `threshold` counts the leading directions that hold at least `share` of the energy (less
    1e-6, without which a share of 1 might never be met): Meng et al., "Representation Deficiency
    in Masked Language Modeling", arXiv 2302.02060, on uncentred states. `entropy` is exp of the
    entropy of the normalised singular values (Roy and Vetterli, "The effective rank: A measure
    of effective dimensionality", 2007). `participation` is the squared sum of the energies over
    the sum of their squares.

    Args:
        energies: squared singular values up to a factor, as of `spectrum`; in any order.
        kind: the definition.
        share: of the energy, for `threshold`.

    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown effective rank {kind!r}.{nearest(kind, KINDS)}")
    energies = energies.astype(jnp.float32)
    sizes = jnp.sqrt(energies) if kind == "entropy" else energies
    total = sizes.sum(-1, keepdims=True)
    p = sizes / jnp.where(total > 0, total, 1.0)
    if kind == "threshold":
        held = jnp.cumsum(jnp.sort(p, axis=-1, descending=True), axis=-1)
        short = (held < share - 1e-6).sum(-1)
        rank = jnp.minimum(short + 1, energies.shape[-1]).astype(jnp.float32)
    elif kind == "entropy":
        rank = jnp.exp(-(p * jnp.log(jnp.where(p > 0, p, 1.0))).sum(-1))
    else:
        squares = jnp.square(p).sum(-1)
        rank = 1.0 / jnp.where(squares > 0, squares, 1.0)
    return jnp.where(total[..., 0] > 0, rank, 0.0)


def spectral_anisotropy(energies: Float[Array, "*L D"]) -> Float[Array, "*L"]:
    """Returns the share of the largest energy: 1 / D when isotropic, 1 on a line; 0 without any.

    Reference: "LLM-Microscope: Uncovering the Hidden Role of Punctuation in Context Memory of
    Transformers", arXiv 2502.15007, on the spectrum of centred states. Not to be confused with
    the mean cosine (`mean_pair_cosine`), which other papers call anisotropy.
    """
    total = energies.sum(-1)
    return jnp.where(total > 0, energies.max(-1) / jnp.where(total > 0, total, 1.0), 0.0)


@struct.dataclass
class PairCosines:
    """Sums from which the mean cosine over all pairs of states of different sequences follows.

    Attributes:
        total: sum of the states, each scaled to length 1.
        within: sum over sequences of the squared length of the sequence's own sum.
        tokens: number of states.
        pairs_within: sum over sequences of the squared number of states.
    """

    total: Float[Array, "*L D"]
    within: Float[Array, "*L"]
    tokens: Int[Array, "*L"]
    pairs_within: Float[Array, "*L"]


def init_pair_cosines(width: int, *leading: int) -> PairCosines:
    """Returns the sums of no state, of the given width and leading (layer) axes."""
    return PairCosines(
        total=jnp.zeros((*leading, width), jnp.float32),
        within=jnp.zeros(leading, jnp.float32),
        tokens=jnp.zeros(leading, jnp.int32),
        pairs_within=jnp.zeros(leading, jnp.float32),
    )


def pair_cosines(states: Float[Array, "*L B T D"], mask: Bool[Array, "B T"]) -> PairCosines:
    """Returns the sums of a batch's masked states; each row is one sequence."""
    states = states.astype(jnp.float32)
    unit = states / jnp.maximum(l2_norm(states), 1e-8)[..., None]
    sums = jnp.where(mask[..., None], unit, 0.0).sum(-2)  # [*L, B, D]
    lengths = mask.sum(-1)
    leading = states.shape[:-3]
    squares = jnp.square(lengths.astype(jnp.float32)).sum()
    return PairCosines(
        total=sums.sum(-2),
        within=jnp.square(sums).sum((-2, -1)),
        tokens=jnp.broadcast_to(lengths.sum().astype(jnp.int32), leading),
        pairs_within=jnp.broadcast_to(squares, leading),
    )


def merge_pair_cosines(a: PairCosines, b: PairCosines) -> PairCosines:
    """Returns the sums of both sets together; their rows are different sequences."""
    return PairCosines(
        total=a.total + b.total,
        within=a.within + b.within,
        tokens=a.tokens + b.tokens,
        pairs_within=a.pairs_within + b.pairs_within,
    )


def mean_pair_cosine(found: PairCosines) -> Float[Array, "*L"]:
    """Returns the mean cosine over all pairs of states of two different sequences.

    This is the anisotropy of Diehl Martinez et al., "Mitigating Frequency Bias and Anisotropy in
    Language Model Pre-Training with Syntactic Smoothing", arXiv 2410.11462: the paper draws some
    thousand random pairs, here is their exact mean over all pairs. With fewer than two
    sequences it is 0. The paper's value of a model is the mean over layers.
    """
    n = found.tokens.astype(jnp.float32)
    pairs = jnp.square(n) - found.pairs_within
    across = jnp.square(found.total).sum(-1) - found.within
    return jnp.where(pairs > 0, across / jnp.where(pairs > 0, pairs, 1.0), 0.0)
