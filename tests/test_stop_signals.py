"""slmjax.stop_signals: a signal ends a command soon and with one line, whatever it is doing.

Each case is a process of its own, which gets its signals at a line that it prints.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slmjax.parallel.processes import SharedSignals
from slmjax.stop_signals import Stopped, StopSignals

BEGIN = """
import hashlib
import sys
from slmjax import stop_signals
from slmjax.stop_signals import StopSignals, Stopped
stop_signals.GRACE_SECONDS = 0.3
"""


def outcome(tmp_path: Path, program: str, *signals: signal.Signals) -> tuple[int, str, str]:
    """Run a program; send a signal for each line that it prints. Return status, output and errors."""
    (tmp_path / "program.py").write_text(BEGIN + program)
    process = subprocess.Popen(
        [sys.executable, "-u", str(tmp_path / "program.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).resolve().parent.parent}"},
    )
    assert process.stdout is not None
    lines = []
    for number in signals:
        lines.append(process.stdout.readline())
        process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    return process.returncode, "".join(lines) + output, errors


def test_a_command_in_the_background_of_a_script_hears_sigint_too() -> None:
    """Its shell has set the signal to be ignored, and so it is again afterwards."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals(), pytest.raises(Stopped, match="stopped by SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# The main thread is in one call of C for longer than any test, as in a compilation.
