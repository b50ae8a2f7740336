"""JSON schemas as regular expressions: every text that one matches is valid by its schema.

Not every valid text is matched: properties come in the schema's order, properties beyond it are
not written, blanks are few, and what refers to itself goes a few levels deep. A keyword that is
neither understood nor a mere remark is an error, because the text might break it.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokjax.decoding.constrained.automaton import Automaton, TokenTable
from tokjax.decoding.constrained.integers import integer_range
from tokjax.decoding.constrained.regex import byte_automaton, compiled
from tokjax.errors import ConfigError, nearest

Pattern = str | None  # None where no text is valid

_REMARKS = frozenset(
    ("$schema", "$id", "$anchor", "$comment", "$defs", "definitions", "title", "description")
) | frozenset(("default", "examples", "example", "deprecated", "readOnly", "writeOnly"))
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_KEYWORDS: Mapping[str, tuple[str, ...]] = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "integer": _BOUNDS,
    "number": _BOUNDS,
    "boolean": (),
    "null": (),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties", "maxProperties"),
}
_CHARACTER = r'(?:[^"\\\x00-\x1f\x7f-\x9f]|\\["\\/bfnrt])'
_NATURAL = r"(?:0|[1-9][0-9]*)"
_REST_OF_NUMBER = r"(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?"
_DATE = r"[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"  # valid in every month
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:0[0-9]|1[0-2]):00)"
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "email": r"[A-Za-z0-9]+(?:[._+-][A-Za-z0-9]+)*@(?:[a-z0-9]+(?:-[a-z0-9]+)*\.)+[a-z]{2,10}",
}
_ANY_DEPTH = 2


def json_schema(
    schema: Mapping[str, Any] | bool | str,
    table: TokenTable,
    *,
    blank: str = "[ ]?",
    depth: int = 3,
) -> Automaton:
    """Returns the automaton of JSON texts that are valid by a schema.

    Args:
        schema: the schema, or its JSON text. Understood are: type, enum, const, anyOf, oneOf (as
            anyOf: that only one holds is not seen to), allOf of one, $ref within the schema;
            minLength, maxLength, pattern (of the whole string), format of strings; minimum,
            maximum and the exclusive ones of integers, minimum 0 of numbers; items, prefixItems,
            minItems, maxItems; properties, required, additionalProperties, maxProperties.
        table: of the vocabulary, `TokenTable.of(tokenizer)`.
        blank: a regular expression of the blanks between parts.
        depth: how often a definition may occur within itself.

    Raises:
        ConfigError: the schema is no JSON, says what is not understood, or allows nothing; the
            vocabulary can write no such text, or it needs too large a table; the extra
            `constrained` is not installed.
    """
    pattern = schema_regex(schema, blank=blank, depth=depth)
    return compiled("the JSON schema", pattern, table)


def schema_regex(
    schema: Mapping[str, Any] | bool | str, *, blank: str = "[ ]?", depth: int = 3
) -> str:
    """Returns a regular expression of JSON texts that are valid by a schema; see `json_schema`."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise ConfigError(f"the JSON schema is no valid JSON: {error}") from None
    pattern = _Writer(schema, blank, depth).value(schema, "#", ())
    if pattern is None:
        raise ConfigError("the JSON schema allows no text")
    return pattern


