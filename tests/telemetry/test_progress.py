"""slmjax.telemetry.progress: plain lines in a pipe, a bar on a terminal, silence on other processes."""

import dataclasses
import io
import math

import pytest
from rich.console import Console

from slmjax.telemetry.meter import Throughput
from slmjax.telemetry.progress import Progress, format_seconds


def make_console(*, is_terminal: bool, width: int = 140) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=is_terminal, width=width), stream


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


METRICS = {
    "loss": 3.25,
    "learning_rate": 0.001,
    "grad_norm": 0.8123,
    "metrics": Throughput(bits_per_byte=4.5, tokens_per_second=12345.6, mfu=0.412, data_wait_share=0.03),
}


def test_plain_lines() -> None:
    (console, stream) = make_console(is_terminal=False)
    clock = FakeClock()
    with Progress(num_steps=200, console=console, clock=clock) as progress:
        clock.now = 60  # compilation is not part of the pace
        progress.update(1, **METRICS)
        progress.advance(2)
        clock.now = 70
        progress.update(11, **METRICS)
        progress.print("saved [bold] step 11 " + "x" * 200)
        progress.update(200, **METRICS)
    metrics = "loss 3.2500  4.500 bits/byte  lr 1.00e-03  grad norm 0.812  12,346 tokens/s  MFU 41%"
    assert stream.getvalue().splitlines() == [
        f"step   1/200  {metrics}  data wait 3%",
        f"step  11/200  {metrics}  data wait 3%  3m09s left",
        "saved [bold] step 11 " + "x" * 200,
        f"step 200/200  {metrics}  data wait 3%  0s left",
    ]


def test_the_first_step_of_a_session_shows_no_pace() -> None:
    console, stream = make_console(is_terminal=False)
    with Progress(num_steps=20, console=console) as progress:
        progress.update(
            1,
            loss=3.25,
            metrics=Throughput(
                bits_per_byte=4.5, tokens_per_second=math.nan, mfu=math.nan, data_wait_share=0.0
            ),
        )
    assert stream.getvalue() == "step  1/20  loss 3.2500  4.500 bits/byte\n"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    console, stream = make_console(is_terminal=True)
    with Progress(num_steps=20, console=console) as progress:
        progress.update(10, **METRICS)
        progress.print("saved [bold] step 10")
    shown = stream.getvalue()
    assert "10/20" in shown and "loss 3.2500" in shown and "12,346 tokens/s" in shown
    assert "saved [bold] step 10" in shown
    assert shown.count("step 10/20") == 0, "no plain lines next to the bar"


def test_distillation_shows_its_divergence_and_the_time_left_stands_last() -> None:
    console, stream = make_console(is_terminal=False)
    clock = FakeClock()
    with Progress(num_steps=4, console=console, clock=clock) as progress:
        progress.update(1, **METRICS, divergence=0.25)
        clock.now = 2.0
        progress.update(2, **METRICS, divergence=0.125)
    first, second = stream.getvalue().splitlines()
    assert first.endswith("12,346 tokens/s  divergence 0.2500  MFU 41%  data wait 3%")
    assert second.endswith("12,346 tokens/s  divergence 0.1250  MFU 41%  data wait 3%  4s left")


def test_a_narrow_terminal_keeps_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    console, stream = make_console(is_terminal=True, width=80)
    with Progress(num_steps=20, console=console) as progress:
        progress.update(5, **METRICS)
        progress.update(10, **METRICS)
    shown = stream.getvalue()
    assert "loss 3.2500" in shown and "left" in shown and "tokens/s" not in shown and "\u2026" not in shown


def test_an_unknown_peak_is_left_out() -> None:
    console, stream = make_console(is_terminal=False)
    with Progress(num_steps=20, console=console) as progress:
        progress.update(10, loss=3.0, metrics=dataclasses.replace(METRICS["metrics"], mfu=None))
    assert "MFU" not in stream.getvalue() and "data wait 3%" in stream.getvalue()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_other_processes_are_silent(is_terminal: bool) -> None:
    console, stream = make_console(is_terminal=is_terminal)
    with Progress(num_steps=20, process_index=1, console=console) as progress:
        progress.advance(1)
        progress.update(2, **METRICS)
        progress.print("saved")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (3600, "1h00m"),
        (7659, "2h07m"),
        (86400 * 3 + 3600 * 4, "3d04h"),
        (-1, "0s"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


class ClosedPipe(io.StringIO):
    """A stream whose reader ends after the first line."""

    def __init__(self, error: type[OSError]) -> None:
        super().__init__()
        self.error = error

    def flush(self) -> None:
        if self.getvalue().count("\n") > 1:
            raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError, OSError])
def test_a_run_goes_on_where_its_output_cannot_be_written(
    error: type[OSError], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.dup2", lambda *_: None)  # rich replaces standard output
    stream = ClosedPipe(error)
    with Progress(num_steps=3, console=Console(file=stream)) as progress:
        for step in (1, 2, 3):
            progress.update(step, **METRICS)
    warned = [record.message for record in caplog.records if "nobody reads the output" in record.message]
    assert len(warned) == (1 if error is BrokenPipeError else 0)
    assert stream.getvalue().startswith("step 1/3")
