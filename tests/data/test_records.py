"""Files of records: every layout and compression gives the same documents, and what cannot be read is an
error that names the file.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from slmjax.cli.generating import Request, _read_requests
from slmjax.data.config import DataConfig
from slmjax.data.documents import Problem
from slmjax.data.files import file_kind
from slmjax.data.preparation import prepare
from slmjax.data.records import JsonStream, read_records
from slmjax.data.sources import TextSource
from slmjax.data.tokenizers import ByteTokenizer
from slmjax.evaluation.multiple_choice import read_questions


def cells(records: Sequence[Mapping[str, Any]]) -> bytes:
    """As CSV."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue().encode()


RECORDS = [
    {"prompt": f'Question {i}, "quoted",\nsecond line\ttab é?', "completion": f"yes {i}\u2028 🙂"}
    for i in range(20)
]


def lines(records: Sequence[Mapping[str, Any]] = RECORDS) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def table(delimiter: str) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, ["completion", "prompt"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return stream.getvalue().encode()


def parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), sink)
    return sink.getvalue()


def zstd(content: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(content, codec="zstd", asbytes=True)


FILES: dict[str, Callable[[], bytes]] = {
    "x.jsonl": lines,
    "x.JSONL": lines,
    "x.ndjson": lambda: b"\xef\xbb\xbf" + lines(),
    "lines.json": lines,
    "array.json": lambda: json.dumps(RECORDS).encode(),
    "indented.Json": lambda: json.dumps(RECORDS, indent=4, ensure_ascii=False).encode(),
    "one_after_another.json": lambda: b"\n".join(json.dumps(record, indent=1).encode() for record in RECORDS),
    "array.jsonl": lambda: json.dumps(RECORDS, indent=1).encode(),
    "x.csv": lambda: table(","),
    "x.CSV": lambda: b"\xef\xbb\xbf" + table(","),
    "x.tsv": lambda: table("\t"),
    "x.parquet": parquet,
    "x.PARQUET": parquet,
    "no_suffix": parquet,
    "x.jsonl.gz": lambda: gzip.compress(lines()),
    "x.JSONL.GZ": lambda: (
        gzip.compress(lines()[:500]) + gzip.compress(lines()[500:])
    ),  # two members, as `cat a.gz b.gz` makes them
    "gzip_by_another_name.jsonl": lambda: gzip.compress(lines()),
    "x.json.gz": lambda: gzip.compress(json.dumps(RECORDS).encode()),
    "x.csv.bz2": lambda: bz2.compress(table(",")),
    "x.tsv.xz": lambda: lzma.compress(table("\t")),
    "x.jsonl.zst": lambda: zstd(lines()),
    "x.json.ZST": lambda: zstd(json.dumps(RECORDS).encode()),
    "x.csv.zst": lambda: zstd(table(",")[:500]) + zstd(table(",")[500:]),
}


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("name", FILES)
def test_every_layout_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    source = TextSource(
        path=str(write(tmp_path / name, FILES[name]())), prompt_field="prompt", completion_field="completion"
    )
    assert [(one.prompt, one.text) for one in source.documents()] == [
        (one["prompt"], one["completion"]) for one in RECORDS
    ]
    assert len({one.id for one in source.documents()}) == 20


def test_one_object_in_each_file_of_a_directory(tmp_path: Path) -> None:
    for i, record in enumerate(RECORDS):
        write(tmp_path / f"{i:02}.json", json.dumps(record, indent=2 if i % 2 else None))
    source = TextSource(path=str(tmp_path), text_field="completion")
    assert [one.text for one in source.documents()] == [one["completion"] for one in RECORDS]


@pytest.mark.parametrize(
    ("name", "compress"),
    [("a.txt.gz", gzip.compress), ("a.md.ZST", zstd), ("a.py.bz2", bz2.compress), ("a", lzma.compress)],
)
def test_compressed_text_is_one_document(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes]
) -> None:
    (document,) = TextSource(path=str(write(tmp_path / name, compress("one\r\ntwo é".encode())))).documents()
    assert (document.id, document.text) == (name, "one\r\ntwo é")


# What cannot be read ----------------------------------------------------------------------------------------


def zip_archive() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x.jsonl", lines())
    return stream.getvalue()


TAR = b"x.jsonl".ljust(257, b"\0") + b"ustar"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.zip", zip_archive(), "x.zip is a ZIP archive.*JSON lines.*glob"),
        ("x.tar", TAR, "x.tar is a tar archive"),
        ("x.tar.gz", gzip.compress(TAR, mtime=0), "x.tar.gz is a tar archive"),
        ("x.arrow", b"ARROW1\0\0", "an Arrow file"),
        ("x.pdf", b"%PDF-1.7 ...", "a PDF file"),
        ("x.parquet.gz", gzip.compress(b"PAR1", mtime=0), "decompress it first"),
        ("x.jsonl.gz", lines(), r"is named \.gz but is not gzip data"),
        ("x.jsonl.gz", gzip.compress(lines(), mtime=0)[:-20], "x.jsonl.gz is damaged"),
        ("x.jsonl.zst", zstd(lines())[:-20], "x.jsonl.zst is damaged"),
        ("x.csv.xz", lzma.compress(table(","))[:-20], "x.csv.xz is damaged"),
        ("x.json", json.dumps(RECORDS)[:-20], "record 20: broken JSON"),
        ("x.json", json.dumps(RECORDS)[:-1], "x.json is cut short"),
        ("x.json", json.dumps(RECORDS) + "{}", "has text after its array"),
        ("x.json", "[" * 100_000, "record 1: broken JSON"),
        ("x.csv", 'prompt,completion\na,b\nc,"d\ne,f\n', "x.csv, line 3: broken CSV"),
        (
            "x.csv",
            "a question,an answer\nc,d\n",
            "no field 'completion', but 'a question', 'an answer'.*first row must name",
        ),
        (
            "x.txt",
            "plain",
            (
                "no file of records, so that prompt_field='prompt' has no effect.*leave out prompt_field and "
                "completion_field"
            ),
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes | str, message: str) -> None:
    source = TextSource(
        path=str(write(tmp_path / name, content)), prompt_field="prompt", completion_field="completion"
    )
    with pytest.raises(ValueError, match=message):
        list(source.documents())


