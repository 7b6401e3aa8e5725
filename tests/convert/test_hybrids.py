"""Families with several kinds of mixers: older spellings, layers of one kind alone, what is refused."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from slmjax.config import ConfigError
from slmjax.convert.families import falcon_h1, granite_hybrid, lfm2, mamba2
from slmjax.convert.family import Family, Inexpressible, read_settings
from slmjax.convert.gguf import mamba2_settings as gguf_mamba2
from slmjax.convert.source import FamilyExport, choose_family
from slmjax.models.architecture import BlockConfig, ModelConfig, stack_of
from slmjax.models.canonical_form import canonical
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.mixers.attention import AttentionConfig, QkNorm
from slmjax.models.mixers.mamba2 import GatedNorm, Mamba2Config
from slmjax.models.mixers.parallel import ParallelMixerConfig
from slmjax.models.mixers.short_convolution import ShortConvolutionConfig
from slmjax.models.protocols import FfnConfig, MixerConfig
from tests.convert.test_families import read_golden

ATTENTION = AttentionConfig(num_heads=2, qk_norm=QkNorm.PER_HEAD)
NOPE = AttentionConfig(num_heads=2, rope_base=None)
MAMBA2 = Mamba2Config(head_dim=4, state_dim=3)
FFN = MlpConfig(hidden_dim=20)


def model(*mixers: MixerConfig, ffn: FfnConfig | None = FFN, **settings: Any) -> ModelConfig:
    blocks = [BlockConfig(mixer=mixer, ffn=ffn) for mixer in mixers]
    return ModelConfig(embed_dim=16, vocab_size=32, stack=stack_of(blocks), **settings)


def export(config: ModelConfig, family: Family) -> FamilyExport:
    return choose_family(config, (family,), format_name="Hugging Face", preferred=None)


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (model(ShortConvolutionConfig(width=4)), lfm2.HF),
        (model(ATTENTION, ATTENTION, ShortConvolutionConfig()), lfm2.HF),
        (model(MAMBA2, MAMBA2), granite_hybrid.HF),
        (model(NOPE, MAMBA2, ffn=MoeConfig(shared_hidden_dim=12, hidden_dim=6)), granite_hybrid.HF),
        (model(MAMBA2, ffn=None), mamba2.HF),
        # A chunk is how a sequence is computed: it is no part of the model.
        (model(dataclasses.replace(MAMBA2, chunk_size=7, inner_dim=32), ffn=None), mamba2.HF),
        (model(ParallelMixerConfig(mixers=(AttentionConfig(num_heads=2), MAMBA2))), falcon_h1.HF),
    ],
)
def test_any_order_of_kinds_is_written_and_read_back(config: ModelConfig, family: Family) -> None:
    found = export(config, family)
    settings = family.settings(found.settings, where="config.json")
    assert canonical(family.read(settings)) == canonical(config)


@pytest.mark.parametrize(
    ("config", "family", "message"),
    [
        (model(MAMBA2, ATTENTION), lfm2.HF, r"the kind of a mixer is <class .*Mamba2Config"),
        (
            model(MAMBA2, ffn=MoeConfig(hidden_dim=6)),
            granite_hybrid.HF,
            r"besides the experts there is a shared one",
        ),
        (
            model(dataclasses.replace(MAMBA2, inner_dim=24), ffn=None),
            mamba2.HF,
            r"24 dims, which must be a multiple of the model's 16",
        ),
        (
            model(dataclasses.replace(MAMBA2, num_groups=2, norm_groups=1), ffn=None),
            mamba2.HF,
            r"norm_groups=1 must be num_groups=2",
        ),
        (
            model(dataclasses.replace(MAMBA2, input_bias=True), ffn=None),
            mamba2.HF,
            r"both projections of a Mamba-2 layer have biases",
        ),
        (
            model(dataclasses.replace(MAMBA2, norm=GatedNorm.BEFORE_GATE), ffn=None),
            mamba2.HF,
            r"norm = before_gate \(read back as after_gate\)",
        ),
        (model(MAMBA2), mamba2.HF, r"layer 0.ffn = MlpConfig \(read back as None\)"),
        (
            model(MAMBA2, ffn=dataclasses.replace(FFN, output_multiplier=0.5)),
            granite_hybrid.HF,
            r"output_multiplier = 0.5",
        ),
        (
            model(ParallelMixerConfig(mixers=(ATTENTION, MAMBA2))),
            falcon_h1.HF,
            r"layer 0.mixer.mixers\[0\].qk_norm = per_head \(read back as none\)",
        ),
        (
            model(ParallelMixerConfig(mixers=(MAMBA2, AttentionConfig(num_heads=2)))),
            falcon_h1.HF,
            r"the first of the parallel mixers is Mamba2Config",
        ),
        (
            model(ParallelMixerConfig(mixers=(AttentionConfig(num_heads=2), MAMBA2)), ffn=None),
            falcon_h1.HF,
            r"a feed-forward layer is NoneType",
        ),
    ],
)
def test_what_a_family_cannot_represent_is_refused(config: ModelConfig, family: Family, message: str) -> None:
    with pytest.raises((ValueError, Inexpressible), match=message):
        export(config, family)


@pytest.mark.parametrize(
    ("config", "family", "message"),
    [
        (model(MAMBA2, MAMBA2), granite_hybrid.GGUF, r"there are layers of both kinds"),
        (
            model(dataclasses.replace(MAMBA2, conv_bias=False), ffn=None),
            mamba2.GGUF,
            r"convolutions of a Mamba-2 layer have biases",
        ),
        (
            model(ParallelMixerConfig(mixers=(AttentionConfig(num_heads=2), MAMBA2)), logit_multiplier=0.5),
            falcon_h1.GGUF,
            r"logit_multiplier = 0.5 \(read back as 1.0\)",
        ),
        (model(ShortConvolutionConfig()), lfm2.GGUF, r"at least one layer has attention"),
        (
            model(ATTENTION, ShortConvolutionConfig(bias=True)),
            lfm2.GGUF,
            r"layer 1.mixer.bias = True \(read back as False\)",
        ),
        (
            model(dataclasses.replace(ATTENTION, head_dim=10), ShortConvolutionConfig()),
            lfm2.GGUF,
            r"2 heads of 10 dims must be as wide as the model, 16",
        ),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(config: ModelConfig, family: Family, message: str) -> None:
    with pytest.raises((ValueError, Inexpressible), match=message):
        export(config, family)


@pytest.mark.parametrize("counts", [2, [2, 0], [0, 0, 0]])
def test_kinds_of_layers_in_gguf_need_a_number_for_each(counts: Any) -> None:
    """Layers without attention are those without key-value heads."""
    keys = export(model(ATTENTION, ShortConvolutionConfig(), ShortConvolutionConfig()), lfm2.GGUF).settings
    assert keys["attention.head_count_kv"] == [2, 0, 0]
    with pytest.raises(ConfigError, match=r"a hybrid model has a number for each of its 3 layers"):
        read_settings(lfm2.GGUF, keys | {"attention.head_count_kv": counts}, where="a file")


def test_rates_of_decay_in_gguf_by_hand() -> None:
    """Stored are rates with a minus sign: exp(0) and exp(log 3) as -1 and -3, one for each head."""
    rule = next(rule for rule in gguf_mamba2.mamba2_rules(1) if rule.theirs == ("ssm_a",))
    ours = np.log(np.array([1, 3], np.float32))
    theirs = np.array([[-1], [-3]], np.float32)
    np.testing.assert_allclose(rule.write([ours])[0], theirs, rtol=1e-6)
    np.testing.assert_allclose(rule.read([theirs], [(2,)])[0], ours, rtol=1e-6)
    with pytest.raises(ValueError, match=r"its values must be negative"):
        rule.read([-theirs], [(2,)])


def test_older_spellings_of_lfm2_mean_the_same() -> None:
    """The list of layers with attention, and the width and the tied head by other names."""
    new = read_golden("lfm2")["config"]
    old = {name: value for name, value in new.items() if name not in ("layer_types", "intermediate_size")}
    old |= {"full_attn_idxs": [2, 4], "block_ff_dim": 61, "tie_embedding": False, "num_heads": 4}

    def read(config: dict[str, Any]) -> ModelConfig:
        return read_settings(lfm2.HF, config, where="config.json")

    assert read(old) == read(new)
    # All layers have attention where no list is given.
    del old["full_attn_idxs"]
    assert all(isinstance(block.mixer, AttentionConfig) for block in read(old).blocks())
    # int(1.1 int(2 61 / 3)) is 44, and the next multiple of 6 is 48.
    assert next(read(new).blocks()).ffn == MlpConfig(hidden_dim=48)
    assert next(read(new | {"block_auto_adjust_ff_dim": False}).blocks()).ffn == MlpConfig(hidden_dim=61)


def test_names_of_kinds_in_granite4() -> None:
    """Released files have other names than transformers writes, and the older key is still read."""
    new = read_golden("granite4_hybrid")["config"]
    kinds = ["mamba", "mamba", "attention", "mamba", "attention"]
    older = {name: value for name, value in new.items() if name != "layer_types"}
    expected = read_settings(granite_hybrid.HF, new, where="config.json")
    for config in (new | {"layer_types": kinds}, older | {"layers_block_type": kinds}):
        assert read_settings(granite_hybrid.HF, config, where="config.json") == expected
    recurrent = read_settings(granite_hybrid.HF, older, where="config.json")
    assert all(isinstance(block.mixer, Mamba2Config) for block in recurrent.blocks())


def test_bounds_of_steps_in_both_spellings() -> None:
    config = read_golden("mamba2")["config"]
    for bounds in ([0.0, math.inf], [0, {"__float__": "Infinity"}]):
        read_settings(mamba2.HF, config | {"time_step_limit": bounds}, where="config.json")
    with pytest.raises(ConfigError, match=r"time_step_limit is \[0.001, 0.1\]: bounds of steps"):
        read_settings(mamba2.HF, config | {"time_step_limit": [0.001, 0.1]}, where="config.json")


def test_a_model_without_a_context_length_gets_one_with_a_note() -> None:
    notes: list[str] = []
    config = read_golden("mamba2")["config"]
    assert read_settings(mamba2.HF, config, where="x", notes=notes).context_length == 2048
    assert len(notes) == 1 and "context_length is 2048" in notes[0]
    longer = read_settings(mamba2.HF, config | {"max_position_embeddings": 4096}, where="x", notes=notes)
    assert longer.context_length == 4096 and len(notes) == 1


@pytest.mark.parametrize("head_dim", [8, 12, 64, 80])
def test_the_multiplier_of_keys_gives_the_scale_to_the_last_bit(head_dim: int) -> None:
    """Every scale that a multiplier gives is read back, although a quotient of floats rounds."""
    for factor in (1.0, 0.39, 0.39062499999999994, 1 / 3, 0.7071067811865476, 5.1):
        attention = AttentionConfig(num_heads=2, head_dim=head_dim, scale=factor * head_dim**-0.5)
        export(model(ParallelMixerConfig(mixers=(attention, MAMBA2))), falcon_h1.HF)
