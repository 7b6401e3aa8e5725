"""Latent attention as transformers computes it: the values in latent_golden.json, and how they are computed.

Needs the extra `oracle`. After an intended change, write the file again and check the diff:

    python -m tests.models.mixers.latent_oracle

Weights are drawn in the layout of the reference, so that the conversion by an importer is part of the
comparison.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slmjax.models.mixers.latent import LatentAttentionConfig
from slmjax.models.rope import LongScaling, YarnScaling

GOLDEN = Path(__file__).with_name("latent_golden.json")
WIDTH = 16
LENGTH = 6


def yarn_magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A mixer, and the settings of the reference that do not follow from it."""

    family: str
    mixer: LatentAttentionConfig
    rope: dict[str, Any]  # the reference's rope_parameters
    interleaved: bool  # the reference rotates dims 0 and 1, 2 and 3, ... together
    context: int = 64


CASES = {
    # Low-rank queries, biases, YaRN with different magnitudes of angles and scores; values narrower than
    # keys.
    "deepseek_v2": Case(
        family="DeepseekV2",
        mixer=LatentAttentionConfig(
            num_heads=2,
            query_rank=6,
            latent_dim=8,
            plain_dim=6,
            rope_dim=8,
            value_dim=5,
            bias=True,
            latent_norm_eps=1e-6,
            rope_base=100.0,
            rope_scaling=YarnScaling(
                factor=4.0,
                original_context=64,
                attention_factor=yarn_magnitude(4.0, 1.0) / yarn_magnitude(4.0, 0.5),
            ),
            scale=14**-0.5 * yarn_magnitude(4.0, 0.5) ** 2,
        ),
        rope={
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        interleaved=True,
        context=256,
    ),
    # Queries from the residual stream, values wider than keys.
    "deepseek_v2_lite": Case(
        family="DeepseekV2",
        mixer=LatentAttentionConfig(
            num_heads=4, latent_dim=8, plain_dim=4, rope_dim=4, value_dim=10, latent_norm_eps=1e-6
        ),
        rope={"rope_type": "default", "rope_theta": 10_000.0},
        interleaved=True,
    ),
    # Divisors of each frequency, those of long documents.
    "minicpm3": Case(
        family="MiniCPM3",
        mixer=LatentAttentionConfig(
            num_heads=2,
            query_rank=6,
            latent_dim=8,
            plain_dim=6,
            rope_dim=4,
            value_dim=8,
            latent_norm_eps=1e-6,
            rope_scaling=LongScaling(
                short_factors=(1.0, 2.0), long_factors=(1.5, 3.0), original_context=4, attention_factor=1.25
            ),
        ),
        rope={
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0, 2.0],
            "long_factor": [1.5, 3.0],
            "factor": 8.0,
            "original_max_position_embeddings": 4,
            "attention_factor": 1.25,
        },
        interleaved=False,
    ),
}


def reference_weights(config: LatentAttentionConfig) -> dict[str, np.ndarray]:
    """Return random weights under the reference's names, matrices [out, in]."""
    queries = config.num_heads * config.key_dim
    rank = config.query_rank
    outputs = config.num_heads * config.value_dim
    shapes: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa.weight": (config.cached_dim, WIDTH),
        "kv_a_layernorm.weight": (config.latent_dim,),
        "kv_b_proj.weight": (config.num_heads * (config.plain_dim + config.value_dim), config.latent_dim),
        "o_proj.weight": (WIDTH, outputs),
    }
    if rank is None:
        shapes["q_proj.weight"] = (queries, WIDTH)
    else:
        shapes |= {
            "q_a_proj.weight": (rank, WIDTH),
            "q_a_layernorm.weight": (rank,),
            "q_b_proj.weight": (queries, rank),
        }
    if config.bias:
        shapes |= {"kv_a_proj_with_mqa.bias": (config.cached_dim,), "o_proj.bias": (WIDTH,)}
        shapes |= {} if rank is None else {"q_a_proj.bias": (rank,)}
    draw = np.random.default_rng(0)
    return {name: draw.normal(0.2, 0.5, shape).astype(np.float32) for name, shape in sorted(shapes.items())}


def inputs() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(1, LENGTH, WIDTH)).astype(np.float32)


NAMES = {
    "q_proj": "query",
    "q_a_proj": "query_down",
    "q_a_layernorm": "query_norm",
    "q_b_proj": "query_up",
    "kv_a_proj_with_mqa": "latent_down",
    "kv_a_layernorm": "latent_norm",
    "kv_b_proj": "latent_up",
    "o_proj": "output",
}


def imported_weights(case: Case) -> dict[str, np.ndarray]:
    """Return the same weights in the mixer's layout: matrices [in, out], rotated pairs half a head apart."""
    weights = {}
    for name, value in reference_weights(case.mixer).items():
        module, _, kind = name.partition(".")
        if case.interleaved and module in ("q_proj", "q_b_proj", "kv_a_proj_with_mqa"):
            value = half_split(
                value,
                heads=1 if module.startswith("kv") else case.mixer.num_heads,
                rope_dim=case.mixer.rope_dim,
            )
        leaf = "scale" if module.endswith("layernorm") else kind
        weights[f"{NAMES[module]}/{leaf}"] = value.T if value.ndim == 2 else value
    return weights


def half_split(rows: np.ndarray, *, heads: int, rope_dim: int) -> np.ndarray:
    """Reorder the last `rope_dim` rows of each head from adjacent pairs to pairs half of them apart."""
    by_head = rows.reshape(heads, -1, *rows.shape[1:]).copy()
    rotary_rows = by_head[:, -rope_dim:]
    by_head[:, -rope_dim:] = np.concatenate([rotary_rows[:, 0::2], rotary_rows[:, 1::2]], axis=1)
    return by_head.reshape(rows.shape)


def reference_output(case: Case) -> np.ndarray:
    """Return the output of the reference for the inputs."""
    import torch
    import transformers
    from transformers.models.deepseek_v2 import modeling_deepseek_v2
    from transformers.models.minicpm3 import modeling_minicpm3

    module = {"DeepseekV2": modeling_deepseek_v2, "MiniCPM3": modeling_minicpm3}[case.family]
    mixer = case.mixer
    settings: Mapping[str, Any] = {
        "hidden_size": WIDTH,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_heads,
        "q_lora_rank": mixer.query_rank,
        "kv_lora_rank": mixer.latent_dim,
        "qk_nope_head_dim": mixer.plain_dim,
        "qk_rope_head_dim": mixer.rope_dim,
        "v_head_dim": mixer.value_dim,
        "attention_bias": mixer.bias,
        "rope_parameters": dict(case.rope),
        "max_position_embeddings": case.context,
        "attn_implementation": "eager",
    }
    config = getattr(transformers, f"{case.family}Config")(**settings)
    attention = getattr(module, f"{case.family}Attention")(config, layer_idx=0).eval()
    attention.load_state_dict(
        {name: torch.from_numpy(value) for name, value in reference_weights(mixer).items()}
    )
    x = torch.from_numpy(inputs())
    positions = torch.arange(LENGTH)[None]
    angles = getattr(module, f"{case.family}RotaryEmbedding")(config)(x, positions)
    hidden = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        return attention(x, attention_mask=hidden, position_embeddings=angles)[0].numpy()


def write_golden() -> None:
    """The outputs of all cases, a line for each token."""
    lines = []
    for name, case in CASES.items():
        rows = ",\n".join(
            json.dumps([round(float(value), 6) for value in row]) for row in reference_output(case)[0]
        )
        lines.append(f'"{name}": [\n{rows}\n]')
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write_golden()
