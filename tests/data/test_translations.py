"""Texts with their translations, from records to batches."""

import json
from typing import Any

import numpy as np
import pytest

from tokjax.config import resolve
from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.data.config import DataConfig
from tokjax.data.encoding import Encoder
from tokjax.data.loader import EvalLoader, Loader, StageSlice
from tokjax.data.prepare import ensure_store
from tokjax.data.records import BadRecord, to_document
from tokjax.data.sources import JsonlSource
from tokjax.data.store import TokenStore
from tokjax.errors import ConfigError

FIELDS: dict[str, Any] = {"kind": "translation", "prompt": "en", "response": "de"}


def encoded(record, before=(256,), after=(257,)) -> Any:
    document = to_document(record, JsonlSource(files=("x.jsonl",), **FIELDS), "x:1")
    return Encoder(ByteTokenizer(), before, after).encode([document])[0]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("translations")
    lines = [{"en": "a" * (1 + i % 3), "de": "b" * (1 + i % 4)} for i in range(12)]
    (folder / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"name": "jsonl", "files": (str(folder / "x.jsonl"),), **FIELDS}
    data = resolve(DataConfig, {"tokenizer": {"name": "bytes"}, "train": [{"source": source}]})
    path = ensure_store(data.train[0].source, data, cache_dir=folder, progress=False)
    return TokenStore.open(path, verify=True)


def test_both_texts_are_whole_sequences_of_their_own():
    example = encoded({"en": "cat", "de": "Katze"})
    first, second = [256, *b"cat", 257], [256, *b"Katze", 257]
    # One token closes the pair, so that the second text is whole among the inputs.
    assert example.tokens.tolist() == [*first, *second, 257]
    assert example.cuts == (len(first),)
    assert example.weights[-1] == 0 and (example.weights[:-1] == 1).all()
    assert {k: v.tolist() for k, v in example.values.items()} == {"side": [0, 1]}
    assert example.num_bytes == 8


def test_a_store_of_translations_holds_neither_rankings_nor_pairs_of_answers(store):
    assert store.has_translations and not store.has_rankings and not store.has_pairs
    assert store.sequences == 2 and store.value_names == ("side",)


def test_a_batch_keeps_translations_side_by_side(store):
    batch = Loader(
        [store], rates=None, seq_len=24, batch_size=2, seed=0, stages=[StageSlice(1, 1)]
    ).batch(0)
    assert batch.group == 2 and batch.example_id.shape[1] % 2 == 0
    there = batch.example_id >= 0
    assert there.any() and (batch.example_id[:, ::2] == batch.example_id[:, 1::2]).all()
    np.testing.assert_array_equal(batch.values["side"][:, 1::2], there[:, 1::2].astype(np.float32))
    assert (batch.values["side"][:, ::2] == 0).all()
    letters = {0: ord("a"), 1: ord("b")}
    for row, segments in zip(batch.tokens, batch.segment_ids, strict=True):
        for segment in range(1, segments.max() + 1):
            own = row[segments == segment]
            assert set(own[1:-1].tolist()) == {letters[(segment - 1) % 2]}


def test_every_pair_is_evaluated_once(store):
    found = []
    loader = EvalLoader([store], seq_len=24, batch_size=2)
    for step in range(len(loader)):
        batch = loader.batch(step)
        found += batch.example_id[batch.example_id >= 0].tolist()
    assert sorted(found) == sorted([*range(12)] * 2)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"en": "a"}, "field 'de' is missing"),
        ({"en": "a", "de": 3}, "'de' is not text"),
        ({"en": None, "de": "b"}, "'en' is null"),
    ],
)
def test_a_bad_record_is_named(record, said):
    with pytest.raises(BadRecord, match=said):
        encoded(record)


def test_an_empty_text_is_a_problem():
    problem = encoded({"en": "a", "de": ""})
    assert problem.reason == "empty" and "second" in problem.detail


def test_an_empty_field_name_is_refused():
    with pytest.raises(ConfigError, match="response is empty"):
        JsonlSource(files=("x.jsonl",), kind="translation", response="")
