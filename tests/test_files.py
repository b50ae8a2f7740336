"""Files are replaced whole, appended to by whole records, and errors name them."""

import os

import pytest

from tokjax.errors import StorageError
from tokjax.files import AppendFile, set_aside, storage_errors, write_atomically


def test_a_replaced_file_is_the_new_one_and_nothing_else_stays(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"a\.json: No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


class NearlyFull:
    """A file on a disk that takes three more bytes, then none."""

    def __init__(self, file):
        self._file, self._left = file, 3

    def write(self, data):
        if not self._left:
            raise OSError(28, "No space left on device")
        done = self._file.write(data[: self._left])
        self._left -= done
        return done

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_a_record_that_does_not_fit_leaves_no_part(tmp_path):
    file = AppendFile(tmp_path / "log")
    file.append(b"whole\n")
    plain = file._file
    file._file = NearlyFull(plain)
    with pytest.raises(StorageError, match="log: No space left"):
        file.append(b"does not fit\n")
    file._file = plain
    file.append(b"again\n")
    file.sync()
    file.close()
    assert (tmp_path / "log").read_bytes() == b"whole\nagain\n"


def test_what_is_set_aside_never_replaces_anything(tmp_path):
    names = []
    for content in "abc":
        (tmp_path / "m.csv").write_text(content)
        names.append(set_aside(tmp_path / "m.csv", "previous").name)
    assert names == ["m.previous-1.csv", "m.previous-2.csv", "m.previous-3.csv"]
    assert [(tmp_path / name).read_text() for name in names] == ["a", "b", "c"]


def test_errors_of_others_pass_and_storage_errors_are_not_wrapped_twice(tmp_path):
    def fail(error):
        with storage_errors("outer"), storage_errors("inner"):
            raise error

    with pytest.raises(KeyError):
        fail(KeyError("x"))
    with pytest.raises(StorageError, match="cannot write inner: boom"):
        fail(OSError("boom"))
