"""Settings against transformers: angles wherever they are said, and what keys mean that are absent, null or
zero.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.config import ConfigError
from slmjax.convert.families import HF_FAMILIES
from slmjax.convert.family import Family, read_settings
from slmjax.convert.hf.settings import IGNORED
from slmjax.models.architecture import ModelConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.rope import LongScaling, rotary
from tests.convert.settings_cases import LLAMA3, ROPES, YARN, by_kind, config_with, plain
from tests.convert.test_families import read_golden

GOLDEN = json.loads((Path(__file__).parent / "golden_settings.json").read_text())
PUBLISHED = GOLDEN["families"]
FAMILIES = [family for family in HF_FAMILIES if family.architecture in PUBLISHED]


def read(config: dict[str, Any], notes: list[str] | None = None) -> ModelConfig:
    family = next(family for family in HF_FAMILIES if family.architecture == config["architectures"][0])
    return read_settings(family, config, where="config.json", notes=notes)


def refused(family: Family, config: dict[str, Any]) -> bool:
    try:
        read_settings(family, config, where="config.json")
    except ConfigError:
        return True
    return False


# Angles -----------------------------------------------------------------------------------------------------
def angles(mixer: Any) -> tuple[np.ndarray, float]:
    """The frequencies of a mixer, by the angles at position 1, and what rotated dims are multiplied by."""
    scaling = mixer.rope_scaling
    dims = mixer.head_dim if isinstance(mixer, AttentionConfig) else mixer.rope_dim
    if isinstance(scaling, LongScaling):
        pairs = len(scaling.short_factors)
        return mixer.rope_base ** (-np.arange(pairs) / pairs) / np.array(
            scaling.short_factors
        ), scaling.attention_factor
    x = jnp.concatenate([jnp.ones(dims // 2), jnp.zeros(dims // 2)])[None, None, None]
    turned = np.asarray(
        rotary(x, jnp.ones((1, 1), jnp.int32), base=mixer.rope_base, scaling=scaling), np.float64
    )[0, 0, 0]
    cos, sin = np.split(turned, 2)
    return np.arctan2(sin, cos), float(np.hypot(cos, sin)[0])


@pytest.mark.parametrize("name", ROPES)
def test_angles_are_those_of_transformers(name: str) -> None:
    case, changes = ROPES[name]
    model = read(config_with(read_golden(case)["config"], changes))
    for mixer in {block.mixer for block in model.blocks() if block.mixer.rope_base is not None}:
        wanted = GOLDEN["ropes"][name][
            "full_attention" if getattr(mixer, "window", None) is None else "sliding_attention"
        ]
        frequencies, magnitude = angles(mixer)
        np.testing.assert_allclose(frequencies, wanted["frequencies"], rtol=2e-5)
        np.testing.assert_allclose(magnitude, wanted["magnitude"], rtol=2e-6)
        scale = (
            (mixer.head_dim**-0.5 if mixer.scale is None else mixer.scale)
            if isinstance(mixer, AttentionConfig)
            else mixer.scale
        )
        np.testing.assert_allclose(scale, GOLDEN["ropes"][name]["scale"], rtol=2e-6)


def test_what_rope_scaling_replaces_is_said() -> None:
    notes: list[str] = []
    read(config_with(read_golden("llama")["config"], ROPES["both_without_base"][1]), notes)
    assert len(notes) == 1 and "rope_theta = 500000.0 of the latter is not used" in notes[0]


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (
            "gemma3",
            {"rope_scaling": {"type": "linear", "factor": 8.0}},
            r"rope_scaling is .* differ in whether they read `type` here",
        ),
        (
            "olmo3",
            {"rope_theta": 1e4, "rope_scaling": YARN},
            r"rope_theta is 10000.0, which would change the result: only 500000.0",
        ),
        (
            "olmo3",
            {"rope_parameters": by_kind(plain(5e5) | YARN | {"truncate": False}, plain(5e5))},
            r"full_attention: truncate is False",
        ),
        (
            "llama",
            {"rope_parameters": plain(1e4), "rope_scaling": LLAMA3 | {"factor": 0}},
            r"rope_scaling: factor is 0, but must be greater than 0",
        ),
        ("llama", {"rope_scaling": "linear"}, r"rope_scaling is 'linear', but must be an object of settings"),
    ],
)
def test_angles_that_libraries_disagree_about_are_refused(
    case: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(config_with(read_golden(case)["config"], changes))


# Absent, null, zero -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_an_absent_key_has_the_default_that_transformers_has(family: Family) -> None:
    published = PUBLISHED[family.architecture]
    theta = published["theta"]
    bases = (
        {"rope_theta": theta["global"], "rope_local_base_freq": theta["local"]}
        if isinstance(theta, dict)
        else {"rope_theta": theta}
    )
    assert family.defaults == {name: (bases | published["defaults"])[name] for name in family.defaults}
    given = published["given"]
    whole = read_settings(family, published["empty"] | given, where="config.json")
    assert read_settings(family, given, where="config.json") == whole


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_a_null_means_what_it_does_in_transformers(family: Family) -> None:
    published = PUBLISHED[family.architecture]
    given = published["given"]
    for name, outcome in published["nulls"].items():
        if name in IGNORED or name not in family.defaults or name in ("num_key_value_heads", *given):
            continue
        if outcome == "refused":
            is_default = not family.defaults[name]  # a null that is taken for False, as earlier releases did
            assert is_default or refused(family, given | {name: None}), name
        elif not refused(family, published["empty"] | given | outcome):
            expected = read_settings(family, published["empty"] | given | outcome, where="config.json")
            assert read_settings(family, given | {name: None}, where="config.json") == expected, name


@pytest.mark.parametrize(
    ("case", "values", "message"),
    [
        ("granite", {"logits_scaling": 0}, r"logits_scaling is 0, but it is a divisor"),
        ("minicpm3", {"dim_model_base": 0}, r"dim_model_base is 0, but it is a divisor"),
        ("gemma2", {"query_pre_attn_scalar": 0}, r"query_pre_attn_scalar is 0, but must be greater than 0"),
        ("llama", {"num_hidden_layers": 0}, r"num_hidden_layers is 0, but must be greater than 0"),
        ("llama", {"head_dim": 0}, r"head_dim is 0"),
        ("smollm3", {"no_rope_layer_interval": 0, "no_rope_layers": None}, r"no_rope_layer_interval is 0"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, r"decoder_sparse_step is 0"),
        (
            "llama",
            {"hidden_size": None},
            r"hidden_size is null, which has no meaning here: .* the family's default, 4096$",
        ),
        ("granite", {"logits_scaling": None}, r"logits_scaling is null"),
        ("gemma2", {"attn_logit_softcapping": 0}, r"attn_logit_softcapping is 0, but must be greater than 0"),
        ("mistral", {"sliding_window": 0}, r"sliding_window is 0, but must be greater than 0"),
        ("granite4_hybrid", {"mamba_n_heads": 0}, r"mamba_n_heads is 0"),
        ("granite4_hybrid", {"mamba_n_heads": 7}, r"7 heads of 8 dims .* the values of a layer, 48"),
        ("granite4_hybrid", {"layer_types": ["mamba"] * 4}, r"layer_types must name 5 layers"),
        ("lfm2", {"layer_types": ["mamba"] * 5}, r"each full_attention or conv, and is"),
        ("lfm2", {"block_dim": 25}, r"block_dim is 25, which would change the result: only 24"),
        ("falcon_h1", {"time_step_limit": [0.0, 0.1]}, r"bounds of steps are not supported"),
        ("mamba2", {"hidden_act": "gelu"}, r"hidden_act is 'gelu'"),
    ],
)
def test_zeros_and_nulls_are_named(case: str, values: dict[str, Any], message: str) -> None:
    config = read_golden(case)["config"] | values
    with pytest.raises(ConfigError, match=message):
        read({name: value for name, value in config.items() if value != "absent"})


def test_defaults_of_heads_and_nulls_of_minicpm3() -> None:
    """The values of the families' releases, by hand."""
    for case, head_dim in (("qwen3", 128), ("gemma2", 256), ("gpt_oss", 64), ("mistral", 24 // 5)):
        config = {name: value for name, value in read_golden(case)["config"].items() if name != "head_dim"}
        assert next(read(config).blocks()).mixer.head_dim == head_dim
    config = read_golden("minicpm3")["config"]
    model = read(config | {"scale_depth": None, "dim_model_base": None, "v_head_dim": None})
    assert (model.residual_multiplier, model.logit_multiplier, next(model.blocks()).mixer.value_dim) == (
        1.0,
        1.0,
        6,
    )


@pytest.mark.nightly
def test_the_golden_settings_are_what_transformers_says_today() -> None:
    """Where this fails, look whether the family changed, then make the file again."""
    from tests.convert.make_settings_golden import golden

    fresh = json.loads(json.dumps(golden(), default=repr))
    assert fresh["ropes"] == GOLDEN["ropes"]
    for name, wanted in PUBLISHED.items():
        found = fresh["families"][name]
        assert {key: found["defaults"].get(key) for key in wanted["defaults"]} == wanted["defaults"], name
