"""Vocabularies and predictors that constraints are tried on."""

from dataclasses import dataclass

import jax.numpy as jnp
import pytest

from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.decoding import StepOutput
from tokjax.decoding.constrained import TokenTable


@pytest.fixture(scope="session")
def by_bytes():
    """Every byte is a token; 256 is the EOS."""
    return TokenTable.of(ByteTokenizer())


@pytest.fixture(scope="session")
def table():
    """A function: the table of a few tokens, of which the first is the EOS."""

    def make(*tokens, eos=(0,)):
        return TokenTable(repr((tokens, eos)), tuple(eos), (b"", *tokens))

    return make


@dataclass(frozen=True)
class Markov:
    """Logits that depend on the latest token alone."""

    vocab_size: int
    max_positions: int = 512

    def prepare(self, params):
        return params

    def init(self, prepared, prompts, capacity):
        rows = jnp.arange(prompts.tokens.shape[0])
        return rows, StepOutput(prepared[prompts.tokens[rows, prompts.lengths - 1]])

    def step(self, prepared, state, tokens):
        return state, StepOutput(prepared[tokens])


@pytest.fixture(scope="session")
def markov():
    """The class `Markov`."""
    return Markov
