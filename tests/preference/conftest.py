"""Token stores of a few records, and a tiny model of bytes."""

import json

import jax
import numpy as np
import pytest

from tokjax.config import resolve
from tokjax.data.annotated import annotate
from tokjax.data.config import DataConfig
from tokjax.data.loader import EvalLoader
from tokjax.data.prepare import ensure_store
from tokjax.data.store import TokenStore
from tokjax.models import ModelConfig, Transformer
from tokjax.preference.token_weights import write_token_weights


@pytest.fixture(scope="session")
def stored(tmp_path_factory):
    """A function from records and their kind to a token store of bytes; 256 begins and ends."""

    def make(records, kind):
        folder = tmp_path_factory.mktemp(kind)
        file = folder / "records.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        source = {"name": "jsonl", "files": (str(file),), "kind": kind}
        tree = {"tokenizer": {"name": "bytes"}, "train": [{"source": source}]}
        data = resolve(DataConfig, tree)
        path = ensure_store(data.train[0].source, data, cache_dir=folder, progress=False)
        return TokenStore.open(path)

    return make


@pytest.fixture(scope="session")
def batch_of(tmp_path_factory):
    """A function from a store and weights of its tokens to a batch of all its examples."""

    def make(store, weights=None, rows=4):
        if weights is not None:
            path = tmp_path_factory.mktemp("weights") / "weights.parquet"
            write_token_weights(path, store, weights, method="test", options={"x": 1})
            store = annotate(store, str(path))
        loader = EvalLoader([store], seq_len=64, batch_size=rows)
        assert len(loader) == 1
        return loader.batch(0)

    return make


@pytest.fixture(scope="session")
def lm():
    """A model with weights large enough that its predictions differ."""
    config = ModelConfig(vocab_size=257, d_model=32, n_layers=2, n_heads=2, max_positions=64)
    model = Transformer(config)
    params = model.init(jax.random.key(0))
    return model, {**params, "embedding": 20 * params["embedding"]}


@pytest.fixture(scope="session")
def next_logprobs(lm):
    """A function from (parameters, ids) to float64 log-probabilities of what follows each id."""
    model, _ = lm
    forward = jax.jit(lambda params, tokens: model(params, tokens)[0])

    def of(params, ids):
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(ids)] = ids
        z = np.asarray(forward(params, tokens), np.float64)[0, : len(ids)]
        z -= z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    return of
