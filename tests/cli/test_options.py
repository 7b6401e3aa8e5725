"""Names of options: all of them in the help, short ones, and what is refused before jax is imported."""

import contextlib
import io
import json
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import tyro

from slmjax import cli
from slmjax.cli import early, source
from slmjax.cli.fields import full_names, options_of
from slmjax.cli.options import split_experiment
from slmjax.cli.training import FIRST_OPTIONS, _further_options, _start, _train_arguments
from slmjax.training import recipes

TINY = str(Path(__file__).parents[1] / "tiny.py")


def arguments(name, quant="q4_0"):
    """The dataclass of options of `slmjax train NAME --quant QUANT`, and all its options."""
    rest = dict.fromkeys(("resume", "init_from", "teacher", "divergence"))
    cls = _train_arguments(_start(name, quant=quant, **rest))
    return cls, options_of(cls, cls())


@pytest.fixture(scope="module")
def nano():
    return arguments("nano", quant=None)[1]


@pytest.mark.parametrize("name", ["nano", "shakespeare_char", TINY])
def test_the_list_of_options_is_what_tyro_accepts(name, monkeypatch):
    cls, options = arguments(name)
    monkeypatch.setenv("COLUMNS", "400")
    out = io.StringIO()
    config = (tyro.conf.AvoidSubcommands, tyro.conf.EnumChoicesFromValues)
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        tyro.cli(cls, args=["--help"], default=cls(), config=config)
    theirs = set(re.findall(r"--([a-z][\w.-]*\w)", out.getvalue()))
    # tyro lists an option that has a single value, which takes none; a text names a group.
    listed = {name for name in theirs if name.endswith("estimator")} | {"help", "objective.distill"}
    ours = {spelling for option in options for spelling in option.spellings}
    assert len(ours) > 100 and ours == theirs - listed


def test_every_option_has_a_text(nano):
    assert not [option.name for option in [*nano, *_further_options()] if len(option.about) < 8]
    assert {option.name for option in nano} >= set(FIRST_OPTIONS)


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("--learning-rate", "--optim.lr"),
        ("--optim.learning_rate=3", "--optim.lr=3"),
        ("--lr", "--optim.lr"),
        ("--batch-size", "--data.batch-size"),
        ("--layers", "--model.stack.0.repeats"),
        ("--model.layers", "--model.stack.0.repeats"),
        ("--width", "--model.embed-dim"),
        ("--heads", "--model.stack.0.pattern.0.mixer.num-heads"),
        ("--num-heads", "--model.stack.0.pattern.0.mixer.num-heads"),
        ("--mixer.num-kv-heads", "--model.stack.0.pattern.0.mixer.num-kv-heads"),
        ("--ffn.no-bias", "--model.stack.0.pattern.0.ffn.no-bias"),
        ("--steps", "--run.steps"),
        ("--epochs", "--run.epochs"),
        ("--warmup", "--optim.warmup-steps"),
        ("--run.steps", "--run.steps"),
    ],
)
def test_short_names(nano, short, full):
    assert full_names([short, "3", "x.y"], nano, command="train") == [full, "3", "x.y"]


