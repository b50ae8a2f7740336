"""The wall-time ledger: every second has one place, over all restarts."""

import json
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.errors import StorageError
from tokjax.training.ledger import CATEGORIES, Ledger, duration, read_ledger, table


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def tick(self, seconds):
        self.now += seconds


def open_ledger(path, clock, **options):
    return Ledger(path / "ledger.json", clock=clock, wall=clock, **options)


def train(ledger, clock, first, last, *, save_every=10, step_seconds=2.0):
    for step in range(first, last + 1):
        with ledger.measure("data_wait"):
            clock.tick(0.5)
        with ledger.measure("step"):
            clock.tick(step_seconds)
        ledger.at_step(step)
        if step % save_every == 0:
            with ledger.measure("save"):
                clock.tick(1.0)
            ledger.saved(step)


def test_nested_time_is_counted_once_and_the_rest_is_other(tmp_path):
    clock = Clock()
    ledger = open_ledger(tmp_path, clock, elapsed_before=7.0)
    clock.tick(1)
    with ledger.measure("eval"):
        clock.tick(2)
        with ledger.measure("compile"):
            clock.tick(4)
        clock.tick(8)
    with ledger.measure("step"):
        clock.tick(16)
    clock.tick(32)
    summary = ledger.summary()
    expected = {"start_up": 7, "other": 33, "eval": 10, "compile": 4, "step": 16}
    assert {c: s for c, s in summary["seconds"].items() if s} == expected
    assert summary["wall_seconds"] == 70
    assert summary["useful"] == 16 / 70


def test_an_error_inside_a_measured_block_leaves_the_books_in_order(tmp_path):
    clock = Clock()
    ledger = open_ledger(tmp_path, clock)

    def fail_in_a_block():
        with ledger.measure("eval"):
            clock.tick(3)
            raise KeyError

    with pytest.raises(KeyError):
        fail_in_a_block()
    clock.tick(2)
    assert ledger.summary()["seconds"]["eval"] == 3
    assert ledger.summary()["seconds"]["other"] == 2


actions = st.lists(
    st.tuples(
        st.sampled_from(["enter", "leave", "tick", "add", "flush", "restart"]),
        st.sampled_from(CATEGORIES[:-1]),
        st.floats(0, 100),
    ),
    max_size=25,
)


@settings(max_examples=30, deadline=None)
@given(actions)
def test_the_sums_equal_the_wall_time_whatever_happens(tmp_path_factory, steps):
    path, clock, blocks, away = tmp_path_factory.mktemp("run"), Clock(), [], 0.0
    ledger = open_ledger(path, clock)
    for action, category, seconds in steps:
        if action == "enter":
            blocks.append(ledger.measure(category))
            blocks[-1].__enter__()
        elif action == "leave" and blocks:
            blocks.pop().__exit__(None, None, None)
        elif action == "tick":
            clock.tick(seconds)
        elif action == "add":
            ledger.add(category, seconds)
        elif action == "flush":
            ledger.flush()
        elif action == "restart":
            ledger.close("preempted")
            clock.tick(seconds)
            away += seconds
            ledger, blocks = open_ledger(path, clock), []
    summary = ledger.summary()
    assert summary["wall_seconds"] == pytest.approx(clock.now - 1000 - away, abs=1e-6)
    assert summary["away_seconds"] == pytest.approx(away, abs=1e-6)
    assert sum(summary["seconds"].values()) == pytest.approx(summary["wall_seconds"])
    assert min(summary["seconds"].values()) >= 0


def test_steps_done_again_are_lost_and_nothing_else(tmp_path):
    clock = Clock()
    ledger = open_ledger(tmp_path, clock)
    assert ledger.resume_from(0) == 0
    train(ledger, clock, 1, 27)
    ledger.flush()  # killed here: steps 21 to 27 were not saved
    clock.tick(100)
    ledger = open_ledger(tmp_path, clock)
    assert ledger.resume_from(20) == 7 * 2.5
    train(ledger, clock, 21, 30)
    ledger.close()
    summary = ledger.summary()
    assert summary["seconds"]["lost"] == 7 * 2.5
    assert summary["seconds"]["step"] == 30 * 2
    assert summary["seconds"]["data_wait"] == 30 * 0.5
    assert summary["seconds"]["save"] == 3
    assert (summary["lost_steps"], summary["starts"], summary["away_seconds"]) == (7, 2, 100)
    first, second = summary["entries"]
    assert (first["exit"], first["first_step"], first["last_step"]) == ("killed", 0, 27)
    assert (second["exit"], second["first_step"], second["last_step"]) == ("finished", 20, 30)


def test_falling_back_beyond_an_earlier_restart_loses_from_every_start_once(tmp_path):
    clock = Clock()
    ledger = open_ledger(tmp_path, clock)
    ledger.resume_from(0)
    train(ledger, clock, 1, 27)
    ledger.flush()
    ledger = open_ledger(tmp_path, clock)
    ledger.resume_from(20)
    train(ledger, clock, 21, 33)
    ledger.flush()
    ledger = open_ledger(tmp_path, clock)
    # The checkpoints of 30 and 20 turned out damaged: steps 11 to 33 are done again.
    assert ledger.resume_from(10) == (10 + 13) * 2.5
    train(ledger, clock, 11, 40)
    summary = ledger.summary()
    assert summary["seconds"]["step"] == 40 * 2
    assert summary["seconds"]["lost"] == (7 + 10 + 13) * 2.5
    assert summary["lost_steps"] == 30


