"""GGUF files as wholes: quantized ones, chat templates, models that were trained here; damage and conventions
of other people's files.
"""

import dataclasses
import functools
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from rich.console import Console

import slmjax
from slmjax.checkpoints import safetensors_files
from slmjax.convert.families import (
    GGUF_FAMILIES,
    HF_FAMILIES,
    gemma2,
    gemma3,
    gpt2,
    gpt_oss,
    granite,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from slmjax.convert.family import Family
from slmjax.convert.gguf.container import GgufFile, PendingTensor, read_gguf, write_gguf
from slmjax.convert.gguf.tokenizer import tokenizer_metadata
from slmjax.convert.gguf_model import TOLERANCE
from slmjax.convert.import_export import Target, WeightType, export_model, import_model
from slmjax.convert.source import choose_family
from slmjax.data.chat import render_chat
from slmjax.data.config import DataConfig
from slmjax.data.tokenizers import BpeTokenizer, ByteTokenizer, Tokenizer
from slmjax.models import zoo
from slmjax.models.architecture import HeadKind, ModelConfig, stack_of
from slmjax.models.canonical_form import canonical
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.rope import LinearScaling, Llama3Scaling
from slmjax.sampling import SamplingConfig
from slmjax.training.experiment import RunConfig
from slmjax.training.optim import OptimConfig
from tests.convert import llama_cpp
from tests.convert.test_gguf_families import config_of

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who? äöü"}]


def rewrite(
    source: GgufFile, path: Path, tensors: Mapping[str, tuple[np.ndarray, Any]], **metadata: Any
) -> Path:
    """A file like another, with other tensors (numbers or blocks, and their dtype or format) and keys; None
    takes a key away.
    """
    pending = []
    for name, tensor in source.tensors.items():
        value, dtype = tensors.get(name, (tensor.read(), np.float32))
        pending.append(
            PendingTensor(
                name=name, shape=tensor.shape, dtype=dtype, read=functools.partial(np.asarray, value)
            )
        )
    keys = {key: value for key, value in {**source.metadata, **metadata}.items() if value is not None}
    write_gguf(path, architecture=keys.pop("general.architecture"), metadata=keys, tensors=pending)
    return path


def chat_tokenizer() -> Tokenizer:
    words = ByteTokenizer().build([]).add_tokens(["<|im_start|>", "<|im_end|>"], special=True)
    return Tokenizer(
        words._backend,
        bos=words.bos,
        eos=words.eos,
        ends=["<|im_end|>"],
        chat_template=TEMPLATE,
        pad=words.eos,
    )


@pytest.fixture
def tiny(tmp_path: Path) -> GgufFile:
    """A Llama of one layer, float32, with a vocabulary of bytes that has a chat template."""
    chat_tokenizer().save(tmp_path / "words")
    metadata = tokenizer_metadata(tmp_path / "words", adds_bos=True, num_rows=260)
    llama_cpp.write_tiny_llama(tmp_path / "tiny.gguf", metadata)
    return read_gguf(tmp_path / "tiny.gguf")


def log_probabilities(loaded: slmjax.Loaded, ids: list[int]) -> np.ndarray:
    logits = jax.jit(slmjax.logits)(loaded.model, np.array([ids], np.int32))[
        0, :, : loaded.config.known_vocab_size
    ]
    return np.asarray(jax.nn.log_softmax(logits), np.float64)


# Quantized files --------------------------------------------------------------------------------------------
def test_quantized_tensors_are_the_numbers_they_stand_for(tiny: GgufFile, tmp_path: Path) -> None:
    """All three block formats in one file: what is imported is what a file with the decoded numbers gives,
    bit for bit.
    """
    formats = {
        "token_embd": "Q8_0",
        "attn_q": "Q4_0",
        "attn_k": "Q4_0",
        "attn_v": "Q4_1",
        "attn_output": "Q4_1",
    }
    formats |= {"ffn_gate": "Q4_1", "ffn_up": "Q4_0", "ffn_down": "Q8_0"}
    blocks = {}
    decoded = {}
    for name, tensor in tiny.tensors.items():
        if (format := formats.get(name.split(".")[-2])) is not None:
            kind = gguf.GGMLQuantizationType[format]
            blocks[name] = gguf.quants.quantize(tensor.read(), kind), format
            decoded[name] = gguf.quants.dequantize(blocks[name][0], kind), np.float32
            assert not np.array_equal(decoded[name][0], tensor.read())
    assert len(blocks) == len(formats)
    quantized = rewrite(tiny, tmp_path / "quantized.gguf", blocks)
    import_model(quantized, tmp_path / "ours")
    import_model(rewrite(tiny, tmp_path / "decoded.gguf", decoded), tmp_path / "plain")
    ours, plain = (
        safetensors_files.TensorFiles(tmp_path / name / safetensors_files.DIRECTORY)
        for name in ("ours", "plain")
    )
    assert ours.names == plain.names
    for name in ours.names:
        assert ours.dtype(name) == np.float32
        np.testing.assert_array_equal(ours.read(name), plain.read(name), err_msg=name)

    loaded = slmjax.load_model(tmp_path / "ours")
    ids = loaded.tokenizer.prompt_ids("a quantized model")
    found = llama_cpp.logprobs(quantized, ids, vocab_size=260)
    difference = np.abs(found - log_probabilities(loaded, ids)).max()
    assert 1e-5 < difference < 0.05, (
        "llama.cpp rounds the inputs of matrices in blocks to 8 bits, and nothing else differs"
    )


# Conversations ----------------------------------------------------------------------------------------------
def test_a_chat_template_survives(tiny: GgufFile, tmp_path: Path) -> None:
    """Read, written and read again; llama.cpp makes the same text of a conversation, and the same ids of
    that.
    """
    import_model(tmp_path / "tiny.gguf", tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "again.gguf", to=Target.GGUF)
    import_model(tmp_path / "again.gguf", tmp_path / "back")
    first, last = (slmjax.load_model(tmp_path / name).tokenizer for name in ("ours", "back"))
    for words in (first, last):
        assert words.chat_template == TEMPLATE
        assert (words.bos, words.eos, words.ends, words.adds_bos) == (
            "<|bos|>",
            "<|eos|>",
            ("<|im_end|>",),
            True,
        )
    ours = render_chat(TEMPLATE, MESSAGES, bos_token=last.bos, eos_token=last.eos)
    assert llama_cpp.ask(tmp_path / "again.gguf", "/apply-template", {"messages": MESSAGES})["prompt"] == ours
    ids = llama_cpp.tokenize(tmp_path / "again.gguf", ours, parse_special=True)
    assert ids == last.encode_with_special(ours) == first.encode_with_special(ours)
    assert last.special_ids["<|im_end|>"] in ids
    metadata = read_gguf(tmp_path / "again.gguf").metadata
    assert metadata["tokenizer.ggml.eot_token_id"] == last.special_ids["<|im_end|>"]


# Models that were trained here ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small nano with a trained vocabulary and tables padded, after enough steps to say something."""
    root = tmp_path_factory.mktemp("runs")
    experiment = slmjax.Experiment(
        model=dataclasses.replace(zoo.nano(), embed_dim=32, context_length=128, vocab_multiple=64),
        data=DataConfig(
            path=str(workplace / "text.txt"), heldout_fraction=0.0, sequence_length=32, batch_size=8
        ),
        tokenizer=BpeTokenizer(vocab_size=300),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        run=RunConfig(name="small", directory=str(root), steps=12, sample_prompts=()),
    )
    return Path(slmjax.train(experiment, console=Console(file=io.StringIO())).run_dir)


def test_a_run_says_the_same_in_llama_cpp(run: Path, tmp_path: Path) -> None:
    written = export_model(run, tmp_path / "run.gguf", to=Target.GGUF)
    assert written.family == "qwen3"
    loaded = slmjax.load_model(run)
    assert loaded.config.table_rows > loaded.config.known_vocab_size, "padding is left out"
    file = read_gguf(tmp_path / "run.gguf")
    assert (
        file.tensors["token_embd.weight"].shape[0]
        == loaded.config.known_vocab_size
        == len(file.metadata["tokenizer.ggml.tokens"])
    )
    assert file.metadata["general.file_type"] == 0 and "general.name" not in file.metadata
    assert {tensor.type for tensor in file.tensors.values()} == {"F32"}
    assert (
        "model_card" in (tmp_path / "run.model_card.md").name
        and "qwen3" in (tmp_path / "run.model_card.md").read_text()
    )

    prompt = "The import statement"
    ids = loaded.tokenizer.prompt_ids(prompt)
    assert llama_cpp.tokenize(tmp_path / "run.gguf", prompt, add_special=True) == ids
    found = llama_cpp.logprobs(tmp_path / "run.gguf", ids, vocab_size=loaded.config.known_vocab_size)
    np.testing.assert_allclose(found, log_probabilities(loaded, ids), atol=1e-3)
    [ours] = slmjax.generate(loaded, [prompt], config=SamplingConfig(temperature=0.0, max_tokens=24))
    theirs, text = llama_cpp.generate(tmp_path / "run.gguf", prompt, 24)
    assert list(ours.tokens)[: len(theirs)] == theirs and len(theirs) >= 20
    assert ours.text.startswith(text)


@pytest.mark.parametrize("dtype", [WeightType.BF16, WeightType.F16])
def test_types_of_an_exported_file(run: Path, tmp_path: Path, dtype: WeightType) -> None:
    """Matrices in the type that was asked for, each number rounded once; vectors in float32."""
    written = export_model(run, tmp_path / "half.gguf", to=Target.GGUF, dtype=dtype)
    file = read_gguf(tmp_path / "half.gguf")
    for name, tensor in file.tensors.items():
        assert tensor.type == ("F32" if len(tensor.shape) == 1 else dtype.name), name
    assert file.metadata["general.file_type"] == {"BF16": 32, "F16": 1}[dtype.name]
    assert written.bytes == sum(tensor.raw.size for tensor in file.tensors.values())
    table = slmjax.load_model(run).params["embed/table"][: file.tensors["token_embd.weight"].shape[0]]
    np.testing.assert_array_equal(
        file.tensors["token_embd.weight"].read(), np.asarray(table).astype(dtype.dtype)
    )


# Files of other people --------------------------------------------------------------------------------------
def test_where_a_file_came_from_is_kept(tiny: GgufFile, tmp_path: Path) -> None:
    rewrite(
        tiny,
        tmp_path / "licensed.gguf",
        {},
        **{"general.license": "apache-2.0", "general.languages": ["en"], "general.finetune": "x"},
    )
    import_model(tmp_path / "licensed.gguf", tmp_path / "ours")
    origin = json.loads((tmp_path / "ours" / "origin.json").read_text())
    assert (origin["format"], origin["family"], origin["license"]) == ("gguf", "llama", "apache-2.0")
    assert len(origin["files"]["licensed.gguf"]) == 64 and origin["config"]["general.finetune"] == "x"
    export_model(tmp_path / "ours", tmp_path / "again.gguf", to=Target.GGUF)
    assert read_gguf(tmp_path / "again.gguf").metadata["general.license"] == "apache-2.0"
    assert "license: apache-2.0" in (tmp_path / "again.model_card.md").read_text()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"llama.attention.sliding_window": 64},
            r"attention.sliding_window = 64 is not understood, and may change",
        ),
        ({"llama.attention.clamp_kqv": 8.0}, r"attention.clamp_kqv = 8.0 is not understood"),
        ({"llama.rope.scaling.type": "longrope"}, r"rope.scaling.type is 'longrope'"),
        (
            {"llama.rope.scaling.type": "twisted"},
            r"rope.scaling.type is 'twisted'; supported are none, linear, yarn, longrope",
        ),
        (
            {"llama.rope.scaling.attn_factor": 1.5},
            r"attn_factor = 1.5 without YaRN or LongRoPE is not supported",
        ),
        ({"llama.attention.head_count": [2]}, r"head_count differs between layers"),
        ({"llama.block_count": 2}, r"lacks tensor blk.1.attn_"),
        ({"llama.feed_forward_length": 48}, r"but the configuration requires"),
        ({"llama.embedding_length": None}, r"has no 'embedding_length'"),
        ({"general.architecture": "qwen33"}, r"architecture 'qwen33'.*Did you mean"),
    ],
)
def test_what_is_not_understood_is_named(
    tiny: GgufFile, tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    path = rewrite(tiny, tmp_path / "odd.gguf", {}, **metadata)
    with pytest.raises(ValueError, match=message):
        import_model(path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists(), "nothing is left behind"


def test_keys_that_llama_cpp_leaves_out_are_left_out(tiny: GgufFile, tmp_path: Path) -> None:
    """A scale of scores that this architecture ignores with a note, and zeros without effect."""
    keys = {"attention.scale": 0.9, "rope.scaling.factor": 0.0, "rope.scaling.original_context_length": 0}
    path = rewrite(
        tiny, tmp_path / "odd.gguf", {}, **{f"llama.{name}": value for name, value in keys.items()}
    )
    assert any("attention.scale is left out" in note for note in import_model(path, tmp_path / "ours").notes)
    loaded = slmjax.load_model(tmp_path / "ours")
    ids = loaded.tokenizer.prompt_ids("a scaled one")
    np.testing.assert_allclose(
        llama_cpp.logprobs(path, ids, vocab_size=260), log_probabilities(loaded, ids), atol=1e-3
    )


def test_a_factor_without_a_type_is_linear(tiny: GgufFile, tmp_path: Path) -> None:
    """As llama.cpp has it."""
    path = rewrite(tiny, tmp_path / "scaled.gguf", {}, **{"llama.rope.scaling.factor": 4.0})
    import_model(path, tmp_path / "ours")
    loaded = slmjax.load_model(tmp_path / "ours")
    mixer = next(loaded.config.blocks()).mixer
    assert isinstance(mixer, AttentionConfig) and mixer.rope_scaling == LinearScaling(factor=4.0)
    ids = loaded.tokenizer.prompt_ids("a stretched one")
    np.testing.assert_allclose(
        llama_cpp.logprobs(path, ids, vocab_size=260), log_probabilities(loaded, ids), atol=1e-3
    )


# What llama.cpp would not load, or would compute otherwise: found by exporting odd models of every family and
# running them -----------------------------------------------------------------------------------------------
def model_of(family: Family, **changes: Any) -> ModelConfig:
    """The family's golden case as its own format can say it, and then changed: fields of mixers, of
    feed-forward layers, of the model.
    """
    case = family.architecture.replace("-", "_").replace("qwen3moe", "qwen3_moe")
    config = config_of(case)
    theirs = next(one for one in HF_FAMILIES if one.architecture == config["architectures"][0])
    model = canonical(theirs.read(theirs.settings(config, where=case)))
    of_model = {
        name: value
        for name, value in changes.items()
        if name in {field.name for field in dataclasses.fields(ModelConfig)}
    }
    blocks = []
    for block in model.blocks():
        parts = {"mixer": block.mixer, "ffn": block.ffn}
        for part, config in parts.items():
            names = {field.name for field in dataclasses.fields(config)}
            fields = {
                name: value for name, value in changes.items() if name in names and name not in of_model
            }
            parts[part] = dataclasses.replace(config, **fields)
        blocks.append(dataclasses.replace(block, **parts))
    return dataclasses.replace(model, stack=stack_of(blocks), **of_model)


LLAMA3 = Llama3Scaling(factor=8.0, original_context=16)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (qwen3.GGUF, {"rotary_dim": 4}, r"all dims of all heads are rotated"),
        (
            qwen2.GGUF,
            {"rope_scaling": LLAMA3},
            r"is Llama3Scaling, but llama.cpp supports LinearScaling, YarnScaling",
        ),
        (qwen3.GGUF, {"bias": True}, r"feed-forward layers have no biases"),
        (gemma2.GGUF, {"head": HeadKind.UNTIED}, r"the head is 'tied', not 'untied'"),
        (gemma3.GGUF, {"scale": 0.3}, r"scores are multiplied by 0.353553"),
        (gemma3.GGUF, {"bias": True}, r"feed-forward layers have no biases"),
        (olmo2.GGUF, {"head": HeadKind.TIED}, r"the head is 'untied', not 'tied'"),
        (
            olmo2.GGUF,
            {"head_dim": 8, "scale": 8**-0.5},
            r"4 heads of 8 dims must be as wide as the model, 24",
        ),
        (
            phi3.GGUF,
            {"window": 9},
            r"llama.cpp has no windows for this architecture, but that of layer 0, 9, is shorter",
        ),
        (phi3.GGUF, {"head_dim": 8, "scale": 8**-0.5}, r"4 heads of 8 dims must be as wide"),
        (smollm3.GGUF, {"bias": True}, r"feed-forward layers have no biases"),
        (gpt_oss.GGUF, {"head": HeadKind.TIED}, r"the head is 'untied', not 'tied'"),
        (gpt_oss.GGUF, {"window": None}, r"every other layer has a window"),
        (gpt2.GGUF, {"head_dim": 8}, r"4 heads of 8 dims must be as wide"),
        (granite.GGUF, {"softcap": 3.0}, r"softcap = 3.0"),
        (qwen3_moe.GGUF, {"normalize_weights": False}, r"normalize_weights = False"),
    ],
    ids=lambda value: value.architecture if isinstance(value, Family) else "",
)
def test_what_an_engine_would_not_take_is_refused(
    family: Family, changes: dict[str, Any], message: str
) -> None:
    choose_family(model_of(family), (family,), format_name="GGUF", preferred=None)
    with pytest.raises(ValueError, match=message):
        choose_family(model_of(family, **changes), (family,), format_name="GGUF", preferred=None)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("qwen2_5_0_5b", "qwen2"),
        ("llama3_2_1b", "llama"),
        ("smollm3_3b", "smollm3"),
        ("phi4_mini", "phi3"),
        ("granite4_micro", "granite"),
    ],
)
def test_released_models_find_their_architecture(name: str, architecture: str) -> None:
    """With all digits of their numbers, of which the metadata keeps those of float32."""
    found = choose_family(
        zoo.ARCHITECTURES[name](), GGUF_FAMILIES, format_name="GGUF", preferred=None, tolerance=TOLERANCE
    )
    assert found.family.architecture == architecture


