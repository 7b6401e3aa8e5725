"""Sources yield what is there, in one order; the policy decides about bad documents and counts them."""

import dataclasses
import json
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest

from slmjax.data.dataset_sources import HuggingFaceSource
from slmjax.data.documents import BadCounts, Document, Gatekeeper, OnBadDocument, Problem
from slmjax.data.sources import TextSource
from slmjax.data.stdlib_corpus import StdlibSource


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(source: TextSource) -> list[tuple[str, str]]:
    return [(document.id, document.text) for document in source.documents()]


# The standard library ---------------------------------------------------------------------------------------


def test_stdlib_is_the_running_pythons_own() -> None:
    documents = {document.id: document for document in StdlibSource().documents()}
    library = Path(sysconfig.get_path("stdlib"))
    assert documents["json/decoder.py"].text.encode() == (library / "json" / "decoder.py").read_bytes()
    assert documents["pydoc_data/topics/lambda"].text.lstrip().startswith("Lambdas")
    assert "pydoc_data/topics.py" not in documents
    left_out = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert not [id for id in documents if set(id.split("/")) & left_out or id.startswith("_sysconfigdata")]
    assert all(document.text for document in documents.values())
    assert 6_000_000 < sum(len(document.text) for document in documents.values()) < 20_000_000


def test_stdlib_is_deterministic() -> None:
    ids = [document.id for document in StdlibSource().documents()]
    assert ids == [document.id for document in StdlibSource().documents()]
    assert len(set(ids)) == len(ids)
    assert StdlibSource().fingerprint() == StdlibSource().fingerprint()


# Local text -------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_document_kept_byte_for_byte(tmp_path: Path) -> None:
    raw = b"\xef\xbb\xbfa\r\nb\xf0\x9f\x98\x80"  # BOM, CRLF, an emoji
    path = write(tmp_path / "one.txt", raw)
    assert texts(TextSource(path=str(path))) == [("one.txt", raw.decode())]


def test_a_directory_is_read_below_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.md", "a/z.py", "a/a.txt", ".git/config", "a/.hidden"):
        write(tmp_path / name, name)
    expected = [("a/a.txt", "a/a.txt"), ("a/z.py", "a/z.py"), ("b.md", "b.md")]
    assert texts(TextSource(path=str(tmp_path))) == expected
    assert texts(TextSource(path=str(tmp_path / "**" / "*.*"))) == expected
    assert texts(TextSource(path=str(tmp_path / "a" / "*.py"))) == [("z.py", "a/z.py")]


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    write(tmp_path / "corpus.txt", "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="does not exist.*Did you mean 'corpus.txt'"):
        texts(TextSource(path=str(tmp_path / "corpsu.txt")))
    with pytest.raises(ValueError, match="has no files"):
        texts(TextSource(path=str(tmp_path / "empty")))
    with pytest.raises(ValueError, match="no file matches"):
        texts(TextSource(path=str(tmp_path / "*.md")))


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    for name in ("here", "there"):
        write(tmp_path / name / "a.txt", "same")
    here, there = (TextSource(path=str(tmp_path / name)) for name in ("here", "there"))
    assert here.fingerprint() == there.fingerprint()
    assert here.fingerprint() != dataclasses.replace(here, text_field="content").fingerprint()
    write(tmp_path / "there" / "a.txt", "Same")
    assert here.fingerprint() != there.fingerprint()


LINES = [
    b'\xef\xbb\xbf{"text": "first"}',  # a byte order mark at the head of the file is no part of the JSON
    b"",
    b'{"text": "sec\xffond"}',
    b'{"text": "half \\ud83d"}',
    b'{"text": ""}',
    b'{"txt": "other field"}',
    b'{"text": null}',
    b'{"text": 3}',
    b'{"text": "cut off',
    b'["no object"]',
    b"[" * 100_000,
    b'{"text": "\\ud83d\\ude00 \\u0000 <|eos|>", "more": {}}',
]
PROBLEMS = {
    6: Problem.MISSING_FIELD,
    7: Problem.MISSING_FIELD,
    8: Problem.MISSING_FIELD,
    9: Problem.BROKEN_RECORD,
    10: Problem.BROKEN_RECORD,
    11: Problem.BROKEN_RECORD,
}


@pytest.fixture
def bad_lines(tmp_path: Path) -> TextSource:
    return TextSource(path=str(write(tmp_path / "bad.jsonl", b"\n".join(LINES))))


def test_json_lines_as_found(bad_lines: TextSource) -> None:
    documents = {int(document.id.split(":")[1]): document for document in bad_lines.documents()}
    assert sorted(documents) == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]  # the blank line is none
    assert {
        number: document.problem for number, document in documents.items() if document.problem
    } == PROBLEMS
    assert documents[1].text == "first"
    assert documents[12].text == "\U0001f600 \0 <|eos|>"
    assert documents[6].where.endswith("bad.jsonl, line 6") and "Did you mean 'txt'" in documents[6].detail


