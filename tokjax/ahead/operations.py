"""The floating-point operations of a traced function, loops and recomputation included."""

import math
from typing import Any

from jax.extend import core


def operations(jaxpr: Any) -> float:
    """Returns the operations of all matrix products of a traced function, over all devices.

    Two for each product of numbers. A scan counts as often as it runs; of the branches of a
    condition the costliest counts; a `while` loop, whose length nobody knows, counts once. A Pallas
    kernel counts for every point of its grid, those included that it leaves out as it runs.

    Args:
        jaxpr: what `jax.make_jaxpr` returns, or one inside another.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_of_equation(each) for each in jaxpr.eqns)


def _of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        depth = math.prod(shape[axis] for axis in contracted)
        return 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / outputs
    if name == "cond":
        return max(operations(branch) for branch in params["branches"])
    inner = sum(operations(each) for each in _inner(params))
    if name == "scan":
        return inner * params["length"]
    if name == "pallas_call":
        return inner * math.prod(params["grid_mapping"].grid)
    if name == "shard_map":  # its body is what one device does
        return inner * math.prod(dict(params["mesh"].shape).values())
    return inner


def _inner(params: dict[str, Any]) -> list[Any]:
    """Returns the functions that an equation calls."""
    found = []
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.ClosedJaxpr | core.Jaxpr):
                found.append(each)
    return found
