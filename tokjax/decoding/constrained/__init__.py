"""Constrained decoding: regular expressions, JSON schemas and choices as automata over tokens."""

from tokjax.decoding.constrained.automaton import Automaton, TokenTable
from tokjax.decoding.constrained.choices import choices
from tokjax.decoding.constrained.json_schema import json_schema, schema_regex
from tokjax.decoding.constrained.matches import match_logprobs, matches
from tokjax.decoding.constrained.regex import regex
from tokjax.decoding.constrained.transform import constrained

__all__ = [
    "Automaton",
    "TokenTable",
    "choices",
    "constrained",
    "json_schema",
    "match_logprobs",
    "matches",
    "regex",
    "schema_regex",
]
