import json

import numpy as np
import pytest

from tokjax.config import resolve
from tokjax.data.annotated import AnnotatedStore, annotate
from tokjax.data.artifact import write_artifact
from tokjax.data.config import DataConfig
from tokjax.data.loader import EvalLoader
from tokjax.data.prepare import ensure_store
from tokjax.data.store import TokenStore
from tokjax.errors import DataError


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotated")
    rows = [{"prompt": "p" * (i + 1), "response": "r" * (8 - i)} for i in range(6)]
    (folder / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = {"name": "jsonl", "files": (str(folder / "x.jsonl"),), "kind": "response"}
    data = resolve(DataConfig, {"tokenizer": {"name": "bytes"}, "train": [{"source": source}]})
    path = ensure_store(data.train[0].source, data, cache_dir=folder, progress=False)
    return TokenStore.open(path)


def written(path, store, examples, keep, *, shorter=0, **channels):
    write_artifact(
        path,
        keys=[store.example_key(i) for i in examples],
        names=[store.example_name(i) for i in examples],
        n_tokens=[int(store.lengths[i]) - shorter for i in examples],
        scores=None,
        keep=keep,
        channels={n: [f(int(store.lengths[i])) for i in examples] for n, f in channels.items()},
        meta={"method": "test"},
    )
    return path


def test_kept_examples_are_read_with_their_values(store, tmp_path):
    path = written(
        tmp_path / "a.parquet",
        store,
        [5, 0, 3, 2],
        [True, True, False, True],
        weights=lambda n: np.full(n, 0.5),
        place=lambda n: np.arange(n),
    )
    found = annotate(store, str(path))
    assert isinstance(found, AnnotatedStore)
    assert found.kept.tolist() == [0, 2, 5]
    assert (found.dropped, found.unknown, found.absent) == (1, 2, 0)
    assert found.summary() == (
        "the selection keeps 3 of 6 examples; 1 dropped by it; 2 that it does not name are left out"
    )
    assert found.channels == ("place",)
    for i, own in enumerate([0, 2, 5]):
        np.testing.assert_array_equal(found.tokens(i), store.tokens(own))
        np.testing.assert_array_equal(found.weights(i), store.weights(own) * 0.5)
        np.testing.assert_array_equal(found.channel("place", i, 2, 5), [2, 3, 4])
        assert found.example_key(i) == store.example_key(own)


def test_batches_carry_the_values_beside_their_targets(store, tmp_path):
    path = written(
        tmp_path / "a.parquet", store, range(6), [True] * 6, place=lambda n: np.arange(n)
    )
    loader = EvalLoader([annotate(store, str(path))], seq_len=32, batch_size=1)
    for index in range(len(loader)):
        batch = loader.batch(index)
        used = batch.segment_ids > 0
        # The value of a target is that of the token behind the input.
        expected = np.where(used, batch.positions + 1, 0)
        np.testing.assert_array_equal(batch.channels["place"], expected)


def test_what_is_added_changes_the_identity(store, tmp_path):
    one = written(tmp_path / "1", store, range(6), [True] * 6, v=lambda n: np.zeros(n))
    two = written(tmp_path / "2", store, range(6), [True] * 6, v=lambda n: np.ones(n))
    prints = {annotate(store, str(path)).fingerprint for path in (one, two)}
    assert len(prints | {store.fingerprint}) == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep": [False] * 6}, "keeps none"),
        ({"keep": [True] * 6, "shorter": 1}, "another tokenizer or template"),
    ],
)
def test_an_artifact_that_does_not_fit_is_refused(store, tmp_path, settings, said):
    path = written(tmp_path / "a", store, range(6), **settings)
    with pytest.raises(DataError, match=said):
        annotate(store, str(path))


def test_an_artifact_of_other_data_is_refused(store, tmp_path):
    write_artifact(
        tmp_path / "a",
        keys=["0" * 16],
        names=["x"],
        n_tokens=[3],
        scores=None,
        keep=[True],
        meta={},
    )
    with pytest.raises(DataError, match="names none of the 6 examples"):
        annotate(store, str(tmp_path / "a"))
