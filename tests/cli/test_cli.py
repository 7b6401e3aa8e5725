"""The commands as a user runs them. What only parses or refuses is called in this process; the rest runs in
its own.
"""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import tyro

from slmjax import cli
from slmjax.config import loads
from slmjax.telemetry.run_directory import read_log
from slmjax.training.experiment import Experiment


@pytest.fixture
def refused(monkeypatch, capsys, workplace, tmp_path):
    """`refused("train", "x.py")`: the message of a command that exits with 2 after one message, having
    written nothing.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes((workplace / "text.txt").read_bytes())
    (tmp_path / "tiny.py").write_bytes((workplace / "tiny.py").read_bytes())

    def run(*arguments):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        out, err = capsys.readouterr()
        assert stopped.value.code == 2, err
        assert "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return re.sub(r"[│\s]+", " ", out + err)  # tyro frames and wraps its messages

    return run


def help_of(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command.split(), "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


# Help -------------------------------------------------------------------------------------------------------
@pytest.mark.smoke
def test_help_takes_no_time(user_environment):
    check = """
import runpy, sys
sys.argv = ["slmjax", "--help"]
try:
    runpy.run_module("slmjax", run_name="__main__")
finally:
    print("jax" in sys.modules, "numpy" in sys.modules, file=sys.stderr)
"""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", check], env=user_environment, capture_output=True, text=True)
    assert time.perf_counter() - started < 3.0  # about 0.1 s where the machine is free
    assert done.returncode == 0 and done.stderr == "False False\n", done.stderr
    assert all(f"\n  {command} " in done.stdout for command in cli.COMMANDS)
    assert all(f"\n{title}:\n" in done.stdout for title in cli.COMMAND_GROUPS)
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_version(run_command, tmp_path):
    import slmjax

    done = run_command("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{slmjax.__version__}\n")


def test_a_renamed_command_runs_with_a_note(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["quant", "table", "--quant", "q4_0", "--json"])
    out, err = capsys.readouterr()
    assert (stopped.value.code, err) == (0, "note: `slmjax quant` was renamed to `slmjax formats`\n")
    assert {line["path"]: line["format"] for line in json.loads(out)}["embed/table"] == "q4_0"


def test_an_unknown_command(refused):
    assert refused("trian").startswith("error: there is no command 'trian'. Did you mean 'train'?")


@pytest.mark.parametrize(
    "command",
    [
        *cli.COMMANDS,
        "train nano",
        "train --help all",
        "data prepare",
        "data inspect",
        "formats table",
        "formats report",
    ],
)
def test_every_option_has_help(command, capsys, monkeypatch):
    """An option's text is more than its type and its default."""
    monkeypatch.setenv("COLUMNS", "100")  # one column of options
    shown = help_of(command, capsys)
    assert "--" in shown and not options_without_help(shown), f"{options_without_help(shown)}\n{shown}"


def options_without_help(shown):
    """Options with nothing next to or below them but their type and their default."""
    lines = [re.sub(r"[│╭╮╰╯]", "", line).rstrip() for line in shown.splitlines()]
    bare = []
    for line, below in itertools.pairwise([*lines, ""]):
        if option := re.match(r"\s+((?:-h, )?--\w[\w.-]*)(?: [^ ]+)*\s*(.*)", line):
            text = re.sub(r"\((default|optional|required).*", "", option[2] or below.strip())
            if len(text.strip()) < 8:
                bare.append(option[1])
    return bare


def test_an_option_without_help_would_be_noticed(capsys):
    @dataclasses.dataclass
    class Arguments:
        bare: int = 3
        documented: int = 3  # what it is for

    with pytest.raises(SystemExit):
        tyro.cli(Arguments, args=["--help"])
    assert options_without_help(capsys.readouterr().out) == ["--bare"]


# Commands on a trained model --------------------------------------------------------------------------------
@pytest.mark.smoke
def test_train_prints_json_alone(trained, workplace):
    result = json.loads(trained.stdout)
    wanted = {
        "loss",
        "bits_per_byte",
        "run_tokens",
        "run_seconds",
        "session_tokens",
        "session_seconds",
        "session_tokens_per_second",
        "parameters",
        "step",
        "run_dir",
        "commit",
    }
    assert wanted <= result.keys()
    run_dir = workplace / result["run_dir"]
    assert result == json.loads((run_dir / "result.json").read_text())
    assert result["status"] == "finished" and result["step"] == 60 and result["samples"][0].startswith("The ")
    assert set(result["compressors"]) == {"gzip -9", "xz -9"}
    assert (
        result["bits_per_byte"] < 4.8 and result["session_tokens_per_second"] > 0 < result["session_seconds"]
    )
    # A run of one session.
    assert result["run_tokens"] == result["session_tokens"]
    assert result["run_seconds"] == result["session_seconds"]
    assert result["session_peak_memory_bytes"] > 2**24
    assert sum(result["session_seconds_by_category"].values()) == pytest.approx(
        result["session_seconds"], rel=1e-6
    )
    assert "step 60/60" in trained.stderr and "Warning" not in trained.stderr


