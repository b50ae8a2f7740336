"""Progress on a terminal and in a log, its rates, the banner, and the peaks of devices."""

import io
import os
import pty
import select
import subprocess
import sys

import pytest

from tokjax.training.progress import (
    MFU_FORMULA,
    Progress,
    banner,
    device_peak_flops,
    measure_matmul_peak,
    si,
)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def make(total=100, **options):
    clock, stream = Clock(), io.StringIO()
    settings = {"tokens_per_step": 1000, "flops_per_step": 2e9, "peak_flops": 1e11}
    return Progress(total, stream=stream, clock=clock, **(settings | options)), clock, stream


def test_rates_leave_out_the_compilation_and_the_pauses():
    progress, clock, _ = make()
    with progress:
        clock.now = 60.0  # compiling
        progress.update(1)
        assert progress.rates() == {}
        for step in range(2, 20):
            clock.now += 0.5
            if step % 5 == 0:
                with progress.pause():
                    clock.now += 30.0
                    with progress.pause():
                        clock.now += 5.0
            progress.update(step)
    rates = progress.rates()
    assert rates["tokens_per_second"] == pytest.approx(2000)
    assert rates["steps_per_second"] == pytest.approx(2)
    assert rates["mfu"] == pytest.approx(2 * 2e9 / 1e11)


def test_time_left_expects_pauses_to_go_on():
    progress, clock, _ = make(total=100)
    progress.update(0)
    for step in range(1, 51):
        clock.now += 1.0
        if step % 10 == 0:
            with progress.pause():
                clock.now += 10.0
        progress.update(step)
    assert progress.seconds_left() == pytest.approx(50 * (1 + 1))


def test_rates_follow_a_change_of_speed_and_steps_may_be_skipped():
    progress, clock, _ = make(total=10_000)
    progress.update(0)
    for step in range(10, 1000, 10):
        clock.now += 1.0
        progress.update(step)
    assert progress.rates()["steps_per_second"] == pytest.approx(10)
    for step in range(1000, 5000, 20):
        clock.now += 1.0
        progress.update(step)
    assert progress.rates()["steps_per_second"] == pytest.approx(20, rel=0.01)


def test_a_new_stage_changes_the_cost_of_a_step():
    progress, clock, _ = make()
    for step in range(5):
        progress.update(step)
        clock.now += 1.0
    progress.stage(tokens_per_step=500, flops_per_step=1e9)
    assert progress.rates() == {}
    clock.now += 50.0  # compiling the next stage
    for step in range(5, 9):
        progress.update(step)
        clock.now += 1.0
    assert progress.rates()["tokens_per_second"] == pytest.approx(500)
    assert progress.rates()["mfu"] == pytest.approx(1e9 / 1e11)


def test_a_log_gets_the_first_steps_then_lines_at_intervals_and_the_last_step():
    progress, clock, stream = make(total=50, start_step=10)
    with progress:
        for step in range(11, 51):
            clock.now += 1.0
            progress.update(step, loss=1 / step, grad_norm=0.5)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [
        "11/50", "12/50", "13/50", "23/50", "33/50", "43/50", "50/50",
    ]  # fmt: skip
    assert lines[3] == (
        "step 23/50 (46.0 %)  loss 0.0435  grad_norm 0.5000  tokens/s 1.00k  MFU 2.0 %  left 27 s"
    )
    assert "left" not in lines[-1]


def test_what_is_unknown_is_not_shown():
    progress, clock, stream = make(tokens_per_step=0, flops_per_step=None, peak_flops=None)
    for step in range(1, 4):
        clock.now += 1.0
        progress.update(step, loss=float("nan"))
    assert "tokens/s" not in stream.getvalue()
    assert "MFU" not in stream.getvalue()
    assert "loss nan" in stream.getvalue()


def test_steps_faster_than_the_clock_do_not_divide_by_zero():
    progress, _, stream = make()
    for step in range(1, 4):
        progress.update(step)
    assert progress.rates() == {}
    assert len(stream.getvalue().splitlines()) == 3


