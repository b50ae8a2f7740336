"""Tiny models, predictions from a table, and a test of frequencies."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tokjax import struct
from tokjax.models import ModelConfig, Transformer

V = 61


def sharp(model, seed):
    """Parameters whose texts differ, with likeliest tokens that lead by a margin."""
    params = model.init(jax.random.key(seed))
    return {**params, "embedding": 50 * params["embedding"], "head": 3 * params["head"]}


def tiny(seed=1, **changes):
    """A model with its parameters, and `logits`: ids to [T, V] in one padded pass."""
    settings = {
        "vocab_size": V,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "max_positions": 96,
        "tie_embeddings": False,
    }
    model = Transformer(ModelConfig(**{**settings, **changes}))
    params = sharp(model, seed)
    forward = jax.jit(lambda params, tokens: model(params, tokens)[0][0])

    def logits(ids):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(forward(params, padded))[: len(ids)]

    return SimpleNamespace(model=model, params=params, logits=logits)


@pytest.fixture(scope="session")
def make():
    """The function `tiny`."""
    return tiny


@pytest.fixture(scope="session")
def lm():
    """The model most tests use."""
    return tiny()


@pytest.fixture(scope="session")
def small():
    """A smaller model that often agrees with `lm`: its first layer, with noise."""
    found = tiny(n_layers=1)
    first = jax.tree.map(lambda a: a[:1], tiny().params["layers"])
    noise = jax.random.normal(jax.random.key(5), found.params["head"].shape)
    params = {**tiny().params, "layers": first}
    params["head"] = params["head"] + 0.02 * noise
    return SimpleNamespace(model=found.model, params=params)


@pytest.fixture(scope="session")
def rows():
    """Prompts of different lengths, one of a single token, one longer than the windows."""
    return [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [60, 0, 60, 0, 11]]


@struct.dataclass
class TableState:
    table: Any
    lengths: Any


@dataclass(frozen=True)
class Tables:
    """Logits that depend on the last token and on the first one of the prompt, read from a table.

    Parameters are [R V V]: the prompt's first token chooses the first axis.
    """

    vocab_size: int
    max_positions: int = 10_000

    def prepare(self, params):
        return params

    def start(self, prepared, prompts, capacity, chunk):
        return TableState(prompts.tokens[:, 0], prompts.lengths)

    def extend(self, prepared, state, tokens, first, count):
        at = first[:, None] + jnp.arange(count)
        tokens_read = jnp.take_along_axis(tokens, at, axis=1)
        state = state.replace(lengths=state.lengths + tokens.shape[1])
        return state, prepared[state.table[:, None], tokens_read]

    def rewind(self, state, lengths):
        return state.replace(lengths=jnp.minimum(state.lengths, lengths))


@pytest.fixture(scope="session")
def tables():
    """The class `Tables`."""
    return Tables


@pytest.fixture(scope="session")
def context_free():
    """A function giving `Tables` parameters of laws that depend on nothing but the row's table."""

    def logits(*laws):
        log = np.log(np.maximum(np.array(laws, np.float32), 1e-30))
        return jnp.broadcast_to(log[:, None], (len(laws), log.shape[1], log.shape[1]))

    return logits


@pytest.fixture(scope="session")
def follows():
    """A check that outcomes follow a law, by chi-square at a level of 1e-4.

    Outcomes of less than five expected occurrences count together.
    """

    def check(outcomes, law):
        law = np.asarray(law, np.float64).ravel()
        assert abs(law.sum() - 1) < 1e-4
        counts = np.bincount(np.asarray(outcomes).ravel(), minlength=len(law)).astype(float)
        expected = law / law.sum() * counts.sum()
        assert counts[expected == 0].sum() == 0
        common = expected >= 5
        observed, wanted = counts[common], expected[common]
        rest = expected[~common].sum()
        if rest > 0:
            observed, wanted = np.append(observed, counts[~common].sum()), np.append(wanted, rest)
        assert scipy.stats.chisquare(observed, wanted).pvalue > 1e-4

    return check