def test_a_checkpoint_without_a_mark_is_interpolated(tmp_path):
    clock = Clock()
    ledger = open_ledger(tmp_path, clock)
    ledger.resume_from(0)
    train(ledger, clock, 1, 8, save_every=100)
    ledger.flush()
    assert open_ledger(tmp_path, clock).resume_from(6) == pytest.approx(2 * 2.5)


def test_marks_stay_few_over_a_long_run(tmp_path):
    clock = Clock()
    ledger = open_ledger(tmp_path, clock, enabled=False)
    ledger.resume_from(0)
    train(ledger, clock, 1, 3000, save_every=1)
    marks = ledger._entry["marks"]
    assert len(marks) <= 512
    assert [m[0] for m in marks[-3:]] == [2998, 2999, 3000]
    assert [m[0] for m in marks] == sorted(m[0] for m in marks)


def test_time_measured_elsewhere_moves_out_of_the_block(tmp_path):
    clock = Clock()
    ledger = open_ledger(tmp_path, clock)
    with ledger.measure("step"):
        clock.tick(10)
        ledger.add("compile", 6)
        ledger.add("compile", 60)  # more than has passed: only what has passed moves
        clock.tick(1)
    seconds = ledger.summary()["seconds"]
    assert (seconds["compile"], seconds["step"]) == (10, 1)


def test_a_killed_process_leaves_its_last_books(tmp_path):
    code = (
        "import os, signal, sys, pathlib\n"
        "from tokjax.training.ledger import Ledger\n"
        "l = Ledger(pathlib.Path(sys.argv[1]), flush_every_s=0)\n"
        "l.resume_from(0)\n"
        "for s in range(1, 6):\n"
        "    with l.measure('step'): sum(range(1000))\n"
        "    l.at_step(s)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "ledger.json"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    summary = read_ledger(path)
    assert summary is not None
    assert summary["entries"][0]["last_step"] == 5
    assert summary["seconds"]["step"] > 0
    assert Ledger(path).summary()["entries"][0]["exit"] == "killed"


def test_writes_are_spaced_by_the_interval(tmp_path):
    clock = Clock()
    ledger = open_ledger(tmp_path, clock, flush_every_s=10)
    before = (tmp_path / "ledger.json").read_text()
    clock.tick(9)
    ledger.at_step(1)
    assert (tmp_path / "ledger.json").read_text() == before
    clock.tick(1)
    ledger.at_step(2)
    assert json.loads((tmp_path / "ledger.json").read_text())["entries"][0]["last_step"] == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 1, "entries": [{}]}', '{"format": 9, "entries": []}']
)
def test_a_damaged_ledger_is_kept_aside_and_the_run_goes_on(tmp_path, content, caplog):
    (tmp_path / "ledger.json").write_text(content)
    ledger = open_ledger(tmp_path, Clock())
    assert ledger.summary()["starts"] == 1
    assert (tmp_path / "ledger.old-1.json").read_text() == content
    assert "ledger.old-1.json" in caplog.text


def test_a_disabled_ledger_measures_without_a_file(tmp_path):
    clock = Clock()
    ledger = open_ledger(tmp_path, clock, enabled=False)
    with ledger.measure("step"):
        clock.tick(100)
    ledger.close()
    assert ledger.summary()["seconds"]["step"] == 100
    assert list(tmp_path.iterdir()) == []


def test_unknown_categories_and_unwritable_places_are_named(tmp_path):
    ledger = open_ledger(tmp_path, Clock())
    with pytest.raises(ValueError, match="evl"), ledger.measure("evl"):
        pass
    with pytest.raises(ValueError, match="lost"):
        ledger.add("lost", 1.0)
    with pytest.raises(StorageError, match="nowhere"):
        Ledger(tmp_path / "nowhere" / "ledger.json")
    assert read_ledger(tmp_path / "nowhere") is None


def test_closing_stops_the_clock(tmp_path):
    clock = Clock()
    ledger = open_ledger(tmp_path, clock)
    clock.tick(5)
    ledger.close("preempted")
    clock.tick(50)
    ledger.close("finished")
    assert ledger.summary()["wall_seconds"] == 5
    assert ledger.summary()["entries"][0]["exit"] == "preempted"


def test_the_table_shows_shares_and_starts(tmp_path):
    clock = Clock()
    ledger = open_ledger(tmp_path, clock)
    ledger.resume_from(0)
    train(ledger, clock, 1, 10)
    ledger.close("preempted")
    ledger = open_ledger(tmp_path, clock)
    ledger.resume_from(10)
    train(ledger, clock, 11, 20)
    text = ledger.table()
    assert "wall time 52.0 s in 2 start(s)" in text
    assert "step           40.0 s   76.9 %" in text
    assert "steps 0 to 10, preempted" in text
    assert "steps 10 to 20, running" in text
    assert text == table(ledger.summary())


def test_durations_read_as_people_write_them():
    assert [duration(s) for s in (0, 59.94, 60, 3599.6, 86400)] == [
        "0.0 s", "59.9 s", "1:00", "1:00:00", "24:00:00",
    ]  # fmt: skip
