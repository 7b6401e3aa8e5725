"""Study files, what a study fixes before its first run, and what its directory keeps of later changes."""

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from slmjax.studies import (
    Arm,
    Dimension,
    Match,
    OnChange,
    Quantity,
    Study,
    StudyDirectory,
    load_studies,
    load_study,
    run_study,
)
from slmjax.studies.ablation import Ablation, fix_studies, open_ablation
from slmjax.studies.study_directory import copy_study, with_num_seeds
from tests.studies.stub import StubTrainer, experiment, study

HEAD = "from tests.studies.stub import experiment, study as pace\n\n\n"


def study_file(directory: Path, body: str, name: str = "pace.py") -> Path:
    path = directory / name
    path.write_text(f"{HEAD}{body}")
    return path


def changed(study: Study, arm: int, lr: float) -> Study:
    arms = list(study.arms)
    arms[arm] = dataclasses.replace(arms[arm], experiment=experiment(lr))
    return dataclasses.replace(study, arms=tuple(arms))


# Files ------------------------------------------------------------------------------------------------------
def test_a_file_is_loaded_with_the_modules_of_its_folder_and_copied(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "rates.py").write_text("SEEDS = {'small': (0,), 'large': (0, 1, 2)}\n")
    file = study_file(
        tmp_path / "folder", "import rates\n\n\ndef study(size):\n    return pace(rates.SEEDS[size])\n"
    )
    assert load_study(file).seeds == (0,) and load_study(file, size="large").seeds == (0, 1, 2)
    copy_study(file, tmp_path / "out")
    assert load_study(tmp_path / "out").seeds == (0,)
    assert (tmp_path / "out" / "experiment_modules" / "rates.py").is_file()
    # Another version is copied, and the former one stays; the copy itself is not copied.
    former = file.read_text()
    file.write_text(f"{former}\n# changed\n")
    for _ in range(2):
        copy_study(file, tmp_path / "out")
        copy_study(tmp_path / "out" / "study.py", tmp_path / "out")
    assert (tmp_path / "out" / "study-1.py").read_text() == former
    assert not (tmp_path / "out" / "study-2.py").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "needs a function `def study\\(\\) -> Study` that returns the study, and has none"),
        ("def study():\n    pace()\n", "returned None \\(is a `return` missing\\?\\), not a Study"),
        ("def study():\n    return pace(), 3\n", "returned an int, not a Study"),
        ("def study():\n    return ()\n", "returned no study"),
        ("def study():\n    return pace(seeds=())\n", "pace.py, line 5: ValueError: seeds are"),
        ("def study():\n    return pace(), pace(seeds=(7,))\n", "two studies named 'pace'"),
        (
            "def study():\n    return pace(earlier=(pace(),))\n",
            "studies pace, pace: two have the same name",
        ),
        (
            "def study():\n    return pace(base=experiment(), arms=grid({'optim.rl': (1e-3, 2e-3)}), "
            "baseline='rl 0.001')\n\n\nfrom slmjax.studies import grid\n",
            "arm 'rl 0.001': there is no field optim.rl. Did you mean",
        ),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_studies(study_file(tmp_path, body))


def test_several_studies_run_in_the_order_in_which_they_build_on_each_other(tmp_path: Path) -> None:
    file = study_file(
        tmp_path,
        "def study():\n    first = pace(name='first')\n"
        "    return pace(name='last', earlier=(first,)), pace(name='alone')\n",
    )
    assert [each.name for each in load_studies(file)] == ["first", "last", "alone"]
    with pytest.raises(ValueError, match="has 2 studies .*: use load_studies"):
        load_study(file)
    plain = study_file(tmp_path, "def study():\n    return pace()\n", name="plain.py")
    with pytest.raises(ValueError, match="takes no size, so there is no large one: leave out --budget large"):
        load_study(plain, size="large")
    with pytest.raises(ValueError, match="the size of a study is small or large, not 'huge'"):
        load_study(file, size="huge")


