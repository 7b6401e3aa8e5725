"""A study trains what is missing, in pairs, and nothing twice: killed, interrupted, failed, changed,
extended.
"""

import dataclasses
import io
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from slmjax import config
from slmjax.runner import trainer
from slmjax.studies import (
    Arm,
    Budget,
    Interrupted,
    Member,
    OnChange,
    Study,
    Verdict,
    analyze,
    member_experiment,
    read_members,
    run_study,
)
from slmjax.telemetry.run_directory import read_log
from slmjax.training.experiment import read_experiment
from tests.one_layer import one_layer
from tests.studies.stub import StubTrainer, experiment, study


def keys(asked) -> list[tuple[float, int]]:
    return [(one.optim.lr, one.run.seed) for one in asked]


def all_keys(seeds: tuple[int, ...] = (0, 1, 2)) -> list[tuple[float, int]]:
    return [(lr, seed) for seed in seeds for lr in (1e-3, 2e-3, 2e-3)]


def records(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "members.jsonl").read_text().splitlines()]


def test_members_are_trained_seed_by_seed_with_both_seeds_set(tmp_path: Path) -> None:
    train = StubTrainer()
    members = run_study(study(), tmp_path, train=train)
    assert keys(train.asked) == all_keys()
    assert all(one.data.seed == one.run.seed for one in train.asked)
    assert train.resumed == [None] * 9
    assert [(member.arm, member.seed) for member in members[:4]] == [
        ("slow", 0),
        ("fast & loose", 0),
        ("third", 0),
        ("slow", 1),
    ]
    assert Path(train.asked[4].run.directory) == tmp_path / "fast-loose" / "seed-1"
    assert {path.parent.parent.name for path in tmp_path.glob("*/seed-*/stub-*")} == {
        "slow",
        "fast-loose",
        "third",
    }
    assert len(records(tmp_path)) == 9 and records(tmp_path)[4]["result"]["bits_per_byte"] == members[
        4
    ].metric_value("bits_per_byte")


def test_metrics_come_from_the_result_and_the_last_evaluation(tmp_path: Path) -> None:
    slow, fast, _ = run_study(study(seeds=(1,)), tmp_path, train=StubTrainer())
    # not the 9.0 of an evaluation on the way
    assert slow.metric_value("bits_per_byte") == pytest.approx(2 - 0.1 + 0.1 + 0.003)
    assert fast.metric_value("calibration_error") == pytest.approx(2.0002e-3)
    assert slow.metric_value("tokens") == 1_064_778 and slow.metric_value("documents") == 3
    for name in ("status", "samples", "complete", "best_loss", "nothing"):  # no numbers
        assert slow.metric_value(name) is None and name not in slow.metric_names


class Killed(BaseException):
    """Nothing catches it, as nothing catches kill -9."""


def test_a_killed_study_goes_on_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run_study(study(), tmp_path, train=StubTrainer(errors={(2e-3, 1): Killed()}))
    assert len(records(tmp_path)) == 4
    with (tmp_path / "members.jsonl").open("a") as stream:
        stream.write('{"kind": "member", "arm": "fast')  # a line that was being written
    train = StubTrainer()
    members = run_study(study(), tmp_path, train=train)
    assert keys(train.asked) == all_keys()[4:]
    assert train.resumed == [None] * 5  # there was no checkpoint yet
    assert members == read_members(study(), tmp_path) and len(members) == 9
    again = StubTrainer()
    assert run_study(study(), tmp_path, train=again) == members and not again.asked


def test_a_study_takes_further_seeds_and_arms(tmp_path: Path) -> None:
    run_study(study(seeds=(0, 1)), tmp_path, train=StubTrainer())
    wider = study(seeds=(0, 1, 7))
    wider = dataclasses.replace(wider, arms=(*wider.arms, Arm(name="late", experiment=experiment(5e-3))))
    train = StubTrainer()
    run_study(wider, tmp_path, train=train)
    assert keys(train.asked) == [(5e-3, 0), (5e-3, 1), *all_keys((7,)), (5e-3, 7)]


def test_a_renamed_arm_of_the_same_directory_keeps_its_runs(tmp_path: Path) -> None:
    before = run_study(study(), tmp_path, train=StubTrainer())
    arms = tuple(
        dataclasses.replace(arm, name=arm.name.replace("fast & loose", "fast + loose"))
        for arm in study().arms
    )
    stub = StubTrainer()
    after = run_study(study(arms=arms), tmp_path, train=stub)
    assert stub.asked == [] and [member.arm for member in after] == ["slow", "fast + loose", "third"] * 3
    assert [member.result for member in after] == [member.result for member in before]


