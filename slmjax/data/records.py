"""Read files of records as a stream: JSON lines, JSON, CSV, TSV and Parquet, all but Parquet also compressed.

    for record in read_records(path):
        record.values["prompt"]

The layouts (found by `files.file_kind`):
  JSON lines   one JSON object on each line; a broken line is one broken record
  JSON         one array of objects, objects one after another, or JSON lines
  CSV, TSV     the first row names the fields; quoted fields (") may contain line breaks; values are text
  Parquet      one record per row

Invalid UTF-8 becomes lone surrogates (`errors="surrogateescape"`), which the policy for bad documents finds.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slmjax.config import near_names
from slmjax.data.files import READABLE, FileKind, Layout, decode, file_kind, open_bytes, open_text

_CHUNK = 1 << 16  # characters read at a time from a JSON array
# most characters of a JSON token, other than a string, after the position of an error
_LONGEST_TOKEN = 16
_LONGEST_FIELD = 2**31 - 1  # characters of a CSV field
_PARQUET_ROWS = 256  # in memory at a time
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One record of a file."""

    key: str  # line, row or number within the file
    where: str  # the file and the key, for messages
    values: Mapping[str, Any] | None  # by field; None if the record is broken
    detail: str = ""  # description of a broken record


def read_records(
    path: Path,
    kind: FileKind | None = None,
    *,
    fields: Sequence[str] | None = None,
    option: str = "",
) -> Iterator[Record]:
    """Return the records of a file, in order.

    Args:
      path: the file.
      kind: the result of `file_kind`; None to call it.
      fields: the fields that every record must have, if the file defines them for all records (CSV, TSV,
        Parquet); of Parquet only these are read. None: all.
      option: the command-line option that names them, for errors.

    Raises:
      ValueError: the file has no records, is damaged so that the rest cannot be read, or lacks one of
        `fields`.
    """
    kind = file_kind(path) if kind is None else kind
    if kind.binary:
        raise ValueError(f"{path} is {kind.binary}")
    if kind.layout is Layout.TEXT:
        raise ValueError(f"{path} holds text, not records. {READABLE}")
    hint = f" Name the field with {option}." if option else ""
    if kind.layout is Layout.PARQUET:
        return _parquet(path, fields, hint)
    if kind.layout in (Layout.CSV, Layout.TSV):
        return _csv(path, kind, fields, hint)
    return _json_lines(path, kind) if _is_json_lines(path, kind) else _json_values(path, kind)


def read_objects(path: Path) -> list[Record]:
    """Return all records of a file, for prompts or questions that must not be skipped.

    Raises:
      ValueError: a record is broken or is not UTF-8, or as `read_records`.
    """
    records = []
    for record in read_records(path):
        if record.values is None:
            raise ValueError(f"{record.where}: {record.detail}")
        try:
            json.dumps(record.values, ensure_ascii=False, default=str).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{record.where} is not UTF-8 text ({error}): convert it first") from error
        records.append(record)
    return records


