"""Peak memory of a part of a process, and of devices that know theirs."""

import resource
import sys
from pathlib import Path

import pytest

from slmjax.telemetry import peak_memory
from slmjax.telemetry.peak_memory import PeakMemory, peak_bytes


class Device:
    """A device that knows its peak."""

    def __init__(self, peak: int) -> None:
        self.peak = peak

    def memory_stats(self) -> dict[str, int]:
        return {"peak_bytes_in_use": self.peak}


def test_the_peak_of_a_part_of_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t    3000 kB\nVmRSS:\t     20 kB\n")
    monkeypatch.setattr(peak_memory, "_STATUS", status)
    # Where the peak cannot be reset, an earlier part may hide that of a later one.
    monkeypatch.setattr(peak_memory, "_RESET", tmp_path / "missing" / "file")
    hidden = PeakMemory([])
    assert hidden.bytes_so_far() is None
    status.write_text("VmHWM:\t    4000 kB\n")
    assert hidden.bytes_so_far() == 4000 * 1024
    monkeypatch.setattr(peak_memory, "_RESET", tmp_path / "clear_refs")
    assert PeakMemory([]).bytes_so_far() == 4000 * 1024
    assert (tmp_path / "clear_refs").read_text() == "5"


def test_the_peak_is_that_of_the_process() -> None:
    unit = 1 if sys.platform == "darwin" else 1024
    # The system's own figure keeps a peak that was reset.
    assert 2**24 < peak_bytes([]) <= unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + 2**24


def test_the_device_that_used_most_counts() -> None:
    devices = [Device(5), Device(7)]
    peak = PeakMemory(devices)
    assert peak.bytes_so_far() is None
    devices[0].peak = 9
    assert peak.bytes_so_far() == 9
