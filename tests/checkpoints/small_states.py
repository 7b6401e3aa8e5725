"""A model of three layers and states of it, small enough to be saved many times."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.definition import define
from slmjax.models.mixers.attention import AttentionConfig

BLOCK = BlockConfig(mixer=AttentionConfig(num_heads=2), ffn=None)
MODEL = ModelConfig(embed_dim=8, stack=(LayerGroup(pattern=(BLOCK,), repeats=3),), vocab_size=258)
REGROUPED = dataclasses.replace(
    MODEL, stack=(LayerGroup(pattern=(BLOCK,)), LayerGroup(pattern=(BLOCK,), repeats=2))
)


@functools.cache
def state_shapes(model):
    params = define(model).params
    return jax.eval_shape(
        lambda: {
            "model": {"params": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params), "buffers": {}},
            "optimizer": optax.adam(1e-3).init(params),
            "progress": {"step": jnp.int32(0), "rng": jnp.zeros(2, jnp.uint32)},
        }
    )


def state_at(step, model=MODEL):
    draw = np.random.default_rng(step)
    return jax.tree.map(
        lambda leaf: jnp.asarray(draw.normal(100, 30, leaf.shape), leaf.dtype), state_shapes(model)
    )


def placed(shapes, shardings=None):
    """Shapes with the placement that `restore` wants; the first device by default."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: one, shapes) if shardings is None else shardings
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
    )