STUCK = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_command_that_hears_nothing_ends_with_one_line(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    program = f"""
try:
    with StopSignals(is_command=True) as signals:
        signals.note = "nothing is lost"
        print("ready")
        {STUCK}
except Stopped as stopped:  # the signal came just before the call
    print(stopped, file=sys.stderr)
    sys.exit(stopped.status)
"""
    expected = f"stopped by {number.name}: nothing is lost\n"
    assert outcome(tmp_path, program, number) == (status, "ready\n", expected)


def test_temporary_files_are_deleted_where_there_is_time(tmp_path: Path) -> None:
    program = """
import time
with StopSignals(is_command=True):
    try:
        print("ready")
        time.sleep(60)
    except Stopped as stopped:
        print("cleaned", stopped.status)
        raise SystemExit(stopped.status)
"""
    assert outcome(tmp_path, program, signal.SIGTERM) == (143, "ready\ncleaned 143\n", "")


def test_a_signal_during_an_import_ends_with_one_line(tmp_path: Path) -> None:
    """Even one that answers an interruption with an error of its own, as modules in C do."""
    (tmp_path / "slow.py").write_text(
        "import time\ntry:\n    print('importing')\n    time.sleep(60)\n"
        "except BaseException as error:\n    raise ImportError('half imported') from error\n"
    )
    program = "with StopSignals(is_command=True):\n    import slow\n"
    result = outcome(tmp_path, program, signal.SIGINT)
    assert result == (130, "importing\n", "stopped by SIGINT\n")


def test_a_deferred_signal_is_noted_and_a_second_one_ends_at_once(tmp_path: Path) -> None:
    program = f"""
import time
with StopSignals(is_command=True) as signals:
    signals.defer()
    print("ready")
    while not signals.requested():
        time.sleep(0.01)
    print("saving after", signals.requested().name)
    {STUCK}
"""
    status, output, errors = outcome(tmp_path, program, signal.SIGTERM, signal.SIGINT)
    assert (status, output) == (130, "ready\nsaving after SIGTERM\n")
    assert errors == "stopped by SIGINT: the second signal ends at once, saved checkpoints are kept\n"


def test_a_program_that_trains_is_not_ended_but_interrupted() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM"), StopSignals() as signals:
        assert StopSignals().__enter__() is signals
        signals.defer()
        signal.raise_signal(signal.SIGTERM)
        assert signals.requested() is signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is handler
    with pytest.raises(Stopped, match="^stopped by SIGINT$"), StopSignals():
        signal.raise_signal(signal.SIGINT)


def test_work_that_may_be_left_out_is_interrupted() -> None:
    with StopSignals() as signals:
        signals.defer()
        with pytest.raises(Stopped), signals.interruptible():
            signal.raise_signal(signal.SIGINT)
        assert signals.received and signals.requested() is signal.SIGINT


def test_a_signal_in_a_callback_of_the_garbage_collector_is_not_lost(tmp_path: Path) -> None:
    """Python drops what is raised there, and prints it as an error of the callback."""
    program = """
import gc
import time
stop_signals.GRACE_SECONDS = 30
def callback(phase, info):
    if phase == "start":
        print("collecting")
        time.sleep(60)
gc.disable()
gc.callbacks.append(callback)
try:
    with StopSignals(is_command=True):
        gc.collect()
        gc.callbacks.clear()
        time.sleep(60)
except Stopped as stopped:
    print(stopped)
    sys.exit(stopped.status)
"""
    assert outcome(tmp_path, program, signal.SIGTERM) == (
        143,
        "collecting\nstopped by SIGTERM\n",
        "",
    )


def test_a_signal_while_the_interpreter_ends_does_not_change_the_status(tmp_path: Path) -> None:
    program = f"""
import atexit
@atexit.register
def clean():
    print("cleaning")
    {STUCK}
with StopSignals(is_command=True) as signals:
    signals.exit_with(75)
    sys.exit(75)
"""
    assert outcome(tmp_path, program, signal.SIGINT) == (75, "cleaning\n", "")


class Store:
    """The key-value store of a coordination service, in one process."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str) -> None:
        if key in self.values:
            raise RuntimeError("ALREADY_EXISTS")
        self.values[key] = value

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in list(self.values.items()) if key.startswith(prefix)]


def test_processes_of_different_pace_stop_at_the_same_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of them, of which one is told; none is more than three points ahead, as in training."""
    monkeypatch.setattr(SharedSignals, "POLL_SECONDS", 0.03)
    monkeypatch.setattr(SharedSignals, "_num_created", 0)
    store = Store()
    shared = []
    for index in range(3):
        shared.append(SharedSignals(store, index=index, count=3, signals=StopSignals()))
        SharedSignals._num_created = 0  # as in processes of their own
    points = [0, 0, 0]
    stopped: list[signal.Signals | None] = [None, None, None]

    def train(index: int) -> None:
        while stopped[index] is None:
            time.sleep(0.001 * (index + 1))
            # A collective lets nobody get far ahead.
            while points[index] > min(points) + 3:
                time.sleep(0.001)
            stopped[index] = shared[index].agreed()
            points[index] += 1

    threads = [threading.Thread(target=train, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    shared[1].request_stop(signal.SIGINT)
    for thread in threads:
        thread.join(timeout=30)
    assert stopped == [signal.SIGINT] * 3 and len(set(points)) == 1 and points[0] > 1
    for one in shared:
        # The answer stays, for the points after it.
        assert one.agreed() is signal.SIGINT
        one.close()


class Deaf(StopSignals):
    """Signals of a process that keeps running when it is told to end."""

    def told_to_end(self, number: signal.Signals) -> None:
        pass


def test_the_others_hear_of_a_signal_before_a_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an error of a collective with it is known to be the end of the run, and why."""
    monkeypatch.setattr(SharedSignals, "POLL_SECONDS", 0.1)
    store = Store()
    pair = []
    for index in range(2):
        monkeypatch.setattr(SharedSignals, "_num_created", 0)
        pair.append(SharedSignals(store, index=index, count=2, signals=Deaf()))
    closed = RuntimeError("INTERNAL: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]")
    assert pair[0].loss(ValueError("broken pipe")) is None and pair[0].loss(RuntimeError("NaN")) is None
    pair[1].request_end(signal.SIGTERM)
    pair[1].leave()
    assert {"slmjax/signals/1/heard/0", "slmjax/signals/1/gone/1"} <= set(store.values)
    stopped = pair[0].loss(closed)
    assert stopped is not None
    assert (str(stopped), stopped.status) == ("another process was stopped by SIGTERM", 143)
    for shared in pair:
        shared.close()
    store.values.clear()
    stopped = pair[0].loss(closed)
    assert stopped is not None and stopped.status == 1 and "\n" not in str(stopped)
