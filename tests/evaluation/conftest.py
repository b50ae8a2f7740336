"""A tiny model over bytes."""

import jax
import pytest

from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.language_model import LanguageModel
from tokjax.models import ModelConfig, Transformer


@pytest.fixture(scope="session")
def lm():
    """The model; it has 48 positions."""
    tokenizer = ByteTokenizer()
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, d_model=32, n_layers=2, n_heads=4, max_positions=48
    )
    model = Transformer(config)
    params = model.init(jax.random.key(0))
    return LanguageModel(model, {**params, "embedding": 30 * params["embedding"]}, tokenizer)
