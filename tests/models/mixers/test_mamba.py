"""Mamba where its parameters are extreme."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slmjax.models import MambaConfig, ModelDims


def test_rates_that_overflow_leave_finite_gradients():
    """The exponential of a logarithm of 139 is infinite, and infinity times a step of zero is no number."""
    dims = ModelDims(embed_dim=8, num_layers=1, norm_eps=1e-5, init_std=0.3, dtype=jnp.float32)
    module = MambaConfig(inner_dim=8, state_dim=2).build(dims, rngs=nnx.Rngs(0))
    module.log_rates = nnx.Param(jnp.full((8, 2), 139.0))
    graphdef, params = nnx.split(module)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 8)), jnp.float32)
    # Padding has steps of zero.
    segment_ids = jnp.asarray([[1, 1, 2, 2, 0]])

    @jax.jit
    def gradients(params):
        def total(params):
            y, _ = nnx.merge(graphdef, params)(
                x, segment_ids=segment_ids, positions=jnp.zeros_like(segment_ids), state=None
            )
            return jnp.sum(jnp.square(y)), y

        return jax.grad(total, has_aux=True)(params)

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients(params)))
