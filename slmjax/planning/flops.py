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
    """Return the FLOPs of the products and convolutions in `function(*arguments)`, without computing it.

    Arrays may be shapes. Of the branches of a conditional the most expensive counts.

    Raises:
      ValueError: products inside a `while` loop, whose number of rounds is not part of the program.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> float:
    return sum((_count_equation(equation) for equation in jaxpr.eqns), 0.0)


def _count_equation(equation: Any) -> float:
    name = equation.primitive.name
    parameters = equation.params
    if name == "dot_general":
        return _product(equation)
    if name == "ragged_dot_general":
        return _grouped_product(equation)
    if name == "conv_general_dilated":
        # Each output is a sum over the kernel without its output features.
        kernel = equation.invars[1].aval.shape
        out = equation.outvars[0].aval.shape
        features = kernel[parameters["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(out) * math.prod(kernel) / features
    if name == "scan":
        return parameters["length"] * _count(parameters["jaxpr"].jaxpr)
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in parameters["branches"])
    if name == "shard_map":
        # The program is that of one device, and the count is for all of them.
        return _count(parameters["jaxpr"]) * parameters["mesh"].size
    # Anything else counts as the programs inside it: jit, remat, custom derivatives.
    inner = sum(_count(_open(value)) for value in parameters.values() if _open(value) is not None)
    if name == "while" and inner:
        raise ValueError(
            "a while loop holds products, and how often it runs is not known: count its body, or write it as "
            "a scan"
        )
    return inner


def _open(value: Any) -> Any:
    """Return the program in a parameter of an operation, closed or open; None for anything else."""
    jaxpr = getattr(value, "jaxpr", value)
    return jaxpr if getattr(jaxpr, "eqns", None) is not None else None


def _product(equation: Any) -> float:
    (contracted, _), (batch, _) = equation.params["dimension_numbers"]
    left, right = (operand.aval.shape for operand in equation.invars)
    # Contracted and batch dims are part of both operands, and count once.
    shared = math.prod(left[dim] for dim in (*contracted, *batch))
    return 2.0 * math.prod(left) * math.prod(right) / max(shared, 1)


def _grouped_product(equation: Any) -> float:
    # Each row is multiplied with the matrix of its group alone, so the dim of groups does not count.
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    rows, matrices = (operand.aval.shape for operand in equation.invars[:2])
    counted = {*contracted, *batch, *numbers.rhs_group_dimensions}
    free = [size for dim, size in enumerate(matrices) if dim not in counted]
    return 2.0 * math.prod(rows) * math.prod(free)
