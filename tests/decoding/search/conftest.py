"""A tiny model with its predictions without a cache, and a predictor that is a table."""

from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tokjax.decoding import Prompts, StepOutput
from tokjax.models import ModelConfig, Transformer

WIDTH = 48


@dataclass(frozen=True)
class Table:
    """Predicts by the last token alone; its parameters are logits [V, V]."""

    vocab_size: int
    max_positions: int = 64

    def prepare(self, params):
        return jnp.asarray(params, jnp.float32)

    def init(self, prepared, prompts, capacity):
        last = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)[:, 0]
        return self.step(prepared, jnp.zeros(last.shape[0]), last)

    def step(self, prepared, state, tokens):
        return state, StepOutput(prepared[tokens])


@pytest.fixture(scope="session")
def table():
    """A function: probabilities [V][V] of the next token -> (predictor, parameters)."""

    def make(probabilities):
        with np.errstate(divide="ignore"):
            logits = np.log(np.asarray(probabilities, np.float64))
        return Table(len(logits)), logits.astype(np.float32)

    return make


@pytest.fixture(scope="session")
def lm():
    """A tiny model, its parameters, and `run`: ids -> (logits [T, V], hidden states [T, D])."""
    model = Transformer(
        ModelConfig(
            vocab_size=61,
            d_model=32,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            max_positions=96,
            tie_embeddings=False,
        )
    )
    params = model.init(jax.random.key(1))
    # Sharper than a fresh model: texts differ, and the best lead by a margin.
    params = {**params, "embedding": 50 * params["embedding"], "head": 2 * params["head"]}
    return with_run(model, params)


def with_run(model, params):
    @jax.jit
    def forward(params, tokens):
        x = model.backbone(params, model.embed(params, tokens)).x
        return model.unembed(params, x)[0], x[0]

    def run(ids):
        padded = np.zeros((1, WIDTH), np.int32)
        padded[0, : len(ids)] = ids
        return [np.asarray(a, np.float64)[: len(ids)] for a in forward(params, padded)]

    return SimpleNamespace(
        model=model,
        params=params,
        run=run,
        logp=lambda ids: scipy.special.log_softmax(run(ids)[0][-1]),
    )


@pytest.fixture(scope="session")
def run_of():
    """The function that gives a model its `run`."""
    return with_run


@pytest.fixture(scope="session")
def rows():
    """Prompts of different lengths, one of a single token."""
    return [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [60, 0, 60, 0, 11]]


@pytest.fixture(scope="session")
def prompts(rows):
    """They as arrays."""
    return Prompts.of(rows)
