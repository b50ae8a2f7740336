"""Corruption of input tokens: which are chosen, and what stands in their place.

Shared by everything that learns to restore tokens: masked language models, denoising encoders and
diffusion over tokens.
"""

import typing
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.errors import ConfigError, nearest


@dataclass(frozen=True)
class Corruption:
    """How tokens are corrupted: of those chosen, shares are masked, replaced and kept.

    The defaults are those of "Mitigating Frequency Bias and Anisotropy in Language Model
    Pre-Training with Syntactic Smoothing" (arXiv 2410.11462), whose code keeps none.
    """

    rate: float = 0.15  # share of the eligible tokens that is chosen
    masked: float = 0.9  # share of the chosen that the mask replaces
    random: float = 0.1  # share of them that a random id replaces; the rest is kept as it is
    # each token by a draw of its own, or the nearest whole number of every row's tokens (at least
    # 1), which has a size known beforehand: only that many states are scored
    count: Literal["bernoulli", "fixed"] = "bernoulli"
    mask_id: int | None = None  # id of the mask; None: the tokenizer's, or the id behind its last
    # random ids are drawn from 0 up to here, exclusive; None: the tokenizer's
    random_ids: int | None = None

    def __post_init__(self):
        modes = typing.get_args(type(self).__annotations__["count"])
        if self.count not in modes:
            raise ConfigError(
                f"unknown corruption.count={self.count!r}.{nearest(self.count, modes)}"
            )
        for name in ("rate", "masked", "random"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"corruption.{name}={getattr(self, name)} must lie in [0, 1]: it is a share"
                )
        if self.rate == 0:
            raise ConfigError("corruption.rate=0 chooses no token: there would be no loss")
        if self.masked + self.random > 1 + 1e-9:
            raise ConfigError(
                f"corruption.masked={self.masked} and corruption.random={self.random} sum to more "
                f"than 1: they are shares of the chosen tokens"
            )

    def most(self, tokens: int) -> int:
        """Returns how many tokens of a row are chosen at most, with a fixed count."""
        return max(1, int(self.rate * tokens + 0.5)) if tokens else 0


# Devlin et al., "BERT", arXiv 1810.04805, section 3.1.
BERT = Corruption(masked=0.8, random=0.1)


@struct.dataclass
class Corrupted:
    """Tokens after a corruption.

    Attributes:
        tokens: what the model reads.
        chosen: the positions to be restored, also those that were kept as they are.
    """

    tokens: Int[Array, "B T"]
    chosen: Bool[Array, "B T"]


def corrupt(
    key: jax.Array,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    spec: Corruption,
    rate: Float[Array, "B"] | None = None,
) -> Corrupted:
    """Returns tokens with some of them masked or replaced, and which were chosen.

    Args:
        key: of the draws.
        tokens: ids.
        mask: positions that may be chosen.
        spec: what to do; its ids must be known.
        rate: of each row, in the place of the specification's (a diffusion's noise level). With a
            fixed count, rows may then have more than `spec.most` chosen tokens.

    Raises:
        ConfigError: the specification names no mask, or no random ids though it draws some.
    """
    if spec.mask_id is None:
        raise ConfigError("corruption.mask_id is not known: name the id of the mask")
    ids = spec.random_ids
    if spec.random and ids is None:
        raise ConfigError(
            "corruption.random_ids is not known: say from how many ids random ones are drawn"
        )
    draw, fate, replacement = jax.random.split(key, 3)
    scores = jax.random.uniform(draw, tokens.shape)
    share = jnp.float32(spec.rate) if rate is None else rate.astype(jnp.float32)[:, None]
    if spec.count == "bernoulli":
        chosen = mask & (scores < share)
    else:
        eligible = mask.sum(-1, keepdims=True)
        wanted = jnp.floor(share * eligible.astype(jnp.float32) + 0.5).astype(jnp.int32)
        order = jnp.argsort(jnp.where(mask, scores, 2.0), axis=-1)
        place = jnp.argsort(order, axis=-1)
        chosen = mask & (place < jnp.maximum(wanted, 1))
    u = jax.random.uniform(fate, tokens.shape)
    corrupted = jnp.where(chosen & (u < spec.masked), spec.mask_id, tokens)
    if spec.random and ids is not None:
        drawn = jax.random.randint(replacement, tokens.shape, 0, ids, tokens.dtype)
        swapped = chosen & (u >= spec.masked) & (u < spec.masked + spec.random)
        corrupted = jnp.where(swapped, drawn, corrupted)
    return Corrupted(corrupted.astype(tokens.dtype), chosen)


def with_ids(
    spec: Corruption, tokenizer_ids: int, special_tokens: typing.Mapping[str, int], model_ids: int
) -> Corruption:
    """Returns a specification with the ids that it left open.

    Args:
        spec: the specification.
        tokenizer_ids: number of the tokenizer's ids.
        special_tokens: id of each of its special tokens by text.
        model_ids: number of the model's ids.

    Raises:
        ConfigError: the tokenizer has no mask and the model no id to spare, or the mask is no id of
            the model.
    """
    mask_id = spec.mask_id
    if mask_id is None:
        named = [special_tokens[name] for name in _MASKS if name in special_tokens]
        mask_id = named[0] if named else tokenizer_ids
        if not named and model_ids <= tokenizer_ids:
            raise ConfigError(
                f"the tokenizer has no mask among its {tokenizer_ids} ids and the model has no id "
                f"to spare: set model.vocab_size={tokenizer_ids + 1}, or name the mask by "
                f"corruption.mask_id"
            )
    if not 0 <= mask_id < model_ids:
        raise ConfigError(f"corruption.mask_id={mask_id} is not among the model's {model_ids} ids")
    random_ids = tokenizer_ids if spec.random_ids is None else spec.random_ids
    if not 0 < random_ids <= model_ids:
        raise ConfigError(
            f"corruption.random_ids={random_ids} must be from 1 to the model's {model_ids} ids"
        )
    return replace(spec, mask_id=mask_id, random_ids=random_ids)


_MASKS = ("[MASK]", "<mask>", "<|mask|>", "<MASK>")
