"""Starting `jax.distributed` where several processes make up one run.

Who the processes are is found in the environment, the first of these that speaks:

- `TOKJAX_COORDINATOR` (host:port of process 0), `TOKJAX_PROCESS_COUNT`, `TOKJAX_PROCESS_INDEX`;
- a step of SLURM (`srun`) of several tasks;
- Open MPI (`mpirun`) with several ranks;
- a TPU pod: several `TPU_WORKER_HOSTNAMES` (GKE), or `TOKJAX_CLUSTER=tpu`, which the pod's launch
  script sets, because a TPU host by itself does not tell whether it is one of many.

`TOKJAX_CLUSTER` is `auto` (default), `explicit`, `slurm`, `ompi`, `tpu` or `none`, which runs one
process alone whatever else is set. `TOKJAX_HEARTBEAT_S` (default 100) is the time after which a
silent process counts as lost and ends all others, `TOKJAX_START_S` (default 300) the time in which
all must have come.
"""

import ipaddress
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import jax

from tokjax.errors import ConfigError, LostProcessError, TokjaxError, nearest

Cluster = Literal["explicit", "slurm", "ompi", "tpu", "none"]
_COORDINATOR, _COUNT, _INDEX = (
    "TOKJAX_COORDINATOR",
    "TOKJAX_PROCESS_COUNT",
    "TOKJAX_PROCESS_INDEX",
)
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_OMPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        cluster: who started it.
        count: processes of the run; None where JAX asks the cluster.
        index: of this one; None where JAX asks the cluster.
        coordinator: host:port of process 0; None where JAX derives it from the cluster.
        hosts: machines of the run; None where unknown.
        heartbeat_s: silence after which a process counts as lost.
        start_s: time in which all must have come.
    """

    cluster: Cluster
    count: int | None = 1
    index: int | None = 0
    coordinator: str | None = None
    hosts: int | None = None
    heartbeat_s: int = 100
    start_s: int = 300

    @property
    def name(self) -> str:
        """The cluster and this process's place in it, for people."""
        if self.count is None:
            return self.cluster
        return f"{self.cluster}, process {self.index} of {self.count}"


_launch = Launch("none")  # of this process, once it has joined others


def detect(environment: Mapping[str, str]) -> Launch:
    """Returns how a process with this environment was started.

    Raises:
        ConfigError: variables that contradict each other, are missing or cannot be meant.
    """
    wanted = environment.get("TOKJAX_CLUSTER") or "auto"
    if wanted not in ("auto", *get_args(Cluster)):
        raise ConfigError(
            f"unknown TOKJAX_CLUSTER={wanted!r}.{nearest(wanted, ('auto', *get_args(Cluster)))}"
        )
    limits = {
        "heartbeat_s": _seconds(environment, "TOKJAX_HEARTBEAT_S", 100),
        "start_s": _seconds(environment, "TOKJAX_START_S", 300),
    }
    if wanted == "none":
        return Launch("none")
    finders = {"explicit": _explicit, "slurm": _slurm, "ompi": _ompi, "tpu": _tpu}
    for cluster, find in finders.items():
        if wanted in ("auto", cluster):
            found = find(environment, wanted == cluster)
            if found is not None:
                launch = Launch(cluster, **found, **limits)  # type: ignore[arg-type]
                _check(launch)
                return launch
    return Launch("none")


def initialise() -> Launch:
    """Joins the run's other processes where there are any; returns how this one was started.

    Raises:
        ConfigError: see `detect`; the coordinator does not answer in time. Where it is another
            process that does not come, JAX ends this one.
    """
    global _launch
    launch = detect(os.environ)
    if launch.cluster == "none" or launch.count == 1:
        return launch
    where = launch.coordinator or "a host that the cluster names"
    print(f"{launch.name}: waits at most {launch.start_s} s for the others, at {where}", flush=True)
    if launch.coordinator is not None and launch.index != 0:
        _await(launch)
    if jax.config.jax_platforms == "cpu":  # type: ignore[attr-defined]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        launch.coordinator,
        num_processes=launch.count,
        process_id=launch.index,
        initialization_timeout=launch.start_s,
        heartbeat_timeout_seconds=launch.heartbeat_s,
    )
    _launch = launch
    return launch


@contextmanager
def explaining_losses() -> Iterator[None]:
    """Says which process is gone where a collective fails because another process ended.

    The coordination service ends every process that remains, as soon as the lost one has been
    silent for `heartbeat_s`, and names it; what fails first here is a collective with a message
    about a socket. Without several processes this does nothing.

    Raises:
        LostProcessError: another process is gone.
    """
    try:
        yield
    except TokjaxError:
        raise
    except Exception as error:
        if jax.process_count() == 1 or not _of_collective(error):
            raise
        raise LostProcessError(_loss(_launch, error)) from error


def _of_collective(error: Exception) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "coordination", "connection", "socket"))


def _loss(launch: Launch, error: Exception) -> str:
    """Returns what to say of a failed collective, when no other message has ended the process."""
    if launch.coordinator is not None and launch.index != 0 and not _answers(launch.coordinator):
        gone = f"process 0 (the coordinator at {launch.coordinator}) is gone"
    else:
        # The service needs the lost process to be silent that long, names it, and ends this one.
        time.sleep(launch.heartbeat_s + 5)
        gone = "another process is gone, or the network between them broke"
    return (
        f"process {jax.process_index()} of {jax.process_count()}: {gone} ({_first_line(error)}); "
        f"start all processes again: the same command continues from the last checkpoint"
    )


