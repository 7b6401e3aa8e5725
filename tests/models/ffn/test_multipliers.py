"""Constants that multiply what the activation is applied to, and the output of a feed-forward layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slmjax.models import MlpConfig, ModelDims
from slmjax.models.ffn.mlp import Mlp


@pytest.mark.parametrize("is_gated", [True, False])
def test_multipliers_by_hand(is_gated: bool) -> None:
    config = MlpConfig(
        hidden_dim=6, gated=is_gated, bias=True, activation_multiplier=0.3, output_multiplier=2.5
    )
    dims = ModelDims(embed_dim=4, num_layers=1, norm_eps=1e-6, init_std=0.5, dtype=jnp.float32)
    module = Mlp(config, dims, rngs=nnx.Rngs(params=0))
    module.down.bias[...] = jnp.arange(4.0)
    x = jax.random.normal(jax.random.key(1), (1, 3, 4))
    y, _ = module(x, segment_ids=jnp.ones((1, 3), jnp.int32))

    # The activation is x / (1 + exp(-x)); the bias of the output is multiplied as well.
    activated = 0.3 * np.asarray(x @ (module.up if module.gate is None else module.gate).weight[...])
    hidden = activated / (1 + np.exp(-activated))
    if module.gate is not None:
        hidden = hidden * np.asarray(x @ module.up.weight[...])
    expected = 2.5 * (hidden @ np.asarray(module.down.weight[...]) + np.arange(4))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
