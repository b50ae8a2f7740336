"""Several real processes make one run: same data, same numbers, one stop for all."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np

from tokjax.training.metrics import read_metrics

COMMAND = [sys.executable, "-m", "tokjax.train"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(config, workdir, log, processes):
    port, started = free_port(), []
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
