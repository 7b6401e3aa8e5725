"""An imported model with windows, sinks, biases and experts goes on training: on a mesh as on one device,
resumed to the bit.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import slmjax
from slmjax.checkpoints import safetensors_files
from slmjax.checkpoints.loading import read_config
from slmjax.convert.import_export import Target, export_model, import_model
from slmjax.data.tokenizers import ByteTokenizer
from slmjax.parallel.mesh import MeshConfig
from slmjax.telemetry.run_directory import read_log
from slmjax.training.experiment import starting_from
from tests.convert.synthetic import VOCAB_SIZE, write_model
from tests.convert.test_families import read_golden


def losses(result: slmjax.Result) -> dict[int, float]:
    return {
        record["step"]: record["loss"]
        for record in read_log(Path(result.run_dir) / "log.jsonl", kind="train")
    }


@pytest.mark.composes("mesh", "experts", "accumulation", "resume", "import or export")
def test_training_an_imported_model(tmp_path: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = read_golden("gpt_oss")
    words = ByteTokenizer().build(()).add_tokens(["<|im_start|>", "<|im_end|>"], special=True)
    # The first two of its layers: one with a window, one without.
    shapes = {
        name: [words.vocab_size if size == VOCAB_SIZE else size for size in shape]
        for name, shape in golden["shapes"].items()
        if "layers.2." not in name
    }
    changes = {
        "vocab_size": words.vocab_size,
        "num_hidden_layers": 2,
        "layer_types": golden["config"]["layer_types"][:2],
    }
    write_model(tmp_path / "theirs", golden["config"] | changes, shapes)
    words.save(tmp_path / "bytes")
    conventions = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "add_bos_token": False,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    }
    (tmp_path / "bytes" / "tokenizer_config.json").write_text(json.dumps(conventions))
    import_model(tmp_path / "theirs", tmp_path / "ours", tokenizer=tmp_path / "bytes")

    tiny = slmjax.load_experiment(str(workplace / "tiny.py"))
    started = starting_from(tmp_path / "ours", tiny)
    assert started.model.stack == read_config(tmp_path / "ours").stack
    experiment = dataclasses.replace(
        started,
        model=dataclasses.replace(started.model, dropout=0.0),
        data=dataclasses.replace(tiny.data, path=str(workplace / "text.txt")),
        optim=dataclasses.replace(tiny.optim, accumulation_steps=2, warmup_steps=0, ema_decay=None),
        mesh=MeshConfig(data=1, fsdp=2, expert=2),
        checkpoint=dataclasses.replace(tiny.checkpoint, every=1),
        eval=dataclasses.replace(tiny.eval, max_documents=1),
        run=dataclasses.replace(tiny.run, steps=2, directory=str(tmp_path / "runs"), sample_prompts=()),
    )
    quiet = Console(quiet=True)
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:4])
    whole = slmjax.train(experiment, console=quiet)
    first = losses(whole)
    shutil.rmtree(Path(whole.run_dir) / "checkpoints" / "2")  # as if it had been killed after its first step
    (Path(whole.run_dir) / "result.json").unlink()
    resumed = slmjax.train(experiment, resume=whole.run_dir, console=quiet)
    assert losses(resumed) == first and resumed.bits_per_byte == whole.bits_per_byte

    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    alone = slmjax.train(dataclasses.replace(experiment, mesh=MeshConfig(data=1)), console=quiet)
    np.testing.assert_allclose(list(first.values()), list(losses(alone).values()), rtol=1e-4)

    written = export_model(whole.run_dir, tmp_path / "out", to=Target.HF)
    assert written.family == "GptOssForCausalLM"
    for directory in (Path(whole.run_dir) / "tokenizer", tmp_path / "out"):
        kept = json.loads((directory / "tokenizer_config.json").read_text())
        assert conventions.items() <= kept.items()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["bos_token_id"] == words.special_ids["<|im_start|>"]
    card = (tmp_path / "out" / "model_card.md").read_text()
    assert f"| started from | {tmp_path / 'ours'} |" in card and "GptOssForCausalLM (hf)" in card
    before, after = (safetensors_files.TensorFiles(tmp_path / name) for name in ("theirs", "out"))
    assert before.names == after.names
    moved = [name for name in before.names if not np.array_equal(before.read(name), after.read(name))]
    assert len(moved) > 0.9 * len(before.names), (
        "nearly all tensors were trained, the router's and the sinks among them"
    )
