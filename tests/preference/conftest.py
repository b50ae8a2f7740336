"""Token stores of a few records, and a tiny model of bytes."""

import jax
import numpy as np
import pytest

from tokjax.data.annotated import annotate
from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.data.encoding import Encoder
from tokjax.data.loader import EvalLoader
from tokjax.data.records import to_document
from tokjax.data.sources import JsonlSource
from tokjax.data.store import StoreWriter, TokenStore
from tokjax.models import ModelConfig, Transformer
from tokjax.preference.token_weights import write_token_weights


@pytest.fixture(scope="session")
def stored(tmp_path_factory):
    """A function from records and their kind to a token store of bytes; 256 begins and ends."""

    def make(records, kind):
        source = JsonlSource(files=("x.jsonl",), kind=kind)
        documents = [to_document(record, source, f"x:{n}") for n, record in enumerate(records)]
        encoder = Encoder(ByteTokenizer(), before=(256,), after=(256,))
        folder, facts = tmp_path_factory.mktemp(kind) / "store", {"after": [256]}
        with StoreWriter(folder, vocab_size=257, tokenizer=facts) as writer:
            for e in encoder.encode(documents):
                writer.add(e.tokens, e.weights, key=e.key, name=e.name, cuts=e.cuts)
        return TokenStore.open(folder)

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
