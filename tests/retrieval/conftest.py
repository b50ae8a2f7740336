"""Queries with passages: a token store of them, a tiny model of bytes with a head of scores."""

import json

import jax
import numpy as np
import pytest

from tokjax.config import resolve
from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.data.encoding import Encoder
from tokjax.data.loader import EvalLoader
from tokjax.data.records import to_document
from tokjax.data.sources import JsonlSource
from tokjax.data.store import StoreWriter, TokenStore
from tokjax.models import ModelConfig, Transformer
from tokjax.retrieval.dear import DeAR
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.objective import init_heads
from tokjax.training.run import build_run

MODEL = Transformer(
    ModelConfig(vocab_size=257, d_model=32, n_layers=1, n_heads=2, max_positions=64)
)


@pytest.fixture(scope="session")
def records():
    """Five queries with three passages each, labelled and scored by a teacher."""
    return [
        {
            "query": "ab"[: 1 + i % 2],
            "passages": [
                {
                    "text": "xyz"[: 1 + (i + j) % 3],
                    "title": "t" * (j % 2),
                    "score": float(i - 2 * j),
                }
                for j in range(3)
            ],
            "labels": [i % 3, (i + 1) % 3, 0],
        }
        for i in range(5)
    ]


@pytest.fixture(scope="session")
def stored(tmp_path_factory):
    """A function from records of rankings to a token store of bytes; 256 begins and ends."""

    def make(records, **settings):
        source = JsonlSource(files=("x.jsonl",), kind="ranking", **settings)
        documents = [to_document(r, source, f"x.jsonl:{n}") for n, r in enumerate(records, 1)]
        encoder = Encoder(ByteTokenizer(), before=(256,), after=(256,))
        folder = tmp_path_factory.mktemp("rankings") / "store"
        with StoreWriter(folder, vocab_size=257) as writer:
            for e in encoder.encode(documents):
                writer.add(
                    e.tokens, e.weights, key=e.key, name=e.name, cuts=e.cuts, values=e.values
                )
        return TokenStore.open(folder, verify=True)

    return make


@pytest.fixture(scope="session")
def batch(stored, records):
    """The batch of all five queries: three rows for two queries each, one place empty."""
    loader = EvalLoader([stored(records)], seq_len=160, batch_size=3)
    assert len(loader) == 1
    return loader.batch(0)


@pytest.fixture(scope="session")
def lm():
    """A model with its parameters, those of the head included."""
    params = MODEL.init(jax.random.key(0))
    heads = init_heads(DeAR(), jax.random.key(1), MODEL)
    return MODEL, {**params, "embedding": 20 * params["embedding"], **heads}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run with its configuration: a passage that repeats the query is relevant."""
    folder = tmp_path_factory.mktemp("dear")
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(64):
        good, *bad = rng.permutation(list("abcdef"))[:3].tolist()
        passages = [{"text": x * 3, "score": 2.0 * (x == good)} for x in (good, *bad)]
        lines.append(json.dumps({"query": good, "passages": passages}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    source = {"name": "jsonl", "files": (str(folder / "train.jsonl"),), "kind": "ranking"}
    tree = {
        "model": {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_positions": 256},
        "data": {
            "tokenizer": {"name": "bytes"},
            "train": [{"source": source}],
            "evals": {"held_out": source},
            "seq_len": 256,
            "batch_size": 4,
            "cache_dir": str(folder / "cache"),
        },
        "objective": {"name": "dear"},
        "steps": 100,
        "optimizer": {"name": "adamw", "peak_lr": 1e-2},
        "evaluation": {"every_steps": 100},
        "checkpoints": {"every_steps": 100},
        "log_every": 1,
    }
    run = build_run(resolve(TrainConfig, tree), devices=jax.devices()[:1], show_progress=False)
    train(run, folder / "run")
    return folder / "run", tree
