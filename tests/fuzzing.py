"""Every kind of file that slmjax reads, with a sound sample, the functions that read it, and damage to it.

    directory = write_sample(kind, tmp_path)
    for seed in range(100):
        attempt = try_once(kind, directory, seed=seed)
        assert attempt.outcome is not Outcome.DEFECT, attempt

A reading function must return, or raise a ValueError or an OSError that names the file, in bounded time and
memory. Anything else is a defect. `benchmarks/chaos.py` tries more seeds than the tests.
"""

import contextlib
import dataclasses
import enum
import functools
import json
import random
import resource
import signal
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from slmjax.checkpoints import manifest, safetensors_files
from slmjax.checkpoints.manifest import _digest as manifest_digest
from slmjax.checkpoints.model_file import read_config, read_quant_phases
from slmjax.checkpoints.run_checkpoints import CheckpointConfig, Checkpointer
from slmjax.checkpoints.stored_model import LocalModel, open_local_model, read_origin
from slmjax.cli.generating import _read_requests as read_requests
from slmjax.convert import gguf_model, hf_directory
from slmjax.convert.family import logical_shapes
from slmjax.convert.gguf.tokenizer import tokenizer_metadata
from slmjax.convert.model_card import write_card
from slmjax.convert.source import code_notes
from slmjax.data import packing, provenance
from slmjax.data.chat import render_chat
from slmjax.data.conventions import read_conventions
from slmjax.data.records import read_records
from slmjax.data.shards import TokenShards, _json_digest
from slmjax.data.tokenizers import Tokenizer
from slmjax.evaluation.multiple_choice import read_questions
from slmjax.models.definition import define
from slmjax.runner.resume import is_complete
from slmjax.studies import ablation
from slmjax.studies.claims import Claims
from slmjax.studies.findings import analyze_members, read_findings
from slmjax.studies.foreign_results import choose_columns, read_columns
from slmjax.studies.noise import read_ledger
from slmjax.studies.results_files import read_results
from slmjax.studies.statistics.results_table import Rules
from slmjax.studies.stopping import read_decision
from slmjax.studies.study import read_members
from slmjax.studies.study_directory import StudyDirectory
from slmjax.telemetry.report import list_runs, write_comparison, write_report
from slmjax.telemetry.run_directory import RunDirectory, read_log, sessions
from slmjax.training.experiment import read_experiment
from tests import sound_files, tiny
from tests.mutations import (
    Mutation,
    byte_mutation,
    gguf_mutation,
    json_lines_mutation,
    json_mutation,
    safetensors_mutation,
    template_mutation,
)
from tests.sound_files import MESSAGES, MODEL, RECORD

