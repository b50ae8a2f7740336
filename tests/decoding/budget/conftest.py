"""A tiny model whose texts differ, and traces whose remaining length can be read from them."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tokjax.models import ModelConfig, Transformer

V, WIDTH = 48, 48
THINK, CLOSE, NEWLINE = 1, 2, 3


@pytest.fixture(scope="session")
def lm():
    """The model, its parameters and `run`, which maps ids to the logits and states at their end."""
    model = Transformer(
        ModelConfig(
            vocab_size=V,
            d_model=32,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            max_positions=96,
            tie_embeddings=False,
        )
    )
    params = model.init(jax.random.key(1))
    params = {**params, "embedding": 50 * params["embedding"], "head": 3 * params["head"]}

    @jax.jit
    def forward(params, tokens):
        logits, out = model(params, tokens, capture={"resid_pre"})
        return logits[0], jax.numpy.concatenate([out.captured["resid_pre"][:, 0], out.x])

    def run(ids):
        padded = np.zeros((1, WIDTH), np.int32)
        padded[0, : len(ids)] = ids
        logits, states = forward(params, padded)
        return np.asarray(logits, np.float64)[len(ids) - 1], states[:, len(ids) - 1]

    return SimpleNamespace(model=model, params=params, run=run)


@pytest.fixture(scope="session")
def rows():
    """Prompts of different lengths, one of a single token."""
    return [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [40, 0, 40, 0, 11]]


@pytest.fixture(scope="session")
def traces():
    """Traces of 1 to 8 lines, each begun by the number of lines that follow."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(160):
        row = [int(rng.integers(30, 40)), THINK]
        for left in reversed(range(int(rng.integers(1, 9)))):
            row += [10 + left, *rng.integers(20, 30, 3).tolist(), NEWLINE]
        found.append([*row, CLOSE, int(rng.integers(30, 40)), 0])
    return found