@pytest.mark.parametrize(
    ("content", "what"), [(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary"), ("two".encode("utf-16"), "UTF-16")]
)
def test_files_that_are_no_text_are_bad_documents(tmp_path: Path, content: bytes, what: str) -> None:
    write(tmp_path / "a.txt", "text")
    write(tmp_path / "b.png", content)
    text, image = TextSource(path=str(tmp_path)).documents()
    assert (text.text, text.problem) == ("text", None)
    assert image.problem is Problem.BINARY and what in image.detail and image.where.endswith("b.png")


def test_zstd_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.jsonl.zst", zstd(lines()))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'slmjax\[parquet\]'"):
        file_kind(path)


def test_a_broken_record_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", '{"text": "a"}\n{"text": \n["b"]\n{"text": "c"}\n')
    assert [None if one.values is None else one.values["text"] for one in read_records(path)] == [
        "a",
        None,
        None,
        "c",
    ]
    path = write(tmp_path / "x.csv", "text,more\na,1\nb\nc,3\n\n")
    result = list(read_records(path))
    assert [None if one.values is None else one.values["text"] for one in result] == ["a", None, "c"]
    assert (
        result[1].where.endswith("x.csv, line 3")
        and "1 fields instead of the 2 that the first row names" in result[1].detail
    )


# Memory -----------------------------------------------------------------------------------------------------


class Counted(io.StringIO):
    """A stream that knows how much was read of it."""

    def read(self, size: int | None = -1, /) -> str:
        text = super().read(size)
        self.read_so_far = getattr(self, "read_so_far", 0) + len(text)
        return text


def test_an_array_is_read_as_a_stream() -> None:
    long = "x" * 300_000
    stream = Counted(json.dumps([{"text": "a" * 1000}] * 1000 + [{"text": long}, 12, 34.5, True, None, "é"]))
    values = JsonStream(stream)
    assert values.take("[") and values.value() == {"text": "a" * 1000}
    assert stream.read_so_far < 200_000
    for _ in range(999):
        values.require(",")
        assert values.value() == {"text": "a" * 1000}
    rest = []
    while values.take(","):
        rest.append(values.value())
    assert rest == [{"text": long}, 12, 34.5, True, None, "é"]
    assert values.take("]") and values.at_end()


def test_broken_json_is_found_before_the_rest_is_read() -> None:
    stream = Counted('[{"text": oops}, ' + "1, " * 1_000_000)
    values = JsonStream(stream)
    values.take("[")
    with pytest.raises(ValueError, match="Expecting value"):
        values.value()
    assert stream.read_so_far < 200_000


# Other readers of records -----------------------------------------------------------------------------------


def test_fields_without_a_path_are_an_error(tmp_path: Path) -> None:
    data = DataConfig(prompt_field="prompt", completion_field="completion", cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="data.prompt_field='prompt' has no effect without data.path"):
        prepare(data, ByteTokenizer())


@pytest.mark.parametrize("name", ["x.JSONL", "array.json", "x.jsonl.gz", "x.csv", "x.parquet"])
def test_prompts_of_a_file(tmp_path: Path, name: str) -> None:
    requests = _read_requests(write(tmp_path / name, FILES[name]()))
    assert [one.prompt for one in requests] == [one["prompt"] for one in RECORDS]


@pytest.mark.parametrize("name", ["q.JSONL", "q.json", "q.jsonl.gz", "q.csv"])
def test_questions_of_a_file(tmp_path: Path, name: str) -> None:
    questions = [{"prompt": f"{i}+1=", "choices": ["1", "2"], "answer": i} for i in range(2)]
    content = {
        "q.JSONL": lines(questions),
        "q.json": json.dumps(questions, indent=1).encode(),
        "q.jsonl.gz": gzip.compress(lines(questions)),
        "q.csv": cells([{**one, "choices": json.dumps(one["choices"])} for one in questions]),
    }
    result = read_questions(write(tmp_path / name, content[name]))
    assert [(one.prompt, one.choices, one.answer) for one in result] == [
        ("0+1=", ("1", "2"), 0),
        ("1+1=", ("1", "2"), 1),
    ]


def test_conversations_and_seeds_in_the_cells_of_a_table(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "12"}]
    records = [
        {"prompt": "12", "messages": "", "seed": 3},
        {"prompt": "", "messages": json.dumps(asked), "seed": ""},
    ]
    result = _read_requests(write(tmp_path / "x.csv", cells(records)))
    assert result == [Request("12", 3), Request(None, messages=asked)]
    with pytest.raises(ValueError, match="line 2: seed is 'three'"):
        _read_requests(write(tmp_path / "x.csv", cells([{"prompt": "12", "seed": "three"}])))
