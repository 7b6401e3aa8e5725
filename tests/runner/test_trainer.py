"""A run as a whole: stopped in every way and resumed, damaged, diverged, copied elsewhere; always the same
numbers.
"""

import dataclasses
import io
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from rich.console import Console

import slmjax
from slmjax.cli import INTERRUPTED_STATUS
from slmjax.data.tokenizers import CharTokenizer
from slmjax.evaluation import read_document_sums
from slmjax.parallel.mesh import make_mesh
from slmjax.runner.initial_state import fresh_state
from slmjax.runner.setup import Setup, set_up
from slmjax.sampling import FinishReason, SamplingConfig
from slmjax.telemetry.run_directory import read_log, sessions
from slmjax.training.experiment import EvalConfig, FromModel, read_experiment
from slmjax.training.objective import ObjectiveConfig
from tests.one_layer import one_layer

NUM_STEPS = 60


def result_of(run_dir):
    return json.loads((run_dir / "result.json").read_text())


def logged_steps(run_dir):
    path = run_dir / "log.jsonl"
    return [record["step"] for record in read_log(path, kind="train")] if path.exists() else []


def wait_until(condition, process, *, seconds=240.0):
    """Polls often: what is waited for is over within a second."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended by itself:\n{process.stdout.read()}"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


class Session:
    """A training command that runs until it is stopped from outside."""

    def __init__(self, *arguments, cwd, environment):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "slmjax", "train", *arguments],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def stop(self, number, *, when):
        try:
            wait_until(when, self.process)
            self.process.send_signal(number)
        except BaseException:
            self.process.kill()
            raise
        return self.end()

    def end(self):
        """Exit status and output."""
        output, _ = self.process.communicate(timeout=300)
        return self.process.returncode, output


@pytest.fixture(scope="module")
def straight(trained, workplace):
    """The run directory of the run that nothing disturbed."""
    return workplace / json.loads(trained.stdout)["run_dir"]


@dataclasses.dataclass(frozen=True)
class Story:
    """What happened to the run that was disturbed in every way, session by session: exit status and
    output.
    """

    run_dir: Path
    terminated: tuple[int, str]
    killed: tuple[int, str]
    interrupted: tuple[int, str]
    finished: tuple[int, str]
    damaged_step: int
    first_result: dict


@pytest.fixture(scope="module")
def story(workplace, user_environment):
    """SIGTERM; resumed, then kill -9; its newest checkpoint damaged; resumed, then Ctrl-C; resumed to the
    end.
    """
    root = workplace / "disturbed"

    def session(*arguments):
        return Session(*arguments, cwd=workplace, environment=user_environment)

    def reached(step):
        return lambda: max((step for run in root.glob("*") for step in logged_steps(run)), default=0) >= step

    terminated = session("tiny.py", "--run.directory", str(root)).stop(signal.SIGTERM, when=reached(4))
    (run_dir,) = root.glob("*")
    first_result = result_of(run_dir)

    def newest_whole():
        names = [path.parent.name for path in run_dir.glob("checkpoints/*/MANIFEST.json")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    resume = ("--resume", str(run_dir))
    killed = session(*resume).stop(signal.SIGKILL, when=lambda: newest_whole() >= 20 and reached(24)())
    damaged_step = max(int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit())
    data = max(
        (run_dir / "checkpoints" / str(damaged_step) / "optimizer").rglob("*"),
        key=lambda path: path.stat().st_size,
    )
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    steps_before = len(logged_steps(run_dir))
    interrupted = session(*resume).stop(
        signal.SIGINT, when=lambda: len(logged_steps(run_dir)) > steps_before + 2
    )
    finished = session(*resume).end()
    return Story(run_dir, terminated, killed, interrupted, finished, damaged_step, first_result)


# Stopped and resumed ----------------------------------------------------------------------------------------
def test_the_story_went_as_planned(story):
    assert story.terminated[0] == story.interrupted[0] == INTERRUPTED_STATUS == 75, (
        story.terminated[1] + story.interrupted[1]
    )
    assert story.killed[0] == -signal.SIGKILL, story.killed[1]
    assert story.finished[0] == 0, story.finished[1]
    assert "Traceback" not in story.terminated[1] + story.interrupted[1] + story.finished[1]
    assert story.first_result["status"] == "interrupted" and 4 <= story.first_result["step"] < 20
    assert result_of(story.run_dir)["status"] == "finished" and result_of(story.run_dir)["step"] == NUM_STEPS


def test_a_signal_saves_and_says_how_to_resume(story):
    for (_, output), name in ((story.terminated, "SIGTERM"), (story.interrupted, "SIGINT")):
        assert re.search(rf"^{name} received after step \d+: saving$", output, flags=re.MULTILINE)
        assert f"resume with: slmjax train --resume {story.run_dir}\n" in output
        assert output.splitlines()[-1] == f"run directory: {story.run_dir}"
    assert f"resuming after step {story.first_result['step']}\n" in story.killed[1]


def test_every_session_is_in_the_log(story):
    first, *others = sessions(story.run_dir)
    assert (first.number, first.first_step, first.changes) == (1, 1, {})
    assert [session.number for session in others] == [2, 3, 4] and others[-1].last_step == NUM_STEPS
    # The same settings; the steps that count of each add up to the run.
    assert all(session.changes == {} for session in others)
    assert first.num_steps + sum(session.num_steps for session in others) == NUM_STEPS
    assert len(list(story.run_dir.glob("config-*.json"))) == len(others)
    result = result_of(story.run_dir)
    seconds = [session.seconds for session in (first, *others)]
    assert result["session_seconds"] == pytest.approx(seconds[-1], abs=2)
    assert result["run_seconds"] == pytest.approx(sum(seconds[:-1]) + result["session_seconds"])
    assert 0 < result["session_tokens"] < result["run_tokens"]


def test_a_damaged_checkpoint_is_set_aside(story):
    assert (
        f"checkpoint {story.damaged_step} in" in story.interrupted[1] and "is damaged" in story.interrupted[1]
    )
    resumed = int(re.search(r"resuming after step (\d+)", story.interrupted[1])[1])
    assert resumed < story.damaged_step
    assert (story.run_dir / "checkpoints" / f"{story.damaged_step}.bad").is_dir()
    assert any(
        "is damaged" in record["text"] for record in read_log(story.run_dir / "log.jsonl", kind="message")
    )


def test_every_loss_is_the_same_bit_for_bit(story, straight):
    """Steps that were done twice included."""
    fields = (
        "loss",
        "grad_norm",
        "objective",
        "learning_rate",
        "accuracy",
        "nll",
        "targets",
        "expert_imbalance",
        "bits_per_byte",
        "grad_norms",
        "expert_loads",
    )
    expected = {record["step"]: record for record in read_log(straight / "log.jsonl", kind="train")}
    assert list(expected) == list(range(1, NUM_STEPS + 1))
    records = read_log(story.run_dir / "log.jsonl", kind="train")
    assert {record["step"] for record in records} == set(expected) and len(records) > NUM_STEPS
    for record in records:
        assert {name: record[name] for name in fields} == {
            name: expected[record["step"]][name] for name in fields
        }, record["step"]
    assert expected[NUM_STEPS]["loss"] < expected[1]["loss"] - 1.0


def test_the_final_state_is_the_same_bit_for_bit(story, straight):
    for item in ("model", "optimizer", "ema", "progress"):
        found, expected = (
            ocp.StandardCheckpointer().restore(run / "checkpoints" / str(NUM_STEPS) / item)
            for run in (story.run_dir, straight)
        )
        assert found.keys() == expected.keys() and found
        for name, value in expected.items():
            np.testing.assert_array_equal(
                np.asarray(found[name]), np.asarray(value), err_msg=f"{item} {name}"
            )


def test_the_results_are_the_same(story, straight):
    found = result_of(story.run_dir)
    expected = result_of(straight)
    for name in (
        "loss",
        "bits_per_byte",
        "perplexity",
        "best_loss",
        "run_tokens",
        "step",
        "parameters",
        "compressors",
        "samples",
        "skipped",
    ):
        assert found[name] == expected[name], name


# What a run leaves ------------------------------------------------------------------------------------------
def test_the_log_says_all(straight):
    records = read_log(straight / "log.jsonl")
    by_kind = {
        kind: [record for record in records if record["kind"] == kind]
        for kind in ("session", "train", "eval", "sample", "message", "result")
    }
    assert len(records) == sum(map(len, by_kind.values()))
    wanted = {
        "kind",
        "time",
        "step",
        "loss",
        "objective",
        "bits_per_byte",
        "tokens_per_second",
        "data_wait_share",
        "grad_norm",
        "learning_rate",
        "accuracy",
        "nll",
        "targets",
        "tokens",
        "skipped",
        "skipped_in_a_row",
        "expert_imbalance",
        "dropped",
        "mfu",
        "grad_norms",
        "expert_loads",
        "data_checksum",
    }
    assert all(record.keys() == wanted for record in by_kind["train"])
    assert [record["step"] for record in by_kind["eval"]] == [20, 40, NUM_STEPS]
    assert by_kind["eval"][-1]["complete"] and by_kind["result"][0]["status"] == "finished"
    assert [record["time"] for record in records] == sorted(record["time"] for record in records)
    assert [(record["step"], record["prompt"]) for record in by_kind["sample"]] == [
        (20, "The "),
        (40, "The "),
        (NUM_STEPS, "The "),
    ]
    assert by_kind["sample"][-1]["text"] == result_of(straight)["samples"][0]
    last = by_kind["train"][-1]
    assert set(last["grad_norms"]) == {"embed", "final_norm", *(f"layers/{layer}" for layer in range(4))}
    assert set(last["expert_loads"]) == {"layers/1", "layers/3"}
    assert all(
        len(shares) == 4 and sum(shares) == pytest.approx(1.0) for shares in last["expert_loads"].values()
    )
    assert 0 < last["mfu"] < 1
    assert last["loss"] == pytest.approx(last["nll"] / last["targets"], rel=1e-6)
    # bytes are tokens here, but for EOS
    assert last["bits_per_byte"] == pytest.approx(last["loss"] / math.log(2), rel=0.05)


def test_the_best_checkpoint_stays_beside_the_newest(straight):
    best = json.loads((straight / "checkpoints" / "best.json").read_text())
    # All of the held-out text is evaluated each time here, so that the last evaluation counts like the
    # others.
    evaluated = {record["step"]: record["loss"] for record in read_log(straight / "log.jsonl", kind="eval")}
    assert best == {"step": min(evaluated, key=evaluated.get), "loss": min(evaluated.values())}
    assert (result_of(straight)["best_step"], result_of(straight)["best_loss"]) == (
        best["step"],
        best["loss"],
    )
    kept = {int(path.name) for path in (straight / "checkpoints").iterdir() if path.is_dir()}
    assert {50, NUM_STEPS, best["step"]} <= kept <= {50, NUM_STEPS, *evaluated}
    assert slmjax.load_model(straight, step=best["step"]).step == best["step"]


def test_the_run_directory_holds_all_that_is_needed(story, straight, tmp_path, monkeypatch):
    names = set(
        (
            "config.json model.json data.json environment.json log.jsonl tokenizer checkpoints result.json "
            "heldout_documents.npz report.html plots"
        ).split()
    )
    assert {path.name for path in straight.iterdir()} == names | {"experiment.py"}
    sums = read_document_sums(straight)
    assert sums is not None and sums.nats.sum() / sums.tokens.sum() == pytest.approx(
        result_of(straight)["loss"], rel=1e-6
    )
    # Of a run with four sessions, the files of the first three are kept.
    kept = {f"{name}-{number}.json" for name in ("config", "data", "environment") for number in (1, 2, 3)}
    assert {path.name for path in story.run_dir.iterdir()} == names | kept | {"experiment.py"}
    assert (straight / "experiment.py").read_text() == (Path(__file__).parents[1] / "tiny.py").read_text()
    environment = json.loads((straight / "environment.json").read_text())
    assert environment["packages"]["jax"] and environment["command"][1:3] == ["train", "tiny.py"]
    experiment = read_experiment(straight)
    assert Path(experiment.data.path).is_absolute(), "a run can be read from any directory"
    as_written = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, path="text.txt"))
    assert slmjax.load_experiment(str(straight / "experiment.py")) == as_written

    moved = shutil.copytree(straight, tmp_path / "elsewhere")
    for name in names - {"model.json", "tokenizer", "checkpoints"}:
        shutil.rmtree(moved / name) if (moved / name).is_dir() else (moved / name).unlink()
    monkeypatch.setenv("SLMJAX_CACHE", str(tmp_path / "no cache"))
    monkeypatch.chdir(tmp_path)
    loaded = slmjax.load_model(moved)
    assert loaded.step == NUM_STEPS
    (generation,) = slmjax.generate(loaded, ["The "], config=SamplingConfig(max_tokens=5, temperature=0.0))
    assert len(generation.tokens) == 5 or generation.reason is FinishReason.EOS
    tokens = jnp.asarray([generation.prompt_tokens])
    found = slmjax.logits(loaded.model, tokens)
    assert found.shape == (1, 5, 258) and found.dtype == jnp.float32
    assert int(jnp.argmax(found[0, -1])) == generation.tokens[0]


# The Python surface -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(workplace, tmp_path_factory):
    """An experiment and its result, trained from Python."""
    experiment = one_layer(workplace, tmp_path_factory.mktemp("dense"), steps=6)
    return experiment, slmjax.train(experiment, console=quiet())


def quiet():
    return Console(file=io.StringIO(), width=200)


def copy_of(result, tmp_path):
    return shutil.copytree(result.run_dir, tmp_path / "copy")


def test_train_load_evaluate(finished):
    experiment, result = finished
    assert isinstance(result, slmjax.Result) and result.status == "finished" and result.samples == []
    assert dataclasses.asdict(result).keys() == result_of(Path(result.run_dir)).keys()
    loaded = slmjax.load_model(result.run_dir)
    found = slmjax.evaluate(loaded)
    assert found.bits_per_byte == pytest.approx(result.bits_per_byte, rel=1e-6)
    assert (found.documents, found.tokens > 0, found.overlap) == (1, True, 8)


def test_what_cannot_be_resumed_is_left_as_it_is(finished):
    experiment, result = finished
    with pytest.raises(ValueError, match="is at step 6 of 6 already: increase --run.steps"):
        slmjax.train(experiment, resume=result.run_dir, console=quiet())
    wider = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, embed_dim=64))
    with pytest.raises(ValueError, match="has another model, which a resumed run keeps"):
        slmjax.train(wider, resume=result.run_dir, console=quiet())
    assert read_experiment(Path(result.run_dir)) == experiment


def test_starting_from_a_model(finished, workplace, tmp_path):
    """The first state holds what `load_model` gives, which are the averages where there are any; its table
    has rows of padding besides.
    """
    result = finished[1]
    experiment = dataclasses.replace(
        one_layer(workplace, tmp_path, steps=6), init=FromModel(path=result.run_dir)
    )
    experiment = dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, vocab_multiple=64)
    )
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        state = fresh_state(set_up(experiment, tokenizer=experiment.tokenizer, mesh=mesh))
    loaded = slmjax.load_model(result.run_dir)
    assert int(state.step) == 0 and loaded.step == 6 and state.params.keys() == loaded.params.keys()
    for path, value in loaded.params.items():
        wanted = np.pad(value, ((0, 320 - 258), (0, 0))) if path == "embed/table" else value
        np.testing.assert_array_equal(state.params[path], wanted, err_msg=path)
        np.testing.assert_array_equal(state.ema[path], wanted, err_msg=path)

    other = dataclasses.replace(experiment, tokenizer=CharTokenizer())
    with pytest.raises(ValueError, match="was trained with another tokenizer"):
        slmjax.train(other, console=quiet())
    assert not (tmp_path / "runs").exists(), "a run that cannot begin leaves nothing"


def test_a_run_that_diverges_ends_cleanly(workplace, tmp_path):
    """One update throws the parameters so far off that no later loss is finite."""
    experiment = one_layer(
        workplace, tmp_path, steps=50, lr=1e30, grad_clip=None, max_consecutive_skips=4, ema_decay=None
    )
    result = slmjax.train(experiment, console=quiet())
    assert (result.status, result.step, result.skipped) == ("diverged", 5, 4)
    run_dir = Path(result.run_dir)
    assert result_of(run_dir)["status"] == "diverged"
    messages = [record["text"] for record in read_log(run_dir / "log.jsonl", kind="message")]
    assert (
        "1 of steps 5 to 5 skipped, their loss, gradient or new state is not finite or no token is scored: "
        "4 in all, 4 in a row"
    ) in messages
    assert slmjax.load_model(run_dir).step == 5
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["5.diverged"]
    stored = ocp.StandardCheckpointer().restore(run_dir / "checkpoints" / "5.diverged" / "optimizer")
    assert all(np.isfinite(np.asarray(value)).all() for value in stored.values())
    # Only the one step that counted is counted.
    assert result.run_tokens == read_log(run_dir / "log.jsonl", kind="train")[0]["targets"]


def test_a_run_that_was_killed_after_its_last_step_still_gets_its_result(finished, tmp_path):
    experiment, result = finished
    run_dir = copy_of(result, tmp_path)
    (run_dir / "result.json").unlink()
    again = slmjax.train(experiment, resume=run_dir, console=quiet())
    for name in ("status", "loss", "bits_per_byte", "run_tokens", "step"):
        assert getattr(again, name) == getattr(result, name), name


def test_a_final_loss_that_is_not_finite_is_a_divergence(finished, tmp_path, monkeypatch):
    """Parameters may be finite and still too large to compute with."""
    experiment, result = finished
    run_dir = copy_of(result, tmp_path)
    (run_dir / "result.json").unlink()
    evaluate = Setup.evaluate

    def without_a_loss(*arguments, **options):
        return dataclasses.replace(evaluate(*arguments, **options), loss=math.nan)

    monkeypatch.setattr(Setup, "evaluate", without_a_loss)
    assert slmjax.train(experiment, resume=run_dir, console=quiet()).status == "diverged"
    assert (run_dir / "checkpoints" / "6.diverged").is_dir() and not (run_dir / "checkpoints" / "6").exists()


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(finished, tmp_path):
    """It says so, and also that the text is another one now."""
    experiment, result = finished
    run_dir = copy_of(result, tmp_path)
    shutil.rmtree(run_dir / "checkpoints")
    for name in ("log.jsonl", "result.json"):
        (run_dir / name).unlink()
    (run_dir / "data.json").write_text((run_dir / "data.json").read_text().replace('"hash": "', '"hash": "0'))
    console = quiet()
    assert slmjax.train(experiment, resume=run_dir, console=console).loss == result.loss
    messages = [record["text"] for record in read_log(run_dir / "log.jsonl", kind="message")]
    for said in ("has no checkpoint to resume from: beginning at step 0", "changed since it was trained"):
        assert said in console.file.getvalue() and any(said in text for text in messages)


def test_a_run_whose_checkpoints_are_gone_begins_again_only_if_asked_to(finished, tmp_path):
    experiment, result = finished
    run_dir = copy_of(result, tmp_path)
    shutil.rmtree(run_dir / "checkpoints")
    log_before = (run_dir / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"has no checkpoint, although the run was at step 6: .* --restart"):
        slmjax.train(experiment, resume=run_dir, console=quiet())
    (run_dir / "result.json").unlink()
    # It had evaluated on the way, which saves.
    with pytest.raises(ValueError, match=r"has no checkpoint, although the run was at step \d"):
        slmjax.train(experiment, resume=run_dir, console=quiet())
    assert read_log(run_dir / "log.jsonl", kind="train") == [
        json.loads(line) for line in log_before.splitlines() if b'"kind": "train"' in line
    ]
    assert slmjax.train(experiment, resume=run_dir, restart=True, console=quiet()).loss == result.loss


def test_a_signal_after_the_last_step_leaves_a_finished_run(finished, workplace, tmp_path, monkeypatch):
    """It comes in the last evaluation, of several batches, and ends it after the first."""
    batches = []
    evaluate = Setup.evaluate

    def interrupted(setup, state, max_documents, *, on_batch):
        def after_batch():
            batches.append(1)
            signal.raise_signal(signal.SIGTERM)
            on_batch()

        return evaluate(setup, state, max_documents, on_batch=after_batch)

    experiment = one_layer(workplace, tmp_path, steps=6)
    with monkeypatch.context() as patched:
        patched.setattr(Setup, "evaluate", interrupted)
        console = quiet()
        stopped = slmjax.train(experiment, console=console)
    assert (stopped.status, stopped.step, stopped.samples, len(batches)) == ("finished", 6, [], 1)
    # The loss is that of the last thing that was measured, and named so.
    last = read_log(Path(stopped.run_dir) / "log.jsonl", kind="train")[-1]
    assert (stopped.measured_on, stopped.loss) == ("the last training batch", last["loss"])
    assert result_of(Path(stopped.run_dir))["status"] == "finished"
    assert f"cut short. slmjax eval {stopped.run_dir} does it" in console.file.getvalue()
    assert (Path(stopped.run_dir) / "checkpoints" / "6" / "MANIFEST.json").exists()


def test_resuming_with_other_rows_is_logged(finished, tmp_path):
    experiment, result = finished
    other = dataclasses.replace(
        experiment,
        data=dataclasses.replace(experiment.data, seed=1),
        run=dataclasses.replace(experiment.run, steps=7),
    )
    console = quiet()
    assert slmjax.train(other, resume=copy_of(result, tmp_path), console=console).step == 7
    assert (
        "resumes with another data.seed: some of its text comes twice, some not at all"
        in console.file.getvalue()
    )
    assert "optim.lr at step 7, the next one, is" in console.file.getvalue()
    assert "session 2 has other settings: data.seed=1 instead of 0, run.steps=7" in console.file.getvalue()
    (copy,) = tmp_path.glob("*/config-1.json")
    assert sessions(copy.parent)[1].changes == {"data.seed": (0, 1), "run.steps": (6, 7)}
    assert json.loads(copy.read_text())["data"]["seed"] == 0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (lambda: EvalConfig(max_documents=0), "eval.max_documents must be at least 1"),
        (lambda: EvalConfig(batch_size=0), "eval.batch_size must be at least 1"),
        (lambda: ObjectiveConfig(chunk_size=0), "objective.chunk_size must be at least 1"),
    ],
)
def test_settings_are_refused_before_a_run_begins(settings, named):
    with pytest.raises(ValueError, match=named):
        settings()
