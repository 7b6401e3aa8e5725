"""Sources of text: their interface, and local files.

A source is a frozen dataclass whose `documents()` yields every document in a fixed order, good or bad: the
policy for bad documents is elsewhere (documents.py). `fingerprint()` changes whenever the documents would.

Local text: a file of records (JSON lines, JSON, CSV, TSV, Parquet: `files.py`, `records.py`) is one document
per record, any other text file is one document; both may be compressed. A directory stands for all files
below it except hidden ones, sorted; a glob for its matches, sorted.
"""

import abc
import dataclasses
import glob
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slmjax.config import added_field, near_names
from slmjax.data.documents import Document, Problem
from slmjax.data.files import READABLE, FileKind, decode, file_kind, read_bytes
from slmjax.data.records import read_records

_FULLY_HASHED = 64 << 20  # larger files are fingerprinted by size, modification time and their two ends
_ENDS = 1 << 20
# Part of the fingerprint: change it when the same files are read as other documents.
_READING = "text, version 2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig(abc.ABC):
    """A source of documents."""

    @abc.abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yield every document, in the same order each time. ValueError if there is nothing to read."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of the documents, independent of their location if possible."""

    @abc.abstractmethod
    def describe(self) -> str:
        """Return a short description for messages."""

    @abc.abstractmethod
    def size_hint(self) -> int | None:
        """Return the approximate bytes of text, for the progress bar; None if they are unknown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSource(SourceConfig):
    """Local files: text, records (JSON lines, JSON, CSV, TSV, Parquet), a directory, a glob."""

    path: str  # a file, a directory (read recursively) or a glob
    text_field: str = "text"  # the field of a record that holds the text
    # with completion_field: records are pairs, and the prompt is not trained on
    prompt_field: str | None = None
    completion_field: str | None = None  # the field that is trained on after prompt_field
    # the field of a conversation's messages, {"role", "content"} each
    messages_field: str | None = added_field(None, before=None)

    def __post_init__(self) -> None:
        if self.messages_field is not None and (self.prompt_field is not None or self.text_field != "text"):
            raise ValueError(
                "messages_field excludes text_field, prompt_field and completion_field: records are "
                "conversations"
            )
        if (self.prompt_field is None) != (self.completion_field is None):
            raise ValueError(
                "prompt_field and completion_field go together: give both, or neither and text_field"
            )

    def documents(self) -> Iterator[Document]:
        # All files are checked before the first document, so that an archive is reported at once.
        kinds = [(name, path, file_kind(path)) for name, path in self._files()]
        if (fields := changed_fields(self)) and not any(kind.has_records for _, _, kind in kinds):
            raise ValueError(
                f"{self.path} has no file of records, so that {fields[0]}={getattr(self, fields[0])!r} has "
                f"no effect: leave out {' and '.join(fields)} to train on text files, or give records. "
                f"{READABLE}"
            )
        for name, path, kind in kinds:
            if kind.binary:
                yield Document(
                    id=name, where=str(path), problem=Problem.BINARY, detail=f"the file is {kind.binary}"
                )
            elif kind.has_records:
                yield from self._records(name, path, kind)
            else:
                yield Document(id=name, where=str(path), text=decode(read_bytes(path, kind)))

    def fingerprint(self) -> str:
        fields = (self.text_field, self.prompt_field, self.completion_field)
        # Added only if used, so that older fingerprints stay.
        fields += () if self.messages_field is None else ("messages", self.messages_field)
        return combined_hash(
            _READING, *map(str, fields), *(f"{name} {file_fingerprint(path)}" for name, path in self._files())
        )

    def describe(self) -> str:
        return self.path

    def size_hint(self) -> int | None:
        kinds = [(path, file_kind(path)) for _, path in self._files()]
        # The size of compressed text is unknown before it is read.
        if any(kind.compression is not None for _, kind in kinds):
            return None
        return sum(path.stat().st_size for path, _ in kinds)

    def _files(self) -> list[tuple[str, Path]]:
        return find_files(self.path)

    def _fields(self) -> tuple[str, ...]:
        if self.messages_field is not None:
            return (self.messages_field,)
        if self.prompt_field is None or self.completion_field is None:
            return (self.text_field,)
        return (self.completion_field, self.prompt_field)

    def _option(self) -> str:
        """Return the command-line option that names the fields."""
        if self.messages_field is not None:
            return "--data.messages-field"
        return (
            "--data.text-field"
            if self.prompt_field is None
            else "--data.prompt-field, --data.completion-field"
        )

    def _records(self, name: str, path: Path, kind: FileKind) -> Iterator[Document]:
        fields = self._fields()
        for record in read_records(path, kind, fields=fields, option=self._option()):
            id = f"{name}:{record.key}"
            if record.values is None:
                yield Document(id=id, where=record.where, problem=Problem.BROKEN_RECORD, detail=record.detail)
            else:
                make = record_document if self.messages_field is None else conversation_document
                yield make(record.values, fields, id=id, where=record.where)


def changed_fields(config: Any) -> list[str]:
    """The options of a dataclass that name fields of records and are not at their default."""
    fields = [field for field in dataclasses.fields(config) if field.name.endswith("_field")]
    return [field.name for field in fields if getattr(config, field.name) != field.default]


def find_files(path: str) -> list[tuple[str, Path]]:
    """Return (name below the directory, path) of the files of `path`: a file, a directory or a glob.

    Raises:
        ValueError: there are none.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return [(root.name, root)]
    if root.is_dir():
        below = [file.relative_to(root) for file in root.rglob("*") if file.is_file()]
        names = sorted(
            name.as_posix() for name in below if not any(part.startswith(".") for part in name.parts)
        )
        if not names:
            raise ValueError(
                f"{path} has no files: put text or files of records there, or give another directory"
            )
        return [(name, root / name) for name in names]
    # Ids of documents are relative to the part of the pattern without wildcards, so that moving the data
    # keeps them.
    if glob.has_magic(path):
        matches = sorted(match for match in glob.glob(str(root), recursive=True) if Path(match).is_file())
        if not matches:
            raise ValueError(f"no file matches {path!r}: put quotes around a glob, and use ** for any depth")
        fixed = [part for part in root.parts if not glob.has_magic(part)]
        base = (
            Path(*root.parts[: next(i for i, part in enumerate(root.parts) if glob.has_magic(part))])
            if fixed
            else Path()
        )
        return [(Path(match).relative_to(base).as_posix(), Path(match)) for match in matches]
    # A typing error is the most likely reason.
    siblings = [entry.name for entry in root.parent.iterdir()] if root.parent.is_dir() else []
    raise ValueError(
        f"{path} does not exist (looked in {root.parent.absolute()}).{near_names(root.name, siblings)} "
        "Name the text with --data.path"
    )


