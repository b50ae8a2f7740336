"""Checks of a schema for its tests: every misspelt key is refused, every field is explained."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from tokjax.config.describe import field_comments
from tokjax.config.overrides import chosen_class, keyed_member
from tokjax.config.schema import MISSING, choice_kind, choices, field_types, union_members
from tokjax.config.values import plain, resolve
from tokjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Misspelling:
    """A tree with one wrong key.

    Attributes:
      tree: the tree.
      path: dotted path of the wrong key, without the root.
      right: the key as the schema spells it.
    """

    tree: dict[str, Any]
    path: str
    right: str


def misspellings(schema: type, tree: Any) -> Iterator[Misspelling]:
    """Yields `tree` with one letter of one key changed, for every letter of every key in it.

    Keys of a `Mapping[str, X]` are the user's own and stay.

    Args:
      schema: a frozen dataclass.
      tree: a valid tree, best `to_dict` of a rich configuration, since only its keys are tried.
    """
    tree = plain(tree)
    for keys in list(_schema_keys(schema, tree, ())):
        right = str(keys[-1])
        for position in range(len(right)):
            letter = next(c for c in "xqz" if c != right[position])
            wrong = right[:position] + letter + right[position + 1 :]
            changed = copy.deepcopy(tree)
            node: Any = changed
            for key in keys[:-1]:
                node = node[key]
            if wrong in node:
                continue
            # Order is kept, so that a message cannot depend on where the key stands.
            items = [(wrong if key == right else key, value) for key, value in node.items()]
            node.clear()
            node.update(items)
            path = ".".join(map(str, (*keys[:-1], wrong)))
            yield Misspelling(changed, path, right)


def check_misspellings(schema: type, tree: Any) -> int:
    """Returns how many misspellings were tried; all were refused at the right place.

    Raises:
      AssertionError: a misspelt key was accepted, or the message does not help.
    """
    count = 0
    for case in misspellings(schema, tree):
        count += 1
        try:
            resolve(schema, case.tree)
        except ConfigError as error:
            message = str(error)
        else:
            raise AssertionError(f"{case.path} was accepted in place of {case.right!r}")
        parent, _, wrong = case.path.rpartition(".")
        if wrong not in message or parent not in message:
            raise AssertionError(f"{case.path} is not named in: {message}")
        if repr(case.right) not in message:
            raise AssertionError(f"{case.right!r} is not suggested for {case.path} in: {message}")
    return count


def undocumented(schema: type) -> list[str]:
    """Returns "Class.field" for every field without a comment, through all choices, sorted."""
    missing = []
    for cls in _classes(schema, set()):
        comments = field_comments(cls)
        missing += [f"{cls.__qualname__}.{f}" for f in field_types(cls) if not comments.get(f)]
    return sorted(missing)


def _schema_keys(hint: Any, node: Any, keys: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yields the path of every key in `node` that the schema, not the user, has named."""
    hint = keyed_member(hint)
    if dataclasses.is_dataclass(hint) or choice_kind(hint):
        if not isinstance(node, Mapping):
            return
        cls = chosen_class(hint, node, MISSING)
        for key, child in node.items():
            yield (*keys, key)
            if cls is not None and key in field_types(cls):
                yield from _schema_keys(field_types(cls)[key], child, (*keys, key))
        return
    arguments = get_args(hint)
    if get_origin(hint) is tuple and isinstance(node, (list, tuple)):
        for i, child in enumerate(node):
            element = arguments[0] if arguments[-1] is ... else arguments[i]
            yield from _schema_keys(element, child, (*keys, i))
    elif len(arguments) == 2 and isinstance(node, Mapping):
        for key, child in node.items():
            yield from _schema_keys(arguments[1], child, (*keys, key))


def _classes(hint: Any, seen: set[type]) -> Iterator[type]:
    for member in union_members(hint):
        kind = choice_kind(member)
        if kind is not None:
            for cls in choices(kind).values():
                yield from _classes(cls, seen)
        elif dataclasses.is_dataclass(member) and isinstance(member, type):
            if member not in seen:
                seen.add(member)
                yield member
                for child in field_types(member).values():
                    yield from _classes(child, seen)
        else:
            for argument in get_args(member):
                if argument is not ...:
                    yield from _classes(argument, seen)
