"""A configuration explained: every key with its type, value, default and the schema's comment.

The comments are those of the source, behind a field or in the lines directly above it, so the
documentation of a key and its definition are one text.
"""

import ast
import dataclasses
import functools
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from tokjax.config.overrides import chosen_class, keyed_member
from tokjax.config.schema import (
    MISSING,
    choice_kind,
    choices,
    field_default,
    field_types,
    registered_name,
    type_name,
)
from tokjax.config.values import plain, to_plain


@dataclasses.dataclass(frozen=True)
class FieldDoc:
    """One key of a configuration.

    Attributes:
      path: dotted key, without the root.
      type: the type as a person writes it.
      value: the value in the given tree, plain; `MISSING` for a parent of further keys and for a
        required key that is not set.
      default: the value when the tree leaves the key out, plain; `MISSING` where there is none.
      comment: the comment of the field in the source, "" if it has none.
      is_set: whether the tree sets the key.
      required: whether the key has no default and the tree does not set it.
    """

    path: str
    type: str
    value: Any
    default: Any
    comment: str
    is_set: bool
    required: bool = False


@functools.cache
def field_comments(cls: type) -> Mapping[str, str]:
    """Returns the source comment of every field of a dataclass, inherited ones included.

    Classes without source, as those typed at a prompt, have none.
    """
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            comments.update(_own_comments(base))
    return comments


def describe(schema: type, tree: Any = None) -> list[FieldDoc]:
    """Returns one entry a key, parents before children, in the order of the schema.

    Args:
      schema: a frozen dataclass.
      tree: plain values that need not be valid: wrong ones are shown as they are.
    """
    return list(_walk(schema, plain(tree) if tree is not None else {}, MISSING, ""))


def render(docs: list[FieldDoc], width: int = 100) -> str:
    """Returns the entries as text: `--config.key=value`, then type, default and comment."""
    lines = []
    for doc in docs:
        left = f"--config.{doc.path}"
        if doc.value is not MISSING:
            left += f"={_shown(doc.value)}"
        notes = [doc.type]
        known = doc.value is not MISSING and doc.default is not MISSING
        if known and doc.is_set and doc.default != doc.value:
            notes.append(f"default {_shown(doc.default)}")
        elif doc.required:
            notes.append("required and not set")
        text = f"({', '.join(notes)})" + (f" {doc.comment}" if doc.comment else "")
        lines.append("  " + left)
        lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _own_comments(cls: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
        body = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}
    lines = source.splitlines()
    found: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = token.string.lstrip("#").strip()
    result = {}
    for node in getattr(body, "body", []):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above = []
        line = node.lineno - 1
        while line in found and lines[line - 1].lstrip().startswith("#"):
            above.insert(0, found[line])
            line -= 1
        end = node.end_lineno or node.lineno
        behind = [found[n] for n in range(node.lineno, end + 1) if n in found]
        result[node.target.id] = " ".join(above + behind)
    return result


def _walk(cls: type, tree: Any, default: Any, prefix: str) -> Iterator[FieldDoc]:
    """Yields the keys of a dataclass; `default` is an instance that holds its defaults, if any."""
    tree = tree if isinstance(tree, Mapping) else {}
    comments = field_comments(cls)
    for name, hint in field_types(cls).items():
        fallback = getattr(default, name) if isinstance(default, cls) else field_default(cls, name)
        given = tree.get(name, MISSING)
        yield from _entry(hint, given, fallback, prefix + name, comments.get(name, ""))


def _entry(hint: Any, given: Any, fallback: Any, path: str, comment: str) -> Iterator[FieldDoc]:
    is_set = given is not MISSING
    held = to_plain(given if is_set else fallback)
    inner = keyed_member(hint)
    shown_type = _type_text(hint, inner)
    if (dataclasses.is_dataclass(inner) or choice_kind(inner)) and isinstance(held, Mapping):
        cls = chosen_class(inner, given, fallback)
        name = registered_name(cls) if cls is not None else held.get("name", MISSING)
        named = choice_kind(inner) is not None
        yield FieldDoc(
            path + (".name" if named else ""),
            shown_type,
            (MISSING if name is None else name) if named else MISSING,
            _name_of(fallback) if named else MISSING,
            comment,
            is_set,
        )
        if cls is not None:
            fresh = named and isinstance(given, Mapping) and "name" in given
            yield from _walk(cls, given, MISSING if fresh else fallback, f"{path}.")
        return
    children = list(_children(inner, held))
    if children:
        yield FieldDoc(path, shown_type, MISSING, MISSING, comment, is_set)
        for key, child_hint, child in children:
            yield from _entry(child_hint, child, MISSING, f"{path}.{key}", "")
        return
    default = MISSING if fallback is MISSING else to_plain(fallback)
    yield FieldDoc(path, shown_type, held, default, comment, is_set, held is MISSING)


def _children(hint: Any, held: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yields (key, type, value) of a sequence or mapping whose elements have keys."""
    arguments = get_args(hint)
    if get_origin(hint) is tuple and isinstance(held, list) and arguments:
        for i, child in enumerate(held):
            element = (
                arguments[0] if arguments[-1] is ... else arguments[min(i, len(arguments) - 1)]
            )
            if _has_keys(element):
                yield str(i), element, child
    elif isinstance(held, Mapping) and len(arguments) == 2 and _has_keys(arguments[1]):
        for key, child in held.items():
            yield key, arguments[1], child


def _has_keys(hint: Any) -> bool:
    inner = keyed_member(hint)
    return dataclasses.is_dataclass(inner) or choice_kind(inner) is not None


def _name_of(value: Any) -> Any:
    name = registered_name(type(value)) if dataclasses.is_dataclass(value) else None
    return MISSING if name is None else name


def _type_text(hint: Any, inner: Any) -> str:
    text = type_name(hint)
    kind = choice_kind(inner)
    return f"{text}: {', '.join(sorted(choices(kind)))}" if kind else text
