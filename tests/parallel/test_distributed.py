"""How a process finds the others of its run."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import jax
import pytest

from tokjax.errors import ConfigError
from tokjax.parallel import distributed
from tokjax.parallel.distributed import Launch, detect

COORDINATOR, COUNT, INDEX = (
    "TOKJAX_COORDINATOR",
    "TOKJAX_PROCESS_COUNT",
    "TOKJAX_PROCESS_INDEX",
)
EXPLICIT = {COORDINATOR: "node1:1234", COUNT: "2", INDEX: "1"}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
}
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "job-1",
}


def test_a_process_without_any_cluster_is_alone():
    assert detect({}) == Launch("none")
    assert detect({COORDINATOR: "", "SLURM_JOB_ID": "7"}) == Launch("none")  # empty is not set


def test_explicit_settings_come_first():
    found = detect(SLURM | EXPLICIT | {"TOKJAX_HEARTBEAT_S": "7", "TOKJAX_START_S": "9"})
    assert found == Launch("explicit", 2, 1, "node1:1234", heartbeat_s=7, start_s=9)
    assert found.name == "explicit, process 1 of 2"


def test_a_step_of_slurm_says_its_place_and_jax_asks_it_for_the_coordinator():
    assert detect(SLURM) == Launch("slurm", 4, 3, None, hosts=2)
    assert detect(SLURM | {COORDINATOR: "node9:5"}).coordinator == "node9:5"


def test_a_batch_script_of_slurm_outside_a_step_is_alone():
    environment = {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}
    assert detect(environment) == Launch("none")
    with pytest.raises(ConfigError, match="SLURM_STEP_NODELIST not set: start it by srun"):
        detect(environment | {"TOKJAX_CLUSTER": "slurm"})


@pytest.mark.parametrize(
    "one",
    [SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, OMPI | {"OMPI_COMM_WORLD_SIZE": "1"}],
)
def test_a_single_task_is_alone(one):
    assert detect(one) == Launch("none")


def test_ranks_of_open_mpi_on_one_host_agree_on_a_local_port():
    found = detect(OMPI)
    assert (found.cluster, found.count, found.index, found.hosts) == ("ompi", 4, 2, 1)
    other = detect(OMPI | {"OMPI_COMM_WORLD_RANK": "0"})
    assert found.coordinator == other.coordinator
    assert found.coordinator is not None and found.coordinator.startswith("localhost:2")
    assert detect(OMPI | {"PMIX_NAMESPACE": "job-2"}).coordinator != found.coordinator


def test_ranks_of_open_mpi_on_several_hosts_need_a_coordinator_or_a_head_node():
    several = OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(ConfigError, match=f"set {COORDINATOR}=host:port"):
        detect(several)
    assert detect(several | {COORDINATOR: "node1:1"}).coordinator == "node1:1"
    assert detect(several | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3"}).coordinator is None


def test_a_pod_of_tpus_is_known_by_its_workers_or_its_slices_or_when_said():
    pod = Launch("tpu", None, None)
    assert detect({"TPU_WORKER_HOSTNAMES": "a,b"}) == pod
    assert detect({"MEGASCALE_NUM_SLICES": "2"}) == pod
    assert detect({"TOKJAX_CLUSTER": "tpu"}) == pod
    assert detect({"TPU_WORKER_HOSTNAMES": "localhost"}) == Launch("none")
    assert detect({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}) == Launch("none")


def test_one_process_alone_when_said():
    assert detect(SLURM | {"TOKJAX_CLUSTER": "none"}) == Launch("none")


def test_an_unknown_cluster_is_refused():
    with pytest.raises(ConfigError, match=r"unknown TOKJAX_CLUSTER='slrum'.*'slurm'"):
        detect({"TOKJAX_CLUSTER": "slrum"})


def test_some_variables_without_the_others_are_refused():
    with pytest.raises(ConfigError, match=f"{COORDINATOR}, {INDEX} set, but not {COUNT}"):
        detect({COORDINATOR: "host:1234", INDEX: "0"})
    with pytest.raises(ConfigError, match=f"not set: {COORDINATOR}, {COUNT}, {INDEX}"):
        detect({"TOKJAX_CLUSTER": "explicit"})


@pytest.mark.parametrize(
    ("count", "index", "message"),
    [
        ("two", "0", f"{COUNT}='two' must be a whole number"),
        ("2", "2", "process index 2 is not below the count 2"),
        ("2", "-1", "process index -1"),
        ("0", "0", "process index 0 is not below the count 0"),
    ],
)
def test_impossible_numbers_are_refused(count, index, message):
    with pytest.raises(ConfigError, match=message):
        detect({COORDINATOR: "host:1234", COUNT: count, INDEX: index})


@pytest.mark.parametrize("value", ["0", "-1", "soon"])
def test_impossible_limits_are_refused(value):
    with pytest.raises(ConfigError, match="TOKJAX_HEARTBEAT_S"):
        detect(EXPLICIT | {"TOKJAX_HEARTBEAT_S": value})


@pytest.mark.parametrize("address", ["localhost", ":1234", "localhost:", "localhost:http"])
def test_a_coordinator_that_is_no_address_is_refused(address):
    with pytest.raises(ConfigError, match="is not host:port"):
        detect(EXPLICIT | {COORDINATOR: address})


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.1:1", "127.3.2.1:1", "[::1]:1"])
def test_a_loopback_coordinator_of_several_hosts_is_refused(address):
    message = "loopback address, which every one of the 2 hosts"
    with pytest.raises(ConfigError, match=message):
        detect(EXPLICIT | {COORDINATOR: address, "TOKJAX_HOSTS": "2"})
    with pytest.raises(ConfigError, match=message):
        detect(SLURM | {COORDINATOR: address})
    assert detect(EXPLICIT | {COORDINATOR: address, "TOKJAX_HOSTS": "1"}).coordinator == address


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_a_coordinator_that_does_not_answer_is_named_with_the_remedy(monkeypatch):
    for name, value in {COORDINATOR: f"localhost:{free_port()}", COUNT: "2", INDEX: "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TOKJAX_START_S", "1")
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: pytest.fail("joined"))
    with pytest.raises(ConfigError, match=r"nothing answers at localhost:.* start process 0 there"):
        distributed.initialise()


_PROGRAM = """
import sys, time
import jax
from tokjax import cli
from tokjax.parallel import distributed

