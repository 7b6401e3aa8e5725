"""Recurrent mixers as transformers computes them: the values in recurrent_golden.json, and how they arise.

Needs the extra `oracle`. After an intended change, write the file again and check the diff:

    python -m tests.models.mixers.recurrent_oracle

Weights are drawn in the layout of the reference, whose projections are fused.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from slmjax.models.mixers.delta_net import GatedDeltaNetConfig, KimiDeltaAttentionConfig
from slmjax.models.mixers.mamba2 import Mamba2Config

GOLDEN = Path(__file__).with_name("recurrent_golden.json")
WIDTH = 8
LENGTH = 9
EPS = 1e-6

CASES: dict[str, Any] = {
    # Two groups, each with two heads; the norm is over the dims of a group.
    "mamba2": Mamba2Config(head_dim=4, state_dim=3, num_groups=2, conv_width=4, chunk_size=4),
    # Two heads of values share queries and keys.
    "gated_delta": GatedDeltaNetConfig(num_heads=2, num_value_heads=4, key_dim=3, value_dim=5, chunk_size=4),
    "kimi_delta": KimiDeltaAttentionConfig(num_heads=2, key_dim=4, value_dim=4, chunk_size=4),
}


def reference_shapes(case: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the reference's weights, matrices [out, in]."""
    if case == "mamba2":
        return {
            "in_proj.weight": (16 + 16 + 6 + 6 + 4, WIDTH),  # gate, value, key, query, step
            "conv1d.weight": (16 + 6 + 6, 1, 4),
            "conv1d.bias": (28,),
            "dt_bias": (4,),
            "A_log": (4,),
            "D": (4,),
            "norm.weight": (16,),
            "out_proj.weight": (WIDTH, 16),
        }
    if case == "gated_delta":
        return {
            "in_proj_qkvz.weight": (2 * 2 * 3 + 2 * 4 * 5, WIDTH),
            "in_proj_ba.weight": (2 * 4, WIDTH),
            "conv1d.weight": (2 * 2 * 3 + 4 * 5, 1, 4),
            "dt_bias": (4,),
            "A_log": (4,),
            "norm.weight": (5,),
            "out_proj.weight": (WIDTH, 4 * 5),
        }
    return {
        **{f"{name}_proj.weight": (8, WIDTH) for name in "qkv"},
        "conv1d.weight": (24, 1, 4),
        "forget_gate.f_a_proj.weight": (4, WIDTH),
        "forget_gate.f_b_proj.weight": (8, 4),
        "forget_gate.dt_bias": (8,),
        "forget_gate.A_log": (1, 1, 2, 1),
        "b_proj.weight": (2, WIDTH),
        "g_a_proj.weight": (4, WIDTH),
        "g_b_proj.weight": (8, 4),
        "o_norm.weight": (4,),
        "o_proj.weight": (WIDTH, 8),
    }


def reference_weights(case: str) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = reference_shapes(case)
    return {name: draw.normal(0.1, 0.6, shape).astype(np.float32) for name, shape in sorted(shapes.items())}


def inputs() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(1, LENGTH, WIDTH)).astype(np.float32)


