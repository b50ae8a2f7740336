"""A sweep runs what is not finished, goes on behind failures, and compares the points."""

import csv
import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tokjax.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "launch" / "sweep.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep"] = module
    spec.loader.exec_module(module)
    return module


def finish(workdir: Path, **metrics: float) -> None:
    workdir.mkdir(parents=True)
    (workdir / "run.json").write_text(json.dumps({"state": "finished", "final": metrics}))


def table(workdir: Path) -> list[list[str]]:
    return list(csv.reader((workdir / "sweep.csv").read_text().splitlines()))


def test_a_grid_has_every_combination(sweep):
    found = sweep.grid_points({"optimizer.peak_lr": (1e-3, 3e-4), "seed": (0, 1), "name": "a,2"})
    assert len(found) == 8
    assert found[0] == {"optimizer.peak_lr": 1e-3, "seed": 0, "name": "a"}
    assert found[-1] == {"optimizer.peak_lr": 3e-4, "seed": 1, "name": 2}


def test_folders_are_named_by_what_a_point_changes(sweep):
    points = sweep.lay_out([{"optimizer.peak_lr": 0.1, "seed": 0}], Path("w"))
    assert points[0].workdir == Path("w/peak_lr=0.1,seed=0")
    both = sweep.lay_out([{"a.rate": 1, "b.rate": 2}], Path("w"))
    assert both[0].workdir == Path("w/a.rate=1,b.rate=2")
    odd = sweep.lay_out([{"files": ("x/y",)}, {"files": ("x_y",)}], Path("w"))
    assert len({point.workdir for point in odd}) == 2


def test_points_that_cannot_be_told_apart_are_refused(sweep):
    with pytest.raises(ConfigError, match="the point seed=0 is there twice"):
        sweep.lay_out([{"seed": 0}, {"seed": 0}], Path("w"))
    with pytest.raises(ConfigError, match="there is no point"):
        sweep.lay_out([], Path("w"))


def test_points_come_from_a_file(sweep, tmp_path):
    file = tmp_path / "points.py"
    file.write_text("def points():\n    return [{'seed': i} for i in range(3)]\n")
    assert sweep.file_points(file) == [{"seed": 0}, {"seed": 1}, {"seed": 2}]
    file.write_text("def points():\n    return 3\n")
    with pytest.raises(ConfigError, match="must return a list of dictionaries"):
        sweep.file_points(file)
    with pytest.raises(ConfigError, match="no such file"):
        sweep.file_points(tmp_path / "other.py")


def test_results_are_a_table_best_first_and_a_plot(sweep, tmp_path):
    points = sweep.lay_out(sweep.grid_points({"rate": (0.1, 0.01, 1.0)}), tmp_path)
    finish(points[0].workdir, **{"eval/x/loss": 2.0})
    finish(points[1].workdir, **{"eval/x/loss": 1.0})
    rows = sweep.write_results(points, sweep.chosen_metric(points, None), "min", tmp_path)
    assert rows == [
        ["rate", "state", "eval/x/loss"],
        ["0.01", "finished", "1"],
        ["0.1", "finished", "2"],
        ["1.0", "not begun", ""],
    ]
    assert table(tmp_path) == rows
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    rows = sweep.write_results(points, "eval/x/loss", "max", tmp_path)
    assert [row[0] for row in rows[1:]] == ["0.1", "0.01", "1.0"]
    with pytest.raises(ConfigError, match="no point has the metric 'other'"):
        sweep.chosen_metric(points, "other")


def test_a_failed_point_does_not_keep_the_others(sweep, tmp_path):
    points = sweep.lay_out(sweep.grid_points({"code": (0, 3), "seed": (1, 2)}), tmp_path)

    def command(point):
        return [sys.executable, "-c", f"print('ran'); raise SystemExit({point.overrides['code']})"]

    codes = sweep.run_points(points, command, 2)
    assert list(codes.values()) == [0, 0, 3, 3]
    assert all((point.workdir / "log.txt").read_text() == "ran\n" for point in points)


def call(*argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "launch" / "sweep.py", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_emitted_commands_leave_out_what_is_finished(tmp_path):
    finish(tmp_path / "seed=0")
    shared = ("--config=configs/quickstart.py", f"--workdir={tmp_path}", "--config.steps=2")
    done = call(*shared, "--grid.seed=0,1", "--emit")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert shlex.split(line)[1:] == [
        *("-u", "-m", "tokjax.train", "--config=configs/quickstart.py"),
        *(f"--workdir={tmp_path}/seed=1", "--config.steps=2", "--config.seed=1"),
    ]


def test_a_misspelt_key_is_told_before_anything_runs(tmp_path):
    done = call(
        "--config=configs/quickstart.py", f"--workdir={tmp_path / 'w'}", "--grid.optimizer.peek=1,2"
    )
    assert done.returncode == 2
    assert "optimizer.peek" in done.stderr
    assert not (tmp_path / "w").exists()


def test_a_sweep_of_two_tiny_runs_ends_in_a_table(tiny_tree, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict({tiny_tree(steps=4)!r})\n"
    )
    argv = (f"--config={config}", f"--workdir={tmp_path / 'w'}", "--grid.seed=0,1")
    done = call(*argv)
    assert done.returncode == 0, done.stdout + done.stderr
    header, *rows = table(tmp_path / "w")
    assert header[:2] == ["seed", "state"]
    assert sorted(row[:2] for row in rows) == [["0", "finished"], ["1", "finished"]]
    assert (tmp_path / "w" / "sweep.png").exists()
    again = call(*argv)
    assert again.returncode == 0
    assert "2 of 2 points are finished already" in again.stdout
