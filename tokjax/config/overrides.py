"""Command-line overrides: `optimizer.peak_lr=3e-4` as text, parsed, and written into a tree.

An override may set any key of the schema, also one that the file leaves out; whether the key
exists is decided by `resolve`, with all other mistakes. Here only what contradicts itself or has
nowhere to go is refused.
"""

import ast
import copy
import dataclasses
import json
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from tokjax.config.schema import (
    MISSING,
    choice_kind,
    choices,
    field_default,
    field_types,
    union_members,
)
from tokjax.config.values import plain, to_dict, to_plain
from tokjax.errors import ConfigError

_WORDS = {"true": True, "false": False, "none": None, "null": None}


def parse_literal(text: str) -> Any:
    """Returns the Python or JSON value that `text` spells, else the text itself.

    >>> parse_literal("3e-4"), parse_literal("true"), parse_literal("(1,2)"), parse_literal("adamw")
    (0.0003, True, (1, 2), 'adamw')
    """
    stripped = text.strip()
    if stripped.lower() in _WORDS:
        return _WORDS[stripped.lower()]
    for read in (ast.literal_eval, json.loads):
        try:
            value = read(stripped)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        # json reads NaN and Infinity, which are words like any other here; sets, bytes and
        # complex numbers are Python literals that no configuration holds.
        if isinstance(value, float) and not math.isfinite(value):
            return text
        return value if _is_plain(value) else text
    return text


def parse_typed(text: str, hint: Any) -> Any:
    """Returns `text` as a value of the type `hint` where it spells one, else `parse_literal`.

    Only text knows no difference between 7 and "7": where the schema wants a string, the text is
    that string. `none` is None where None is allowed.

    >>> parse_typed("7", str), parse_typed("7", int), parse_typed("none", str | None)
    ('7', 7, None)
    """
    value = parse_literal(text)
    if isinstance(value, str):
        return value
    members = union_members(hint)
    if value is None and type(None) in members:
        return None
    for member in members:
        if get_origin(member) is Literal and text in get_args(member):
            return text
    if str in members and not any(member in (bool, int, float) for member in members):
        return text
    return value


def parse_overrides(overrides: Mapping[str, Any] | Sequence[str]) -> dict[tuple[str, ...], Any]:
    """Returns the overrides as {key path: value}; values given as text stay text.

    Args:
      overrides: {"optimizer.peak_lr": 3e-4}, or ["optimizer.peak_lr=3e-4"] where every text may
        begin with `--config.`.

    Raises:
      ConfigError: a text without `=`, an empty key, the same key twice, or both a key and a part
        of it.
    """
    if isinstance(overrides, Mapping):
        pairs = [(str(key), value) for key, value in overrides.items()]
    else:
        pairs = [_split(text) for text in overrides]
    result: dict[tuple[str, ...], Any] = {}
    for key, value in pairs:
        keys = tuple(key.split("."))
        if not all(keys):
            raise ConfigError(f"the override {key!r} has an empty part; write a.b=value")
        if keys in result:
            raise ConfigError(
                f"--config.{key} is given twice: {result[keys]!r} and {value!r}; keep one"
            )
        result[keys] = value
    for keys in result:
        for end in range(1, len(keys)):
            if keys[:end] in result:
                raise ConfigError(
                    f"--config.{'.'.join(keys[:end])} sets the whole and --config."
                    f"{'.'.join(keys)} a part of it; write the part inside the whole"
                )
    return result


