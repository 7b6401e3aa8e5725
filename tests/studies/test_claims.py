"""Claims: one holder at a time, leases by the observer's own clock, and holders that have lost theirs."""

import errno
import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from slmjax.ownership import owned_by, require_ownership
from slmjax.studies import claims as claims_module
from slmjax.studies.claims import Claim, ClaimLost, Claims, Lease, create_once, locked, recorded_members

MEMBER = "wide/seed-0"
FIELDS = {"arm": "wide", "seed": 0}


class Clock:
    """A clock that stands until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def process(directory: Path, clock: Clock | None = None, **settings: Any) -> Claims:
    """The claims of another process, whose heartbeat does not run by itself."""
    settings = {"clock": clock} | settings if clock is not None else settings
    return Claims(directory, lease=Lease(seconds=30, heartbeat=10), **settings)


def take(claims: Claims) -> Claim:
    claim = claims.take(claims.look(MEMBER))
    assert claim is not None
    return claim


def test_a_claim_is_recorded_once(tmp_path: Path) -> None:
    first = process(tmp_path)
    second = process(tmp_path)
    free = second.look(MEMBER)
    assert (free.token, free.is_claimed, free.record) == (0, False, None)
    claim = take(first)
    assert (claim.token, claim.fence) == (1, 0)
    assert second.look(MEMBER).is_claimed and not second.look(MEMBER).is_expired
    assert second.take(free) is None  # it was free when it was looked at
    claim.require(now=True)
    claim.record(FIELDS)
    state = second.look(MEMBER)
    assert (state.token, state.is_claimed, state.record, state.recorded) == (2, False, FIELDS, 2)
    assert recorded_members(tmp_path) == [(tmp_path / "claims" / MEMBER / "2.json", FIELDS)]


def test_a_released_claim_is_free_at_once(tmp_path: Path) -> None:
    first = process(tmp_path)
    second = process(tmp_path)
    take(first).release()
    claim = take(second)
    assert (claim.token, claim.fence) == (3, 0)
    with first:
        take_again = first.take(second.look("narrow/seed-0"))
        assert take_again is not None
    assert not second.look("narrow/seed-0").is_claimed  # released at the end of the context


def test_a_claim_without_signs_of_life_expires(tmp_path: Path) -> None:
    """By the clock of the observer, from the moment at which it first saw the counter as it is."""
    clock = Clock()
    holder = process(tmp_path)
    observer = process(tmp_path, clock)
    claim = take(holder)
    assert observer.look(MEMBER).is_claimed
    clock.now += 29
    assert observer.look(MEMBER).is_claimed and not observer.look(MEMBER).is_alive
    claim.beat()
    clock.now += 29
    assert observer.look(MEMBER).is_alive
    clock.now += 29
    assert observer.look(MEMBER).is_alive
    clock.now += 2
    state = observer.look(MEMBER)
    assert state.is_expired and not state.is_claimed and not state.is_alive
    assert process(tmp_path, clock).look(MEMBER).is_claimed  # another observer has seen nothing yet
    taken = observer.take(state)
    assert taken is not None and (taken.token, taken.fence) == (2, 2)
    # The fence stays when a claim is released.
    taken.release()
    assert take(observer).fence == 2


def test_what_lost_its_claim_records_nothing(tmp_path: Path) -> None:
    clock = Clock()
    holder = process(tmp_path)
    observer = process(tmp_path, clock)
    lost = take(holder)
    observer.look(MEMBER)
    clock.now += 31
    new = take(observer)
    lost.require()  # its newest answer is still good
    with pytest.raises(ClaimLost, match=r"wide/seed-0: another process has taken over"):
        lost.record({"arm": "wide", "seed": 0, "stale": True})
    for call in (lost.require, lost.release, lambda: lost.record({})):
        with pytest.raises(ClaimLost):
            call()
    counter = (tmp_path / "claims" / MEMBER / "1.beat").read_bytes()
    lost.beat()
    assert (tmp_path / "claims" / MEMBER / "1.beat").read_bytes() == counter
    new.record(FIELDS)
    assert observer.look(MEMBER).record == FIELDS


def test_a_pause_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    """A process that was stopped asks the file system before its next step."""
    own = Clock()
    clock = Clock()
    holder = process(tmp_path, own)
    observer = process(tmp_path, clock)
    claim = take(holder)
    observer.look(MEMBER)
    clock.now += 31
    take(observer)
    with owned_by(claim.require):
        require_ownership()
        own.now += 21  # two heartbeats are missing
        with pytest.raises(ClaimLost):
            require_ownership()
    require_ownership()  # outside, nothing is claimed


def test_a_pause_of_the_observer_is_no_silence_of_the_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    holder = process(tmp_path)
    observer = process(tmp_path, clock)
    take(holder)
    observer.look(MEMBER)
    clock.now += 5
    read = Path.read_bytes

    def slow_read(path: Path) -> bytes:
        content = read(path)
        clock.now += 600  # stopped between reading and judging
        return content

    monkeypatch.setattr(Path, "read_bytes", slow_read)
    assert observer.look(MEMBER).is_claimed


@pytest.mark.parametrize("jump", [1e6, -1e6])
def test_the_time_of_day_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    clock = Clock()
    holder = process(tmp_path)
    observer = process(tmp_path, clock)
    claim = take(holder)
    observer.look(MEMBER)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + jump)
    for path in (tmp_path / "claims" / MEMBER).iterdir():
        os.utime(path, (now + jump, now + jump))
    clock.now += 20
    assert observer.look(MEMBER).is_claimed
    claim.require(now=True)
    clock.now += 11
    assert observer.look(MEMBER).is_expired


def test_a_holder_that_has_ended_here_is_recognized_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("there is no /proc: a claim expires by its lease alone")
    holder = process(tmp_path)
    take(holder)
    observer = process(tmp_path)
    assert observer.look(MEMBER).is_claimed
    path = tmp_path / "claims" / MEMBER / "1.json"
    event = json.loads(path.read_text())
    path.write_text(json.dumps(event | {"started": "1"}))  # the number belongs to another process by now
    assert observer.look(MEMBER).is_expired
    path.write_text(json.dumps(event | {"started": "1", "boot": "another machine"}))
    assert observer.look(MEMBER).is_claimed
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert claims_module._identity(ended.pid)[1] == ""  # ended, though nobody has waited for it
    ended.wait()
    assert claims_module._identity(ended.pid)[1] == ""


def test_the_longer_lease_counts(tmp_path: Path) -> None:
    clock = Clock()
    holder = Claims(tmp_path, lease=Lease(seconds=100, heartbeat=10))
    observer = process(tmp_path, clock)
    take(holder)
    observer.look(MEMBER)
    clock.now += 99
    assert observer.look(MEMBER).is_claimed
    clock.now += 1
    assert observer.look(MEMBER).is_expired
    with pytest.raises(ValueError, match="a lease of at least 3 heartbeats"):
        Lease(seconds=10, heartbeat=5)


def test_many_threads_take_each_claim_once(tmp_path: Path) -> None:
    """Every token has one holder, and a release is followed by the next one."""
    members = [f"arm/seed-{seed}" for seed in range(3)]
    taken: list[tuple[str, int]] = []
    start = threading.Barrier(8)

    def work() -> None:
        with process(tmp_path) as claims:
            start.wait()
            for _ in range(10):
                for member in members:
                    state = claims.look(member)
                    if not state.is_claimed and (claim := claims.take(state)) is not None:
                        taken.append((member, claim.token))
                        claim.release()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) > 30
    for member in members:
        tokens = sorted(token for name, token in taken if name == member)
        assert tokens == list(range(1, 2 * len(tokens), 2))


def test_heartbeats_continue_by_themselves(tmp_path: Path) -> None:
    with Claims(tmp_path, lease=Lease(seconds=0.3, heartbeat=0.02)) as claims:
        claim = take(claims)
        observer = Claims(tmp_path, lease=Lease(seconds=0.3, heartbeat=0.02))
        deadline = time.monotonic() + 60
        while not observer.look(MEMBER).is_alive:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        claim.require(now=True)


# File systems -----------------------------------------------------------------------------------------------
def test_a_lost_answer_of_the_file_server_is_no_lost_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server made the link, its answer was lost, and the request was sent again."""
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert create_once(tmp_path / "1.json", {"id": "a"})
    assert not create_once(tmp_path / "1.json", {"id": "b"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.json"]


def test_without_links_only_one_process_may_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: Path, target: Path) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(ValueError, match="without hard links.*local disk, NFS or Lustre"):
        take(process(tmp_path))
    alone = process(tmp_path / "alone", needs_links=False)
    free = alone.look(MEMBER)
    assert alone.take(free) is not None and alone.take(free) is None


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="No space left"):
        take(process(tmp_path))
    assert not list(tmp_path.rglob("*.json*"))


def test_without_an_answer_of_the_file_system_a_claim_ends_with_its_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    claim = take(process(tmp_path, clock))
    stat = os.stat

    def stale(path: Any, *arguments: Any, **settings: Any) -> Any:
        if str(path).endswith(".json"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return stat(path, *arguments, **settings)

    monkeypatch.setattr(os, "stat", stale)
    clock.now += 29
    claim.beat()
    assert "no sign of life could be given (Stale file handle)" in caplog.text
    claim.require(now=True)
    clock.now += 1
    with pytest.raises(ClaimLost, match="cannot be checked"):
        claim.require()


def test_the_lock_of_a_file_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with locked(path, seconds=1):
        with pytest.raises(TimeoutError, match="locked by another process"), locked(path, seconds=0.02):
            pass
    with locked(path, seconds=0):
        pass
