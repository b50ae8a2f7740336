"""The schema of a configuration: frozen dataclasses, and how a tree of plain values becomes one.

A schema is a frozen dataclass whose fields are bool, int, float, str, Literal, optional values,
tuples, mappings from str, other such dataclasses, or a *choice*: a dataclass picked by the key
`name` among those registered under one kind.

    @register("schedule", "cosine")
    @dataclass(frozen=True)
    class Cosine:
        decay_steps: int = 1000  # steps from the peak to the end value

    @dataclass(frozen=True)
    class Train:
        schedule: Annotated[Any, Choice("schedule")] = Cosine()

A dataclass with a field `base: str | None` and a classmethod `from_base(text)` may be given as that
text: what it returns replaces the defaults of the keys that are not set.

`resolve(Train, {"schedule": {"name": "cosine", "decay_steps": 10}})` is then a `Train`. Resolved
configurations are hashable, so they may be static arguments of a compiled function.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union

T = TypeVar("T")
MISSING = dataclasses.MISSING

_CHOICES: dict[str, dict[str, type]] = {}


@dataclasses.dataclass(frozen=True)
class Choice:
    """Marks a field as a choice: `Annotated[Any, Choice("optimizer")]`."""

    kind: str


def register(kind: str, name: str) -> Callable[[type[T]], type[T]]:
    """Returns a decorator that offers a frozen dataclass as choice `name` of `kind`.

    Raises:
      TypeError: the class is no frozen dataclass (decorators apply from the bottom up).
      ValueError: another class has this name already, or this class has another name.
    """

    def decorate(cls: type[T]) -> type[T]:
        parameters = getattr(cls, "__dataclass_params__", None)
        if parameters is None or not parameters.frozen:
            raise TypeError(f"{cls.__qualname__} must be a frozen dataclass to be registered")
        taken = _CHOICES.setdefault(kind, {}).get(name)
        if taken is not None and _identity(taken) != _identity(cls):
            raise ValueError(f"{kind} {name!r} is already {taken.__module__}.{taken.__qualname__}")
        known = registered_name(cls)
        if known is not None and known != name:
            raise ValueError(f"{cls.__qualname__} is already registered as {known!r}")
        _CHOICES[kind][name] = cls
        cls.__tokjax_choice__ = name  # type: ignore[attr-defined]
        return cls

    return decorate


def choices(kind: str) -> Mapping[str, type]:
    """Returns the registered dataclasses of a kind by name; only imported modules count."""
    return types.MappingProxyType(_CHOICES.get(kind, {}))


def registered_name(cls: type) -> str | None:
    """Returns the name a class was registered under, or None; a subclass does not inherit it."""
    return vars(cls).get("__tokjax_choice__")


def _identity(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__  # equal after a module was reloaded


class FrozenDict(dict):
    """A dict that cannot change and can therefore be hashed; `json.dumps` takes it as it is."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a resolved configuration cannot be changed")

    __setitem__ = __delitem__ = __ior__ = _refuse  # type: ignore[assignment]
    clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        # dict's own pickling fills through __setitem__, which is refused.
        return FrozenDict, (dict(self),)

    def __repr__(self) -> str:
        return f"FrozenDict({super().__repr__()})"


@functools.cache
def field_types(cls: type) -> Mapping[str, Any]:
    """Returns the type of every field that a configuration may set, by name."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def field_default(cls: type, name: str) -> Any:
    """Returns the default of a field, or `MISSING` when it is required."""
    field = cls.__dataclass_fields__[name]  # type: ignore[attr-defined]
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def choice_kind(hint: Any) -> str | None:
    """Returns the kind if `hint` is `Annotated[..., Choice(kind)]`, else None."""
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, Choice):
            return mark.kind
    return None


def union_members(hint: Any) -> tuple[Any, ...]:
    """Returns the members of `X | Y`, or `hint` alone; an annotation without Choice is removed."""
    if typing.get_origin(hint) is Annotated and choice_kind(hint) is None:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(member for part in typing.get_args(hint) for member in union_members(part))
    return (hint,)


def type_name(hint: Any) -> str:
    """Returns a type as a person writes it: `int | None`, `tuple[float, ...]`, `choice of x`."""
    members = union_members(hint)
    if len(members) > 1:
        return " | ".join(type_name(member) for member in members)
    hint = members[0]  # pyright: ignore[reportGeneralTypeIssues]
    if (kind := choice_kind(hint)) is not None:
        return f"choice of {kind}"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(repr(argument) for argument in arguments)
    if origin is tuple:
        return f"tuple[{', '.join('...' if a is ... else type_name(a) for a in arguments)}]"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping[{', '.join(type_name(a) for a in arguments)}]"
    if hint is type(None):
        return "None"
    return "any value" if hint is Any else getattr(hint, "__name__", str(hint))
