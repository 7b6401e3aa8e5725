"""Mistakes of new users: each ends in one message that names the value and the way out, and loses nothing."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from slmjax.cli import main
from slmjax.runner import trainer

TEXT = "One two three four five, six seven eight nine ten. " * 300

Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """`refused("train", "tiny.py")`: the error of the command, in a directory with tiny.py and text.txt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "text.txt").write_text(TEXT)
    shutil.copyfile((Path(__file__).parents[1] / "tiny.py"), tmp_path / "tiny.py")

    def call(*argv: str) -> str:
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        printed = capsys.readouterr()
        assert stopped.value.code == 2, printed.err
        assert "Traceback (most recent" not in printed.err, printed.err
        after = contents(tmp_path)
        assert {name: after.get(name) for name in before} == before, "a file was changed"
        return " ".join(printed.err.replace("│", " ").split())

    return call


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and "__pycache__" not in str(path)
    }


@pytest.fixture
def run_dir(trained, workplace: Path, tmp_path: Path) -> Path:
    """A copy of a trained run, to be damaged."""
    source = workplace / json.loads(trained.stdout)["run_dir"]
    copy = tmp_path / "run"
    shutil.copytree(source, copy)
    return copy


GROUPS = """
from slmjax.models.mixers.attention import AttentionConfig
AttentionConfig(num_heads=4, num_kv_heads=3)
"""