@pytest.mark.parametrize(
    ("name", "short", "message"),
    [
        ("nano", "--vocab-size", "several options: --model.vocab-size, --tokenizer.vocab-size. Write one"),
        (
            TINY,
            "--heads",
            "options: --model.stack.0.pattern.0.mixer.num-heads, --model.stack.0.pattern.1.",
        ),
        # A repeat of its pattern is of two layers.
        (TINY, "--layers", "several options: --model.stack.0.repeats"),
        (
            "nano",
            "--model.number-heads",
            "no option --model.number-heads. Did you mean --model.stack.0.",
        ),
        ("nano", "--optim.lrr", "Did you mean --optim.lr"),
        ("nano", "--xyzzy", "slmjax train has no option --xyzzy. `slmjax train --help all`"),
        ("nano", "--quant.damping", "--quant.damping has a meaning only with --quant"),
        ("nano", "--temperature-of-teachers", "no option"),
        ("nano", "--objective.distill.weight.start", "only with --teacher"),
    ],
)
def test_a_name_of_no_field_or_of_several(name, short, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        full_names([short, "3"], arguments(name, None)[1], command="train", further=_further_options())


def test_a_boolean_flag_takes_no_value():
    """What stands after it may be the experiment."""
    for flag in (
        "--json",
        "--eval.unrounded",
        "--eval.no-unrounded",
        "--no-json",
        "--run.log-flips",
        "--help",
    ):
        assert split_experiment(["--lr", "3", flag, "nano"]) == ("nano", ["--lr", "3", flag])
    assert split_experiment(["--run.name", "nano"]) == (None, ["--run.name", "nano"])
    assert split_experiment(["--run.name=x", "nano"]) == ("nano", ["--run.name=x"])


# Help -------------------------------------------------------------------------------------------------------
def shown(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_the_help_of_train_is_short(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(capsys, "train", "--help")
    lines = text.splitlines()
    assert "EXPERIMENT" in lines[0] and len(lines) < 90 and max(map(len, lines)) <= 80
    at = [text.index(f"  --{name}") for name in FIRST_OPTIONS]
    assert at == sorted(at) and at[-1] < text.index("groups of settings")
    assert "objective.distill (" in text and "quant (" in text and "slmjax experiments" in text


def test_the_help_of_a_group_of_a_field_and_of_all(capsys, nano):
    optim = shown(capsys, "train", "--help", "optim")
    assert "--optim.lr" in optim and "--model" not in optim and optim.startswith("optim: ")
    heads = shown(capsys, "train", "--help", "heads")
    assert "mixer.num-heads N" in heads and "(default: 4)" in heads and len(heads.splitlines()) == 3
    assert "--quant.damping" in shown(capsys, "train", "--help", "quant")
    everything = shown(capsys, "train", "--help", "all")
    assert all(f"--{option.name}" in everything for option in [*nano, *_further_options()])
    assert shown(capsys, "train", "--help", TINY) == (tiny := shown(capsys, "train", TINY, "--help"))
    assert "optimizer steps; also --max-steps (default: 60)" in tiny
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help", "optimm"])
    assert stopped.value.code == 2 and "optim" in capsys.readouterr().err


def test_experiments_are_listed(capsys):
    assert json.loads(shown(capsys, "experiments", "--json")) == source.built_in_experiments()
    assert set(source.built_in_experiments()) == set(recipes.BUILT_IN)
    assert all(
        line == function.__doc__.splitlines()[0]
        for line, function in zip(
            source.built_in_experiments().values(), recipes.BUILT_IN.values(), strict=True
        )
    )
    text = shown(capsys, "experiments")
    assert all(f"\n{name} " in f"\n{text}" for name in recipes.BUILT_IN) and "def experiment()" in text


# Before jax -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["nano", TINY])
def test_no_option_is_refused_early(name):
    for option in [*arguments(name)[1], *_further_options()]:
        for spelling in option.spellings:
            early.check("train", [f"--{spelling}", "None"])


def test_mistakes_are_refused_before_jax_is_imported(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text("{}")
    mistakes = {
        "train nanoo": "Did you mean 'nano'",
        "train conf.yaml": "are Python",
        "train --optim.lrr 3": "Did you mean --optim.lr",
        "train --data.path nowhere.txt": "nowhere.txt does not exist",
        "train --resume nowhere": "nowhere is no directory",
        "train nowhere.py": "no Python file nowhere.py",
        "eval nowhere": "nowhere is no directory",
        "eval model": "--data.path FILE",
        "generate": "RUN_DIR",
        "data prepare --data.path nowhere.txt": "nowhere.txt does not exist",
    }
    code = """
import contextlib, io, json, sys
from slmjax import cli
messages = {}
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.suppress(SystemExit):
        cli.main(line.split())
    messages[line] = errors.getvalue()
print(json.dumps([messages, "jax" in sys.modules]))
"""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(list(mistakes))],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(TINY).parents[1]), "PATH": ""},
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - started
    messages, has_jax = json.loads(done.stdout)
    assert not has_jax and seconds < 10  # about 0.4 s for all of them where the machine is free
    wrong = {line: messages[line] for line, part in mistakes.items() if part not in messages[line]}
    assert not wrong


def test_an_evaluation_with_a_short_name_of_a_data_option(monkeypatch):
    """It is of the text that the command line names, as it is with the full name."""
    from slmjax.cli import evaluating

    taken = []

    def keep(loaded, args, data):
        taken.append(data)
        return {}

    monkeypatch.setattr(evaluating, "_evaluations", keep)
    loaded = types.SimpleNamespace(step=0)
    monkeypatch.setattr("slmjax.checkpoints.loading.load_model", lambda *_, **__: loaded)
    assert evaluating.eval_command(["model", "--sequence-length", "64", "--json"]) == 0
    assert [data.sequence_length for data in taken] == [64]


def test_only_commands_with_settings_list_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert "groups of settings" in shown(capsys, "train", "--help")
    assert "groups of settings" not in shown(capsys, "runs", "--help")