def test_an_interrupted_member_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="arm fast & loose, seed 0.*run the study again"):
        run_study(study(), tmp_path, train=StubTrainer(statuses={(2e-3, 0): "interrupted"}))
    assert len(records(tmp_path)) == 1
    train = StubTrainer()
    assert len(run_study(study(), tmp_path, train=train)) == 9
    assert train.resumed[0] is not None and train.resumed[0].parent == tmp_path / "fast-loose" / "seed-0"
    assert train.resumed[1:] == [None] * 7


def test_a_result_that_was_not_recorded_is_not_trained_again(tmp_path: Path) -> None:
    """The study was killed between the end of a run and the line about it."""
    before = run_study(study(), tmp_path, train=StubTrainer())
    path = tmp_path / "members.jsonl"
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines()[:-1]))
    train = StubTrainer()
    assert run_study(study(), tmp_path, train=train) == before and not train.asked


def test_a_changed_experiment_is_refused_or_done_again(tmp_path: Path) -> None:
    run_study(study(), tmp_path, train=StubTrainer())
    changed = study()
    changed = dataclasses.replace(
        changed, arms=(changed.arms[0], dataclasses.replace(changed.arms[1], experiment=experiment(4e-3)))
    )
    train = StubTrainer()
    for call in (lambda: run_study(changed, tmp_path, train=train), lambda: read_members(changed, tmp_path)):
        with pytest.raises(
            ValueError, match="members of fast & loose were trained with another experiment.*OnChange.REDO"
        ):
            call()
    assert not train.asked
    assert [member.arm for member in read_members(changed, tmp_path, on_change=OnChange.REDO)] == ["slow"] * 3
    members = run_study(changed, tmp_path, train=train, on_change=OnChange.REDO)
    assert keys(train.asked) == [(4e-3, seed) for seed in (0, 1, 2)]
    assert train.resumed == [None] * 3
    assert len(members) == 6 and read_members(changed, tmp_path) == members


def test_the_place_of_a_study_is_no_part_of_it(tmp_path: Path) -> None:
    members = run_study(study(), tmp_path / "here", train=StubTrainer())
    (tmp_path / "here").rename(tmp_path / "there")
    train = StubTrainer()
    assert run_study(study(), tmp_path / "there", train=train) == members and not train.asked


