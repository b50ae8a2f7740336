"""Several real processes make one run: same data, same numbers, one stop for all."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tokjax.training.metrics import read_metrics

MESHES = {
    "data": (2, {"data": 2}),
    "fsdp": (2, {"data": 1, "fsdp": 2}),
    "tensor": (2, {"data": 1, "tensor": 2}),
    "sequence": (2, {"data": 1, "sequence": 2}),
    "fsdp and tensor": (4, {"data": 1, "fsdp": 2, "tensor": 2}),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(config, workdir, log, processes, mesh=None, heartbeat_s=100):
    """Returns the started processes of one run; what each says goes to `log.<index>`."""
    port, started = free_port(), []
    axes = [f"--config.mesh.{name}={size}" for name, size in (mesh or {}).items()]
    for index in range(processes):
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
            "JAX_PLATFORMS": "cpu",
        }
        if processes > 1:
            environment |= {
                "TOKJAX_COORDINATOR": f"127.0.0.1:{port}",
                "TOKJAX_PROCESS_COUNT": str(processes),
                "TOKJAX_PROCESS_INDEX": str(index),
                "TOKJAX_HEARTBEAT_S": str(heartbeat_s),
            }
        with open(f"{log}.{index}", "w") as output:
            started.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "tokjax.train",
                        f"--config={config}",
                        f"--workdir={workdir}",
                        *axes,
                    ],
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    return started


def test_sigterm_to_one_process_stops_both_and_one_process_goes_on(tiny_tree, tmp_path):
    config = tmp_path / "config.py"
    tree = tiny_tree(
        steps=600,
        checkpoints={"every_steps": 600},
        evaluation={"every_steps": 600},
        optimizer__peak_lr=1e-3,
    )
    config.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict({tree!r})\n"
    )
    workdir = tmp_path / "two"
    both = start(config, workdir, tmp_path / "log", 2)
    deadline = time.monotonic() + 120
    while not (workdir / "metrics.csv").exists() or "loss" not in read_metrics(workdir):
        said = [(tmp_path / f"log.{i}").read_text() for i in range(2)]
        assert all(p.poll() is None for p in both), said
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    codes = [p.wait(timeout=120) for p in both]
    said = [(tmp_path / f"log.{i}").read_text() for i in range(2)]
    assert codes == [75, 75], said
    (saved,) = (workdir / "checkpoints").glob("step-*")
    stopped = int(saved.name.removeprefix("step-"))
    assert 0 < stopped < 600
    assert f"stopped at step {stopped}" in said[0]

    alone = start(config, tmp_path / "one", tmp_path / "alone", 1)[0]
    rest = start(config, workdir, tmp_path / "rest", 1)[0]
    assert (alone.wait(timeout=120), rest.wait(timeout=120)) == (0, 0)
    one, two = (read_metrics(d) for d in (tmp_path / "one", workdir))
    assert one["step"] == two["step"]
    assert one["target_weight"] == two["target_weight"], "the same examples in the same order"
    losses = [np.asarray([v for v in t["loss"] if v is not None]) for t in (one, two)]
    np.testing.assert_allclose(losses[0][:20], losses[1][:20], rtol=1e-5)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-2)


def write_config(tree, folder):
    path = folder / "config.py"
    path.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict({tree!r})\n"
    )
    return path


def losses(workdir):
    return np.asarray([v for v in read_metrics(workdir)["loss"] if v is not None])


def finish(processes, log):
    codes = [process.wait(timeout=240) for process in processes]
    assert codes == [0] * len(codes), [
        log.with_name(f"{log.name}.{i}").read_text() for i in range(len(codes))
    ]


def wait_for_step(workdir, step, processes):
    deadline = time.monotonic() + 240
    while max(read_metrics(workdir).get("step", [0]) or [0]) < step:
        assert all(process.poll() is None for process in processes), "ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def long_config(tiny_tree, tmp_path):
    """A run of 200 steps with a checkpoint every 5."""
    tree = tiny_tree(
        steps=200,
        checkpoints={"every_steps": 5},
        evaluation={"every_steps": 200},
        optimizer__peak_lr=1e-3,
        log_every=1,
    )
    return write_config(tree, tmp_path)


@pytest.fixture(scope="session")
def alone():
    """Losses of one process, by the text of the configuration: computed once."""
    return {}


@pytest.mark.parametrize("mesh", MESHES)
def test_any_mesh_of_real_processes_trains_as_one_process_does(tiny_tree, alone, mesh, tmp_path):
    processes, sizes = MESHES[mesh]
    tree = tiny_tree(steps=20, evaluation={"every_steps": 20}, optimizer__peak_lr=1e-3)
    config = write_config(tree, tmp_path)
    if "losses" not in alone:
        finish(start(config, tmp_path / "one", tmp_path / "alone", 1), tmp_path / "alone")
        alone["losses"] = losses(tmp_path / "one")
    several = start(config, tmp_path / "several", tmp_path / "log", processes, sizes)
    finish(several, tmp_path / "log")
    found = losses(tmp_path / "several")
    assert found.shape == (20,)
    np.testing.assert_allclose(found, alone["losses"], rtol=1e-5)


@pytest.mark.parametrize(("before", "behind"), [(4, 1), (1, 4)])
def test_what_so_many_processes_saved_before_a_kill_others_continue(
    long_config, before, behind, tmp_path
):
    split = {4: {"data": 1, "fsdp": 2, "tensor": 2}, 1: {}}
    workdir = tmp_path / "run"
    # As short as a busy machine allows: the others wait this long for the one that is gone.
    first = start(long_config, workdir, tmp_path / "first", before, split[before], heartbeat_s=20)
    wait_for_step(workdir, 12, first)
    first[-1].kill()
    codes = [process.wait(timeout=60) for process in first]
    assert all(code != 0 for code in codes)
    if before > 1:
        told = [(tmp_path / f"first.{i}").read_text() for i in range(before - 1)]
        assert all("heartbeats):\n3" in text or "process" in text for text in told)
    rest = start(long_config, workdir, tmp_path / "rest", behind, split[behind])
    finish(rest, tmp_path / "rest")
    assert "continuing from step" in (tmp_path / "rest.0").read_text()
    finish(start(long_config, tmp_path / "one", tmp_path / "alone", 1), tmp_path / "alone")
    found, expected = losses(workdir), losses(tmp_path / "one")
    assert found.shape == expected.shape == (200,)
    np.testing.assert_allclose(found[:20], expected[:20], rtol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
