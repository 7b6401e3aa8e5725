"""Claims: which process trains a member of a study, on any host that shares the study's directory.

    with Claims(directory) as claims:
        state = claims.look("wide/seed-0")
        if not state.is_claimed and (claim := claims.take(state)) is not None:
            ...                                 # train; `claim.require()` raises once the claim is lost
            claim.record(dataclasses.asdict(member))

**Events.** DIRECTORY/claims/ARM/seed-N/ has a file for each event of a member, `1.json` and so on, none of
which is ever changed, and for claim 1 `1.beat`, a counter that its holder increases. A member is claimed, and
its claim ends with a record or a release, or another process takes it over. Each event has the next number
and is created by `link`, which fails if the file exists: of two processes that want the same number, one gets
it. The number of a claim is its fencing token. A holder that has lost its claim cannot record anything, since
the number after its own is taken.

**Leases.** A claim whose counter does not change for the length of its lease, by the monotonic clock of the
process that looks, has expired. No two clocks are compared, and the time of day is not used. On Linux a
holder that has ended on the same machine is recognized at once.

**File systems.** `link` must be atomic and visible to other hosts, and a file that is opened must have its
newest content: so it is on local file systems, NFS, Lustre and GPFS. Cloud Storage mounted by gcsfuse has no
links and is refused for several workers.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from slmjax.stored_json import DamagedFile, check_object, read_object
from slmjax.telemetry.run_directory import plain

log = logging.getLogger(__name__)

CLAIMS = "claims"
CLAIMED = "claimed"
RELEASED = "released"
RECORDED = "recorded"

_EVENT = re.compile(r"([1-9]\d*)\.json")
_FIELDS = {"event": str, "fence": int, "id": str}
_OPTIONAL = {
    "host": str,
    "pid": int,
    "boot": str,
    "started": str,
    "lease": float,
    "member": dict,
    "rung": dict,
}
_REMEDY = "delete it, and the member is trained again or read from its run"
LONGEST = 30 * 86400.0  # seconds of a lease: a thread cannot wait for ever
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class ClaimLost(RuntimeError):
    """Another process has taken over the claim: this one must not write to the run any more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lease:
    """How long a claim lasts without a sign of life from its holder."""

    seconds: float = 300.0
    heartbeat: float = 30.0  # seconds between two signs of life

    def __post_init__(self) -> None:
        # A late heartbeat, as on a busy file server, must not cost the claim.
        if not 0 < self.heartbeat <= self.seconds / 3 or self.seconds > LONGEST:
            raise ValueError(
                f"the lease is {self.seconds} s with a heartbeat every {self.heartbeat} s: give a lease of "
                f"at least 3 heartbeats and at most {LONGEST:,.0f} s"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """A member as its events describe it."""

    member: str  # ARM/seed-N
    token: int = 0  # number of its newest event; 0 if it has none
    # Claims after a takeover have its number as their fence: directories are named by it, so that what a
    # holder from before still writes goes elsewhere. 0 if every claim was released or recorded.
    fence: int = 0
    is_claimed: bool = False  # and the lease has not expired
    is_expired: bool = False  # claimed, and expired
    is_alive: bool = False  # claimed, and the holder has given a sign of life to this process
    holder: str = ""  # host and process
    record: Mapping[str, Any] | None = None  # the newest outcome
    recorded: int = 0  # number of its event
    rungs: tuple[Mapping[str, Any], ...] = ()  # of early stopping: what releases noted, the newest first


# Events -----------------------------------------------------------------------------------------------------
def create_once(path: Path, content: Mapping[str, Any], *, needs_links: bool = True) -> bool:
    """Create a JSON file as a whole. Return False if another process has created it.

    Args:
      path: the file.
      content: has a unique "id", by which a file of this call is recognized.
      needs_links: whether the file system must have links; otherwise a reader may see an incomplete file.

    Raises:
      ValueError: it has none.
      OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(content), allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:12]}.tmp")
    try:
        _write_new(temporary, text)
        try:
            os.link(temporary, path)
        except FileExistsError:
            # A file server whose answer was lost is asked twice, and refuses the second time.
            return read_object(path, {"id": str}, remedy=_REMEDY)["id"] == content["id"]
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if needs_links:
                raise ValueError(
                    f"{path.parent} is on a file system without hard links ({error.strerror}), by which "
                    "workers claim members: put the study in a directory on a local disk, NFS or Lustre, "
                    "or run it without workers"
                ) from None
            try:
                _write_new(path, text)
            except FileExistsError:
                return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return True


def _write_new(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        # A power failure must not leave an empty event, which nothing replaces.
        os.fsync(stream.fileno())


def _events(chain: Path) -> list[int]:
    """Return the numbers of a member's events, the newest first."""
    try:
        names = os.listdir(chain)
    except FileNotFoundError:
        return []
    return sorted((int(match[1]) for name in names if (match := _EVENT.fullmatch(name))), reverse=True)


def _read_event(chain: Path, number: int) -> dict[str, Any]:
    path = chain / f"{number}.json"
    event = read_object(path, _FIELDS, optional=_OPTIONAL, remedy=_REMEDY)
    if (rung := event.get("rung")) is not None:
        check_object(rung, {"step": int}, name=f"'rung' of {path}", remedy=_REMEDY)
        try:
            # Infinities are texts.
            float(rung.get("value"))
        except (TypeError, ValueError, OverflowError) as error:
            raise DamagedFile(f"'rung' of {path} has no number as 'value': {_REMEDY}") from error
    return event


def recorded_members(directory: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the newest recorded outcome of each member of a study, with its file.

    Raises:
      DamagedFile: the file of an event cannot be read.
    """
    outcomes = []
    for chain in sorted((directory / CLAIMS).glob("*/seed-*")):
        for number in _events(chain):
            event = _read_event(chain, number)
            if event["event"] == RECORDED and event.get("member") is not None:
                outcomes.append((chain / f"{number}.json", event["member"]))
                break
    return outcomes


# Holders ----------------------------------------------------------------------------------------------------
def _this_process() -> dict[str, Any]:
    """Return how other processes recognize this one."""
    pid = os.getpid()
    boot, started = _identity(pid)
    return {"host": platform.node(), "pid": pid, "boot": boot, "started": started}


def _identity(pid: int) -> tuple[str, str]:
    """Return the machine since its start, with its space of process numbers, and the start of a process.

    Empty where there is no /proc or no such process; a process that has ended and was not waited for is none.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        boot = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return "", ""
    try:
        # The name of the program may contain spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return boot, ""
    return boot, "" if fields[0] in "ZX" else fields[19]


def _has_ended(event: Mapping[str, Any]) -> bool:
    """Return whether the holder was a process of this machine that has ended; False if that is not known."""
    if not event.get("boot") or event.get("pid") is None:
        return False
    boot, started = _identity(event["pid"])
    return boot == event["boot"] and started != event.get("started")


# Claims of this process -------------------------------------------------------------------------------------
class Claims:
    """The claims of this process in a study. A context: at its end, claims that are left are released.

    A thread gives signs of life for all of them.
    """

    def __init__(
        self,
        directory: Path,
        *,
        lease: Lease = Lease(),
        needs_links: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create the claims of a study.

        Args:
          directory: of the study.
          lease: of claims that are taken here.
          needs_links: whether to refuse a file system on which several processes cannot claim safely.
          clock: seconds, which never go back.
        """
        self.lease = lease
        self.needs_links = needs_links
        self.clock = clock
        self._root = directory / CLAIMS
        # What was last seen of other holders' claims, and when this process first saw it.
        self._seen: dict[str, tuple[tuple[int, bytes], float]] = {}
        self._alive: dict[str, int] = {}  # token by member, of claims whose counter changed
        self._held: list[Claim] = []
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._give_signs_of_life, name="heartbeat", daemon=True)

    def __enter__(self) -> "Claims":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.set()
        self._thread.join()
        for claim in list(self._held):
            with contextlib.suppress(ClaimLost, OSError):
                claim.release()

    def _give_signs_of_life(self) -> None:
        while not self._ends.wait(self.lease.heartbeat):
            for claim in list(self._held):
                claim.beat()

    def look(self, member: str) -> State:
        """Return the state of a member (ARM/seed-N).

        Raises:
          DamagedFile: the file of an event cannot be read.
        """
        # Before reading: if this process is paused in between, the pause must not count as the silence of the
        # holder.
        now = self.clock()
        chain = self._root / member
        numbers = _events(chain)
        if not numbers:
            return State(member=member)
        newest = _read_event(chain, numbers[0])
        is_claimed = newest["event"] == CLAIMED
        is_expired = is_claimed and self._is_expired(member, numbers[0], newest, now=now)
        events = {
            number: newest if number == numbers[0] else _read_event(chain, number) for number in numbers
        }
        recorded = next((number for number, event in events.items() if event["event"] == RECORDED), 0)
        return State(
            member=member,
            token=numbers[0],
            fence=newest["fence"],
            is_claimed=is_claimed and not is_expired,
            is_expired=is_expired,
            is_alive=is_claimed and not is_expired and self._alive.get(member) == numbers[0],
            holder=f"process {newest.get('pid')} on {newest.get('host')}",
            record=events[recorded].get("member") if recorded else None,
            recorded=recorded,
            rungs=tuple(event["rung"] for event in events.values() if event.get("rung") is not None),
        )

    def _is_expired(self, member: str, token: int, event: Mapping[str, Any], *, now: float) -> bool:
        """Return whether the lease of a claim has run out, as far as this process can know."""
        if _has_ended(event):
            return True
        try:
            beat = (self._root / member / f"{token}.beat").read_bytes()
        except (
            OSError
        ):  # not there yet; or the server does not answer, as it may not answer the holder either
            beat = b""
        seen, since = self._seen.get(member, ((0, b""), 0.0))
        if seen != (token, beat):
            if seen[0] == token:
                self._alive[member] = token
            # After reading: the silence begins then at the earliest.
            self._seen[member] = ((token, beat), self.clock())
            return False
        # The holder counts on its own lease, whatever this process would take.
        return now - since >= max(self.lease.seconds, event.get("lease") or 0.0)

    def take(self, state: State) -> "Claim | None":
        """Claim a member that was free or expired in this state. None if another process was faster.

        Raises:
          ValueError: the file system has no links, and needs them.
          OSError: the file cannot be written.
        """
        token = state.token + 1
        claim = Claim(self, state.member, token=token, fence=token if state.is_expired else state.fence)
        # Before the event, so that its holder can be seen to live from the first moment.
        claim.path.parent.mkdir(parents=True, exist_ok=True)
        beat = claim.path.with_name(f"{token}.beat")
        with contextlib.suppress(FileExistsError), beat.open("xb"):
            pass
        is_mine = claim.append(
            token, event=CLAIMED, time=time.time(), lease=self.lease.seconds, **_this_process()
        )
        if not is_mine:
            return None
        if state.is_expired:
            log.warning("%s: the claim of %s has expired and is taken over", state.member, state.holder)
        claim.beat()
        self._held.append(claim)
        return claim

    def drop(self, claim: "Claim") -> None:
        """Give no more signs of life for a claim."""
        if claim in self._held:
            self._held.remove(claim)


class Claim:
    """A claim that this process has taken. `token` increases with each claim of a member."""

    def __init__(self, claims: Claims, member: str, *, token: int, fence: int) -> None:
        self.member = member
        self.token = token
        self.fence = fence
        self.path = claims._root / member / f"{token}.json"
        self._claims = claims
        self._counter = 0
        self._last_beat = claims.clock()
        self._is_lost = False
        # The heartbeat and the training check at the same time.
        self._lock = threading.Lock()

    def append(self, number: int, **content: Any) -> bool:
        """Append an event to those of the member. Return False if the number is taken."""
        # An id of its own: a failure of the network must not make a foreign event look like this one.
        event = {"id": uuid.uuid4().hex, "fence": self.fence, **content}
        path = self.path.with_name(f"{number}.json")
        return create_once(path, event, needs_links=self._claims.needs_links)

    def beat(self) -> None:
        """Give a sign of life, or note that the claim is lost. A failure to write is logged."""
        with self._lock:
            if self._is_lost:
                return
            now = self._claims.clock()
            try:
                self._look()
                if self._is_lost:
                    return
                self._counter += 1
                # In place and of one length: it needs no space on a disk that is full.
                with self.path.with_suffix(".beat").open("r+b") as stream:
                    stream.write(b"%012d" % self._counter)
            except OSError as error:
                log.warning("%s: no sign of life could be given (%s)", self.member, error.strerror or error)
                return
            self._last_beat = now

    def _look(self) -> None:
        """Note that the claim is lost, if its event was removed or another one follows it."""
        try:
            os.stat(self.path)
            os.stat(self.path.with_name(f"{self.token + 1}.json"))
        except FileNotFoundError as error:
            self._is_lost = Path(error.filename) == self.path
        else:
            self._is_lost = True

    def require(self, now: bool = False) -> None:
        """Raise ClaimLost if another process has taken over the claim.

        Args:
          now: ask the file system. Otherwise it is asked only if no sign of life was given for two
            heartbeats, as after a pause of this process.
        """
        if now or self._claims.clock() - self._last_beat > 2 * self._claims.lease.heartbeat:
            with self._lock:
                try:
                    self._look()
                except OSError as error:
                    # Without the file system nothing can be known. Once the lease is over, others may write.
                    if self._claims.clock() - self._last_beat >= self._claims.lease.seconds:
                        raise ClaimLost(f"{self.member}: the claim cannot be checked ({error})") from error
        if self._is_lost:
            self._claims.drop(self)
            raise ClaimLost(f"{self.member}: another process has taken over this claim, which had expired")

    def record(self, member: Mapping[str, Any]) -> None:
        """Record the outcome of the member, which ends the claim.

        Raises:
          ClaimLost: another process has taken over; nothing is recorded.
        """
        self._end(event=RECORDED, member=member)

    def release(self, *, rung: Mapping[str, Any] | None = None) -> None:
        """End the claim without an outcome: another process may resume the run at once.

        Args:
          rung: of early stopping, what the member has reached.

        Raises:
          ClaimLost: another process has taken over.
        """
        self._end(event=RELEASED, rung=rung)

    def _end(self, **content: Any) -> None:
        if not self.append(self.token + 1, time=time.time(), **content):
            self._is_lost = True
        else:
            self._claims.drop(self)
            return
        self.require()


@contextlib.contextmanager
def locked(path: Path, *, seconds: float) -> Iterator[None]:
    """Hold the lock of a file as far as the system has locks, and for at most so long a wait.

    Raises:
      TimeoutError: another process holds it all that time.
      OSError: the file cannot be opened.
    """
    import fcntl

    deadline = time.monotonic() + seconds
    with path.open("ab") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{path} is locked by another process") from None
                time.sleep(0.01)
            except OSError:  # a file system without locks
                break
        # Closing the file ends the lock.
        yield