def value_in_cell(value: Any) -> Any:
    """Return the value of a cell of a table, where CSV and TSV hold lists and integers as JSON.

    Returns:
      the list or integer of which a text is the JSON; None for blank text; else the value.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return decoded if isinstance(decoded, list) or type(decoded) is int else value


def require_fields(fields: Iterable[str], known: Iterable[str], *, where: str, hint: str = "") -> None:
    """Raise ValueError if a field is not among the known ones of a dataset or file."""
    known = list(known)
    for field in fields:
        if field not in known:
            raise ValueError(
                f"{where} has no field {field!r}, but "
                f"{', '.join(map(repr, known))}.{near_names(field, known)}{hint}"
            )


# JSON -------------------------------------------------------------------------------------------------------
def _is_json_lines(path: Path, kind: FileKind) -> bool:
    """Return whether each line is a value, by the first line that is not blank and by the suffix."""
    with open_bytes(path, kind) as stream:
        head = stream.read(_CHUNK).removeprefix(_BOM).lstrip()
        line, newline, rest = head.partition(b"\n")
        # The first line is longer than the chunk, so only its first character can decide.
        if not newline and len(head) > _CHUNK // 2:  # a line of more than a chunk
            return not head.startswith(b"[")
        # One object alone is both JSON and JSON lines.
        is_last = not rest.strip() and not stream.read(_CHUNK).strip()
    try:
        is_object = isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return kind.layout is Layout.JSON_LINES and not head.startswith(b"[")
    return is_object or not is_last


def _json_lines(path: Path, kind: FileKind) -> Iterator[Record]:
    with open_bytes(path, kind) as stream:
        for number, raw in enumerate(stream, start=1):
            line = decode(raw.removeprefix(_BOM) if number == 1 else raw)
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Record(key=str(number), where=where, values=None, detail=f"not JSON ({error})")
                continue
            yield _json_record(value, key=str(number), where=where)


def _json_record(value: Any, *, key: str, where: str) -> Record:
    if isinstance(value, dict):
        return Record(key=key, where=where, values=value)
    return Record(
        key=key, where=where, values=None, detail=f"a JSON {type(value).__name__}, not an object with fields"
    )


def _json_values(path: Path, kind: FileKind) -> Iterator[Record]:
    """Yield the elements of one array, or values one after another."""
    with open_text(path, kind) as text:
        values = JsonStream(text)
        is_array = values.take("[")
        number = 0
        while not values.at_end() and not (is_array and values.take("]")):
            number += 1
            where = f"{path}, record {number}"
            try:
                if is_array and number > 1:
                    values.require(",")
                value = values.value()
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{where}: broken JSON ({error}), so that the rest cannot be read: repair the file"
                ) from error
            yield _json_record(value, key=str(number), where=where)
        if is_array and not (values.closed and values.at_end()):
            raise ValueError(
                f"{path} is cut short, or has text after its array (after record {number}): repair the file"
            )


class JsonStream:
    """JSON values read from a text stream on demand; the buffer holds one value and a chunk."""

    def __init__(self, stream: io.TextIOBase) -> None:
        self._stream = stream
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        # Index in the buffer of the first character that was not read yet.
        self._start = 0
        # The buffer reaches the end of the stream.
        self._is_complete = False
        self.closed = False  # "]" was taken

    def at_end(self) -> bool:
        """Return whether only white space is left."""
        while True:
            while self._start < len(self._buffer) and self._buffer[self._start] in " \t\r\n":
                self._start += 1
            if self._start < len(self._buffer):
                return False
            if self._is_complete:
                return True
            self._read(_CHUNK)

    def take(self, character: str) -> bool:
        """Return whether this character comes next, and skip it if so."""
        if self.at_end() or self._buffer[self._start] != character:
            return False
        self._start += 1
        self.closed = character == "]"
        return True

    def require(self, character: str) -> None:
        """Skip this character. Raises ValueError if another one comes next."""
        if not self.take(character):
            raise ValueError(
                f"expected {character!r}, found {self._buffer[self._start : self._start + 20]!r}"
            )

    def value(self) -> Any:
        """Return the next value. Raises ValueError if it is broken or cut short."""
        size = _CHUNK
        while True:
            end_reached = self.at_end()
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._start)
            except ValueError as error:
                if end_reached or self._is_complete or self._is_broken(error):
                    raise
            else:
                if (
                    end < len(self._buffer) or self._is_complete
                ):  # else it may be the beginning of a longer number
                    self._start = end
                    return value
            self._read(size)
            # Doubling keeps the total work linear in the size of a value.
            size *= 2

    def _is_broken(self, error: ValueError) -> bool:
        """Return whether the error is more than the end of the buffer inside a value."""
        assert isinstance(error, json.JSONDecodeError)
        return (
            # An error near the end of the buffer may come from the cut, one far from it cannot.
            not error.msg.startswith("Unterminated string") and error.pos < len(self._buffer) - _LONGEST_TOKEN
        )

    def _read(self, size: int) -> None:
        chunk = self._stream.read(size)
        self._is_complete = not chunk
        self._buffer = self._buffer[self._start :] + chunk
        self._start = 0


# Tables -----------------------------------------------------------------------------------------------------
def _csv(path: Path, kind: FileKind, fields: Sequence[str] | None, hint: str) -> Iterator[Record]:
    # The limit is that of the process. Its default of 128 KiB is too short for a document.
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    delimiter = "\t" if kind.layout is Layout.TSV else ","
    with open_text(path, kind, newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        names: list[str] | None = None
        line = 1
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise ValueError(
                    f"{path}, line {line}: broken {kind.layout.value} ({error}), so that the rest cannot be "
                    "read: check the quotes"
                ) from error
            if row is None:
                return
            # The line on which the record begins: quoted fields may contain line breaks.
            where = f"{path}, line {line}"
            key = str(line)
            line = reader.line_num + 1
            # Blank lines, for example at the end of the file, are not records.
            if not row:
                continue
            if names is None:
                names = row
                hint = f" The first row must name the fields.{hint}"
                require_fields(fields or (), names, where=str(path), hint=hint)
            elif len(row) != len(names):
                yield Record(
                    key=key,
                    where=where,
                    values=None,
                    detail=f"{len(row)} fields instead of the {len(names)} that the first row names",
                )
            else:
                yield Record(key=key, where=where, values=dict(zip(names, row, strict=True)))


def _parquet(path: Path, fields: Sequence[str] | None, hint: str) -> Iterator[Record]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install 'slmjax[parquet]'") from error
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:  # pyarrow.ArrowInvalid
        raise ValueError(
            f"{path} is not a readable Parquet file ({error}): replace it, or leave it out with a glob"
        ) from error
    with file:
        names = list(file.schema_arrow.names)
        require_fields(fields or (), names, where=str(path), hint=hint)
        # Reading only the needed columns saves most of the time for wide tables.
        names = names if fields is None else list(fields)
        row = 0
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=names):
            columns = [_values_of(batch.column(name)) for name in names]
            for values in zip(*columns, strict=True):
                text = [decode(value) if isinstance(value, bytes) else value for value in values]
                yield Record(
                    key=str(row), where=f"{path}, row {row}", values=dict(zip(names, text, strict=True))
                )
                row += 1


def _values_of(column: Any) -> list[Any]:
    """Return the values of an Arrow column, text as bytes: Arrow does not check UTF-8, the policy does."""
    import pyarrow

    # A column of repeated values may be stored as indices into a dictionary.
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()
