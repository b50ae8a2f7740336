"""Classifier-free guidance of text: a prompt against another, negative or empty, one."""

from typing import Any

from tokjax.decoding.contrast.settings import in_bucket, number, share_of_best
from tokjax.decoding.contrast.two_prompts import TwoPrompts, TwoPromptsParams
from tokjax.decoding.predictors import as_predictor
from tokjax.decoding.prompts import Prompts


def guided(
    model: Any,
    params: Any,
    *,
    weight: Any = 1.5,
    negative: Prompts | None = None,
    plausibility: Any = 0.0,
) -> tuple[TwoPrompts, TwoPromptsParams]:
    """Returns the predictor of classifier-free guidance and its parameters, for `decode`.

    The logits are log p(x | negative) + weight (log p(x | prompt) - log p(x | negative)): weight 1
    is the plain model, 0 the negative prompt's, above 1 away from it. Costs two rows of one
    forward pass a token.

    Args:
        model: a `Transformer` or a `Predictor`.
        params: its parameters.
        weight: one number or one for each row.
        negative: prompts to move away from, one for each row or one for all; default the last
            token of each prompt alone, as a model that was not trained for it has no better
            "unconditional" prompt.
        plausibility: least probability of a token over that of the likeliest, behind the prompt;
            0, the paper's, excludes none.

    Raises:
        ConfigError: a setting is impossible.

    Reference: Sanchez et al., "Stay on topic with Classifier-Free Guidance", arXiv 2306.17806.
    """
    other = None if negative is None else in_bucket(negative)
    alpha = number("weight", weight) - 1
    return TwoPrompts(as_predictor(model)), TwoPromptsParams(
        params, other, alpha, share_of_best(plausibility)
    )
