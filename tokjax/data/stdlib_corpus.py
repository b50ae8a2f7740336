"""The embedded corpus: text that every Python installation already has.

Three parts: the documentation topics of `pydoc_data`, the docstrings of the standard library's
modules, classes and functions, and its sources. Nothing is imported except the topics: docstrings
are read from the sources. Document names are stable:

    topic:assert
    docstring:json.decoder                          the module's own
    docstring:json.decoder:JSONDecoder.decode       owner module, then the path inside it
    source:json/decoder.py
"""

import ast
import collections
import functools
import hashlib
import importlib.util
import inspect
import io
import sys
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from tokjax.errors import ConfigError, DataError, nearest

PARTS = ("topics", "docstrings", "sources")
Split = Literal["train", "validation"]

_FORMAT = 1  # goes into identity(): raise it when names or texts change
_SALT = "tokjax 7"  # of several, the one that holds out near 2 % of the bytes of each part
# Tests, other people's packages, and generated files (pydoc_data is a part of its own).
_SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"),
    *("pydoc_data", "lib-dynload", "_bundled", "__phello__"),
}
_SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize", "config-")
_GENERATED = b"gencodec.py"  # character tables in `encodings`
# Absent by design on other platforms, so their absence says nothing about an installation.
_PLATFORM_MODULES = {
    *("msilib", "msvcrt", "nt", "winreg", "winsound", "posix", "pwd", "grp", "spwd", "crypt"),
    *("fcntl", "termios", "tty", "pty", "resource", "syslog", "nis", "ossaudiodev", "readline"),
    *("curses", "dbm"),
}


def documents(parts: Sequence[str] = PARTS) -> Iterator[tuple[str, str]]:
    """Yields `(name, text)` of every document, always in the same order.

    A text that occurs twice within a part (inherited docstrings, say) is given once, under its
    first name, so that no text can be in both splits. A name that occurs twice (a property and its
    setter) gets `#2` the second time.

    Args:
      parts: which of "topics", "docstrings", "sources"; the order is always this one.

    Raises:
      ConfigError: an unknown part.
      DataError: this installation has nothing at all of a part that was asked for.
    """
    parts = _checked(parts)
    for part in parts:
        seen: set[bytes] = set()
        times: collections.Counter[str] = collections.Counter()
        for name, text in _READERS[part]():
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
            if text.strip() and digest not in seen:
                seen.add(digest)
                times[name] += 1
                yield (name if times[name] == 1 else f"{name}#{times[name]}"), text
        if not seen:
            raise DataError(
                f"this Python installation ({sys.prefix}) has no {part} of the standard library: "
                f"none under {_library()}. Install the full Python (on Debian: libpython3-stdlib), "
                "leave the part out, or use another source of text."
            )


def split_of(name: str, validation_share: float = 0.02) -> Split:
    """Returns the split a document belongs to: a hash of its owning module's name decides.

    A module's source and every docstring in it share a split, whatever is installed.

    Args:
      name: a document's name.
      validation_share: part of the modules (and of the topics) that is held out, 0 to 1.

    Raises:
      ConfigError: the share is not within 0 to 1, or the name is none of this corpus.

    >>> split_of("docstring:json.decoder:JSONDecoder") == split_of("source:json/decoder.py")
    True
    """
    if not 0 <= validation_share <= 1:
        raise ConfigError(f"validation_share={validation_share} is not within 0 to 1.")
    digest = hashlib.sha256(f"{_SALT} {_owner(name)}".encode()).digest()
    held_out = int.from_bytes(digest[:8], "big") < validation_share * 2**64
    return "validation" if held_out else "train"


