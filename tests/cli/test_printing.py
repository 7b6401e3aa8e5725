"""What commands print: readers that stop reading, and tables of any width."""

import os
import subprocess
import sys

import pytest

from slmjax.cli.options import CLOSED_PIPE_STATUS


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
