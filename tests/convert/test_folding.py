"""Models with muP's multipliers, exported to formats that have no field for them: the logits stay."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.checkpoints.loading import load_model, read_config
from slmjax.checkpoints.model_file import write_model_file
from slmjax.checkpoints.safetensors_files import StoredFormat
from slmjax.checkpoints.stored_model import LocalModel, open_local_model
from slmjax.convert.families import GGUF_FAMILIES, HF_FAMILIES
from slmjax.convert.folding import folded
from slmjax.convert.import_export import Target, export_model, import_model
from slmjax.convert.source import choose_export
from slmjax.formats.presets import preset
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig, NormPlacement, stack_of
from slmjax.models.canonical_form import canonical
from slmjax.models.decoder import logits
from slmjax.models.definition import define, restack, unstack
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.layers import NormKind
from slmjax.models.mixers.attention import AttentionConfig, Biases, QkNorm
from slmjax.models.mixers.differential import DifferentialAttentionConfig
from slmjax.models.mixers.latent import LatentAttentionConfig
from slmjax.models.parameterization import Parameterization
from tests.convert.synthetic import write_model
from tests.convert.test_families import read_golden, tiny_tokenizer

SCALED = {
    "parameterization": Parameterization.COMPLETEP,
    "base_width": 4,
    "base_depth": 1,
    "base_head_dim": 2,
}
TOKENS = jnp.asarray([[3, 1, 4, 1, 5]])


def two_layers(**more) -> ModelConfig:
    """Norms of queries and post-norms; latent attention and experts. Eight wide, with biases."""
    attention = AttentionConfig(num_heads=2, qk_norm=QkNorm.PER_HEAD, biases=Biases.ALL)
    plain = AttentionConfig(num_heads=2, biases=Biases.ALL)
    latent = LatentAttentionConfig(
        num_heads=2, latent_dim=4, plain_dim=2, rope_dim=2, value_dim=4, query_rank=4, bias=True
    )
    blocks = (
        BlockConfig(mixer=attention, ffn=MlpConfig(hidden_dim=8, bias=True), norm=NormPlacement.SANDWICH),
        BlockConfig(mixer=latent, ffn=MoeConfig(hidden_dim=4, shared_hidden_dim=4, bias=True)),
        BlockConfig(mixer=plain, ffn=MlpConfig(hidden_dim=8, bias=True)),
    )
    return ModelConfig(embed_dim=8, stack=(LayerGroup(pattern=blocks),), vocab_size=11, **{**SCALED, **more})


@pytest.mark.parametrize("norm_kind", [NormKind.CENTERED_RMS, NormKind.LAYER])
def test_logits_stay(norm_kind):
    config = two_layers(norm_kind=norm_kind)
    definition = define(config)
    draws = np.random.default_rng(0)
    params, buffers = (
        {path: jnp.asarray(draws.normal(size=leaf.shape), jnp.float32) for path, leaf in shapes.items()}
        for shapes in (definition.params, definition.buffers)
    )
    flat = {path: np.asarray(leaf) for path, leaf in unstack(config, {**params, **buffers}).items()}
    local = LocalModel(
        path=Path("nowhere"),
        config=config,
        read=flat.__getitem__,
        dtype=lambda path: np.dtype(np.float32),
        formats={},
        encoded=lambda path: pytest.fail(path),
        family=None,
        step=None,
    )
    plain = folded(local)
    expected = canonical(config)
    assert (expected.residual_multiplier, expected.logit_multiplier) == (1 / 3, 0.5)
    assert (plain.config.residual_multiplier, plain.config.logit_multiplier) == (1.0, 1.0)
    assert plain.config.parameterization is Parameterization.STANDARD
    arrays = restack(
        plain.config, {path: jnp.asarray(plain.read(path)) for path in flat}, like=definition.params
    )
    results = [
        jax.jit(lambda arrays, model=model: logits(define(model).merge(arrays, buffers), TOKENS))(each)
        for model, each in ((config, params), (plain.config, arrays))
    ]
    np.testing.assert_allclose(*results, rtol=2e-4, atol=2e-4)
    changed = [path for path in flat if not np.array_equal(plain.read(path), flat[path])]
    assert "final_norm/scale" in changed and "layers/0/mixer/query_norm/scale" in changed
    assert "layers/0/mixer/output/weight" not in changed and "layers/1/ffn/experts/down" in changed


def scaled_directory(tmp_path: Path, case: str, **more) -> Path:
    """An imported model of a family, whose configuration then has a parameterization."""
    golden = read_golden(case)
    write_model(tmp_path / "theirs", golden["config"], golden["shapes"])
    import_model(tmp_path / "theirs", tmp_path / "ours", tokenizer=tiny_tokenizer(tmp_path))
    config = read_config(tmp_path / "ours")
    scaled = dataclasses.replace(config, **{**SCALED, "base_width": config.embed_dim // 2, **more})
    write_model_file(tmp_path / "ours", scaled)
    return tmp_path / "ours"


def test_round_trip(tmp_path):
    """Qwen3 has no multipliers and norms of queries: its weights have the factors."""
    ours = scaled_directory(tmp_path, "qwen3")
    written = export_model(ours, tmp_path / "exported", to=Target.HF)
    assert written.family == "Qwen3ForCausalLM"
    import_model(tmp_path / "exported", tmp_path / "back")
    results = [logits(load_model(path).model, TOKENS) for path in (ours, tmp_path / "back")]
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-4)


def test_family_with_multipliers(tmp_path):
    """Without norms of queries Granite has a field for each factor: the weights stay."""
    local = open_local_model(scaled_directory(tmp_path, "granite"))
    for families, name in ((HF_FAMILIES, "GraniteForCausalLM"), (GGUF_FAMILIES, "granite")):
        export, as_written = choose_export(
            local, families, format_name="this", preferred=None, keeps_codes=True, tolerance=1e-6
        )
        assert export.family.architecture == name
        assert as_written is local


def test_what_cannot_be_multiplied_is_refused(tmp_path):
    local = open_local_model(scaled_directory(tmp_path, "qwen3"))
    name = "layers/0/ffn/down/weight"
    quantized = dataclasses.replace(local, formats={name: StoredFormat(spec=preset("q8_0"), axis=0)})
    with pytest.raises(ValueError, match=f"{name} is quantized, so that the multiplier 0.25 of parameteriz"):
        folded(quantized)
    layers = stack_of([BlockConfig(mixer=DifferentialAttentionConfig(num_heads=2), ffn=None)])
    with pytest.raises(ValueError, match="cannot become part of the weights of DifferentialAttentionConfig"):
        folded(dataclasses.replace(local, config=dataclasses.replace(local.config, stack=layers)))
    # Dequantized numbers can be multiplied.
    plain = folded(quantized, keeps_codes=False)
    np.testing.assert_allclose(plain.read(name), 0.25 * local.read(name), rtol=1e-6)