@pytest.mark.smoke
def test_eval_finds_what_training_found(trained, workplace, run_command):
    result = json.loads(trained.stdout)
    done = run_command("eval", result["run_dir"], "--json", cwd=workplace)
    assert done.returncode == 0, done.stderr
    evaluated = json.loads(done.stdout)["text"]
    assert evaluated["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=1e-6)
    assert evaluated["loss"] == pytest.approx(result["loss"], rel=1e-6)


def test_eval_of_another_text(trained, workplace, run_command, tmp_path):
    (tmp_path / "other.txt").write_text("nothing like what it was trained on: 0123456789 " * 20)
    run_dir = workplace / json.loads(trained.stdout)["run_dir"]
    done = run_command(
        "eval", str(run_dir), "--data.path", "other.txt", "--step", "50", "--overlap", "16", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (
        "step 50" in done.stdout
        and "961 tokens of 1 documents" in done.stdout
        and f"{48 * 20} bytes" in done.stdout
    )
    assert re.search(r"bits per byte +[\d.]+ ", done.stdout), done.stdout


@pytest.mark.smoke
def test_generate(trained, workplace, run_command):
    run_dir = json.loads(trained.stdout)["run_dir"]
    greedy = ("generate", run_dir, "--max-tokens", "12", "--temperature", "0")
    done = run_command(*greedy, "--prompt", "The ", "An e", "--json", cwd=workplace)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    assert (first["prompt"], second["prompt"]) == ("The ", "An e")
    assert len(first["tokens"]) == 12 or first["reason"] == "eos"
    plain = run_command(*greedy, "--prompt", "The ", "An e", cwd=workplace)
    assert plain.stdout == f"The {first['text']}\n\nAn e{second['text']}\n\n"


def test_train_from_a_model_with_other_settings(trained, workplace, run_command):
    """It starts at that model's loss, config.json has the overrides, the last line names the directory."""
    result = json.loads(trained.stdout)
    # What is overridden is not compiled in: this takes a moment.
    overrides = ["--run.name", "more", "--data.seed", "5", "--eval.max-documents", "1", "--checkpoint.keep=1"]
    done = run_command("train", "--init-from", result["run_dir"], *overrides, cwd=workplace)
    assert done.returncode == 0, done.stderr
    name, directory = done.stdout.splitlines()[-1].split(": ")
    assert name == "run directory" and (workplace / directory / "result.json").is_file()
    assert "gzip -9" in done.stdout and "finished after step 60" in done.stdout
    experiment = loads(Experiment, (workplace / directory / "config.json").read_text())
    changed = (
        experiment.run.name,
        experiment.data.seed,
        experiment.eval.max_documents,
        experiment.checkpoint.keep,
    )
    assert changed == ("more", 5, 1, 1) and experiment.data.sequence_length == 48
    first, other = (
        read_log(workplace / path / "log.jsonl", kind="train")[0]["loss"]
        for path in (directory, result["run_dir"])
    )
    assert abs(first - result["loss"]) < 0.3 < other - result["loss"] - 1


# Data and models --------------------------------------------------------------------------------------------
@pytest.fixture
def printed(monkeypatch, capsys, workplace):
    """`printed("models")`: the standard output of a command called in this process, where text.txt and
    tiny.py are.
    """
    monkeypatch.chdir(workplace)

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        out, err = capsys.readouterr()
        assert stopped.value.code == 0, err
        return out

    return run


def test_data(printed, workplace):
    train, heldout = json.loads(printed("data", "prepare", "tiny.py", "--json"))
    assert (train["num_documents"], heldout["num_documents"]) == (1, 1) and train["vocab_size"] == 258
    assert train["num_bytes"] + heldout["num_bytes"] == (workplace / "text.txt").stat().st_size
    statistics = json.loads(printed("data", "inspect", "tiny.py", "--samples", "1", "--json"))
    assert statistics["sources"][0]["train"]["tokens"] == train["num_tokens"]
    assert (workplace / "text.txt").read_text().startswith(statistics["samples"][0]["text"])


def test_data_for_people(printed):
    train, heldout = printed("data", "prepare", "tiny.py").splitlines()
    assert re.fullmatch(r".*text.txt, train: 1 documents, [\d,]+ bytes, [\d,]+ tokens, in .*/train", train)
    assert ", heldout: 1 documents, " in heldout
    assert '"""The experiment that' in printed("data", "inspect", "tiny.py", "--data.path", "tiny.py")


def test_models(printed):
    models = json.loads(printed("models", "--json"))
    wanted = {
        "parameters",
        "active_parameters",
        "embedding_parameters",
        "training_flops_per_token",
        "bytes_bf16",
        "resident_bytes_bf16",
        "cache_bytes_per_token",
        "by_length",
    }
    assert {"nano", "shakespeare_char"} <= models.keys() and all(
        wanted <= model.keys() for model in models.values()
    )
    lines = {line.split()[0]: line for line in printed("models").splitlines() if line}
    for name, model in models.items():
        assert f" {model['parameters']:,} " in lines[name]


# What is refused --------------------------------------------------------------------------------------------
def test_an_experiment_that_is_not_there(refused):
    assert "no built-in experiment 'nanoo'. Did you mean 'nano'?" in refused("train", "nanoo")
    assert "there is no Python file tinny.py. Did you mean 'tiny.py'?" in refused("train", "tinny.py")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1", "needs a function `def experiment() -> Experiment`"),
        ("def experiment():\n    return 7", "experiment() of wrong.py returned an int, not an Experiment"),
        (
            "import slmjax\n\ndef experiment():\n    return slmjax.load_experiment('nan')",
            "wrong.py, line 4: ValueError: there is no",
        ),
        ("def experiment(:", "wrong.py: SyntaxError"),
        (
            "from slmjax.training.optim import OptimConfig\nOptimConfig(learning_rate=1)",
            "wrong.py, line 2: TypeError",
        ),
    ],
    ids=["none", "other", "error", "syntax", "field"],
)
def test_an_experiment_file_that_is_wrong(refused, tmp_path, code, message, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "wrong.py").write_text(code)
    assert message in refused("train", "wrong.py")


