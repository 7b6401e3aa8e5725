"""Fake quantization in groups along the last dim on TPU, in one pass over memory.

On TPU the last dim lies along the lanes. The compiler moves groups out of the lanes, and scales back into
them, by writing full float32 arrays in another order several times. This kernel transposes a block while it
is in fast memory, so that groups lie along the sublanes; the arithmetic is `fake_quant` itself. The compiler
does not partition Mosaic kernels: call this inside `shard_mapped`, on the array of one device.

Dims: N rows, D the dim whose groups share a scale.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slmjax.formats.coding import fake_quant
from slmjax.formats.spec import Granularity, QuantSpec, Statistic
from slmjax.kernels.products import allows_fused, log_choice

_LANES = 128
_ROWS = 128  # rows transposed at a time
_BLOCK_ROWS = 2048  # rows fetched at a time


def can_round_groups(spec: QuantSpec, *, width: int, platform: str, dtype: Any) -> bool:
    """Return whether the kernel rounds a dim of `width` elements.

    It does so on TPU, for formats in small groups whose scale comes from the largest magnitude.
    """
    is_grouped = (
        spec.granularity is Granularity.PER_GROUP
        and width % (spec.group_size or 1) == 0
        and _LANES % (spec.group_size or 1) == 0
    )
    is_supported = (
        is_grouped and spec.statistic is Statistic.ABSMAX and not spec.is_two_level and not spec.is_asymmetric
    )
    if not (is_supported and platform == "tpu" and dtype in (jnp.bfloat16, jnp.float32) and allows_fused()):
        return False
    log_choice(
        f"rounding of {width} {jnp.dtype(dtype).name} inputs in groups of {spec.group_size} on {platform}: "
        "one pass over memory"
    )
    return True


def round_groups(x: Float[Array, "N D"], spec: QuantSpec, *, interpret: bool = False) -> Float[Array, "N D"]:
    """Return `fake_quant(x)` in the dtype of `x`, for cases that `can_round_groups` accepts.

    Args:
      interpret: run the kernel without a TPU, slowly, for tests.

    Raises:
      ValueError: D is not a multiple of the group size.
    """
    # A slow import that only TPUs need.
    from jax.experimental import pallas as pl

    num_rows, width = x.shape
    if width % (spec.group_size or 1):
        raise ValueError(f"a dim of {width} is not a multiple of the group size {spec.group_size}")
    rows = min(_BLOCK_ROWS, pl.cdiv(num_rows, _ROWS) * _ROWS)
    # The part of a block that lies outside the array is computed and dropped: no group crosses the edge.
    block = pl.BlockSpec((rows, _LANES), lambda row, column: (row, column))
    grid = pl.cdiv(num_rows, rows), pl.cdiv(width, _LANES)
    # The result varies over the same mesh axes as `x`.
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
    kernel = functools.partial(_round_block, spec=spec)
    return pl.pallas_call(
        kernel, grid=grid, in_specs=[block], out_specs=block, out_shape=shape, interpret=interpret
    )(x)


def _round_block(x_ref: Any, y_ref: Any, *, spec: QuantSpec) -> None:
    from jax.experimental import pallas as pl

    def round_rows(index: Array, carry: None) -> None:
        rows = pl.ds(index * _ROWS, _ROWS), slice(None)
        x = x_ref[rows].astype(jnp.float32)
        y_ref[rows] = fake_quant(x.T, spec, axis=0).T.astype(y_ref.dtype)

    jax.lax.fori_loop(0, x_ref.shape[0] // _ROWS, round_rows, None)
