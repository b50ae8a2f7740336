"""How the process takes memory from the system."""

import ctypes
import os
import platform
from pathlib import Path

# Options of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_LARGEST = 2**31 - 1
_ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")


def keep_freed_memory() -> bool:
    """Makes the C library keep what is freed where training runs on a CPU; returns if it does.

    XLA's CPU backend takes its temporary memory at every step and frees it behind it. Large pieces
    go back to the system each time, and come again as pages that must be cleared: 150,000 page
    faults and a few percent of the time of a training step of 29M parameters on two cores.

    To be called before JAX is imported: its threads must find the setting. Needs glibc.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    on_cpu = platforms == "cpu" or not any(Path(device).exists() for device in _ACCELERATORS)
    if not on_cpu or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: _LARGEST}
    taken = [mallopt(option, value) for option, value in settings.items()]
    return all(taken)
