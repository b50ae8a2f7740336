"""From a source to its token store: made once, found again at once.

`prepare` makes the store in this process and imports TensorFlow for it; `ensure_store` does so in
another process, for programs that must stay free of TensorFlow. A store that is there already
costs neither of them more than a hash of the input files.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tokjax import errors
from tokjax.config import Choice, resolve, to_dict
from tokjax.data.cache import cache_directory, exclusive
from tokjax.data.config import DataConfig
from tokjax.data.encoding import Encoder, Example
from tokjax.data.identity import store_name
from tokjax.data.sources import Problem, SeqioSource, TfdsSource, source_name, split_label
from tokjax.data.store import StoreWriter, TokenStore
from tokjax.data.store_writer import remove_unfinished
from tokjax.data.tokenizers import TokenizerConfig, build_tokenizer, sequence_ends
from tokjax.errors import DataError, TokjaxError


@dataclass(frozen=True)
class Request:
    """What to prepare.

    Attributes:
      source: a source of `tokjax.data.sources`.
      tokenizer: how text becomes ids.
      cache_dir: where stores lie; None: see `tokjax.data.cache.cache_directory`.
      on_error: bad records: "raise" an error, or "skip", count and list them.
      max_tokens: longer examples are bad records; None: no limit.
    """

    source: Annotated[Any, Choice("source")]
    tokenizer: TokenizerConfig
    cache_dir: str | None
    on_error: Literal["raise", "skip"]
    max_tokens: int | None

    @classmethod
    def of(
        cls, source: Any, data: DataConfig, cache_dir: str | os.PathLike[str] | None = None
    ) -> "Request":
        """Returns the request for one source of a configuration."""
        place = data.cache_dir if cache_dir is None else os.fspath(cache_dir)
        return cls(source, data.tokenizer, place, data.on_error, data.max_tokens)

    @property
    def cache(self) -> Path:
        """The directory of the cache."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else cache_directory()

    def encoder(self) -> Encoder:
        """Returns the encoder of the examples; a BPE is trained on first use.

        Raises:
          ConfigError: the tokenizer cannot be had as configured.
        """
        tokenizer = build_tokenizer(self.tokenizer, self.cache)
        before, after = sequence_ends(self.tokenizer, tokenizer)
        thinking = getattr(self.source, "thinking", None)
        if thinking is not None:
            thinking.check(tokenizer)
        template = getattr(self.source, "chat_template", None)
        return Encoder(tokenizer, tuple(before), tuple(after), self.max_tokens, template)

    def directory(self, encoder: Encoder) -> Path:
        """Returns where the store lies once it is made; found without TensorFlow.

        Raises:
          ConfigError: a file of the source is missing.
          DataError: a file of the source cannot be read.
        """
        return self.cache / "stores" / store_name(self.source, encoder, self.on_error, self.cache)


