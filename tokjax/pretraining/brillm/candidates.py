"""Which edges a graph has, and which candidates a true token is compared with in training.

Reference: "BriLLM: Brain-inspired Large Language Model", arXiv 2503.11299.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax.errors import ConfigError, nearest
from tokjax.pretraining.brillm.graph import BriLLM, Params

From = Literal["vocabulary", "targets", "followers"]


def seen_edges(tokens: Int[np.ndarray, "B L"], vocab_size: int) -> Int[np.ndarray, "V V"]:
    """Returns a table of edges: the pairs that occur have their own, all others share edge 0.

    >>> seen_edges(np.array([[0, 1, 1]]), 2).tolist()
    [[0, 1], [0, 2]]

    Args:
        tokens: rows of text; pairs across rows do not count.
        vocab_size: number of ids.
    """
    seen = _bigrams(tokens, vocab_size) > 0
    table = np.zeros((vocab_size, vocab_size), np.int32)
    table[seen] = np.arange(1, seen.sum() + 1)
    return table


def follower_lists(
    tokens: Int[np.ndarray, "B L"], vocab_size: int, k: int
) -> Int[np.ndarray, "V k"]:
    """Returns the k most frequent followers of each token; equally frequent ones by id.

    Raises:
        ConfigError: k is not within 1 to the size of the vocabulary.
    """
    if not 1 <= k <= vocab_size:
        raise ConfigError(f"k={k} followers must be 1 to vocab_size={vocab_size}")
    counts = _bigrams(tokens, vocab_size)
    return np.argsort(-counts, axis=1, kind="stable")[:, :k].astype(np.int32)


def _bigrams(tokens: Int[np.ndarray, "B L"], vocab_size: int) -> Int[np.ndarray, "V V"]:
    tokens = np.asarray(tokens)
    counts = np.zeros((vocab_size, vocab_size), np.int64)
    np.add.at(counts, (tokens[:, :-1].ravel(), tokens[:, 1:].ravel()), 1)
    return counts


@dataclass(frozen=True)
class Sampled:
    """Negatives instead of the whole vocabulary; a token's own id is an ordinary candidate.

    Attributes:
        negatives: candidates beside the true token.
        among: drawn from the vocabulary, from the targets of the batch, or the most frequent
            followers of the token before (which draws nothing). None occurs twice; where there are
            too few, fewer are compared.
    """

    negatives: int = 400
    among: From = "targets"

    def __post_init__(self):
        if self.negatives < 1:
            raise ConfigError(f"negatives={self.negatives} must be at least 1")
        if self.among not in get_args(From):
            raise ConfigError(
                f"unknown among={self.among!r}.{nearest(str(self.among), get_args(From))}"
            )

    def check(self, model: BriLLM, followers: Int[np.ndarray, "V K"] | None) -> None:
        """Refuses what does not fit together.

        Raises:
            ConfigError: more negatives than other tokens; followers are missing, of no use, or
                not one more than negatives.
        """
        if self.negatives >= model.vocab_size:
            raise ConfigError(
                f"negatives={self.negatives} of vocab_size={model.vocab_size}: there are at most "
                f"{model.vocab_size - 1}; sampled=None compares with all"
            )
        if (self.among == "followers") != (followers is not None):
            raise ConfigError(
                "among='followers' needs followers=follower_lists(...), and nothing else does"
            )
        if followers is not None and followers.shape != (model.vocab_size, self.negatives + 1):
            raise ConfigError(
                f"followers has shape {followers.shape}: it must be ({model.vocab_size}, "
                f"{self.negatives + 1}), one more than negatives, as the true one is taken out"
            )

    def candidates(
        self,
        key: jax.Array,
        tokens: Int[Array, "B L"],
        vocab_size: int,
        followers: Int[Array, "V K"] | None = None,
    ) -> tuple[Int[Array, "B N C"], Bool[Array, "B N C"]]:
        """Returns candidates for each transition, the true one first, and which of them count.

        Args:
            key: of the draws.
            tokens: rows of text.
            vocab_size: number of ids.
            followers: of each id.
        """
        true = tokens[:, 1:]
        if followers is not None:
            found = followers[tokens[:, :-1]]
            counts = found != true[..., None]
            last = jnp.arange(found.shape[-1]) == found.shape[-1] - 1
            counts &= ~(last & counts.all(-1, keepdims=True))
        else:
            possible = jnp.ones(vocab_size, bool)
            if self.among == "targets":
                possible = jnp.zeros(vocab_size, bool).at[true].set(True)
            drawn = jax.random.uniform(key, (*true.shape, vocab_size))
            open_ = possible & (jnp.arange(vocab_size) != true[..., None])
            score, found = jax.lax.top_k(jnp.where(open_, drawn, -1.0), self.negatives)
            counts = score >= 0
        first = jnp.ones_like(counts[..., :1])
        return (
            jnp.concatenate([true[..., None], found], axis=-1),
            jnp.concatenate([first, counts], axis=-1),
        )


def sampled_loss(
    model: BriLLM,
    params: Params,
    tokens: Int[Array, "B L"],
    candidates: Int[Array, "B N C"],
    counts: Bool[Array, "B N C"] | None = None,
) -> Float[Array, ""]:
    """Returns the mean cross-entropy of the first candidate among those that count."""
    energies = model.energies(params, tokens, candidates)
    if counts is not None:
        energies = jnp.where(counts, energies, -jnp.inf)
    return -jax.nn.log_softmax(energies)[..., 0].mean()
