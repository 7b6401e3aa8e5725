"""The file with the loss of each held-out document: read as written, and errors that name it."""

from pathlib import Path

import numpy as np
import pytest

from slmjax.evaluation.document_sums import (
    DOCUMENT_SUMS,
    DocumentSums,
    read_document_sums,
    write_document_sums,
)
from slmjax.stored_json import DamagedFile

SUMS = DocumentSums(
    nats=np.array([3.5, 40.25]), tokens=np.array([4, 30]), bytes=np.array([8, 61]), num_documents=2
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_document_sums(tmp_path) is None
    assert write_document_sums(SUMS, tmp_path) == tmp_path / DOCUMENT_SUMS
    sums = read_document_sums(tmp_path)
    assert sums is not None and sums.num_documents == 2 and sums.is_same_text(SUMS)
    assert sums.nats.tolist() == [3.5, 40.25] and sums.tokens.tolist() == [4, 30]
    other = DocumentSums(nats=SUMS.nats, tokens=SUMS.tokens, bytes=SUMS.bytes + 1, num_documents=2)
    assert not sums.is_same_text(other)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = write_document_sums(SUMS, tmp_path)
    content = path.read_bytes()
    fields = {"nats": SUMS.nats, "tokens": SUMS.tokens, "bytes": SUMS.bytes, "num_documents": np.int64(2)}
    for damage, message in (
        (lambda: path.write_bytes(content[: len(content) // 2]), "cannot be read"),
        (lambda: path.write_bytes(b"nothing"), "cannot be read"),
        (lambda: np.savez(path, version=np.int64(1), nats=SUMS.nats), "has no bytes, num_documents, tokens"),
        (lambda: np.savez(path, version=np.int64(9), **fields), "is of version 9"),
        (lambda: np.savez(path, version=np.int64(1), **fields | {"nats": np.ones(3)}), "different lengths"),
        (lambda: np.savez(path, version=np.int64(1), **fields | {"nats": np.full(2, np.nan)}), "not finite"),
    ):
        damage()
        with pytest.raises(DamagedFile, match=message):
            read_document_sums(tmp_path)