def _await(launch: Launch) -> None:
    """Returns when the coordinator answers; JAX itself would abort without a word of the remedy."""
    assert launch.coordinator is not None
    until = time.monotonic() + launch.start_s
    while not _answers(launch.coordinator):
        if time.monotonic() > until:
            raise ConfigError(
                f"{launch.name}: nothing answers at {launch.coordinator} within {launch.start_s} s "
                f"(TOKJAX_START_S): start process 0 there, let its port be reached from this host"
            )
        time.sleep(0.2)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            return True
    except OSError:
        return False


def _check(launch: Launch) -> None:
    """Raises ConfigError for places and coordinators that cannot be meant."""
    if launch.index is not None and not 0 <= launch.index < (launch.count or 0):
        raise ConfigError(
            f"process index {launch.index} is not below the count {launch.count} ({launch.cluster})"
        )
    if launch.coordinator is None:
        return
    host, _, port = launch.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"{_COORDINATOR}={launch.coordinator!r} is not host:port of process 0, such as "
            f"'localhost:1234'"
        )
    if launch.hosts is not None and launch.hosts > 1 and is_loopback(host):
        raise ConfigError(
            f"{_COORDINATOR}={launch.coordinator!r} is the loopback address, which every one of "
            f"the {launch.hosts} hosts takes for itself: name process 0's host"
        )


def is_loopback(host: str) -> bool:
    """Returns whether a host name or address stands for the machine that reads it.

    >>> is_loopback("localhost"), is_loopback("127.1.2.3"), is_loopback("[::1]")
    (True, True, True)
    >>> is_loopback("10.0.0.1"), is_loopback("node1")
    (False, False)
    """
    host = host.strip("[]")
    if host.lower() in ("localhost", "localhost.localdomain", "ip6-localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _explicit(environment: Mapping[str, str], asked: bool) -> dict | None:
    names = (_COORDINATOR, _COUNT, _INDEX)
    given = [name for name in names if environment.get(name)]
    if not given and not asked:
        return None
    missing = [name for name in names if name not in given]
    if missing:
        # A coordinator alone belongs to a cluster that counts by itself.
        if given == [_COORDINATOR] and not asked and _counted(environment):
            return None
        set_ = f"{', '.join(given)} set, but not " if given else "not set: "
        raise ConfigError(f"{set_}{', '.join(missing)}: set all or none")
    hosts = _number(environment, "TOKJAX_HOSTS") if environment.get("TOKJAX_HOSTS") else None
    return {
        "coordinator": environment[_COORDINATOR],
        "count": _number(environment, _COUNT),
        "index": _number(environment, _INDEX),
        "hosts": hosts,
    }


def _counted(environment: Mapping[str, str]) -> bool:
    return all(environment.get(n) for n in _SLURM) or all(environment.get(n) for n in _OMPI)


def _slurm(environment: Mapping[str, str], asked: bool) -> dict | None:
    missing = [name for name in _SLURM if not environment.get(name)]
    if missing:
        if asked:
            raise ConfigError(
                f"TOKJAX_CLUSTER=slurm, but {', '.join(missing)} not set: start it by srun"
            )
        return None
    count = _number(environment, "SLURM_NTASKS")
    if count == 1 and not asked:
        return None
    hosts = environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES")
    return {
        "coordinator": environment.get(_COORDINATOR) or None,
        "count": count,
        "index": _number(environment, "SLURM_PROCID"),
        "hosts": int(hosts) if hosts and hosts.isdigit() else None,
    }


def _ompi(environment: Mapping[str, str], asked: bool) -> dict | None:
    missing = [name for name in _OMPI if not environment.get(name)]
    if missing:
        if asked:
            raise ConfigError(
                f"TOKJAX_CLUSTER=ompi, but {', '.join(missing)} not set: start it by mpirun"
            )
        return None
    count = _number(environment, "OMPI_COMM_WORLD_SIZE")
    if count == 1 and not asked:
        return None
    local = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
    # How many hosts is not told, only whether all ranks are on this one.
    hosts = None if not local.isdigit() else 1 if int(local) == count else 2
    coordinator = environment.get(_COORDINATOR) or None
    if coordinator is None and not environment.get("OMPI_MCA_orte_hnp_uri"):
        # Open MPI 5 no longer names its head node.
        if hosts != 1:
            raise ConfigError(
                f"Open MPI does not say where rank 0 runs: set {_COORDINATOR}=host:port of it "
                f"(mpirun -x {_COORDINATOR})"
            )
        coordinator = f"localhost:{_port(environment.get('PMIX_NAMESPACE', ''))}"
    return {
        "coordinator": coordinator,
        "count": count,
        "index": _number(environment, "OMPI_COMM_WORLD_RANK"),
        "hosts": hosts,
    }


def _port(name: str) -> int:
    """Returns a port that the ranks of one job agree on and other jobs most likely do not."""
    return 20000 + sum(ord(c) * 31**i for i, c in enumerate(name)) % 10000


def _tpu(environment: Mapping[str, str], asked: bool) -> dict | None:
    several = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    slices = environment.get("MEGASCALE_NUM_SLICES", "1")
    several = several or (slices.isdigit() and int(slices) > 1)
    if not asked and (not several or environment.get("JAX_PLATFORMS", "") == "cpu"):
        return None
    return {"count": None, "index": None}


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ConfigError(f"{name}={environment[name]!r} must be a whole number") from None


def _seconds(environment: Mapping[str, str], name: str, default: int) -> int:
    if not environment.get(name):
        return default
    value = _number(environment, name)
    if value < 1:
        raise ConfigError(f"{name}={value} must be at least 1 second")
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
