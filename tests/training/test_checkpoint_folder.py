"""Every point at which a kill can fall, tried one by one on real directories without arrays."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from tokjax.errors import CheckpointError
from tokjax.training import manifest as m
from tokjax.training.checkpoint_folder import KEEP_DAMAGED, CheckpointFolder
from tokjax.training.retention import CheckpointConfig


class Killed(BaseException):
    pass


def save(folder, step, content="", *, keep=2, damaged=()):
    damaged = set(damaged)
    path = folder.begin(step)
    (path / "state").mkdir()
    (path / "state" / "data").write_text(content or f"content of {step}")
    files = m.hash_files(path, m.list_files(path))
    folder.commit(m.Manifest(step, folder.next_serial(), m.now(), files), damaged)
    folder.prune(CheckpointConfig(keep=keep), damaged)


def opened(directory, *, tidy=True):
    folder = CheckpointFolder(directory)
    return folder, folder.open(tidy=tidy)


def content(folder, entry):
    manifest = entry.manifest
    path = folder.step_directory(entry.step)
    assert m.listing_problems(path, manifest) == []
    assert m.content_problems(path, manifest, list(manifest.files)) == []
    return (path / "state" / "data").read_text()


@contextlib.contextmanager
def killed_at(monkeypatch, number):
    """Raises Killed before the `number`th change of the file system; yields their count."""
    count = [0]

    def wrap(function):
        def wrapped(*args, **kwargs):
            count[0] += 1
            if count[0] == number:
                raise Killed
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        for owner, name in [
            (os, "rename"),
            (os, "replace"),
            (os, "mkdir"),
            (os, "rmdir"),
            (os, "unlink"),
            (shutil, "rmtree"),
        ]:
            patch.setattr(owner, name, wrap(getattr(owner, name)))
        yield count


@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "the same step again"])
@pytest.mark.parametrize("number", range(1, 16))
def test_killed_anywhere_leaves_the_old_latest_or_the_new_one(tmp_path, monkeypatch, step, number):
    folder, _ = opened(tmp_path)
    save(folder, 1)
    save(folder, 2)
    with killed_at(monkeypatch, number) as count:
        try:
            save(folder, step, "new content")
        except Killed:
            pass
        else:
            assert count[0] < number  # beyond the last change: nothing was left to kill
    folder.close()

    # A reader that mends nothing finds a good one, too (it may be older while a step is swapped).
    reader = CheckpointFolder(tmp_path)
    assert content(reader, next(e for e in reader.survey().entries if e.manifest is not None))

    folder, _ = opened(tmp_path)
    survey = folder.survey()
    newest = survey.entries[0]
    assert survey.pointer_problem is None
    assert (newest.step, content(folder, newest)) in [(2, "content of 2"), (step, "new content")]
    assert {name.partition("-")[0] for name in os.listdir(tmp_path)} <= {
        "step",
        "pointer.json",
        ".lock",
    }
    save(folder, 4)
    assert folder.survey().entries[0].step == 4


def test_killed_before_the_first_pointer_the_complete_step_is_used(tmp_path, monkeypatch):
    folder, _ = opened(tmp_path)
    with monkeypatch.context() as patch:

        def killed(*args):
            raise Killed

        patch.setattr(m.Pointer, "write", killed)
        with pytest.raises(Killed):
            save(folder, 1)
    reader = CheckpointFolder(tmp_path)
    assert reader.survey().pending is not None
    folder, reports = opened(tmp_path)
    assert any("step 1 was complete" in report for report in reports)
    assert folder.survey().pointer.step == 1


def test_unfinished_saves_are_removed_and_reported(tmp_path):
    folder, _ = opened(tmp_path)
    save(folder, 1)
    path = folder.begin(2)
    (path / "state.orbax-checkpoint-tmp").mkdir()
    (path / "state.orbax-checkpoint-tmp" / "data").write_text("half")
    _, reports = opened(tmp_path)
    assert reports == ["step 2: the save was not finished; its files are removed"]
    assert not path.exists()


def test_steps_without_manifest_are_never_latest_and_are_put_away(tmp_path):
    folder, _ = opened(tmp_path)
    save(folder, 1)
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-00000006" / "state").mkdir(parents=True)
    (tmp_path / "step-00000006" / "state" / "data").write_text("?")
    folder, reports = opened(tmp_path)
    assert [entry.step for entry in folder.survey().entries] == [1]
    assert any("step 5: the directory is empty" in report for report in reports)
    assert any("set aside as damaged-00000006-1" in report for report in reports)
    assert (tmp_path / "damaged-00000006-1" / "state" / "data").read_text() == "?"


def test_without_tidying_they_come_first_as_problems(tmp_path):
    folder, _ = opened(tmp_path)
    save(folder, 1)
    (tmp_path / "step-00000005").mkdir()
    folder, _ = opened(tmp_path, tidy=False)
    entries = folder.survey().entries
    assert [(entry.step, entry.problems) for entry in entries] == [
        (5, ("the directory is empty",)),
        (1, ()),
    ]


def test_after_a_rewind_the_pointer_decides_and_older_steps_come_before_abandoned_ones(tmp_path):
    folder, _ = opened(tmp_path)
    for step in (10, 20, 30, 40, 15):
        save(folder, step, keep=9)
    assert [entry.step for entry in folder.survey().entries] == [15, 10, 40, 30, 20]


def test_swapped_step_directory_is_not_taken_for_the_committed_one(tmp_path):
    folder, _ = opened(tmp_path)
    save(folder, 1)
    save(folder, 2)
    shutil.rmtree(folder.step_directory(2))
    os.rename(folder.step_directory(1), folder.step_directory(2))
    first = folder.survey().entries[0]
    assert (first.step, first.manifest) == (2, None)
    assert first.problems == ("the manifest is that of step 1",)


def test_old_copy_of_the_committed_step_is_not_taken_for_it(tmp_path):
    folder, _ = opened(tmp_path)
    save(folder, 1, "first")
    shutil.copytree(folder.step_directory(1), tmp_path / "copy")
    save(folder, 1, "second")
    shutil.rmtree(folder.step_directory(1))
    os.rename(tmp_path / "copy", folder.step_directory(1))
    assert folder.survey().entries[0].problems == (
        "its manifest is not the one that was committed",
    )


def test_damaged_steps_are_set_aside_and_only_a_few_are_kept(tmp_path):
    folder, _ = opened(tmp_path)
    save(folder, 1)
    for step in range(2, 8):
        save(folder, step, keep=9)
        save(folder, step + 1, keep=9, damaged={step})
        assert step not in [entry.step for entry in folder.survey().entries]
    aside = sorted(name for name in os.listdir(tmp_path) if name.startswith("damaged"))
    assert aside == ["damaged-00000005-4", "damaged-00000006-5", "damaged-00000007-6"]
    assert len(aside) == KEEP_DAMAGED


def test_saving_over_a_damaged_step_sets_the_old_aside_also_unasked(tmp_path):
    folder, _ = opened(tmp_path)
    save(folder, 1)
    (folder.step_directory(1) / "state" / "data").unlink()
    save(folder, 1, "again")
    assert content(folder, folder.survey().entries[0]) == "again"
    assert (tmp_path / "damaged-00000001-1" / m.MANIFEST).exists()


def test_a_second_process_cannot_write_here_until_the_first_ends(tmp_path):
    folder, _ = opened(tmp_path)
    script = (
        "import sys; from pathlib import Path\n"
        "from tokjax.training.checkpoint_folder import CheckpointFolder\n"
        "CheckpointFolder(Path(sys.argv[1])).open(tidy=True)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    blocked = subprocess.run(command, capture_output=True, text=True)
    assert "another process is saving checkpoints" in blocked.stderr
    assert f'"pid": {os.getpid()}' in blocked.stderr
    folder.close()
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_pointer_of_a_newer_format_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(m, "FORMAT", 9)
    m.Pointer(1, 1, "x").write(tmp_path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 9"):
        CheckpointFolder(tmp_path).survey()
    assert json.loads((tmp_path / m.POINTER).read_text())["format"] == 9
