"""The grid of sizes and topologies: what is kept, told and drawn of compiles that are not made."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from tokjax.config import resolve
from tokjax.models.parameters import count_parameters
from tokjax.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]


def loaded(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_of_scale", ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scale(monkeypatch) -> ModuleType:
    module = loaded("benchmarks/scale.py")
    grid = (module.Point("8b", "v6e:16x16", slices=4), module.Point("135m", "v5e:4x4", rows=2))
    monkeypatch.setattr(module, "GRID", grid)
    return module


def found(point, **changes):
    return {
        "size": point.size,
        "topology": point.topology,
        "slices": point.slices,
        "chips": point.chips,
        "tokens": point.tokens,
        "cpu_seconds": 60,
        "arguments": 2 * 2**30,
        "temporary": 2**29,
        "memory": 16 * 2**30,
        "sent": {"all-gather": [3, 2**30], "all-reduce": [1, 2**29]},
        "seconds": {"computing": 0.36, "memory": 0.1, "collectives": 0.18},
        "mfu": [0.3, 0.5],
        **changes,
    }


def test_finished_points_are_kept_and_failures_tried_again_when_asked(
    scale, monkeypatch, tmp_path, capsys
):
    compiled = []

    def compile_point(point, workdir):
        compiled.append(point.name)
        each = found(point)
        if point.size == "8b" and compiled.count(point.name) == 1:
            each = {**each, "reason": "exit code 7: it does not fit"}
        (workdir / f"{point.name}.json").write_text(json.dumps(each))
        return each

    monkeypatch.setattr(scale, "compile_point", compile_point)
    arguments = [f"--workdir={tmp_path}"]
    assert scale.main(arguments) == 1
    assert scale.main(arguments) == 1
    assert compiled == ["8b-v6e-16x16-x4", "135m-v5e-4x4-x1-rows2"]
    assert "exit code 7: it does not fit" in (tmp_path / "scale.md").read_text()
    assert scale.main([*arguments, "--retry"]) == 0
    assert len(compiled) == 3
    lines = (tmp_path / "scale.md").read_text().splitlines()
    assert len(lines) == 4
    # 0.36 to 0.64 s a step of 16 chips for 2 rows of 2,048 tokens on each
    assert lines[2].startswith("| 135m | 16 | v5e:4x4 | 0.07M | 2.5 of 16.0 | 1.50 | 360, 100, 180")
    assert lines[2].endswith("| 30 to 50 % | 24.4 to 43.4 |")
    assert lines[3].startswith("| 8b | 1,024 | 4 x v6e:16x16 | 8.39M |")
    assert (tmp_path / "scale.png").stat().st_size > 10_000
    assert scale.main([*arguments, "--only=8b,v5e"]) == 1
    assert "nothing was compiled" in capsys.readouterr().out


def test_no_point_is_begun_behind_the_time_that_was_given(scale, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scale, "compile_point", lambda point, workdir: found(point))
    clock = iter([0.0, 59.0, 61.0])
    monkeypatch.setattr(scale, "monotonic", lambda: next(clock))
    assert scale.main([f"--workdir={tmp_path}", "--minutes=1"]) == 0
    assert "135m-v5e-4x4-x1-rows2: left for another time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (7, "does not fit"),
        (2, "its configuration is wrong"),
    ],
)
def test_a_point_runs_in_its_own_process_and_its_reason_is_kept(
    scale, monkeypatch, tmp_path, code, message
):
    def run(command, stdout, **_):
        assert command[3].endswith("scale.py:size=8b,chips=1024,slices=4")
        assert command[4:6] == ["--topology=v6e:16x16", "--slices=4"]
        stdout.write(f"warm\nerror: {message}\n\n")
        return type("Ended", (), {"returncode": code})

    monkeypatch.setattr(scale.subprocess, "run", run)
    each = scale.compile_point(scale.GRID[0], tmp_path)
    assert each["reason"] == f"exit code {code}: error: {message}"
    assert json.loads((tmp_path / "8b-v6e-16x16-x4.json").read_text()) == each


@pytest.mark.parametrize(
    ("size", "parameters", "chips"), [("135m", 135e6, 16), ("1b", 1.24e9, 64), ("70b", 70.6e9, 512)]
)
def test_a_size_fits_its_mesh(size, parameters, chips):
    tree = loaded("configs/scale.py").get_config(size, chips, slices=2)
    config = resolve(TrainConfig, tree.to_dict())
    assert sum(count_parameters(config.model).values()) == pytest.approx(parameters, rel=0.01)
    mesh = config.mesh.sizes(chips)
    assert mesh["data"] % 2 == 0
    assert config.model.d_model % mesh["fsdp"] == 0
    assert config.data.batch_size % (mesh["data"] * mesh["fsdp"]) == 0
