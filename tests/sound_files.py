"""Sound samples of the files that slmjax reads: a run, models of three formats, token shards, a study.

Nothing is trained, and nothing compiled.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from slmjax.checkpoints import manifest, safetensors_files
from slmjax.checkpoints.model_file import write_model_file
from slmjax.checkpoints.stored_model import open_local_model
from slmjax.config import to_json
from slmjax.convert import gguf_model, hf_directory
from slmjax.convert.family import logical_shapes
from slmjax.data import packing
from slmjax.data.shards import ShardWriter
from slmjax.data.tokenizers import BpeTokenizer, ByteTokenizer, Tokenizer
from slmjax.formats.presets import preset
from slmjax.models.architecture import BlockConfig, HeadKind, LayerGroup, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.quantization.rules import QuantPhase, QuantRule
from slmjax.studies.arms import Arm
from slmjax.studies.claims import Claims
from slmjax.studies.design import Dimension, Quantity
from slmjax.studies.findings import analyze, write_findings
from slmjax.studies.matching import Matched
from slmjax.studies.noise import NoiseRecord
from slmjax.studies.study import Study, member_fingerprint, read_members
from slmjax.studies.study_directory import StudyDirectory
from slmjax.telemetry.run_directory import write_json
from tests import tiny

MODEL = ModelConfig(
    embed_dim=32,
    vocab_size=258,
    context_length=64,
    head=HeadKind.UNTIED,
    stack=(
        LayerGroup(
            pattern=(
                BlockConfig(
                    mixer=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
                    ffn=MlpConfig(hidden_dim=32),
                ),
            ),
            repeats=2,
        ),
    ),
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who? äöü"}]
RECORD = {
    "source": "text.txt",
    "weight": 1.0,
    "documents": 3,
    "bytes": 3012,
    "tokens": 3018,
    "hash": "3bd8579b63761526",
    "fingerprint": "e0cc8d7162da251c",
    "tokenizer": "511043fab64fef4c",
    "shards": "971cf9d297725e1d",
    "heldout": {"documents": 1, "bytes": 335, "tokens": 337, "hash": "fc5e2550bfe3ee0c"},
}
RESULT = {
    "status": "finished",
    "step": 60,
    "loss": 3.96,
    "bits_per_byte": 5.73,
    "measured_on": "held-out text",
    "best_loss": 3.96,
    "best_step": 60,
    "compressors": {"gzip -9": 3.51, "xz -9": 4.77},
    "tokens": 15360,
    "seconds": 5.9,
    "tokens_per_second": 2603.4,
    "parameters": 6736,
    "skipped": 0,
    "run_dir": "runs/tiny",
    "commit": "f1a49e2d93e9",
    "lost_text": None,
}


@functools.cache
def _tokenizer() -> Tokenizer:
    """A tokenizer of bytes with a chat template."""
    plain = ByteTokenizer().build([])
    backend = tokenizers.Tokenizer.from_str(json.dumps(plain.specification))
    return Tokenizer(backend, bos=plain.bos, eos=plain.eos, adds_bos=True, chat_template=TEMPLATE)


def write_run(directory: Path) -> None:
    """Write a run directory as training leaves it, without checkpoints."""
    write_json(directory / "config.json", to_json(tiny.experiment()))
    phase = QuantPhase(rules=(QuantRule(paths=".", weight=preset("q8_0")),), step=2)
    write_model_file(directory, MODEL, phases=(phase,))
    write_json(directory / "data.json", [RECORD, {**RECORD, "source": "b.jsonl", "heldout": None}])
    environment = {
        "python": "3.11.7",
        "cpu_count": 2,
        "packages": {"jax": "0.10.2"},
        "devices": ["cpu"],
        "commit": "f1a49e2d93e9",
        "dirty": False,
        "command": ["slmjax", "train"],
        "variables": {},
    }
    write_json(directory / "environment.json", environment)
    write_json(directory / "result.json", RESULT)
    _write_log(directory / "log.jsonl")
    _tokenizer().save(directory / "tokenizer")


def _write_log(path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"kind": "message", "time": 1.5, "level": "WARNING", "text": "prepared text.txt"},
        {
            "kind": "session",
            "time": 2.0,
            "number": 1,
            "first_step": 1,
            "seconds": 0.5,
            "changes": {},
            "environment": {},
        },
        {
            "kind": "session",
            "time": 2.2,
            "number": 2,
            "first_step": 1,
            "seconds": 0.5,
            "changes": {"optim.lr": [0.001, 0.002]},
            "environment": {"packages.jax": ["0.10.1", "0.10.2"]},
        },
    ]
    for step in range(1, 61, 6):
        train = {"kind": "train", "time": 2.5 + step, "step": step, "loss": 5.0 - step / 60, "grad_norm": 0.9}
        rates = {"learning_rate": 1e-3, "tokens_per_second": "nan", "mfu": "nan", "total_tokens": 256 * step}
        norms = {"grad_norms": {"layers/0": 0.1, "layers/1": 0.2}, "data_wait_share": 0.1, "dropped": 0}
        records.append({**train, **rates, **norms, "skipped": 0, "bits_per_byte": 7.1})
    metrics = {"loss": 4.4, "bits_per_byte": 6.4, "documents": 1, "tokens": 336, "total_tokens": 336}
    records += [
        {"kind": "eval", "time": 30.0, "step": 31, **metrics},
        {"kind": "eval", "time": 90.0, "step": 60, "complete": True, **metrics},
        {"kind": "sample", "time": 91.0, "step": 60, "prompt": "The ", "text": "The cat"},
        {"kind": "result", "time": 92.0, "step": 60, "status": "finished", "loss": 3.96},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_imported(directory: Path) -> None:
    """Write an imported model, with a parameter in codes."""
    codes = "layers/0/mixer/query/weight"
    tensors = []
    for name, shape in logical_shapes(MODEL).items():
        if name == codes:
            tensors.append((f"{name}/codes", np.zeros(shape, np.int8)))
            tensors.append((f"{name}/scale", np.ones((shape[0] // 32, shape[1]), np.float32)))
        else:
            tensors.append((name, np.zeros(shape, np.float32)))
    safetensors_files.write_tensors(directory / "weights", tensors)
    stored = safetensors_files.StoredFormat(spec=preset("q8_0"), axis=0)
    safetensors_files.write_formats(directory, {codes: stored})
    _write_about(directory)


def _write_about(directory: Path) -> None:
    write_model_file(directory, MODEL)
    _tokenizer().save(directory / "tokenizer")
    settings = to_json(tiny.experiment())
    origin = {
        "format": "slmjax",
        "family": "llama",
        "source": "/models/a",
        "step": 60,
        "license": "mit",
        "files": {"model.safetensors": "ab"},
        "quantized": {"method": "rtn", "clip": "none", "formats": {}},
        "experiment": {"data": settings["data"], "eval": settings["eval"]},
        "data": [RECORD],
    }
    write_json(directory / "origin.json", origin)


def write_plain(directory: Path) -> None:
    """Write an imported model in floating point, in several files with an index."""
    tensors = [(name, np.zeros(shape, np.float32)) for name, shape in logical_shapes(MODEL).items()]
    safetensors_files.write_tensors(directory / "weights", tensors, largest_file=20_000)
    _write_about(directory)


def write_hugging_face(directory: Path) -> None:
    """Write a Hugging Face directory."""
    imported = directory / ".imported"
    imported.mkdir()
    write_plain(imported)
    hf_directory.write_directory(open_local_model(imported), _tokenizer(), directory, dtype=None)


def write_golden(name: str, directory: Path) -> None:
    """Write the Hugging Face directory of a golden file of the converters: another family each."""
    golden = json.loads((Path(__file__).parent / "convert" / "golden" / f"{name}.json").read_text())
    (directory / "config.json").write_text(json.dumps(golden["config"]))
    tensors = ((name, np.zeros(shape, np.float32)) for name, shape in golden["shapes"].items())
    safetensors_files.write_tensors(directory, tensors)


def write_gguf_file(directory: Path, *, merges: bool = False) -> None:
    """Write a GGUF file, with a vocabulary of bytes or, with `merges`, of merges."""
    imported = directory / ".imported"
    imported.mkdir()
    write_plain(imported)
    if merges:
        text = ["the cat sat on the mat and the dog sat on the log"] * 3
        BpeTokenizer(vocab_size=280).build(text).save(imported / "tokenizer")
        model = dataclasses.replace(MODEL, vocab_size=280)
        tensors = [(name, np.zeros(shape, np.float32)) for name, shape in logical_shapes(model).items()]
        safetensors_files.write_tensors(imported / "weights", tensors, largest_file=20_000)
        write_model_file(imported, model)
    tokenizer = Tokenizer.load(imported / "tokenizer")
    gguf_model.write_model(open_local_model(imported), tokenizer, directory / "model.gguf", dtype=None)


def write_shards(directory: Path) -> None:
    """Write token shards."""
    with ShardWriter(
        directory / "shards", tokenizer_hash="ab", vocab_size=258, source_name="a.txt"
    ) as writer:
        for document in ("one", "and two", "three"):
            writer.add([256, *document.encode(), 257], num_bytes=len(document))
        writer.close()


@functools.cache
def study() -> Study:
    """A study whose members `write_members` writes."""
    return Study(
        name="fuzzing",
        arms=(Arm(name="a", experiment=tiny.experiment()), Arm(name="b", experiment=tiny.experiment())),
        seeds=(0, 1),
        baseline="a",
    )


def write_members(directory: Path) -> None:
    """Write the members of a study."""
    lines = [
        {
            "kind": "member",
            "time": 1.0,
            "arm": arm.name,
            "seed": seed,
            "fingerprint": member_fingerprint(study(), arm.name, seed),
            "status": "finished",
            "result": RESULT,
            "evaluation": {"loss": 3.9},
            "error": None,
        }
        for seed in study().seeds
        for arm in study().arms
    ]
    write_lines(directory, "members.jsonl", lines)


def write_claim(directory: Path) -> None:
    """Write the claim of a member of a study, and its outcome."""
    write_members(directory)
    member = json.loads((directory / "members.jsonl").read_text().splitlines()[0])
    with Claims(directory) as claims:
        claim = claims.take(claims.look("sound/seed-0"))
        assert claim is not None
        claim.record(member)
        waiting = claims.take(claims.look("sound/seed-1"))
        assert waiting is not None
        waiting.release(rung={"step": 20, "value": "inf", "fingerprint": "a"})


def write_study(directory: Path) -> None:
    """Write the directory of a study with its members, its findings and all else that it has."""
    write_members(directory)
    asked = study()
    choice = Matched(
        arm="b",
        quantity=Quantity.PARAMETERS,
        dimension=Dimension.WIDTH,
        target=1e3,
        before=2e3,
        after=1e3,
        value_before=32,
        value_after=16,
        tolerance=0.01,
        changes={"model.embed_dim": 16},
    )
    fixed = StudyDirectory.create(directory, asked, matched=(choice,))
    longer = dataclasses.replace(asked, seeds=(0, 1, 2))
    StudyDirectory.create(directory, longer, asked=asked, matched=(choice,))
    assert fixed.changes_since_lock()
    findings = analyze(asked, read_members(asked, directory))
    write_findings(findings, directory)
    record = NoiseRecord(
        key="a", study="fuzzing", arm="a", metric="loss", deviation=0.1, degrees_of_freedom=2, noisy=False
    )
    write_lines(directory, "noise.jsonl", [{"kind": "noise", "time": 1.0, **dataclasses.asdict(record)}])
    write_json(directory / "studies.json", {"size": "small", "studies": {}})
    rung = {"metric": "loss", "means": {"a": 1.0, "b": "inf"}, "remaining": ["a"]}
    write_json(directory / "claims" / "rung-20.json", rung)


def write_results(directory: Path) -> None:
    """Write results of other programs, as CSV, JSON and JSON lines."""
    runs = [
        {"arm": arm, "seed": seed, "step": 9, "status": "finished", "loss": loss + seed / 8}
        for arm, loss in (("0.001", 1.5), ("2e-3", 1.25))
        for seed in (0, 1, 2)
    ]
    lines = [",".join(runs[0]), *(",".join(map(str, run.values())) for run in runs)]
    (directory / "results.csv").write_text("\n".join(lines) + "\n")
    (directory / "results.json").write_text(json.dumps(runs))
    write_lines(directory, "results.jsonl", runs)


def write_rows(directory: Path) -> None:
    """Write the rows of packed text."""
    rows = np.arange(4, dtype=np.int32)
    plan = packing.RowPlan(
        sequence_length=8,
        overlap=0,
        row_starts=rows.astype(np.int64),
        documents=rows,
        starts=rows,
        lengths=rows,
        contexts=rows,
    )
    packing._save(plan, directory / "rows.npz")


def write_lines(directory: Path, file: str, records: list[Any]) -> None:
    """Write JSON lines."""
    (directory / file).write_text("".join(json.dumps(record) + "\n" for record in records))


def write_best(directory: Path) -> None:
    """Write the mark of a best checkpoint."""
    (directory / "checkpoints" / "60").mkdir(parents=True)
    write_json(directory / "checkpoints" / "best.json", {"step": 60, "loss": 3.96})


def write_manifest(directory: Path) -> None:
    """Write a checkpoint of a file alone, with its manifest."""
    (directory / "60" / "model").mkdir(parents=True)
    (directory / "60" / "model" / "data").write_bytes(b"weights")
    manifest.write_manifest(directory / "60", step=60, skipped_in_a_row=0)


def write_template(directory: Path) -> None:
    """Write the source of a chat template."""
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
