"""The operations of a traced function, counted from its jaxpr: nothing is compiled.

The compiler's own count has the body of a loop once; here it is multiplied by its trips.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

# One operation for each number that they return.
_ELEMENTWISE = frozenset(
    "add add_any cos cumlogsumexp cummax cumprod cumsum div erf exp exp2 expm1 integer_pow log log1p "
    "logistic max min mul neg pow rsqrt sin sqrt square sub tanh".split()
)
# One operation for each number that they take.
_REDUCING = frozenset("reduce_max reduce_min reduce_prod reduce_sum".split())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operations:
    """Floating-point operations of a function."""

    products: float = 0.0  # of matrix products and convolutions, two for each multiplication and addition
    elementwise: float = 0.0  # of all else


def count_operations(fn: Callable[..., Any], *args: Any) -> Operations:
    """Return the operations of `fn(*args)`, for arrays or shapes.

    A loop without a known length counts once.
    """
    return _counted(jax.make_jaxpr(fn)(*args).jaxpr)


def _counted(jaxpr: Any) -> Operations:
    products = 0.0
    elementwise = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        trips = equation.params["length"] if name == "scan" else 1
        inner = [_counted(sub) for sub in _jaxprs_of(equation)]
        products += trips * sum(operations.products for operations in inner)
        elementwise += trips * sum(operations.elementwise for operations in inner)
        if name == "dot_general":
            products += _product_operations(equation)
        elif name in _ELEMENTWISE:
            elementwise += sum(_size(variable) for variable in equation.outvars)
        elif name in _REDUCING:
            elementwise += sum(_size(variable) for variable in equation.invars)
    return Operations(products=products, elementwise=elementwise)


def _product_operations(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2.0 * _size(equation.outvars[0]) * math.prod(shape[dim] for dim in contracted)


def _size(variable: Any) -> int:
    return math.prod(getattr(variable.aval, "shape", ()))


def _jaxprs_of(equation: Any) -> Iterator[Any]:
    """Yield the functions that an operation calls: bodies of loops, functions with custom gradients."""
    for name, value in equation.params.items():
        # Of a custom gradient only the function itself: its rules would be counted besides.
        if name in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun"):
            continue
        branches = value if isinstance(value, tuple | list) else (value,)
        for branch in branches:
            # A closed jaxpr holds the open one.
            jaxpr = branch.jaxpr if isinstance(branch, core.ClosedJaxpr) else branch
            if isinstance(jaxpr, core.Jaxpr):
                yield jaxpr
