"""Configuration: a schema of frozen dataclasses, files that fill it, and a command line over both.

`load` reads a config file and its overrides into a locked ConfigDict; `resolve` turns that into
the schema's frozen dataclasses or says everything that is wrong with it.
"""

from tokjax.config.files import load
from tokjax.config.schema import (
    Choice,
    FrozenDict,
    choices,
    field_types,
    register,
    registered_name,
)
from tokjax.config.values import defaults_of, diff, plain, resolve, to_dict

__all__ = [
    "Choice",
    "FrozenDict",
    "choices",
    "defaults_of",
    "diff",
    "field_types",
    "load",
    "plain",
    "register",
    "registered_name",
    "resolve",
    "to_dict",
]
