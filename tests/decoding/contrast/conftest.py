"""A tiny model, its predictions without a cache, and greedy decoding by full recomputation."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import scipy.special

from tokjax.models import Edits, ModelConfig, Transformer
from tokjax.parallel.mesh import MeshConfig, build_mesh

V, WIDTH = 61, 48


def sharp(model, seed):
    """Parameters whose texts differ, with likeliest tokens that lead by a margin."""
    params = model.init(jax.random.key(seed))
    return {**params, "embedding": 50 * params["embedding"], "head": 3 * params["head"]}


def tiny(**changes):
    """A model with its parameters and `logits`, which maps ids to [T, V] in one padded pass."""
    settings = {
        "vocab_size": V,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "max_positions": 96,
        "tie_embeddings": False,
    }
    seed = changes.pop("seed", 1)
    model = Transformer(ModelConfig(**{**settings, **changes}))
    params = sharp(model, seed)

    @jax.jit
    def forward(params, tokens, edits):
        logits, out = model(params, tokens, edits=edits, capture={"resid_pre"})
        return logits[0], out.captured["resid_pre"][:, 0]

    def run(ids, edits=None):
        padded = np.zeros((1, WIDTH), np.int32)
        padded[0, : len(ids)] = ids
        logits, states = forward(params, padded, edits or Edits())
        return np.asarray(logits, np.float64)[: len(ids)], states[:, : len(ids)]

    return SimpleNamespace(
        model=model,
        params=params,
        run=run,
        logp=lambda ids, edits=None: scipy.special.log_softmax(run(ids, edits)[0], axis=-1),
    )


@pytest.fixture(scope="session")
def lm():
    """The model most tests use."""
    return tiny()


@pytest.fixture(scope="session")
def small():
    """A smaller model of the same vocabulary."""
    return tiny(n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, seed=2)


@pytest.fixture(scope="session")
def make():
    """The function `tiny`."""
    return tiny


@pytest.fixture(scope="session")
def rows():
    """Prompts of different lengths, one of a single token."""
    return [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [60, 0, 60, 0, 11]]


@pytest.fixture(scope="session")
def check_recomputed():
    """A check that a generation is what greedy decoding without a cache writes.

    At each step, what `scores(ids)` says of the token behind the whole text is taken; it must lead
    the next best by more than rounding.
    """

    def check(generation, b, prompt, scores, atol=1e-3):
        ids, logprobs = list(prompt), []
        for _ in range(int(generation.lengths[b])):
            found = np.asarray(scores(ids))
            second, first = np.sort(found)[-2:]
            assert first - second > 1e-4
            ids.append(int(found.argmax()))
            logprobs.append(first - scipy.special.logsumexp(found))
        assert generation.rows()[b] == ids[len(prompt) :]
        np.testing.assert_allclose(generation.logprobs[b, : len(logprobs)], logprobs, atol=atol)

    return check


@pytest.fixture(scope="session")
def masked():
    """Reference plausibility in NumPy: the scores where p is at least `share` of its maximum."""

    def restrict(scores, logp, share=0.1, sentinel=-np.inf):
        return np.where(np.exp(logp) >= share * np.exp(logp).max(), scores, sentinel)

    return restrict


@pytest.fixture
def mesh():
    """All eight devices, along three axes."""
    return build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
