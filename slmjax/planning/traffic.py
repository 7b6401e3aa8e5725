"""Bytes that a compiled program sends between devices, read from its text: loops count as often as they run.

    compiled = jax.jit(step).lower(state, batch).compile()      # also for devices that are not here
    sum(collective.sent_bytes for collective in collectives(compiled.as_text()))

Bytes are those that a device sends when the collective goes round a ring, which is what all of them cost at
least where every device has all the others' data to take in: an all-gather of n shards sends n - 1 of them, a
reduce-scatter likewise, an all-reduce both. A TPU program is to be compiled with `PLAIN`: without,
collectives are cut up and woven into products, and can no longer be counted.
"""

import collections
import dataclasses
import math
import re

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Options for `.compile(compiler_options=...)` on TPU.
PLAIN = {
    "xla_tpu_enable_async_collective_fusion": "false",
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}
_ITEM_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%(?P<name>\S+) \(")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%\S+ = (?P<type>\(.*?\)|\S+) (?P<name>[a-z][a-z0-9-]*)\((?P<rest>.*)")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*[a-z0-9]*)\[(?P<dims>[\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%(?P<name>[^\s,)}]+)"
)
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{(?P<names>[^}]*)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """A place in a program where devices send."""

    kind: str  # one of KINDS
    sent_bytes: float  # by a device, in all of the times
    times: int  # how often it runs
    group_size: int  # devices that take part together; of a permutation 2
    source: str  # the operation of the Python program that it comes from


def collectives(text: str) -> list[Collective]:
    """Return the collectives of an optimised HLO program, those of loops multiplied.

    Raises:
      ValueError: the number of rounds of a loop that sends is not part of the program.
    """
    programs, entry = _computations(text)
    times = _times(programs, entry)
    sends = []
    for computation, lines in programs.items():
        for line in lines:
            operation = _OPERATION.match(line)
            # An asynchronous collective is a pair of operations: the start has the shapes.
            kind = None if operation is None else operation["name"].removesuffix("-start")
            if operation is None or kind not in KINDS or not times[computation]:
                continue
            if not math.isfinite(times[computation]):
                raise ValueError(f"{kind} in {computation}: how often its loop runs is not known")
            sends.append(
                _collective(
                    kind, operation["type"], line, times=int(times[computation]), computation=computation
                )
            )
    # A group of one device, as on a mesh axis of size 1, sends nothing.
    return [collective for collective in sends if collective.group_size > 1]


def _collective(kind: str, result: str, line: str, *, times: int, computation: str) -> Collective:
    arrays = [_bytes(array) for array in _ARRAY.finditer(result)]
    # The result of a start holds the operands too: in the first half. That of a permutation has two counters
    # at the end.
    if f"{kind}-start(" in line:
        arrays = (
            arrays[:1]
            if kind == "collective-permute"
            else arrays[len(arrays) // 2 :]
            if kind == "all-gather"
            else arrays
        )
    size = sum(arrays)
    group = 2 if kind == "collective-permute" else _group_size(line)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        # On TPU a reduce-scatter is one operation of this name: each device keeps its part of the sum.
        kind = "reduce-scatter"
        size = size / group
    # Bytes sent around a ring, over the bytes of the result (Patarasuk & Yuan, "Bandwidth optimal all-reduce
    # algorithms for clusters of workstations", 2009).
    rounds = {
        "all-gather": (group - 1) / group,
        "all-reduce": 2 * (group - 1) / group,
        "reduce-scatter": group - 1.0,
    }
    fraction = rounds.get(
        kind, 1.0 if kind in ("collective-permute", "collective-broadcast") else (group - 1) / group
    )
    source = re.search(r'op_name="([^"]*)"', line)
    return Collective(
        kind=kind,
        sent_bytes=size * fraction * times,
        times=times,
        group_size=group,
        source=source[1] if source else "",
    )


def _bytes(array: re.Match[str]) -> float:
    dtype = array["dtype"]
    bits = _ITEM_BITS.get(dtype) or int(re.findall(r"\d+", dtype)[0])  # s32, u8, f8e4m3fn
    return math.prod(int(dim) for dim in array["dims"].split(",") if dim) * bits / 8


def _group_size(line: str) -> int:
    """Return the devices per group, from any of the three ways in which groups are written."""
    # As lists of devices, as [groups, devices per group], or as axes of a mesh.
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    raise ValueError(f"a collective without replica groups that could be read: {line.strip()[:200]}")


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each computation by its name, and the name of the entry computation."""
    programs: dict[str, list[str]] = {}
    entry = ""
    current = None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header["name"]
            programs[current] = []
            entry = current if line.startswith("ENTRY") else entry
        # Alone on its line: within a computation there may be the text of a kernel, with braces of its own.
        elif line == "}":
            current = None
        elif current is not None:
            programs[current].append(line)
    assert entry, "this is no HLO program"
    return programs, entry


def _times(programs: dict[str, list[str]], entry: str) -> dict[str, float]:
    """Return how often each computation runs; infinity where the program does not have the number."""
    calls: dict[str, list[tuple[str, float]]] = collections.defaultdict(list)
    for name, lines in programs.items():
        for line in lines:
            operation = _OPERATION.match(line)
            rounds = (
                _rounds(line, programs) if operation is not None and operation["name"] == "while" else 1.0
            )
            called = [match["name"] for match in _CALLED.finditer(line)]
            called += [
                branch.strip(" %")
                for match in _BRANCHES.finditer(line)
                for branch in match["names"].split(",")
            ]
            calls[name] += [(callee, rounds) for callee in called if callee in programs]
    times: dict[str, float] = collections.defaultdict(float)

    # A computation may be called from several places, so counts add up along every path from the entry.
    def run(name: str, count: float) -> None:
        times[name] += count
        for called, rounds in calls[name]:
            run(called, count * rounds)

    run(entry, 1.0)
    return times


def _rounds(line: str, programs: dict[str, list[str]]) -> float:
    """Return the rounds of a while loop: the compiler's note, or the limit in its condition."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return float(noted[1])
    # Loops of `lax.scan` count from zero up to the one constant that their condition compares with.
    condition = re.search(r"condition=%([^\s,]+)", line)
    lines = programs.get(condition[1], []) if condition else []
    limits = [
        int(limit) for text in lines for limit in re.findall(r"= [su]32\[\]\S* constant\((\d+)\)", text)
    ]
    return float(limits[0]) if len(limits) == 1 else math.inf