# The command line after `slmjax`, a file written before (name, content), and parts of the message: what is
# wrong, and what to do.
MISTAKES: dict[str, tuple[str, tuple[str, bytes] | None, tuple[str, ...]]] = {
    "command": ("trian", None, ("'trian'", "Did you mean 'train'")),
    "no run named": ("eval", None, ("RUN_DIR", "slmjax eval --help")),
    "experiment name": ("train nanoo", None, ("'nanoo'", "Did you mean 'nano'", "a file.py")),
    "experiment file": ("train tyni.py", None, ("tyni.py", "Did you mean 'tiny.py'")),
    "file without experiment": (
        "train empty.py",
        ("empty.py", b"x = 1\n"),
        ("empty.py", "def experiment() -> Experiment"),
    ),
    "error in the file": (
        "train wrong.py",
        ("wrong.py", b"import slmjax\n\nx = 1 / 0\n"),
        ("wrong.py, line 3", "division by zero"),
    ),
    "groups that do not divide": (
        "train groups.py",
        ("groups.py", GROUPS.encode()),
        ("num_kv_heads", "3", "4"),
    ),
    "field": ("train tiny.py --optim.lrr 1e-3", None, ("--optim.lrr", "--optim.lr")),
    "type": ("train tiny.py --optim.lr fast", None, ("optim.lr", "'fast'")),
    "choice": ("train tiny.py --model.precision bf16", None, ("bf16", "bfloat16")),
    "heads that do not divide": (
        "train tiny.py --model.embed-dim 30",
        None,
        ("embed_dim=30", "num_heads=4", "head_dim"),
    ),
    "sequences longer than the context": (
        "train tiny.py --data.sequence-length 128",
        None,
        ("128", "context_length=64", "shorten"),
    ),
    "vocabulary": ("train tiny.py --model.vocab-size 100", None, ("vocab_size=100", "258", "raise it")),
    "tokenizer": ("train nano --data.path text.txt --tokenizer.vocab-size 100", None, ("100", "vocab_size")),
    "mesh too large": ("train tiny.py --mesh.fsdp 16", None, ("16", "8 device")),
    "mesh and batch": ("train tiny.py --data.batch-size 12", None, ("batch_size=12", "multiple of 8")),
    "accumulation": (
        "train tiny.py --optim.accumulation-steps 3",
        None,
        ("accumulation_steps=3", "multiple"),
    ),
    "steps": ("train tiny.py --run.steps -5", None, ("run.steps", "at least 1", "-5")),
    "warm-up": ("train tiny.py --optim.warmup-steps 2.5", None, ("warmup_steps is 2.5", "whole number")),
    "model to fine-tune": ("train finetune --data.path text.txt", None, ("finetune", "--init-from DIR")),
    "two lengths": ("train tiny.py --run.steps 5 --run.epochs 2", None, ("--run.steps 5", "--run.epochs 2")),
    "learning rate": ("train tiny.py --optim.lr 0", None, ("optim.lr is 0", "greater than 0")),
    "fraction": (
        "train tiny.py --data.heldout-fraction 5",
        None,
        ("heldout_fraction is 5", "between 0 and 1"),
    ),
    "no text": ("train tiny.py --data.path nowhere.txt", None, ("nowhere.txt",)),
    "empty text": ("train tiny.py --data.path empty.txt", ("empty.txt", b""), ("empty",)),
    "text in another encoding": (
        "train tiny.py --data.path latin.txt",
        ("latin.txt", "é".encode("latin-1") * 500),
        ("latin.txt", "UTF-8"),
    ),
    "field of a record": (
        "train tiny.py --data.path a.jsonl",
        ("a.jsonl", b'{"body": "x"}\n'),
        ("'text'", "body"),
    ),
    "what to resume": ("train --resume nowhere", None, ("--resume nowhere is no dir", "slmjax train")),
    "what to start from": ("train --init-from nowhere", None, ("--init-from nowhere", "slmjax import")),
    "no run to resume": ("train --resume .", None, (". is not a run directory", "config.json")),
    "what to evaluate": ("eval nowhere", None, ("nowhere is no directory", "slmjax train", "slmjax import")),
    "no model": ("eval .", None, ("neither a run directory nor", "model.json", "slmjax train")),
    "what to sample from": ("generate nowhere hello", None, ("nowhere is no directory", "slmjax import")),
    "what to report": ("report nowhere", None, ("nowhere is no directory", "slmjax train")),
    "a YAML file": (
        "train conf.yaml",
        ("conf.yaml", b"lr: 1"),
        ("conf.yaml", "are Python", "--optim.lr 3e-4"),
    ),
    "a YAML option": ("train --config conf.yaml", None, ("--config", "are Python", "--optim.lr 3e-4")),
    "a text as an experiment": ("train text.txt", None, ("text.txt", "--data.path text.txt")),
    "a setting of an absent part": (
        "train tiny.py --quant.damping 1",
        None,
        ("--quant.damping", "only with --quant:"),
    ),
    "what to compare": ("compare nowhere", None, ("two runs or more", "slmjax runs")),
    "where runs are": ("runs nowhere", None, ("nowhere", "slmjax train")),
    "a file for runs": (
        "train tiny.py --run.directory text.txt",
        None,
        ("text.txt is a file", "--run.directory"),
    ),
    "probability": ("generate --top-p 1.5 tiny", None, ("top_p", "1.5")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_the_way_out(refused: Refused, tmp_path: Path, name: str) -> None:
    command, file, expected = MISTAKES[name]
    if file is not None:
        (tmp_path / file[0]).write_bytes(file[1])
    message = refused(*command.split())
    assert all(part in message for part in expected), message


# Mistakes with a run ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("train --resume {run}", ("at step 60 of 60 already", "--run.steps")),
        ("train --resume {run} --run.steps 70 --model.embed-dim 64", ("another model", "--init-from")),
        (
            "train --resume {run} --run.steps 70 --optim.kind lion",
            ("adamw", "optim.kind=lion", "--init-from"),
        ),
        ("train --resume {run} --run.steps 70 --optim.ema-decay None", ("averaged weights", "0.9")),
        ("train tiny.py --resume {run}", ("leave out tiny.py",)),
        ("eval {run} --step 7", ("no checkpoint of step 7", "it has")),
        ("eval {run} --data.path nowhere.txt", ("nowhere.txt",)),
        ("eval {run} --multiple-choice nowhere.jsonl", ("nowhere.jsonl", "prompt, choices and answer")),
        ("generate {run} --max-tokens 500", ("max_tokens=500", "context_length=64", "ask for at most")),
        ("compare {run} {run}", ("is given twice", "different runs")),
    ],
)
def test_a_mistake_with_a_run(
    refused: Refused, run_dir: Path, command: str, expected: tuple[str, ...]
) -> None:
    message = refused(*command.format(run=run_dir).split())
    assert all(part in message for part in expected), message


