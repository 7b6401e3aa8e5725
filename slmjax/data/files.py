"""The kind of a local file, by its suffix (in any case) and its first bytes, and its decompressed content.

    kind = file_kind(path)      # FileKind(layout=CSV, compression=GZIP); refuses archives and the like
    with open_bytes(path, kind) as stream: ...
    read_bytes(path, kind)      # of a text file

By suffix: .jsonl and .ndjson are JSON lines, then .json, .csv, .tsv, .parquet; any other name is text. A
further suffix .gz, .bz2, .xz or .zst means compression. Compressed content and Parquet are recognised under
any name.
"""

import bz2
import contextlib
import dataclasses
import enum
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

_HEAD = 8192  # bytes at the start of a file by which its kind is recognised
READABLE = (
    "slmjax reads UTF-8 text, JSON lines (.jsonl, .ndjson), JSON (.json), CSV (.csv), TSV (.tsv) and Parquet "
    "(.parquet), and all but Parquet also compressed (.gz, .bz2, .xz, .zst)"
)


class Layout(enum.Enum):
    """The layout of the documents of a file."""

    TEXT = "text"
    JSON_LINES = "JSON lines"
    JSON = "JSON"
    CSV = "CSV"
    TSV = "TSV"
    PARQUET = "Parquet"


class Compression(enum.Enum):
    """The compression of a file."""

    GZIP = "gzip"
    BZIP2 = "bzip2"
    XZ = "xz"
    ZSTD = "zstd"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileKind:
    """The layout and compression of a file."""

    layout: Layout
    compression: Compression | None = None
    binary: str = ""  # description of a file without text, such as "UTF-16 text"; "" for a readable file

    @property
    def has_records(self) -> bool:
        """Return whether the file holds records with fields."""
        return self.layout is not Layout.TEXT


# What a file is ---------------------------------------------------------------------------------------------
_LAYOUTS = {
    ".jsonl": Layout.JSON_LINES,
    ".ndjson": Layout.JSON_LINES,
    ".json": Layout.JSON,
    ".csv": Layout.CSV,
    ".tsv": Layout.TSV,
    ".parquet": Layout.PARQUET,
}
_COMPRESSIONS = {
    ".gz": Compression.GZIP,
    ".gzip": Compression.GZIP,
    ".bz2": Compression.BZIP2,
    ".xz": Compression.XZ,
    ".zst": Compression.ZSTD,
    ".zstd": Compression.ZSTD,
}
_COMPRESSED = {
    b"\x1f\x8b": Compression.GZIP,
    b"BZh": Compression.BZIP2,
    b"\xfd7zXZ\x00": Compression.XZ,
    b"\x28\xb5\x2f\xfd": Compression.ZSTD,
}
_UNREADABLE = {
    b"PK\x03\x04": "a ZIP archive (or an Office file)",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"ARROW1": "an Arrow file",
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
    b"SQLite format 3\x00": "an SQLite database",
    b"\x89HDF\r\n": "an HDF5 file",
    b"%PDF-": "a PDF file",
}
# The magic bytes of a tar archive are in the middle of its first header.
_TAR_OFFSET = 257
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def file_kind(path: Path) -> FileKind:
    """Return the kind of a file, by its suffix and its first bytes.

    A file with a NUL in its first 8 KiB is binary (git's rule), and so is UTF-16: `FileKind.binary` says what
    it is.

    Raises:
      ValueError: an archive or a data format that is not read, or content that is not what the suffix says.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    # A suffix such as .csv.gz has the layout before the compression.
    named = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    suffix = "".join(suffixes[-2:-1] if named else suffixes[-1:])
    layout = _LAYOUTS.get(suffix, Layout.TEXT)
    with path.open("rb") as stream:
        head = stream.read(_HEAD)
    compression = next((kind for magic, kind in _COMPRESSED.items() if head.startswith(magic)), None)
    # A renamed file would otherwise fail later, with an error of the decompressor.
    if named is not None and compression is not named and head:
        raise ValueError(
            f"{path} is named {suffixes[-1]} but is not {named.value} data: rename or replace it"
        )
    if compression is not None:
        with open_bytes(path, FileKind(layout=layout, compression=compression)) as stream:
            head = stream.read(_HEAD)
    # Parquet needs random access to its end, which a decompressed stream does not have.
    if head.startswith(b"PAR1"):
        layout = Layout.PARQUET
    # Parquet needs random access, and compresses its columns itself.
    if compression is not None and layout is Layout.PARQUET:
        raise ValueError(
            f"{path} is a compressed Parquet file, which cannot be read as a stream: decompress it first"
        )
    return FileKind(
        layout=layout, compression=compression, binary="" if layout is Layout.PARQUET else _binary(head, path)
    )


def _binary(head: bytes, path: Path) -> str:
    """Describe content that is not UTF-8 text; "" for text. ValueError for archives and data formats."""
    refused = next((name for magic, name in _UNREADABLE.items() if head.startswith(magic)), "")
    if head[_TAR_OFFSET : _TAR_OFFSET + 5] == b"ustar":
        refused = "a tar archive"
    if any(head.startswith(magic) for magic in _COMPRESSED):
        refused = "compressed twice"
    if refused:
        raise ValueError(
            f"{path} is {refused}. {READABLE}: unpack or convert it, or leave it out with a glob"
        )
    # UTF-16 has NUL bytes in most texts, so it is recognised before binary files.
    if head.startswith(_UTF16_MARKS):
        return "UTF-16 text, not UTF-8: convert it, for example with iconv -f UTF-16 -t UTF-8"
    return f"a binary file (it holds a NUL byte). {READABLE}" if b"\0" in head else ""


@contextlib.contextmanager
def open_bytes(path: Path, kind: FileKind) -> Iterator[io.BufferedIOBase]:
    """Open the decompressed content as a stream. Raises ValueError for damaged compressed data."""
    if kind.compression is None:
        with path.open("rb") as stream:
            yield stream
        return
    try:
        with contextlib.closing(_OPENERS[kind.compression](path)) as stream:
            yield stream
    # Each library raises its own errors for damaged data.
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(
            f"{path} is damaged: its {kind.compression.value} data cannot be read to the end ({error})"
        ) from error


@contextlib.contextmanager
def open_text(path: Path, kind: FileKind, *, newline: str | None = None) -> Iterator[io.TextIOBase]:
    """Open the decompressed content as characters, without a byte order mark. Raises as `open_bytes`."""
    with (
        open_bytes(path, kind) as stream,
        io.TextIOWrapper(
            cast(Any, stream), encoding="utf-8-sig", errors="surrogateescape", newline=newline
        ) as text,
    ):
        yield text


def _open_zstd(path: Path) -> io.BufferedIOBase:
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(f"{path}: reading zstd needs pyarrow: pip install 'slmjax[parquet]'") from error
    # pyarrow is an optional dependency that Parquet needs already; Python gets zstd only in 3.14.
    return io.BufferedReader(cast(Any, pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")))


_OPENERS: dict[Compression, Callable[[Path], Any]] = {
    Compression.GZIP: gzip.open,
    Compression.BZIP2: bz2.open,
    Compression.XZ: lzma.open,
    Compression.ZSTD: _open_zstd,
}


def decode(raw: bytes) -> str:
    """Decode UTF-8; each invalid byte becomes a lone surrogate, which the policy detects."""
    return raw.decode("utf-8", "surrogateescape")


def read_bytes(path: Path, kind: FileKind) -> bytes:
    """Return the decompressed content. Raises ValueError for damaged compressed data."""
    with open_bytes(path, kind) as stream:
        return stream.read()
