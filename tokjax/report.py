"""Writes report.html about a run, while it goes on or afterwards.

python -m tokjax.report WORKDIR
"""

from collections.abc import Sequence
from pathlib import Path

from tokjax import cli
from tokjax.errors import ConfigError


def main(argv: Sequence[str]) -> None:
    """Writes the report of the workdir named on the command line and prints its path.

    Raises:
        ConfigError: no workdir is named, or it is not that of a run.
        StorageError: the report cannot be written.
    """
    args = cli.parse_args(argv, flags={}, needs_config=False, positionals=1)
    if args.help:
        print((__doc__ or "").strip())
        return
    if not args.positional:
        raise ConfigError("which run? Usage: python -m tokjax.report WORKDIR")
    workdir = Path(args.positional[0])
    if not workdir.is_dir():
        raise ConfigError(f"there is no directory {workdir}")
    from tokjax.training.report import write_report

    print(write_report(workdir))


if __name__ == "__main__":
    cli.run(main)
