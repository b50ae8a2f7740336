"""A language model small enough to train in a test, and packed batches for it."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.data.batch import Batch
from tokjax.models import ModelConfig, Transformer

V, T = 37, 16


def packed_batch(seed: int, rows: int = 8, weights: str = "real") -> Batch:
    """Rows of two examples and some filling; weights are "real" (of both signs) or "ones"."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(2, T, (rows, 2)), axis=1)
    columns = np.arange(T)
    segments = 1 + (columns >= cuts[:, :1]) - 2 * (columns >= cuts[:, 1:])
    segments = np.where(columns >= cuts[:, 1:], 0, segments)
    positions = np.where(segments == 2, columns - cuts[:, :1], columns)
    drawn = rng.normal(1.0, 0.8, (rows, T)) if weights == "real" else np.ones((rows, T))
    return Batch(
        tokens=jnp.asarray(rng.integers(0, V, (rows, T)), jnp.int32),
        targets=jnp.asarray(rng.integers(0, V, (rows, T)), jnp.int32),
        positions=jnp.asarray(positions, jnp.int32),
        segment_ids=jnp.asarray(segments, jnp.int32),
        weights=jnp.asarray(np.where(segments > 0, drawn, 0.0), jnp.float32),
        example_id=jnp.zeros((rows, 2), jnp.int32),
    )


@pytest.fixture(scope="session")
def small():
    """A model of two layers, whose sizes divide by two, and `packed_batch`."""
    config = ModelConfig(
        vocab_size=V + 1,
        d_model=16,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        d_ff=32,
        attention_bias=True,
        tie_embeddings=False,
    )
    return SimpleNamespace(config=config, model=Transformer(config), batch=packed_batch)
