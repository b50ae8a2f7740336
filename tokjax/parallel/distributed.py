"""Starting `jax.distributed` where several processes make up one run."""

import os

import jax

from tokjax.errors import ConfigError

_VARIABLES = ("TOKJAX_COORDINATOR", "TOKJAX_PROCESS_COUNT", "TOKJAX_PROCESS_INDEX")


def initialise() -> None:
    """Joins the run's other processes when the environment says that there are any.

    Set TOKJAX_COORDINATOR (host:port of process 0), TOKJAX_PROCESS_COUNT and
    TOKJAX_PROCESS_INDEX in every process. Without them this process is alone.

    Raises:
        ConfigError: some of the variables are set and others not, or have impossible values.
    """
    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if not given:
        return
    if missing := [name for name in _VARIABLES if name not in given]:
        raise ConfigError(f"{', '.join(given)} set, but not {', '.join(missing)}: set all or none")
    try:
        count, index = int(given[_VARIABLES[1]]), int(given[_VARIABLES[2]])
    except ValueError:
        raise ConfigError(f"process count and index must be numbers: {given}") from None
    if not 0 <= index < count:
        raise ConfigError(f"process index {index} is not below the count {count}: {given}")
    host, _, port = given[_VARIABLES[0]].rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"TOKJAX_COORDINATOR={given[_VARIABLES[0]]!r} is not host:port of process 0, such as "
            f"'localhost:1234'"
        )
    if jax.config.jax_platforms == "cpu":  # type: ignore[attr-defined]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(given[_VARIABLES[0]], num_processes=count, process_id=index)
