"""FLOPs of a function, counted from its program: loops count as often as they run.

    count(lambda x, w: x @ w, x, w)          # 2 * M * K * N

XLA's own cost analysis counts the body of a loop once, which would call anything linear that is written as a
loop. Products count, with two operations for each pair of factors; elementwise operations, which are few
next to them, do not.
"""

import math
from collections.abc import Callable
from typing import Any

import jax


def count(function: Callable[..., Any], *arguments: Any) -> float:
    """FLOPs of the matrix products and convolutions in `function(*arguments)`; arrays may be shapes. Nothing
    is computed.

    Of the branches of a conditional the most expensive counts.

    Raises:
      ValueError: products inside a `while` loop, whose number of rounds the program does not say.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> float:
    return sum((_count_equation(equation) for equation in jaxpr.eqns), 0.0)


def _count_equation(equation: Any) -> float:
    name = equation.primitive.name
    parameters = equation.params
    if name == "dot_general":
        return _product(equation)
    if name == "ragged_dot_general" or name == "ragged_dot":
        rows, matrices = (operand.aval.shape for operand in equation.invars[:2])
        return 2.0 * math.prod(rows) * matrices[-1]  # each row with the matrix of its group
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out = equation.outvars[0].aval.shape
        features = kernel[parameters["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(out) * math.prod(kernel) / features
    if name == "scan":
        return parameters["length"] * _count(parameters["jaxpr"].jaxpr)
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in parameters["branches"])
    if name == "shard_map":
        return _count(parameters["jaxpr"]) * parameters["mesh"].size
    inner = sum(_count(_open(value)) for value in parameters.values() if _open(value) is not None)
    if name == "while" and inner:
        raise ValueError(
            "a while loop holds products, and how often it runs is not known: count its body, or write it as "
            "a scan"
        )
    return inner


def _open(value: Any) -> Any:
    """The program in a parameter of an operation, closed or open; None for anything else."""
    found = getattr(value, "jaxpr", value)
    return found if getattr(found, "eqns", None) is not None else None


def _product(equation: Any) -> float:
    (contracted, _), (batch, _) = equation.params["dimension_numbers"]
    left, right = (operand.aval.shape for operand in equation.invars)
    shared = math.prod(left[dim] for dim in (*contracted, *batch))
    return 2.0 * math.prod(left) * math.prod(right) / max(shared, 1)
