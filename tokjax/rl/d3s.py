"""D3S: training on the answers whose advantages vary most, and in them on the tokens that matter.

Of all answers of a collection those are chosen whose advantages have the largest variance, and of
their tokens those with the largest |advantage| x entropy. Both shares grow as the stage goes on.
It belongs with norm="kept", which divides by the tokens that were kept.

Reference: "Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient
Policy Optimization", arXiv 2509.22115.
"""

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.config import register
from tokjax.errors import ConfigError
from tokjax.rl.advantages import Shaped, group_advantages
from tokjax.rl.rollout import Rollout

_TIE = 1e-5  # relative: variances closer than this are equal


def select_answers(
    advantages: Float[Array, " R"], count: int | Int[Array, ""]
) -> Bool[Array, " R"]:
    """Returns which values have the largest variance among all choices of that many.

    They are always the k largest and the rest smallest ones, since variance is convex in each
    value: all k are tried. Of equally good ones the k closest to half is taken, then the smaller;
    of equal values those at the lowest places.

    Args:
        advantages: of all answers of a collection.
        count: how many, at least 1 and at most all; it may be traced.

    >>> select_answers(jnp.array([3.0, 0.0, -1.0, 0.5]), 2).tolist()
    [True, False, True, False]
    """
    R = advantages.shape[0]
    values = advantages.astype(jnp.float32) - advantages.mean()
    # sums over the first n of them in order, n from 0 to R
    ordered = jnp.sort(values)
    zero = jnp.zeros(1, jnp.float32)
    sums = jnp.concatenate([zero, jnp.cumsum(ordered)])
    squares = jnp.concatenate([zero, jnp.cumsum(jnp.square(ordered))])
    k, size = jnp.arange(R + 1), jnp.asarray(count, jnp.float32)
    low = jnp.clip(count - k, 0, R)

    def over(prefix: Array) -> Array:
        return (prefix[low] + prefix[R] - prefix[R - k]) / size

    variance = jnp.where(k <= count, over(squares) - jnp.square(over(sums)), -jnp.inf)
    best = variance.max()
    equal = variance >= best - _TIE * jnp.maximum(best, 0.0)
    chosen = jnp.argmin(jnp.where(equal, jnp.abs(2 * k - count), 2 * R + 1))
    top = _ranks(-values) < chosen
    bottom = _ranks(jnp.where(top, jnp.inf, values)) < count - chosen
    return top | bottom


def _ranks(values: Array) -> Array:
    """Returns the place of each value in ascending order, equal ones in the order they are in."""
    order = jnp.argsort(values, stable=True)
    return jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype))


def select_tokens(
    scores: Float[Array, "R T"], mask: Bool[Array, "R T"], share: float | Float[Array, ""]
) -> Bool[Array, "R T"]:
    """Returns the tokens with the largest scores, of all rows together.

    Args:
        scores: not negative; if all are 0, all tokens are returned.
        mask: tokens to choose from.
        share: of them, rounded up to whole tokens, at least one; it may be traced.

    >>> scores = jnp.array([[3.0, 1.0], [2.0, 0.0]])
    >>> select_tokens(scores, jnp.ones((2, 2), bool), 0.5).tolist()
    [[True, False], [True, False]]
    """
    tokens = mask.sum().astype(jnp.float32)
    # A share such as 0.6, not exact in binary, must not make three tokens of five four.
    count = jnp.maximum(jnp.ceil(share * tokens * (1 - 1e-6)), 1.0)
    ranks = _ranks(-jnp.where(mask, scores, -1.0).reshape(-1)).reshape(mask.shape)
    first = ranks < count.astype(jnp.int32)
    some = (jnp.where(mask, scores, 0.0) > 0).any()
    return mask & (first | ~some)


def scheduled(first: float, last: float, progress: Float[Array, ""]) -> Float[Array, ""]:
    """Returns a share on its way from the first to the last."""
    return (1.0 - progress) * first + progress * last


@register("advantage", "d3s")
@dataclass(frozen=True)
class D3S:
    """GRPO's advantages, with weights of 1 at what is chosen and 0 elsewhere."""

    answers_init: float = 0.25  # share of the answers at the start of the stage; 1: all
    answers_final: float = 1.0  # ... and at its end
    tokens_init: float = 0.2  # share of their tokens at the start of the stage; 1: all
    tokens_final: float = 1.0  # ... and at its end
    within: bool = False  # choose answers of each prompt by themselves, not over all prompts
    ddof: int = 0  # of the group's deviation. 1: of a sample, 0: of a population
    eps: float = 1e-8  # added to the deviation

    def __post_init__(self):
        for field in fields(self)[:4]:
            value = getattr(self, field.name)
            if not 0 < value <= 1:
                raise ConfigError(f"{field.name}={value:g} must be above 0 and at most 1")
        if self.ddof not in (0, 1):
            raise ConfigError(f"ddof={self.ddof} must be 0 or 1")

    def __call__(self, rollout: Rollout) -> Shaped:
        """Returns the advantages and the weights of the actions in the loss."""
        of_prompts = group_advantages(
            rollout.by_prompt(rollout.reward), ddof=self.ddof, eps=self.eps
        )
        of_answers = rollout.flat(of_prompts)
        advantages = rollout.at_actions(of_answers)
        answers, tokens = self.shares(rollout)
        chosen = self.choose(of_prompts, answers)
        mask = rollout.mask & chosen[:, None]
        scores = jnp.abs(advantages) * rollout.entropies
        kept = select_tokens(scores, mask, tokens)
        # Without any advantage there is no update.
        kept = kept & (of_answers != 0).any()
        return advantages, kept.astype(jnp.float32)

    def shares(self, rollout: Rollout) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns the shares of answers and of tokens at this point of the stage."""
        progress = rollout.progress
        return (
            scheduled(self.answers_init, self.answers_final, progress),
            scheduled(self.tokens_init, self.tokens_final, progress),
        )

    def choose(self, advantages: Float[Array, "P G"], share: Float[Array, ""]) -> Bool[Array, " R"]:
        """Returns which answers are trained on, two at least (of each prompt if `within`)."""
        P, G = advantages.shape
        size = G if self.within else P * G
        count = jnp.clip(jnp.round(share * size), min(2, size), size).astype(jnp.int32)
        if not self.within:
            return select_answers(advantages.reshape(-1), count)
        return jax.vmap(lambda row: select_answers(row, count))(advantages).reshape(-1)
