"""The number of rotated dims: in files of earlier versions, in transformers' fraction, in GGUF's count."""

import functools
import json
import logging
import math
from typing import Any

import jax
import numpy as np
import pytest

from slmjax.config import ConfigError, dumps, fingerprint, from_json, loads, to_json
from slmjax.convert.families import GGUF_FAMILIES, HF_FAMILIES
from slmjax.convert.family import read_settings
from slmjax.convert.gguf import settings as gguf_settings
from slmjax.convert.hf import settings as hf_settings
from slmjax.convert.settings import Settings
from slmjax.convert.source import choose_family
from slmjax.distill.slices import student_cuts
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.definition import define
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.rope import LongScaling, rotary

PHI3 = next(family for family in HF_FAMILIES if family.architecture == "Phi3ForCausalLM")
PHI3_GGUF = next(family for family in GGUF_FAMILIES if family.architecture == "phi3")


def model(**attention: Any) -> ModelConfig:
    block = BlockConfig(mixer=AttentionConfig(num_heads=2, **attention), ffn=MlpConfig(hidden_dim=16))
    return ModelConfig(embed_dim=40, stack=(LayerGroup(pattern=(block,)),), vocab_size=32, norm_eps=1e-5)


def first_mixer(config: ModelConfig) -> AttentionConfig:
    mixer = next(config.blocks()).mixer
    assert isinstance(mixer, AttentionConfig)
    return mixer


# Files of earlier versions ----------------------------------------------------------------------------------
LATER_FIELDS = ("rotary_dim", "output_gate", "writes_kv", "reads_kv")  # of attention
LATER_FFN_FIELDS = ("shared_as", "nested", "activation_multiplier", "output_multiplier")


def older(config: ModelConfig, fraction: Any) -> str:
    """model.json as it was written when configs had a `rope_fraction`, and phases of quantization."""
    later = ("parameterization", "base_width", "base_depth", "base_head_dim", "multi_token", "loops")
    later += ("per_layer_embeddings",)
    data = {name: value for name, value in to_json(config).items() if name not in later} | {"quant": []}
    for block in data["stack"][0]["pattern"]:
        for name in LATER_FIELDS:
            del block["mixer"][name]
        for name in LATER_FFN_FIELDS:
            del block["ffn"][name]
        block["mixer"]["rope_fraction"] = fraction
        block["passes"] = block.pop("num_loops")
    return json.dumps(data)


@pytest.mark.parametrize(
    ("head_dim", "fraction", "expected"),
    [
        (None, 1.0, None),
        (None, 0.5, 10),
        (None, 0.35, 6),
        (20, 0.75, 14),
        (8, 0.25, 2),
        (10, 0.5, 4),
        (7, 1.0, None),
    ],
)
def test_a_fraction_of_earlier_versions_keeps_its_meaning(head_dim, fraction, expected, caplog) -> None:
    """Earlier versions rotated 2 * int(head_dim * rope_fraction / 2) dims; heads have 40 / 2 by default."""
    with caplog.at_level(logging.INFO, logger="slmjax"):
        mixer = first_mixer(loads(ModelConfig, older(model(head_dim=head_dim), fraction)))
    assert mixer.rotary_dim == expected
    assert ("is read as rotary_dim" in caplog.text) == (expected is not None)
    rotated = mixer.resolved_rotary_dim(model().layer_dims())
    assert rotated == 2 * int((head_dim or 20) * fraction / 2)


def test_heads_that_do_not_rotate_as_a_whole_are_noted() -> None:
    """Of 7 dims the last cannot be rotated; that is trained, with a warning."""
    (note,) = model(head_dim=7).training_notes()
    assert "Set mixer.rotary_dim=6" in note
    for quiet in ({"head_dim": 8}, {"head_dim": 7, "rotary_dim": 6}, {"head_dim": 7, "rope_base": None}):
        assert not model(**quiet).training_notes()


