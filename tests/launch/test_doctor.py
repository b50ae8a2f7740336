"""The doctor finds what keeps a run from starting, and says what to do."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def doctor():
    spec = importlib.util.spec_from_file_location("doctor", ROOT / "launch" / "doctor.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["doctor"] = module
    spec.loader.exec_module(module)
    return module


def test_on_this_machine_training_can_start(tmp_path):
    command = [sys.executable, ROOT / "launch" / "doctor.py", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        [*command, "--free_gib=0.001"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training can start" in done.stdout
    assert not (tmp_path / "run").exists(), "nothing is left behind"


def test_too_little_disk_is_told_with_the_remedy(doctor, tmp_path):
    found = doctor.disk(tmp_path / "not" / "there", 1e9)
    assert (found.verdict, found.check) == ("failed", "disk")
    assert "choose another --workdir" in found.advice


def test_a_bucket_without_a_mount_is_told(doctor):
    found = doctor.writing(Path("gs://bucket/run"))
    assert found.verdict == "failed"
    assert "gcsfuse" in found.advice


def test_a_workdir_that_is_a_file_is_told(doctor, tmp_path):
    (tmp_path / "file").write_text("")
    found = doctor.writing(tmp_path / "file" / "run")
    assert found.verdict == "failed"
    assert "may write" in found.advice


def test_a_wrong_launch_is_told(doctor, monkeypatch):
    monkeypatch.setenv("TOKJAX_COORDINATOR", "host:1")
    found = doctor.cluster()
    assert found.verdict == "failed"
    assert "set all or none" in found.advice


def test_all_devices_take_part_in_the_sum(doctor):
    found = doctor.collective()
    assert found.verdict == "ok"
    assert found.found.startswith("8 in ")


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(doctor):
    def broken():
        raise ValueError("boom")

    found = doctor.examine([broken, doctor.versions])
    assert [each.verdict for each in found] == ["failed", "ok"]
    assert "boom" in found[0].found
