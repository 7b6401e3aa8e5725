"""Imported models as directories: refusals with their messages, and commands that use them."""

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import slmjax
from slmjax.checkpoints import loading, safetensors_files
from slmjax.cli import main
from slmjax.convert.families import HF_FAMILIES
from slmjax.convert.import_export import Target, export_model, import_model
from slmjax.convert.source import choose_family
from slmjax.models.architecture import BlockConfig, HeadKind, LayerGroup, ModelConfig, stack_of
from slmjax.models.ffn.mlp import Activation, MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.loops import StackLoops
from slmjax.models.mixers.attention import AttentionConfig, OutputGate, QkNorm
from slmjax.models.mixers.differential import DifferentialAttentionConfig
from slmjax.models.mixers.parallel import ParallelMixerConfig
from slmjax.models.per_layer import PerLayerEmbeddingConfig
from slmjax.models.rope import LinearScaling
from tests.convert.synthetic import write_model
from tests.convert.test_families import read_golden


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A small Llama as a Hugging Face directory."""
    golden = read_golden("llama")
    write_model(tmp_path / "theirs", golden["config"], golden["shapes"])
    return tmp_path / "theirs"


def change_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(directory: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


# What is refused --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention_temperature": 0.5}, r"attention_temperature = 0.5 is not understood, and may change"),
        (
            {"architectures": ["LlamaForCausalLn"]},
            r"names LlamaForCausalLn; supported are .*Did you mean 'LlamaForCausalLM'",
        ),
        (
            {"quantization_config": {"bits": 4}},
            r"the weights are packed \({'bits': 4}\), and packed safetensors are not supported",
        ),
        ({"hidden_act": "swoosh"}, r"hidden_act is 'swoosh'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            r"rotary positions of type 'dynamic' are not supported",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "twist": 1}},
            r"rope_parameters: twist = 1 is not understood",
        ),
        (
            {"hidden_size": None},
            r"hidden_size is null, which has no meaning here: .* for the family's default, 4096$",
        ),
        (
            {"intermediate_size": 41},
            r"gives layers/0/ffn/gate/weight the shape \(24, 40\), but the configuration requires \(24, 41\)",
        ),
        ({"num_hidden_layers": 3}, r"lacks tensor model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, r"has tensor model.layers.1.input_layernorm.weight .*does not have"),
        (
            {"tie_word_embeddings": True},
            r"ties the output to the embedding, but lm_head.weight differs from it",
        ),
    ],
)
def test_what_is_not_understood_is_named(
    theirs: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    change_config(theirs, **values)
    with pytest.raises(ValueError, match=message):
        import_model(theirs, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"], "nothing is left behind"


def test_code_in_a_directory_is_never_run(theirs: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    change_config(theirs, auto_map={"AutoModelForCausalLM": "modeling_trap.Trap"})
    (theirs / "modeling_trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    import_model(theirs, tmp_path / "ours")
    (theirs / "model.safetensors").unlink()
    (theirs / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin is a pickle, which could run code and is not read"
    ):
        import_model(theirs, tmp_path / "again")
    assert not (tmp_path / "sprung").exists()


def test_damaged_files_are_named(theirs: Path, tmp_path: Path) -> None:
    whole = (theirs / "model.safetensors").read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:100], b"", b"\xff" * 64):
        (theirs / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
            import_model(theirs, tmp_path / "ours")
    (theirs / "model.safetensors").write_bytes(whole)
    (theirs / "config.json").write_text('{"architectures": [')
    with pytest.raises(ValueError, match=r"config.json is not JSON.*copy it again"):
        import_model(theirs, tmp_path / "ours")
    (theirs / "model.safetensors").unlink()  # which would be read before any index
    index = {"weight_map": {"model.norm.weight": "model-00002.safetensors"}}
    (theirs / safetensors_files.INDEX).write_text(json.dumps(index))
    change_config_back = read_golden("llama")["config"]
    (theirs / "config.json").write_text(json.dumps(change_config_back))
    with pytest.raises(ValueError, match=r"names model-00002.safetensors, which is not there"):
        import_model(theirs, tmp_path / "ours")
    (theirs / safetensors_files.INDEX).write_text(
        json.dumps({"weight_map": {"model.norm.weight": "../secret.safetensors"}})
    )
    with pytest.raises(ValueError, match=r"which is not in its directory"):
        import_model(theirs, tmp_path / "ours")


def test_integer_weights_are_refused_by_name(theirs: Path, tmp_path: Path) -> None:
    def pack(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)

    change_tensors(theirs, pack)
    with pytest.raises(ValueError, match=r"model.norm.weight is stored as I8"):
        import_model(theirs, tmp_path / "ours")


def test_nothing_is_written_over(theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"exists already"):
        import_model(theirs, tmp_path / "ours")
    assert (tmp_path / "ours" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ValueError, match=r"there is no .*nowhere"):
        import_model(tmp_path / "nowhere", tmp_path / "other")
    with pytest.raises(ValueError, match=r"is not a Hugging Face model: it has no config.json"):
        import_model(tmp_path / "ours", tmp_path / "other")


# What is accepted -------------------------------------------------------------------------------------------
def test_a_model_without_tokenizer_says_so_where_text_is_needed(theirs: Path, tmp_path: Path) -> None:
    written = import_model(theirs, tmp_path / "ours")
    assert "no tokenizer.json" in written.notes[0]
    with pytest.raises(ValueError, match=r"was imported without a tokenizer"):
        _ = slmjax.load_model(tmp_path / "ours").tokenizer
    with pytest.raises(ValueError, match=r"has no tokenizer, which other engines require"):
        export_model(tmp_path / "ours", tmp_path / "out", to=Target.HF)


def test_models_saved_without_their_head_have_shorter_names(theirs: Path, tmp_path: Path) -> None:
    golden = read_golden("llama_tied")
    write_model(tmp_path / "bare", golden["config"], golden["shapes"])
    import_model(tmp_path / "bare", tmp_path / "named")

    def shorten(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    change_tensors(tmp_path / "bare", shorten)
    import_model(tmp_path / "bare", tmp_path / "shortened")
    one, other = (
        safetensors_files.TensorFiles(tmp_path / name / safetensors_files.DIRECTORY)
        for name in ("named", "shortened")
    )
    assert one.names == other.names
    for name in one.names:
        np.testing.assert_array_equal(one.read(name), other.read(name))


def test_weights_in_several_files_stream_into_their_shardings(theirs: Path, tmp_path: Path) -> None:
    """Each device reads its part alone, whatever the dtype on disk; another mesh gives the same numbers."""

    def halve(tensors: dict[str, np.ndarray]) -> None:
        tensors.update({name: array.astype(jax.numpy.bfloat16) for name, array in tensors.items()})

    change_tensors(theirs, halve)
    tensors = safetensors_files.TensorFiles(theirs)
    safetensors_files.write_tensors(
        tmp_path / "split", ((name, tensors.read(name)) for name in tensors.names), largest_file=4000
    )
    shutil.copy(theirs / "config.json", tmp_path / "split")
    assert len(safetensors_files.TensorFiles(tmp_path / "split").files) > 3
    import_model(tmp_path / "split", tmp_path / "ours")
    stored = safetensors_files.TensorFiles(tmp_path / "ours" / safetensors_files.DIRECTORY)
    assert stored.dtype("layers/1/ffn/up/weight") == jax.numpy.bfloat16
    config = loading.read_config(tmp_path / "ours")
    mesh = slmjax_mesh()
    from slmjax.models.definition import define
    from slmjax.parallel.rules import parameter_shardings

    definition = define(config)
    places = parameter_shardings(definition.params, mesh)
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name])
        for name, leaf in definition.params.items()
    }
    divided = safetensors_files.read_stacked(tmp_path / "ours", config, like)
    assert len(divided["segments/0/blocks/0/ffn/up/weight"].sharding.device_set) == 8
    whole = slmjax.load_model(tmp_path / "ours").params
    for name, array in whole.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(divided[name], array)


def slmjax_mesh() -> jax.sharding.Mesh:
    from slmjax.parallel.mesh import MeshConfig, make_mesh

    return make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))


# What cannot be represented
# ----------------------------------------------------------------------------------------
BLOCK = BlockConfig(mixer=AttentionConfig(num_heads=2, head_dim=8), ffn=MlpConfig(hidden_dim=16))


def odd(block: BlockConfig = BLOCK, **fields: Any) -> ModelConfig:
    return ModelConfig(
        **{"embed_dim": 16, "stack": (LayerGroup(pattern=(block,)),), "vocab_size": 31, "context_length": 32}
        | fields
    )


def mixer(**fields: Any) -> BlockConfig:
    return dataclasses.replace(BLOCK, mixer=dataclasses.replace(BLOCK.mixer, **fields))


def ffn(**fields: Any) -> BlockConfig:
    return dataclasses.replace(BLOCK, ffn=dataclasses.replace(MlpConfig(hidden_dim=16), **fields))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (odd(dataclasses.replace(BLOCK, num_loops=2)), r"layer 0.num_loops = 2 \(read back as 1\)"),
        (odd(ffn(shared_as="main")), r"layer 0.ffn.shared_as = main \(read back as None\)"),
        (odd(dataclasses.replace(BLOCK, ffn=None)), r"a feed-forward layer is NoneType"),
        (odd(loops=StackLoops(num_loops=2)), r"loops = StackLoops \(read back as None\)"),
        (
            odd(per_layer_embeddings=PerLayerEmbeddingConfig(dim=4)),
            r"per_layer_embeddings = PerLayerEmbeddingConfig \(read back as None\)",
        ),
        (odd(logit_softcap=9.0), r"logit_softcap = 9.0"),
        (odd(mixer(head_dim=7, qk_norm=QkNorm.PER_HEAD)), r"it would lose layer 0.mixer.qk_norm"),
        (odd(ffn(gated=False)), r"gated = False"),
        (odd(ffn(activation=Activation.CLAMPED_SILU)), r"the activation is 'clamped_silu'"),
        (odd(mixer(qk_norm=QkNorm.PER_HEAD, sinks=True)), r"sinks = True"),
        (
            odd(stack=stack_of([mixer(writes_kv="x"), mixer(reads_kv="x")])),
            r"writes_kv = x \(read back as None\)",
        ),
        (
            odd(
                dataclasses.replace(
                    BLOCK, mixer=ParallelMixerConfig(mixers=(BLOCK.mixer, mixer(window=4).mixer))
                )
            ),
            r"is ParallelMixerConfig, but must be AttentionConfig",
        ),
        (
            odd(dataclasses.replace(BLOCK, mixer=DifferentialAttentionConfig(num_heads=1, head_dim=8))),
            r"is DifferentialAttentionConfig, but must be AttentionConfig",
        ),
        (
            odd(mixer(output_gate=OutputGate.PER_HEAD)),
            r"output_gate = per_head \(read back as none\)",
        ),
        (
            odd(
                dataclasses.replace(
                    BLOCK, ffn=MoeConfig(num_experts=2, num_selected=1, hidden_dim=8, normalize_weights=False)
                )
            ),
            r"as ",
        ),
    ],
)
def test_what_no_family_can_say_is_refused_with_the_reason(model: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_family(model, HF_FAMILIES, format_name="Hugging Face", preferred=None)


@pytest.mark.parametrize(
    ("model", "family"),
    [
        (odd(), "LlamaForCausalLM"),
        (odd(mixer(num_heads=3, num_kv_heads=1, head_dim=10)), "MistralForCausalLM"),
        (odd(mixer(head_dim=7)), "Phi3ForCausalLM"),  # 6 of 7 dims are rotated
        (odd(mixer(qk_norm=QkNorm.PER_HEAD)), "Qwen3ForCausalLM"),
        (odd(mixer(window=5)), "MistralForCausalLM"),
        (odd(mixer(qk_norm=QkNorm.PER_HEAD), vocab_multiple=64, head=HeadKind.UNTIED), "Qwen3ForCausalLM"),
        (odd(mixer(rope_scaling=LinearScaling(factor=3.0)), embed_multiplier=3.0), "GraniteForCausalLM"),
        (odd(stack=stack_of([BLOCK, mixer(rope_base=None), BLOCK])), "SmolLM3ForCausalLM"),
    ],
)
def test_odd_sizes_find_a_family(model: ModelConfig, family: str) -> None:
    found = choose_family(model, HF_FAMILIES, format_name="Hugging Face", preferred=None)
    assert found.family.architecture == family
    assert found.config.known_vocab_size == found.settings["vocab_size"] == 31


# As a user --------------------------------------------------------------------------------------------------
def test_commands_take_imported_models_as_runs(
    tmp_path: Path,
    workplace: Path,
    run_command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Train, export, import: the same evaluation and the same text; then training starts from the import.

    Training has a process of its own, as it has for a user; the other commands run in this one.
    """
    monkeypatch.chdir(tmp_path)

    def in_this_process(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        return stopped.value.code or 0, *capsys.readouterr()

    def run(*argv: str) -> Any:
        if argv[0] == "train":
            done = run_command(*argv, cwd=tmp_path)
            status = done.returncode
            output = done.stdout
            errors = done.stderr
        else:
            status, output, errors = in_this_process(*argv)
        assert status == 0, errors
        return json.loads(output) if "--json" in argv else output

    small = (
        "nano",
        "--data.path",
        str(workplace / "text.txt"),
        "--data.sequence-length",
        "32",
        "--data.batch-size",
        "4",
        "--data.split",
        "tail",
        "--run.sample-prompts",
        "",
        "--optim.warmup-steps",
        "1",
        "--run.steps",
        "2",
        "--json",
    )
    trained = run("train", *small, "--tokenizer.vocab-size", "300")
    run_dir = tmp_path / trained["run_dir"]
    written = run("export", str(run_dir), "theirs", "--to", "hf", "--json")
    assert written["family"] == "Qwen3ForCausalLM"
    assert run("import", "theirs", "ours", "--json")["parameters"] == trained["parameters"]
    card = (tmp_path / "theirs" / "model_card.md").read_text()
    assert (
        f"{trained['bits_per_byte']:.4f}" in card
        and json.loads((run_dir / "data.json").read_text())[0]["hash"] in card
    )
    text = ("--data.path", str(workplace / "text.txt"), "--data.sequence-length", "32", "--json")
    one, other = (run("eval", str(path), *text)["text"] for path in (run_dir, "ours"))
    assert abs(one["loss"] - other["loss"]) < 1e-6
    generated = [
        run("generate", str(path), "The ", "--max-tokens", "8", "--temperature", "0")
        for path in (run_dir, "ours")
    ]
    assert generated[0] == generated[1]
    further = run(
        "train",
        *small,
        "--init-from",
        "ours",
        "--optim.lr",
        "1e-9",
        "--optim.muon-lr",
        "1e-9",
        "--optim.accumulation-steps",
        "2",
    )
    assert abs(further["bits_per_byte"] - trained["bits_per_byte"]) < 1e-3
    status, _, errors = in_this_process("train", "--init-from", "ours")
    assert status == 2 and "is an imported model, which has no experiment of its own" in errors
