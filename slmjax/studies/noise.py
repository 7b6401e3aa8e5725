"""The ledger of noise: how much runs that differ in their seed alone differ, from all studies in a directory.

    ledger = ledger_of("studies/width")                      # studies/noise.jsonl
    record_noise(ledger, findings, members)                  # after each analysis; repeating it adds nothing
    expected = expected_deviation(ledger, metric="bits_per_byte", parameters=600_000, tokens=1_000_000)
    expected.deviation                                       # of one run; None if the ledger has no such runs

A line is one arm of one study: the standard deviation of its metric between seeds, with its size and tokens.
The next study begins with it: its power can be known before its first run. Noise falls with size and tokens,
so only runs of about the same size count, and otherwise those of the nearest one.
"""

import dataclasses
import errno
import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmjax.config import fingerprint
from slmjax.data.locks import exclusive
from slmjax.stored_json import check_object
from slmjax.studies.findings import ArmSummary, Findings
from slmjax.studies.study import FINISHED, Member
from slmjax.telemetry.run_directory import plain, read_log

LEDGER = "noise.jsonl"
NEAR = 4.0  # factor of parameters and of tokens within which runs count as of the same size

_KIND = "noise"
_FIELDS = {"key": str, "study": str, "arm": str, "metric": str, "deviation": float}
_FIELDS |= {"degrees_of_freedom": float, "noisy": bool}
_OPTIONAL = {"parameters": float, "tokens": float}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseRecord:
    """The noise of one arm of one study."""

    key: str  # of the study, arm and metric: of several records with the same one, the last counts
    study: str
    arm: str
    metric: str
    deviation: float  # standard deviation of one run between seeds
    degrees_of_freedom: float
    noisy: bool  # noisier than the other arms of its study
    parameters: float | None = None
    tokens: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedNoise:
    """The noise that runs of a size are expected to have."""

    deviation: float  # standard deviation of one run between seeds
    degrees_of_freedom: float
    studies: tuple[str, ...]  # that it comes from
    is_near: bool  # whether they are of about the same size; if not, they are the nearest that there are

    @property
    def text(self) -> str:
        """A sentence about where the noise comes from."""
        about = "of about this size" if self.is_near else "of another size, the nearest"
        return (
            f"standard deviation {self.deviation:.3g} of a run ({self.degrees_of_freedom:.0f} degrees of "
            f"freedom), from {len(self.studies)} {'study' if len(self.studies) == 1 else 'studies'} {about}"
        )


def ledger_of(directory: str | Path) -> Path:
    """Return the path of the ledger of a study's directory: in the directory that contains it."""
    return Path(directory).absolute().parent / LEDGER


# Writing ----------------------------------------------------------------------------------------------------
def record_noise(ledger: str | Path, findings: Findings, members: Sequence[Member]) -> int:
    """Append the noise of each arm of a study to a ledger; returns the number of lines.

    An arm with fewer than two seeds has none. Lines that the ledger has already are not written again, so
    that an analysis can be repeated; after more seeds, a line is written that takes the place of the former.

    Raises:
      DamagedFile: the ledger cannot be read.
    """
    path = Path(ledger)
    records = noise_records(findings, members)
    if not records:
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    # Workers may end the same study at the same time, and both would find the lines missing.
    with exclusive(path.with_name(f".{path.name}.lock"), what=str(path)):
        known = {record.key: record for record in read_ledger(path)}
        new = [record for record in records if known.get(record.key) != record]
        lines = [
            json.dumps(plain({"kind": _KIND, **dataclasses.asdict(record)}), allow_nan=False) + "\n"
            for record in new
        ]
        _append(path, "".join(lines).encode())
    return len(new)


def _append(path: Path, content: bytes) -> None:
    """Append lines as a whole, after removing an unfinished line of a process that was killed."""
    if not content:
        return
    with path.open("ab+", buffering=0) as stream:
        stream.seek(0)
        end = stream.truncate(stream.read().rfind(b"\n") + 1)
        # A disk that fills up may take a part of a line, and the next line would be appended to it.
        if stream.write(content) != len(content):
            stream.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(stream.fileno())