def test_failed_and_diverged_members_are_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The rest is trained. What failed is tried again, for its cause may be fixed; what diverged would
    diverge again.
    """
    train = StubTrainer(statuses={(1e-3, 1): "diverged"}, errors={(2e-3, 0): RuntimeError("no room")})
    members = {(member.arm, member.seed): member for member in run_study(study(), tmp_path, train=train)}
    assert keys(train.asked) == all_keys()
    failed = members["fast & loose", 0]
    diverged = members["slow", 1]
    assert (failed.status, failed.error, failed.result) == ("failed", "RuntimeError: no room", {})
    assert (diverged.status, diverged.result["bits_per_byte"], diverged.metric_value("bits_per_byte")) == (
        "diverged",
        "nan",
        None,
    )
    assert diverged.metric_value("tokens") is None
    assert "arm fast & loose, seed 0 failed" in caplog.text
    again = StubTrainer()
    repaired = run_study(study(), tmp_path, train=again)
    assert keys(again.asked) == [(2e-3, 0)] * 2
    assert [member.status for member in repaired].count("finished") == 8


def test_what_makes_no_study_is_refused() -> None:
    arms = study().arms
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"arms": (*arms, arms[0])}, "two have the same name"),
        ({"arms": (*arms, Arm(name="Fast, loose", experiment=experiment()))}, "or the same directory"),
        ({"seeds": ()}, "give at least one, and each only once"),
        ({"seeds": (1, 1)}, "give at least one, and each only once"),
        ({"baseline": "slwo"}, "Did you mean 'slow'"),
        ({"confidence": 95.0}, "such as 0.95"),
    ]
    for changes, message in wrong:
        with pytest.raises(ValueError, match=message):
            study(**changes)
    for name, message in (
        ("a" * 201, "is a name of 201 characters"),
        ("Findings.json", "may be the name of a file of the study"),
        ("../claims", "may be the name of a file of the study"),
        (" ", "give it a name that can be seen"),
        ("half \ud800", r"U[+]D800 in it cannot be printed: leave it out"),
        ("two\nlines", r"U[+]000A in it cannot be printed"),
    ):
        with pytest.raises(ValueError, match=message):
            Arm(name=name)
    with pytest.raises(ValueError, match="the study's question is .* cannot be printed"):
        study(question="Is \udfff better?")
    with pytest.raises(ValueError, match="tolerance is 2"):
        Budget(tolerance=2)
    with pytest.raises(ValueError, match="is not an arm of the study. Did you mean 'third'"):
        study().arm("thrid")


def test_names_without_latin_letters_have_directories_of_their_own() -> None:
    names = ("fast & loose", "β=0.9", "γ=0.9", "深い", "→", "é", "e\u0301")
    directories = [Arm(name=name, experiment=experiment()).directory for name in names]
    assert directories[0] == "fast-loose" and directories[1].startswith("0.9-")
    assert all(name.isascii() and len(name) >= 8 for name in directories)
    # The last two are one character, typed in two ways.
    assert len(set(directories)) == 6 and directories[-2] == directories[-1]


# Real training ----------------------------------------------------------------------------------------------
def trained(workplace: Path, directory: Path, **rates: float) -> tuple[Study, tuple[Member, ...]]:
    """Arms of these learning rates and two seeds, trained for six steps."""
    arms = tuple(
        Arm(name=name, experiment=one_layer(workplace, directory, steps=6, lr=lr, ema_decay=None))
        for name, lr in rates.items()
    )
    real = Study(name="rates", arms=arms, seeds=(3, 4), baseline=arms[0].name)
    members = run_study(real, directory, console=Console(file=io.StringIO()))
    assert [(member.arm, member.seed, member.status) for member in members] == [
        (arm, seed, "finished") for seed in (3, 4) for arm in rates
    ]
    return real, members


def checksums(member: Member) -> list[int]:
    return [
        record["data_checksum"]
        for record in read_log(Path(member.result["run_dir"]) / "log.jsonl", kind="train")
    ]


def test_an_arm_against_itself(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one seed both arms have the same batches, and so, to the last bit, the same figures: nothing is
    resolved.
    """
    monkeypatch.setattr(trainer, "write_page", lambda run: None)  # takes as long as the steps
    real, members = trained(workplace, tmp_path, one=1e-2, same=1e-2)
    for member in members:
        run = Path(member.result["run_dir"])
        kept = read_experiment(run)
        assert run.parent == tmp_path / member.arm / f"seed-{member.seed}"
        assert (kept.run.seed, kept.data.seed) == (member.seed, member.seed)
        assert config.fingerprint(member_experiment(real, member.arm, member.seed)) == member.fingerprint
        assert member.evaluation["bits_per_byte"] == member.result["bits_per_byte"] and math.isfinite(
            member.result["bits_per_byte"]
        )
    first, paired, other, _ = members
    assert len(checksums(first)) == 6 and checksums(first) == checksums(paired) != checksums(other)
    assert first.metric_value("loss") == paired.metric_value("loss") != other.metric_value("loss")
    findings = analyze(real, members)
    (comparison,) = findings.comparisons
    assert findings.is_matched and comparison.judgement is not None
    assert comparison.judgement.difference == 0
    assert comparison.verdict is Verdict.NOT_RESOLVED


@pytest.mark.nightly
def test_a_real_difference(workplace: Path, tmp_path: Path) -> None:
    real, members = trained(workplace, tmp_path, slow=1e-3, fast=1e-2)
    bits = [member.result["bits_per_byte"] for member in members]
    findings = analyze(real, members)
    judgement = findings.comparisons[0].judgement
    assert judgement is not None and judgement.difference == pytest.approx(
        (bits[1] - bits[0] + bits[3] - bits[2]) / 2
    )
    assert judgement.difference < -0.1 and findings.is_matched


@pytest.mark.nightly
@pytest.mark.composes("resume", "studies")
def test_a_real_study_that_is_stopped_goes_on(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the third step of the first member: the same call again comes to what it would have come to
    at once.
    """
    _, expected = trained(workplace, tmp_path / "whole", only=1e-2)
    step = trainer.Loop._step

    def stopped_step(loop: trainer.Loop, state: Any) -> Any:
        if loop.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(loop, state)

    with monkeypatch.context() as patched, pytest.raises(Interrupted, match="arm only, seed 3"):
        patched.setattr(trainer.Loop, "_step", stopped_step)
        trained(workplace, tmp_path / "stopped", only=1e-2)
    _, members = trained(workplace, tmp_path / "stopped", only=1e-2)
    assert len(list((tmp_path / "stopped" / "only" / "seed-3").iterdir())) == 1
    assert [member.metric_value("loss") for member in members] == [
        member.metric_value("loss") for member in expected
    ]
    assert [
        record["step"] for record in read_log(Path(members[0].result["run_dir"]) / "log.jsonl", kind="train")
    ] == [1, 2, 3, 4, 5, 6]
