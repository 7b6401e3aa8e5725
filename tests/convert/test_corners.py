"""Corners of models from elsewhere: keys left out, files that contradict each other, numbers and ids that do
not fit, licences.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import slmjax
from slmjax.checkpoints import safetensors_files
from slmjax.checkpoints.stored_model import read_origin
from slmjax.convert import hf_directory
from slmjax.convert.families import HF_FAMILIES
from slmjax.convert.family import read_settings
from slmjax.convert.import_export import Target, WeightType, export_model, import_model
from slmjax.data.tokenizers import BpeTokenizer, ByteTokenizer
from tests.convert.synthetic import write_model
from tests.convert.test_families import read_golden, tiny_tokenizer


def read_without(case: str, *names: str, **values: Any) -> Any:
    config = {
        name: value for name, value in (read_golden(case)["config"] | values).items() if name not in names
    }
    family = next(family for family in HF_FAMILIES if family.architecture == config["architectures"][0])
    return read_settings(family, config, where=case)


def test_absent_keys_mean_what_each_familys_library_means() -> None:
    """Values of transformers 5.23; a golden file names every key, and so cannot show these."""
    gemma2 = read_without("gemma2", "hidden_activation")
    assert next(gemma2.blocks()).ffn.activation.value == "gelu"
    mixtral = read_without("mixtral", "rope_parameters", "rms_norm_eps")
    assert next(mixtral.blocks()).mixer.rope_base == 1e6 and mixtral.norm_eps == 1e-5
    qwen2 = read_without("qwen2", "sliding_window", "layer_types")
    assert [block.mixer.window for block in qwen2.blocks()] == [None, 4096]
    minicpm3 = read_without("minicpm3", "scale_emb", "v_head_dim")
    assert minicpm3.embed_multiplier == 12 and next(minicpm3.blocks()).mixer.value_dim == 6
    scaling = next(read_without("gpt_oss", "rope_parameters").blocks()).mixer.rope_scaling
    assert (scaling.factor, scaling.original_context, scaling.whole_dims) == (32.0, 4096, False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": "24"}, "does not describe a valid LlamaForCausalLM"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, but must be greater than 0"),
        ({"num_hidden_layers": 100_000}, "num_hidden_layers is 100,000: at most 4,096 is supported"),
    ],
)
def test_damaged_settings_name_the_file(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_without("llama", **values)


def test_the_largest_settings_are_read_or_refused_quickly() -> None:
    """Time grows with the layers alone, whatever repeats in them; experts are counted over all layers."""
    started = time.process_time()
    model = read_without("llama", num_hidden_layers=4096)
    assert [(len(group.pattern), group.repeats) for group in model.stack] == [(1, 4096)]
    with pytest.raises(ValueError, match="16,777,216 experts together: at most 262,144"):
        read_without("mixtral", num_hidden_layers=4096, num_local_experts=4096)
    assert time.process_time() - started < 10


def test_which_file_a_tensor_is_read_from(tmp_path: Path) -> None:
    """As transformers chooses: model.safetensors before an index, and from an index what it says of each
    name.
    """
    one, other = (
        {"a": np.full((2,), value, np.float32), "b": np.full((2,), value, np.float32)} for value in (1.0, 2.0)
    )
    save_file(one, tmp_path / "first.safetensors")
    save_file(other, tmp_path / "second.safetensors")
    with pytest.raises(ValueError, match=r"a is in first.safetensors and in second.safetensors: delete"):
        safetensors_files.TensorFiles(tmp_path)
    (tmp_path / safetensors_files.INDEX).write_text(
        json.dumps({"weight_map": {"a": "first.safetensors", "b": "second.safetensors"}})
    )
    tensors = safetensors_files.TensorFiles(tmp_path)
    assert (tensors.read("a")[0], tensors.read("b")[0], tensors.names) == (1.0, 2.0, ["a", "b"])
    (tmp_path / safetensors_files.INDEX).write_text(
        json.dumps({"weight_map": {"a": "first.safetensors", "c": "second.safetensors"}})
    )
    with pytest.raises(ValueError, match=r"second.safetensors has no c"):
        safetensors_files.TensorFiles(tmp_path)
    save_file({"a": np.full((2,), 3.0, np.float32)}, tmp_path / "model.safetensors")
    assert safetensors_files.TensorFiles(tmp_path).names == ["a"]


def test_numbers_too_large_for_float16_are_named(tmp_path: Path) -> None:
    golden = read_golden("llama_tied")
    write_model(tmp_path / "theirs", golden["config"], golden["shapes"])
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    save_file(
        tensors | {"model.norm.weight": np.full((24,), 1e6, np.float32)},
        tmp_path / "theirs" / "model.safetensors",
    )
    import_model(tmp_path / "theirs", tmp_path / "ours", tokenizer=tiny_tokenizer(tmp_path))
    with pytest.raises(ValueError, match=r"model.norm.weight has values above 65504, the largest in float16"):
        export_model(tmp_path / "ours", tmp_path / "out", to=Target.HF, dtype=WeightType.F16)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out-*"))
    export_model(tmp_path / "ours", tmp_path / "out", to=Target.HF, dtype=WeightType.BF16)
    assert safetensors_files.TensorFiles(tmp_path / "out").dtype("model.norm.weight") == jnp.bfloat16


def with_vocabulary(directory: Path, num_rows: int) -> None:
    golden = read_golden("llama_tied")
    shapes = {
        name: [num_rows if size == 47 else size for size in shape] for name, shape in golden["shapes"].items()
    }
    write_model(
        directory, golden["config"] | {"vocab_size": num_rows, "eos_token_id": [1, num_rows - 1]}, shapes
    )


def test_every_end_of_a_turn_is_kept_and_tokens_without_rows_are_not(tmp_path: Path) -> None:
    words = (
        ByteTokenizer().build(()).add_tokens(["<turn>"], special=False).add_tokens(["<image>"], special=True)
    )
    with_vocabulary(tmp_path / "theirs", words.vocab_size - 1)  # no row for <image>
    words.save(tmp_path / "theirs")
    written = import_model(tmp_path / "theirs", tmp_path / "ours")
    assert "added tokens from id 259 on have no rows" in written.notes[0]
    loaded = slmjax.load_model(tmp_path / "ours")
    assert loaded.tokenizer.end_ids == (1, 258) and loaded.tokenizer.vocab_size == 259
    export_model(tmp_path / "ours", tmp_path / "out", to=Target.HF)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [1, 258]
    larger = BpeTokenizer(vocab_size=300).build(["the theme of the thing"] * 9)
    with pytest.raises(ValueError, match=r"and the model 259 rows: they do not belong together"):
        import_model(tmp_path / "theirs", tmp_path / "again", tokenizer=_saved(larger, tmp_path / "larger"))


def _saved(words: Any, directory: Path) -> Path:
    words.save(directory)
    return directory


def test_added_tokens_begin_as_the_mean_and_padding_is_never_a_token(tmp_path: Path) -> None:
    with_vocabulary(tmp_path / "theirs", 262)  # four rows more than there are bytes and ends
    import_model(
        tmp_path / "theirs",
        tmp_path / "ours",
        tokenizer=_saved(ByteTokenizer().build(()), tmp_path / "bytes"),
        add_tokens=[f"<tool{i}>" for i in range(6)],
        vocab_multiple=128,
    )
    loaded = slmjax.load_model(tmp_path / "ours")
    table = loaded.params["embed/table"]
    before = safetensors_files.TensorFiles(tmp_path / "theirs").read("model.embed_tokens.weight")
    assert table.shape[0] == 384 and loaded.config.known_vocab_size == loaded.tokenizer.vocab_size == 264
    np.testing.assert_array_equal(table[:258], before[:258])
    np.testing.assert_allclose(table[258:264], np.tile(before[:258].mean(0), (6, 1)), atol=1e-6)
    assert not np.any(np.asarray(table[264:]))
    assert loaded.tokenizer.encode_with_special("<tool5>") == [263]


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ('language: en\nlicense: "mit"', "mit"),
        ("license:\n- cc-by-4.0", "cc-by-4.0"),
        ("license: other\nlicense_name: llama3.2", "other, llama3.2"),
        ("language: en", None),
    ],
)
def test_the_licence_is_that_of_the_readmes_head(tmp_path: Path, head: str, expected: str | None) -> None:
    golden = read_golden("llama_tied")
    write_model(tmp_path / "theirs", golden["config"], golden["shapes"])
    (tmp_path / "theirs" / "README.md").write_bytes(
        f"---\n{head}\n---\n# A model\nlicense: fooled\n".encode() + b"\xff"
    )
    import_model(tmp_path / "theirs", tmp_path / "ours")
    assert read_origin(tmp_path / "ours")["license"] == expected


def test_a_mobilellm_is_a_llama_by_another_name(tmp_path: Path) -> None:
    golden = read_golden("llama_tied")
    config = golden["config"] | {
        "architectures": ["MobileLLMForCausalLM"],
        "share_embedding": True,
        "layer_sharing": False,
    }
    write_model(tmp_path / "theirs", config, golden["shapes"])
    import_model(tmp_path / "theirs", tmp_path / "ours", tokenizer=tiny_tokenizer(tmp_path))
    assert export_model(tmp_path / "ours", tmp_path / "out", to=Target.HF).family == "LlamaForCausalLM"
    assert (
        hf_directory.open_directory(tmp_path / "out").config
        == hf_directory.open_directory(tmp_path / "theirs").config
    )
