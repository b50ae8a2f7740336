"""Queries with passages, from records to batches."""

import json

import numpy as np
import pytest

from tokjax.config import resolve
from tokjax.data.annotated import AnnotatedStore
from tokjax.data.artifact import read_artifact, write_artifact
from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.data.config import DataConfig
from tokjax.data.encoding import Encoder
from tokjax.data.loader import EvalLoader, Loader, StageSlice
from tokjax.data.prepare import ensure_store
from tokjax.data.records import BadRecord, to_document
from tokjax.data.sources import JsonlSource
from tokjax.data.store import StoreWriter, TokenStore
from tokjax.errors import ConfigError, DataError

RECORD = {"query": "q", "passages": ["a", {"text": "b", "title": "T"}, {"text": "c"}]}


def source(**settings):
    return JsonlSource(files=("x.jsonl",), kind="ranking", **settings)


def encoded(record, before=(256,), after=(257,), **settings):
    document = to_document(record, source(**settings), "x:1")
    (example,) = Encoder(ByteTokenizer(), before, after).encode([document])
    return example


def test_each_passage_is_a_sequence_behind_the_query():
    example = encoded(RECORD)
    parts = np.split(example.tokens, example.cuts)
    texts = (b"document: a", b"document: T b", b"document: c")
    for part, text in zip(parts[:2], texts, strict=False):
        assert part.tolist() == [256, *b"query: q", 256, *text, 257]
    # One token closes the group, so that the last sequence is whole among the inputs.
    assert parts[2].tolist() == [256, *b"query: q", 256, *texts[2], 257, 257]
    assert example.weights[-1] == 0 and (example.weights[:-1] == 1).all()
    assert example.values["label"].tolist() == [1, 0, 0]
    assert set(example.values) == {"label"}
    example = encoded(RECORD, before=(), after=())
    assert bytes(example.tokens[: example.cuts[0]].tolist()) == b"query: qdocument: a"


def test_queries_and_passages_are_cut_to_their_limits():
    record = {"query": "x" * 99, "passages": ["y" * 999, "z"]}
    example = encoded(record)
    first = example.tokens[: example.cuts[0]]
    assert len(first) == 1 + 32 + 1 + 196 + 1
    assert first[-1] == 257 and first[33] == 256
    example = encoded(record, query_tokens=7, passage_tokens=None)
    assert example.cuts[0] == 1 + 7 + 1 + len("document: ") + 999 + 1


def test_labels_and_scores_are_values_of_passages():
    passages = [{"text": t, "score": s} for t, s in (("a", 0.5), ("b", -2), ("c", 3))]
    example = encoded({"query": "q", "passages": passages, "labels": [0, 2, 1.5]})
    assert example.values["label"].tolist() == [0, 2, 1.5]
    assert example.values["score"].tolist() == [0.5, -2, 3]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"query": 3}, "'query' is not text"),
        ({"passages": "a"}, "no list of passages"),
        ({"passages": []}, "no list of passages"),
        ({"passages": ["a"]}, "at least two passages"),
        ({"passages": ["a", 3]}, r"passages\[1\] is 3"),
        ({"passages": ["a", {"title": "b"}]}, "neither text nor an object with text"),
        ({"passages": ["a", {"text": "b", "title": 1}]}, "title is not text"),
        ({"passages": [{"text": "a", "score": "x"}, "b"]}, r"score is no number"),
        ({"passages": [{"text": "a", "score": 1}, "b"]}, "some passages have a score"),
        ({"labels": [1, 0]}, "one number for each passage"),
        ({"labels": [1, 0, -1]}, "below 0"),
        ({"labels": [1, 0, float("inf")]}, "label is not finite"),
        ({"passages": None}, "'passages' is null"),
    ],
)
def test_a_bad_record_is_named(change, said):
    with pytest.raises(BadRecord, match=said):
        to_document({**RECORD, **change}, source(), "x:1")


@pytest.mark.parametrize("settings", [{"query_tokens": 0}, {"passage_tokens": -1}, {"query": ""}])
def test_impossible_sources_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        source(**settings)


def lines(n, passages=3, scores=True):
    for i in range(n):
        yield {
            "query": "q" * (1 + i % 3),
            "passages": [
                {"text": "p" * (1 + (i + j) % 4), **({"score": i + j / 4} if scores else {})}
                for j in range(passages)
            ],
        }


