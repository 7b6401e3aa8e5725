"""Processes that differ, or of which one fails, end together, with a message that names what differs."""

import socket
import subprocess
import sys

from slmjax.parallel.agreement import disagreement

SCRIPT = """
import sys, jax
from slmjax.parallel.agreement import in_all_processes, require_same
rank, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize("127.0.0.1:" + port, num_processes=2, process_id=rank)
require_same({"a": {"b": 1}}, remedy="Nothing to do")
assert in_all_processes(lambda: rank, activity="counting") == rank
for action in (
    lambda: require_same({"a": {"b": rank, "c": [0, "x" * rank]}, "d": 1}, remedy="Use one command"),
    lambda: in_all_processes(lambda: 1 // (1 - rank), activity="dividing"),
    lambda: in_all_processes(lambda: rank or sys.exit(3), activity="reading"),
):
    try:
        action()
    except (Exception, SystemExit) as error:
        print(type(error).__name__, error)
"""


def test_two_processes_end_together_where_they_differ_or_one_fails() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, rank, port], stdout=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    first, second = (
        [line for line in process.communicate(timeout=100)[0].splitlines()] for process in processes
    )
    differ = (
        "Disagreement the processes of this run differ: a.b is 0 (process 0), 1 (process 1); "
        'a.c[1] is "" (process 0), "x" (process 1). Use one command'
    )
    assert [line for line in first if "Gloo" not in line] == [
        differ,
        "ValueError dividing failed in another process: process 1: integer division or modulo by zero",
        "SystemExit 3",
    ]
    assert [line for line in second if "Gloo" not in line] == [
        differ,
        "ZeroDivisionError integer division or modulo by zero",
        "ValueError reading failed in another process: process 0: its output says why",
    ]


def test_each_value_is_named_with_its_processes() -> None:
    values = [{"lr": 0.1, "n": 1}, {"lr": 0.2, "n": 1}, {"lr": 0.1, "n": 1}, {"lr": 0.2}]
    assert disagreement(values) == (
        "lr is 0.1 (processes 0, 2), 0.2 (processes 1, 3); n is 1 (processes 0, 1, 2), null (process 3)"
    )
    assert disagreement(values[::2]) == ""
    many = [dict.fromkeys("abcdefg", 0), dict.fromkeys("abcdefg", 1)]
    assert disagreement(many).endswith("; e is 0 (process 0), 1 (process 1); and 2 more")
