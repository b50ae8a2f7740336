"""Metrics files: they survive kills, resumes, torn lines and full disks."""

import json
import math
import resource
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.errors import StorageError
from tokjax.training.metrics import (
    TIME_COLUMNS,
    Accumulator,
    MetricWriter,
    read_metrics,
    series,
)


def run(workdir, steps, resume_step=None, *, evals=4, crash=False):
    """A made-up run: training rows at every step, a row with new columns at every `evals`."""
    writer = MetricWriter(workdir, resume_step=resume_step)
    for step in steps:
        writer.write(step, {"loss": 10 / step, "tokens_per_second": np.random.uniform()})
        if step % evals == 0:
            writer.write(step, {"eval/loss": 11 / step})
    if crash:  # what the system does for a killed process
        writer._file.close()
        writer._events.close()
        writer._file = None
    else:
        writer.close()
    return writer


def without_times(workdir):
    table = read_metrics(workdir)
    return list(table), {k: v for k, v in table.items() if k not in TIME_COLUMNS}


def test_a_resumed_run_leaves_the_csv_of_an_undisturbed_one(tmp_path):
    run(tmp_path / "whole", range(1, 21))
    run(tmp_path / "cut", range(1, 16), crash=True)
    run(tmp_path / "cut", range(11, 18), resume_step=10, crash=True)
    run(tmp_path / "cut", range(13, 21), resume_step=12)
    assert without_times(tmp_path / "cut") == without_times(tmp_path / "whole")
    assert read_metrics(tmp_path / "cut")["step"].count(13) == 1


def test_a_column_that_only_removed_rows_used_returns_in_its_old_place(tmp_path):
    run(tmp_path / "whole", range(1, 9))
    run(tmp_path / "cut", range(1, 6), crash=True)
    assert "eval/loss" in read_metrics(tmp_path / "cut")
    run(tmp_path / "cut", range(3, 9), resume_step=2)
    assert without_times(tmp_path / "cut") == without_times(tmp_path / "whole")


@settings(max_examples=25, deadline=None)
@given(
    saved_every=st.integers(1, 4),
    deaths=st.lists(st.integers(1, 12), max_size=3),
    torn=st.integers(0, 30),
)
def test_no_sequence_of_kills_shows_in_the_csv(tmp_path_factory, saved_every, deaths, torn):
    whole, cut = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
    run(whole, range(1, 13))
    saved = None
    for death in deaths:
        start = saved or 0
        run(cut, range(start + 1, max(start, death) + 1), resume_step=start, crash=True)
        saved = max(start, death) // saved_every * saved_every
        with open(cut / "metrics.csv", "ab") as file:
            file.write(b"99,123456.789,1.0,0.3,0.25,0.125"[:torn])
    run(cut, range((saved or 0) + 1, 13), resume_step=saved)
    assert without_times(cut) == without_times(whole)


def test_a_fresh_start_keeps_the_old_file_under_another_name(tmp_path):
    run(tmp_path, range(1, 4))
    old = (tmp_path / "metrics.csv").read_text()
    writer = run(tmp_path, range(1, 2), resume_step=None)
    assert (tmp_path / "metrics.previous-1.csv").read_text() == old
    assert "metrics.previous-1.csv" in writer.notes[0]
    assert read_metrics(tmp_path)["step"] == [1]


def test_a_torn_last_line_is_removed_and_reported(tmp_path):
    run(tmp_path, range(1, 4), crash=True)
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("4,17")
    assert read_metrics(tmp_path)["step"] == [1, 2, 3]
    writer = MetricWriter(tmp_path, resume_step=3)
    assert "1 torn" in writer.notes[0]
    writer.write(4, {"loss": 1.0})
    assert read_metrics(tmp_path)["step"] == [1, 2, 3, 4]
    writer.close()


def test_values_that_are_not_finite_and_missing_ones_stay_apart(tmp_path):
    with MetricWriter(tmp_path, resume_step=None) as writer:
        writer.write(1, {"loss": math.nan, "grad_norm": math.inf})
        writer.write(2, {"loss": -math.inf, "late": jnp.float32(0.1)})
    table = read_metrics(tmp_path)
    assert math.isnan(table["loss"][0])
    assert table["loss"][1] == -math.inf
    assert table["grad_norm"] == [math.inf, None]
    assert table["late"] == [None, float(np.float32(0.1))]
    assert series(table, "late") == ([2], [float(np.float32(0.1))])


def test_every_float_comes_back_exactly(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0]
    with MetricWriter(tmp_path, resume_step=None) as writer:
        for step, value in enumerate(values):
            writer.write(step, {"x, quoted": value})
    assert list(map(repr, read_metrics(tmp_path)["x, quoted"])) == list(map(repr, values))


