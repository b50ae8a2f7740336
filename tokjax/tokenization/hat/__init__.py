"""Hierarchical autoregressive transformers: bytes in words, words in a backbone."""

from tokjax.data.word_splitter import split_words
from tokjax.data.word_tokenizer import TEXT_END, WORD_END, WordTokenizer
from tokjax.tokenization.hat.objective import Hat
from tokjax.tokenization.hat.predictor import HatParams, HatPredictor, hat

__all__ = [
    "TEXT_END",
    "WORD_END",
    "Hat",
    "HatParams",
    "HatPredictor",
    "WordTokenizer",
    "hat",
    "split_words",
]
