"""Join the processes of a run: by COORDINATOR, RANK and WORLD, by Slurm, or as the hosts of a TPU pod.

    COORDINATOR=node0:4321 RANK=1 WORLD=2 slmjax train ...        # on each host, with a RANK of its own
    srun --ntasks-per-node 8 slmjax train ...                     # nothing to set

`how_to_join` decides from the environment alone. `join` acts on it, and must run before jax is asked for a
device; afterwards `jax.devices()` lists the devices of all processes. CPU devices of several processes
communicate through gloo, the default of jax.
"""

import contextlib
import dataclasses
import enum
import glob
import importlib.util
import ipaddress
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger(__name__)

_VARIABLES = ("COORDINATOR", "RANK", "WORLD")
# The variables that jax reads in a Slurm task.
_SLURM_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
_BIND = "JAX_COORDINATOR_BIND_ADDRESS"  # read by jax: where process 0 listens, address:port
_GOOGLE = "0x1ae0"  # vendor of a TPU on the PCI bus
# Our own time limit must end first: its message says what to check, that of jax is a stack trace.
_MARGIN_SECONDS = 30


class Meeting(enum.Enum):
    """Where processes get each other's addresses from."""

    VARIABLES = "COORDINATOR, RANK and WORLD"
    SLURM = "Slurm"
    TPU = "the TPU's metadata"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Join:
    """How this process joins the others. With Slurm and on TPUs jax finds all but the time limit itself."""

    meeting: Meeting
    seconds: int  # to wait for the others
    coordinator: str | None = None  # host:port of process 0
    process_index: int | None = None
    process_count: int | None = None
    local_device: int | None = None  # the one device of its host that this process uses; None: all of them

    def __str__(self) -> str:
        return (
            f"coordinator {self.coordinator}" if self.coordinator else f"found through {self.meeting.value}"
        )


joined: Join | None = None  # what `join` did in this process


def join(environ: Mapping[str, str] = os.environ) -> Join | None:
    """Join the other processes of the run, if the environment names any.

    Raises:
      ValueError: the environment contradicts itself, or the others were not found; the message lists what to
        check. If they do not connect in time, the process exits with the same message.
    """
    global joined
    how = how_to_join(environ, has_tpu=_has_tpu())
    if how is None:
        return None
    arguments: dict[str, Any] = {"cluster_detection_method": "slurm"} if how.meeting is Meeting.SLURM else {}
    if how.meeting is Meeting.VARIABLES:
        # Cluster detection is off, so that a scheduler's variables are not mixed with those the user has set.
        arguments = {
            "coordinator_address": how.coordinator,
            "num_processes": how.process_count,
            "process_id": how.process_index,
            "local_device_ids": how.local_device,
            "cluster_detection_method": "deactivate",
        }
        if how.process_index == 0 and not environ.get(_BIND):
            arguments["coordinator_bind_address"] = bind_address(arguments["coordinator_address"])
    # Its handler of SIGTERM would replace that of slmjax (`processes.SharedSignals`).
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _time_limit(how):
            jax.distributed.initialize(**arguments, initialization_timeout=how.seconds + _MARGIN_SECONDS)
    except (RuntimeError, ValueError, OSError) as error:
        # What jax raises if it finds no pod that this host belongs to.
        if how.meeting is Meeting.TPU and "coordinator_address" in str(error):
            return None
        raise ValueError(_failure(how, (str(error).splitlines() or [""])[0])) from error
    joined = how
    return how


def bind_address(coordinator: str) -> str | None:
    """Return the address:port that process 0 listens at; None for all interfaces of its host.

    Whoever reaches the port can disturb the run, so it is opened only where COORDINATOR says. A name that
    means no address of this host (that of a service in front of it), or the loopback alone, does not say
    where the others come from: then a warning names the variable that does.
    """
    host, _, port = coordinator.rpartition(":")
    host = host.strip("[]")
    addresses = [address for address in _addresses(host) if _is_own(address)]
    is_loopback = all(ipaddress.ip_address(address).is_loopback for address in addresses)
    # Many systems give their own name the address 127.0.1.1.
    if not addresses or (is_loopback and host not in (*addresses, "localhost")):
        log.warning(
            "COORDINATOR=%s names no address of this host that others can reach: its port %s is open on all "
            "interfaces. To open it on one, set %s=ADDRESS:%s for process 0",
            coordinator,
            port,
            _BIND,
            port,
        )
        return None
    address = addresses[0]
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _addresses(host: str) -> list[str]:
    """Return the addresses of a host name or address, in the order of preference; none if it has none."""
    try:
        results = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    # Without the interface of a link-local address, which is no part of the address itself.
    return list(dict.fromkeys(str(result[4][0]).partition("%")[0] for result in results))


