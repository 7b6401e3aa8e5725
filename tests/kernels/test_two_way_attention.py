"""Attention that sees later tokens: against a loop over pairs, on a mesh, and in decoding after a prefix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slmjax import kernels
from slmjax.models import AttentionConfig, MixerContext, ModelDims, Visibility
from slmjax.parallel.mesh import MeshConfig, make_mesh

ROWS = 2
LENGTH = 8
HEADS = 4
DRAWS = np.random.default_rng(0)
Q, K, V = (DRAWS.normal(size=(ROWS, LENGTH, heads, 4)).astype(np.float32) for heads in (HEADS, 2, 2))
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1] * LENGTH], np.int32)
PREFIX = np.array([[1, 1, 0, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]], bool)


def by_pairs(is_visible: np.ndarray, window: int | None) -> np.ndarray:
    out = np.zeros(Q.shape)
    for row, t, head in np.ndindex(ROWS, LENGTH, HEADS):
        seen = [
            s
            for s in range(LENGTH)
            if SEGMENTS[row, s] == SEGMENTS[row, t] > 0
            and (s <= t or is_visible[row, s])
            and (window is None or abs(t - s) < window)
        ]
        if seen:
            powers = np.exp(0.5 * K[row, seen, head // 2] @ Q[row, t, head])
            out[row, t, head] = powers / powers.sum() @ V[row, seen, head // 2]
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("is_visible", [PREFIX, np.ones_like(PREFIX)], ids=["prefix", "both"])
def test_two_way_attention_equals_a_loop_over_pairs(is_visible: np.ndarray, window: int | None) -> None:
    def attend(q, k, v, segment_ids, is_visible):
        return kernels.two_way_attention(
            q, k, v, segment_ids=segment_ids, is_visible=is_visible, window=window, scale=0.5
        )

    arrays = tuple(map(jnp.asarray, (Q, K, V, SEGMENTS, is_visible)))
    np.testing.assert_allclose(attend(*arrays), by_pairs(is_visible, window), atol=2e-6)
    # The time is sharded, and so are the query heads, into which the kv heads do not divide.
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=2, tensor=4))):
        sharded = jax.jit(attend)(*arrays)
    np.testing.assert_allclose(sharded, by_pairs(is_visible, window), atol=2e-6)


def test_decoding_after_a_prefix_equals_the_whole_sequence() -> None:
    """The prompts are the prefixes of their rows, padded; the tokens after them see what is before them."""
    dims = ModelDims(embed_dim=16, num_layers=1, norm_eps=1e-6, init_std=0.3, dtype=jnp.float32)
    attention = AttentionConfig(num_heads=4, num_kv_heads=2).build(dims, rngs=nnx.Rngs(params=0))
    x = jnp.asarray(DRAWS.normal(size=(ROWS, LENGTH, 16)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
    lengths = jnp.array([[3], [5]])
    is_prefix = positions < lengths

    def call(x, positions, segment_ids, is_prefix, state):
        context = MixerContext(visibility=Visibility.PREFIX, is_prefix=is_prefix)
        return attention(x, positions=positions, segment_ids=segment_ids, state=state, context=context)

    whole, _ = call(x, positions, jnp.ones_like(positions), is_prefix, None)
    causal, _ = attention(x, positions=positions, segment_ids=jnp.ones_like(positions), state=None)
    assert np.abs(whole - causal)[:, 0].max() > 0.05
    state = attention.init_state(ROWS, max_length=LENGTH)
    prompt, state = call(x, positions, is_prefix.astype(jnp.int32), is_prefix, state)
    np.testing.assert_allclose(prompt[is_prefix], whole[is_prefix], atol=1e-5)
    for step in range(3):
        at = lengths + step
        token = jnp.take_along_axis(x, at[..., None], axis=1)
        mixed, state = call(token, at, jnp.ones_like(at), jnp.zeros_like(at, dtype=bool), state)
        np.testing.assert_allclose(
            mixed, jnp.take_along_axis(whole, at[..., None], axis=1), atol=1e-5, err_msg=str(step)
        )
