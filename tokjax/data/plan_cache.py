"""Packing plans kept on disk: computed once per store and options, memory-mapped from then on."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from tokjax.data.cache import storage_error
from tokjax.data.packing import Lengths, PackingConfig, PackingPlan, PackingStats, compute_plan

# Part of the key: a plan made by other rules must not be taken for one made by these.
_VERSION = 1
_ARRAYS = ("row_offsets", "example", "start", "stop", "offset", "short_examples")


def plan_packing(store: Lengths, config: PackingConfig, cache: Path | None) -> PackingPlan:
    """Returns the plan for a store, from the cache where it is there and sound.

    Args:
        store: the lengths, the fingerprint and the names.
        config: how to pack.
        cache: folder that holds plans (made if need be), or None to keep the plan in memory. A
            folder that may not be written, as on a read-only disk, is read if it is there and
            otherwise done without: the plan is then computed at every start.

    Raises:
        DataError: no example has two tokens, or one is too long under long_examples='error'.
        StorageError: the disk is full.
    """
    if cache is None:
        return compute_plan(store, config)
    facts = {"version": _VERSION, "store": store.fingerprint, **dataclasses.asdict(config)}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / key
    plan = _load(folder, config)
    if plan is not None:
        return plan
    plan = compute_plan(store, config)
    try:
        _save(plan, folder)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return plan
        raise storage_error(folder, error) from error
    return _load(folder, config) or plan


def _save(plan: PackingPlan, folder: Path) -> None:
    """Writes a plan under a temporary name, then moves it to `folder` unless one is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name in _ARRAYS:
            with open(temporary / f"{name}.npy", "wb") as file:
                np.save(file, getattr(plan, name))
                file.flush()
                os.fsync(file.fileno())
        facts = {
            "stats": dataclasses.asdict(plan.stats),
            "sha256": {name: _digest(temporary / f"{name}.npy") for name in _ARRAYS},
        }
        with open(temporary / "plan.json", "w") as file:
            json.dump(facts, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o755)  # mkdtemp makes it private; a shared cache is read by others
        _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, folder: Path) -> None:
    """Moves `temporary` to `folder`, over a damaged plan but not over one just made by another."""
    try:
        os.rename(temporary, folder)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if _sound(folder) is not None:
        return
    aside = temporary.with_name(temporary.name + "-damaged")
    try:
        os.rename(folder, aside)
        os.rename(temporary, folder)
    except OSError as error:
        # Another process mended it first: its plan is the same as ours.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _load(folder: Path, config: PackingConfig) -> PackingPlan | None:
    """Returns the plan kept in `folder`; None when there is none or it is damaged."""
    facts = _sound(folder)
    if facts is None:
        return None
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
    return PackingPlan(config=config, stats=PackingStats(**facts["stats"]), **arrays)


def _sound(folder: Path) -> dict | None:
    """Returns the facts of a kept plan if every file has the content it was written with."""
    try:
        facts = json.loads((folder / "plan.json").read_text())
        damaged = [n for n in _ARRAYS if _digest(folder / f"{n}.npy") != facts["sha256"][n]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if damaged else facts


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
