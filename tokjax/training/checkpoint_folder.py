"""The checkpoint directory of a run on disk: what lies there, and how a step is committed.

    pointer.json              the committed step and its manifest's checksum
    step-00000100/            manifest.json, metadata.json, state/ (written by Orbax)
    saving-00000100/          a save that is not finished; removed at the next start
    replaced-00000100/        the old content while a step is saved again; put back if that fails
    deleting-00000100/        on its way out; removed at the next start
    damaged-00000100-1/       set aside because its bytes are not those that were saved; the last
                              `KEEP_DAMAGED` are kept, for the curious
    .lock                     held by the process that writes here

A step becomes the latest in this order: all files and the manifest are flushed to disk, the
directory gets its name `step-...` in one rename, `pointer.json` is replaced in one rename. A kill
at any point leaves the old latest or the new one. Older steps are deleted after that only.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from tokjax.errors import CheckpointError
from tokjax.files import storage_errors, sync_directory
from tokjax.training.manifest import (
    DamagedError,
    Manifest,
    Pointer,
    listing_problems,
)
from tokjax.training.retention import CheckpointConfig, kept_steps

KEEP_DAMAGED = 3
_NAME = re.compile(r"(step|saving|replaced|deleting|damaged)-(\d+)(?:-(\d+))?(\..*)?")


@dataclass(frozen=True)
class Entry:
    """One step directory: its manifest, or why there is none that can be trusted."""

    step: int
    manifest: Manifest | None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Survey:
    """What a checkpoint directory holds.

    Attributes:
        entries: the steps in the order in which they are to be tried: those that look newer than
            the newest good manifest, that one, the steps before it, then the steps beyond it that
            an abandoned course of the run has left.
        pointer: the committed step; None when nothing was committed or the pointer is damaged.
        pointer_problem: why the pointer cannot be used, if so.
        pending: the complete step whose pointer a kill has prevented, if so.
    """

    entries: tuple[Entry, ...]
    pointer: Pointer | None
    pointer_problem: str | None = None
    pending: Manifest | None = None

    @property
    def manifests(self) -> list[Manifest]:
        """The trustworthy manifests, in the order of `entries`."""
        return [entry.manifest for entry in self.entries if entry.manifest is not None]


class CheckpointFolder:
    """The files of one checkpoint directory; only process 0 of the writing run changes them."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._lock: int | None = None

    def __del__(self) -> None:
        if getattr(self, "_lock", None) is not None:
            self.close()

    def step_directory(self, step: int) -> Path:
        """Returns the directory of a step, whether it exists or not."""
        return self._path("step", step)

    def survey(self) -> Survey:
        """Returns what lies here; reads manifests, no array data.

        Raises:
            CheckpointError: a newer tokjax wrote it.
            StorageError: the permissions do not allow reading it.
        """
        pointer, problem = None, None
        try:
            pointer = Pointer.read(self.directory)
        except DamagedError as error:
            problem = str(error)
        entries = {step: self._entry(step) for step in self._found("step")}
        if pointer is None:
            return self._without_pointer(entries, problem)
        serials = {step: e.manifest.serial for step, e in entries.items() if e.manifest is not None}
        newest = max(serials, key=lambda step: serials[step], default=None)
        pending = None
        if newest is not None and serials[newest] == pointer.serial + 1:
            pending = entries[newest].manifest
        else:
            newest = pointer.step
            entries[newest] = self._pointed(entries.get(newest), pointer)
        return Survey(_in_order(entries, newest), pointer, None, pending)

    def open(self, *, tidy: bool) -> list[str]:
        """Makes the directory ready for writing; returns what had to be mended, for people.

        Args:
            tidy: whether step directories without a manifest that nothing points to are removed
                (empty ones) or set aside (others).

        Raises:
            StorageError: the directory cannot be made or written.
            CheckpointError: another process is writing here.
        """
        with storage_errors(self.directory, "create"):
            self.directory.mkdir(parents=True, exist_ok=True)
        self._acquire()
        with storage_errors(self.directory, "clean up"):
            reports = self._mend()
            survey = self.survey()
            if survey.pending is not None:
                self._point_to(survey.pending)
                reports.append(
                    f"step {survey.pending.step} was complete when the process ended, but not yet "
                    "the latest: it is now"
                )
            for entry in survey.entries if tidy else ():
                if entry.manifest is None and not _points_to(survey.pointer, entry.step):
                    reports += self._put_away(entry)
        return reports

    def close(self) -> None:
        """Lets another process write here."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def begin(self, step: int) -> Path:
        """Returns a fresh directory to write a step into.

        Raises:
            StorageError: it cannot be made.
        """
        path = self._path("saving", step)
        with storage_errors(path, "create"):
            if path.exists():
                shutil.rmtree(path)
            path.mkdir()
        return path

    def abandon(self, step: int) -> None:
        """Removes what a failed save has written, to free the disk; never raises."""
        path = self._path("saving", step)
        for _ in range(20):
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                return
            time.sleep(0.05)  # other writes of the failed save are still coming to their end

    def next_serial(self) -> int:
        """Returns the serial of the next commit."""
        survey = self.survey()
        serials = [manifest.serial for manifest in survey.manifests]
        return max([0, *serials, survey.pointer.serial if survey.pointer else 0]) + 1

    def commit(self, manifest: Manifest, damaged: set[int]) -> None:
        """Makes the written step the latest.

        Args:
            manifest: of the directory that `begin` returned, whose files are on disk.
            damaged: the steps known to be damaged: if this one, the old content is set aside.

        Raises:
            StorageError: it could not be committed; what was the latest still is.
        """
        step = manifest.step
        saving, final, replaced = (self._path(k, step) for k in ("saving", "step", "replaced"))
        with storage_errors(saving):
            manifest.write(saving)
            for folder, _, _ in os.walk(saving):
                sync_directory(Path(folder))
            if final.exists():
                if step in damaged or self._looks_damaged(step):
                    self._set_aside(step)
                else:
                    os.rename(final, replaced)
            os.rename(saving, final)
            sync_directory(self.directory)
            self._point_to(manifest)
            self._delete(replaced)

    def prune(self, config: CheckpointConfig, damaged: set[int]) -> list[int]:
        """Sets damaged steps aside and deletes those not kept; returns the deleted, sorted.

        The latest is always kept: call it after a commit.

        Raises:
            StorageError: something cannot be renamed or deleted.
        """
        with storage_errors(self.directory, "delete old checkpoints in"):
            for step in sorted(damaged):
                if self.step_directory(step).exists():
                    self._set_aside(step)
            manifests = self.survey().manifests
            kept = kept_steps(manifests, config)
            dropped = sorted(m.step for m in manifests if m.step not in kept)
            for step in dropped:
                self._delete(self.step_directory(step))
        return dropped

    def _entry(self, step: int) -> Entry:
        try:
            manifest = Manifest.read(self.step_directory(step))
        except DamagedError as error:
            return Entry(step, None, (str(error),))
        if manifest.step != step:
            return Entry(step, None, (f"the manifest is that of step {manifest.step}",))
        return Entry(step, manifest)

    def _pointed(self, entry: Entry | None, pointer: Pointer) -> Entry:
        if entry is None:
            return Entry(pointer.step, None, ("the directory is missing",))
        if entry.manifest is not None and entry.manifest.digest != pointer.manifest:
            return Entry(entry.step, None, ("its manifest is not the one that was committed",))
        return entry

    def _without_pointer(self, entries: dict[int, Entry], problem: str | None) -> Survey:
        good = {step: e.manifest for step, e in entries.items() if e.manifest is not None}
        newest = max(good, key=lambda step: good[step].serial, default=None)
        pending = None
        if problem is None and len(good) == 1 and newest is not None and good[newest].serial == 1:
            pending = good[newest]  # killed between the very first rename and the first pointer
        elif problem is None and good:
            problem = "pointer.json is missing"
        return Survey(_in_order(entries, newest), None, problem, pending)

    def _mend(self) -> list[str]:
        reports = []
        for step, paths in self._all("replaced").items():
            if self.step_directory(step).exists():
                for path in paths:
                    self._delete(path)
            else:
                os.rename(paths[0], self.step_directory(step))
                reports.append(f"step {step}: saving it again was not finished; the old is back")
        for step, paths in self._all("saving").items():
            for path in paths:
                shutil.rmtree(path)
            reports.append(f"step {step}: the save was not finished; its files are removed")
        for paths in self._all("deleting").values():
            for path in paths:
                shutil.rmtree(path)
        for temporary in self.directory.glob(".*.tmp"):
            temporary.unlink(missing_ok=True)
        return reports

    def _put_away(self, entry: Entry) -> list[str]:
        path = self.step_directory(entry.step)
        why = "; ".join(entry.problems)
        if any(file.is_file() for file in path.rglob("*")):
            return [f"step {entry.step}: {why}; set aside as {self._set_aside(entry.step).name}"]
        shutil.rmtree(path)
        return [f"step {entry.step}: {why}; the empty directory is removed"]

    def _looks_damaged(self, step: int) -> bool:
        manifest = self._entry(step).manifest
        return manifest is None or bool(listing_problems(self.step_directory(step), manifest))

    def _point_to(self, manifest: Manifest) -> None:
        Pointer(manifest.step, manifest.serial, manifest.digest).write(self.directory)

    def _set_aside(self, step: int) -> Path:
        aside = dict(self._damaged())
        free = self._path("damaged", step, max(aside, default=0) + 1)
        os.rename(self.step_directory(step), free)
        for number in sorted(aside, reverse=True)[KEEP_DAMAGED - 1 :]:
            self._delete(aside[number])
        return free

    def _delete(self, path: Path) -> None:
        # Renamed first: a deletion cut short must not leave a step that lacks files.
        if not path.exists():
            return
        number = 1
        while (doomed := self.directory / f"deleting-{_step_of(path):08d}-{number}").exists():
            number += 1
        os.rename(path, doomed)
        shutil.rmtree(doomed)

    def _damaged(self) -> list[tuple[int, Path]]:
        paths = [path for paths in self._all("damaged").values() for path in paths]
        return [(int(path.name.rpartition("-")[2]), path) for path in paths]

    def _path(self, kind: str, step: int, number: int | None = None) -> Path:
        return self.directory / (f"{kind}-{step:08d}" + ("" if number is None else f"-{number}"))

    def _found(self, kind: str) -> list[int]:
        steps = self._all(kind)
        return sorted(step for step in steps if self._path(kind, step) in steps[step])

    def _all(self, kind: str) -> dict[int, list[Path]]:
        found: dict[int, list[Path]] = {}
        names = sorted(os.listdir(self.directory)) if self.directory.is_dir() else []
        for name in names:
            match = _NAME.fullmatch(name)
            if match and match[1] == kind and (self.directory / name).is_dir():
                found.setdefault(int(match[2]), []).append(self.directory / name)
        return found

    def _acquire(self) -> None:
        path = self.directory / ".lock"
        with storage_errors(path):
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            # A POSIX lock: the kernel drops it when the process dies, and children do not
            # inherit it, so a data loader that outlives its parent does not block the restart.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            owner = os.pread(lock, 200, 0).decode(errors="replace") or "unknown"
            os.close(lock)
            raise CheckpointError(
                f"another process is saving checkpoints into {self.directory} ({owner}). Wait for "
                f"it, or choose another workdir; if you are sure that it has ended, delete {path}."
            ) from error
        except OSError:
            pass  # the file system knows no locks
        with contextlib.suppress(OSError):  # who holds it is a courtesy
            os.truncate(lock, 0)
            owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
            os.pwrite(lock, owner.encode(), 0)
        self._lock = lock


def _in_order(entries: dict[int, Entry], newest: int | None) -> tuple[Entry, ...]:
    if newest is None:
        return tuple(entries[step] for step in sorted(entries, reverse=True))

    def rank(entry: Entry) -> tuple[int, int]:
        if entry.step == newest:
            return (1, 0)
        if entry.step < newest:
            return (2, -entry.step)
        return (0 if entry.manifest is None else 3, -entry.step)

    return tuple(sorted(entries.values(), key=rank))


def _points_to(pointer: Pointer | None, step: int) -> bool:
    return pointer is not None and pointer.step == step


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[2])