def test_an_idle_window_is_no_obstacle() -> None:
    """Phi-4-mini's is longer than its context."""
    choose_family(model_of(phi3.GGUF, window=512), (phi3.GGUF,), format_name="GGUF", preferred=None)


@pytest.mark.parametrize("original", [256, 8])
def test_lists_of_long_rope_are_told_of(tiny: GgufFile, tmp_path: Path, original: int) -> None:
    """The short list up to the original context; beyond, llama.cpp takes the long one for short texts too,
    and the export says so.
    """
    import_model(tmp_path / "tiny.gguf", tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "model.json").read_text())
    short = [1.0 + 0.1 * i for i in range(8)]
    long = [1.0 + i for i in range(8)]
    scaling = {
        "type": "LongScaling",
        "short_factors": short,
        "long_factors": long,
        "original_context": original,
        "attention_factor": 1.2,
    }
    saved["context_length"] = 512
    saved["stack"][0]["pattern"][0]["mixer"]["rope_scaling"] = scaling
    (tmp_path / "ours" / "model.json").write_text(json.dumps(saved))
    written = export_model(tmp_path / "ours", tmp_path / "long.gguf", to=Target.GGUF)
    assert f"longer than {original} tokens" in written.notes[0]
    loaded = slmjax.load_model(tmp_path / "ours")
    ids = loaded.tokenizer.prompt_ids("a text of more than eight")
    for context in (256, 512):
        found = llama_cpp.logprobs(tmp_path / "long.gguf", ids, vocab_size=260, context=context)
        agrees = np.allclose(found, log_probabilities(loaded, ids), atol=1e-3)
        assert agrees == (original == 8 or context == 256)


def test_a_refused_export_leaves_nothing_behind(tiny: GgufFile, tmp_path: Path) -> None:
    import_model(tmp_path / "tiny.gguf", tmp_path / "ours")
    config = tmp_path / "ours" / "model.json"
    saved = json.loads(config.read_text())
    saved["logit_softcap"] = 3.0
    config.write_text(json.dumps(saved))
    with pytest.raises(
        ValueError, match=r"no family of GGUF can represent this model:[\s\S]*logit_softcap = 3.0"
    ):
        export_model(tmp_path / "ours", tmp_path / "out" / "again.gguf", to=Target.GGUF)
    assert not list(tmp_path.rglob("again*"))
