"""Trains a model: `python -m tokjax.train --config=configs/quickstart.py --workdir=runs/first`.

The same command continues a run that was stopped. Exit codes: see `tokjax.errors`.
"""

import time

_STARTED = time.monotonic()

import signal  # noqa: E402
import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from types import FrameType  # noqa: E402
from typing import NoReturn  # noqa: E402

from tokjax import cli  # noqa: E402
from tokjax.errors import PREEMPTED_EXIT_CODE  # noqa: E402
from tokjax.training.memory import keep_freed_memory  # noqa: E402

FLAGS = {
    "workdir": cli.FlagSpec("folder for checkpoints, curves and the report", str, required=True),
}


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    # Until training listens itself there is nothing to save, but a process that prepares data to
    # end with this one, and the exit code to keep.
    signal.signal(signal.SIGTERM, _stop_before_training)
    args = cli.parse_args(argv, flags=FLAGS)
    from tokjax.training.config import TrainConfig

    if args.help:
        print(cli.help_text("tokjax.train", __doc__, FLAGS, schema=TrainConfig, args=args))
        return 0
    config = cli.load_config(TrainConfig, args)

    from tokjax.parallel.distributed import explaining_losses, initialise
    from tokjax.training.loop import train
    from tokjax.training.run import build_run

    initialise()
    with explaining_losses():
        run = build_run(config)
        result = train(run, Path(args["workdir"]), started=_STARTED)
    if result.report is not None:
        for name, value in result.metrics.items():
            print(f"{name} {value:.4f}")
        print(f"report: {result.report}")
    if result.finished:
        return 0
    print(f"stopped at step {result.step}; the same command continues")
    interrupted = result.stopped_by == signal.SIGINT
    return cli.INTERRUPTED_EXIT_CODE if interrupted else PREEMPTED_EXIT_CODE


def _stop_before_training(number: int, frame: FrameType | None) -> NoReturn:
    print("stopped before training; the same command continues", file=sys.stderr)
    raise SystemExit(PREEMPTED_EXIT_CODE)


if __name__ == "__main__":
    keep_freed_memory()
    cli.run(main)
