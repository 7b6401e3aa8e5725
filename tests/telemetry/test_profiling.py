"""`--profile`: a trace of a run's steps that viewers can read."""

import io
import re
import signal
from pathlib import Path

import jax
import pytest
from rich.console import Console

import slmjax
from slmjax.runner import launch, trainer
from slmjax.telemetry.profiling import Profile
from slmjax.telemetry.run_directory import read_log
from slmjax.training.experiment import Experiment
from tests.one_layer import one_layer


@pytest.fixture
def experiment(workplace: Path, tmp_path: Path) -> Experiment:
    return one_layer(workplace, tmp_path, steps=6)


def profiled(experiment: Experiment, num_steps: int) -> tuple[slmjax.Result, str]:
    console = Console(file=io.StringIO(), width=300)
    result = slmjax.train(experiment, profile=num_steps, console=console)
    assert isinstance(console.file, io.StringIO)
    return result, console.file.getvalue()


def traced_steps(result: slmjax.Result, first: int) -> list[int]:
    """The step numbers that the trace shows, in the order of time."""
    directory = Path(result.run_dir) / "profile" / "plugins" / "profile" / f"from-step-{first}"
    (path,) = directory.glob("*.xplane.pb")
    assert (directory / "perfetto_trace.json.gz").stat().st_size > 0
    data = jax.profiler.ProfileData.from_file(str(path))
    events = [event for plane in data.planes for line in plane.lines for event in line.events]
    names = {event.name for event in events}
    assert "data" in names and any("train_step" in name for name in names), (
        "the work of the step is not in it"
    )
    steps = sorted((event for event in events if event.name == "train"), key=lambda event: event.start_ns)
    return [dict(event.stats)["step_num"] for event in steps]


def messages(result: slmjax.Result) -> list[str]:
    return [record["text"] for record in read_log(Path(result.run_dir) / "log.jsonl", kind="message")]


def test_the_steps_after_the_first_two_are_traced(experiment: Experiment) -> None:
    result, printed = profiled(experiment, 2)
    assert traced_steps(result, 3) == [3, 4]
    directory = Path(result.run_dir) / "profile"
    logged = messages(result)
    assert f"profile of steps 3 to 4 in {directory}" in logged
    assert f"compilation cache: {jax.config.jax_compilation_cache_dir}" in logged
    assert any(
        re.fullmatch(r"\d+ programs compiled, \d+ read from the compilation cache", text) for text in logged
    )
    assert f"xprof --port 8791 {directory}" in printed and "perfetto_trace.json.gz in Perfetto" in printed


def test_fewer_steps_than_requested_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def turns(num_steps: int, last_step: int) -> list[int]:
        profile = Profile(tmp_path, first_step=10, last_step=last_step, num_steps=num_steps)
        return [step for step in range(11, last_step + 1) if profile.turns_after(step)]

    assert turns(4, 16) == [12, 16] and not caplog.messages
    assert turns(9, 16) == [12, 16]
    assert turns(1, 12) == []
    expected = "profile: only {} of {} steps can be traced, the first 2 of a session are left out"
    assert caplog.messages == [expected.format(4, 9), expected.format(0, 1)]


def test_a_signal_ends_the_trace(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    step = trainer.Loop._step

    def interrupted(loop: trainer.Loop, state: object) -> object:
        if loop.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(loop, state)

    monkeypatch.setattr(trainer.Loop, "_step", interrupted)
    result, _ = profiled(experiment, 4)
    assert (result.status, result.step) == ("interrupted", 4)
    assert traced_steps(result, 3) == [3, 4]
    assert any(text.startswith("profile of steps 3 to 4 in ") for text in messages(result))


def test_a_trace_that_fails_leaves_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another trace is being taken, as of the program that this run is a part of."""
    with (
        jax.profiler.trace(tmp_path / "other"),
        Profile(tmp_path, first_step=0, last_step=9, num_steps=2) as profile,
    ):
        profile.turn()
        with profile.annotated(3):
            pass
        assert not profile.is_running
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(f"no profile in {tmp_path}: ")


def test_no_steps_are_refused_before_a_run_begins(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="profile is 0: give the number of steps to trace"):
        profiled(experiment, 0)
    assert not (tmp_path / "runs").exists()


def test_a_compilation_cache_that_is_off_is_reported() -> None:
    directory = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert launch.compilation_cache_note().startswith("compilation cache off: ")
    finally:
        jax.config.update("jax_compilation_cache_dir", directory)