@functools.lru_cache(maxsize=8)
def _identity(parts: tuple[str, ...]) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {parts}".encode())
    if "topics" in parts:
        for name, text in _topics():
            digest.update(f"{name}\0{text}\0".encode("utf-8", "surrogatepass"))
    if {"docstrings", "sources"} & set(parts):
        for path, data in _sources():
            digest.update(f"{path}\0{hashlib.sha256(data).hexdigest()}\0".encode())
    if "docstrings" in parts:
        # The grammar that reads them is this Python's.
        digest.update(str(sys.version_info[:2]).encode())
    return digest.hexdigest()


def identity(parts: Sequence[str] = PARTS) -> str:
    """Returns a hash of the content of the parts, for keys of caches.

    Raises:
      ConfigError: an unknown part.
    """
    return _identity(_checked(parts))


def missing() -> list[str]:
    """Returns what a full installation would add to this corpus, in words; usually nothing."""
    lacking = [] if next(_topics(), None) else ["the documentation topics (pydoc_data.topics)"]
    absent, sourceless = [], []
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in _PLATFORM_MODULES:
            continue
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            spec = None
        if spec is None:
            absent.append(name)
        elif (spec.origin or "").endswith(".pyc"):
            sourceless.append(name)
    if absent:
        lacking.append(f"modules that are not installed: {', '.join(absent)}")
    if sourceless:
        lacking.append(f"modules without source: {', '.join(sourceless)}")
    return lacking


def _checked(parts: Sequence[str]) -> tuple[str, ...]:
    if isinstance(parts, str) or not parts:
        raise ConfigError(f"parts={parts!r} must list one or more of {', '.join(PARTS)}.")
    for part in parts:
        if part not in PARTS:
            raise ConfigError(f"unknown part {part!r} of the corpus.{nearest(part, PARTS)}")
    return tuple(part for part in PARTS if part in parts)


def _owner(name: str) -> str:
    kind, _, rest = name.partition(":")
    if kind == "topic" and rest:
        return name
    if kind == "docstring" and rest:
        return rest.partition(":")[0]
    if kind == "source" and rest.endswith(".py"):
        return _module(rest)
    raise ConfigError(
        f"{name!r} names no document of the embedded corpus, as 'topic:assert', "
        "'docstring:json.decoder:JSONDecoder' or 'source:json/decoder.py' do."
    )


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for label in sorted(topics):
        yield f"topic:{label}", topics[label]


def _source_paths(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name in _SKIPPED_FOLDERS or path.name.startswith(_SKIPPED_PREFIXES):
            continue
        if path.suffix == ".py":
            yield path
        elif path.is_dir() and not path.is_symlink():
            yield from _source_paths(path)


def _sources() -> Iterator[tuple[str, bytes]]:
    root = _library()
    paths = {path.relative_to(root).as_posix(): path for path in _source_paths(root)}
    for name in sorted(paths):
        try:
            data = paths[name].read_bytes()
        except OSError:
            continue  # unreadable for this user: as good as not installed
        if _GENERATED not in data[:2000]:
            yield name, data


def _source_texts() -> Iterator[tuple[str, str]]:
    for name, data in _sources():
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
            text = data.decode("utf-8" if encoding == "utf-8-sig" else encoding)
        except (SyntaxError, UnicodeDecodeError, LookupError):
            continue  # no text: a file made to be undecodable
        yield f"source:{name}", text.removeprefix("\ufeff").replace("\r\n", "\n")


def _docstrings() -> Iterator[tuple[str, str]]:
    for name, text in _source_texts():
        module = _module(name.removeprefix("source:"))
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue  # a template or a file of another Python version
        yield from _docstrings_of(tree, f"docstring:{module}", ":")


def _docstrings_of(node: ast.AST, name: str, separator: str) -> Iterator[tuple[str, str]]:
    own = ast.get_docstring(node, clean=False)  # type: ignore[arg-type]
    if own:
        yield name, inspect.cleandoc(own)
    for child in node.body:  # type: ignore[attr-defined]
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings_of(child, f"{name}{separator}{child.name}", ".")


_READERS = {"topics": _topics, "docstrings": _docstrings, "sources": _source_texts}