def _is_own(address: str) -> bool:
    """Return whether an address is one of this host: whether a socket can be bound to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def how_to_join(environ: Mapping[str, str], *, has_tpu: bool = False) -> Join | None:
    """Read from the environment how to join other processes; None if this one is alone.

    RANK and WORLD count only with COORDINATOR, because other tools leave a RANK behind. A Slurm batch script
    has no other tasks until it calls srun, and waits for none.

    Args:
      environ: environment variables.
      has_tpu: whether this host has TPU devices.

    Raises:
      ValueError: a variable is missing or invalid.
    """
    switch = environ.get("SLMJAX_DISTRIBUTED", "").lower()
    if switch not in ("", "auto", "off"):
        raise ValueError(
            f"SLMJAX_DISTRIBUTED={environ['SLMJAX_DISTRIBUTED']} is not known: set it to off to train in "
            "this process alone, or to auto (the default) to join the processes that the environment names"
        )
    if switch == "off":
        return None
    seconds = _whole(environ, "SLMJAX_JOIN_SECONDS", least=1) if environ.get("SLMJAX_JOIN_SECONDS") else 300
    if environ.get("COORDINATOR"):
        return _from_variables(environ, seconds)
    # Only srun sets the variables of a step; the script of sbatch sees those of the job alone.
    if (
        environ.get("SLURM_STEP_NUM_TASKS")
        and "SLURM_PROCID" in environ
        and _whole(environ, "SLURM_STEP_NUM_TASKS", least=1) > 1
    ):
        if missing := [name for name in _SLURM_VARIABLES if name not in environ]:
            raise ValueError(
                f"this is one of {environ['SLURM_STEP_NUM_TASKS']} tasks of srun, but {missing[0]}, which is "
                "needed to find the others, is not set: set COORDINATOR, RANK and WORLD, or "
                "SLMJAX_DISTRIBUTED=off to train alone"
            )
        return Join(meeting=Meeting.SLURM, seconds=seconds)
    # A TPU host asks the metadata server even if it is the only one, unless the run is on another platform.
    platforms = environ.get("JAX_PLATFORMS", "")
    if has_tpu and (not platforms or "tpu" in platforms.split(",")):
        return Join(meeting=Meeting.TPU, seconds=seconds)
    return None


def _from_variables(environ: Mapping[str, str], seconds: int) -> Join:
    coordinator = environ["COORDINATOR"]
    if missing := [name for name in _VARIABLES if not environ.get(name)]:
        raise ValueError(
            f"COORDINATOR={coordinator} is set, but {' and '.join(missing)} not: set all three (RANK is the "
            "index of this process from 0, WORLD the number of processes), or none to train alone"
        )
    # From the right, because IPv6 addresses contain colons: [fd00::1]:80.
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(
            f"COORDINATOR={coordinator} must be HOST:PORT: the host of process 0, and a free port on it "
            "(1 to 65535)"
        )
    rank = _whole(environ, "RANK", least=0)
    world = _whole(environ, "WORLD", least=1)
    if rank >= world:
        raise ValueError(
            f"RANK={rank} is not one of the WORLD={world} processes: they are numbered from 0 to {world - 1}"
        )
    local = _whole(environ, "LOCAL_RANK", least=0) if environ.get("LOCAL_RANK") else None
    return Join(
        meeting=Meeting.VARIABLES,
        seconds=seconds,
        coordinator=coordinator,
        process_index=rank,
        process_count=world,
        local_device=local,
    )


def _whole(environ: Mapping[str, str], name: str, *, least: int) -> int:
    text = environ[name]
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise ValueError(f"{name}={text} must be a whole number, at least {least}")
    return int(text)


def _has_tpu() -> bool:
    """Return whether libtpu is installed, and a device node and PCI hardware of a TPU exist.

    None of these is enough alone: libtpu compiles for TPUs on any machine, and virtual machines have devices
    in /dev/vfio.
    """
    if importlib.util.find_spec("libtpu") is None or not glob.glob("/dev/accel[0-9]*") + glob.glob(
        "/dev/vfio/[0-9]*"
    ):
        return False
    return any(
        Path(vendor).read_text().strip() == _GOOGLE for vendor in glob.glob("/sys/bus/pci/devices/*/vendor")
    )


@contextlib.contextmanager
def _time_limit(how: Join) -> Iterator[None]:
    """Exit with a message of what to check if the others do not connect in time."""

    def exit_with_message() -> None:
        print(f"error: {_failure(how, _coordinator_problem(how))}", file=sys.stderr, flush=True)
        # The main thread is blocked inside jax, where no exception reaches it.
        os._exit(2)

    timer = threading.Timer(how.seconds, exit_with_message)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _coordinator_problem(how: Join) -> str:
    """Connect to the coordinator's address and describe what is missing."""
    if how.coordinator is None or how.process_index == 0:
        return "not all of them connected"
    host, _, port = how.coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError as error:
        return str(error)
    return "it answers, but not all of them connected"


def _failure(how: Join, problem: str) -> str:
    if how.meeting is not Meeting.VARIABLES:
        return (
            f"the other processes were not found through {how.meeting.value} ({problem}): start all of them "
            f"within SLMJAX_JOIN_SECONDS={how.seconds}; set COORDINATOR, RANK and WORLD yourself; or "
            "SLMJAX_DISTRIBUTED=off to train alone"
        )
    return (
        f"process {how.process_index} of {how.process_count} did not meet the others at "
        f"COORDINATOR={how.coordinator} ({problem}). Check that process 0 runs on that host, that no "
        f"firewall closes the port and no other program has it, and that all {how.process_count} processes "
        f"were started, each with its own RANK, within SLMJAX_JOIN_SECONDS={how.seconds}"
    )
