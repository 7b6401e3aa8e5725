"""The loss of each document of a held-out text: how much another text of the same kind would change it.

    sums = evaluation.document_sums                  # of an EvalResult
    write_document_sums(sums, run)                   # heldout_documents.npz
    read_document_sums(run).nats                     # [G]

Documents are counted in at most `MAX_GROUPS` groups, in turn: up to that many, each is a group of its own;
above, a group is a sample of the documents as good as any, so that the variance over groups is that over
documents. The file has a few kilobytes whatever the size of the text.

G: groups of documents.
"""

import dataclasses
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from slmjax.atomic_files import atomic_file
from slmjax.stored_json import DamagedFile

DOCUMENT_SUMS = "heldout_documents.npz"
MAX_GROUPS = 1024

_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DocumentSums:
    """Sums over the scored tokens of each group of documents."""

    nats: Float[np.ndarray, " G"]  # negative log-likelihood
    tokens: Int[np.ndarray, " G"]
    bytes: Int[np.ndarray, " G"]  # of their UTF-8 text
    num_documents: int

    def is_same_text(self, other: "DocumentSums") -> bool:
        """Return whether both are of the same documents: they have as many bytes in every group."""
        return self.num_documents == other.num_documents and np.array_equal(self.bytes, other.bytes)


def write_document_sums(sums: DocumentSums, directory: str | Path) -> Path:
    """Write the sums to the directory of a run or a model, and return the path of the file."""
    path = Path(directory) / DOCUMENT_SUMS
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            version=np.int64(_VERSION),
            nats=sums.nats,
            tokens=sums.tokens,
            bytes=sums.bytes,
            num_documents=np.int64(sums.num_documents),
        )
    return path


def read_document_sums(directory: str | Path) -> DocumentSums | None:
    """Read the sums of a run or model; None if it has none, as runs of earlier versions.

    Raises:
      DamagedFile: the file is damaged, or of a later version.
    """
    path = Path(directory) / DOCUMENT_SUMS
    remedy = "delete it: the run is then reported without the uncertainty of its held-out text"
    try:
        # Opened here: numpy does not close a file that it cannot read.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedFile(f"{path} cannot be read ({error}): {remedy}") from error
    expected = {"version", "nats", "tokens", "bytes", "num_documents"}
    if not expected <= set(arrays):
        missing = ", ".join(sorted(expected - set(arrays)))
        raise DamagedFile(f"{path} has no {missing}: {remedy}")
    if int(arrays["version"]) != _VERSION:
        raise DamagedFile(
            f"{path} is of version {int(arrays['version'])}, and this slmjax reads version {_VERSION}: "
            f"update slmjax, or {remedy}"
        )
    shapes = {arrays[name].shape for name in ("nats", "tokens", "bytes")}
    if len(shapes) != 1 or arrays["nats"].ndim != 1 or not np.isfinite(arrays["nats"]).all():
        raise DamagedFile(f"{path} has sums of different lengths or that are not finite: {remedy}")
    return DocumentSums(
        nats=arrays["nats"].astype(np.float64),
        tokens=arrays["tokens"].astype(np.int64),
        bytes=arrays["bytes"].astype(np.int64),
        num_documents=int(arrays["num_documents"]),
    )
