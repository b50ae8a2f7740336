"""Controls of advantages: entropies that lie elsewhere, and choices at random.

Importing this registers them under the kind "advantage"; they are of reproductions alone.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax.config import Choice, register
from tokjax.data.batch import Batch
from tokjax.rl.advantages import Shaped
from tokjax.rl.d3s import D3S, select_tokens
from tokjax.rl.gtpo import GTPO
from tokjax.rl.rollout import Rollout


def noise(of: Float[Array, "R T"]) -> Float[Array, "R T"]:
    """Returns numbers from 0 to 1 that are a function of the values, and tell nothing of them."""
    seed = jax.lax.bitcast_convert_type(jnp.sum(of * 1.7), jnp.uint32)
    return jax.random.uniform(jax.random.key(seed), of.shape)


def shuffled(
    values: Float[Array, "*n T"], mask: Bool[Array, "*n T"], by: Float[Array, "*n T"]
) -> Float[Array, "*n T"]:
    """Returns the values that count in another order along the last axis, at the same places.

    Args:
        values: to move.
        mask: those that count.
        by: whose order decides.

    >>> row, mask = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[True, False, True]])
    >>> shuffled(row, mask, jnp.array([[0.9, 0.5, 0.1]])).tolist()
    [[3.0, 2.0, 1.0]]
    """
    places = jnp.argsort(jnp.where(mask, 0.0, 1.0), axis=-1, stable=True)
    drawn = jnp.argsort(jnp.where(mask, by, 2.0), axis=-1, stable=True)
    moved = jnp.put_along_axis(
        values, places, jnp.take_along_axis(values, drawn, -1), -1, inplace=False
    )
    return jnp.where(mask, moved, values)


@register("advantage", "shuffled_entropies")
@dataclass(frozen=True)
class ShuffledEntropies:
    """Another advantage, given entropies of other places of the answer, or of other answers."""

    advantage: Annotated[Any, Choice("advantage")] = GTPO()  # which sees them
    answers: bool = False  # move them among a prompt's answers at the same position

    @property
    def channels(self) -> tuple[str, ...]:
        """The values beside each action that `in_step` needs."""
        return tuple(getattr(self.advantage, "channels", ()))

    def beside(self, rollout: Rollout) -> dict[str, Array]:
        """Returns those values."""
        return self.advantage.beside(rollout) if self.channels else {}

    def __call__(self, rollout: Rollout) -> Shaped:
        """Returns the advantages and the weights of the actions in the loss."""
        mask, by = rollout.mask, noise(rollout.logprobs)
        if self.answers:
            of = [rollout.by_prompt(a).swapaxes(1, 2) for a in (rollout.entropies, mask, by)]
            moved = rollout.flat(shuffled(*of).swapaxes(1, 2))
        else:
            moved = shuffled(rollout.entropies, mask, by)
        return self.advantage(dataclasses.replace(rollout, entropies=moved))

    def in_step(self, advantages: Array, entropies: Array, batch: Batch) -> Array:
        """Returns the advantages with entropies of other places of the answer."""
        if not hasattr(self.advantage, "in_step"):
            return advantages
        moved = shuffled(entropies, batch.weights != 0, noise(batch.channels["old"]))
        return self.advantage.in_step(advantages, moved, batch)


@register("advantage", "swapped_entropies")
@dataclass(frozen=True)
class SwappedEntropies:
    """GTPO whose wrong answers lose by H, not by 1 / H."""

    advantage: Annotated[Any, Choice("advantage")] = GTPO()  # which sees them

    def __call__(self, rollout: Rollout) -> Shaped:
        """Returns the advantages and the weights of the actions in the loss."""
        wrong = (rollout.reward <= self.advantage.threshold)[:, None]
        inverse = 1.0 / (rollout.entropies + self.advantage.eps)
        entropies = jnp.where(wrong, inverse, rollout.entropies)
        return self.advantage(dataclasses.replace(rollout, entropies=entropies))


@register("advantage", "random_choice")
@dataclass(frozen=True)
class RandomChoice(D3S):
    """As many answers and tokens as D3S takes, drawn at random."""

    def __call__(self, rollout: Rollout) -> Shaped:
        """Returns the advantages and the weights of the actions in the loss."""
        everything = dataclasses.replace(
            D3S(), answers_init=1.0, tokens_init=1.0, ddof=self.ddof, eps=self.eps
        )
        advantages, weights = everything(rollout)
        share, tokens = self.shares(rollout)
        drawn = noise(rollout.logprobs)
        R = drawn.shape[0]
        count = jnp.clip(jnp.round(share * R), 2, R).astype(jnp.int32)
        chosen = jnp.argsort(jnp.argsort(drawn[:, 0])) < count
        kept = select_tokens(drawn, rollout.mask & chosen[:, None], tokens)
        return advantages, jnp.where(kept, weights, 0.0)
