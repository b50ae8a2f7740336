import json
import os
import subprocess
import sys

import pytest

from tokjax import checkpoints
from tokjax.errors import CheckpointError, ConfigError
from tokjax.training import manifest as m
from tokjax.training.checkpoint_folder import CheckpointFolder


@pytest.fixture
def workdir(tmp_path):
    """A workdir whose checkpoints 10 and 20 have metrics and one file each."""
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.open(tidy=True)
    for step, loss in ((10, 2.5), (20, float("nan"))):
        path = folder.begin(step)
        (path / "data").write_bytes(bytes(1500))
        files = m.hash_files(path, ["data"])
        leaves = {"w": "float32[3]"}
        folder.commit(
            m.Manifest(step, step // 10, m.now(), files, leaves, {}, {"loss": loss}), set()
        )
    folder.close()
    return tmp_path


def flip(workdir, step):
    path = workdir / "checkpoints" / f"step-{step:08d}" / "data"
    path.write_bytes(bytes(700) + b"\x01" + bytes(799))


def test_rows_say_what_each_checkpoint_holds(workdir):
    first, second = checkpoints.describe(workdir, verify=True)
    assert (first["step"], first["latest"], second["step"], second["latest"]) == (
        *(10, False),
        *(20, True),
    )
    assert first["committed"]
    assert first["good"]
    assert (first["bytes"], first["files"], first["leaves"]) == (1500, 1, 1)
    assert first["metrics"] == {"loss": 2.5}
    assert checkpoints.describe(workdir / "checkpoints", verify=True)[0] == first
    assert checkpoints.describe(workdir / "nowhere") == []


def test_flipped_byte_needs_verify_other_damage_does_not(workdir):
    flip(workdir, 20)
    assert checkpoints.describe(workdir)[1]["good"]
    row = checkpoints.describe(workdir, verify=True)[1]
    assert row["reasons"] == ["data does not have the bytes that were saved (its checksum differs)"]
    os.truncate(workdir / "checkpoints" / "step-00000020" / "data", 3)
    assert checkpoints.describe(workdir)[1]["reasons"] == [
        "data has 3 bytes, the manifest says 1500"
    ]
    (workdir / "checkpoints" / "step-00000020" / "manifest.json").unlink()
    row = checkpoints.describe(workdir)[1]
    assert (row["committed"], row["good"], row["latest"]) == (False, False, True)


def test_exit_code_follows_the_latest(workdir, capsys):
    assert checkpoints.main([str(workdir), "--verify"]) == 0
    flip(workdir, 10)
    assert checkpoints.main([str(workdir), "--verify"]) == 0
    assert "step 10: data does not have the bytes that were saved" in capsys.readouterr().out
    flip(workdir, 20)
    assert checkpoints.main([str(workdir)]) == 0
    assert checkpoints.main([str(workdir), "--verify"]) == 4


def test_json_is_json_and_has_the_rows(workdir, capsys):
    checkpoints.main([str(workdir), "--json"])

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    rows = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert [row["step"] for row in rows] == [10, 20]
    assert rows[1]["metrics"] == {"loss": "nan"}


def test_damaged_pointer_and_nothing_there_are_errors(workdir, tmp_path):
    (workdir / "checkpoints" / "pointer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"pointer\.json is no whole JSON"):
        checkpoints.main([str(workdir)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoints in"):
        checkpoints.main([str(tmp_path / "empty")])
    with pytest.raises(CheckpointError, match="there is no directory"):
        checkpoints.main([str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match="name the workdir"):
        checkpoints.main([])


def test_the_table_shows_metrics_whole_in_80_columns(workdir, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    folder = CheckpointFolder(workdir / "checkpoints")
    folder.open(tidy=True)
    path = folder.begin(30)
    (path / "data").write_bytes(b"x")
    metrics = {"eval/validation/loss": 3.302, "eval/held_out/loss": 4.817}
    files = m.hash_files(path, ["data"])
    folder.commit(m.Manifest(30, 3, m.now(), files, {"w": "float32[3]"}, {}, metrics), set())
    folder.close()
    assert checkpoints.main([str(workdir)]) == 0
    out = capsys.readouterr().out
    assert "validation/loss 3.302" in out
    assert "held_out/loss 4.817" in out


def test_command_line_needs_neither_jax_nor_orbax(workdir):
    program = (
        "import sys, tokjax.checkpoints as c; code = c.main(sys.argv[1:]);"
        "heavy = {'jax', 'orbax', 'tensorflow'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else code)"
    )
    command = [sys.executable, "-c", program, str(workdir)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "20 (latest)" in done.stdout
