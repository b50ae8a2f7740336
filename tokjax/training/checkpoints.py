"""Saving and restoring the state of a run so that it survives kills, full disks and bit rot.

    with Checkpointer(workdir / "checkpoints", config, identity=identity) as checkpoints:
        restored = checkpoints.restore(template)
        ...
        if checkpoints.due(step):
            checkpoints.save(step, state, metrics={"loss": loss}, metadata={"config": ...})

Close it, or use `with`: a process that ends without loses a save that was still being written.
Orbax reads and writes the arrays, each process its shards. Around it: a checksum for every file,
one atomic switch to a new step, and a fall-back to the last good one (see `manifest.py` for the
format and `checkpoint_folder.py` for the order of events). With several processes the directory
must be on a file system that all share, and every method that says so must be called by all.
"""

import json
import logging
import operator
import re
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from tokjax.errors import CheckpointError, ConfigError, StorageError, TokjaxError
from tokjax.files import write_atomically
from tokjax.training.checkpoint_folder import CheckpointFolder, Entry
from tokjax.training.identity import check_identity, flatten_identity
from tokjax.training.leaves import (
    LeafSpec,
    check_leaves,
    name_leaves,
    nest,
    restore_leaves,
    spec_of,
    to_storable,
)
from tokjax.training.manifest import (
    METADATA,
    FileRecord,
    Manifest,
    content_problems,
    hash_files,
    list_files,
    listing_problems,
    now,
    share,
    shorten,
)
from tokjax.training.processes import (
    agree,
    barrier,
    describe_error,
    gather,
    on_first,
    rebuild_error,
)
from tokjax.training.retention import CheckpointConfig, best_step

__all__ = ["CheckpointConfig", "Checkpointer", "LostStep", "Restored"]

log = logging.getLogger(__name__)

PyTree = Any
_STATE = "state"
_SHARE = ".share-"  # the checksums that one process hands to process 0
_TIMEOUT_S = 1200  # for the processes to finish one save
_STORAGE_WORDS = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|Read-only file system"
    r"|Permission denied|Input/output error|Stale file handle|No such file or directory"
)


@dataclass(frozen=True)
class LostStep:
    """A step that could not be used, and why."""

    step: int
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Restored:
    """What `Checkpointer.restore` found.

    Attributes:
        step: the step that was restored.
        state: like the template, with the saved values.
        metadata: what was given to `save`, as JSON gives it back.
        lost_steps: newer steps that were damaged and passed over.
    """

    step: int
    state: PyTree
    metadata: dict[str, Any]
    lost_steps: tuple[LostStep, ...] = ()


