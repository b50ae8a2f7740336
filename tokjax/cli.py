"""The command line that every entry point shares: flags, `--config` with overrides, exit codes.

An entry point is a module with

    FLAGS = {"workdir": FlagSpec("folder of checkpoints and logs", required=True)}

    def main(argv):
        args = cli.parse_args(argv, flags=FLAGS)
        if args.help:
            print(cli.help_text("tokjax.train", __doc__, FLAGS, schema=TrainConfig, args=args))
            return
        config = cli.load_config(TrainConfig, args)
        ...

    if __name__ == "__main__":
        cli.run(main)

argparse is not used: it cannot take keys it does not know (`--config.a.b=1`) without also letting
misspelt flags through.
"""

import errno
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tokjax.config.files import load
from tokjax.config.overrides import parse_literal, parse_typed
from tokjax.config.schema import type_name
from tokjax.config.values import resolve
from tokjax.errors import ConfigError, MemoryLimitError, StorageError, TokjaxError, nearest

T = TypeVar("T")

INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE_EXIT_CODE = 141  # 128 + SIGPIPE

_STORAGE_ERRNOS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EPERM: "the operation is not permitted",
    errno.EROFS: "the file system is read-only",
}
_MEMORY_REMEDY = (
    "Compute less at a time (a smaller data.batch_size or data.seq_len, or more micro_batches), "
    "keep less (model.remat='block'), take a smaller model, or share it among more devices "
    "(mesh.fsdp)."
)


@dataclass(frozen=True)
class FlagSpec:
    """One flag of an entry point.

    Attributes:
      help: what it means, with the unit.
      type: bool, int, float, str, a Literal, or one of these `| None`; or dict, of values given
        as `--name.key=value`.
      default: the value without the flag.
      required: whether the flag must be given.
    """

    help: str
    type: Any = str
    default: Any = None
    required: bool = False


@dataclass(frozen=True)
class Arguments:
    """A parsed command line; `args["workdir"]` is the value of the flag.

    Attributes:
      flags: the value of every flag, given or default.
      config: the text of `--config`, or None.
      overrides: "key=value" for every `--config.key=value`, in order.
      help: whether `--help` or `-h` was given.
      positional: the arguments without dashes.
    """

    flags: Mapping[str, Any] = field(default_factory=dict)
    config: str | None = None
    overrides: tuple[str, ...] = ()
    help: bool = False
    positional: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.flags[name]


def parse_args(
    argv: Sequence[str],
    *,
    flags: Mapping[str, FlagSpec],
    needs_config: bool = True,
    positionals: int = 0,
) -> Arguments:
    """Returns the parsed command line (without the program's name).

    Flags are written `--name=value` or `--name value`, booleans also `--name` and `--no-name`.
    Names are never abbreviated. Of a flag of type dict each key is written `--name.key=value`.

    Args:
      argv: the words after the program's name.
      flags: the flags besides `--config` and `--help`.
      needs_config: whether `--config` is required.
      positionals: how many words without dashes are allowed.

    Raises:
      ConfigError: an unknown, repeated or missing flag, or a value of the wrong type. With
        `--help` nothing is required.
    """
    given: dict[str, Any] = {}
    overrides: list[str] = []
    positional: list[str] = []
    words = list(argv)
    wants_help = any(word in ("--help", "-h") for word in words)
    words = [word for word in words if word not in ("--help", "-h")]
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            if len(positional) == positionals:
                raise ConfigError(f"unexpected argument {word!r}.{_meant_flag(word, flags)}")
            positional.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        if name.startswith("config."):
            key = name.removeprefix("config.")
            overrides.append(f"{key}={value if equals else _next(words, word)}")
            continue
        head, _, key = name.partition(".")
        if key and head in flags and flags[head].type is dict:
            keys = given.setdefault(head, {})
            if key in keys:
                raise ConfigError(f"--{name} is given twice; keep one")
            keys[key] = parse_literal(value if equals else _next(words, word))
            continue
        result: str | bool
        if name != "config" and name not in flags:
            negated = name.removeprefix("no-")
            if name == negated or negated not in flags or not _is_bool(flags[negated]) or equals:
                raise ConfigError(
                    f"unknown flag --{name}.{_nearest_flag(name, flags, needs_config)}"
                )
            name, result = negated, False
        elif name in flags and flags[name].type is dict:
            raise ConfigError(f"--{name} takes keys: write --{name}.KEY=VALUE")
        elif equals:
            result = value
        else:
            result = True if name in flags and _is_bool(flags[name]) else _next(words, word)
        if name in given:
            raise ConfigError(f"--{name} is given twice: {given[name]!r} and {result!r}; keep one")
        given[name] = result
    config = given.pop("config", None)
    if config is None and needs_config and not wants_help:
        raise ConfigError(f"--config is missing.{_config_files()}")
    values = {name: _flag_value(name, flag, given, wants_help) for name, flag in flags.items()}
    return Arguments(
        values,
        None if config is None else str(config),
        tuple(overrides),
        wants_help,
        tuple(positional),
    )


