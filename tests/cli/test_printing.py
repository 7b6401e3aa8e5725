"""What commands print: readers that stop reading, and tables of any width."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.cells import cell_len

from slmjax.cli import main, training
from slmjax.cli.options import CLOSED_PIPE_STATUS
from slmjax.telemetry import columns
from slmjax.telemetry.columns import column_lines
from tests.written_run import add_session, write_run


@pytest.mark.parametrize("words", [["--help"], ["runs", "--help"], ["runs", "nowhere"]])
def test_a_reader_that_stops_ends_the_command_without_a_message(words, user_environment):
    """`slmjax ... | head`: the pipe has no reader any more. Both streams go into it."""
    unread, pipe = os.pipe()
    os.close(unread)
    command = [sys.executable, "-m", "slmjax", *words]
    if words == ["runs", "nowhere"]:  # an error, which is printed to a pipe that is closed
        done = subprocess.run(command, env=user_environment, stdout=subprocess.PIPE, stderr=pipe)
        assert (done.returncode, done.stdout) == (CLOSED_PIPE_STATUS, b"")
    else:
        done = subprocess.run(command, env=user_environment, stdout=pipe, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (CLOSED_PIPE_STATUS, b"")
    os.close(pipe)


def test_characters_that_the_output_lacks_are_escaped(user_environment, tmp_path):
    write_run(tmp_path / "käse", finished=False)
    command = [sys.executable, "-m", "slmjax", "runs", str(tmp_path)]
    environment = {**user_environment, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "k\\xe4se" in done.stdout, done.stderr


def test_the_end_of_a_training_names_an_earlier_step_that_was_better() -> None:
    result = SimpleNamespace(step=200, loss=4.254, measured_on="held-out text", best_step=150)
    result.best_loss = 4.361
    result.best_measured_on = "part of the held-out text"
    result.part_loss = 4.402
    note = training.best_note(result)
    assert "lower at step 150: loss 4.3610 on part of the held-out text, instead of 4.4020 now" in note
    result.best_measured_on = "held-out text"
    result.part_loss = None
    assert "on held-out text, instead of 4.2540 now" in training.best_note(result)


# Tables -----------------------------------------------------------------------------------------------------
HEAD = ("name", "a", "b", "c", "d", "e", "f")


def table(*, longest: int) -> list[tuple[str, ...]]:
    """Nine rows whose cells have ten characters but for one cell of the last row."""
    rows = [(f"row {index}", *[f"{index}" * 10] * 6) for index in range(8)]
    return [*rows, ("row 8", "8" * longest, *["8"] * 5)]


@pytest.mark.parametrize("longest", [10, 40, 200])
@pytest.mark.parametrize("width", [None, 200, 100, 80, 60, 40, 20])
def test_no_cell_is_cut_at_any_width(width: int | None, longest: int) -> None:
    rows = table(longest=longest)
    lines = column_lines(HEAD, rows, right=range(1, 7), width=width)
    text = "\n".join(lines)
    # Every cell is there, in order, and in one line.
    position = 0
    for cell in (cell for row in rows for cell in row):
        position = text.index(cell, position) + len(cell)
    # Only a single cell may be longer than a line.
    assert width is None or all(cell_len(line) <= width or "8" * longest in line for line in lines)
    assert width is not None or len(lines) == 10


def test_the_forms_of_a_table() -> None:
    head = ("run", "loss", "state")
    rows = [("first", "1.25", "finished"), ("second one", "10.5", "interrupted")]
    assert column_lines(head, rows, right=(1,), width=29) == [
        "run         loss  state",
        "first       1.25  finished",
        "second one  10.5  interrupted",
    ]
    assert column_lines(head, rows, right=(1,), width=20) == [
        "run",
        "  loss  state",
        "first",
        "  1.25  finished",
        "second one",
        "  10.5  interrupted",
    ]
    assert column_lines(head, rows, right=(1,), width=10)[:3] == [
        "first",
        "  loss: 1.25",
        "  state: finished",
    ]
    # A few long rows do not change the form of the others.
    rows = [("a", "1", "2"), ("b", "3", "4"), ("c", "x" * 30, "")]
    lines = column_lines(("", "A", "B"), rows, width=20)
    assert lines == ["   A  B", "a  1  2", "b  3  4", "c", "  A: " + "x" * 30]


def test_text_of_files_cannot_write_to_the_terminal() -> None:
    [_, line] = column_lines(("name",), [("a\x1b[2J\n\udc80ü漢",)])
    assert line == "a\\x1b[2J\\n\\udc80ü漢"


def test_runs_and_compare_at_80_columns_and_in_a_pipe(tmp_path, capsys, monkeypatch):
    names = [f"nano-20261201-0810{number}-1a2b3{number}" for number in (48, 49, 50)]
    for name in names:
        write_run(tmp_path / name, finished=False)
    add_session(
        tmp_path / names[0], number=2, first_step=31, last_step=40, changes={"optim.lr": [3e-4, 1e-3]}
    )
    shown = {}
    for width in (None, 80):
        monkeypatch.setattr(columns, "output_width", lambda width=width: width)
        for command in (["runs", str(tmp_path)], ["compare", *(str(tmp_path / name) for name in names)]):
            with pytest.raises(SystemExit) as stopped:
                main([*command, *(["--output", str(tmp_path / "page.html")] if len(command) > 2 else [])])
            assert not stopped.value.code
            shown[command[0], width] = capsys.readouterr().out
    assert not any("…" in text or "..." in text for text in shown.values())
    # One line for each run in a pipe, with its complete name and its state; two on a narrow terminal.
    for name in names:
        [line] = [line for line in shown["runs", None].splitlines() if line.startswith(name)]
        assert line.split()[1:3] == ["unfinished*" if name == names[0] else "unfinished", "40/40"]
        assert name in shown["runs", 80].splitlines()
    table = shown["runs", 80].split("\n\n")[0].splitlines()
    assert all(len(line) <= 80 for line in table)
    mark = f"* {names[0]}: a resumed session changed settings: optim.lr 0.0003, from step 31: 0.001"
    assert mark in shown["runs", None].splitlines()
    [line] = [line for line in shown["compare", None].splitlines() if line.startswith("optim.lr")]
    assert line.split()[1:] == ["0.0003,", "from", "step", "31:", "0.001", "0.001", "0.001"]
    assert "  081048: 0.0003, from step 31: 0.001" in shown["compare", 80].splitlines()
