"""The configuration keys that a run and the checkpoint it continues from must share."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokjax.errors import CheckpointError


def flatten_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested mappings with dotted keys, their values as JSON gives them back.

    >>> flatten_identity({"model": {"width": 64, "shape": (2, 3)}, "seed": 0})
    {'model.width': 64, 'model.shape': [2, 3], 'seed': 0}

    Raises:
        TypeError: a value is none that JSON knows.
    """
    return _flatten(json.loads(json.dumps(dict(identity))), "")


def check_identity(
    place: Path,
    saved: Mapping[str, Any],
    mine: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Does nothing if the flat identities of a checkpoint and of this run are equal.

    A key that the checkpoint lacks was added to the schema after it was made; that is no
    difference where the run leaves it at its default.

    Raises:
        CheckpointError: naming every key that differs, with both values.
    """
    added = {key: mine[key] for key in mine if key not in saved}
    kept = {key for key in added if _value(added, key) == _value(defaults or {}, key)}
    lines = [
        f"\n  {key}: {_value(saved, key)} in the checkpoint, {_value(mine, key)} in this run"
        for key in sorted({*saved, *mine} - kept)
        if _value(saved, key) != _value(mine, key)
    ]
    if lines:
        raise CheckpointError(
            f"{place} was made by another configuration:{''.join(lines)}\n"
            "Set these keys as in the checkpoint to continue from it, or choose another workdir."
        )


def _flatten(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            value = {str(i): child for i, child in enumerate(value)}
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _value(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], sort_keys=True) if key in values else "absent"