def test_the_number_of_seeds(tmp_path: Path) -> None:
    teacher = study((7,), name="teacher")
    asked = (teacher, study((0, 2, 5), earlier=(teacher,)))
    assert [each.seeds for each in with_num_seeds(asked, 2)] == [(7,), (0, 2)]
    more = with_num_seeds(asked, 5)
    assert more[1].seeds == (0, 2, 5, 1, 3) and more[1].earlier[0].seeds == (7,)
    with pytest.raises(ValueError, match="the number of seeds is 0"):
        with_num_seeds(asked, 0)


# What is fixed ----------------------------------------------------------------------------------------------
def test_a_study_is_fixed_once_and_changes_are_recorded(tmp_path: Path) -> None:
    directory = StudyDirectory.create(tmp_path, study())
    plan = (tmp_path / "plan.json").read_text()
    assert directory.plan["arms"]["slow"]["experiment"]["optim"]["lr"] == 1e-3
    assert list(directory.plan["arms"]["third"]["fingerprints"]) == ["0", "1", "2"]
    # The same study again is no change.
    assert StudyDirectory.create(tmp_path, study()).changes_since_lock() == ()
    run_study(study((0,)), tmp_path, train=StubTrainer())
    wider = dataclasses.replace(study((0, 1, 2, 3)), equal_within=0.01)
    wider = dataclasses.replace(wider, arms=(*wider.arms, Arm(name="late", experiment=experiment(5e-3))))
    for _ in range(2):
        (change,) = StudyDirectory.create(tmp_path, wider).changes_since_lock()
        assert change.members_ended == 3 and change.what == (
            "equal_within was null, now 0.01",
            "seeds was [0, 1, 2], now [0, 1, 2, 3]",
            "arm late: added",
        )
    assert change.text.startswith(f"changed on {change.time[:10]}, after 3 members had ended: equal_within")
    assert (tmp_path / "plan.json").read_text() == plan
    # The other way is a change of its own.
    first, second = StudyDirectory.create(tmp_path, study()).changes_since_lock()
    assert first == change and second.what[-1] == "arm late: removed"


def test_a_changed_arm_with_members_is_refused_unless_it_is_trained_again(tmp_path: Path) -> None:
    StudyDirectory.create(tmp_path, study())
    run_study(study((0,)), tmp_path, train=StubTrainer())
    before = (tmp_path / "members.jsonl").read_text()
    faster = changed(study(), 1, 4e-3)
    with pytest.raises(
        ValueError,
        match=r"members of fast & loose were trained with another experiment than the study has now \(arm "
        r"fast & loose: experiment.optim.lr was 0.002, now 0.004\). Undo the change, .*--redo",
    ):
        StudyDirectory.create(tmp_path, faster)
    directory = StudyDirectory.open(tmp_path)
    assert directory.changes_since_lock() == () and directory.on_change is OnChange.REFUSE
    directory = StudyDirectory.create(tmp_path, faster, on_change=OnChange.REDO)
    assert [change.members_ended for change in directory.changes_since_lock()] == [3]
    # An interrupted study need not be told again.
    directory = StudyDirectory.create(tmp_path, faster)
    train = StubTrainer()
    run_study(faster, tmp_path, train=train, on_change=directory.on_change)
    assert [one.optim.lr for one in train.asked if one.run.seed == 0] == [4e-3]
    assert (tmp_path / "members.jsonl").read_text().startswith(before)
    assert len(list((tmp_path / "fast-loose" / "seed-0").glob("stub*"))) == 2


def test_an_arm_that_has_no_members_yet_may_change(tmp_path: Path) -> None:
    StudyDirectory.create(tmp_path, study())
    (change,) = StudyDirectory.create(tmp_path, changed(study(), 0, 3e-3)).changes_since_lock()
    assert change.what == ("arm slow: experiment.optim.lr was 0.001, now 0.003",)


def test_a_directory_of_another_study_is_refused(tmp_path: Path) -> None:
    StudyDirectory.create(tmp_path, study())
    with pytest.raises(ValueError, match="is the directory of the study 'pace', not of 'race'"):
        StudyDirectory.create(tmp_path, study(name="race"))
    with pytest.raises(ValueError, match="is not the directory of a study: it has no plan.json"):
        StudyDirectory.open(tmp_path / "nowhere")
    (tmp_path / "plan.json").write_text('{"study": "pace"')
    with pytest.raises(ValueError, match="plan.json is not JSON .*: restore the file from a copy"):
        StudyDirectory.create(tmp_path, study())


