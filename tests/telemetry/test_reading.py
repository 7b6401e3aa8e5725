"""Run directories as data: damaged files, settings that a session changed, and names of runs."""

import json
from pathlib import Path

import pytest

from slmjax.stored_json import DamagedFile
from slmjax.telemetry.report import config_differences, list_runs, read_run, write_comparison, write_report
from slmjax.telemetry.report.comparison import results, shown_differences, shown_results
from slmjax.telemetry.report.names import full_names, short_names
from slmjax.telemetry.report.settings import History
from tests.written_run import add_session, write_run

DEEP = '{"a": ' * 300 + "1" + "}" * 300


# Damage -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[]", "not an object.*restore it"),
        ("config.json", '{"run": 3}', "'run' in .*config.json holds 3"),
        ("config.json", '{"run": {"steps": "many"}}', "\"many\" as 'steps', not an integer"),
        ("config.json", '{"run": {"steps": 1' + "0" * 400 + "}}", "as run.steps"),
        ("config.json", f'{{"run": {{"steps": 1}}, "a": {DEEP}}}', "nested too deeply"),
        ("result.json", "[1]", "result.json holds a list, not an object: delete it"),
        ("result.json", '{"step": 3}', "no field 'status'"),
        ("result.json", '{"status": "finished", "step": "3"}', "\"3\" as 'step'"),
        (
            "result.json",
            '{"status": "finished", "step": 3, "compressors": 5}',
            "5 as 'compressors', not an object",
        ),
        ("log.jsonl", '{"kind": "train"}\n', "line 1 of .*log.jsonl has no field 'step': remove the line"),
        ("log.jsonl", "[]\n", "line 1 of .*log.jsonl holds a list"),
        ("log.jsonl", '{"kind": []}\n', "line 1 of .*log.jsonl has a list as 'kind'"),
        ("log.jsonl", '{"kind": "train", "time": 1, "step": 1, "grad_norms": 3}\n', "3 as 'grad_norms'"),
        ("log.jsonl", '{"kind": "train", "time": 1, "step": 1' + "0" * 400 + "}\n", "as 'step'"),
        ("log.jsonl", '{"kind": "eval", "step": 1, "documents": []}\n', "a list as 'documents'"),
        ("log.jsonl", '{"kind": "sample", "step": 1, "prompt": 3, "text": ""}\n', "3 as 'prompt'"),
        ("data.json", "{}", "holds an object, not a list"),
        ("data.json", '[{"heldout": {"documents": 3}, "fingerprint": "a"}]', "no field 'bytes'"),
        ("environment.json", "\xff", "is not UTF-8 text"),
    ],
)
def test_a_damaged_file_is_named_with_the_way_out(
    tmp_path: Path, file: str, content: str, message: str
) -> None:
    run = write_run(tmp_path / "runs" / "damaged")
    (run / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(DamagedFile, match=message):
        read_run(run)
    # One damaged run does not hide the others.
    write_run(tmp_path / "runs" / "sound")
    by_name = {listed.name: listed for listed in list_runs(tmp_path / "runs")}
    assert by_name["damaged"].status == "damaged" and file in str(by_name["damaged"].problem)
    assert by_name["sound"].status == "finished" and by_name["sound"].problem is None


def test_values_of_other_types_are_left_out_of_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "odd")
    (run / "result.json").write_text(
        json.dumps(
            {"status": "\x1b<b>", "step": 40, "compressors": {"xz": "?"}, "parameters": [], "tokens": "x"}
        )
    )
    record = {
        "kind": "train",
        "time": 1e300,
        "step": 1,
        "loss": 10**400,
        "expert_loads": {"layers/1": [None]},
    }
    text = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(json.dumps(record) + "\n" + text)
    page = write_report(run, with_images=False).read_text()
    assert "&lt;b&gt; · step 40 of 40" in page and "xz" in page
    [listed] = list_runs(tmp_path)
    assert (listed.parameters, listed.tokens, listed.seconds) == (None, None, None)


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "report.html").mkdir()
    with pytest.raises(ValueError, match="report.html cannot be written .*--output"):
        write_report(run)
    (run / "plots").write_text("a file")
    with pytest.raises(ValueError, match="the page is written.*--no-images"):
        write_report(run, output=tmp_path / "page.html")
    assert (tmp_path / "page.html").is_file()