def load_config(schema: type[T], args: Arguments) -> T:
    """Returns the resolved configuration that a command line names.

    Raises:
      ConfigError: `--config` is missing, or the file or an override does not fit the schema.
    """
    if args.config is None:
        raise ConfigError(f"--config is missing.{_config_files()}")
    return resolve(schema, load(args.config, args.overrides, schema=schema))


def help_text(
    program: str,
    description: str | None,
    flags: Mapping[str, FlagSpec],
    *,
    schema: type | None = None,
    args: Arguments | None = None,
    width: int | None = None,
) -> str:
    """Returns usage, flags and, where `args` has a config, every key of that config explained.

    A config that does not fit the schema is shown all the same, with what is wrong at the end.

    Args:
      program: the module as `python -m` takes it.
      description: the module's docstring; its first paragraph is shown.
      flags: as for `parse_args`.
      schema: the frozen dataclass of `--config`, if the program takes one.
      args: the parsed command line.
      width: columns; the terminal's where left out.
    """
    width = width or min(100, shutil.get_terminal_size().columns)
    takes_config = schema is not None
    usage = f"usage: python -m {program}"
    if takes_config:
        usage += " --config=FILE[:ARGS] [--config.KEY=VALUE ...]"
    for name, flag in flags.items():
        word = f"--{name}" if _is_bool(flag) else f"--{name}=..."
        word = f"--{name}.KEY=..." if flag.type is dict else word
        usage += f" {word}" if flag.required else f" [{word}]"
    lines = textwrap.wrap(usage, width, subsequent_indent=" " * 8)
    if description:
        lines += ["", *textwrap.wrap(description.strip().split("\n\n")[0], width)]
    lines += ["", "flags:"]
    if takes_config:
        lines += _flag_lines("--config", "Python file with get_config", "str, required", width)
    for name, flag in flags.items():
        note = "required" if flag.required else f"default {flag.default}"
        lines += _flag_lines(f"--{name}", flag.help, f"{type_name(flag.type)}, {note}", width)
    lines += _flag_lines("--debug", "show tracebacks of errors", "bool, default False", width)
    shown = "show this, with --config also its keys" if takes_config else "show this"
    lines += _flag_lines("--help", shown, "", width)
    if schema is not None:
        lines += ["", *_config_help(schema, args, width)]
    return "\n".join(lines)