def test_what_an_arm_builds_on_is_a_part_of_it(tmp_path: Path) -> None:
    def continued(seed: int, run: Path) -> Any:
        base = experiment(2e-3)
        return dataclasses.replace(base, run=dataclasses.replace(base.run, group=str(run)))

    def asked(lr: float) -> Study:
        arms = (
            Arm(name="base", experiment=experiment(lr)),
            Arm(name="on", after="base", experiment=continued),
        )
        return Study(name="s", arms=arms, seeds=(0,), baseline="base")

    directory = StudyDirectory.create(tmp_path, asked(1e-3))
    assert directory.plan["arms"]["on"]["after"] == "base"
    (change,) = StudyDirectory.create(tmp_path, asked(3e-3)).changes_since_lock()
    assert change.what == (
        "arm base: experiment.optim.lr was 0.001, now 0.003",
        "arm on: what it builds on",
    )


def test_choices_of_matched_arms_hold_for_a_study_that_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times of steps differ from one measurement to the next: other arms would follow from each."""
    match = Match(quantity=Quantity.SECONDS, by=Dimension.STEPS)
    asked = study(matched=(match,))
    seconds = {1e-3: 1.0, 2e-3: 0.5}
    monkeypatch.setattr("slmjax.studies.ablation._plan_before", lambda study, ledger: None)
    monkeypatch.setattr("slmjax.studies.matching.step_seconds", lambda one: seconds[one.optim.lr])
    ablation = Ablation(
        file=study_file(tmp_path, ""), size="small", studies=(asked,), directory=tmp_path / "s"
    )
    ((study_1, directory),) = fix_studies(ablation)
    steps = [study_1.experiment(arm.name, 0).run.steps for arm in study_1.arms]
    assert steps == [10, 20, 20] and [one["dimension"] for one in directory.plan["matched"]] == ["steps"] * 2
    seconds[2e-3] = 0.1
    ((study_2, directory),) = fix_studies(dataclasses.replace(ablation, studies=with_num_seeds((asked,), 4)))
    assert [study_2.experiment(arm.name, 3).run.steps for arm in study_2.arms] == steps
    assert [change.what for change in directory.changes_since_lock()] == [
        ("seeds was [0, 1, 2], now [0, 1, 2, 3]",)
    ]


# Opening ----------------------------------------------------------------------------------------------------
def test_where_results_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slmjax.studies.ablation._plan_before", lambda study, ledger: None)
    file = study_file(tmp_path, "def study(size):\n    return pace()\n", name="deep_or_wide.py")
    small, large = (open_ablation(file, size=size) for size in ("small", "large"))
    assert small.directory == Path("runs/studies/deep-or-wide") == small.directory_of(small.studies[0])
    assert large.directory == Path("runs/studies/deep-or-wide-large")
    fix_studies(large)
    resumed = open_ablation(large.directory)
    assert (resumed.size, resumed.directory, resumed.file) == (
        "large",
        large.directory,
        large.directory / "study.py",
    )
    with pytest.raises(ValueError, match="was begun with --budget large: leave out --budget small"):
        open_ablation(large.directory, size="small")
    with pytest.raises(ValueError, match="is the directory of a study already: leave out --directory x"):
        open_ablation(large.directory, directory="x")
    assert json.loads((large.directory / "plan.json").read_text())["size"] == "large"


def test_a_directory_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as Cloud Storage: one process alone runs the study there."""

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    StudyDirectory.create(tmp_path, study())
    assert len(run_study(study(), tmp_path, train=StubTrainer())) == 9
    # The plan is not written again.
    StudyDirectory.create(tmp_path, study(seeds=(0, 1)))
    assert StudyDirectory.open(tmp_path).plan["settings"]["seeds"] == [0, 1, 2]
