"""Runs the small-scale experiment of a method with its controls, and records the verdict.

python -m tokjax.reproduce patch_training
python -m tokjax.reproduce patch_training --scale=smoke
python -m tokjax.reproduce patch_training wavelet_gpt
python -m tokjax.reproduce --family=pretraining --jobs=2
python -m tokjax.reproduce --list

Runs that are finished are not run again, and one that was stopped continues. The record goes to
docs/reproductions. With `--jobs` several run at once, each with its output in log.txt of its
folder, and one that fails does not keep the others. Exit codes: see `tokjax.errors`; a claim that
does not come out is a result and ends with 0.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokjax import cli, methods
from tokjax.commands import Command, run_commands
from tokjax.errors import PREEMPTED_EXIT_CODE, ConfigError
from tokjax.methods_table import METHODS, Family, State
from tokjax.reproduction.plan import PLANS, ROOT, Scale, load_plan, plan_files
from tokjax.training.memory import keep_freed_memory

RECORDS = ROOT / "docs" / "reproductions"
VERDICTS: tuple[State, ...] = ("reproduced", "did not reproduce")

FLAGS = {
    "seeds": cli.FlagSpec(
        "seeds to run every arm with, e.g. 0,1; else those of the plan", str | None
    ),
    "scale": cli.FlagSpec("full, or smoke: seconds of every part, never a result", Scale, "full"),
    "workdir": cli.FlagSpec("folder of the runs; runs/reproduce/SLUG without it", str | None),
    "family": cli.FlagSpec("run, or list, what there is of one family", Family | None),
    "jobs": cli.FlagSpec("reproductions that run at once", int, 1),
    "list": cli.FlagSpec("list the reproductions there are, and their verdicts", bool, False),
}


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    args = cli.parse_args(argv, flags=FLAGS, needs_config=False, positionals=len(METHODS))
    if args.help:
        print(cli.help_text("tokjax.reproduce SLUG ...", __doc__, FLAGS))
        return 0
    slugs = _slugs(args)
    if args["list"]:
        _print_list(slugs)
        return 0
    seeds = parse_seeds(args["seeds"])
    if args["jobs"] < 1:
        raise ConfigError(f"--jobs={args['jobs']} must be at least 1")
    if args["jobs"] > 1 and len(slugs) > 1:
        return reproduce_at_once(slugs, args["jobs"], args["scale"], args["seeds"])
    for slug in slugs:
        workdir = args["workdir"] or default_workdir(slug, args["scale"])
        code = reproduce(slug, Path(workdir), args["scale"], seeds)
        if code:
            return code
    return 0


def reproduce_at_once(slugs: Sequence[str], jobs: int, scale: Scale, seeds: str | None) -> int:
    """Runs reproductions in processes of their own, `jobs` at once; returns the exit code.

    It is 0 where all ended with 0, else that of the first that failed, else that of one that was
    stopped.
    """
    own = [f"--scale={scale}", *([] if seeds is None else [f"--seeds={seeds}"])]
    commands = []
    for slug in slugs:
        words = [sys.executable, "-u", "-m", "tokjax.reproduce", slug, *own]
        commands.append(Command(slug, words, Path(default_workdir(slug, scale)) / "log.txt"))
    codes = run_commands(commands, jobs, lambda done: _said_last(done.log))
    if PREEMPTED_EXIT_CODE in codes:
        print("stopped; the same command continues")
    return next((code for code in sorted(codes, key=PREEMPTED_EXIT_CODE.__eq__) if code), 0)


def _said_last(log: Path) -> str:
    """Returns the last verdict in the output of a reproduction."""
    lines = log.read_text(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line in VERDICTS), "no verdict")


def default_workdir(slug: str, scale: Scale) -> str:
    """Returns where the runs of a reproduction lie if no other place is named."""
    return f"runs/reproduce/{slug}" + ("" if scale == "full" else f"-{scale}")


def parse_seeds(text: str | None) -> tuple[int, ...] | None:
    """Returns the seeds of a list such as "0,1", or None for none given.

    Raises:
        ConfigError: it is no list of different whole numbers from 0.

    >>> parse_seeds("0,2")
    (0, 2)
    """
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise ConfigError(f"--seeds={text}: write different numbers from 0, as in --seeds=0,1")
    return tuple(int(word) for word in words)


def reproduce(slug: str, workdir: Path, scale: Scale, seeds: tuple[int, ...] | None) -> int:
    """Runs what is left of a reproduction, judges, records and shows it; returns the exit code.

    The record is kept in docs/reproductions when the scale is full and no seed of the plan is
    left out, else in the workdir.
    """
    methods.find(slug)
    plan = load_plan(slug, scale, PLANS)
    from tokjax.parallel.distributed import initialise
    from tokjax.reproduction.record import make_record, show, stacked_png, write_record
    from tokjax.reproduction.running import Stopped

    kind = kind_of(plan)
    initialise()
    seeds = seeds or tuple(plan.seeds)
    outcome = kind.run(plan, workdir, seeds, say=lambda text: print(text, flush=True))
    if isinstance(outcome, Stopped):
        print("stopped; the same command continues")
        interrupted = outcome.signal == signal.SIGINT
        return cli.INTERRUPTED_EXIT_CODE if interrupted else PREEMPTED_EXIT_CODE
    verdict = plan.judge(outcome)
    record = make_record(
        slug,
        claim=plan.claim,
        arms=kind.arms_record(plan, outcome),
        seeds=seeds,
        notes=plan.notes,
        loads=kind.loads(outcome),
        verdict=verdict,
        scale=scale,
    )
    complete = set(seeds) >= set(plan.seeds)
    folder = RECORDS if scale == "full" and complete else workdir
    written = write_record(folder, record, stacked_png(kind.figures(plan, outcome)))
    show(kind.table(plan, outcome), verdict)
    print(f"record: {written[0]}")
    if scale != "full":
        print(f"--scale={scale} only tries every part: this is no result and changes no document.")
    elif not complete:
        print(f"Without the seeds {plan.seeds} this is no full result and changes no document.")
    elif methods.find(slug).state != verdict.state:
        print(
            f"Set the state of {slug} in tokjax/methods_table.py to {verdict.state!r} and run "
            f"python -m tokjax.methods --markdown > docs/methods.md"
        )
    return 0


def kind_of(plan: Any) -> Any:
    """Returns the module that runs, records and draws plans of this kind."""
    from tokjax.reproduction import comparing, training_arms
    from tokjax.reproduction.comparison import Comparison

    return comparing if isinstance(plan, Comparison) else training_arms


def _slugs(args: cli.Arguments) -> tuple[str, ...]:
    """Returns the reproductions that the command line means.

    Raises:
        ConfigError: none, or flags that exclude each other.
    """
    known = tuple(plan_files(PLANS))
    if args.positional and (args["family"] or args["list"]):
        raise ConfigError("name a method, or give --family or --list, not both")
    if len(args.positional) > 1 and args["workdir"]:
        raise ConfigError("--workdir is the folder of one reproduction; leave it out with several")
    if args.positional:
        for slug in args.positional:  # a misspelt one is refused before the first runs for minutes
            methods.find(slug)
            load_plan(slug, args["scale"], PLANS)
        return args.positional
    if not args["family"] and not args["list"]:
        raise ConfigError(
            f"name the method to reproduce, or --family or --list. There are: {', '.join(known)}"
        )
    if args["workdir"] and not args["list"]:
        raise ConfigError("--workdir is the folder of one reproduction; leave it out with --family")
    found = tuple(s for s in known if args["family"] in (None, methods.find(s).family))
    if not found and not args["list"]:
        raise ConfigError(f"there is no reproduction of the family {args['family']!r} yet")
    return found


def _print_list(slugs: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from tokjax.reproduction.record import read_record

    table = Table("family", "method", "state", "date", "claim")
    for slug in slugs:
        method, path = methods.find(slug), RECORDS / f"{slug}.json"
        date = read_record(path)["date"] if path.exists() else "never run"
        table.add_row(method.family, slug, method.state, date, load_plan(slug, folder=PLANS).claim)
    Console().print(table)


if __name__ == "__main__":
    keep_freed_memory()
    cli.run(main)
