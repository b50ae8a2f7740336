"""Changes to logits on their way to the sampler: (init, update) pairs that compose with `chain`.

Each value is an array leaf of its transform, either one number or one for each row: setting another
number compiles nothing. Excluded tokens get the logit -inf.
"""

from tokjax.decoding.transforms.base import Chain, Stateless, Transform, chain
from tokjax.decoding.transforms.constraints import (
    bad_words,
    forced,
    logit_bias,
    min_new_tokens,
    no_repeat_ngram,
    sequence_bias,
    suppress,
)
from tokjax.decoding.transforms.penalties import count_penalty, repetition_penalty
from tokjax.decoding.transforms.truncation import (
    epsilon,
    eta,
    min_p,
    mirostat,
    temperature,
    top_k,
    top_p,
    typical,
)
from tokjax.decoding.transforms.watermark import watermark, watermark_score

__all__ = [
    "Chain",
    "Stateless",
    "Transform",
    "bad_words",
    "chain",
    "count_penalty",
    "epsilon",
    "eta",
    "forced",
    "logit_bias",
    "min_new_tokens",
    "min_p",
    "mirostat",
    "no_repeat_ngram",
    "repetition_penalty",
    "sequence_bias",
    "suppress",
    "temperature",
    "top_k",
    "top_p",
    "typical",
    "watermark",
    "watermark_score",
]