def test_an_invalid_fraction_is_refused() -> None:
    fields = {
        name: value for name, value in to_json(AttentionConfig(num_heads=2)).items() if name != "rotary_dim"
    }
    assert from_json(AttentionConfig, {**fields, "rope_fraction": 0.5, "head_dim": 8}).rotary_dim == 4
    assert from_json(AttentionConfig, {**fields, "rope_fraction": 0.5, "rope_base": None}).rotary_dim is None
    with pytest.raises(ConfigError, match="needs head_dim: set rotary_dim, a number of dims"):
        from_json(AttentionConfig, {**fields, "rope_fraction": 0.5})
    with pytest.raises(ConfigError, match=r"mixer: rope_fraction must be between 0 and 1, got 1.5"):
        from_json(
            BlockConfig,
            {
                **to_json(BlockConfig(mixer=AttentionConfig(num_heads=2), ffn=None)),
                "mixer": {**fields, "rope_fraction": 1.5},
            },
        )


def test_fingerprints_are_those_of_earlier_versions() -> None:
    """A study can then resume with members that an earlier version trained."""
    before = {
        name: value
        for name, value in to_json(AttentionConfig(num_heads=2, head_dim=8)).items()
        if name not in LATER_FIELDS
    }
    for rotated, fraction in ((None, 1.0), (4, 0.5)):
        actual = fingerprint(AttentionConfig(num_heads=2, head_dim=8, rotary_dim=rotated))
        assert actual == fingerprint({**before, "rope_fraction": fraction})
    config = model(rotary_dim=10)  # heads are 40 / 2 wide
    assert loads(ModelConfig, dumps(config)) == config
    assert fingerprint(config) == fingerprint(json.loads(older(config, 0.5)))


# Hugging Face -----------------------------------------------------------------------------------------------
def phi3(**keys: Any) -> dict[str, Any]:
    sizes = {
        "vocab_size": 32,
        "hidden_size": 40,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return {**sizes, "num_key_value_heads": 2, **keys}


def test_an_odd_number_of_dims_is_rotated_as_in_transformers() -> None:
    """int(20 * 0.35) = 7 dims have frequencies 10000 ** (-2i / 7), i = 0 to 3, in pairs i and i + 4 of 8."""
    mixer = first_mixer(read_settings(PHI3, phi3(partial_rotary_factor=0.35), where="config.json"))
    assert mixer.rotary_dim == 8 and mixer.rope_base == pytest.approx(10_000.0 ** (8 / 7))
    x = np.random.default_rng(0).normal(size=(1, 1, 1, 20)).astype(np.float32)
    position = 5
    # inv_freq as transformers prints it
    angles = position * np.array([1.0, 7.1969e-02, 5.1795e-03, 3.7276e-04])
    first, second, unrotated = np.split(x.ravel(), [4, 8])
    expected = [
        first * np.cos(angles) - second * np.sin(angles),
        second * np.cos(angles) + first * np.sin(angles),
    ]
    settings = {"base": mixer.rope_base, "rotary_dim": mixer.rotary_dim}
    y = jax.jit(functools.partial(rotary, **settings))(x, np.array([[position]]))
    np.testing.assert_allclose(np.ravel(y), np.concatenate([*expected, unrotated]), atol=2e-4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"partial_rotary_factor": 0.01}, r"rotary_dim=0"),
        ({"partial_rotary_factor": 1.2}, r"rotary_dim=24 and heads of 20 dims"),
        ({"head_dim": 7}, r"all 7 dims of a head are rotated, in pairs: the number must be even"),
        (
            {
                "partial_rotary_factor": 0.35,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
            },
            (
                r"rotates 7, an odd number, which transformers does not support with scaled frequencies "
                r"\(LongScaling\)"
            ),
        ),
        (
            {
                "partial_rotary_factor": 0.5,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
            },
            r"short_factors has 4 values, but 5 pairs of dims are rotated",
        ),
    ],
)
def test_rotations_that_cannot_be_computed_are_refused_on_reading(keys, message) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(PHI3, phi3(**keys), where="config.json")