@dataclass(frozen=True)
class _Writer:
    """Writes the pattern of each part of a schema; `where` is its place, `open` the references
    that lead to it.
    """

    root: Any
    blank: str
    depth: int

    def value(self, schema: Any, where: str, open: tuple[str, ...]) -> Pattern:
        if schema is False:
            return None
        if schema is True:
            return self.anything(_ANY_DEPTH)
        if not isinstance(schema, Mapping):
            raise ConfigError(f"JSON schema {where}: {schema!r} must be an object or a boolean")
        given = {key: v for key, v in schema.items() if key not in _REMARKS}
        if not given:
            return self.anything(_ANY_DEPTH)
        for key in ("$ref", "anyOf", "oneOf", "allOf"):
            if key in given:
                self.alone(given, key, where)
                return self.combined(key, given[key], f"{where}/{key}", open)
        if "enum" in given or "const" in given:
            return self.constant(given, where)
        return self.typed(given, where, open)

    def alone(self, given: Mapping[str, Any], key: str, where: str) -> None:
        others = sorted(set(given) - {key})
        if others:
            raise ConfigError(
                f"JSON schema {where}: {key} beside {', '.join(others)} is not understood: write "
                f"what holds for each alternative into it"
            )

    def combined(self, key: str, given: Any, where: str, open: tuple[str, ...]) -> Pattern:
        if key == "$ref":
            if open.count(given) > self.depth:
                return None
            return self.value(self.resolved(given, where), str(given), (*open, given))
        if not isinstance(given, list) or not given:
            raise ConfigError(f"JSON schema {where}: must be a list of one or more schemas")
        if key == "allOf" and len(given) > 1:
            raise ConfigError(
                f"JSON schema {where}: allOf of several is not understood: merge them"
            )
        return _any_of([self.value(s, f"{where}/{i}", open) for i, s in enumerate(given)])

    def resolved(self, reference: Any, where: str) -> Any:
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise ConfigError(
                f"JSON schema {where}: {reference!r} must begin with '#': only what is in the "
                f"schema itself can be referred to"
            )
        found = self.root
        for part in reference[1:].split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or part not in found:
                raise ConfigError(f"JSON schema {where}: there is no {reference!r} in the schema")
            found = found[part]
        return found

    def constant(self, given: Mapping[str, Any], where: str) -> Pattern:
        others = sorted(set(given) - {"enum", "const", "type"})
        if others:
            raise ConfigError(
                f"JSON schema {where}: {others[0]} beside enum or const: leave it out"
            )
        values = [given["const"]] if "const" in given else given["enum"]
        if not isinstance(values, list):
            raise ConfigError(f"JSON schema {where}: enum={values!r} must be a list")
        types = _types(given, where)
        return _any_of([_literal(v) for v in values if any(_is(v, t) for t in types)])

    def typed(self, given: Mapping[str, Any], where: str, open: tuple[str, ...]) -> Pattern:
        types = _types(given, where)
        if "type" not in given:  # the keywords say of which type it is
            types = [t for t in types if t != "number" and set(given) & set(_KEYWORDS[t])]
            if len(types) > 1:
                raise ConfigError(f"JSON schema {where}: say which type this is of")
        known = {key for t in types for key in _KEYWORDS[t]} | {"type"}
        for key in given:
            if key not in known:
                every = {key for keys in _KEYWORDS.values() for key in keys}
                raise ConfigError(
                    f"JSON schema {where}: {key!r} is not understood here, so that a text might "
                    f"break it: leave it out to do without.{nearest(key, every)}"
                )
        makers: dict[str, Callable[..., Pattern]] = {
            "string": self.string,
            "integer": self.integer,
            "number": self.number,
            "array": self.array,
            "object": self.object,
            "boolean": lambda *_: "(?:true|false)",
            "null": lambda *_: "null",
        }
        return _any_of([makers[t](given, where, open) for t in types])

    def anything(self, depth: int) -> str:
        number = f"-?{_NATURAL}{_REST_OF_NUMBER}"
        parts = [f'"{_CHARACTER}*"', number, "true", "false", "null"]
        if depth:
            inner, key = self.anything(depth - 1), f'"{_CHARACTER}*"'
            parts.append(self.brackets("[", self.repeated(inner, 0, None), "]"))
            entry = f"{key}{self.blank}:{self.blank}{inner}"
            parts.append(self.brackets("{", self.repeated(entry, 0, None), "}"))
        return f"(?:{'|'.join(parts)})"

    def string(self, given: Mapping[str, Any], where: str, open: tuple[str, ...]) -> Pattern:
        own = [key for key in _KEYWORDS["string"] if key in given]
        pattern, form = given.get("pattern"), given.get("format")
        if (pattern is not None or form is not None) and len(own) > 1:
            raise ConfigError(
                f"JSON schema {where}: {' and '.join(own)} together are not understood: say all of "
                f"it by a pattern"
            )
        if pattern is not None:
            return f'"{_string_pattern(pattern, where)}"'
        if form is not None:
            if form not in _FORMATS:
                raise ConfigError(f"JSON schema {where}: format {form!r}.{nearest(form, _FORMATS)}")
            return f'"{_FORMATS[form]}"'
        low, high = _counts(given, "minLength", "maxLength", where)
        if high is not None and low > high:
            return None
        return f'"{_CHARACTER}{_times(low, high)}"'

    def integer(self, given: Mapping[str, Any], where: str, open: tuple[str, ...]) -> Pattern:
        bounds = {key: given[key] for key in _BOUNDS if key in given}
        _check_numbers(bounds, where)
        lows = [math.ceil(bounds[k]) for k in ("minimum",) if k in bounds]
        lows += [math.floor(bounds[k]) + 1 for k in ("exclusiveMinimum",) if k in bounds]
        highs = [math.floor(bounds[k]) for k in ("maximum",) if k in bounds]
        highs += [math.ceil(bounds[k]) - 1 for k in ("exclusiveMaximum",) if k in bounds]
        return integer_range(max(lows, default=None), min(highs, default=None))

    def number(self, given: Mapping[str, Any], where: str, open: tuple[str, ...]) -> Pattern:
        bounds = {key: given[key] for key in _BOUNDS if key in given}
        if bounds not in ({}, {"minimum": 0}):
            raise ConfigError(
                f"JSON schema {where}: {', '.join(bounds)} of a number: only minimum=0 is "
                f"understood; integers may have any bounds"
            )
        return f"{'' if bounds else '-?'}{_NATURAL}{_REST_OF_NUMBER}"

    def array(self, given: Mapping[str, Any], where: str, open: tuple[str, ...]) -> Pattern:
        first = given.get("prefixItems", [])
        if not isinstance(first, list):
            raise ConfigError(f"JSON schema {where}/prefixItems: must be a list")
        # Behind the first ones nothing more is written unless the schema says what.
        further = given.get("items", not first)
        low, high = _counts(given, "minItems", "maxItems", where)
        parts = [
            self.value(s, f"{where}/prefixItems/{i}", open) for i, s in enumerate(first[:high])
        ]
        item = self.value(further, f"{where}/items", open)
        rest = max(0, low - len(parts))
        room = None if high is None else high - len(parts)
        if None in parts or (room is not None and rest > room):
            return None
        if item is None:
            if rest:
                return None
            return self.brackets("[", self.comma.join(map(str, parts)), "]")
        if not parts:
            return self.brackets("[", self.repeated(item, rest, room), "]")
        more = f"(?:{self.comma}{item}){_times(rest, room)}"
        return self.brackets("[", self.comma.join(map(str, parts)) + more, "]")

    def object(self, given: Mapping[str, Any], where: str, open: tuple[str, ...]) -> Pattern:
        properties, extra = given.get("properties", {}), given.get("additionalProperties", True)
        required = given.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise ConfigError(f"JSON schema {where}: properties must be an object, required a list")
        _, most = _counts(given, "minProperties", "maxProperties", where)
        if not properties and not required:
            inner = self.value(extra, f"{where}/additionalProperties", open)
            if inner is None:
                return self.brackets("{", "", "}")
            entry = f'"{_CHARACTER}*"{self.blank}:{self.blank}{inner}'
            return self.brackets("{", self.repeated(entry, 0, most), "}")
        named = {**properties, **{name: extra for name in required if name not in properties}}
        if most is not None and most < len(named):
            raise ConfigError(f"JSON schema {where}: maxProperties below the properties' number")
        entries = []
        for name, schema in named.items():
            inner = self.value(schema, f"{where}/properties/{name}", open)
            if inner is None:
                if name in required:
                    return None
                continue
            entries.append((f"{_literal(name)}{self.blank}:{self.blank}{inner}", name in required))
        return self.brackets("{", self.entries(entries), "}")

    def entries(self, entries: list[tuple[str, bool]]) -> str:
        """Returns entries in their order; those that are not required may be left out."""
        behind, first = "", ""  # what may follow an entry, and what the rest is without one
        for entry, needed in reversed(entries):
            begun = entry + behind
            first = begun if needed else f"(?:{begun}|{first})" if first else f"(?:{begun})?"
            behind = (f"{self.comma}{entry}" if needed else f"(?:{self.comma}{entry})?") + behind
        return first

    @property
    def comma(self) -> str:
        return f"{self.blank},{self.blank}"

    def repeated(self, item: str, low: int, high: int | None) -> str:
        if high == 0:
            return ""
        more = _times(max(0, low - 1), None if high is None else high - 1)
        several = f"{item}(?:{self.comma}{item}){more}"
        return several if low else f"(?:{several})?"

    def brackets(self, start: str, inner: str, end: str) -> str:
        # Nothing between them: one blank, not two.
        middle = f"{self.blank}{inner}{self.blank}" if inner else self.blank
        return f"\\{start}{middle}\\{end}"


