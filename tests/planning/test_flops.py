"""FLOPs counted from programs, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from slmjax import kernels, losses
from slmjax.models import zoo
from slmjax.models.definition import define
from slmjax.planning import flops


def shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def test_products() -> None:
    assert flops.count(lambda x, w: x @ w, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7
    assert (
        flops.count(lambda x, w: jnp.einsum("bij,bjk->bik", x, w), shape(2, 3, 5), shape(2, 5, 7))
        == 2 * 2 * 3 * 5 * 7
    )
    assert (
        flops.count(
            lambda x, w, g: jax.lax.ragged_dot(x, w, g), shape(6, 5), shape(3, 5, 7), jnp.zeros(3, jnp.int32)
        )
        == 2 * 6 * 5 * 7
    )
    kernel = shape(4, 3, 2, 2)  # out, in, height, width
    convolution = flops.count(lambda x, k: jax.lax.conv(x, k, (1, 1), "VALID"), shape(1, 3, 6, 6), kernel)
    assert convolution == 2 * (4 * 5 * 5) * (3 * 2 * 2)


def test_loops_count_as_often_as_they_run() -> None:
    def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x @ x, None

    once = 2 * 4**3
    assert flops.count(lambda x: jax.lax.scan(body, x, length=11)[0], shape(4, 4)) == 11 * once
    nested = lambda x: jax.lax.scan(lambda y, _: (jax.lax.scan(body, y, length=3)[0], None), x, length=5)[0]  # noqa: E731
    assert flops.count(nested, shape(4, 4)) == 15 * once
    assert flops.count(jax.jit(lambda x: jax.checkpoint(lambda y: y @ y)(x)), shape(4, 4)) == once
    assert (
        flops.count(lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x), shape(4, 4))
        == 2 * once
    )
    with pytest.raises(ValueError, match="while loop"):
        flops.count(lambda x: jax.lax.while_loop(lambda y: y[0, 0] < 3, lambda y: y @ y, x), shape(4, 4))


def test_a_gradient_costs_twice_the_forward_pass_more() -> None:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(x @ w))

    assert flops.count(jax.grad(loss, argnums=(0, 1)), shape(5, 7), shape(3, 5)) == 3 * 2 * 3 * 5 * 7


def test_grouped_products_cost_as_much_in_the_gradient() -> None:
    """Rows times transposed matrices, and sums of outer products by group, are counted by their own dims."""
    sizes = jnp.zeros(3, jnp.int32)

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(jax.lax.ragged_dot(x, w, sizes)))

    once = 2 * 6 * 5 * 7
    assert flops.count(jax.grad(loss, argnums=(0, 1)), shape(6, 5), shape(3, 5, 7)) == 3 * once


def test_a_window_is_linear_and_full_attention_quadratic() -> None:
    def attention(length: int, window: int | None) -> float:
        marks = jnp.zeros((1, length), jnp.int32)

        def mixed(q: jax.Array) -> jax.Array:
            return kernels.self_attention(q, q, q, segment_ids=marks, window=window, scale=1.0, softcap=None)

        return flops.count(mixed, shape(1, length, 2, 16))

    windowed = [attention(length, 512) / length for length in (1024, 2048, 4096, 8192)]
    # At 1024 most tokens have fewer than 512 before them, and blocks of queries see no more than what is
    # there.
    assert windowed[0] < windowed[1] and windowed[1:] == pytest.approx([windowed[1]] * 3, rel=0.02)
    assert windowed[3] < 1.3 * 4 * 512 * 2 * 16, (
        "a block sees little beside its window: two products, two heads of 16"
    )
    full = [attention(length, None) for length in (1024, 2048, 4096)]
    assert full[2] / full[1] > 3.5, full


def test_a_model_costs_what_its_config_says() -> None:
    config = zoo.slm_12m()
    definition = define(config)
    tokens = jax.ShapeDtypeStruct((2, config.context_length), jnp.int32)

    def forward(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        given = {"segment_ids": jnp.ones_like(tokens), "positions": jnp.zeros_like(tokens)}
        output = definition.merge(params, {})(tokens, **given)
        return losses.logits(output.hidden, output.head)

    found = flops.count(forward, definition.params, tokens) / (2 * config.context_length)
    # Blocks of queries see some keys that the mask then hides; the config's figure counts only those that are
    # seen.
    assert 1.0 < found / (zoo.describe(config).training_flops_per_token / 3) < 1.1