def test_every_number_of_dims_survives_the_exported_fraction() -> None:
    for head_dim in range(2, 513, 2):
        for rotated in range(2, head_dim + 1, 2):
            assert int(head_dim * hf_settings.rotary_factor(rotated, head_dim)) == rotated
    # The quotient itself would lose one: int(44 * (30 / 44)) = 29.
    assert int(44 * (30 / 44)) == 29 and hf_settings.rotary_factor(30, 44) == math.nextafter(30 / 44, 1.0)


# GGUF -------------------------------------------------------------------------------------------------------
def gguf_rope(head_dim: int, count: Any) -> dict[str, Any]:
    return gguf_settings.read_rope(
        Settings({"rope.dimension_count": count, "context_length": 64}, where="file"), head_dim=head_dim
    )


def test_every_dimension_count_is_read_exactly() -> None:
    """Heads of 44 with a count of 30 were read as 28: 30 / 44 * 44 / 2 is below 15 in float64, as in 1,087
    pairs up to 512.
    """
    assert gguf_rope(44, 30)["rotary_dim"] == 30
    pairs = [(head_dim, count) for head_dim in range(2, 513, 2) for count in range(2, head_dim, 2)]
    lost = [
        (head_dim, count) for head_dim, count in pairs if 2 * int(head_dim * (count / head_dim) / 2) != count
    ]
    assert len(lost) == 1087
    for head_dim, count in lost:
        assert gguf_rope(head_dim, count)["rotary_dim"] == count
    assert gguf_rope(44, 44)["rotary_dim"] is None


@pytest.mark.parametrize("count", [29, 0, 46, 30.0, -2])
def test_counts_that_cannot_be_computed_are_refused_on_reading(count) -> None:
    with pytest.raises(
        ConfigError, match=r"rope.dimension_count is .*even, at least 2, and at most the dims of a head, 44"
    ):
        gguf_rope(44, count)


def test_rotated_dims_are_written_as_they_are() -> None:
    for rotated in (None, 2, 14):
        config = model(rotary_dim=rotated)
        gguf = choose_family(config, (PHI3_GGUF,), format_name="GGUF", preferred=None, tolerance=1e-6)
        assert gguf.settings["rope.dimension_count"] == (rotated or 20)
        hf = choose_family(config, (PHI3,), format_name="HF", preferred=None)
        assert int(20 * hf.settings.get("partial_rotary_factor", 1.0)) == (rotated or 20)
    others = [family for family in HF_FAMILIES if family is not PHI3]
    with pytest.raises(ValueError, match="no family of HF"):
        choose_family(model(rotary_dim=14), others, format_name="HF", preferred=None)
    with pytest.raises(ValueError, match="short_factors has 1 values, but 10 pairs of dims"):
        scaling = LongScaling(short_factors=(1.0,), long_factors=(1.0,), original_context=4)
        model(rope_scaling=scaling, head_dim=20).layer_dims()
        first_mixer(model(rope_scaling=scaling)).resolved_rotary_dim(model().layer_dims())


# Students of wider models -----------------------------------------------------------------------------------
def test_a_default_and_its_value_are_the_same_setting(caplog: pytest.LogCaptureFixture) -> None:
    plain, written, other = (
        define(model(**more)) for more in ({}, {"rotary_dim": 20, "scale": 20**-0.5}, {"rotary_dim": 4})
    )
    with caplog.at_level(logging.WARNING):
        student_cuts(plain, written, chosen=(0,))
        student_cuts(written, plain, chosen=(0,))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        student_cuts(plain, other, chosen=(0,))
    assert "rotary_dim of layer 0 is 4, and was 20 in the teacher" in caplog.text