def test_a_killed_process_loses_no_row(tmp_path):
    code = (
        "import os, signal, sys, pathlib\n"
        "from tokjax.training.metrics import MetricWriter\n"
        "w = MetricWriter(pathlib.Path(sys.argv[1]), resume_step=None)\n"
        "for s in range(1, 51): w.write(s, {'loss': 1.0 / s})\n"
        "heavy = {'tensorflow', 'torch', 'matplotlib', 'rich', 'tensorboardX'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert read_metrics(tmp_path)["step"] == list(range(1, 51))


def test_a_disabled_writer_touches_nothing(tmp_path):
    writer = MetricWriter(tmp_path / "other", resume_step=None, enabled=False)
    writer.write(1, {"loss": 1.0})
    writer.flush()
    writer.close()
    assert not (tmp_path / "other").exists()


def test_an_unwritable_workdir_is_a_storage_error_naming_it(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file/run"):
        MetricWriter(tmp_path / "file" / "run", resume_step=None)


@pytest.fixture
def limited_files():
    """Lets files grow to a given size only: the next best thing to a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("new_column", [False, True])
def test_a_full_disk_is_a_storage_error_and_the_rows_before_it_stay(
    tmp_path, limited_files, new_column
):
    run(tmp_path, range(1, 101), evals=1000)
    writer = MetricWriter(tmp_path, resume_step=100)

    def write_many():
        for step in range(101, 150):
            writer.write(step, {"loss": 1.0} | ({f"new {step}": 2.0} if new_column else {}))

    limited_files((tmp_path / "metrics.csv").stat().st_size + 50)
    with pytest.raises(StorageError, match=r"metrics\.csv"):
        write_many()
    assert read_metrics(tmp_path)["step"][:100] == list(range(1, 101))
    limited_files(resource.RLIM_INFINITY)
    writer.write(900, {"loss": 3.0})  # once there is space, no half a line is in the way
    assert read_metrics(tmp_path)["step"][-1] == 900
    writer.close()
    assert read_metrics(tmp_path)["step"][:100] == list(range(1, 101))
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]
    run(tmp_path, range(101, 121), resume_step=100, evals=1000)
    assert read_metrics(tmp_path)["step"] == list(range(1, 121))


@pytest.mark.parametrize("name", ["", "a\nb", "step", "time"])
def test_a_metric_name_that_would_break_the_file_is_refused(tmp_path, name):
    with MetricWriter(tmp_path, resume_step=None) as writer, pytest.raises(ValueError):  # noqa: PT011
        writer.write(1, {name: 1.0})
    assert read_metrics(tmp_path)["step"] == []


def test_a_row_after_closing_is_refused_not_dropped(tmp_path):
    writer = run(tmp_path, [1])
    writer.close()
    with pytest.raises(ValueError, match=r"step 2.*closed"):
        writer.write(2, {"loss": 1.0})


def test_a_file_of_another_make_is_kept_not_misread(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch;loss\n1;2\n")
    writer = run(tmp_path, [5], resume_step=4)
    assert "step column" in writer.notes[0]
    assert (tmp_path / "metrics.previous-1.csv").read_text() == "epoch;loss\n1;2\n"
    assert read_metrics(tmp_path)["step"] == [5]


def test_a_missing_or_foreign_file_reads_as_nothing(tmp_path):
    assert read_metrics(tmp_path) == {}
    (tmp_path / "metrics.csv").write_text("")
    assert read_metrics(tmp_path / "metrics.csv") == {}


def test_tensorflow_reads_the_events_and_their_checksums(tmp_path):
    import tensorflow as tf

    with MetricWriter(tmp_path, resume_step=None, clock=lambda: 1.7e9) as writer:
        writer.write(3, {"loss": 2.5, "eval/loss": math.inf})
        writer.write(1 << 40, {"loss": 1e300})
    with MetricWriter(tmp_path, resume_step=3) as writer:
        writer.write(4, {"loss": 2.0})
    first, second = sorted((tmp_path / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    events = list(tf.compat.v1.train.summary_iterator(str(first)))
    assert events[0].file_version == "brain.Event:2"
    assert (events[1].step, events[1].session_log.status) == (0, 1)
    assert (events[2].step, events[2].wall_time) == (3, 1.7e9)
    assert {v.tag: v.simple_value for v in events[2].summary.value} == {
        "loss": 2.5,
        "eval/loss": math.inf,
    }
    assert (events[3].step, events[3].summary.value[0].simple_value) == (1 << 40, math.inf)
    start = list(tf.compat.v1.train.summary_iterator(str(second)))[1]
    assert (start.step, start.session_log.status) == (4, 1)  # step 4 and later are hidden


def test_accumulated_means_weigh_every_token_alike():
    total = Accumulator()
    values = np.random.default_rng(0).normal(size=(20, 5))
    weights = np.random.default_rng(1).uniform(size=(20, 5))
    for value, weight in zip(values, weights, strict=True):
        total.add({"loss": (jnp.sum(value * weight), weight.sum()), "n": (1.0, 1)})
    means = total.means()
    assert means["loss"] == pytest.approx(np.average(values, weights=weights), rel=1e-5)
    assert means["n"] == 1.0
    assert total.totals()["n"] == (20.0, 20.0)
    total.reset()
    assert total.means() == {}


def test_a_mean_over_no_weight_is_nan_not_zero():
    total = Accumulator()
    total.add({"loss": (0.0, 0.0)})
    assert math.isnan(total.means()["loss"])


def test_adding_does_not_wait_for_the_newest_arrays():
    read = []

    class Lazy:
        def __init__(self, number):
            self.number = number

        def __float__(self):
            read.append(self.number)
            return 1.0

    total = Accumulator()
    for number in range(10):
        total.add({"loss": (Lazy(number), 1.0)})
        assert number not in read
    assert json.dumps(total.means()) == '{"loss": 1.0}'
    assert read == list(range(10))
