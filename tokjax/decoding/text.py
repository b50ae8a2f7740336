"""From text to text: prompts are encoded, continued and decoded."""

from collections.abc import Sequence
from typing import Any

import jax

from tokjax.data.tokenizers import Tokenizer
from tokjax.decoding.engine import decode
from tokjax.decoding.predictors import as_predictor
from tokjax.decoding.prompts import Prompts
from tokjax.decoding.samplers import categorical
from tokjax.decoding.stops import on_tokens
from tokjax.decoding.transforms import chain, min_p, repetition_penalty, temperature, top_k, top_p
from tokjax.errors import ConfigError
