"""A constraint with few texts: all of them, and how likely the model finds each."""

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.decoding.constrained.automaton import Automaton
from tokjax.decoding.prompts import Prompts, bucket
from tokjax.errors import ConfigError
from tokjax.models.transformer import Transformer
from tokjax.signals.token_stats import token_stats


def matches(automaton: Automaton, *, at_most: int = 1000) -> list[list[int]]:
    """Returns every sequence of tokens that ends a row: each way to write each text.

    One that could go on ends with an EOS id.

    Raises:
        ConfigError: there are more than `at_most`.
    """
    found: list[list[int]] = []
    begun: deque[tuple[int, tuple[int, ...]]] = deque([(0, ())])
    while begun:
        state, row = begun.popleft()
        if automaton.complete[state] and row:
            found.append(list(row))
            continue
        for token in np.flatnonzero(automaton.allowed(state)).tolist():
            begun.append((int(automaton.next[state, automaton.classes[token]]), (*row, token)))
        if len(found) + len(begun) > at_most:  # each of them leads to one at least
            raise ConfigError(
                f"{automaton.name} has more than {at_most} sequences of tokens: raise at_most, or "
                f"resample what `constrained` writes"
            )
    return found


def match_logprobs(
    model: Transformer, params: Any, prompt: Sequence[int], rows: Sequence[Sequence[int]]
) -> Float[np.ndarray, "R"]:
    """Returns the log-probability of each continuation of a prompt, at temperature 1.

    Normalised over all `matches`, it is the model's distribution given that the constraint holds,
    which step by step masking is not: drawing from it is exact.

    Raises:
        ConfigError: the prompt or a continuation is empty.
    """
    if not len(prompt):
        raise ConfigError("the prompt has no tokens: begin it with the BOS id")
    whole = Prompts.of([[*prompt, *row] for row in rows])
    if int(np.min(whole.lengths)) == len(prompt):
        raise ConfigError("a continuation has no tokens")
    width = bucket(whole.tokens.shape[1])
    tokens = np.pad(np.asarray(whole.tokens), ((0, 0), (0, width - whole.tokens.shape[1])))
    logprobs = _logprobs(model, params, tokens)
    at = np.arange(1, width)
    own = (at >= len(prompt)) & (at < np.asarray(whole.lengths)[:, None])
    return np.where(own, np.asarray(logprobs, np.float64), 0.0).sum(1)


@partial(jax.jit, static_argnums=0)
def _logprobs(model: Transformer, params: Any, tokens: Int[Array, "R T"]) -> Float[Array, "R S"]:
    x = model.backbone(params, model.embed(params, tokens)).x
    stats = token_stats(
        x[:, :-1], model.head(params), jnp.asarray(tokens)[:, 1:], want=("logprob",)
    )
    assert stats.logprob is not None
    return stats.logprob
