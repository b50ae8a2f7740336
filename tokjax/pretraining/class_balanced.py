"""Next-token prediction in which rare token types count for more.

Reference: a baseline to "The Fair Language Model Paradox" (Pinto, Galanti and Balestriero, arXiv
2410.11985), which proposes no remedy: recommendation of tokjax.
"""

import dataclasses
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.files import storage_errors, write_atomically
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.pretraining.next_token import NextToken
from tokjax.pretraining.predictions import scored
from tokjax.training.objective import Loss, Materials, PerToken


def balanced_weights(
    counts: Int[np.ndarray, " V"], power: float, largest: float
) -> Float[np.ndarray, " V"]:
    """Returns the weight of each type, count^-power, such that the mean over all tokens is 1.

    Args:
        counts: occurrences of each type; types without any weigh what the rarest does.
        power: 0 weighs all tokens alike, 1 all types.
        largest: bound on a weight, over that of the mean token.

    Raises:
        ConfigError: nothing was counted.

    >>> balanced_weights(np.array([8, 2, 0]), 1.0, 100.0).tolist()
    [0.625, 2.5, 2.5]
    """
    found = np.asarray(counts, float)
    if not (found > 0).any():
        raise ConfigError("no token was counted: there are no weights to balance by")
    weights = np.where(found > 0, found, found[found > 0].min()) ** -power
    total = found.sum()
    weights = np.minimum(weights * (total / (found * weights).sum()), largest)
    # What the bound took away is given back to all, so that the mean stays 1.
    return weights * (total / (found * weights).sum())


@register("objective", "class_balanced")
@dataclass(frozen=True)
class ClassBalanced(PerToken):
    """Negative log-likelihood of the next token, weighted by how rare it is in the training data.

    Held-out data are evaluated by the next-token loss.
    """

    power: float = 0.5  # weights are count^-power: 0 counts tokens alike, 1 types
    largest: float = 20.0  # bound on a weight; the mean over tokens is 1
    z_loss: float = 0.0  # coefficient of the squared log-sum-exp of the logits
    # file of counts of each id (NumPy .npy); None: the training data's
    counts: str | None = None

    def __post_init__(self):
        if not self.power >= 0 or not self.largest >= 1:
            raise ConfigError(
                f"power={self.power} must not be negative, and largest={self.largest} 1 or more"
            )
        if self.z_loss < 0:
            raise ConfigError(f"z_loss={self.z_loss} must not be negative")

    def prepared(self, materials: Materials) -> "ClassBalanced":
        """Returns the objective with a file of counts, made from the training data if it has none.

        Raises:
            StorageError: the file cannot be written.
        """
        if self.counts is not None:
            return self
        counts = np.zeros(materials.tokenizer.vocab_size, np.int64)
        for store in materials.stores:
            counts += np.asarray(getattr(store, "store", store).unigram_counts)
        path = Path(materials.cache) / f"counts-{_digest(counts)[:16]}.npy"
        if not path.exists():
            content = io.BytesIO()
            np.save(content, counts)
            with storage_errors(path.parent, "create"):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content.getvalue())
        return dataclasses.replace(self, counts=str(path))

    @cached_property
    def type_counts(self) -> Int[np.ndarray, " V"]:
        """The counts.

        Raises:
            ConfigError: there are none yet, or the file does not hold any.
        """
        if self.counts is None:
            raise ConfigError(
                "objective 'class_balanced' has no counts yet: name a file by counts, or call "
                "prepared(), which a training run does"
            )
        try:
            found = np.load(self.counts, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"counts={self.counts!r} cannot be read: {error}") from error
        if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer) or found.min() < 0:
            raise ConfigError(
                f"counts={self.counts!r} must hold one integer of 0 or more for an id"
            )
        return found

    @property
    def content(self) -> Mapping[str, str]:
        """Digest of the counts."""
        return {"counts": _digest(self.type_counts)}

    def init(self, key: jax.Array, model: Transformer, params: Params) -> Float[Array, "V"]:
        """Returns the weight of each type.

        Raises:
            ConfigError: the model has fewer ids than were counted.
        """
        counts, V = self.type_counts, model.config.vocabulary
        if len(counts) > V:
            raise ConfigError(f"counts={self.counts!r} are of {len(counts)} ids, the model has {V}")
        padded = np.zeros(V, np.int64)
        padded[: len(counts)] = counts
        return jnp.asarray(balanced_weights(padded, self.power, self.largest), jnp.float32)

    def loss(
        self,
        model: Transformer,
        params: Params,
        aux: Float[Array, "V"],
        batch: Batch,
        key: jax.Array,
    ) -> Loss:
        """Returns the sum of the types' weights times w * nll, and the sum of w over the batch."""
        found = NextToken(self.z_loss).predictions(model, params, batch, key)
        of_type = aux[jnp.clip(found.targets, 0, aux.shape[0] - 1)]
        return scored(found, self.z_loss, aux, keep=of_type)


def _digest(counts: Int[np.ndarray, " V"]) -> str:
    return hashlib.sha256(np.ascontiguousarray(counts, np.int64).tobytes()).hexdigest()