def noise_records(findings: Findings, members: Sequence[Member]) -> list[NoiseRecord]:
    """Return the noise of each arm of a study that has any."""
    noise = findings.noise
    usual = [arm.arm for arm in findings.arms if arm.arm in noise.own and arm.arm not in noise.noisy]
    records = []
    for arm in findings.arms:
        own = [member for member in members if member.arm == arm.arm and member.status == FINISHED]
        estimate = _deviation(findings, arm, num_usual=len(usual))
        if not own or estimate is None:
            continue
        deviation, degrees = estimate
        # The first seed stands for the arm: the key stays when seeds are added.
        first = min(own, key=lambda member: findings.seeds.index(member.seed))
        key = fingerprint({"arm": arm.arm, "metric": findings.metric, "member": first.fingerprint})
        records.append(
            NoiseRecord(
                key=key,
                study=findings.study,
                arm=arm.arm,
                metric=findings.metric,
                deviation=deviation,
                degrees_of_freedom=degrees,
                noisy=arm.arm in noise.noisy,
                parameters=_median(own, "parameters"),
                tokens=_median(own, "tokens"),
            )
        )
    return records


def _deviation(findings: Findings, arm: ArmSummary, *, num_usual: int) -> tuple[float, float] | None:
    """Return the standard deviation of one run of an arm, and its degrees of freedom; None if not known."""
    noise = findings.noise
    if len(arm.seeds) < 2:
        return None
    deviation = noise.own.get(arm.arm)
    if deviation is None:
        # An arm alone, whose seeds are compared with each other.
        spread = None if arm.metric is None else arm.metric.standard_deviation
        return None if not spread else (spread, len(arm.seeds) - 1.0)
    if not deviation:
        return None
    if arm.arm in noise.noisy or not num_usual:
        return deviation, len(arm.seeds) - 1.0
    # The arms of the table share its degrees of freedom.
    return deviation, noise.degrees_of_freedom / num_usual


def _median(members: Sequence[Member], metric: str) -> float | None:
    values = [value for member in members if (value := member.metric_value(metric)) is not None]
    return statistics.median(values) if values else None


# Reading ----------------------------------------------------------------------------------------------------
def read_ledger(ledger: str | Path) -> list[NoiseRecord]:
    """Return the records of a ledger, the last with each key; none if there is no ledger.

    Raises:
      DamagedFile: a line is not a record.
    """
    path = Path(ledger)
    if not path.is_file():
        return []
    latest: dict[str, NoiseRecord] = {}
    for record in read_log(path, kind=_KIND):
        fields: dict[str, Any] = check_object(
            record,
            _FIELDS,
            optional=_OPTIONAL,
            name=f"a record of {path}",
            remedy="remove the line: the next analysis of its study writes it again",
        )
        names = (field.name for field in dataclasses.fields(NoiseRecord))
        latest[fields["key"]] = NoiseRecord(**{name: fields[name] for name in names if name in fields})
    return list(latest.values())


def expected_deviation(
    ledger: str | Path, *, metric: str, parameters: float | None = None, tokens: float | None = None
) -> ExpectedNoise | None:
    """Return the noise that runs of this size are expected to have, by the studies in a ledger.

    The variances of arms within a factor of `NEAR` in parameters and tokens are pooled, weighted by their
    degrees of freedom; if there are none, those of the nearest size. Noisy arms do not count.

    Args:
      ledger: its path.
      metric: of the verdicts.
      parameters: of the models; None: of any.
      tokens: that each is trained on; None: any number.

    Returns:
      None if there is no ledger, or no run in it with this metric.
    """
    records = [record for record in read_ledger(ledger) if record.metric == metric and not record.noisy]
    if not records:
        return None
    distances = [_distance(record, parameters, tokens) for record in records]
    least = min(distances)
    farthest = math.log(NEAR)
    is_near = least <= farthest
    # Beyond a factor of NEAR only one size counts: others are farther still.
    limit = farthest if is_near else least + 1e-9
    near = [record for record, distance in zip(records, distances, strict=True) if distance <= limit]
    degrees = sum(record.degrees_of_freedom for record in near)
    variance = sum(record.degrees_of_freedom * record.deviation**2 for record in near) / degrees
    return ExpectedNoise(
        deviation=math.sqrt(variance),
        degrees_of_freedom=degrees,
        studies=tuple(dict.fromkeys(record.study for record in near)),
        is_near=is_near,
    )


def _distance(record: NoiseRecord, parameters: float | None, tokens: float | None) -> float:
    """Return the larger of both factors, as a logarithm; of what is not known on a side, none."""
    pairs = ((record.parameters, parameters), (record.tokens, tokens))
    return max((abs(math.log(a / b)) for a, b in pairs if a and b), default=0.0)
