"""What a run's figures are of: runs that were extended, killed or cut short say so, and nothing that was
written is lost.
"""

import dataclasses
import io
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import slmjax
from slmjax import faults
from slmjax.cli import main
from slmjax.data.config import Split
from slmjax.runner import trainer
from slmjax.telemetry.report import list_runs
from slmjax.telemetry.run_directory import RunDirectory, read_log
from tests.one_layer import one_layer


@pytest.fixture(scope="module")
def experiment(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> slmjax.Experiment:
    """The tiny experiment with one layer, which compiles in a moment, and its evaluations on part of the
    held-out text: one of several documents.
    """
    directory = tmp_path_factory.mktemp("results")
    text = (workplace / "text.txt").read_text(encoding="utf-8")
    documents = directory / "documents.jsonl"
    documents.write_text(
        "".join(json.dumps({"text": text[start : start + 1000]}) + "\n" for start in range(0, 40_000, 1000))
    )
    found = one_layer(workplace, directory, steps=4)
    return dataclasses.replace(
        found,
        data=dataclasses.replace(
            found.data, path=str(documents), split=Split.DOCUMENTS, heldout_fraction=0.3
        ),
        eval=dataclasses.replace(found.eval, every=2, max_documents=1),
    )


def train(experiment: slmjax.Experiment, **changes) -> slmjax.Result:
    return slmjax.train(experiment, console=Console(file=io.StringIO(), width=200), **changes)


def lengthened(experiment: slmjax.Experiment, steps: int) -> slmjax.Experiment:
    return dataclasses.replace(experiment, run=dataclasses.replace(experiment.run, steps=steps))


def test_a_run_that_was_extended_and_killed_before_its_result(
    experiment: slmjax.Experiment, tmp_path: Path
) -> None:
    experiment = dataclasses.replace(
        experiment, run=dataclasses.replace(experiment.run, directory=str(tmp_path))
    )
    first = train(experiment)
    path = Path(first.run_dir)
    shutil.copyfile(path / "result.json", tmp_path / "first.json")
    longer = lengthened(experiment, 6)
    expected = train(longer, resume=path)
    assert (first.step, expected.step, expected.measured_on) == (4, 6, "held-out text")
    the_best_is_selected_on_the_same_text(expected)
    # Killed in its last evaluation: the checkpoint of step 6 is there, the result is that of step 4.
    shutil.copyfile(tmp_path / "first.json", path / "result.json")
    [listed] = list_runs(tmp_path)
    assert (listed.status, listed.step, listed.steps) == ("unfinished", 6, 6)
    again = train(longer, resume=path)
    assert (again.status, again.step, again.loss) == ("finished", 6, expected.loss)
    with pytest.raises(ValueError, match="at step 6 of 6 already"):
        train(longer, resume=path)


def the_best_is_selected_on_the_same_text(result: slmjax.Result) -> None:
    records = read_log(Path(result.run_dir) / "log.jsonl", kind="eval")
    # The run ended at step 4 first, and was extended: the last step is evaluated on the part, then on all.
    assert [(record["step"], bool(record.get("complete"))) for record in records] == [
        (2, False),
        (4, False),
        (4, True),
        (6, False),
        (6, True),
    ]
    assert {record["documents"] for record in records if not record.get("complete")} == {1}
    on_part = {record["step"]: record["loss"] for record in records if not record.get("complete")}
    best = min(on_part, key=on_part.__getitem__)
    assert (result.best_step, result.best_loss) == (best, on_part[best])
    assert (result.best_measured_on, result.part_loss) == ("part of the held-out text", on_part[6])
    assert result.loss == records[-1]["loss"] != result.part_loss
    marked = json.loads((Path(result.run_dir) / "checkpoints" / "best.json").read_text())
    assert (marked["step"], marked["loss"]) == (best, on_part[best])


@pytest.mark.parametrize(
    ("every", "measured_on"),
    [(2, "part of the held-out text, after step 2"), (100, "the last training batch")],
)
def test_a_run_cut_short_says_what_it_measured(
    experiment: slmjax.Experiment,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    every: int,
    measured_on: str,
) -> None:
    step = trainer.Loop._step

    def interrupted(loop: trainer.Loop, state: Any) -> Any:
        if loop.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(loop, state)

    monkeypatch.setattr(trainer.Loop, "_step", interrupted)
    changed = dataclasses.replace(
        experiment,
        eval=dataclasses.replace(experiment.eval, every=every),
        run=dataclasses.replace(experiment.run, directory=str(tmp_path)),
    )
    result = train(changed)
    records = {kind: read_log(Path(result.run_dir) / "log.jsonl", kind=kind) for kind in ("train", "eval")}
    assert (result.status, result.step, result.measured_on) == ("interrupted", 3, measured_on)
    assert result.loss == records["eval" if every == 2 else "train"][-1]["loss"]
    [listed] = list_runs(tmp_path)
    assert listed.loss == (result.loss if every == 2 else None) and not listed.complete


def test_a_full_disk_ends_a_run_as_not_saved(
    experiment: slmjax.Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint fits, nor one line of the log; the rest of the run takes place."""
    experiment = dataclasses.replace(
        experiment, run=dataclasses.replace(experiment.run, directory=str(tmp_path))
    )
    full = faults.parse("checkpoint.committed:*=full,log.write:3=full")
    monkeypatch.setattr(faults, "_faults", full)
    output = io.StringIO()
    result = slmjax.train(experiment, console=Console(file=output, width=200))
    assert (result.status, result.step, result.log_lines_lost) == ("not_saved", 4, 1)
    assert result.measured_on == "held-out text"
    path = Path(result.run_dir)
    assert json.loads((path / "result.json").read_text())["status"] == "not_saved"
    shown = output.getvalue()
    assert "step 4 is LOST (No space left on device" in shown and "): the run has no checkpoint" in shown
    assert f"slmjax train --resume {path}" in shown
    assert not list((path / "checkpoints").glob("*/"))
    assert [record["step"] for record in read_log(path / "log.jsonl", kind="train")] == [1, 2, 4]
    # A result that cannot be written says so, since nothing on disk does.
    monkeypatch.setattr(faults, "_faults", faults.parse("file.replace=readonly"))
    finished = dataclasses.replace(result, status="finished")
    for status in ("not_saved", "finished"):
        assert trainer.write_result(RunDirectory(path), finished, resume="").status == status


def test_prompts_that_are_refused_cost_no_file(
    experiment: slmjax.Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = train(experiment).run_dir
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "a\u2028b"}\n' + json.dumps({"prompt": "x" * 100}) + "\n", encoding="utf-8"
    )
    (tmp_path / "out.jsonl").write_text("what was there")
    words = [
        "generate",
        run_dir,
        "--file",
        str(tmp_path / "prompts.jsonl"),
        "--output",
        str(tmp_path / "out.jsonl"),
        "--format",
        "jsonl",
    ]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--batch-size", "1"])
    assert stopped.value.code == 2 and "101 tokens" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == "what was there"
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a\u2028b"}\r\n', encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--max-tokens", "2"])
    assert not stopped.value.code, capsys.readouterr().err
    assert [json.loads(line)["prompt"] for line in (tmp_path / "out.jsonl").read_text().split("\n")[:-1]] == [
        "a\u2028b"
    ]