def test_an_imported_model_is_no_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "origin.json").write_text("{}")
    assert [listed.name for listed in list_runs(tmp_path)] == ["run"]


# Sessions that changed settings -----------------------------------------------------------------------------
def resumed_run(path: Path) -> Path:
    """40 steps at a rate of 0.001, and 20 that were resumed at 0.003; a session between them kept no step."""
    run = write_run(path, steps=60, lr=3e-3, finished=False)
    (run / "log.jsonl").unlink()
    add_session(run, number=1, first_step=1, last_step=45, changes={})
    add_session(run, number=2, first_step=41, changes={"optim.lr": [1e-3, 5e-3]})
    changes = {"optim.lr": [5e-3, 3e-3], "model.stack[0].repeats": [1, 2], "run.steps": [40, 60]}
    add_session(run, number=3, first_step=41, last_step=60, changes=changes)
    return run


def test_a_changed_setting_is_shown_with_its_first_step(tmp_path: Path) -> None:
    run = read_run(resumed_run(tmp_path / "resumed"))
    assert run.changed_settings() == {
        "optim.lr": [(1, 1e-3), (41, 3e-3)],
        "model.stack.0.repeats": [(1, 1), (41, 2)],
        "run.steps": [(1, 40), (41, 60)],
    }
    # The settings that config.json has are those of the last 20 steps: the runs were not trained alike.
    same_config = write_run(tmp_path / "straight", steps=60, lr=3e-3)
    rows = {path: values for path, *values in config_differences([run, read_run(same_config)])}
    assert rows["optim.lr"] == [History(((1, 1e-3), (41, 3e-3))), 3e-3]
    texts = {path: values for path, *values in shown_differences([run, read_run(same_config)]).rows}
    assert texts["optim.lr"] == ["0.001, from step 41: 0.003", "0.003"]
    [listed] = [listed for listed in list_runs(tmp_path) if listed.name == "resumed"]
    assert listed.changed["optim.lr"] == [[1, 1e-3], [41, 3e-3]]
    page = write_report(run.path, with_images=False).read_text()
    about = "settings changed in a resumed session: run.steps, optim.lr, model.stack.0.repeats"
    assert about in page and "none that count" in page
    assert (
        "0.001, from step 41: 0.003" in write_comparison([run.path, same_config], tmp_path / "p").read_text()
    )


def test_steps_before_the_first_recorded_session_had_the_settings_before_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=60, lr=3e-3)
    (run / "log.jsonl").unlink()
    add_session(run, number=2, first_step=31, last_step=60, changes={"optim.lr": [1e-3, 3e-3]})
    assert read_run(run).changed_settings() == {"optim.lr": [(1, 1e-3), (31, 3e-3)]}


# Evaluations on a part of the held-out text -----------------------------------------------------------------
def evaluated_run(path: Path, *, result: dict) -> Path:
    run = write_run(path, finished=False)
    lines = [line for line in (run / "log.jsonl").read_text().splitlines() if '"eval"' not in line]
    losses = [(20, 4.361, {"documents": 2}), (40, 4.402, {"documents": 2})]
    losses += [(40, 4.254, {"documents": 9, "complete": True})]
    for step, loss, more in losses:
        record = {"kind": "eval", "time": 50.0, "step": step, "loss": loss, "bits_per_byte": 1.0, **more}
        lines.append(json.dumps(record))
    (run / "log.jsonl").write_text("\n".join(lines) + "\n")
    (run / "result.json").write_text(json.dumps({"status": "finished", "step": 40, "loss": 4.254, **result}))
    return run