CPU_SECONDS = 10.0  # of one attempt, of all threads together
MEMORY = 1 << 30  # bytes that one attempt may add


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file and a function that reads it."""

    name: str  # "config.json, read to resume"
    file: str  # within the sample's directory
    sample: Callable[[Path], None]  # writes a sound directory
    read: Callable[[Path], Any]  # reads that directory
    mutate: Mutation = json_mutation
    # applied to damaged content: corrects a checksum, say, which would end the reading early
    finish: Callable[[bytes], bytes] = bytes
    names_file: bool = True  # whether an error must have the file's name in it


class Outcome(enum.Enum):
    """The end of an attempt."""

    READ = "read"  # the function has returned
    REFUSED = "refused"  # it has raised a ValueError or an OSError that names the file
    DEFECT = "defect"  # anything else


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """One damaged file, and how its reading ended."""

    kind: str
    seed: int
    outcome: Outcome
    detail: str  # the error, with its last lines of code for a defect
    seconds: float  # CPU time
    memory: int  # bytes at the peak, above those before
    content: bytes  # the damaged file


# Attempts ---------------------------------------------------------------------------------------------------
def write_sample(kind: Kind, parent: Path) -> Path:
    """Write a sound sample into a new directory, check that it is read, and return the directory."""
    directory = parent / f"sample-{zlib.crc32(kind.name.encode()):08x}"
    directory.mkdir(parents=True)
    kind.sample(directory)
    kind.read(directory)
    return directory


def try_once(kind: Kind, directory: Path, *, seed: int) -> Attempt:
    """Read a sample with damage by seed. The sample is sound again afterwards.

    Args:
      directory: the result of `write_sample`.
    """
    path = directory / kind.file
    sound = path.read_bytes()
    # The name is a part of the seed, so that kinds are not all damaged in the same way.
    draws = random.Random(f"{kind.name} {seed}")
    content = kind.finish(kind.mutate(sound, draws))
    path.write_bytes(content)
    started = time.process_time()
    before = _reset_peak_memory()
    outcome = Outcome.READ
    detail = ""
    try:
        with _limited():
            kind.read(directory)
    except (ValueError, OSError) as error:
        outcome = Outcome.REFUSED
        detail = str(error)
        # Of files that do not belong together an error may name the directory.
        if kind.names_file and path.name not in detail and str(path.parent) not in detail:
            outcome = Outcome.DEFECT
            detail = f"does not name {path.name}: {_described(error)}"
        # Half of a surrogate pair ends the printing of an error in another one.
        if detail.encode("utf-8", "replace").decode() != detail:
            outcome = Outcome.DEFECT
            detail = f"cannot be printed: {_described(error)}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        outcome = Outcome.DEFECT
        detail = _described(error)
    finally:
        path.write_bytes(sound)
    seconds = time.process_time() - started
    memory = _peak_memory() - before
    if memory > MEMORY and outcome is not Outcome.DEFECT:
        outcome = Outcome.DEFECT
        detail = f"took {memory / 2**20:,.0f} MiB. {detail}"
    return Attempt(
        kind=kind.name,
        seed=seed,
        outcome=outcome,
        detail=detail,
        seconds=seconds,
        memory=memory,
        content=content,
    )


class _TooLong(BaseException):
    """The limit of time has passed. No handler of errors catches it."""


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Limit the CPU time and the memory of a block, which must run in the main thread."""

    running = True

    def stop(*_: Any) -> None:
        # A timer that is still armed after the block, whatever failed there, must not end other code.
        if running:
            raise _TooLong(f"took more than {CPU_SECONDS:g} s of CPU time")

    previous = signal.signal(signal.SIGPROF, stop)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    # Eight times as much as is allowed: a program that takes it fails, and the machine does not suffer.
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + 8 * MEMORY, limits[1]))
    # CPU time, since the machine may be busy.
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        running = False
        # The limit of memory first: where it is used up, other calls may fail, and the timer stays armed.
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def _reset_peak_memory() -> int:
    """Begin to measure the peak of the process's memory again, and return its present size in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak_memory() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    """Return a size from Linux's status of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")


