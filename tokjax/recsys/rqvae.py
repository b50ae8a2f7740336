"""Codes of items from their embeddings: an autoencoder with a residual quantiser in between.

Reference: Rajput et al., "Recommender Systems with Generative Retrieval", arXiv 2305.05065 (TIGER);
the two terms besides: Wang et al., "Learnable Item Tokenization for Generative Recommendation",
arXiv 2405.07314 (LETTER).
"""

from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.errors import ConfigError, DataError
from tokjax.models.digests import digest
from tokjax.models.quantizers import Codebooks, Quantized, ResidualQuantizer, kmeans
from tokjax.recsys.codes import ItemCodes, unique_codes
from tokjax.training.fitting import FitState, adam_step, begin, fit


@dataclass(frozen=True)
class CodesConfig:
    """How codes are learned; the defaults are the authors'."""

    levels: int = 4  # codes of an item
    size: int = 256  # entries of each codebook
    hidden: tuple[int, ...] = (2048, 1024, 512, 256, 128, 64)  # widths between embedding and codes
    width: int = 32  # of what is quantised
    commitment: float = 0.25  # weight of the loss that draws vectors to their entries
    epsilon: float = 0.003  # of Sinkhorn's iterations on the last level in training; 0: none
    collaborative: float = 0.0  # weight of LETTER's term on vectors of interactions (there .02)
    diversity: float = 0.0  # weight of LETTER's term on the spread of entries (there 1e-4)
    clusters: int = 10  # of entries, for that term
    epochs: int = 20_000  # passes over the items
    batch_size: int = 1024  # items a step
    peak_lr: float = 1e-3  # learning rate
    weight_decay: float = 1e-4  # times the learning rate, each step
    kmeans_iterations: int = 10  # of the first entries
    seed: int = 0  # of parameters and order

    def __post_init__(self):
        for name in ("levels", "size", "width", "clusters", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("epsilon", "commitment", "collaborative", "diversity", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be 0 or more")
        if not self.peak_lr > 0 or any(width < 1 for width in self.hidden):
            raise ConfigError(f"peak_lr={self.peak_lr} and hidden={self.hidden} must be positive")


@dataclass(frozen=True)
class RQVAE:
    """The autoencoder; parameters are {"encoder", "decoder", "codebooks"}.

    Attributes:
        inputs: width of the embeddings.
        config: of the codes.
    """

    inputs: int
    config: CodesConfig = CodesConfig()

    @property
    def quantizer(self) -> ResidualQuantizer:
        """What lies between encoder and decoder."""
        c = self.config
        balance = (0.0,) * (c.levels - 1) + (c.epsilon,)
        return ResidualQuantizer(c.width, c.levels, c.size, c.commitment, balance=balance)

    def init(self, key: jax.Array, x: Float[Array, "N E"]) -> dict[str, Any]:
        """Returns parameters; the codebooks are k-means of what the encoder makes of x."""
        widths = [self.inputs, *self.config.hidden, self.config.width]
        of_encoder, of_decoder, of_codes = jax.random.split(key, 3)
        params = {"encoder": _mlp(of_encoder, widths), "decoder": _mlp(of_decoder, widths[::-1])}
        z = self.encode(params, x)
        books = self.quantizer.from_data(of_codes, z, self.config.kmeans_iterations)
        return {**params, "codebooks": books}

    def encode(self, params: Any, x: Float[Array, "N E"]) -> Float[Array, "N D"]:
        """Returns what is quantised."""
        return _apply(params["encoder"], x)

    def quantize(self, params: Any, x: Float[Array, "N E"], train: bool = False) -> Quantized:
        """Returns the codes of embeddings."""
        return self.quantizer(self.encode(params, x), None, params["codebooks"], train)

    def loss(
        self,
        params: Any,
        x: Float[Array, "N E"],
        key: jax.Array,
        taste: Float[Array, "N D"] | None = None,
        clusters: Int[Array, "L K"] | None = None,
    ) -> Float[Array, ""]:
        """Returns reconstruction and quantisation, and LETTER's terms where they have weights.

        Args:
            params: of the model.
            x: embeddings of items.
            key: of random entries.
            taste: a vector of each item's interactions, of the width of what is quantised.
            clusters: of the entries of each level.
        """
        found = self.quantize(params, x, train=True)
        again = _apply(params["decoder"], found.z_q)
        total = jnp.mean(jnp.square(again - x)) + sum(found.losses.values())
        if taste is not None:
            total += self.config.collaborative * alignment(found.z_q, taste)
        if clusters is not None:
            books: Codebooks = params["codebooks"]
            keys = jax.random.split(key, self.config.levels)
            spread = [
                diversity(own, books.codes[i], clusters[i], found.ids[:, i])
                for i, own in enumerate(keys)
            ]
            total += self.config.diversity * sum(spread) / len(spread)
        return total


def alignment(z_q: Float[Array, "N D"], taste: Float[Array, "N D"]) -> Float[Array, ""]:
    """Returns the loss of telling each item's vector of interactions from the others' in the batch.

    Reference: LETTER, arXiv 2405.07314, collaborative regularisation.
    """
    return -jnp.diagonal(jax.nn.log_softmax(z_q @ taste.T, axis=-1)).mean()


def diversity(
    key: jax.Array,
    codes: Float[Array, "K D"],
    clusters: Int[Array, "K"],
    ids: Int[Array, "N"],
) -> Float[Array, ""]:
    """Returns the loss of telling another entry of the same cluster from all others.

    Entries that are alone in their cluster have none.

    Args:
        key: of which other entry is taken.
        codes: the entries.
        clusters: of each.
        ids: which ones were chosen.

    Reference: LETTER, arXiv 2405.07314, diversity regularisation.
    """
    own = jax.nn.one_hot(ids, len(codes), dtype=bool)
    same = (clusters[None] == clusters[ids][:, None]) & ~own
    drawn = jnp.where(same, jax.random.uniform(key, same.shape), -1.0).argmax(-1)
    scores = jnp.where(own, -jnp.inf, codes[ids] @ codes.T)
    logp = jax.nn.log_softmax(scores, axis=-1)
    found = jnp.take_along_axis(logp, drawn[:, None], axis=-1)[:, 0]
    some = same.any(-1)
    return -jnp.where(some, found, 0.0).sum() / jnp.maximum(some.sum(), 1)


@dataclass(frozen=True, eq=False)
class TrainedCodes:
    """What `train_codes` returns.

    Attributes:
        codes: of the items, each its own.
        model: the autoencoder.
        params: of it.
        losses: of each step.
        collisions: share of the items whose nearest codes another item has too.
    """

    codes: ItemCodes
    model: RQVAE
    params: dict[str, Any] = field(repr=False)
    losses: Float[np.ndarray, "N"] = field(repr=False)
    collisions: float


def train_codes(
    embeddings: Float[np.ndarray, "I E"],
    config: CodesConfig | None = None,
    *,
    taste: Float[np.ndarray, "I D"] | None = None,
    checkpoint: Path | str | None = None,
    checkpoint_steps: int = 1000,
    progress: bool = True,
) -> TrainedCodes:
    """Returns unique codes of items whose embeddings are given.

    Args:
        embeddings: of the items; similar items should have similar ones.
        config: of the codes.
        taste: vectors of interactions, for `config.collaborative`, of `config.width`.
        checkpoint: file that the training goes on from where it is there.
        checkpoint_steps: steps between its writes.
        progress: whether to show it.

    Raises:
        ConfigError: settings do not fit each other, or the checkpoint is of another training.
        DataError: embeddings are not finite, or there are more items than codes.
        NonFiniteError: a loss was not finite.
    """
    config = CodesConfig() if config is None else config
    x = _checked("embeddings", embeddings)
    if config.size**config.levels < len(x):
        raise DataError(f"{len(x)} items do not fit {config.size}^{config.levels} codes")
    if (config.collaborative > 0) != (taste is not None):
        raise ConfigError(
            f"collaborative={config.collaborative} needs vectors of interactions (`taste`), and "
            f"they need a weight"
        )
    if taste is not None:
        taste = _checked("taste", taste)
        if taste.shape != (len(x), config.width):
            raise ConfigError(f"taste has shape {taste.shape}, not {(len(x), config.width)}")
    model = RQVAE(x.shape[1], config)
    batch = min(config.batch_size, len(x))
    # Every batch has the same number of items: the last ones of an epoch wait for the next.
    per_epoch = len(x) // batch
    order = lru_cache(1)(
        lambda epoch: np.random.default_rng([config.seed, epoch]).permutation(len(x))
    )
    data = jnp.asarray(x)
    tastes = None if taste is None else jnp.asarray(taste)
    start = jax.jit(model.init)(jax.random.key(config.seed), data)
    keys = jax.random.key(config.seed + 1)
    clusters = None

    def identity() -> dict[str, Any]:
        return {"config": repr(config), "data": digest(x, *([] if taste is None else [taste]))}

    def update(state: FitState, step: int) -> tuple[FitState, Any]:
        nonlocal clusters
        epoch, at = divmod(step, per_epoch)
        key = jax.random.fold_in(keys, step)
        if config.diversity and at == 0:
            clusters = _clusters(key, state.weights["codebooks"].codes, config.clusters)
        rows = jnp.asarray(order(epoch)[at * batch : (at + 1) * batch])
        own = None if tastes is None else tastes[rows]
        return _update(model, state, data[rows], key, own, clusters)

    params, losses = fit(
        update,
        begin(start),
        per_epoch * config.epochs,
        identity=identity,
        checkpoint=checkpoint,
        # Clusters are of an epoch's first entries, so it goes on from where one begins.
        checkpoint_steps=-(-checkpoint_steps // per_epoch) * per_epoch,
        progress=progress,
    )
    z = np.asarray(jax.jit(model.encode)(params, data))
    ids = np.asarray(jax.jit(model.quantize)(params, data).ids)
    _, counts = np.unique(ids, axis=0, return_counts=True)
    unique = unique_codes(z, np.asarray(params["codebooks"].codes), ids)
    codes = ItemCodes(unique, config.size)
    return TrainedCodes(codes, model, params, losses, float(counts[counts > 1].sum() / len(ids)))


def _checked(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values, np.float32)
    if array.ndim != 2 or not len(array):
        raise DataError(f"{name} have shape {array.shape}: give a row for each item")
    wrong = np.flatnonzero(~np.isfinite(array).all(1))
    if wrong.size:
        raise DataError(f"the row of item {wrong[0]} in {name} is not finite")
    return array


def _mlp(key: jax.Array, widths: list[int]) -> list[dict[str, Array]]:
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {
            "weight": jax.random.normal(own, (rows, columns)) * (2 / (rows + columns)) ** 0.5,
            "bias": jnp.zeros(columns),
        }
        for own, rows, columns in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def _apply(layers: list[dict[str, Array]], x: Float[Array, "N E"]) -> Float[Array, "N D"]:
    for i, layer in enumerate(layers):
        x = x @ layer["weight"] + layer["bias"]
        x = jax.nn.relu(x) if i < len(layers) - 1 else x
    return x


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _update(model: RQVAE, state: FitState, x, key, taste, clusters):
    loss = lambda params: model.loss(params, x, key, taste, clusters)  # noqa: E731
    return adam_step(state, jnp.float32(model.config.peak_lr), loss, model.config.weight_decay)


@partial(jax.jit, static_argnums=2)
def _clusters(key: jax.Array, codes: Float[Array, "L K D"], count: int) -> Int[Array, "L K"]:
    """Returns the cluster of each entry."""

    def of(key: jax.Array, own: Float[Array, "K D"]) -> Int[Array, "K"]:
        centres = kmeans(key, own, min(count, own.shape[0]), 10)
        return jnp.square(own[:, None] - centres[None]).sum(-1).argmin(-1)

    keys = jax.random.split(key, codes.shape[0])
    return jnp.stack([of(k, own) for k, own in zip(keys, codes, strict=True)])
