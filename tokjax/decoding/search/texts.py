"""Scorers and extractors that read texts, as the ones of ids that searches call."""

from collections.abc import Callable, Sequence
from typing import Any

from tokjax.data.tokenizers import Tokenizer
from tokjax.decoding.search.drawing import Ids, Scorer
from tokjax.decoding.text import continuation


def scores_of_texts(
    tokenizer: Tokenizer, score: Callable[[Sequence[str], Sequence[str]], Sequence[float]]
) -> Scorer:
    """Returns the scorer that judges prompts and continuations by their texts.

    Args:
        tokenizer: the model's.
        score: of prompts and continuations, a number for each.
    """

    def scorer(prompts: Sequence[Ids], continuations: Sequence[Ids]) -> Sequence[float]:
        pairs = zip(prompts, continuations, strict=True)
        new = [continuation(tokenizer, prompt, ids) for prompt, ids in pairs]
        return score([tokenizer.decode(prompt) for prompt in prompts], new)

    return scorer


def answers_of_texts(
    tokenizer: Tokenizer, extract: Callable[[str], Any | None]
) -> Callable[[Ids], Any | None]:
    """Returns the function that finds a continuation's answer in its text.

    Args:
        tokenizer: the model's; ids are decoded without their prompt.
        extract: a text's answer, or None.
    """
    return lambda ids: extract(tokenizer.decode(ids))
