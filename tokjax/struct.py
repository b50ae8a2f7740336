"""Frozen dataclasses that are pytrees, told apart by their class.

Use these and not flax's: `flax.struct.dataclass` registers by `jax.tree_util.register_dataclass`,
and in jaxlib 0.10 the structures of two classes registered so compare equal when their fields do.
A compiled function's cache compares structures wherever hashes meet (about once in a hundred
programs), and then runs the program of the other class: a sampler that draws becomes one that does
not, without a word.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, dataclass_transform, overload

import jax

T = TypeVar("T")


def field(*, pytree_node: bool = True, **options: Any) -> Any:
    """Returns a field of a dataclass; see `dataclasses.field`.

    Args:
        pytree_node: whether it holds arrays; else it is part of the structure, hashable, and
            another value is another program.
        **options: of `dataclasses.field`.
    """
    return dataclasses.field(metadata={"pytree_node": pytree_node}, **options)


@overload
def dataclass(cls: type[T]) -> type[T]: ...
@overload
def dataclass(*, kw_only: bool = False) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(field_specifiers=(field, dataclasses.field), frozen_default=True)
def dataclass(cls: type[T] | None = None, *, kw_only: bool = False) -> Any:
    """Returns the class as a frozen dataclass and a pytree whose leaves are named by its fields.

    It has a method `replace(**changes)`, which returns a copy with other fields.
    """
    if cls is None:
        return lambda cls: _registered(cls, kw_only)
    return _registered(cls, kw_only)


def _registered(cls: type[T], kw_only: bool) -> type[T]:
    made: Any = dataclasses.dataclass(frozen=True, kw_only=kw_only)(cls)
    made.replace = dataclasses.replace
    fields = dataclasses.fields(made)
    nodes = tuple(f.name for f in fields if f.metadata.get("pytree_node", True))
    fixed = tuple(f.name for f in fields if f.name not in nodes)
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in nodes)

    def flatten(value: Any) -> tuple[tuple, tuple]:
        return (
            tuple(getattr(value, name) for name in nodes),
            tuple(getattr(value, name) for name in fixed),
        )

    def flatten_with_keys(value: Any) -> tuple[tuple, tuple]:
        leaves, structure = flatten(value)
        return tuple(zip(keys, leaves, strict=True)), structure

    def unflatten(structure: tuple, leaves: Iterable[Any]) -> Any:
        return made(
            **dict(zip(nodes, leaves, strict=True)), **dict(zip(fixed, structure, strict=True))
        )

    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    return made