def imported_weights(case: str) -> dict[str, np.ndarray]:
    """Return the same weights in the mixer's layout: a matrix [in, out] for each part, taps [W, C]."""
    weights = reference_weights(case)
    if case == "mamba2":
        parts = split(weights["in_proj.weight"], gate=16, value=16, key=6, query=6, step=4)
        taps = split(weights["conv1d.weight"][:, 0], value=16, key=6, query=6)
        biases = split(weights["conv1d.bias"], value=16, key=6, query=6)
        return {
            **{f"{name}/weight": part.T for name, part in parts.items()},
            **{f"{name}_convolution/taps": part.T for name, part in taps.items()},
            **{f"{name}_convolution/bias": part for name, part in biases.items()},
            "step_bias": weights["dt_bias"],
            "log_decay_rate": weights["A_log"],
            "skip": weights["D"],
            "norm_scale": weights["norm.weight"],
            "output/weight": weights["out_proj.weight"].T,
        }
    if case == "gated_delta":
        # The rows of a head of keys: its query, its key, then values and gates of its two heads of values.
        rows = weights["in_proj_qkvz.weight"].reshape(2, -1, WIDTH)
        parts = split(rows.swapaxes(0, 1), query=3, key=3, value=10, gate=10)
        by_part = {name: part.swapaxes(0, 1).reshape(-1, WIDTH) for name, part in parts.items()}
        rates = split(weights["in_proj_ba.weight"].reshape(2, -1, WIDTH).swapaxes(0, 1), strength=2, decay=2)
        by_part |= {name: part.swapaxes(0, 1).reshape(-1, WIDTH) for name, part in rates.items()}
        inside = ("query", "key", "value", "strength")
        taps = split(weights["conv1d.weight"][:, 0], query=6, key=6, value=20)
        return {
            **{f"heads/{name}/weight": by_part[name].T for name in inside},
            **{f"{name}/weight": by_part[name].T for name in ("gate", "decay")},
            **{f"heads/{name}_convolution/taps": part.T for name, part in taps.items()},
            "step_bias": weights["dt_bias"],
            "log_decay_rate": weights["A_log"],
            "norm/scale": weights["norm.weight"],
            "output/weight": weights["out_proj.weight"].T,
        }
    taps = split(weights["conv1d.weight"][:, 0], query=8, key=8, value=8)
    return {
        "heads/query/weight": weights["q_proj.weight"].T,
        "heads/key/weight": weights["k_proj.weight"].T,
        "heads/value/weight": weights["v_proj.weight"].T,
        "heads/strength/weight": weights["b_proj.weight"].T,
        **{f"heads/{name}_convolution/taps": part.T for name, part in taps.items()},
        "decay_down/weight": weights["forget_gate.f_a_proj.weight"].T,
        "decay_up/weight": weights["forget_gate.f_b_proj.weight"].T,
        "step_bias": weights["forget_gate.dt_bias"],
        "log_decay_rate": weights["forget_gate.A_log"].ravel(),
        "gate_down/weight": weights["g_a_proj.weight"].T,
        "gate_up/weight": weights["g_b_proj.weight"].T,
        "norm/scale": weights["o_norm.weight"],
        "output/weight": weights["o_proj.weight"].T,
    }


def split(rows: np.ndarray, **sizes: int) -> dict[str, np.ndarray]:
    """Cut rows into named parts."""
    ends = np.cumsum([*sizes.values()])
    assert ends[-1] == rows.shape[0], (ends, rows.shape)
    return dict(zip(sizes, np.split(rows, ends[:-1]), strict=True))


def reference_output(case: str) -> np.ndarray:
    """Return the output of the reference for the inputs."""
    import torch
    from transformers.models.kimi_linear import configuration_kimi_linear, modeling_kimi_linear
    from transformers.models.mamba2 import configuration_mamba2, modeling_mamba2
    from transformers.models.qwen3_next import configuration_qwen3_next, modeling_qwen3_next

    if case == "mamba2":
        config = configuration_mamba2.Mamba2Config(
            hidden_size=WIDTH,
            num_heads=4,
            head_dim=4,
            state_size=3,
            n_groups=2,
            expand=2,
            chunk_size=4,
            num_hidden_layers=1,
            layer_norm_epsilon=EPS,
            use_bias=False,
        )
        module = modeling_mamba2.Mamba2Mixer(config, layer_idx=0)
    elif case == "gated_delta":
        config = configuration_qwen3_next.Qwen3NextConfig(
            hidden_size=WIDTH,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=3,
            linear_value_head_dim=5,
            num_hidden_layers=1,
            layer_types=["linear_attention"],
            rms_norm_eps=EPS,
        )
        module = modeling_qwen3_next.Qwen3NextGatedDeltaNet(config, layer_idx=0)
    else:
        config = configuration_kimi_linear.KimiLinearConfig(
            hidden_size=WIDTH,
            linear_head_dim=4,
            linear_num_heads=2,
            num_hidden_layers=1,
            layer_types=["linear_attention"],
            rms_norm_eps=EPS,
        )
        module = modeling_kimi_linear.KimiLinearDeltaAttention(config, layer_idx=0)
    module.load_state_dict({name: torch.tensor(x) for name, x in reference_weights(case).items()})
    with torch.no_grad():
        return module.eval()(torch.tensor(inputs())).numpy()


def write() -> None:
    golden = {case: reference_output(case)[0].astype(float).round(7).tolist() for case in CASES}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    write()
