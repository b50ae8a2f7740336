"""Commands that run beside each other, each with its output in a log of its own."""

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokjax.errors import PREEMPTED_EXIT_CODE


@dataclass(frozen=True)
class Command:
    """A command to run.

    Attributes:
        name: that people know it by.
        words: the program and its arguments.
        log: what its output is added to; the folder is made.
    """

    name: str
    words: Sequence[str]
    log: Path


def run_commands(
    commands: Sequence[Command],
    jobs: int,
    outcome: Callable[[Command], str] = lambda command: "done",
) -> list[int]:
    """Runs commands, `jobs` at once, and says how it goes; returns their exit codes.

    One that fails does not keep the others. A SIGTERM or Ctrl-C is passed on as SIGTERM to those
    that run, and no other is begun: its code is `PREEMPTED_EXIT_CODE`.

    Args:
        commands: in the order in which they begin.
        jobs: how many run at once.
        outcome: what to say of a command that ended with 0.
    """
    running: set[subprocess.Popen] = set()
    stopped: list[int] = []

    def stop(number: int, frame: Any) -> None:
        stopped.append(number)
        for process in list(running):
            process.send_signal(signal.SIGTERM)

    def run(numbered: tuple[int, Command]) -> int:
        number, command = numbered
        if stopped:
            return PREEMPTED_EXIT_CODE
        command.log.parent.mkdir(parents=True, exist_ok=True)
        place, began = f"[{number}/{len(commands)}] {command.name}", time.monotonic()
        print(f"{place}: begins", flush=True)
        with open(command.log, "ab") as log:
            process = subprocess.Popen(command.words, stdout=log, stderr=subprocess.STDOUT)
            running.add(process)
            if stopped:  # between the question above and here
                process.send_signal(signal.SIGTERM)
            code = process.wait()
            running.discard(process)
        how = f"exit code {code}, see {command.log}" if code else outcome(command)
        print(f"{place}: {time.monotonic() - began:.0f} s, {how}", flush=True)
        return code

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(run, enumerate(commands, 1)))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
