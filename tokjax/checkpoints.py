"""Lists the checkpoints of a run: which is the latest, what they hold, whether they are sound.

    python -m tokjax.checkpoints WORKDIR             sizes and names of all files are checked
    python -m tokjax.checkpoints WORKDIR --verify    every byte is read and checked

Nothing is changed, so a run may be saving meanwhile. The exit code is 0 when the latest checkpoint
is sound and 4 when it is damaged or there is none.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokjax import cli
from tokjax.errors import CheckpointError, ConfigError
from tokjax.training.checkpoint_folder import CheckpointFolder, Entry, Survey
from tokjax.training.manifest import content_problems, listing_problems, shorten

FLAGS = {
    "verify": cli.FlagSpec("read every byte and compare its checksum", bool, False),
    "json": cli.FlagSpec("print one JSON document instead of a table", bool, False),
}


def describe(directory: Path, *, verify: bool = False) -> list[dict[str, Any]]:
    """Returns a row for every step in a checkpoint directory, in increasing order; changes nothing.

    Args:
        directory: the checkpoint directory, or the run's workdir that has it as `checkpoints`.
        verify: read and check every byte; else names and sizes of the files only.

    Returns:
        Dictionaries of `step`, `latest` (whether a run would try it first), `committed` (whether
        its save was finished), `good`, `reasons` (what is wrong), `bytes`, `files`, `leaves`
        (arrays), `created` (UTC), `metrics` and `path`.

    Raises:
        CheckpointError: a newer tokjax wrote them.
        StorageError: the permissions do not allow reading them.
    """
    folder = CheckpointFolder(_checkpoint_directory(directory))
    survey = folder.survey()
    rows = [_row(folder, survey, entry, verify) for entry in survey.entries]
    return sorted(rows, key=lambda row: row["step"])


def main(argv: Sequence[str]) -> int:
    """Prints the table; returns the exit code."""
    args = cli.parse_args(argv, flags=FLAGS, needs_config=False, positionals=1)
    if args.help:
        print(cli.help_text("tokjax.checkpoints WORKDIR", __doc__, FLAGS, args=args))
        return 0
    if not args.positional:
        raise ConfigError("name the workdir: python -m tokjax.checkpoints WORKDIR")
    directory = _checkpoint_directory(Path(args.positional[0]))
    if not directory.is_dir():
        raise CheckpointError(f"there is no directory {directory}")
    rows = describe(directory, verify=args["verify"])
    if args["json"]:
        print(json.dumps([_as_json(row) for row in rows], indent=1))
    elif rows:
        _print_table(directory, rows, verified=args["verify"])
    if not rows:
        raise CheckpointError(f"there are no checkpoints in {directory}")
    problem = CheckpointFolder(directory).survey().pointer_problem
    if problem is not None:
        raise CheckpointError(f"{directory}: {problem}")
    return 0 if all(row["good"] for row in rows if row["latest"]) else CheckpointError.exit_code


def _checkpoint_directory(directory: Path) -> Path:
    inside = directory / "checkpoints"
    return inside if inside.is_dir() else directory


def _row(folder: CheckpointFolder, survey: Survey, entry: Entry, verify: bool) -> dict[str, Any]:
    path = folder.step_directory(entry.step)
    manifest, problems = entry.manifest, list(entry.problems)
    if manifest is not None:
        problems = listing_problems(path, manifest)
        if verify and not problems:
            problems = content_problems(path, manifest, list(manifest.files))
    return {
        "step": entry.step,
        "latest": entry is survey.entries[0],
        "committed": manifest is not None,
        "good": not problems,
        "reasons": problems,
        "bytes": manifest.size if manifest else 0,
        "files": len(manifest.files) if manifest else 0,
        "leaves": len(manifest.leaves) if manifest else 0,
        "created": manifest.created if manifest else None,
        "metrics": dict(manifest.metrics) if manifest else {},
        "path": str(path),
    }


def _as_json(row: dict[str, Any]) -> dict[str, Any]:
    metrics = row["metrics"].items()
    # NaN is no JSON.
    return {
        **row,
        "metrics": {name: value if math.isfinite(value) else str(value) for name, value in metrics},
    }


def _print_table(directory: Path, rows: list[dict[str, Any]], *, verified: bool) -> None:
    # Imported here: only the table needs it, and `describe` is for programs, too.
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(str(directory)), box=box.SIMPLE_HEAD, title_justify="left")
    # Metrics a line each, short and last: they are what a narrow terminal wraps.
    for name, justify in (
        ("step", "right"),
        ("size", "right"),
        ("saved (UTC)", "left"),
        ("state", "left"),
        ("metrics", "left"),
    ):
        table.add_column(name, justify=justify, no_wrap=name != "metrics")  # type: ignore[arg-type]
    for row in rows:
        sound = "verified" if verified else "complete"
        table.add_row(
            f"{row['step']}{' (latest)' if row['latest'] else ''}",
            _size(row["bytes"]),
            (row["created"] or "")[:16].replace("T", " "),
            f"[green]{sound}" if row["good"] else "[red]damaged",
            escape("\n".join(_metric(*item) for item in row["metrics"].items())),
        )
    Console(highlight=False).print(table)
    for row in rows:
        for reason in shorten(row["reasons"]):
            print(f"step {row['step']}: {reason}")  # whole lines: paths are for copying


def _metric(name: str, value: float) -> str:
    return f"{name.removeprefix('eval/')} {value:.4g}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


if __name__ == "__main__":
    cli.run(main)
