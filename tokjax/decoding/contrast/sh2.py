"""SH2: a context's least likely tokens are written twice, and the difference that makes counts."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, Float

from tokjax.decoding.contrast.combine import (
    SCORED,
    contrast,
    log_probabilities,
    plausible,
    restrict,
)
from tokjax.decoding.contrast.settings import in_bucket, number, share_of_best
from tokjax.decoding.contrast.two_prompts import TwoPrompts, TwoPromptsParams
from tokjax.decoding.predictors import as_predictor
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError


def key_counts(length: int, percent: float, pool_factor: float = 1.5) -> tuple[int, int]:
    """Returns the size of the pool of unlikely tokens and the number of keys drawn from it.

    In double precision from left to right, as the reference code counts: exact arithmetic gives
    other numbers (27 for the pool below).

    >>> key_counts(361, 5)
    (26, 18)

    Args:
        length: number of tokens of the context.
        percent: keys per 100 tokens.
        pool_factor: size of the pool over the number of keys.

    Raises:
        ConfigError: no positive percentage, or a pool smaller than the number of keys.
    """
    if not percent > 0 or not pool_factor >= 1:
        raise ConfigError(
            f"percent={percent} must be positive, pool_factor={pool_factor} 1 or more"
        )
    scored = length - 1
    if scored < 1:
        return 0, 0
    pool = max(int(scored * (0.01 * pool_factor) * percent), 1)
    keys = max(int(scored * 0.01 * percent), 1)
    return min(pool, scored), min(keys, pool, scored)


def key_positions(
    logprobs: Sequence[float] | np.ndarray,
    percent: float,
    *,
    pool_factor: float = 1.5,
    seed: int = 0,
) -> np.ndarray:
    """Returns the places of a context's keys, in order.

    Keys are drawn without replacement from the least likely tokens (of equals, the earlier).

    Args:
        logprobs: of the tokens 1, 2, ... of the context, each behind those before it; token 0 has
            none and is never a key.
        percent: keys per 100 tokens.
        pool_factor: how many times more tokens are drawn from; 1 takes the least likely themselves,
            as the paper's text says. The reference code draws from 1.5 times as many.
        seed: of the drawing.

    Reference: Kai et al., "SH2", arXiv 2401.05930 (counts and drawing from its reference code).
    """
    pool, keys = key_counts(len(logprobs) + 1, percent, pool_factor)
    unlikely = np.argsort(np.asarray(logprobs), kind="stable")[:pool]
    if keys < pool:
        unlikely = np.random.default_rng(seed).choice(unlikely, keys, replace=False)
    return np.sort(unlikely) + 1


def hesitation_prompt(
    context: Sequence[int],
    positions: Sequence[int] | np.ndarray,
    *,
    before: Sequence[int] = (),
    behind: Sequence[int] = (),
    where: Literal["before", "behind"] = "before",
    start: int = 0,
) -> list[int]:
    """Returns a context with its keys written a second time.

    Keys stay ids: decoding and encoding them again, as the reference code does, may change them.
    Ids of the templates, to be encoded by the caller, are "Pondering:" before the keys and a blank
    line and "Context:" behind them with where="before" (FACTOR), or a new line and "Pondering:"
    before them with where="behind" (TruthfulQA). For prompts of several demonstrations, apply this
    to each question.

    >>> hesitation_prompt([1, 5, 6, 7], [2], before=[8], behind=[9], start=1)
    [1, 8, 6, 9, 5, 6, 7]

    Args:
        context: ids.
        positions: places of the keys in it; none leaves the context as it is.
        before: ids that announce the keys.
        behind: ids between the keys and what follows.
        where: whether the keys come before the context or behind it.
        start: ids at the start that stay first (1 for a BOS token).
    """
    context = [int(i) for i in context]
    if not len(positions):
        return context
    keys = [*before, *(context[i] for i in positions), *behind]
    if where == "behind":
        return context + [int(i) for i in keys]
    return context[:start] + [int(i) for i in keys] + context[start:]


def sh2_scores(
    hesitated: Float[Array, "*B V"],
    original: Float[Array, "*B V"],
    alpha: Any,
    plausibility: Any = 0.1,
) -> Float[Array, "*B V"]:
    """Returns scores of answers: the log-softmax of (1 + alpha) hesitated - alpha original, -1000
    where the hesitated model finds a token implausible.

    Args:
        hesitated: log-probabilities behind the context with its keys repeated.
        original: log-probabilities behind the context alone.
        alpha: weight of the difference.
        plausibility: least probability over that of the likeliest; 0 keeps all.

    Reference: Kai et al., "SH2", arXiv 2401.05930.
    """
    scores = log_probabilities(contrast(hesitated, original, alpha))
    return restrict(scores, plausible(hesitated, plausibility), SCORED)


def sh2(
    model: Any,
    params: Any,
    hesitated: Prompts,
    *,
    alpha: Any = 1.6,
    plausibility: Any = 0.1,
) -> tuple[TwoPrompts, TwoPromptsParams]:
    """Returns SH2's predictor and its parameters, for `decode` with the original prompts.

    The logits are (1 + alpha) log p_hesitated(x) - alpha log p_original(x) where p_hesitated(x) is
    at least `plausibility` of its maximum, -inf elsewhere. Costs two rows of one forward pass a
    token, and one pass over the contexts for the choice of keys.

    Args:
        model: a `Transformer` or a `Predictor`.
        params: its parameters.
        hesitated: for each prompt, itself with its keys: see `key_positions` and
            `hesitation_prompt`.
        alpha: the reference scripts have 0.1 (FACTOR), 1.6 (HaluEval), 6 (TruthfulQA).
        plausibility: 0 excludes no token, as the reference code's generation does; with a large
            alpha rare tokens then win.

    Raises:
        ConfigError: a setting is impossible.

    Reference: Kai et al., "SH2: Self-Highlighted Hesitation Helps You Decode More Truthfully",
    arXiv 2401.05930.
    """
    return TwoPrompts(as_predictor(model), expert="other"), TwoPromptsParams(
        params, in_bucket(hesitated), number("alpha", alpha), share_of_best(plausibility)
    )


def multiple_choice(
    scores: Sequence[float] | np.ndarray, correct: Sequence[bool] | np.ndarray
) -> dict[str, float]:
    """Returns how a question with scored answers is judged.

    mc1: 1 if the first correct answer (the best one) scores above every incorrect one. mc2: share
    of the correct answers in the sum of exp(score). mc3: share of correct answers that score above
    every incorrect one. factor: 1 if the first correct answer scores at least as high as every
    incorrect one.

    >>> found = multiple_choice([-1.0, -3.0, -2.0], [True, True, False])
    >>> found["mc1"], found["mc3"]
    (1.0, 0.5)

    Reference: Lin et al., "TruthfulQA", arXiv 2109.07958 (mc1 to mc3); Muhlgay et al., "FACTOR",
    arXiv 2307.06908.
    """
    given, right = np.asarray(scores, np.float64), np.asarray(correct, bool)
    if not right.any() or right.all():
        raise ConfigError("multiple choice needs a correct and an incorrect answer")
    rival = given[~right].max()
    weights = np.exp(given - given.max())
    best = given[right][0]
    return {
        "mc1": float(best > rival),
        "mc2": float(weights[right].sum() / weights.sum()),
        "mc3": float((given[right] > rival).mean()),
        "factor": float(best >= rival),
    }
