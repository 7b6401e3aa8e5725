"""`MANIFEST.json` of a checkpoint: its step, the SHA-256 of each of its files, and a digest of itself.

    write_manifest(path, step=30, skipped_in_a_row=0)
    manifest = read_manifest(path)              # raises an error that says what is wrong with it
    changed_files(path, manifest)               # those that are missing or differ

Storage formats of arrays detect neither a flipped bit nor an incomplete copy. The digests do, and the
manifest's own digest shows that none of them is missing.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from slmjax.data.shards import file_sha256
from slmjax.stored_json import DamagedFile, check_object, read_object
from slmjax.telemetry.run_directory import write_json

MANIFEST = "MANIFEST.json"
_BLOCK = 4096  # bytes
_REMEDY = "this checkpoint cannot be verified, use another one"
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a manifest."""

    step: int
    files: dict[str, str]  # SHA-256 by path within the checkpoint
    # Steps right before it that were skipped since something was not finite. Above 0, the state may be that
    # of a run that is about to diverge.
    skipped_in_a_row: int = 0


def write_manifest(path: Path, *, step: int, skipped_in_a_row: int) -> None:
    """Write the manifest of a checkpoint whose other files are complete.

    Raises:
      OSError: a file cannot be read, or the manifest cannot be written.
    """
    content: dict[str, Any] = {"step": step, "skipped_in_a_row": skipped_in_a_row, "files": _digests(path)}
    write_json(path / MANIFEST, {**content, "digest": _digest(content)})


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
      FileNotFoundError: there is none.
      DamagedFile: it is not as it was written.
    """
    file = path / MANIFEST
    content = read_object(file, remedy=_REMEDY)
    if "digest" not in content:
        return _read_first_form(path, content)
    fields = {"step": int, "skipped_in_a_row": int, "files": dict}
    check_object(content, fields, name=str(file), remedy=_REMEDY)
    digest = content.pop("digest")
    if digest != _digest(content):
        raise DamagedFile(f"{file} was changed: {_REMEDY}")
    if unsound := [name for name, sha256 in content["files"].items() if not _is_sha256(sha256)]:
        raise DamagedFile(f"{file} has no SHA-256 for {unsound[0]!r}: {_REMEDY}")
    return Manifest(
        step=content["step"], skipped_in_a_row=content["skipped_in_a_row"], files=content["files"]
    )


def _read_first_form(path: Path, content: dict[str, Any]) -> Manifest:
    """Read the manifest of earlier versions, which had the files alone and no digest of itself."""
    file = path / MANIFEST
    unsound = [name for name, digest in content.items() if not _is_sha256(digest)]
    if unsound:
        raise DamagedFile(f"{file} has no SHA-256 for {unsound[0]!r}: {_REMEDY}")
    # Nothing else shows that an entry is missing. Hidden files are of the operating system or an editor.
    unlisted = [name for name in _files(path) if name not in content]
    if unlisted or not content:
        raise DamagedFile(f"{file} does not list {unlisted[0] if unlisted else 'any file'}: {_REMEDY}")
    meta = path / "meta" / "metadata"
    step = read_object(meta, {"step": int}, remedy=_REMEDY)["step"]
    return Manifest(step=step, files=content)


def changed_files(path: Path, manifest: Manifest) -> list[str]:
    """Return the files of a manifest that are missing, unreadable or changed, sorted.

    Files that it does not list are harmless.
    """
    # A name is opened only if it is that of a file here: a manifest from elsewhere could name any file of the
    # machine.
    present = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    return sorted(
        name
        for name, digest in manifest.files.items()
        if name not in present or _read_digest(path / name) != digest
    )


def size_of(path: Path) -> int:
    """Return about how many bytes a checkpoint's files take on a disk with blocks of the usual size."""
    sizes = ((path / name).stat().st_size for name in _files(path))
    return sum(-(-size // _BLOCK) * _BLOCK for size in sizes)


def _read_digest(file: Path) -> str | None:
    try:
        return file_sha256(file)
    except OSError:
        return None


def _digests(path: Path) -> dict[str, str]:
    return {name: file_sha256(path / name) for name in _files(path)}


def _files(path: Path) -> list[str]:
    """Return the names of a checkpoint's files, without its manifest and hidden ones."""
    files = (file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    return sorted(str(file.relative_to(path)) for file in files if file != path / MANIFEST)


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
