"""Commands beside each other: all run, failures keep nobody, a stop reaches those that run."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from tokjax.commands import Command, run_commands
from tokjax.errors import PREEMPTED_EXIT_CODE

WAITING = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("ready", flush=True)
time.sleep(60)
"""


def python(name, program, folder):
    return Command(name, [sys.executable, "-u", "-c", program], folder / name / "log.txt")


def test_all_run_with_logs_of_their_own_and_a_failure_keeps_nobody(tmp_path, capsys):
    commands = [
        python("a", "print('of a')", tmp_path),
        python("b", "import sys; print('of b', file=sys.stderr); sys.exit(3)", tmp_path),
        python("c", "print('of c')", tmp_path),
    ]
    assert run_commands(commands, 1, lambda done: done.log.read_text().strip()) == [0, 3, 0]
    assert [each.log.read_text() for each in commands] == ["of a\n", "of b\n", "of c\n"]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "[1/3] a: begins" and said[1].endswith("s, of a")
    assert said[3].endswith(f"exit code 3, see {tmp_path / 'b' / 'log.txt'}")


def test_so_many_run_at_once_and_no_more(tmp_path):
    now, ever = tmp_path / "now", tmp_path / "ever"
    now.mkdir()
    ever.mkdir()
    # Who is alone waits for a second one; then a third would have time to come.
    program = f"""
import os, time
here = [os.path.join(folder, str(os.getpid())) for folder in ({str(now)!r}, {str(ever)!r})]
for file in here:
    open(file, "w").close()
most, until = 0, None
while until is None or time.monotonic() < until:
    most = max(most, len(os.listdir({str(now)!r})))
    if until is None and len(os.listdir({str(ever)!r})) > 1:
        until = time.monotonic() + 0.4
    time.sleep(0.01)
print(most)
os.remove(here[0])
"""
    commands = [python(str(i), program, tmp_path) for i in range(4)]
    assert run_commands(commands, 2) == [0] * 4
    most = max(int(each.log.read_text()) for each in commands)
    assert most == 2


def test_a_stop_reaches_those_that_run_and_no_other_begins(tmp_path, capsys):
    commands = [python(name, WAITING, tmp_path) for name in "abc"]

    def stop():
        while not all(Path(c.log).exists() and "ready" in c.log.read_text() for c in commands[:2]):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop)
    thread.start()
    assert run_commands(commands, 2) == [PREEMPTED_EXIT_CODE] * 3
    thread.join()
    assert not commands[2].log.exists()
    assert signal.getsignal(signal.SIGTERM) is before