def test_pairs_need_both_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", '{"q": "2+2=", "a": "4"}\n{"q": "no answer"}\n')
    pair, lonely = TextSource(path=str(path), prompt_field="q", completion_field="a").documents()
    assert (pair.prompt, pair.text) == ("2+2=", "4")
    assert lonely.problem is Problem.MISSING_FIELD
    with pytest.raises(ValueError, match="go together"):
        TextSource(path=str(path), prompt_field="q")


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {
        "text": pyarrow.array(["one", None, "drei \u00e9"]),
        "raw": pyarrow.array([b"one", b"\xff", None]),
        "kind": pyarrow.array(["a", "a", "b"]).dictionary_encode(),
        "number": pyarrow.array([1, 2, 3]),
    }
    path = str(tmp_path / "table.parquet")
    parquet.write_table(pyarrow.table(columns), path)
    documents = list(TextSource(path=path).documents())
    assert [document.text for document in documents] == ["one", "", "drei \u00e9"]
    assert [document.problem for document in documents] == [None, Problem.MISSING_FIELD, None]
    assert documents[1].where.endswith("table.parquet, row 1")
    assert [document.text for document in TextSource(path=path, text_field="raw").documents()] == [
        "one",
        "\udcff",
        "",
    ]
    assert [document.text for document in TextSource(path=path, text_field="kind").documents()] == [
        "a",
        "a",
        "b",
    ]
    assert {document.problem for document in TextSource(path=path, text_field="number").documents()} == {
        Problem.MISSING_FIELD
    }
    with pytest.raises(ValueError, match="no field 'txt'.*Did you mean 'text'"):
        list(TextSource(path=path, text_field="txt").documents())
    write(tmp_path / "table.parquet", b"PAR1 not really")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        list(TextSource(path=path).documents())


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "table.parquet", b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"pip install 'slmjax\[parquet\]'"):
        list(TextSource(path=str(path)).documents())


# Bad documents ----------------------------------------------------------------------------------------------


def admitted(source: TextSource, policy: OnBadDocument) -> tuple[list[str], BadCounts]:
    gate = Gatekeeper(policy, max_bad_fraction=1.0)
    texts = [document.text for result in source.documents() if (document := gate.admit(result)) is not None]
    return texts, gate.counts


def test_skip_leaves_bad_documents_out_and_counts_them(bad_lines: TextSource) -> None:
    result, counts = admitted(bad_lines, OnBadDocument.SKIP)
    assert result == ["first", "\U0001f600 \0 <|eos|>"]
    assert counts == BadCounts(documents=11, invalid_utf8=2, empty=1, missing_field=3, broken_record=3)
    assert counts.bad == 9
    assert (
        "9 of 11 documents are bad (2 invalid_utf8, 1 empty, 3 missing_field, 3 broken_record"
        in counts.describe()
    )


def test_replace_mends_what_it_can(bad_lines: TextSource) -> None:
    result, counts = admitted(bad_lines, OnBadDocument.REPLACE)
    assert result == ["first", "sec\ufffdond", "half \ufffd", "\U0001f600 \0 <|eos|>"]
    assert counts == BadCounts(
        documents=11, invalid_utf8=2, empty=1, missing_field=3, broken_record=3, replaced=2
    )


