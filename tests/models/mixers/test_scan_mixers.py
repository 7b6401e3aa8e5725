"""Mamba, RG-LRU, RWKV-4 and the short convolution equal transformers' layers, on packed rows and in decoding.

Needs the oracle extra.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slmjax.models import (
    ChannelMixConfig,
    MambaConfig,
    MixerConfig,
    ModelDims,
    RgLruConfig,
    Rwkv4Config,
    ShortConvolutionConfig,
)

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch and transformers, about themselves
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

DIM = 12
INNER = 16
DIMS = ModelDims(embed_dim=DIM, num_layers=3, norm_eps=1e-5, init_std=0.3, dtype=jnp.float32)
SEGMENTS = np.array([[1] * 7 + [2] + [3] * 5 + [0] * 2, [4] * 3 + [5] * 12])


def mamba_layer():
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(
        hidden_size=DIM,
        intermediate_size=INNER,
        state_size=3,
        time_step_rank=2,
        num_hidden_layers=1,
        vocab_size=8,
    )
    layer = MambaMixer(config, layer_idx=0)

    def parts(state):
        inner, gate = np.split(state["in_proj.weight"], 2)
        down, read, write = (state["x_proj.weight"][part] for part in (slice(2), slice(5, 8), slice(2, 5)))
        return {
            "inner/weight": inner.T,
            "gate/weight": gate.T,
            "conv_taps": state["conv1d.weight"][:, 0].T,
            "conv_bias": state["conv1d.bias"],
            "step_down/weight": down.T,
            "input_matrix/weight": write.T,
            "output_matrix/weight": read.T,
            "step_up/weight": state["dt_proj.weight"].T,
            "step_bias": state["dt_proj.bias"],
            "log_rates": state["A_log"],
            "skip": state["D"],
            "output/weight": state["out_proj.weight"].T,
        }

    return layer, parts


def recurrent_gemma_layer():
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    config = RecurrentGemmaConfig(
        hidden_size=DIM, lru_width=INNER, num_attention_heads=2, num_hidden_layers=1, vocab_size=8
    )
    layer = RecurrentGemmaRecurrentBlock(config, layer_idx=0)

    def parts(state):
        return {
            "inner/weight": state["linear_x.weight"].T,
            "inner/bias": state["linear_x.bias"],
            "gate/weight": state["linear_y.weight"].T,
            "gate/bias": state["linear_y.bias"],
            "conv_taps": state["conv_1d.weight"][:, 0].T,
            "conv_bias": state["conv_1d.bias"],
            "input_blocks": state["rg_lru.input_gate_weight"],
            "input_bias": state["rg_lru.input_gate_bias"].ravel(),
            "decay_blocks": state["rg_lru.recurrent_gate_weight"],
            "decay_bias": state["rg_lru.recurrent_gate_bias"].ravel(),
            "decay_rates": state["rg_lru.recurrent_param"],
            "output/weight": state["linear_out.weight"].T,
            "output/bias": state["linear_out.bias"],
        }

    def run(x):
        import torch

        return layer(x, torch.arange(x.shape[1])[None], None, use_cache=False)[0]

    return layer, parts, run


def rwkv_config():
    from transformers import RwkvConfig

    return RwkvConfig(
        hidden_size=DIM,
        attention_hidden_size=INNER,
        intermediate_size=INNER,
        num_hidden_layers=3,
        vocab_size=8,
        context_length=64,
    )


def rwkv_layer():
    from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

    layer = RwkvSelfAttention(rwkv_config(), layer_id=1)

    def parts(state):
        names = ("key", "value", "receptance", "output")
        maps = {f"{name}/weight": state[f"{name}.weight"].T for name in names}
        mixes = {f"{name}_mix": state[f"time_mix_{name}"].ravel() for name in names[:3]}
        return maps | mixes | {"log_decay_rates": state["time_decay"], "bonus": state["time_first"]}

    return layer, parts, lambda x: layer(x)[0]


def channel_mix_layer():
    from transformers.models.rwkv.modeling_rwkv import RwkvFeedForward

    layer = RwkvFeedForward(rwkv_config(), layer_id=1)

    def parts(state):
        return {
            "up/weight": state["key.weight"].T,
            "down/weight": state["value.weight"].T,
            "receptance/weight": state["receptance.weight"].T,
            "up_mix": state["time_mix_key"].ravel(),
            "receptance_mix": state["time_mix_receptance"].ravel(),
        }

    return layer, parts, lambda x: layer(x)[0]


def short_convolution_layer():
    from transformers import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    config = Lfm2Config(
        hidden_size=DIM, num_hidden_layers=1, vocab_size=8, conv_L_cache=3, layer_types=["conv"]
    )
    layer = Lfm2ShortConv(config, layer_idx=0)

    def parts(state):
        input_gate, output_gate, inner = np.split(state["in_proj.weight"], 3)
        return {
            "input_gate/weight": input_gate.T,
            "output_gate/weight": output_gate.T,
            "inner/weight": inner.T,
            "conv_taps": state["conv.weight"][:, 0].T,
            "output/weight": state["out_proj.weight"].T,
        }

    return layer, parts


LAYERS: dict[str, tuple[Any, Callable]] = {
    "mamba": (MambaConfig(inner_dim=INNER, state_dim=3, step_rank=2, chunk_size=4), mamba_layer),
    "rg_lru": (RgLruConfig(inner_dim=INNER, num_blocks=2, bias=True, chunk_size=4), recurrent_gemma_layer),
    "rwkv4": (Rwkv4Config(inner_dim=INNER, chunk_size=4), rwkv_layer),
    "channel_mix": (ChannelMixConfig(hidden_dim=INNER), channel_mix_layer),
    "short_convolution": (ShortConvolutionConfig(), short_convolution_layer),
}


def build(config):
    constants = config.layer_constants(DIMS, index=1, num_layers=3)
    constants = {name: jnp.asarray(value) for name, value in constants.items()}
    return config.build(dataclasses.replace(DIMS, constants=constants), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("config", "make"), LAYERS.values(), ids=LAYERS)
def test_packed_rows_and_decoding_equal_the_layer_of_transformers(config, make):
    import torch

    layer, parts, *run = make()
    run = run[0] if run else layer
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            # Rates and steps stay as they were made: large ones would leave nothing of a state.
            if name not in ("A_log", "dt_proj.bias"):
                parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape) * 0.5))
    state = {name: parameter.detach().numpy() for name, parameter in layer.named_parameters()}
    wanted = parts(state)

    module = build(config)
    graphdef, params = nnx.split(module)
    flat = {"/".join(map(str, path)): path for path, _ in nnx.to_flat_state(params)}
    assert set(flat) == set(wanted)
    leaves = {path: jnp.asarray(wanted[name], jnp.float32) for name, path in flat.items()}
    assert all(leaves[path].shape == value.get_value().shape for path, value in nnx.to_flat_state(params))
    module = nnx.merge(graphdef, nnx.from_flat_state(leaves))

    x = rng.normal(size=(*SEGMENTS.shape, DIM)).astype(np.float32)
    expected = np.zeros_like(x)
    for row, segment in ((0, 1), (0, 2), (0, 3), (1, 4), (1, 5)):
        at = SEGMENTS[row] == segment
        with torch.no_grad():
            expected[row, at] = run(torch.from_numpy(x[row, at][None]))[0].numpy()

    is_mixer = isinstance(config, MixerConfig)

    @jax.jit
    def call(module, x, segments, state):
        if is_mixer:
            return module(x, segment_ids=segments, positions=jnp.zeros_like(segments), state=state)
        y, _, state = module(x, segment_ids=segments, state=state)
        return y, state

    real = (SEGMENTS > 0)[..., None]
    y, after = call(module, jnp.asarray(x), jnp.asarray(SEGMENTS), None)
    assert after is None
    np.testing.assert_allclose(y * real, expected * real, atol=2e-5)

    # The last document of each row: first parts of different lengths with padding, then token by token.
    starts = np.array([8, 3])
    state = module.init_state(2, max_length=16) if is_mixer else module.init_state(2)
    size = sum(leaf.size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))
    counted = config.state_size(DIMS, length=16) if is_mixer else config.state_size(DIMS)
    assert size == 2 * (counted.history + counted.recurrent)
    for counts in ([3, 4], [1, 1], [1, 1], [0, 1]):
        offsets = np.arange(max(counts))[None]
        at = np.minimum(starts[:, None] + offsets, SEGMENTS.shape[1] - 1)
        ids = (offsets < np.array(counts)[:, None]).astype(np.int32)
        tokens = np.where(ids[..., None] > 0, np.take_along_axis(x, at[..., None], axis=1), 5.0)
        y, state = call(module, jnp.asarray(tokens, jnp.float32), jnp.asarray(ids), state)
        wanted_y = np.take_along_axis(expected, at[..., None], axis=1)
        np.testing.assert_allclose(y * ids[..., None], wanted_y * ids[..., None], atol=2e-5)
        starts += counts