def test_damaged_files_are_named(refused: Refused, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = (run_dir / "config.json").read_text()
    (run_dir / "config.json").write_text(config[: len(config) // 2])
    for argv in (("train", "--resume", str(run_dir)), ("eval", str(run_dir)), ("report", str(run_dir))):
        assert "config.json" in refused(*argv)
    (run_dir / "config.json").write_text(config.replace('"lr"', '"lrr"'))
    assert all(part in refused("train", "--resume", str(run_dir)) for part in ("config.json", "optim", "lrr"))
    (run_dir / "config.json").write_text(config)
    for path in (run_dir / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"not what it was")
    # Not `refused`, which forbids changed files: damaged checkpoints are renamed.
    with pytest.raises(SystemExit) as stopped:
        main(["generate", str(run_dir), "hello"])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "checkpoint" in message and str(run_dir) in message


# What the machine lacks -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("pyarrow", "train tiny.py --data.path a.parquet", "parquet"),
        ("datasets", "train hub.py", "hf"),
        ("tensorboardX", "train tiny.py --run.trackers tensorboard", "track"),
        ("wandb", "train tiny.py --run.trackers wandb", "track"),
        ("vl_convert", "report {run} --output page.html", "plot"),
        ("lm_eval.api.model", "eval {run} --lm-eval arc_easy", "eval"),
        ("codecarbon", "eval {run} --energy", "energy"),
    ],
)
def test_a_missing_extra_is_named(
    refused: Refused,
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    command: str,
    extra: str,
) -> None:
    from slmjax.telemetry.report.charts import drawing_code

    drawing_code.cache_clear()
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    hub = "HuggingFaceSource(name='a/b')"
    replaced = f"data=dataclasses.replace(base.data, path=None, sources=(WeightedSource(source={hub}),))"
    code = f"""import dataclasses
from slmjax.data.config import WeightedSource
from slmjax.data.dataset_sources import HuggingFaceSource
from slmjax.training import recipes
def experiment():
    base = recipes.load_experiment("tiny.py")
    return dataclasses.replace(base, {replaced})
"""
    (tmp_path / "hub.py").write_text(code)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "slmjax.evaluation.lm_eval_adapter", raising=False)
    message = refused(*command.format(run=run_dir).split())
    assert f"pip install 'slmjax[{extra}]'" in message, message


@pytest.mark.parametrize(
    "error", [RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."), MemoryError()]
)
def test_too_little_memory(refused: Refused, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(trainer, "train", fail)
    message = refused("train", "tiny.py")
    assert all(
        part in message
        for part in ("out of memory", "--optim.accumulation-steps", "--model.remat full", "--data.batch-size")
    )


def test_a_full_disk(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "runs/tiny/log.jsonl")

    monkeypatch.setattr(trainer, "train", fail)
    assert "No space left on device: 'runs/tiny/log.jsonl'" in refused("train", "tiny.py")


def test_an_error_of_ours_keeps_its_traceback(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("an invariant does not hold")

    monkeypatch.setattr(trainer, "train", fail)
    with pytest.raises(RuntimeError, match="invariant"):
        main(["train", "tiny.py"])


def test_ctrl_c_before_anything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train", interrupt)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "nano"])
    assert stopped.value.code == 130 and "Traceback" not in capsys.readouterr().err


def test_the_experiment_may_stand_anywhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiments = []

    def keep(experiment: object, **_: object) -> trainer.Result:
        experiments.append(experiment)
        fields: dict = dict.fromkeys((field.name for field in dataclasses.fields(trainer.Result)), 0)
        return trainer.Result(
            **fields
            | {
                "status": "finished",
                "compressors": {},
                "samples": [],
                "run_dir": "x",
                "session_seconds_by_category": {},
                "best_loss": None,
                "best_step": None,
                "commit": None,
                "measured_on": "held-out text",
                "best_measured_on": None,
                "part_loss": None,
            }
        )

    monkeypatch.setattr(trainer, "train", keep)
    for command in (
        "shakespeare_char --optim.lr 0.5",
        "--optim.lr 0.5 shakespeare_char",
        "--optim.lr=0.5 --json shakespeare_char",
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["train", *command.split()])
        assert stopped.value.code == 0, capsys.readouterr().err
    assert [(experiment.run.name, experiment.optim.lr) for experiment in experiments] == [
        ("shakespeare-char", 0.5)
    ] * 3