def apply_overrides(
    tree: Mapping[str, Any],
    overrides: Mapping[str, Any] | Sequence[str],
    schema: Any = None,
) -> dict[str, Any]:
    """Returns a copy of `tree` with the overrides written into it.

    Text values are parsed as Python or JSON literals (`parse_literal`), and by the type of the
    field where the schema is given. Elements of a sequence are set by index. With the schema, an
    override may also reach into a default sequence or mapping that the file leaves out.

    Raises:
      ConfigError: an override contradicts another or has nowhere to go.
    """
    parsed = parse_overrides(overrides)
    from_text = not isinstance(overrides, Mapping)
    result = _mutable(plain(tree))
    # Names first, outer before inner: the type of `optimizer.b1` depends on `optimizer.name`.
    for keys in sorted(parsed, key=lambda keys: (keys[-1] != "name", len(keys), keys)):
        value = parsed[keys]
        hint = None
        if schema is not None:
            hint = _materialize(schema, result, keys)
        if from_text:
            value = parse_literal(value) if hint is None else parse_typed(value, hint)
        _set(result, keys, _mutable(plain(value)))
    return result


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.removeprefix("--config.").partition("=")
    if not equals:
        raise ConfigError(f"the override {text!r} has no value; write --config.{key}=VALUE")
    return key.strip(), value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(child) for child in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def _mutable(value: Any) -> Any:
    """Returns a deep copy with lists for tuples, so that elements can be set by index."""
    if isinstance(value, dict):
        return {key: _mutable(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mutable(child) for child in value]
    return value if dataclasses.is_dataclass(value) else copy.deepcopy(value)


def _set(tree: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    node: Any = tree
    for depth, key in enumerate(keys):
        path = ".".join(("config", *keys[:depth]))
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not (key.isascii() and key.isdigit()) or int(key) >= len(node):
                held = f"0 to {len(node) - 1}" if node else "none"
                raise ConfigError(
                    f"{path} is a sequence of {len(node)} elements (indices: {held}), so "
                    f"--config.{'.'.join(keys)} sets nothing; set the whole sequence instead"
                )
            at: Any = int(key)
            child = node[at]
        elif isinstance(node, dict):
            at = key
            child = node.get(key)
        else:
            raise ConfigError(
                f"{path} is {node!r}, which has no keys, so --config.{'.'.join(keys)} sets nothing"
            )
        if last:
            node[at] = value
            return
        if dataclasses.is_dataclass(child) and not isinstance(child, type):
            child = _mutable(to_dict(child))
        # None or absent: `resolve` says whether keys without a name can stand there.
        node[at] = {} if child is None else child
        node = node[at]


def _materialize(schema: Any, tree: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """Returns the type at `keys`, or None if there is none such.

    Default sequences and mappings on the way that the tree leaves out are written into the tree.
    """
    hint: Any = schema
    node: Any = tree
    default: Any = MISSING
    for depth, key in enumerate(keys):
        hint = keyed_member(hint)
        held = node if isinstance(node, dict) else None
        if dataclasses.is_dataclass(hint) or choice_kind(hint):
            cls = chosen_class(hint, held, default)
            if key == "name" and (cls is None or key not in field_types(cls)):
                return str
            if cls is None or key not in field_types(cls):
                return None
            named = choice_kind(hint) is not None and held is not None and "name" in held
            # A choice given by name starts from its class, whatever the default choice holds.
            if isinstance(default, cls) and not named:
                default = getattr(default, key)
            else:
                default = field_default(cls, key)
            hint = field_types(cls)[key]
            if held is not None and held.get(key) is None and depth < len(keys) - 1:
                whole = key not in held and _is_container(get_origin(keyed_member(hint)))
                held[key] = {}
                if whole and default is not MISSING and default is not None:
                    held[key] = _mutable(to_plain(default))
            node = held.get(key) if held is not None else None
            continue
        origin, arguments = get_origin(hint), get_args(hint)
        default = MISSING
        if origin is tuple and key.isdigit():
            index = int(key)
            variadic = len(arguments) == 2 and arguments[1] is ...
            if not variadic and index >= len(arguments):
                return None
            hint = arguments[0] if variadic else arguments[index]
            elements = node if isinstance(node, list) else []
            node = elements[index] if index < len(elements) else None
        elif _is_container(origin) and origin is not tuple:
            hint = arguments[1]
            node = held.get(key) if held is not None else None
        else:
            return None
    return hint


def _is_container(origin: Any) -> bool:
    return isinstance(origin, type) and (origin is tuple or issubclass(origin, Mapping))


def keyed_member(hint: Any) -> Any:
    """Returns the one member of a union that has keys or indices, or `hint` itself."""
    members = [
        member
        for member in union_members(hint)
        if dataclasses.is_dataclass(member)
        or choice_kind(member)
        or _is_container(get_origin(member))
    ]
    if len(members) == 1:
        return members[0]
    return hint if get_origin(hint) not in (Union, types.UnionType) else None


def chosen_class(hint: Any, node: Any, default: Any) -> type | None:
    """Returns the dataclass that a field of a configuration holds, or None if it is unknown.

    Args:
      hint: a dataclass or a choice.
      node: the mapping in the tree, or anything else if the tree has none.
      default: what the field holds when the tree leaves it out.
    """
    kind = choice_kind(hint)
    if kind is None:
        return hint
    if isinstance(node, Mapping) and "name" in node:
        return choices(kind).get(str(node["name"]))
    return type(default) if dataclasses.is_dataclass(default) else None
