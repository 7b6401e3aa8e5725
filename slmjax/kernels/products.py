"""The product every linear layer is made of, and what else differs by platform in the layers and their
loop.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slmjax.kernels import cpu
from slmjax.kernels.choice import announce
from slmjax.parallel import mesh

MAX_UNROLLED_LAYERS = {"cpu": 8, "gpu": 32}


def matmul(x: Float[Array, "*B D"], weight: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """`x @ weight` in the dtype of `x`, to which the weight is cast, with float32 sums."""
    # On CPU leading dims are made one, as the gradient of that is faster; of rows that are divided in two of
    # their dims the compiler could only do so by gathering them.
    if mesh.platform() == "cpu" and x.dtype in (jnp.bfloat16, jnp.float32) and mesh.num_devices("time") == 1:
        announce("products on cpu: gradients written out")
        return cpu.matmul(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], -1)
    return jnp.dot(x, weight.astype(x.dtype))


def outer_sum(a: Float[Array, "M D"], b: Float[Array, "M F"]) -> Float[Array, "D F"]:
    """Sum over rows of the outer products of `a` and `b`, in float32: what the gradient of a weight is."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    if mesh.platform() == "cpu":
        return jax.lax.dot_general(
            cpu.transposed(a), b, (((1,), (0,)), ((), ())), preferred_element_type=wide
        )
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=wide)


def materialised(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` itself, a value worth keeping for all who read it: on CPU the compiler would compute it again for
    each.
    """
    return cpu.materialised(x) if mesh.platform() == "cpu" else x


def unrolled_repeats(num_repeats: int, *, num_blocks: int) -> int:
    """How many repeats of a segment's blocks the program spells out at a time.

    On CPU and GPU a loop copies weights, gradients and saved activations in and out of stacked arrays, which
    a shallow stack is spared; a deep one would take long to compile (on an H200 about a second for each
    layer, of which a step saves one millisecond).
    """
    return num_repeats if num_repeats * num_blocks <= MAX_UNROLLED_LAYERS.get(mesh.platform(), 0) else 1