def prepare(
    source: Any,
    data: DataConfig,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Path:
    """Returns the directory of the token store of a source, made now if it is not there.

    Several processes may ask for the same store at once: one makes it, the others wait.

    Args:
      source: a source of `tokjax.data.sources`; its split is part of it.
      data: tokenizer, on_error, max_tokens and cache_dir are used.
      cache_dir: where stores lie, instead of what `data` says.
      progress: print progress and summary to stderr.

    Raises:
      ConfigError: a file is missing, a name is unknown, or the tokenizer cannot be had.
      DataError: a record is bad (and `on_error` is "raise"), a file cannot be read, there is no
        example, or a store that is there is damaged.
      StorageError: the cache cannot be written.
    """
    return _prepare(Request.of(source, data, cache_dir), progress)


def _prepare(request: Request, progress: bool) -> Path:
    source = request.source
    encoder = request.encoder()
    directory = request.directory(encoder)
    if _is_there(directory):
        return directory
    if isinstance(source, TfdsSource):
        quieten_tensorflow()
        from tokjax.data.tfds_records import build

        build(source)  # its files, which are part of the store's name, are there only now
        directory = request.directory(encoder)
    with exclusive(directory):
        if not _is_there(directory):
            remove_unfinished(directory)
            _make(request, encoder, directory, progress)
    return directory


def ensure_store(
    source: Any,
    data: DataConfig,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Path:
    """Returns the same as `prepare`, which runs in another process if there is work to do.

    This process never imports TensorFlow. The other one never touches an accelerator.

    Raises:
      TokjaxError: as `prepare`, the same class with the same message.
      RuntimeError: a bug ended the other process; its traceback is on stderr.
    """
    request = Request.of(source, data, cache_dir)
    directory = request.directory(request.encoder())
    if _is_there(directory):
        return directory
    with tempfile.TemporaryDirectory(prefix="tokjax-prepare-") as folder:
        answer = Path(folder) / "answer.json"
        order = {
            "request": to_dict(request),
            "progress": progress,
            "answer": str(answer),
            "sys_path": [os.path.abspath(entry) for entry in sys.path],
        }
        code = _run_worker(json.dumps(order))
        try:
            told = json.loads(answer.read_bytes())
        except (OSError, ValueError):
            told = {}
    if "directory" in told:
        return Path(told["directory"])
    if "error" in told:
        raise getattr(errors, told["error"])(told["message"])
    if code < 0:
        raise DataError(
            f"preparing {_title(source)} was killed by signal {-code}, perhaps for want of memory. "
            "Run it again; nothing half made was left."
        )
    raise RuntimeError(f"preparing {_title(source)} failed with exit code {code}; see above")


def worker() -> None:
    """Does what `ensure_store` asks on stdin; the answer goes to the file that it names."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing half made stays
    order = json.loads(sys.stdin.read())
    sys.path += [entry for entry in order["sys_path"] if entry not in sys.path]
    code = 0
    try:
        request = resolve(Request, order["request"], path="request")
        path = _prepare(request, order["progress"])
        told = {"directory": str(path)}
    except TokjaxError as error:
        known = [c.__name__ for c in type(error).__mro__ if getattr(errors, c.__name__, None) is c]
        told = {"error": known[0], "message": str(error)}
        code = error.exit_code
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    Path(order["answer"]).write_text(json.dumps(told), encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # TensorFlow's threads have been seen to keep an interpreter from ending


def quieten_tensorflow() -> None:
    """Keeps TensorFlow from the accelerators, which belong to JAX, and from its start-up notes.

    Call it before TensorFlow is imported for the first time.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _native_stderr_set_aside():
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
    tf.get_logger().setLevel("ERROR")


@contextlib.contextmanager
def _native_stderr_set_aside() -> Iterator[None]:
    """Hides what C++ prints during the block, unless a bug ends it; Python still prints.

    TensorFlow prints every error of a record twice, with traceback, before it reaches us.
    """
    sys.stderr.flush()
    kept, python_stderr = os.dup(2), sys.stderr
    with tempfile.TemporaryFile() as aside:
        if python_stderr is sys.__stderr__:
            sys.stderr = open(os.dup(kept), "w", buffering=1, encoding="utf-8")  # noqa: SIM115
        os.dup2(aside.fileno(), 2)
        bug = True
        try:
            yield
            bug = False
        except (TokjaxError, KeyboardInterrupt):
            bug = False
            raise
        finally:
            if sys.stderr is not python_stderr:
                sys.stderr.close()
                sys.stderr = python_stderr
            os.dup2(kept, 2)
            os.close(kept)
            if bug:
                aside.seek(0)
                os.write(2, aside.read())


def _is_there(directory: Path) -> bool:
    """Returns whether the store exists; one that is damaged is an error, not absent."""
    if not directory.exists():
        return False
    TokenStore.open(directory)
    return True


def _run_worker(order: str) -> int:
    environment = {
        **os.environ,
        # The accelerators belong to the process that trains.
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    command = [sys.executable, "-c", "from tokjax.data.prepare import worker; worker()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as process:
        try:
            process.communicate(order.encode())
        except BaseException:
            process.terminate()  # Ctrl-C and SIGTERM end both
            process.wait()
            raise
        return process.returncode


def _make(request: Request, encoder: Encoder, directory: Path, progress: bool) -> None:
    with _native_stderr_set_aside():
        _make_quietly(request, encoder, directory, progress)


def _make_quietly(request: Request, encoder: Encoder, directory: Path, progress: bool) -> None:
    from tokjax.data.prepare_report import Reporter

    reporter = Reporter(_title(request.source), enabled=progress)
    with reporter.working("starting TensorFlow"):
        quieten_tensorflow()
        from tokjax.data.tasks import Inspector

    task = {
        "source": to_dict(request.source),
        "on_error": request.on_error,
        "max_tokens": request.max_tokens,
    }
    tokenizer = {
        "fingerprint": encoder.tokenizer.fingerprint,
        "config": to_dict(request.tokenizer),
        "before": list(encoder.before),
        "after": list(encoder.after),
    }
    vocab_size = encoder.tokenizer.vocab_size
    start = time.monotonic()
    with StoreWriter(directory, vocab_size=vocab_size, tokenizer=tokenizer, task=task) as writer:

        def skip(problem: Problem) -> None:
            writer.skip(problem.name, problem.reason, problem.detail)

        inspector = Inspector(skip=request.on_error == "skip", on_skip=skip)
        with reporter.counting(writer) as advance:
            for example in _examples(request.source, encoder, inspector):
                writer.add(
                    example.tokens,
                    example.weights,
                    key=example.key,
                    name=example.name,
                    num_bytes=example.num_bytes,
                    cuts=example.cuts,
                    values=example.values,
                )
                advance()
    reporter.summary(TokenStore.open(directory), time.monotonic() - start)


def _examples(source: Any, encoder: Encoder, inspector: Any) -> Iterator[Example]:
    from tokjax.data import tasks

    if isinstance(source, SeqioSource):
        from tokjax.data.registered_tasks import registered_examples

        yield from registered_examples(source, encoder, inspector)
        return
    with tasks.temporary_task(source, encoder, inspector) as task:
        yield from tasks.task_examples(task, source, inspector)


def _title(source: Any) -> str:
    return f"{source_name(source)} {split_label(source)}"
