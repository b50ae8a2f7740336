"""Config files: Python files with a `get_config` function, named as `configs/patch.py:k=4`."""

import inspect
import linecache
import os
import tokenize
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections import config_dict

from tokjax.config.overrides import apply_overrides, parse_literal, parse_typed
from tokjax.config.values import plain, resolve
from tokjax.errors import ConfigError, nearest


def load(
    path: str | os.PathLike[str],
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    schema: Any = None,
) -> ml_collections.ConfigDict:
    """Returns the locked ConfigDict of a config file with the overrides applied.

    Args:
      path: "configs/patch.py", or with arguments for its `get_config`: "configs/patch.py:k=4".
        What follows the colon is passed by name where the names are parameters, and as one string
        where `get_config` takes one parameter.
      overrides: {"optimizer.peak_lr": 3e-4} or ["optimizer.peak_lr=3e-4"].
      schema: the frozen dataclass that the config is for; with it, text is parsed by the type of
        its field and default sequences can be set by index.

    Raises:
      ConfigError: the file is missing or fails, has no `get_config`, the arguments do not fit, or
        the overrides contradict each other.
    """
    file, argument = split_path(str(path))
    module = _execute(file)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        functions = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        close = nearest("get_config", functions) if functions else ""
        raise ConfigError(f"{file} has no function get_config.{close if 'mean' in close else ''}")
    arguments = _arguments(get_config, argument, file)
    try:
        tree = get_config(**arguments)
    except Exception as error:
        raise _failure(file, error) from error
    if not isinstance(tree, (Mapping, ml_collections.ConfigDict, ml_collections.FrozenConfigDict)):
        raise ConfigError(
            f"get_config of {file} returned a {type(tree).__name__}; it must return a ConfigDict"
        )
    try:
        given = plain(tree)
    except config_dict.RequiredValueError as error:
        raise ConfigError(
            f"{file}: a required placeholder is not filled; leave such keys out, the schema says "
            "which are required"
        ) from error
    merged = apply_overrides(given, overrides, schema)
    try:
        return ml_collections.ConfigDict(merged, allow_dotted_keys=True).lock()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from error


def split_path(path: str) -> tuple[Path, str | None]:
    """Returns the file and the text after its colon, or None without one.

    >>> split_path("configs/patch.py:k=4")[1]
    'k=4'
    """
    file, colon, argument = path.rpartition(".py:")
    return (Path(file + ".py"), argument) if colon else (Path(path), None)


def _execute(file: Path) -> types.ModuleType:
    """Returns the module of a file, run without a byte-code cache.

    The import system would leave `__pycache__` beside the configs and trust its time stamp, which
    is one second coarse: two quick edits of one length would run the first.
    """
    if not file.is_file():
        folder = file.parent
        what = "is a folder" if file.is_dir() else "does not exist"
        names = [str(p) for p in sorted(folder.glob("*.py"))] if folder.is_dir() else []
        where = nearest(str(file), names) if names else f" There is no config file in {folder}."
        raise ConfigError(f"the config file {file} {what}.{where}")
    try:
        with tokenize.open(file) as stream:
            source = stream.read()
    except (OSError, SyntaxError, UnicodeError) as error:
        raise ConfigError(f"the config file {file} cannot be read: {error}") from error
    module = types.ModuleType(f"tokjax_config_{file.stem}")
    module.__file__ = str(file)
    linecache.checkcache(str(file))
    try:
        exec(compile(source, str(file), "exec"), vars(module))
    except Exception as error:
        raise _failure(file, error) from error
    return module


def _failure(file: Path, error: Exception) -> ConfigError:
    """Returns the error of running a config file, with the line of that file it came from."""
    if isinstance(error, ConfigError):
        return ConfigError(f"{file}: {error}")
    line = error.lineno if isinstance(error, SyntaxError) else None
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == str(file):
            line = frame.lineno
    place = f"{file}:{line}" if line else str(file)
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return ConfigError(f"{place}: {type(error).__name__}: {text}")


def _arguments(get_config: Any, argument: str | None, file: Path) -> dict[str, Any]:
    """Returns the keyword arguments that the text after the colon means for `get_config`."""
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(get_config).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    hints = typing.get_type_hints(get_config)
    given: dict[str, str] = {}
    if argument and not parameters:
        raise ConfigError(f"{file} takes no arguments, got {argument!r} after the colon")
    if argument:
        pieces = _split_commas(argument)
        named = [piece.partition("=")[0].strip() for piece in pieces if "=" in piece]
        if len(named) < len(pieces) or not set(named) <= set(parameters):
            if len(parameters) == 1 and (not named or "arg" in parameters):
                given = {next(iter(parameters)): argument}
            else:
                wrong = next((n for n in named if n not in parameters), None)
                if wrong is None:
                    raise ConfigError(
                        f"{file}: cannot read the arguments {argument!r}; write "
                        f"{file}:{','.join(f'{name}=...' for name in parameters)}"
                    )
                raise ConfigError(f"{file} has no argument {wrong!r}.{nearest(wrong, parameters)}")
        else:
            for piece in pieces:
                name, _, text = piece.partition("=")
                if name.strip() in given:
                    raise ConfigError(f"{file}: the argument {name.strip()!r} is given twice")
                given[name.strip()] = text
    result = {}
    for name, parameter in parameters.items():
        if name in given:
            result[name] = _argument(given[name], parameter, hints.get(name), f"{file}: {name}")
        elif parameter.default is parameter.empty:
            raise ConfigError(f"{file} needs the argument {name!r}; write {file}:{name}=...")
    return result


def _argument(text: str, parameter: inspect.Parameter, hint: Any, path: str) -> Any:
    if hint is None:
        default = parameter.default
        if default is parameter.empty or default is None:
            return parse_literal(text)
        hint = type(default)
        if hint not in (bool, int, float, str):
            return parse_literal(text)
    value = parse_typed(text, hint)
    try:
        return resolve(hint, value, path=path)
    except TypeError:
        return value  # a type that no configuration field has: the function's own business


def _split_commas(text: str) -> list[str]:
    """Returns `text` split at commas that are outside brackets and quotes."""
    pieces, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            pieces.append("")
            continue
        pieces[-1] += character
    return pieces