def test_an_unknown_option(refused):
    message = refused("train", "tiny.py", "--optim.rate", "3")
    assert "no option --optim.rate" in message and "--help all" in message
    message = refused("train", "tiny.py", "--optim.warmup-step", "3")
    assert "--optim.warmup-steps" in message
    assert "optim.lr" in refused("train", "tiny.py", "--optim.lr", "fast")
    assert "unrecognized" in refused("models", "all").lower()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.embed-dim", "30"], "head_dim"),
        (["--model.context-length", "32"], "data.sequence_length=48 is longer than model.context_length=32"),
        (["--mesh.tensor", "3"], "does not fit the 8 device(s) here"),
        (["--mesh.fsdp", "16"], "does not fit the 8 device(s) here"),
        (["--data.batch-size", "12"], "data.batch_size=12 must be a multiple of 8"),
        (
            ["--optim.accumulation-steps", "3"],
            "data.batch_size=8 must be a multiple of optim.accumulation_steps=3",
        ),
        (["--eval.batch-size", "4"], "eval.batch_size=4 must be a multiple of 8"),
        (["--model.vocab-size", "100"], "model.vocab_size=100 is smaller than the tokenizer's 258"),
        (["--data.path", "nowhere.txt"], "nowhere.txt"),
        (["--optim.warmup-steps", "2.5"], "optim.warmup_steps is 2.5"),
        (
            ["--run.sample.max-tokens", "100"],
            "run.sample: a prompt of 5 tokens (BOS included) and max_tokens=100 are more than",
        ),
        (["--init-from", "nowhere"], "nowhere"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_that_do_not_fit(refused, options, message):
    assert jax.device_count() == 8
    assert message in refused("train", "tiny.py", *options)


def test_resume_of_what_is_no_run(refused, tmp_path):
    assert "not a run directory" in refused("train", "--resume", ".")
    (tmp_path / "config.json").write_text("{}")
    assert "leave out tiny.py" in refused("train", "tiny.py", "--resume", ".")


def test_a_model_that_is_not_there(refused):
    assert "RUN_DIR" in refused("eval") and "RUN_DIR" in refused("generate")
    assert ". is neither a run directory nor an imported model" in refused("eval", ".")
    assert ". is neither a run directory nor an imported model" in refused("generate", ".", "--prompt", "x")
    assert "use `slmjax data prepare` or `slmjax data inspect`" in refused("data", "prepar")


def test_a_step_that_is_not_there_and_a_prompt_that_is_too_long(refused, trained, workplace):
    run_dir = str(workplace / json.loads(trained.stdout)["run_dir"])
    assert "has no checkpoint of step 7: it has" in refused("eval", run_dir, "--step", "7")
    assert "shorten it to" in refused("generate", run_dir, "--prompt", "x" * 100)


def test_a_refusal_in_a_process_of_its_own(run_command, tmp_path):
    done = run_command("train", "--mesh.fsdp", "16", "--data.path", str(Path(__file__)), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    message = done.stderr.splitlines()[0]
    assert message.startswith("error: the mesh") and "does not fit the 1 device(s) here" in message
    assert list(tmp_path.iterdir()) == []
