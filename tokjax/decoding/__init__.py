"""Decoding: predictors say the next token's logits, transforms change them, samplers take one."""

from tokjax.decoding.context import Context
from tokjax.decoding.engine import Generation, check_prompts, decode
from tokjax.decoding.predictors import (
    Conditioned,
    EncoderDecoderPredictor,
    ModelPredictor,
    Predictor,
    StepOutput,
)
from tokjax.decoding.prompts import Prompts
from tokjax.decoding.samplers import Sampler, categorical, greedy
from tokjax.decoding.stops import Stop, any_of, never, on_tokens
from tokjax.decoding.transforms import (
    Transform,
    chain,
    min_p,
    repetition_penalty,
    temperature,
    top_k,
    top_p,
)

__all__ = [
    "Conditioned",
    "Context",
    "EncoderDecoderPredictor",
    "Generation",
    "ModelPredictor",
    "Predictor",
    "Prompts",
    "Sampler",
    "StepOutput",
    "Stop",
    "Transform",
    "any_of",
    "categorical",
    "chain",
    "check_prompts",
    "decode",
    "greedy",
    "min_p",
    "never",
    "on_tokens",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
]
