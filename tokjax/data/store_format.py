"""The format of a token store: its files, and the checks of its manifest."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tokjax.errors import DataError

FORMAT = "tokjax token store"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"

_REMEDY = "Delete the directory {directory} and run the preparation again."
FILES = {
    "tokens.bin",
    "weights.bin",
    "cuts.bin",
    "labels.bin",
    "scores.bin",
    "sides.bin",
    "offsets.bin",
    "lengths.bin",
    "keys.bin",
    "repeats.bin",
    "names.bin",
    "name_offsets.bin",
    "unigram.bin",
    "skipped.jsonl",
}
# of sequences: name -> file
VALUES = {"label": "labels.bin", "score": "scores.bin", "side": "sides.bin"}
OPTIONAL = {"weights.bin", "cuts.bin", *VALUES.values(), "repeats.bin", "skipped.jsonl"}


def content_fingerprint(manifest: dict[str, Any]) -> str:
    """Returns the SHA-256 (hex) of what determines the examples: files, id type, vocabulary."""
    files = {name: facts for name, facts in manifest["files"].items() if name != "skipped.jsonl"}
    tokenizer = manifest["tokenizer"]
    identity = {
        "version": manifest["version"],
        "token_dtype": manifest["token_dtype"],
        "tokenizer": [tokenizer.get("fingerprint"), tokenizer["vocab_size"]],
        "files": files,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def damaged(path: Path, what: str) -> DataError:
    """Returns the error for a file that is not as it was written."""
    remedy = _REMEDY.format(directory=path.parent)
    return DataError(f"the token store is damaged: {path} {what}. {remedy}")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Returns the manifest of a store, checked against itself.

    Raises:
      DataError: there is none, it is of another version, or it is damaged.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"{directory} is no token store: it has no {MANIFEST}. Name the directory that the "
            "preparation printed."
        ) from error
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise damaged(path, f"is no JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} does not describe a token store. Name another directory.")
    if manifest.get("version") != FORMAT_VERSION:
        raise DataError(
            f"{directory} has store version {manifest.get('version')}, this tokjax reads "
            f"{FORMAT_VERSION}. {_REMEDY.format(directory=directory)}"
        )
    try:
        sound = manifest["fingerprint"] == content_fingerprint(manifest)
        sound = sound and FILES - OPTIONAL <= set(manifest["files"]) <= FILES
        sound = sound and all(
            isinstance(value, int) and value >= 0
            for value in (
                manifest["counts"]["examples"],
                manifest["counts"]["tokens"],
                manifest["tokenizer"]["vocab_size"],
                *(facts["bytes"] for facts in manifest["files"].values()),
            )
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(path, f"lacks or mangles {error}") from error
    if not sound:
        raise damaged(path, "does not agree with its own fingerprint")
    return manifest


def check_file(path: Path, facts: dict[str, Any], verify: bool) -> None:
    """Checks the size and, if `verify`, the SHA-256 of a file against the manifest's facts.

    Raises:
      DataError: it is missing, unreadable, or not as it was written.
    """
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise damaged(path, f"has {size} bytes instead of {facts['bytes']}")
        if verify:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != facts["sha256"]:
                raise damaged(path, "does not have the SHA-256 that was written")
    except FileNotFoundError as error:
        raise damaged(path, "is missing") from error
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror or error}") from error