class Checkpointer:
    """The checkpoints of one run in one directory.

    To be created, and closed, by every process of the run. What an earlier start has left half
    done is cleaned up and reported by a warning of the logger `tokjax.training.checkpoints`.

    Args:
        directory: a local or shared directory; made where it does not exist.
        config: see `CheckpointConfig`.
        identity: the resolved configuration keys (nested or dotted, JSON values) that a run must
            share with the checkpoint it continues from.
        defaults: the schema's default of these keys: one that a checkpoint lacks, because it is
            younger than the checkpoint, must have it.
        read_only: never write: for evaluation and decoding, also while a run saves here.

    Raises:
        ConfigError: the directory is a URL.
        StorageError: the directory cannot be made or written.
        CheckpointError: another process is saving here.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        *,
        identity: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        read_only: bool = False,
    ):
        if re.match(r"[a-z0-9]+:/", str(directory)):
            raise ConfigError(
                f"the checkpoint directory {directory} is a URL; give a path of a mounted file "
                "system (a checkpoint becomes the latest by a rename)"
            )
        self._directory = Path(directory).absolute()
        self._config = config
        self._identity = flatten_identity(identity)
        self._defaults = flatten_identity(defaults or {})
        self._read_only = read_only
        self._folder = CheckpointFolder(self._directory)
        self._writer: Any = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._damaged: set[int] = set()
        self._closed = False
        self._saves = 0
        # Barriers need keys that no other checkpointer of these processes has used.
        self._nonce = on_first(lambda: uuid.uuid4().hex[:12])
        if not read_only:
            for report in on_first(lambda: self._folder.open(tidy=not config.strict)):
                _warn(f"{self._directory}: {report}")
            self._orbax()  # its import takes as long as many steps: not in the middle of training

    def due(self, step: int) -> bool:
        """Returns whether the configuration asks for a checkpoint after `step` steps."""
        return step > 0 and step % self._config.every_steps == 0

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any],
    ) -> None:
        """Saves a step; returns when the state is copied and may be donated or changed.

        Writing goes on in the background, where `asynchronous`; an earlier save is waited for.
        A step that was saved before is replaced. To be called by every process.

        Args:
            step: the number of steps done.
            state: a pytree of arrays: parameters, optimiser, random keys, everything.
            metrics: numbers of this step; the best checkpoint is chosen by one of them.
            metadata: anything else as JSON: position in the data, configuration, versions.

        Raises:
            StorageError: this save, or the one before, could not be written; the checkpoints
                committed before are untouched.
            TypeError, ValueError: state or metadata cannot be stored.
        """
        if self._read_only or self._closed:
            what = "read-only" if self._read_only else "closed"
            raise CheckpointError(f"cannot save step {step}: the checkpointer is {what}")
        step = operator.index(step)  # a NumPy integer would not go into the manifest
        if step < 0:
            raise ValueError(f"the step is {step}; it counts the steps done")
        self.wait()
        named = name_leaves(state)
        storable = nest(to_storable(named))
        leaves = {name: str(spec_of(name, leaf)) for name, leaf in named.items()}
        text = _metadata_text(metadata)
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        saving = Path(on_first(lambda: str(self._folder.begin(step))))
        error: Exception | None = None
        try:
            import orbax.checkpoint as ocp

            self._orbax().save(saving / _STATE, args=ocp.args.PyTreeSave(storable))
        except Exception as caught:
            error = _as_storage_error(caught, saving)
        try:
            agree(error)
        except BaseException:
            if jax.process_count() > 1:
                self._writer = None  # it may wait for a process whose save never began
            self._abandon(step)
            raise
        self._thread = threading.Thread(
            target=self._finish,
            args=(step, saving, leaves, numbers, text),
            name="tokjax-checkpoint",
        )
        self._thread.start()
        if not self._config.asynchronous:
            self.wait()

    def restore(
        self,
        template: PyTree | Callable[[int], PyTree],
        step: int | None = None,
        *,
        partial: bool = False,
    ) -> Restored | None:
        """Returns the newest good checkpoint, or None where nothing was ever committed.

        Every byte is verified first. A damaged step is named in a warning and the good one before
        it is used, unless `strict`, or `step` is given. To be called by every process.

        Args:
            template: a pytree of `jax.ShapeDtypeStruct` or arrays with the shapes, dtypes and
                shardings wanted; they need not be the shardings it was saved with. Where the
                leaves depend on the step (a run in stages), a function from the step to it.
            step: this step and no other.
            partial: leaves that the template lacks are left unread, whatever the configuration
                they belong to: for a model's parameters without its optimiser.

        Raises:
            CheckpointError: the step does not exist; a checkpoint is damaged under `strict`; all
                are damaged; the configuration is another (`identity`); leaves differ.
        """
        self.wait()
        plan = on_first(lambda: self._plan(step))
        remedy = ""
        if step is not None:
            remedy = "Restore another step, or none in particular for the newest good one."
        elif self._config.strict:
            remedy = "Without checkpoints.strict the newest good step before would be used."
        if plan["pointer_problem"] is not None:
            self._complain(f"{self._directory}: {plan['pointer_problem']}", remedy)
        lost: list[LostStep] = []
        for candidate in plan["order"]:
            manifest, problems = self._examine(candidate)
            if manifest is None or problems:
                lost.append(LostStep(candidate, tuple(problems)))
                self._complain(_sentence(self._directory, lost[-1]), remedy)
                continue
            tree = template(candidate) if callable(template) else template
            restored = self._load(manifest, tree, tuple(lost), partial)
            self._damaged |= {item.step for item in lost}
            if lost:
                steps = ", ".join(str(item.step) for item in lost)
                _warn(f"{self._directory}: step {candidate} is restored; lost: {steps}")
            return restored
        if not lost and plan["pointer_problem"] is None:
            return None
        raise CheckpointError(
            f"no checkpoint in {self._directory} can be used:"
            + "".join(f"\n  {_sentence(self._directory, item)}" for item in lost)
            + "\nBring one back from a backup, or start anew in another workdir."
        )

    def steps(self) -> list[int]:
        """Returns the steps saved here whose manifests are sound, in increasing order."""
        return sorted(manifest.step for manifest in self._folder.survey().manifests)

    def latest(self) -> int | None:
        """Returns the newest step whose manifest is sound, or None."""
        return next((manifest.step for manifest in self._folder.survey().manifests), None)

    def best(self) -> int | None:
        """Returns the step that is best by `best_metric`, or None where none has the metric."""
        return best_step(self._folder.survey().manifests, self._config)

    def wait(self) -> None:
        """Returns when no save is running. To be called by every process.

        Raises:
            StorageError: a save could not be written (said once).
        """
        if self._read_only:
            return
        agree(self._join())

    def close(self) -> None:
        """Waits for the last save and lets others write here. To be called by every process.

        Raises:
            StorageError: as `wait`.
        """
        if self._closed:
            return
        try:
            self.wait()
        finally:
            self._shut()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        # The other processes may be elsewhere: wait for this one's save, agree with nobody.
        failed = self._join()
        if failed is not None:
            error.add_note(f"Also, the last checkpoint was not saved: {failed}")
        self._shut()

    def _join(self) -> BaseException | None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def _shut(self) -> None:
        self._closed = True
        try:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
        finally:
            self._folder.close()

    def _orbax(self) -> Any:
        if self._writer is None:
            import orbax.checkpoint as ocp

            logging.getLogger("absl").addFilter(_not_raised_elsewhere)
            self._writer = ocp.AsyncCheckpointer(
                ocp.PyTreeCheckpointHandler(use_ocdbt=True),
                async_options=ocp.options.AsyncOptions(timeout_secs=_TIMEOUT_S),
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    barrier_sync_key_prefix=f"tokjax-{self._nonce}"
                ),
            )
        return self._writer

    def _finish(
        self,
        step: int,
        saving: Path,
        leaves: dict[str, str],
        metrics: dict[str, float],
        metadata: str,
    ) -> None:
        """Completes a save in the background; an error is kept for the next `wait`."""
        try:
            try:
                self._writer.wait_until_finished()
                records = hash_files(saving, self._share(saving), durable=True)
            except Exception as error:
                self._error = _as_storage_error(error, saving)
                records = {}
            records = self._join_records(saving, records)
            if jax.process_index() == 0 and self._error is None:
                write_atomically(saving / METADATA, metadata)
                records |= hash_files(saving, [METADATA])
                serial = self._folder.next_serial()
                manifest = Manifest(step, serial, now(), records, leaves, self._identity, metrics)
                self._folder.commit(manifest, self._damaged)
                self._damaged.discard(step)
                self._prune()
        except Exception as error:
            self._error = self._error or _as_storage_error(error, saving)
        if self._error is not None:
            self._abandon(step)

    def _share(self, saving: Path) -> list[str]:
        # Beside the arrays another process may be writing its checksums by now.
        sizes = {f"{_STATE}/{name}": size for name, size in list_files(saving / _STATE).items()}
        return share(sizes, jax.process_index(), jax.process_count())

    def _join_records(self, saving: Path, records: dict[str, FileRecord]) -> dict[str, FileRecord]:
        """Returns on process 0 the checksums of all files, each hashed by one of the processes."""
        if jax.process_count() == 1:
            return records
        document = {
            "error": describe_error(self._error),
            "records": {name: [record.size, record.digest] for name, record in records.items()},
        }
        try:
            write_atomically(saving / f"{_SHARE}{jax.process_index()}", json.dumps(document))
        except StorageError as error:
            self._error = self._error or error
        # Also with an error: who never comes would let the others wait for the time-out.
        self._saves += 1
        barrier(f"tokjax-{self._nonce}-hashed-{self._saves}", _TIMEOUT_S)
        if jax.process_index() != 0 or self._error is not None:
            return {}
        joined: dict[str, FileRecord] = {}
        for process in range(jax.process_count()):
            path = saving / f"{_SHARE}{process}"
            try:
                document = json.loads(path.read_text())
            except FileNotFoundError as error:
                raise StorageError(
                    f"process {process} wrote nothing into {saving}: the checkpoint directory "
                    "must be on a file system that all processes share"
                ) from error
            if document["error"] is not None:
                raise rebuild_error(document["error"], process)
            joined |= {name: FileRecord(*entry) for name, entry in document["records"].items()}
            path.unlink()
        # A listing on a network file system may lag behind: hash here what the others did not see.
        unseen = [name for name in list_files(saving) if name not in joined]
        return joined | hash_files(saving, unseen, durable=True)

    def _prune(self) -> None:
        try:
            self._folder.prune(self._config, self._damaged)
            self._damaged.clear()
        except StorageError as error:
            _warn(str(error))  # the new step is committed, so training need not stop

    def _abandon(self, step: int) -> None:
        if jax.process_index() == 0:
            self._folder.abandon(step)

    def _plan(self, step: int | None) -> dict[str, Any]:
        survey = self._folder.survey()
        order = [entry.step for entry in survey.entries]
        if step is None:
            return {"order": order, "pointer_problem": survey.pointer_problem}
        if step not in order:
            there = ", ".join(map(str, sorted(order))) or "none"
            raise CheckpointError(
                f"there is no checkpoint of step {step} in {self._directory}; steps there: {there}"
            )
        return {"order": [step], "pointer_problem": None}

    def _examine(self, step: int) -> tuple[Manifest | None, list[str]]:
        """Returns the manifest of a step and what is wrong; each process reads its share."""
        manifest, problems, error = None, [], None
        try:
            entries = {entry.step: entry for entry in self._folder.survey().entries}
            entry = entries.get(step, Entry(step, None, ("the directory is missing",)))
            manifest, problems = entry.manifest, list(entry.problems)
            if manifest is not None:
                directory = self._folder.step_directory(step)
                problems = listing_problems(directory, manifest)
                if not problems:
                    sizes = {name: record.size for name, record in manifest.files.items()}
                    mine = share(sizes, jax.process_index(), jax.process_count())
                    problems = content_problems(directory, manifest, mine)
        except Exception as caught:
            error = caught
        agree(error)
        found = gather(problems)
        return manifest, list(dict.fromkeys(problem for some in found for problem in some))

    def _complain(self, text: str, remedy: str) -> None:
        """Warns of damage, or raises where the configuration or the caller wants no fall-back."""
        if remedy:
            raise CheckpointError(f"{text}. {remedy}")
        _warn(text)

    def _load(
        self, manifest: Manifest, template: PyTree, lost: tuple[LostStep, ...], partial: bool
    ) -> Restored:
        directory = self._folder.step_directory(manifest.step)
        if not partial:
            check_identity(directory, manifest.identity, self._identity, self._defaults)
        saved = {name: LeafSpec.parse(leaf) for name, leaf in manifest.leaves.items()}
        wanted = {name: spec_of(name, leaf) for name, leaf in name_leaves(template).items()}
        if partial:
            saved = {name: leaf for name, leaf in saved.items() if name in wanted}
        check_leaves(str(directory), saved, wanted)

        def load(leaves: dict[str, Any]) -> dict[str, Any]:
            import orbax.checkpoint as ocp

            arguments = ocp.args.PyTreeRestore(
                item=nest(leaves),
                restore_args=nest({name: _restore_args(leaf) for name, leaf in leaves.items()}),
                partial_restore=partial,
            )
            return name_leaves(self._orbax().restore(directory / _STATE, args=arguments))

        state = restore_leaves(template, load)
        metadata = json.loads((directory / METADATA).read_text())
        return Restored(manifest.step, state, metadata, lost)


def _restore_args(leaf: Any) -> Any:
    import orbax.checkpoint as ocp

    if isinstance(leaf, jax.ShapeDtypeStruct):
        return ocp.ArrayRestoreArgs(
            restore_type=jax.Array, sharding=leaf.sharding, global_shape=leaf.shape, strict=True
        )
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _metadata_text(metadata: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(metadata), indent=1) + "\n"
    except (TypeError, ValueError) as error:
        raise TypeError(f"the metadata of a checkpoint must be JSON values: {error}") from error


def _as_storage_error(error: Exception, path: Path) -> Exception:
    """Returns a StorageError where the disk is to blame, which TensorStore says in words only."""
    if isinstance(error, TokjaxError):
        return error
    match = _STORAGE_WORDS.search(str(error))
    if not isinstance(error, OSError) and match is None:
        return error
    reason = match[0] if match else getattr(error, "strerror", None) or str(error)
    mended = StorageError(
        f"cannot write the checkpoint {path}: {reason}. Free space or choose a writable workdir; "
        "the checkpoints committed before are intact."
    )
    mended.__cause__ = error
    return mended


def _not_raised_elsewhere(record: logging.LogRecord) -> bool:
    """Returns whether a log record is more than the copy of an error that `wait` will raise.

    Orbax logs the failure of a save three times, hundreds of lines for one full disk.
    """
    text = record.getMessage() if record.exc_info else ""
    return not re.search(r"_SignalingThread\.run\(\) raised|Handler Commit operations", text)


def _sentence(directory: Path, lost: LostStep) -> str:
    reasons = "; ".join(shorten(lost.reasons))
    return f"the checkpoint of step {lost.step} in {directory} is damaged: {reasons}"


def _warn(text: str) -> None:
    if jax.process_index() == 0:
        log.warning("%s", text)
