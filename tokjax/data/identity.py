"""What a token store is made of, as a hash that needs no TensorFlow: known stores open fast."""

import glob
import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

from tokjax.config.values import to_dict
from tokjax.data.encoding import Encoder
from tokjax.data.files import expand_files, file_digest
from tokjax.data.sources import (
    FileSource,
    SeqioSource,
    StdlibSource,
    TfdsSource,
    source_name,
    split_label,
)
from tokjax.data.store_format import FORMAT_VERSION

_RULES = 1  # raise it when the same records would give other examples


def store_name(source: Any, encoder: Encoder, on_error: str, cache: Path) -> str:
    """Returns `<source>-<split>-<hash>`: another name whenever the store would be another.

    The hash covers the source's settings, the content of its files, the tokenizer and the options.
    """
    facts = {
        "format": FORMAT_VERSION,
        "rules": _RULES,
        "source": source_identity(source, cache),
        "tokenizer": encoder.tokenizer.fingerprint,
        "lossy": encoder.tokenizer.allow_lossy,
        "before": encoder.before,
        "after": encoder.after,
        "max_tokens": encoder.max_tokens,
        "on_error": on_error,
    }
    if getattr(source, "kind", None) == "messages":
        facts["chat_template"] = encoder.template.source
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    split = re.sub(r"[^A-Za-z0-9_.]+", "_", split_label(source)).strip("_")
    return f"{source_name(source)}-{split}-{digest}"


def source_identity(source: Any, cache: Path) -> dict[str, Any]:
    """Returns a source's settings as plain values, its patterns replaced by files and contents.

    Raises:
      ConfigError: a file is missing or a pattern matches nothing.
      DataError: a file cannot be read.
    """
    facts = to_dict(source)
    if isinstance(source, FileSource):
        files = expand_files(source.files)
        facts["files"] = [[file, file_digest(file, cache)] for file in files]
    elif isinstance(source, StdlibSource):
        from tokjax.data.stdlib_corpus import identity

        facts["content"] = identity(source.parts)
    elif isinstance(source, TfdsSource):
        facts["content"] = _tfds_identity(source)
    elif isinstance(source, SeqioSource):
        facts["content"] = _module_identity(source.module)
    return facts


def _tfds_identity(source: TfdsSource) -> list[list[Any]]:
    """Returns the files of a built data set: descriptions by content, records by size and time."""
    root = source.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    name = source.dataset.partition(":")[0].partition("/")[0]
    folder = Path(root).expanduser() / glob.escape(name)
    found: list[list[Any]] = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if path.suffix == ".json":
            found.append([relative, hashlib.sha256(path.read_bytes()).hexdigest()])
        elif path.is_file():
            found.append([relative, path.stat().st_size, path.stat().st_mtime_ns])
    return found


def _module_identity(module: str | None) -> str | None:
    """Returns the SHA-256 (hex) of a module's file, so that an edited task is prepared again."""
    if not module:
        return None
    try:
        found = importlib.util.find_spec(module)
        origin = found.origin if found else None
        return hashlib.sha256(Path(origin).read_bytes()).hexdigest() if origin else None
    except (ImportError, ValueError, OSError):
        return None  # the preparation says what is wrong with it
