"""Operations of a program, counted in the program itself rather than by a model's formula."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def matmul_flops(fn: Callable, *args: Any) -> float:
    """Returns the operations of all matrix products that `fn(*args)` executes.

    The program is traced, not run: two operations for every multiplication of two numbers, the body
    of a scan counted as often as it runs, of a condition the costliest branch. This is what a
    compiler's cost analysis leaves out, which counts the body of a loop once. Element-wise work
    is not counted.

    Args:
        fn: any function that can be traced.
        args: arrays or shapes of arrays.

    Raises:
        ValueError: products inside a loop whose length only its values tell.

    >>> import jax.numpy as jnp
    >>> matmul_flops(lambda a, b: a @ b, jnp.ones((2, 3)), jnp.ones((3, 5)))
    60.0
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: Any) -> float:
    return float(sum(_of_equation(equation) for equation in jaxpr.eqns))


def _of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
    inner = [_count(jaxpr) for jaxpr in _inner(params)]
    if name == "cond":
        return max(inner)
    if name == "while" and sum(inner):
        raise ValueError("matrix products in a while loop: how often it runs is not known")
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the programs among the parameters of an operation."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)  # a closed program holds an open one
            if hasattr(item, "eqns"):
                yield item
