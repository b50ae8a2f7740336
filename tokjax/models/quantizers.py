"""Quantisers of vectors: nearest entries of codebooks, each on what the one before has left.

The socket is `Quantizer`. State is an argument and a result: codebooks that learn by gradients
are trained like any other weights, those that learn by running means are replaced by the state
that a call in training returns. Vectors that the mask leaves out change neither losses nor state.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.errors import ConfigError

_SMOOTHING = 1e-5  # added to the running count of each entry, so that an unused one stays finite


class Quantized(NamedTuple):
    """What a quantiser makes of vectors.

    Attributes:
        z_q: the vectors that the codes stand for; their gradient is that of the input.
        ids: one for each level.
        losses: what is to be added to a training loss, by name, already weighted.
        state: the next one.
    """

    z_q: Float[Array, "*B D"]
    ids: Int[Array, "*B L"]
    losses: dict[str, Float[Array, ""]]
    state: Any


class Quantizer(Protocol):
    """Something that turns vectors into codes; hashable and without arrays."""

    def init(self, key: jax.Array) -> Any:
        """Returns a state of random entries."""
        ...

    def __call__(
        self, x: Float[Array, "*B D"], mask: Bool[Array, "*B"] | None, state: Any, train: bool
    ) -> Quantized:
        """Returns the codes of vectors.

        Args:
            x: the vectors.
            mask: true where there is one; None everywhere.
            state: of the quantiser.
            train: whether the state may change, and codes be shared out evenly.
        """
        ...

    def decode(self, state: Any, ids: Int[Array, "*B L"]) -> Float[Array, "*B D"]:
        """Returns the vectors that codes stand for."""
        ...


@struct.dataclass
class Codebooks:
    """The entries of each level, and what running means of them need.

    Attributes:
        codes: the entries.
        counts: how many vectors each has had, a running mean; None where gradients train them.
        sums: of those vectors; None likewise.
    """

    codes: Float[Array, "L K D"]
    counts: Float[Array, "L K"] | None = None
    sums: Float[Array, "L K D"] | None = None


@dataclass(frozen=True)
class ResidualQuantizer:
    """Codebooks one behind the other, each on the residual of those before; one level is plain VQ.

    A level's residual is r - sg(q). Losses are means over levels, vectors and dimensions of
    |sg(r) - q|^2 (only with `update="gradient"`) and `commitment` |r - sg(q)|^2.

    Attributes:
        width: D of the vectors.
        levels: number of codebooks.
        size: entries of each.
        commitment: weight of the second loss.
        update: entries learn by gradients of the first loss, or are running means of the vectors
            that chose them.
        decay: of the running means.
        balance: for each level the epsilon of the Sinkhorn iterations that share codes out evenly
            in training; 0 takes the nearest entry. () is 0 everywhere.

    Reference: Lee et al., "Autoregressive Image Generation using Residual Quantization", arXiv
    2203.01941; running means: van den Oord et al., arXiv 1711.00937, appendix A.1.
    """

    width: int
    levels: int = 4
    size: int = 256
    commitment: float = 0.25
    update: Literal["gradient", "ema"] = "gradient"
    decay: float = 0.99
    balance: tuple[float, ...] = ()

    def __post_init__(self):
        for name in ("width", "levels", "size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.update not in ("gradient", "ema"):
            raise ConfigError(f"update={self.update!r} must be 'gradient' or 'ema'")
        if not self.commitment >= 0 or not 0 <= self.decay < 1:
            raise ConfigError(
                f"commitment={self.commitment} must be 0 or more, decay={self.decay} at least 0 "
                f"and below 1"
            )
        if self.balance and len(self.balance) != self.levels:
            raise ConfigError(
                f"balance has {len(self.balance)} values for levels={self.levels}: give one for "
                f"each, 0 for the nearest entry"
            )
        if any(not epsilon >= 0 for epsilon in self.balance):
            raise ConfigError(f"balance={self.balance} must not be negative")

    def init(self, key: jax.Array) -> Codebooks:
        """Returns a state of random entries; `from_data` makes a better one."""
        shape = (self.levels, self.size, self.width)
        return self._state(jax.random.normal(key, shape) / self.size)

    def from_data(self, key: jax.Array, x: Float[Array, "N D"], iterations: int = 10) -> Codebooks:
        """Returns a state whose entries are k-means of vectors, then of what is left of them.

        Args:
            key: of the first centres.
            x: vectors.
            iterations: of each k-means.
        """
        codes = []
        for own in jax.random.split(key, self.levels):
            centres = kmeans(own, x, self.size, iterations)
            codes.append(centres)
            x = x - centres[distances(x, centres).argmin(-1)]
        return self._state(jnp.stack(codes))

    def _state(self, codes: Float[Array, "L K D"]) -> Codebooks:
        if self.update == "gradient":
            return Codebooks(codes)
        # The sums are those of one vector each, so that the first step does not throw codes about.
        return Codebooks(codes, jnp.ones(codes.shape[:2]), codes)

    def __call__(
        self,
        x: Float[Array, "*B D"],
        mask: Bool[Array, "*B"] | None,
        state: Codebooks,
        train: bool = False,
    ) -> Quantized:
        """Returns the codes of vectors; see `Quantizer`."""
        flat = x.reshape(-1, self.width)
        kept = jnp.ones(len(flat), bool) if mask is None else mask.reshape(-1)
        weight = kept[:, None] / jnp.maximum(kept.sum() * self.width, 1)
        residual, ids, near, moved = flat, [], [], []
        codebook = commitment = jnp.float32(0.0)
        for level in range(self.levels):
            codes = state.codes[level]
            away = distances(jax.lax.stop_gradient(residual), jax.lax.stop_gradient(codes))
            epsilon = self.balance[level] if self.balance and train else 0.0
            own = sinkhorn_ids(away, kept, epsilon) if epsilon > 0 else away.argmin(-1)
            q = codes[own]
            codebook += (weight * jnp.square(jax.lax.stop_gradient(residual) - q)).sum()
            commitment += (weight * jnp.square(residual - jax.lax.stop_gradient(q))).sum()
            moved.append((jax.lax.stop_gradient(residual), own))
            residual = residual - jax.lax.stop_gradient(q)
            ids.append(own)
            near.append(q)
        total = jax.lax.stop_gradient(sum(near) - flat)
        losses = {"commitment": self.commitment * commitment / self.levels}
        if self.update == "gradient":
            losses["codebook"] = codebook / self.levels
        elif train:
            state = self._averaged(state, moved, kept)
        shape = x.shape[:-1]
        return Quantized(
            (flat + total).reshape(x.shape),
            jnp.stack(ids, axis=-1).astype(jnp.int32).reshape(*shape, self.levels),
            losses,
            state,
        )

    def decode(self, state: Codebooks, ids: Int[Array, "*B L"]) -> Float[Array, "*B D"]:
        """Returns the vectors that codes stand for: the sum of their entries."""
        return state.codes[jnp.arange(self.levels), ids].sum(-2)

    def _averaged(self, state: Codebooks, moved: list, kept: Bool[Array, "N"]) -> Codebooks:
        """Returns the running means with these vectors."""
        assert state.counts is not None and state.sums is not None, "a state without running means"
        counts, sums, codes = [], [], []
        some = kept.any()
        for level, (vectors, own) in enumerate(moved):
            chosen = jax.nn.one_hot(own, self.size) * kept[:, None]
            new = self.decay * state.counts[level] + (1 - self.decay) * chosen.sum(0)
            own_sums = self.decay * state.sums[level] + (1 - self.decay) * chosen.T @ vectors
            counts.append(jnp.where(some, new, state.counts[level]))
            sums.append(jnp.where(some, own_sums, state.sums[level]))
            total = new.sum()
            smooth = (new + _SMOOTHING) / (total + self.size * _SMOOTHING) * total
            mean = own_sums / smooth[:, None]
            codes.append(jnp.where(some, mean, state.codes[level]))
        return Codebooks(*(jnp.stack(each) for each in (codes, counts, sums)))


def distances(x: Float[Array, "N D"], codes: Float[Array, "K D"]) -> Float[Array, "N K"]:
    """Returns squared distances, each up to the rounding of the lengths."""
    lengths = jnp.square(x).sum(-1, keepdims=True) + jnp.square(codes).sum(-1)
    return lengths - 2 * x @ codes.T


@partial(jax.jit, static_argnums=(2, 3))
def kmeans(
    key: jax.Array, x: Float[Array, "N D"], size: int, iterations: int = 10
) -> Float[Array, "K D"]:
    """Returns the centres of k-means; the first ones are drawn apart from each other.

    Args:
        key: of the first centres.
        x: vectors; with fewer than `size` different ones some centres are alike.
        size: number of centres.
        iterations: of Lloyd's algorithm.

    Reference: Arthur and Vassilvitskii 2007, "k-means++: The Advantages of Careful Seeding".
    """

    def seed(i: Int[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        centres, near = carry
        row = jax.random.categorical(jax.random.fold_in(key, i), jnp.log(near + 1e-12))
        own = jnp.square(x - x[row]).sum(-1)
        return centres.at[i].set(x[row]), jnp.where(i == 0, own, jnp.minimum(near, own))

    first = jnp.zeros((size, x.shape[1]), x.dtype), jnp.ones(len(x), x.dtype)
    centres, _ = jax.lax.fori_loop(0, size, seed, first)

    def move(_: Any, centres: Float[Array, "K D"]) -> Float[Array, "K D"]:
        own = distances(x, centres).argmin(-1)
        counts = jnp.zeros(size, x.dtype).at[own].add(1.0)
        sums = jnp.zeros_like(centres).at[own].add(x)
        # A centre that nothing is near to stays where it is.
        return jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, 1.0)[:, None], centres)

    return jax.lax.fori_loop(0, iterations, move, centres)


def sinkhorn_ids(
    away: Float[Array, "N K"],
    mask: Bool[Array, "N"],
    epsilon: float,
    iterations: int = 50,
) -> Int[Array, "N"]:
    """Returns the entry of each vector where all entries shall be chosen about equally often.

    Distances are brought to -1 to 1 first, so that epsilon means the same for all data.

    Args:
        away: squared distances.
        mask: which vectors count.
        epsilon: of the entropy; the larger, the more even.
        iterations: of rows and columns.

    Reference: Cuturi 2013, "Sinkhorn Distances", arXiv 1306.0895.
    """
    kept = mask[:, None]
    low = jnp.where(kept, away, jnp.inf).min()
    high = jnp.where(kept, away, -jnp.inf).max()
    half = jnp.maximum((high - low) / 2, 1e-5)
    log_plan = -(away - (high + low) / 2) / (half * epsilon)
    log_plan = jnp.where(kept, log_plan, 0.0)

    def turn(_: Any, log_plan: Float[Array, "N K"]) -> Float[Array, "N K"]:
        of_codes = jax.nn.logsumexp(jnp.where(kept, log_plan, -jnp.inf), axis=0)
        log_plan = log_plan - jnp.where(mask.any(), of_codes, 0.0)
        return log_plan - jax.nn.logsumexp(log_plan, axis=1, keepdims=True)

    return jax.lax.fori_loop(0, iterations, turn, log_plan).argmax(-1)