def _any_of(patterns: list[Pattern]) -> Pattern:
    possible = list(dict.fromkeys(p for p in patterns if p is not None))
    if len(possible) < 2:
        return possible[0] if possible else None
    return f"(?:{'|'.join(possible)})"


def _literal(value: Any) -> str:
    return re.escape(json.dumps(value, ensure_ascii=False))


def _types(given: Mapping[str, Any], where: str) -> list[str]:
    types = given.get("type", list(_KEYWORDS))
    types = [types] if isinstance(types, str) else types
    for name in types if isinstance(types, list) else [types]:
        if name not in _KEYWORDS:
            raise ConfigError(f"JSON schema {where}: type {name!r}.{nearest(str(name), _KEYWORDS)}")
    return types


def _is(value: Any, type_name: str) -> bool:
    if isinstance(value, bool) or value is None:
        return type_name == ("null" if value is None else "boolean")
    if isinstance(value, int | float):
        return type_name == "number" or (type_name == "integer" and value == int(value))
    kinds = {"string": str, "array": list, "object": Mapping}
    return type_name in kinds and isinstance(value, kinds[type_name])


def _counts(given: Mapping[str, Any], least: str, most: str, where: str) -> tuple[int, int | None]:
    for key in (least, most):
        if key in given and not (_is(given[key], "integer") and given[key] >= 0):
            raise ConfigError(f"JSON schema {where}: {key}={given[key]!r} must be 0 or above")
    return int(given.get(least, 0)), int(given[most]) if most in given else None


def _check_numbers(bounds: Mapping[str, Any], where: str) -> None:
    for key, value in bounds.items():
        if not _is(value, "number") or not math.isfinite(value):
            raise ConfigError(f"JSON schema {where}: {key}={value!r} must be a number")


def _times(low: int, high: int | None) -> str:
    if high is None:
        return "*" if low == 0 else f"{{{low},}}"
    return f"{{{low},{high}}}"


@functools.lru_cache(maxsize=64)
def _string_pattern(pattern: str, where: str) -> str:
    """Returns what a string's pattern allows of the whole string.

    Anchors at its ends say no more than that; one that has none holds for a part of the string,
    and so for the whole.
    """
    inner = pattern.removeprefix("^")
    if inner.endswith("$") and not inner.endswith("\\$"):
        inner = inner[:-1]
    table = byte_automaton(inner).next
    unwritten = [*range(0x20), ord('"'), ord("\\")]
    if (table[:, unwritten] >= 0).any():
        raise ConfigError(
            f"JSON schema {where}: the pattern {pattern!r} allows quotes, backslashes or control "
            f"characters, which a JSON string holds only in another form: exclude them, as in "
            f'[^"\\\\\\x00-\\x1f] for the dot'
        )
    return f"(?:{inner})"
