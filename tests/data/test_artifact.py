"""Selection artifacts: what is written is what is read, and damage is an error."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokjax import files
from tokjax.data.artifact import read_artifact, write_artifact
from tokjax.errors import DataError, StorageError

KEYS = ["00aa", "00bb", "00bb-1"]
LENGTHS = [3, 0, 2]


def rows(**changes):
    """Arguments of an artifact of three examples, one of them without tokens."""
    return {
        "keys": KEYS,
        "names": ["a.jsonl:1", "a.jsonl:2", "ü\n"],
        "n_tokens": LENGTHS,
        "scores": [0.5, None, -1.25],
        "keep": [True, False, True],
        "channels": {"weights": [[0.0, 1.5, -2.0], [], [0.1, 0.2]], "ld": [[1, 2, 3], [], [4, 5]]},
        "meta": {"method": "trim", "options": {"lam": 0.5}, "counts": {"kept": 2}},
        **changes,
    }


def test_what_is_read_is_what_was_written(tmp_path):
    path = tmp_path / "deep/er/selection.parquet"
    write_artifact(path, **rows())
    found = read_artifact(path)
    assert (found.keys, len(found), found.rows["00bb-1"]) == (KEYS, 3, 2)
    assert found.names == rows()["names"]
    np.testing.assert_array_equal(found.scores, [0.5, np.nan, -1.25])
    np.testing.assert_array_equal(found.keep, [True, False, True])
    np.testing.assert_array_equal(found.n_tokens, LENGTHS)
    np.testing.assert_array_equal(found.starts, [0, 3, 3, 5])
    assert found.channels == ("weights", "ld")
    np.testing.assert_array_equal(found.channel("weights"), np.float32([0, 1.5, -2, 0.1, 0.2]))
    np.testing.assert_array_equal(found.channel("ld")[found.starts[2] :], [4, 5])
    assert found.meta["options"] == {"lam": 0.5}
    assert len(found.digest) == 64
    write_artifact(path, **rows(scores=[0.5, None, -1.0]))
    assert read_artifact(path).digest != found.digest
    types = {field.name: str(field.type) for field in pq.read_schema(path)}
    assert types["score"] == "double" and types["n_tokens"] == "int32"
    assert types["tokens/ld"].startswith("list<") and "float" in types["tokens/ld"]
    with pytest.raises(DataError, match="Did you mean 'weights'"):
        found.channel("weihgts")


def test_scores_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "s.parquet"
    write_artifact(path, **rows(scores=[float("nan"), -np.inf, np.inf]))
    assert pq.read_table(path).column("score").null_count == 3
    write_artifact(path, **rows(scores=None))
    assert np.isnan(read_artifact(path).scores).all()


def test_no_examples_and_no_channels_are_an_artifact_too(tmp_path):
    path = tmp_path / "s.parquet"
    none = {name: [] for name in ("keys", "names", "n_tokens", "scores", "keep")}
    write_artifact(path, **none, channels={"w": []}, meta={})
    assert len(read_artifact(path)) == 0
    assert read_artifact(path).channel("w").shape == (0,)
    write_artifact(path, **{name: v for name, v in rows().items() if name != "channels"})
    assert read_artifact(path).channels == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": ["a", "b", "a"]}, "'a' occurs twice"),
        ({"keep": [True]}, "1 keep for 3 keys"),
        ({"scores": [1.0] * 4}, "4 scores for 3 keys"),
        ({"n_tokens": [3, -1, 2]}, "n_tokens holds numbers from -1"),
        ({"channels": {"w": [[1, 2, 3], []]}}, "2 w for 3 keys"),
        ({"channels": {"w": [[1, 2, 3], [1], [1, 2]]}}, "1 values for the 0 tokens of a.jsonl:2"),
        ({"channels": {"w": [[1, np.nan, 3], [], [1, 2]]}}, "a.jsonl:1 holds NaN"),
        ({"channels": {"w": [[1, np.inf, 3], [], [1, 2]]}}, "NaN or infinity"),
    ],
)
def test_rows_that_do_not_fit_together_are_not_written(tmp_path, changes, message):
    path = tmp_path / "s.parquet"
    with pytest.raises(DataError, match=message):
        write_artifact(path, **rows(**changes))
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_file_never_appears(tmp_path, monkeypatch):
    path = tmp_path / "s.parquet"
    write_artifact(path, **rows())
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(StorageError, match="No space left"):
        write_artifact(path, **rows(scores=[1.0, 2.0, 3.0]))
    assert [p.name for p in tmp_path.iterdir()] == ["s.parquet"]
    assert path.read_bytes() == before


def test_every_flipped_byte_that_changes_something_is_noticed(tmp_path):
    path, whole = tmp_path / "s.parquet", None
    write_artifact(path, **rows())
    whole, good = path.read_bytes(), read_artifact(path)
    refused = 0
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            found = read_artifact(path)
        except DataError:
            refused += 1
            continue
        assert found.table.equals(good.table)  # a byte that says nothing, such as a statistic
        assert found.meta == good.meta
    assert refused > len(whole) / 7 / 3


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_or_missing_file_is_an_error(tmp_path, share):
    path = tmp_path / "s.parquet"
    with pytest.raises(DataError, match=r"s\.parquet cannot be read: No such file"):
        read_artifact(path)
    write_artifact(path, **rows())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DataError, match="no whole Parquet file"):
        read_artifact(path)


def test_other_parquet_files_are_not_taken_for_artifacts(tmp_path):
    path = tmp_path / "s.parquet"
    pq.write_table(pa.table({"key": ["a"]}), path)
    with pytest.raises(DataError, match="is no selection"):
        read_artifact(path)
    write_artifact(path, **rows())
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["keep"]), path)
    with pytest.raises(DataError, match="no column 'keep' of bool"):
        read_artifact(path)
    pq.write_table(table.replace_schema_metadata({"tokjax": '{"format": 2}'}), path)
    with pytest.raises(DataError, match="has format 2"):
        read_artifact(path)
    swapped = table.set_column(2, "score", pa.array([0.5, 0.25, None], pa.float64()))
    pq.write_table(swapped.replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(DataError, match="not those that were written"):
        read_artifact(path)
