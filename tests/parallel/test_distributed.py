import os
import socket
import subprocess
import sys

import jax
import pytest

from tokjax.errors import ConfigError
from tokjax.parallel import distributed

COORDINATOR, COUNT, INDEX = (
    "TOKJAX_COORDINATOR",
    "TOKJAX_PROCESS_COUNT",
    "TOKJAX_PROCESS_INDEX",
)


@pytest.fixture
def calls(monkeypatch):
    """What `jax.distributed.initialize` was called with; the environment starts empty."""
    for name in (COORDINATOR, COUNT, INDEX):
        monkeypatch.delenv(name, raising=False)
    seen = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: seen.append((a, k)))
    return seen


def test_a_process_without_the_variables_is_alone(calls, monkeypatch):
    distributed.initialise()
    monkeypatch.setenv(COORDINATOR, "")  # empty is not set
    distributed.initialise()
    assert calls == []


def test_some_variables_without_the_others_are_refused(calls, monkeypatch):
    monkeypatch.setenv(COORDINATOR, "host:1234")
    monkeypatch.setenv(INDEX, "0")
    with pytest.raises(ConfigError, match=f"{COORDINATOR}, {INDEX} set, but not {COUNT}"):
        distributed.initialise()
    assert calls == []


@pytest.mark.parametrize(
    ("count", "index", "message"),
    [
        ("two", "0", "must be numbers.*'two'"),
        ("2", "2", "process index 2 is not below the count 2"),
        ("2", "-1", "process index -1"),
        ("0", "0", "process index 0 is not below the count 0"),
    ],
)
def test_impossible_numbers_are_refused(calls, monkeypatch, count, index, message):
    for name, value in ((COORDINATOR, "host:1234"), (COUNT, count), (INDEX, index)):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        distributed.initialise()
    assert calls == []


@pytest.mark.parametrize("address", ["localhost", ":1234", "localhost:", "localhost:http"])
def test_a_coordinator_that_is_no_address_is_refused(calls, monkeypatch, address):
    for name, value in ((COORDINATOR, address), (COUNT, "2"), (INDEX, "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="is not host:port"):
        distributed.initialise()
    assert calls == []


_PROGRAM = """
import jax
from tokjax.parallel import distributed
distributed.initialise()
import jax.numpy as jnp
from jax.experimental import multihost_utils
from tokjax.parallel.mesh import MeshConfig, build_mesh
mesh = build_mesh(MeshConfig())
seen = multihost_utils.process_allgather(jnp.array(jax.process_index() + 1))
print("seen", jax.process_count(), mesh.shape["data"], int(seen.sum()))
"""


def test_two_processes_become_one_run():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                COORDINATOR: f"localhost:{port}",
                COUNT: "2",
                INDEX: str(index),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert "seen 2 2 3" in output
