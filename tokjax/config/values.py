"""Plain values into a schema (`resolve`) and back (`to_dict`), and what differs between two."""

import dataclasses
import math
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union

from tokjax.config.schema import (
    MISSING,
    Choice,
    FrozenDict,
    choice_kind,
    choices,
    field_default,
    field_types,
    registered_name,
    type_name,
    union_members,
)
from tokjax.errors import ConfigError, nearest

T = TypeVar("T")


def plain(value: Any) -> Any:
    """Returns `value` with every ConfigDict and mapping in it as a dict, sequences kept."""
    if hasattr(value, "to_dict") and not dataclasses.is_dataclass(value):
        value = value.to_dict()  # ConfigDict and FrozenConfigDict, which are no Mapping
    if isinstance(value, Mapping):
        return {key: plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        children = [plain(child) for child in value]
        return tuple(children) if isinstance(value, tuple) else children
    return value


def resolve(schema: type[T], tree: Any, *, path: str = "config") -> T:
    """Returns the `schema` described by a tree of plain values.

    Keys that are left out keep their defaults: those of the default instance where the parent has
    one, else those of the class. A choice given with its `name` starts from the defaults of its
    class; without a `name` it changes the default choice, if there is one.

    Args:
      schema: a frozen dataclass, or `Annotated[Any, Choice(kind)]`.
      tree: a mapping or ConfigDict, or an instance of the schema.
      path: how messages call the root.

    Raises:
      ConfigError: names every unknown, unused or missing key and every wrong value at once.
    """
    problems: list[str] = []
    result = _value(schema, plain(tree), path, problems)
    if problems:
        if len(problems) == 1:
            raise ConfigError(problems[0])
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problems in {path}:\n{listed}")
    return result


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a resolved dataclass as plain JSON values; `resolve` turns it back.

    Choices carry their `name`, tuples become lists.
    """
    result: dict[str, Any] = {}
    if (name := registered_name(type(config))) is not None:
        result["name"] = name
    for field in dataclasses.fields(config):
        if field.init:
            result[field.name] = to_plain(getattr(config, field.name))
    return result


def defaults_of(config: Any) -> dict[str, Any]:
    """Returns the tree of `to_dict` with the schema's defaults instead of the values.

    Left out: keys without a default, and those of a part that by default is absent or another.
    """
    result: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field_default(type(config), field.name)
        if not field.init or default is MISSING:
            continue
        if dataclasses.is_dataclass(value) and type(value) is type(default):
            result[field.name] = defaults_of(value)
        else:
            result[field.name] = to_plain(default)
    return result


def diff(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns (dotted key, value in `a`, value in `b`) of every leaf that differs, sorted.

    A side that lacks the key holds the string "(absent)".

    >>> diff({"seed": 1, "optimizer": {"lr": 0.1}}, {"seed": 1, "optimizer": {"lr": 0.2}})
    [('optimizer.lr', 0.1, 0.2)]
    """
    left, right = dict(_leaves(a)), dict(_leaves(b))
    found = []
    for key in sorted(left.keys() | right.keys()):
        x, y = left.get(key, "(absent)"), right.get(key, "(absent)")
        if type(x) is not type(y) or x != y:
            found.append((key, x, y))
    return found


def to_plain(value: Any) -> Any:
    """Returns a resolved value, dataclass or not, as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: to_plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(child) for child in value]
    return value


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and (tree or not prefix):
        items = list(tree.items())
    elif isinstance(tree, (list, tuple)) and tree:
        items = list(enumerate(tree))
    else:
        # An empty tuple and an empty list say the same thing.
        yield prefix, list(tree) if isinstance(tree, tuple) else tree
        return
    for key, child in items:
        yield from _leaves(child, f"{prefix}.{key}" if prefix else str(key))


def _value(hint: Any, value: Any, path: str, problems: list[str], default: Any = MISSING) -> Any:
    """Returns `value` as `hint`, or None after adding to `problems`.

    `default` is what the parent holds when the key is left out: partial mappings change it.
    """
    members = union_members(hint)
    if len(members) > 1:
        return _union(members, value, path, problems, default)
    hint = members[0]  # pyright: ignore[reportGeneralTypeIssues]
    if (kind := choice_kind(hint)) is not None:
        return _choice(kind, value, path, problems, default)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(hint, value, path, problems, default)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _literal(arguments, value, path, problems)
    if origin is tuple or hint is tuple:
        return _tuple(hint, arguments, value, path, problems)
    container = origin or hint
    if isinstance(container, type) and issubclass(container, Mapping):
        return _mapping(arguments[1] if arguments else Any, value, path, problems, hint)
    return _scalar(hint, value, path, problems)


def _wrong(hint: Any, value: Any, path: str, problems: list[str], hint_text: str = "") -> None:
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    got = f"{shown} ({type(value).__name__})" if value is not None else "None"
    problems.append(f"{path}: expected {type_name(hint)}, got {got}.{hint_text}")


def _scalar(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    if hint is Any:
        return _freeze(value, path, problems)
    if hint in (None, type(None)):
        if value is not None:
            _wrong(type(None), value, path, problems)
        return None
    if hint not in (bool, int, float, str):
        raise TypeError(f"{path}: a configuration field cannot have the type {hint!r}")
    if hint is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    # type(), not isinstance: a bool is an int in Python, and 'steps=True' is a mistake.
    if type(value) is not hint:
        note = ""
        if hint is int and type(value) is float and value.is_integer():
            note = f" Write {int(value)}."
        elif hint in (int, float) and isinstance(value, str) and _is_number(value):
            note = f" Write {value} without quotes."
        elif hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
            note = f" Write '{value}' in quotes."
        _wrong(hint, value, path, problems, note)
        return None
    if isinstance(value, float) and not math.isfinite(value):
        # NaN is unequal to itself and neither is JSON: two equal runs would seem to differ.
        problems.append(f"{path}: {value} is not a finite number.")
        return None
    return value


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _freeze(value: Any, path: str, problems: list[str]) -> Any:
    """Returns a plain value of no declared type in hashable form."""
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(v, f"{path}.{i}", problems) for i, v in enumerate(value))
    if isinstance(value, Mapping):
        return FrozenDict({k: _freeze(v, f"{path}.{k}", problems) for k, v in value.items()})
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return _scalar(float, value, path, problems)
    problems.append(f"{path}: a {type(value).__name__} cannot be part of a configuration.")
    return None


def _literal(options: tuple[Any, ...], value: Any, path: str, problems: list[str]) -> Any:
    for option in options:
        if type(option) is type(value) and option == value:
            return value
    hint = Literal[options]  # type: ignore[valid-type]
    suggestion = ""
    if isinstance(value, str):
        suggestion = nearest(value, [option for option in options if isinstance(option, str)])
    _wrong(hint, value, path, problems, suggestion if "Did you mean" in suggestion else "")
    return None


def _union(
    members: tuple[Any, ...], value: Any, path: str, problems: list[str], default: Any
) -> Any:
    if value is None and type(None) in members:
        return None
    others = [member for member in members if member is not type(None)]
    if len(others) == 1:
        inner = type_name(others[0])
        found: list[str] = []
        result = _value(others[0], value, path, found, default)
        # The message must not hide that None is allowed too.
        problems += [
            problem.replace(f"{path}: expected {inner},", f"{path}: expected {inner} | None,", 1)
            for problem in found
        ]
        return result
    attempts = []
    for member in others:
        found = []
        result = _value(member, value, path, found, default)
        if not found:
            return result
        attempts.append((member, found))
    # A mapping can only have meant the one member with keys: its own complaints say more.
    structured = [f for m, f in attempts if isinstance(value, Mapping) and _has_keys(m)]
    if len(structured) == 1:
        problems += structured[0]
    else:
        _wrong(Union[members], value, path, problems)  # noqa: UP007
    return None


def _has_keys(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or choice_kind(hint) is not None


def _tuple(
    hint: Any, arguments: tuple[Any, ...], value: Any, path: str, problems: list[str]
) -> Any:
    if not isinstance(value, (list, tuple)):
        listed = isinstance(value, (str, Mapping)) and len(repr(value)) <= 60
        _wrong(hint, value, path, problems, f" Write a list: [{value!r}]." if listed else "")
        return None
    if not arguments:
        arguments = (Any, ...)
    if len(arguments) == 2 and arguments[1] is ...:
        hints: Sequence[Any] = [arguments[0]] * len(value)
    elif len(arguments) == len(value):
        hints = arguments
    else:
        problems.append(f"{path}: expected {len(arguments)} elements, got {len(value)}.")
        return None
    return tuple(
        _value(h, v, f"{path}.{i}", problems)
        for i, (h, v) in enumerate(zip(hints, value, strict=True))
    )


def _mapping(element: Any, value: Any, path: str, problems: list[str], hint: Any) -> Any:
    if not isinstance(value, Mapping):
        _wrong(hint, value, path, problems)
        return None
    for key in value:
        if not isinstance(key, str) or not key:
            problems.append(f"{path}: the key {key!r} is not a name.")
            return None
    return FrozenDict(
        {key: _value(element, v, f"{path}.{key}", problems) for key, v in value.items()}
    )


def _choice(kind: str, value: Any, path: str, problems: list[str], default: Any) -> Any:
    options = choices(kind)
    if dataclasses.is_dataclass(value) and type(value) in options.values():
        return value
    if not isinstance(value, Mapping):
        _wrong(Annotated[Any, Choice(kind)], value, path, problems, _as_mapping(value, options))
        return None
    if "name" not in value:
        # `--config.optimizer.peak_lr=...` changes the default choice; without one there is
        # nothing that the keys could belong to.
        if dataclasses.is_dataclass(default) and type(default) in options.values():
            return _dataclass(type(default), value, path, problems, default, kind=kind)
        problems.append(
            f"{path}: needs a 'name' that says which {kind} is meant"
            f"{_keys_given(value)}.{_listed(options)}"
        )
        return None
    name = value["name"]
    if not isinstance(name, str) or name not in options:
        close = nearest(name, options) if isinstance(name, str) else _listed(options)
        problems.append(f"{path}.name: there is no {kind} {name!r}.{close}")
        return None
    return _dataclass(options[name], value, path, problems, kind=kind)


def _as_mapping(value: Any, options: Mapping[str, type]) -> str:
    if isinstance(value, str) and value in options:
        return f' Write {{"name": "{value}"}}.'
    return _listed(options)


def _listed(options: Mapping[str, type]) -> str:
    return nearest("", options) if options else " None is registered."


def _keys_given(value: Mapping[str, Any]) -> str:
    return f" (it has only {', '.join(map(repr, value))})" if value else ""


def _dataclass(
    cls: type,
    value: Any,
    path: str,
    problems: list[str],
    default: Any = MISSING,
    kind: str | None = None,
) -> Any:
    if isinstance(value, cls):
        return value
    from_base = getattr(cls, "from_base", None)
    if from_base is not None and isinstance(value, str):
        value = {"base": value}
    if not isinstance(value, Mapping):
        _wrong(cls, value, path, problems)
        return None
    before = len(problems)
    hints = field_types(cls)
    name = registered_name(cls)
    given = dict(value)
    # A base gives the keys that are not set; one with every key set (a saved run) needs none.
    base = given.get("base")
    if from_base is not None and isinstance(base, str) and not hints.keys() <= given.keys():
        try:
            default = from_base(base)
        except ConfigError as error:
            problems.append(f"{path}.base: {error}")
            return None
    if name is not None and "name" not in hints and given.pop("name", name) != name:
        problems.append(f"{path}.name: must be {name!r} here, got {value['name']!r}.")
    _report_unknown(cls, kind, [key for key in given if key not in hints], path, problems)
    arguments: dict[str, Any] = {}
    for key, hint in hints.items():
        fallback = getattr(default, key) if isinstance(default, cls) else field_default(cls, key)
        if key not in given and fallback is MISSING:
            problems.append(f"{path}.{key}: missing; it has no default ({type_name(hint)}).")
            continue
        chosen = given.get(key, fallback)
        arguments[key] = _value(hint, chosen, f"{path}.{key}", problems, fallback)
    if len(problems) > before:
        return None
    try:
        return cls(**arguments)
    except ConfigError as error:
        problems.append(f"{path}: {error}")
        return None


def _suggestion(key: str, known: Collection[str]) -> str:
    """Returns the known keys that differ by one letter, else what `nearest` says."""
    # `nearest` weighs length: for 'exa' it prefers 'extra' to 'ema', and for 'x' nothing is near.
    slips = sorted(
        name
        for name in known
        if len(name) == len(key) and sum(a != b for a, b in zip(name, key, strict=True)) == 1
    )
    if slips:
        return f" Did you mean {' or '.join(repr(name) for name in slips)}?"
    return nearest(key, known)


def _report_unknown(
    cls: type, kind: str | None, unknown: list[Any], path: str, problems: list[str]
) -> None:
    hints = field_types(cls)
    siblings = choices(kind) if kind is not None else {}
    name = registered_name(cls)
    owned: dict[str, list[str]] = {}
    for key in unknown:
        owners = [n for n, other in siblings.items() if n != name and key in field_types(other)]
        if owners:
            owned.setdefault(" and ".join(repr(owner) for owner in owners), []).append(key)
        else:
            known = {*hints, "name"} if siblings else hints
            problems.append(f"{path}.{key}: unknown key.{_suggestion(str(key), known)}")
    for owners, keys in owned.items():
        shown = ", ".join(repr(key) for key in keys)
        belongs = "it belongs" if len(keys) == 1 else "they belong"
        switch = path.partition(".")[2]
        problems.append(
            f"{path}: unused: {kind} {name!r} has no {shown}; {belongs} to {owners}. Remove "
            f"{'it' if len(keys) == 1 else 'them'}, or replace the whole {kind}"
            + (f': --config.{switch}=\'{{"name": "{name}"}}\'.' if switch else ".")
        )