def test_training_outlives_the_reader_of_its_log():
    progress, _, stream = make()
    stream.close()
    progress.update(1)
    progress.message("nobody reads this")
    read, write = os.pipe()
    os.close(read)
    pipe = Progress(5, stream=os.fdopen(write, "w", buffering=1))
    stream = pipe._stream
    pipe.update(1)
    assert pipe._stream is None
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_disabled_progress_prints_nothing_but_knows_its_rates():
    progress, clock, stream = make(enabled=False)
    with progress:
        for step in range(5):
            progress.update(step, loss=1.0)
            clock.now += 1.0
        progress.message("hello")
    assert stream.getvalue() == ""
    assert progress.rates()["steps_per_second"] == pytest.approx(1)


TERMINAL = """
import sys, time
from tokjax.training.progress import Progress, banner
banner({"model": {"parameters": "29.1M"}, "data": {"cut": "x" * 200}})
with Progress(30, tokens_per_step=1000, flops_per_step=1e9, peak_flops=1e12) as progress:
    for step in range(1, 31):
        progress.update(step, loss=1.5)
        if step == 10:
            progress.message("checkpoint saved [10]")
        time.sleep(0.01)
"""


def run_on_a_terminal(code, columns):
    import fcntl
    import struct
    import termios

    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=inner, stdout=inner, stderr=inner, env=environment
    )
    os.close(inner)
    seen = b""
    while select.select([outer], [], [], 30)[0]:
        try:
            chunk = os.read(outer, 65536)
        except OSError:  # the other side has closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(outer)
    assert process.wait() == 0, seen.decode()
    return seen.decode()


@pytest.mark.parametrize("columns", [60, 120])
def test_a_terminal_gets_a_bar_with_messages_above_it(columns):
    seen = run_on_a_terminal(TERMINAL, columns)
    assert "\x1b[" in seen
    assert "30/30" in seen
    assert "100 %" in seen
    assert "checkpoint saved [10]" in seen
    assert seen.count("x") >= 200  # the banner cuts nothing off
    if columns >= 120:
        assert "loss 1.5000" in seen
        assert "tokens/s" in seen
        assert "MFU" in seen


def test_the_banner_shows_every_fact_in_a_log():
    stream = io.StringIO()
    facts = {
        "model": {"parameters": "29.1M", "embedding": "4.2M"},
        "mesh": {},
        "saved": {"checkpoints": "/runs/a/checkpoints\nevery 100 steps"},
    }
    banner(facts, stream)
    assert stream.getvalue().splitlines() == [
        "model",
        "  parameters   29.1M",
        "  embedding    4.2M",
        "saved",
        "  checkpoints  /runs/a/checkpoints",
        "               every 100 steps",
        "compute",
        f"  note         {MFU_FORMULA}",
    ]
    assert "note" not in facts["model"]


@pytest.mark.parametrize(
    ("kind", "dtype", "teraflops"),
    [
        ("TPU v4", "bfloat16", 275),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5p", "float32", 459),
        ("TPU v6 lite", "bfloat16", 918),
        ("NVIDIA A100-SXM4-40GB", "float32", 156),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
        ("NVIDIA H100 PCIe", "float16", 756),
        ("NVIDIA H200", "float32", 494.5),
    ],
)
def test_known_devices_have_the_dense_peak_of_their_data_sheet(kind, dtype, teraflops):
    assert device_peak_flops(kind, dtype) == teraflops * 1e12


@pytest.mark.parametrize(("kind", "dtype"), [("cpu", "float32"), ("TPU v4", "float64")])
def test_an_unknown_peak_is_none_not_a_guess(kind, dtype):
    assert device_peak_flops(kind, dtype) is None


def test_the_measured_peak_is_that_of_a_real_machine():
    assert 1e9 < measure_matmul_peak("float32", seconds=0.02) < 1e15


def test_numbers_keep_three_digits():
    assert [si(x) for x in (0, 7, 999, 999.7, 1234, 99_960, 999_600, 2.5e15, float("nan"))] == [
        "0", "7", "999", "1.00k", "1.23k", "100k", "1.00M", "2.50P", "nan",
    ]  # fmt: skip