def record_document(record: Mapping[str, Any], fields: tuple[str, ...], *, id: str, where: str) -> Document:
    """Return a document from a record's fields (text,) or (completion, prompt), str or UTF-8 bytes."""
    values = []
    for field in fields:
        value = record.get(field)
        if not isinstance(value, str | bytes):
            names = ", ".join(map(repr, list(record)[:12])) or "none"
            detail = (
                f"field {field!r} holds {type(value).__name__}, not text"
                if field in record
                else f"no field {field!r}; the record has {names}.{near_names(field, record)}"
                f"{_field_option(record, fields)}"
            )
            return Document(id=id, where=where, problem=Problem.MISSING_FIELD, detail=detail)
        values.append(decode(value) if isinstance(value, bytes) else value)
    return Document(
        id=id, where=where, text=values[0], prompt=values[1] if len(values) > 1 else "", is_record=True
    )


def _field_option(record: Mapping[str, Any], fields: tuple[str, ...]) -> str:
    """Return the option that names the field of this record, as a sentence to append; "" if none would do."""
    texts = [name for name, value in record.items() if isinstance(value, str | bytes) and value]
    messages = [
        name
        for name, value in record.items()
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value)
    ]
    if len(fields) > 1:
        return " Name the fields with --data.prompt-field and --data.completion-field." if texts else ""
    if messages:
        return f" For conversations, use --data.messages-field {messages[0]}."
    if not texts:
        return ""
    # The longest text is more likely the document than an identifier or a title is.
    likely = max(texts, key=lambda name: len(record[name]))
    return f" Name the field of the text with --data.text-field, for example --data.text-field {likely}."


def conversation_document(
    record: Mapping[str, Any], fields: tuple[str, ...], *, id: str, where: str
) -> Document:
    """Return a document from a record's field of messages: a list, or its JSON as text (in a table)."""
    (field,) = fields
    value = record.get(field)
    if value is None or isinstance(value, str | bytes):
        document = record_document(record, fields, id=id, where=where)
        return dataclasses.replace(document, is_conversation=True)
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        return Document(
            id=id,
            where=where,
            problem=Problem.BAD_CONVERSATION,
            detail=f"field {field!r} is not plain data ({error})",
        )
    return Document(id=id, where=where, text=text, is_conversation=True, is_record=True)


def combined_hash(*parts: str) -> str:
    """Return one hex digest of several strings."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def file_fingerprint(path: Path) -> str:
    """Return size and content hash; of a large file size, modification time and the hash of its ends."""
    status = path.stat()
    with path.open("rb") as stream:
        if status.st_size <= _FULLY_HASHED:
            return f"{status.st_size} {hashlib.file_digest(stream, 'sha256').hexdigest()}"
        # Hashing a large file would take longer than the rest of the start of a run.
        digest = hashlib.sha256(stream.read(_ENDS))
        stream.seek(-_ENDS, 2)
        digest.update(stream.read())
    return f"{status.st_size} {status.st_mtime_ns} {digest.hexdigest()}"
