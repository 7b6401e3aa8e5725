"""The time of a mixer against the same layer of transformers on a CPU, forward and backward.

    python benchmarks/mixer_transformers.py                  # needs the oracle extra (torch, transformers)

One layer in float32 on one row of 2,048 tokens, of the same dims and number of parameters, with the gradients
of parameters and inputs. The two take turns in one process; the time is the lowest of the rounds. The layers
of transformers run the code that they have for a CPU, as released. The tests of mixers compare the outputs.
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import torch
from mixer_time import compiled_step

from slmjax import models
from slmjax.models.protocols import MixerConfig

WIDTH = 256
LENGTH = 2048


def mamba2() -> tuple[MixerConfig, Any]:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=WIDTH, num_heads=8, head_dim=64, state_size=64, n_groups=1, num_hidden_layers=1
    )
    return models.Mamba2Config(head_dim=64, state_dim=64), Mamba2Mixer(config, layer_idx=0)


def gated_delta_net() -> tuple[MixerConfig, Any]:
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=WIDTH,
        linear_num_value_heads=4,
        linear_num_key_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    own = models.GatedDeltaNetConfig(num_heads=4, key_dim=64, value_dim=64)
    return own, Qwen3NextGatedDeltaNet(config, layer_idx=0)


def kimi_delta_attention() -> tuple[MixerConfig, Any]:
    from transformers.models.kimi_linear import configuration_kimi_linear, modeling_kimi_linear

    config = configuration_kimi_linear.KimiLinearConfig(
        hidden_size=WIDTH,
        linear_head_dim=64,
        linear_num_heads=4,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    own = models.KimiDeltaAttentionConfig(num_heads=4, key_dim=64, value_dim=64)
    return own, modeling_kimi_linear.KimiLinearDeltaAttention(config, layer_idx=0)


def mamba() -> tuple[MixerConfig, Any]:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=WIDTH, intermediate_size=2 * WIDTH, state_size=16, num_hidden_layers=1)
    return models.MambaConfig(inner_dim=2 * WIDTH), MambaMixer(config, layer_idx=0)


def rg_lru() -> tuple[MixerConfig, Any]:
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    config = RecurrentGemmaConfig(
        hidden_size=WIDTH, lru_width=WIDTH, num_attention_heads=4, num_hidden_layers=1
    )
    layer = RecurrentGemmaRecurrentBlock(config, layer_idx=0)

    class WithPositions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x, torch.arange(x.shape[1])[None], None, use_cache=False)[0]

    return models.RgLruConfig(inner_dim=WIDTH, num_blocks=4, bias=True), WithPositions()


def rwkv4() -> tuple[MixerConfig, Any]:
    from transformers import RwkvConfig
    from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

    config = RwkvConfig(hidden_size=WIDTH, num_hidden_layers=3, context_length=LENGTH)
    return models.Rwkv4Config(inner_dim=WIDTH), RwkvSelfAttention(config, layer_id=1)


def short_convolution() -> tuple[MixerConfig, Any]:
    from transformers import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    config = Lfm2Config(hidden_size=WIDTH, num_hidden_layers=1, conv_L_cache=3, layer_types=["conv"])
    return models.ShortConvolutionConfig(), Lfm2ShortConv(config, layer_idx=0)


CASES: dict[str, Callable[[], tuple[MixerConfig, Any]]] = {
    "Mamba-2": mamba2,
    "Gated DeltaNet": gated_delta_net,
    "KDA": kimi_delta_attention,
    "Mamba": mamba,
    "RG-LRU": rg_lru,
    "RWKV-4": rwkv4,
    "short convolution": short_convolution,
}


def torch_step(layer: Any) -> Callable[[], Any]:
    """Return a function that runs the layer forward and backward, of random weights and inputs."""
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.02)
    x = torch.randn(1, LENGTH, WIDTH, requires_grad=True)

    def step() -> Any:
        y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        return torch.autograd.grad(y.square().mean(), (x, *parameters), allow_unused=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mixers", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")  # of transformers, that its fast kernels need a GPU
    print(f"| mixer, {LENGTH:,} tokens, width {WIDTH} | slmjax ms | transformers ms | ratio |", flush=True)
    print("|---|---|---|---|", flush=True)
    for name in args.mixers:
        config, layer = CASES[name]()
        steps = {"slmjax": compiled_step(config, LENGTH), "transformers": torch_step(layer)}
        times = {key: float("inf") for key in steps}
        for _ in range(args.rounds + 1):
            for key, step in steps.items():
                started = time.perf_counter()
                step()
                times[key] = min(times[key], time.perf_counter() - started)
        own = times["slmjax"]
        other = times["transformers"]
        print(f"| {name} | {1e3 * own:.1f} | {1e3 * other:.1f} | {other / own:.2f} |", flush=True)


if __name__ == "__main__":
    main()
