"""The errors a user can meet, each with the exit code its entry point ends with.

Exit codes: 0 finished; 2 the command or configuration is wrong; 3 the data is wrong;
4 a checkpoint cannot be used; 5 the loss or a gradient was not finite; 6 the disk or the
working directory failed; 7 the memory did not suffice; 8 another process of the run is gone; 75
stopped by SIGTERM after saving (run the same command to continue).
"""

import difflib
from collections.abc import Iterable

PREEMPTED_EXIT_CODE = 75


class TokjaxError(Exception):
    """An error that is the user's to mend: entry points print it without a traceback."""

    exit_code = 1


class ConfigError(TokjaxError, ValueError):
    """A command line or configuration value that cannot be meant."""

    exit_code = 2


class DataError(TokjaxError, ValueError):
    """A record, file or token store that cannot be read as it should be."""

    exit_code = 3


class CheckpointError(TokjaxError, RuntimeError):
    """A checkpoint that is damaged, missing, or made by another configuration."""

    exit_code = 4


class NonFiniteError(TokjaxError, FloatingPointError):
    """A loss or gradient that is NaN or infinite under the policy `stop`."""

    exit_code = 5


class StorageError(TokjaxError, OSError):
    """A full disk or an unwritable directory."""

    exit_code = 6


class MemoryLimitError(TokjaxError, MemoryError):
    """More memory was needed than the host or a device has."""

    exit_code = 7


class LostProcessError(TokjaxError, RuntimeError):
    """Another process of the run has ended, so that this one cannot go on."""

    exit_code = 8


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Returns a sentence naming the candidate closest to `name`, and the choices when few.

    >>> nearest("peek_lr", ["peak_lr", "name"])
    " Did you mean 'peak_lr'?"
    >>> nearest("zzz", ["adamw", "lion"])
    " Choose one of: 'adamw', 'lion'."
    """
    candidates = sorted(set(candidates))
    match = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if match:
        return f" Did you mean {match[0]!r}?"
    if not candidates:
        return ""
    shown = ", ".join(repr(c) for c in candidates[:30])
    return f" Choose one of: {shown}{', ...' if len(candidates) > 30 else ''}."