def _described(error: BaseException) -> str:
    """Return the error with the last lines of the program that raised it."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    return ascii(f"{type(error).__name__}: {str(error)[:300]} ({where})")


# Reading ----------------------------------------------------------------------------------------------------
def _read_architecture(directory: Path) -> None:
    # Shapes alone: what every command does first.
    define(read_config(directory))


def _read_imported(directory: Path) -> None:
    files = safetensors_files.ModelFiles(directory)
    for name in logical_shapes(MODEL):
        if name in files:
            files.shape(name)
            files.read(name)


def _read_hugging_face(directory: Path) -> None:
    model = hf_directory.open_directory(directory)
    model.tokenizer()
    for _ in model.parameters():
        pass


def _read_gguf(directory: Path) -> None:
    model = gguf_model.open_file(directory / "model.gguf")
    model.tokenizer()
    for _ in model.parameters():
        pass


def _read_template(directory: Path) -> None:
    template = (directory / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    render_chat(template, MESSAGES, bos_token="<s>", eos_token="</s>")


def _read_data(directory: Path) -> None:
    record = provenance.read_record(directory)
    assert record is not None
    provenance.differences(record, [RECORD])
    provenance.overlap(directory, tiny.experiment().data, [RECORD])


def _read_settings(directory: Path) -> None:
    provenance.read_settings(directory)
    provenance.own_data(directory)


def _read_best(directory: Path) -> None:
    checkpointer = Checkpointer(directory / "checkpoints", model=MODEL, config=CheckpointConfig())
    try:
        checkpointer.best()
    finally:
        checkpointer.close()


def _open_study(directory: Path) -> None:
    opened = StudyDirectory.open(directory)
    assert opened.seeds is not None and opened.arms is not None
    opened.matched_before(sound_files.study())
    opened.changes_since_lock()
    ablation._fixed_size(directory)


def _judge(path: Path) -> None:
    table = read_results([path])
    columns = choose_columns(table, arm="arm", seed="seed", metric="loss", status="status", step="step")
    results = read_columns(table, columns, baseline="1e-3", rules=Rules())
    analyze_members(results.question, results.members)


def _encode(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory / "tokenizer")
    tokenizer.decode(tokenizer.encode("Who? äöü"))


def _read_all(path: Path) -> None:
    for _ in read_records(path):
        pass


def _compare(directory: Path) -> None:
    # The page compares different runs.
    other = directory.parent / "other-run"
    if not other.is_dir():
        other.mkdir()
        sound_files.write_run(other)
    write_comparison([directory, other], directory.parent / "comparison.html")


def _report(directory: Path) -> None:
    write_report(directory, output=directory.parent / "report.html", with_images=False)


def _list(directory: Path) -> None:
    assert len(list_runs(directory.parent)) > 0


@functools.cache
def _model() -> LocalModel:
    """An imported model, whose files may be deleted once it is open: a card needs its shapes."""
    with tempfile.TemporaryDirectory() as directory:
        sound_files.write_imported(Path(directory))
        return open_local_model(Path(directory))


def _write_card(directory: Path) -> None:
    model = dataclasses.replace(_model(), path=directory, step=60)
    write_card(model, directory.parent / "model_card.md", title="a", family="llama")
    list(code_notes(model))


def _read_settings_and_card(directory: Path) -> None:
    _read_settings(directory)
    provenance.read_record(directory)
    _write_card(directory)


def _export_tokenizer(directory: Path) -> None:
    loaded = Tokenizer.load(directory / "tokenizer")
    metadata = tokenizer_metadata(directory / "tokenizer", adds_bos=loaded.adds_bos, num_rows=1000)
    list(gguf_model.tokenizer_notes(directory / "tokenizer", metadata, num_layers=2))


def _corrected(content: bytes) -> bytes:
    """Return a manifest of shards with the checksum of its damaged body."""
    try:
        value = json.loads(content)
        return json.dumps({**value, "sha256": _json_digest(value["manifest"])}).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        return content


def _signed(content: bytes) -> bytes:
    """Return the manifest of a checkpoint with the digest of its damaged content."""
    try:
        value = json.loads(content)
        value.pop("digest")
        return json.dumps({**value, "digest": manifest_digest(value)}).encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return content


def _read_manifest(directory: Path) -> None:
    manifest.changed_files(directory / "60", manifest.read_manifest(directory / "60"))


# Kinds ------------------------------------------------------------------------------------------------------
def _of_run(file: str, use: str, read: Callable[[Path], Any], **more: Any) -> Kind:
    return Kind(name=f"{file} of a run, {use}", file=file, sample=sound_files.write_run, read=read, **more)


def _of_imported(
    file: str, read: Callable[[Path], Any], mutate: Mutation = json_mutation, *, name: str = "alone"
) -> Kind:
    return Kind(
        name=f"{file} of an imported model, {name}",
        file=file,
        sample=sound_files.write_imported,
        read=read,
        mutate=mutate,
    )


_GOLDEN = sorted(path.stem for path in (Path(__file__).parent / "convert" / "golden").glob("*.json"))
_LINES = [{"prompt": "Who?", "choices": ["he", "she"], "answer": 1, "seed": 3, "text": "a text"}] * 3
_CONVERSATIONS = [{"messages": MESSAGES}] * 3

KINDS: tuple[Kind, ...] = (
    # Runs: of a list of runs none may fail, and errors of pages name the run or the file.
    _of_run("config.json", "to resume", read_experiment),
    _of_run("config.json", "for its data", _read_settings),
    _of_run("model.json", "for its shapes", _read_architecture),
    _of_run("model.json", "for its formats", read_quant_phases),
    _of_run("data.json", "to compare", _read_data),
    _of_run("result.json", "to resume", lambda path: is_complete(RunDirectory(path), 60)),
    _of_run("log.jsonl", "alone", lambda path: read_log(path / "log.jsonl"), mutate=json_lines_mutation),
    *(
        _of_run(
            file,
            use,
            read,
            mutate=json_lines_mutation if file == "log.jsonl" else json_mutation,
            names_file=read is not _list,
        )
        for file in ("config.json", "data.json", "environment.json", "result.json", "log.jsonl")
        for use, read in (("in a list", _list), ("for its page", _report), ("in a comparison", _compare))
    ),
    *(
        _of_run(f"tokenizer/{file}", "to encode", _encode)
        for file in ("tokenizer.json", "tokenizer_config.json")
    ),
    _of_run("tokenizer/tokenizer_config.json", "alone", lambda path: read_conventions(path / "tokenizer")),
    Kind(
        name="best.json",
        file="checkpoints/best.json",
        sample=sound_files.write_best,
        read=_read_best,
    ),
    Kind(
        name="MANIFEST.json",
        file="60/MANIFEST.json",
        sample=sound_files.write_manifest,
        read=_read_manifest,
        finish=_signed,
    ),
    *(
        _of_run(file, "in a model card", _write_card)
        for file in ("config.json", "data.json", "environment.json", "result.json")
    ),
    _of_run("log.jsonl", "for its sessions", sessions, mutate=json_lines_mutation),
    *(
        _of_run(f"tokenizer/{file}", "to export", _export_tokenizer)
        for file in ("tokenizer.json", "tokenizer_config.json")
    ),
    Kind(
        name="rows of a split",
        file="rows.npz",
        sample=sound_files.write_rows,
        read=lambda path: packing._load(path / "rows.npz", sequence_length=8),
        mutate=byte_mutation,
    ),
    # Models.
    _of_imported("origin.json", read_origin),
    _of_imported("origin.json", _read_settings_and_card, name="to export"),
    _of_imported("weights/formats.json", _read_imported),
    _of_imported("weights/model.safetensors", _read_imported, safetensors_mutation),
    Kind(
        name="index of safetensors",
        file=f"weights/{safetensors_files.INDEX}",
        sample=sound_files.write_plain,
        read=_read_imported,
    ),
    *(
        Kind(
            name=f"config.json of Hugging Face, {name}",
            file="config.json",
            sample=functools.partial(sound_files.write_golden, name),
            read=_read_hugging_face,
        )
        for name in _GOLDEN
    ),
    *(
        Kind(
            name=f"{file} of Hugging Face",
            file=file,
            sample=sound_files.write_hugging_face,
            read=_read_hugging_face,
            mutate=safetensors_mutation if file.endswith("safetensors") else json_mutation,
        )
        for file in ("generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ),
    *(
        Kind(
            name=f"GGUF, vocabulary of {vocabulary}",
            file="model.gguf",
            sample=functools.partial(sound_files.write_gguf_file, merges=vocabulary == "merges"),
            read=_read_gguf,
            mutate=gguf_mutation,
        )
        for vocabulary in ("bytes", "merges")
    ),
    Kind(
        name="chat template",
        file="chat_template.jinja",
        sample=sound_files.write_template,
        read=_read_template,
        mutate=template_mutation,
        names_file=False,
    ),
    # Data.
    Kind(
        name="manifest of shards",
        file="shards/manifest.json",
        sample=sound_files.write_shards,
        read=lambda path: TokenShards.open(path / "shards"),
        finish=_corrected,
    ),
    Kind(
        name="members of a study",
        file="members.jsonl",
        sample=sound_files.write_members,
        read=lambda path: read_members(sound_files.study(), path),
        mutate=json_lines_mutation,
        names_file=False,
    ),
    Kind(
        name="outcome in a claim",
        file="claims/sound/seed-0/2.json",
        sample=sound_files.write_claim,
        read=lambda path: (read_members(sound_files.study(), path), Claims(path).look("sound/seed-0")),
        names_file=False,
    ),
    Kind(
        name="rung in a claim",
        file="claims/sound/seed-1/2.json",
        sample=sound_files.write_claim,
        read=lambda path: Claims(path).look("sound/seed-1"),
    ),
    *(
        Kind(
            name=f"{file} of a study{name}",
            file=file,
            sample=sound_files.write_study,
            read=read,
            mutate=json_lines_mutation if file.endswith("l") else json_mutation,
            names_file=False,
        )
        for file, name, read in (
            ("plan.json", "", _open_study),
            ("plan.json", ", for a verdict", lambda path: read_results([path])),
            ("changes.jsonl", "", _open_study),
            ("studies.json", "", _open_study),
            ("noise.jsonl", "", lambda path: read_ledger(path / "noise.jsonl")),
            ("findings.json", "", read_findings),
            ("claims/rung-20.json", "", lambda path: read_decision(path, 20)),
            ("members.jsonl", ", for a verdict", lambda path: read_results([path])),
        )
    ),
    *(
        Kind(
            name=f"{file} of another program",
            file=file,
            sample=sound_files.write_results,
            read=lambda path, file=file: _judge(path / file),
            mutate=mutate,
            names_file=False,
        )
        for file, mutate in (
            ("results.csv", byte_mutation),
            ("results.json", json_mutation),
            ("results.jsonl", json_lines_mutation),
        )
    ),
    *(
        Kind(
            name=name,
            file="lines.jsonl",
            sample=lambda path, lines=lines: sound_files.write_lines(path, "lines.jsonl", lines),
            read=lambda path, read=read: read(path / "lines.jsonl"),
            mutate=json_lines_mutation,
        )
        for name, lines, read in (
            ("records", _LINES, _read_all),
            ("prompts", _LINES, read_requests),
            ("questions", _LINES, read_questions),
            ("conversations", _CONVERSATIONS, read_requests),
        )
    ),
)
