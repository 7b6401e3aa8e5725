"""Rounding in groups along the last dim on TPU, in one pass over memory.

There the last dim lies along the lanes, and the compiler brings groups out of them and their scales back by
writing whole arrays of float32, in another order, several times. This kernel turns a block around while it is
in fast memory, so that groups lie along the sublanes; the arithmetic is `fake_quant` itself. Mosaic kernels
are not partitioned by the compiler: this is called under `sharding.local`, on what a device holds.

Dims: N rows, D the dim whose groups share a scale.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slmjax.formats.coding import fake_quant
from slmjax.formats.spec import Granularity, QuantSpec, Statistic
from slmjax.kernels.choice import allows_fused, announce

_LANES = 128
_ROWS = 128  # turned around at a time
_BLOCK_ROWS = 2048  # fetched at a time


def can_round_groups(spec: QuantSpec, *, width: int, platform: str, dtype: Any) -> bool:
    """Whether a dim of `width` numbers is rounded by the kernel: on TPU, in small groups whose scale is by
    the largest magnitude.
    """
    is_grouped = (
        spec.granularity is Granularity.PER_GROUP
        and width % (spec.group_size or 1) == 0
        and _LANES % (spec.group_size or 1) == 0
    )
    is_known = (
        is_grouped and spec.statistic is Statistic.ABSMAX and not spec.is_two_level and not spec.is_asymmetric
    )
    if not (is_known and platform == "tpu" and dtype in (jnp.bfloat16, jnp.float32) and allows_fused()):
        return False
    announce(
        f"rounding of {width} {jnp.dtype(dtype).name} inputs in groups of {spec.group_size} on {platform}: "
        "one pass over memory"
    )
    return True


def round_groups(x: Float[Array, "N D"], spec: QuantSpec, *, interpret: bool = False) -> Float[Array, "N D"]:
    """`fake_quant` of `x` in its dtype, where `can_round_groups`.

    Args:
      interpret: run the kernel without a TPU, slowly: for tests.

    Raises ValueError where D is no multiple of the group size.
    """
    from jax.experimental import pallas as pl  # it takes a while, and only TPUs need it

    num_rows, width = x.shape
    if width % (spec.group_size or 1):
        raise ValueError(f"a dim of {width} is no multiple of the group size {spec.group_size}")
    rows = min(_BLOCK_ROWS, pl.cdiv(num_rows, _ROWS) * _ROWS)
    # Where a block ends beyond the array, what is computed there is dropped: no group has numbers on both
    # sides.
    block = pl.BlockSpec((rows, _LANES), lambda row, column: (row, column))
    grid = pl.cdiv(num_rows, rows), pl.cdiv(width, _LANES)
    # it differs between devices as `x` does
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
    kernel = functools.partial(_round_block, spec=spec)
    return pl.pallas_call(
        kernel, grid=grid, in_specs=[block], out_specs=block, out_shape=shape, interpret=interpret
    )(x)


def _round_block(x_ref: Any, y_ref: Any, *, spec: QuantSpec) -> None:
    from jax.experimental import pallas as pl

    def round_rows(index: Array, nothing: None) -> None:
        place = pl.ds(index * _ROWS, _ROWS), slice(None)
        x = x_ref[place].astype(jnp.float32)
        y_ref[place] = fake_quant(x.T, spec, axis=0).T.astype(y_ref.dtype)

    jax.lax.fori_loop(0, x_ref.shape[0] // _ROWS, round_rows, None)