def test_a_best_loss_is_shown_with_its_text(tmp_path: Path) -> None:
    part = "part of the held-out text"
    best = {"best_loss": 4.361, "best_step": 20, "measured_on": "held-out text"}
    new = evaluated_run(tmp_path / "new", result={**best, "best_measured_on": part, "part_loss": 4.402})
    assert read_run(new).held_out["loss"] == 4.254 and len(read_run(new).on_the_way) == 2
    page = write_report(new, with_images=False).read_text()
    assert f"lowest loss at step 20, on {part}, where step 40 has 4.4020" in page
    assert "<b>4.2540</b><span>loss on held-out text" in page
    # A result of an earlier version does not say so, but its log shows it.
    old = evaluated_run(tmp_path / "old", result=best)
    assert f"lowest loss at step 20, on {part}<" in write_report(old, with_images=False).read_text()
    rows = dict((name, values) for name, *values in shown_results([read_run(new), read_run(old)]))
    assert rows["best step selected on"] == [part, part]
    assert rows["loss of the last step there"] == ["4.402", "—"]
    assert ("loss", 4.254, 4.254) in results([read_run(new), read_run(old)])


# Architectures ----------------------------------------------------------------------------------------------
def with_stack(path: Path, *mixers: str) -> Path:
    run = write_run(path)
    config = json.loads((run / "config.json").read_text())
    blocks = [{"mixer": {"type": f"{mixer}Config", **dict.fromkeys("abcdefgh", 1)}} for mixer in mixers]
    config["model"]["stack"] = [{"pattern": blocks, "repeats": 2}]
    (run / "config.json").write_text(json.dumps(config))
    return run


def test_architectures_that_differ_are_described_by_their_structure(tmp_path: Path) -> None:
    runs = [
        read_run(with_stack(tmp_path / "plain", "Attention")),
        read_run(with_stack(tmp_path / "mixed", "Latent", "Attention")),
    ]
    differences = shown_differences(runs)
    assert [row[0] for row in differences.rows] == ["model.stack", "run.name"]
    assert differences.rows[0] == ("model.stack", "2 x (Attention)", "2 x (Latent, Attention)")
    assert len(differences.further) == 10 and not shown_differences(runs, most=None).further
    assert len(shown_differences(runs, most=1).rows) == 1
    # Stacks of one structure compare setting by setting.
    (tmp_path / "other").mkdir()
    other = with_stack(tmp_path / "other" / "plain", "Attention")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"c": 1', '"c": 2'))
    assert shown_differences([runs[0], read_run(other)]).rows == [
        ("model.stack.0.pattern.0.mixer.c", "1", "2")
    ]


# Names ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (
            ["nano-20261201-081048-1a2b3c", "nano-20261201-091501-9f8e7d"],
            ["081048", "091501"],
        ),
        (
            ["nano-20261201-081048-1a2b3c", "nano-wide-20261201-081048-9f8e7d"],
            ["1a2b3c", "wide"],
        ),
        # No word is unique in the first: two are.
        (["warm-up-of-the-rate", "warm-of-up-the-rate", "a-long-name-of-a-run"], ["warm-up", "warm-of", "a"]),
        (["first/a-run-of-one-name", "second/a-run-of-one-name"], ["first", "second"]),
        (["run", "run-with-a-longer-name"], ["run", "with"]),
    ],
)
def test_short_names_are_the_shortest_part_that_differs(
    tmp_path: Path, names: list[str], expected: list[str]
) -> None:
    assert short_names([tmp_path / name for name in names]) == expected


def test_full_names_are_paths_where_names_are_equal() -> None:
    assert full_names([Path("a/run"), Path("b/other")]) == ["run", "other"]
    assert full_names([Path("a/run"), Path("b/run")]) == ["a/run", "b/run"]