_JAX_NOTE = "JAX has removed its internal frames"  # of errors raised while a program is traced


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Ends the process with the exit code of `main(argv)`.

    A `TokjaxError` is printed as one `error: ...` on stderr and ends with the code of its class
    (see `tokjax.errors`); a full disk or an unwritable place counts as `StorageError`, memory that
    is used up as `MemoryLimitError`; Ctrl-C ends with 130. Any other exception is a bug and keeps
    its traceback. `--debug`, which `main` does not see, shows the traceback always.

    Raises:
      SystemExit: always.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        code = main(words) or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        _complain("interrupted", debug)
        code = INTERRUPTED_EXIT_CODE
    except BrokenPipeError:
        # The reader (`| head`) has gone; the interpreter would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE_EXIT_CODE
    except TokjaxError as error:
        notes = [n for n in getattr(error, "__notes__", ()) if _JAX_NOTE not in n]
        _complain("\n".join([str(error), *notes]), debug)
        code = error.exit_code
    except OSError as error:
        if error.errno not in _STORAGE_ERRNOS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        _complain(f"{place}{_STORAGE_ERRNOS[error.errno]}", debug)
        code = StorageError.exit_code
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        # The whole text of a device's allocator lists every buffer of the program.
        told = (str(error).splitlines() or ["MemoryError"])[0][:300]
        _complain(f"out of memory: {told}\n{_MEMORY_REMEDY}", debug)
        code = MemoryLimitError.exit_code
    raise SystemExit(code)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):  # NumPy's is one of these
        return True
    # JAX's errors are told apart by their text; importing JAX for its class would take a second.
    text = str(error)
    return type(error).__module__.partition(".")[0] in ("jax", "jaxlib") and (
        "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    )


def _complain(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    color = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    label = "\033[1;31merror:\033[0m" if color else "error:"
    print(f"{label} {message}", file=sys.stderr, flush=True)


def _is_bool(flag: FlagSpec) -> bool:
    return flag.type is bool


def _next(words: list[str], flag: str) -> str:
    if not words or words[0].startswith("--"):
        raise ConfigError(f"{flag} has no value; write {flag}=VALUE")
    return words.pop(0)


def _flag_value(name: str, flag: FlagSpec, given: Mapping[str, Any], wants_help: bool) -> Any:
    if name not in given:
        if flag.required and not wants_help:
            raise ConfigError(f"--{name} is missing: {flag.help}")
        return flag.default
    text = given[name]
    if flag.type is dict:
        return text
    if flag.required and text == "":
        raise ConfigError(f"--{name} is empty: {flag.help}")
    value = parse_typed(text, flag.type) if isinstance(text, str) else text
    return resolve(flag.type, value, path=f"--{name}")


def _nearest_flag(name: str, flags: Mapping[str, FlagSpec], takes_config: bool) -> str:
    head, dot, rest = name.partition(".")
    shared = ("config", "help", "debug") if takes_config else ("help", "debug")
    known = [f"--{known}" for known in (*flags, *shared)]
    if dot and takes_config:
        if "mean '--config'" in nearest(f"--{head}", known):
            return f" Did you mean '--config.{rest}'?"
        return f" Keys of the config are written '--config.{name}'."
    return nearest(f"--{name}", known)


def _meant_flag(word: str, flags: Mapping[str, FlagSpec]) -> str:
    name = word.lstrip("-").partition("=")[0]
    if name.partition(".")[0] in (*flags, "config"):
        return f" Did you mean '--{word.lstrip('-')}'?"
    return " Flags begin with two dashes; values follow '=' directly."


def _config_files() -> str:
    files = sorted(str(path) for path in Path("configs").glob("**/*.py"))
    if not files:
        return " Name a Python file that defines get_config: --config=FILE."
    shown = "".join(f"\n  --config={name}" for name in files[:40])
    more = f"\n  and {len(files) - 40} more" if len(files) > 40 else ""
    return f" The files in ./configs are:{shown}{more}"


def _flag_lines(name: str, text: str, note: str, width: int) -> list[str]:
    body = f"{text} ({note})" if note else text
    return textwrap.wrap(
        f"{name:<16} {body}", width, initial_indent="  ", subsequent_indent=" " * 19
    )


def _config_help(schema: type, args: Arguments | None, width: int) -> list[str]:
    # Imported here: only --help needs to read source files.
    from tokjax.config.describe import describe, render

    if args is None or args.config is None:
        return ["With --config=FILE, --help also explains every key.", _config_files().strip()]
    tree = load(args.config, args.overrides, schema=schema)
    lines = [f"keys of {args.config}:", render(describe(schema, tree), width)]
    try:
        resolve(schema, tree)
    except ConfigError as error:
        lines += ["", f"This config cannot be used as it is: {error}"]
    return lines