def main(argv):
    print(distributed.initialise().name)
    import jax.numpy as jnp
    from jax.experimental import multihost_utils
    from tokjax.parallel.mesh import MeshConfig, build_mesh
    mesh = build_mesh(MeshConfig(slices=2) if "slices" in argv else MeshConfig())
    with distributed.explaining_losses():
        seen = multihost_utils.process_allgather(jnp.array(jax.process_index() + 1))
        rows = [d.process_index for d in mesh.devices.flat]
        print("seen", jax.process_count(), mesh.shape["data"], int(seen.sum()), rows, flush=True)
        while "forever" in argv:
            multihost_utils.process_allgather(jnp.array(1))
            time.sleep(0.05)
    return 0

cli.run(main)
"""


@contextmanager
def started(count: int, *argv: str, **environment: str) -> Iterator[list[subprocess.Popen]]:
    """Yields so many processes of the program above, killed at the end."""
    port = free_port()
    with ExitStack() as stack:
        yield [
            stack.enter_context(_process(port, count, index, argv, environment))
            for index in range(count)
        ]


@contextmanager
def _process(port, count, index, argv, environment):
    place = {COORDINATOR: f"localhost:{port}", COUNT: str(count), INDEX: str(index)}
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *argv],
        env={**os.environ, "JAX_PLATFORMS": "cpu"} | place | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_two_processes_become_one_run_and_each_is_a_group_of_its_own():
    two_devices = "--xla_force_host_platform_device_count=2"
    with started(2, "slices", XLA_FLAGS=two_devices) as processes:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    for index, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, output
        assert f"explicit, process {index} of 2" in output
        assert "seen 2 4 3 [0, 0, 1, 1]" in output


@pytest.mark.parametrize("lost", [0, 2])
def test_the_loss_of_a_process_ends_the_others_in_time_and_is_named(lost):
    with started(3, "forever", TOKJAX_HEARTBEAT_S="10") as processes:
        for process in processes:
            assert process.stdout is not None
            while "seen" not in (line := process.stdout.readline()):
                assert line, "ended before it began"
        began = time.monotonic()
        processes[lost].kill()
        others = [p for i, p in enumerate(processes) if i != lost]
        outputs = [process.communicate(timeout=60)[0] for process in others]
        took = time.monotonic() - began
    assert took < 30
    for process, output in zip(others, outputs, strict=True):
        assert process.returncode != 0
        named = "unhealthy (stopped sending heartbeats):\n2" if lost else "leader task"
        assert named in output or f"process {lost}" in output, output