def prepared(folder, records, **settings):
    (folder / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    files = (str(folder / "x.jsonl"),)
    data = resolve(
        DataConfig,
        {
            "tokenizer": {"name": "bytes"},
            "train": [{"source": {"name": "jsonl", "files": files, "kind": "ranking"}}],
            **settings,
        },
    )
    path = ensure_store(data.train[0].source, data, cache_dir=folder, progress=False)
    return TokenStore.open(path, verify=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("rankings"), lines(12))


def test_a_store_keeps_groups_and_their_values(store):
    assert store.sequences == 3 and store.has_rankings and not store.has_pairs
    assert store.value_names == ("label", "score")
    for i, record in enumerate(lines(12)):
        expected = [p["score"] for p in record["passages"]]
        assert store.values("score", i).tolist() == expected
        assert store.values("label", i).tolist() == [1, 0, 0]
        assert len(store.cuts(i)) == 2


def loaded(store, **changes):
    settings = {"seq_len": 256, "batch_size": 2, "stages": [StageSlice(3)]}
    return Loader([store], rates=None, seed=0, **(settings | changes))


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_all_passages_of_a_query_are_neighbours_in_one_row(store, packing):
    loader, seen = loaded(store, packing=packing, stages=[StageSlice(6)]), []
    for step in range(6):
        batch = loader.batch(step)
        assert batch.group == 3 == loader.group
        assert batch.example_id.shape[1] % 3 == 0
        for b in range(2):
            for s in range(0, batch.example_id.shape[1], 3):
                ids = batch.example_id[b, s : s + 3]
                if ids[0] < 0:
                    assert (ids == -1).all() and not batch.values["score"][b, s : s + 3].any()
                    continue
                (example,) = set(ids.tolist())
                seen.append(example)
                whole = np.split(store.tokens(example)[:-1], store.cuts(example))
                for j in range(3):
                    own = batch.segment_ids[b] == s + j + 1
                    np.testing.assert_array_equal(batch.tokens[b, own], whole[j])
                    np.testing.assert_array_equal(batch.positions[b, own], np.arange(own.sum()))
                    # What ends a sequence predicts nothing.
                    weights = batch.weights[b, own]
                    assert weights[-1] == 0 and (weights[:-1] == 1).all()
                for name in ("label", "score"):
                    expected = store.values(name, example)
                    np.testing.assert_array_equal(batch.values[name][b, s : s + 3], expected)
    assert set(seen) == set(range(12))


def test_what_would_tear_groups_apart_is_refused(store):
    with pytest.raises(DataError, match="longer than a row"):
        loaded(store, seq_len=50)
    with pytest.raises(ConfigError, match="concat"):
        loaded(store, packing="concat")
    with pytest.raises(ConfigError, match="shortens"):
        loaded(store, stages=[StageSlice(3, 4)])


def test_groups_of_several_sizes_or_kinds_in_one_data_set_are_refused(tmp_path):
    for name, other, said in (
        ("size", lines(1, passages=4), r"x\.jsonl:3 has 4 sequences .* have 3"),
        ("scores", lines(1, scores=False), r"x\.jsonl:3 has label .* have label and score"),
    ):
        (tmp_path / name).mkdir()
        with pytest.raises(DataError, match=said):
            prepared(tmp_path / name, [*lines(2), *other])


def test_stores_of_several_kinds_are_not_mixed(store, tmp_path):
    with StoreWriter(tmp_path / "plain", vocab_size=257) as writer:
        writer.add([1, 2, 3], key="0" * 16, name="plain")
    plain = TokenStore.open(tmp_path / "plain")
    with pytest.raises(ConfigError, match="single examples and rankings of 3 passages with label"):
        EvalLoader([plain, store], seq_len=256, batch_size=1)


def test_an_artifact_chooses_among_rankings(store, tmp_path):
    keep = [i % 2 == 0 for i in range(12)]
    write_artifact(
        tmp_path / "a.parquet",
        keys=[store.example_key(i) for i in range(12)],
        names=[""] * 12,
        n_tokens=store.lengths,
        scores=None,
        keep=keep,
        channels={},
        meta={},
    )
    chosen = AnnotatedStore(store, read_artifact(tmp_path / "a.parquet"))
    assert chosen.sequences == 3 and chosen.has_rankings and chosen.num_examples == 6
    assert chosen.cuts(1) == store.cuts(2)
    np.testing.assert_array_equal(chosen.values("score", 1), store.values("score", 2))
    assert loaded(chosen).batch(0).group == 3


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ({"cuts": (2, 2)}, "must rise"),
        ({"cuts": (5,)}, "inside its 5 tokens"),
        ({"cuts": (2,), "values": {"label": [1]}}, "label must be a finite number for each of 2"),
        ({"cuts": (2,), "values": {"label": [1, np.nan]}}, "finite"),
    ],
)
def test_a_writer_refuses_what_is_no_group(tmp_path, added, said):
    with (
        pytest.raises(DataError, match=said),
        StoreWriter(tmp_path / "s", vocab_size=9) as writer,
    ):
        writer.add([1, 2, 3, 4, 5], key="0" * 16, name="x", **added)