@pytest.mark.parametrize("number", [3, 4, 5, 6, 9])
def test_error_names_file_line_and_the_way_out(tmp_path: Path, number: int) -> None:
    path = write(tmp_path / "bad.jsonl", LINES[0] + b"\n" + LINES[number - 1])
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: .*--data\.on-bad-document skip"):
        admitted(TextSource(path=str(path)), OnBadDocument.ERROR)


def test_too_many_bad_documents_are_an_error() -> None:
    gate = Gatekeeper(OnBadDocument.SKIP, max_bad_fraction=0.25)
    for i, text in enumerate(["good", "good", "good", ""]):
        gate.admit(Document(id=str(i), where=f"place {i}", text=text))
    gate.check("source")  # a quarter is not more than a quarter
    gate.admit(Document(id="4", where="place 4", text="\udcff"))
    with pytest.raises(
        ValueError, match=r"2 of 5 documents are bad \(1 invalid_utf8, 1 empty.*The first: place 3"
    ):
        gate.check("source")


def test_bad_prompts_are_bad_documents() -> None:
    gate = Gatekeeper(OnBadDocument.REPLACE, max_bad_fraction=1.0)
    repaired = gate.admit(Document(id="0", where="place", prompt="\udcffq", text="a"))
    assert repaired is not None and (repaired.prompt, repaired.text) == ("\ufffdq", "a")


# Datasets by name -------------------------------------------------------------------------------------------

BUILD = """
import sys
import tensorflow_datasets as tfds

class SmallTexts(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(8):
            yield i, {"text": f"text \\u00e9 {i}"}

SmallTexts(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""
READ = """
import dataclasses, json, sys
from slmjax.data.dataset_sources import TfdsSource

source = TfdsSource(name="small_texts", data_dir=sys.argv[1])
half = dataclasses.replace(source, split="train[:50%]")
errors = []
for wrong in (dataclasses.replace(source, text_field="txet"), dataclasses.replace(source, name="lm1c")):
    try:
        list(wrong.documents())
    except ValueError as error:
        errors.append(str(error))
documents = [[document.id, document.text] for document in source.documents()]
same = source.fingerprint() == source.fingerprint() != half.fingerprint()
print(json.dumps([documents, len(list(half.documents())), same, errors, "tensorflow" in sys.modules]))
"""


def run_python(script: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tfds_is_read_without_tensorflow(tmp_path: Path) -> None:
    run_python(BUILD, str(tmp_path))
    documents, num_half, same, errors, tensorflow = json.loads(run_python(READ, str(tmp_path)))
    assert sorted(text for _, text in documents) == [f"text \u00e9 {i}" for i in range(8)]
    assert [id for id, _ in documents] == [f"small_texts:{i}" for i in range(8)]
    assert num_half == 4 and same
    assert "Did you mean 'text'" in errors[0] and "'lm1b'" in errors[1]
    assert not tensorflow


def test_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list):
        column_names = ["text", "id"]
        _fingerprint = "abc"

    def load_dataset(name: str, subset: str | None, *, split: str) -> Rows:
        if name != "someone/stories":
            raise FileNotFoundError(f"{name} is not there.")
        return Rows([{"text": f"{subset} {split} {i}", "id": i} for i in range(2)])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    source = HuggingFaceSource(name="someone/stories", subset="small")
    assert [document.text for document in source.documents()] == ["small train 0", "small train 1"]
    assert source.fingerprint() != dataclasses.replace(source, split="test").fingerprint()
    with pytest.raises(ValueError, match="Did you mean 'text'"):
        list(dataclasses.replace(source, text_field="tex").documents())
    with pytest.raises(ValueError, match="is not there. Name a dataset as OWNER/NAME"):
        list(dataclasses.replace(source, name="someone/storys").documents())


def test_hugging_face_without_datasets_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'slmjax\[hf\]'"):
        list(HuggingFaceSource(name="someone/stories").documents())
