import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.decoding.constrained import json_schema, schema_regex
from tokjax.decoding.constrained.integers import integer_range
from tokjax.decoding.constrained.regex import byte_automaton
from tokjax.errors import ConfigError

pytest.importorskip("outlines_core", reason="the extra 'constrained' is not installed")

PERSON = {
    "type": "object",
    "title": "a remark",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 3},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "tags"],
}


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        (
            PERSON,
            ['{"name":"x","tags":[]}', '{ "name": "\u65e5\\n", "age": 130, "tags": ["a", "b"] }'],
            ['{"name":"","tags":[]}', '{"name":"x"}', '{"name":"x","age":131,"tags":[]}', "{}"],
        ),
        ({"type": "string"}, ['""', '"a\\"b"', '"\U0001f600"'], ['"a"b"', '"\n"', "a", '"\\"']),
        ({"type": "string", "pattern": "^[a-c]+$"}, ['"abc"'], ['""', '"d"']),
        ({"type": "string", "pattern": "a|bc"}, ['"a"', '"bc"'], ['"ac"']),
        ({"type": "string", "format": "date"}, ['"2024-02-28"'], ['"2024-13-01"', '"2024-02-31"']),
        ({"type": "string", "format": "time"}, ['"23:59:59Z"'], ['"24:00:00Z"']),
        ({"type": "string", "format": "ipv4"}, ['"255.0.10.1"'], ['"256.0.0.1"']),
        ({"type": "string", "format": "email"}, ['"a.b@c.org"'], ['"a@b"', '".a@b.de"']),
        ({"type": "number"}, ["-1.5e-3", "0", "12"], ["01", ".5", "+1", "1."]),
        ({"type": "number", "minimum": 0}, ["0.5", "3"], ["-1"]),
        ({"type": "integer", "exclusiveMinimum": 1, "maximum": 9.5}, ["2", "9"], ["1", "10"]),
        ({"type": ["boolean", "null"]}, ["true", "null"], ["0"]),
        ({"enum": ["a.b", 1, None, {"k": [True]}]}, ['"a.b"', "1", '{"k": [true]}'], ['"axb"']),
        ({"type": "integer", "enum": ["a", 1, True]}, ["1"], ['"a"', "true"]),
        ({"const": 'say "hi"'}, ['"say \\"hi\\""'], ['"say"']),
        ({"type": "array", "items": {"type": "null"}, "minItems": 1}, ["[null]"], ["[]"]),
        ({"type": "array", "items": False}, ["[]", "[ ]"], ["[1]"]),
        (
            {"prefixItems": [{"const": 1}], "items": {"const": 2}, "maxItems": 3, "type": "array"},
            ["[1]", "[1, 2,2]"],
            ["[2]", "[]", "[1,2,2,2]"],
        ),
        ({"anyOf": [{"const": 1}, False, {"const": 2}]}, ["1", "2"], ["12"]),
        ({"allOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": {"const": 3}}}, ["3"], ["4"]),
        ({"properties": {'a"b': {"const": 1}}}, ['{"a\\"b": 1}', "{}"], ['{"a"b": 1}']),
        (
            {"properties": {k: {"const": 1} for k in "abc"}, "required": ["b"]},
            ['{"b":1}', '{"a":1,"b":1}', '{"b":1,"c":1}', '{"a":1,"b":1,"c":1}'],
            ['{"a":1}', '{"a":1"b":1}', '{,"b":1}', '{"b":1,}'],
        ),
        (
            {"properties": {k: {"const": 1} for k in "abc"}},
            ["{}", '{"c":1}', '{"a":1,"c":1}', '{"b":1}', '{"b":1,"c":1}'],
            ['{"c":1,"a":1}', "{,}"],
        ),
        ({"type": "object", "required": ["q"]}, ['{"q": [1, {"a": null}]}'], ["{}"]),
        (
            {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 1},
            ["{}", '{"x": 1}'],
            ['{"x": "1"}', '{"x": 1, "y": 2}'],
        ),
        ({}, ["1", "[]", '{"a": ["b"]}', "[[[]]]"[1:-1]], ["a", "[1,]", "{1:2}"]),
        (
            {
                "type": "object",
                "properties": {"next": {"$ref": "#"}},
                "additionalProperties": False,
            },
            ["{}", '{"next": {"next": {}}}'],
            ['{"next": 1}'],
        ),
    ],
)
def test_exactly_such_texts_are_matched(schema, valid, invalid):
    automaton = byte_automaton(schema_regex(schema))
    for text in valid:
        json.loads(text)
        assert automaton.matches(text.encode()), text
    for text in invalid:
        assert not automaton.matches(text.encode()), text
    assert schema_regex(json.dumps(schema)) == schema_regex(schema)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "no valid JSON"),
        ({"type": "strin"}, "#: type 'strin'.*'string'"),
        ({"type": "number", "multipleOf": 2}, "'multipleOf' is not understood"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems' is not understood"),
        ({"properties": {"a": {"type": "string", "maxLenght": 3}}}, "properties/a.*'maxLength'"),
        ({"type": "number", "maximum": 3}, "only minimum=0"),
        ({"type": "string", "pattern": "a.b"}, "quotes, backslashes or control"),
        ({"type": "string", "pattern": "["}, "cannot be used"),
        ({"type": "string", "pattern": "a", "minLength": 2}, "together are not understood"),
        ({"type": "string", "format": "hostname"}, "format 'hostname'"),
        ({"anyOf": [{}], "type": "string"}, "anyOf beside type"),
        ({"allOf": [{}, {}]}, "allOf of several"),
        ({"$ref": "other.json"}, "must begin with '#'"),
        ({"$ref": "#/$defs/x"}, "there is no '#/\\$defs/x'"),
        (False, "allows no text"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "allows no text"),
        ({"type": "string", "minLength": -1}, "minLength=-1"),
        ({"properties": {"n": {"$ref": "#"}}, "required": ["n"]}, "allows no text"),
        ({"maxLength": 3, "minimum": 1}, "say which type"),
        (3, "must be an object"),
    ],
)
def test_what_a_text_might_break_is_refused(schema, message):
    with pytest.raises(ConfigError, match=message):
        schema_regex(schema)


@given(st.integers(-2000, 2000), st.integers(-2000, 2000), st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_ranges_of_integers_are_exact(low, high, below, above):
    least, most = (None if below else low), (None if above else high)
    pattern = integer_range(least, most)
    near = {v + d for v in (low, high, 0, 9, 99, 999, -9, -99) for d in (-2, -1, 0, 1, 2)}
    for value in sorted(near | {10**6, -(10**6)}):
        inside = (least is None or value >= least) and (most is None or value <= most)
        assert bool(pattern and re.fullmatch(pattern, str(value))) is inside
    assert not (pattern and (re.fullmatch(pattern, "-0") or re.fullmatch(pattern, "007")))


def test_the_table_is_of_the_schema(by_bytes):
    automaton = json_schema(PERSON, by_bytes)
    assert automaton.matches(b'{"name":"x","tags":["a"]}')
    assert automaton.shortest == len('{"name":"x","tags":[]}')
    compact = json_schema(PERSON, by_bytes, blank="")
    assert not compact.matches(b'{"name": "x","tags":["a"]}')
