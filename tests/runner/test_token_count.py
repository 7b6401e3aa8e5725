"""The host's count of trained targets: exact beyond what int32 and float32 hold, and through a checkpoint."""

import jax
import jax.numpy as jnp
import pytest

from slmjax.runner.token_count import MILLION, MOST_PENDING, TokenCount, read_count, stored_shape

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.mark.parametrize("total", [0, 999_999, 4_321_999_999, 2**40 + 1])
def test_tokens_are_counted_across_the_million(total):
    count = TokenCount(total)
    for _ in range(3):
        count.add(jnp.float32(16_777_215))
    count.add(jnp.float32(0))
    assert count.total() == count.total() == total + 3 * 16_777_215
    stored = count.stored(SHARDING)
    shape = stored_shape(SHARDING)
    assert (stored.shape, stored.dtype, stored.sharding) == (shape.shape, shape.dtype, shape.sharding)
    assert int(stored[1]) < MILLION
    assert read_count(stored).total() == count.total()


def test_few_counts_are_pending():
    count = TokenCount(0)
    one = jnp.float32(1)
    for _ in range(2 * MOST_PENDING + 5):
        count.add(one)
    assert len(count._pending) == 5
    assert count.total() == 2 * MOST_PENDING + 5
