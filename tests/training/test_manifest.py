import dataclasses
import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.errors import CheckpointError
from tokjax.training import manifest as m


@pytest.fixture
def step(tmp_path):
    """A step directory of three files with its manifest written."""
    directory = tmp_path / "step-00000007"
    (directory / "state" / "d").mkdir(parents=True)
    (directory / "state" / "d" / "data").write_bytes(bytes(range(256)) * 40)
    (directory / "state" / "index").write_bytes(b"index")
    (directory / "metadata.json").write_text("{}")
    files = m.hash_files(directory, m.list_files(directory), durable=True)
    written = m.Manifest(7, 3, m.now(), files, {"w": "float32[2]"}, {"seed": 1}, {"loss": 2.5})
    written.write(directory)
    return directory, written


def problems(directory, manifest):
    return m.listing_problems(directory, manifest) or m.content_problems(
        directory, manifest, list(manifest.files)
    )


def test_manifest_reads_back_as_written_and_finds_nothing_wrong(step):
    directory, written = step
    assert m.Manifest.read(directory) == written
    assert written.size == 256 * 40 + 5 + 2
    assert sorted(written.files) == ["metadata.json", "state/d/data", "state/index"]
    assert problems(directory, written) == []


def test_metrics_that_are_not_finite_are_kept_and_the_file_stays_json(step):
    directory, written = step
    metrics = {"a": math.inf, "b": math.nan, "c": -math.inf, "d": 0.1}
    dataclasses.replace(written, metrics=metrics).write(directory)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads((directory / m.MANIFEST).read_text(), parse_constant=refuse)
    read = m.Manifest.read(directory).metrics
    assert read["a"] == math.inf
    assert math.isnan(read["b"])
    assert read["c"] == -math.inf
    assert read["d"] == 0.1


@settings(max_examples=40, deadline=None)
@given(where=st.integers(0, 256 * 40 - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found_and_the_file_named(tmp_path_factory, where, bit):
    directory = tmp_path_factory.mktemp("step")
    content = bytearray(bytes(range(256)) * 40)
    (directory / "data").write_bytes(content)
    manifest = m.Manifest(1, 1, m.now(), m.hash_files(directory, ["data"]))
    content[where] ^= 1 << bit
    (directory / "data").write_bytes(content)
    (problem,) = problems(directory, manifest)
    assert problem.startswith("data does not have the bytes that were saved")


def test_truncated_missing_and_added_files_are_named(step):
    directory, written = step
    os.truncate(directory / "state" / "d" / "data", 100)
    (directory / "state" / "index").unlink()
    (directory / "state" / "extra").write_text("x")
    assert m.listing_problems(directory, written) == [
        "state/index is missing",
        "state/d/data has 100 bytes, the manifest says 10240",
        "state/extra was not written by the save",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("2.5", "2.4"), "was changed"),
        (lambda text: text[: len(text) // 2], "no whole JSON"),
        (lambda text: "", "no whole JSON"),
        (lambda text: "[]", "no whole JSON"),
        (lambda text: '{"step": 7}', "no whole JSON"),
    ],
)
def test_manifest_that_was_changed_is_not_trusted(step, change, said):
    path = step[0] / m.MANIFEST
    path.write_text(change(path.read_text()))
    with pytest.raises(m.DamagedError, match=said):
        m.Manifest.read(step[0])


def test_manifest_that_is_no_text_is_not_trusted(step):
    (step[0] / m.MANIFEST).write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(m.DamagedError, match="cannot be read"):
        m.Manifest.read(step[0])


def test_missing_manifest_empty_directory_and_missing_directory_are_told_apart(step, tmp_path):
    (step[0] / m.MANIFEST).unlink()
    with pytest.raises(m.DamagedError, match=r"manifest\.json is missing"):
        m.Manifest.read(step[0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(m.DamagedError, match="directory is empty"):
        m.Manifest.read(tmp_path / "empty")
    with pytest.raises(m.DamagedError, match="directory is missing"):
        m.Manifest.read(tmp_path / "nowhere")


def test_manifest_of_a_newer_format_is_an_error_not_damage(step, monkeypatch):
    monkeypatch.setattr(m, "FORMAT", 2)
    step[1].write(step[0])
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 2, this tokjax reads format 1"):
        m.Manifest.read(step[0])


def test_pointer_reads_back_and_damage_is_found(tmp_path):
    assert m.Pointer.read(tmp_path) is None
    m.Pointer(7, 3, "abc").write(tmp_path)
    assert m.Pointer.read(tmp_path) == m.Pointer(7, 3, "abc")
    path = tmp_path / m.POINTER
    path.write_text(path.read_text().replace('"step": 7', '"step": 8'))
    with pytest.raises(m.DamagedError, match=r"pointer\.json was changed"):
        m.Pointer.read(tmp_path)
    path.write_text("")
    with pytest.raises(m.DamagedError, match=r"pointer\.json is no whole JSON"):
        m.Pointer.read(tmp_path)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.dictionaries(st.text("abc/", min_size=1, max_size=6), st.integers(0, 10**9)),
    count=st.integers(1, 9),
)
def test_shares_of_the_processes_are_a_balanced_partition(sizes, count):
    shares = [m.share(sizes, index, count) for index in range(count)]
    assert sorted(name for mine in shares for name in mine) == sorted(sizes)
    loads = [sum(sizes[name] + 4096 for name in mine) for mine in shares]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0) + 4096


def test_long_lists_of_problems_end_with_their_number():
    assert m.shorten([str(n) for n in range(20)])[-1] == "19"
    assert m.shorten([str(n) for n in range(25)])[-2:] == ["19", "and 5 more"]
