"""A tiny model, and examples in memory that look like a token store."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tokjax.models import ModelConfig, Transformer

V = 61


class MemoryStore:
    """Examples as (ids, number of prompt tokens, BOS included)."""

    def __init__(self, examples):
        self.examples = examples
        self.num_examples = len(examples)
        self.lengths = np.array([len(ids) for ids, _ in examples])
        self.fingerprint = "memory"

    def tokens(self, i, start=0, stop=None):
        return np.array(self.examples[i][0][start:stop], np.int32)

    def weights(self, i, start=0, stop=None):
        ids, prompt = self.examples[i]
        return np.array([0.0] * prompt + [1.0] * (len(ids) - prompt), np.float32)[start:stop]

    def example_key(self, i):
        return f"{i:016x}"

    def example_name(self, i):
        return f"memory:{i}"


@pytest.fixture(scope="session")
def store():
    """What makes a store of (ids, number of prompt tokens) pairs."""
    return MemoryStore


@pytest.fixture(scope="session")
def lm():
    """A model of random parameters, large enough for its states to differ."""
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_positions": 64}
    model = Transformer(ModelConfig(vocab_size=V, **sizes))
    params = model.init(jax.random.key(1))
    params = {**params, "embedding": 50 * params["embedding"]}

    @jax.jit
    def padded(tokens):
        logits, out = model(params, tokens, capture={"attn_probs"})
        return logits[0], out.x[0], out.captured["attn_probs"][:, 0]

    def forward(ids):
        """The logits, last states and attention [L, H, T, T] of one sequence, in float64."""
        tokens, n = np.zeros((1, 64), np.int32), len(ids)
        tokens[0, :n] = ids
        logits, x, probs = (np.asarray(a, np.float64) for a in padded(tokens))
        return logits[:n], x[:n], probs[..., :n, :n]

    return SimpleNamespace(model=model, params=params, forward=forward)


@pytest.fixture(scope="session")
def pool():
    """Twenty examples of 2 to 40 tokens; the last has no response."""
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(20):
        n = int(rng.integers(3, 40))
        examples.append(([1, *rng.integers(3, V, n).tolist()], int(rng.integers(1, n))))
    examples[-1] = (examples[-1][0], len(examples[-1][0]))
    return MemoryStore(examples)


@pytest.fixture(scope="session")
def target():
    """Four examples, one without a response."""
    rng = np.random.default_rng(1)
    rows = [([1, *rng.integers(3, V, n).tolist()], 3) for n in (9, 12, 5)]
    return MemoryStore([*rows, ([1, 5, 6], 3)])
