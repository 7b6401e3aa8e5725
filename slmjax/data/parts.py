"""The output of a tokenizer, kept in parts until the shards are complete.

    parts = Parts(directory)
    tokens = parts.read(0, digest)                 # None: this part was not made yet, or is of other text
    parts.write(0, digest, tokens)

Tokenizing is most of the time of a preparation. Each part is the tokens of one batch of texts, in a file that
appears complete. A preparation that was killed leaves its parts: the next one reads the documents again, and
takes from the parts what was tokenized already. A part has the digest of its texts, so that it is used for
the same texts alone. The directory is deleted when the shards are complete.
"""

import dataclasses
import logging
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64

from slmjax import faults
from slmjax.atomic_files import atomic_file
from slmjax.data.spans import TextTokens

log = logging.getLogger(__name__)

_SPANNED = ("ids", "starts", "ends")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EncodedBatch:
    """The tokens of a batch of texts."""

    documents: Int32[np.ndarray, " T"]  # tokens of the texts that are complete documents, with BOS and EOS
    lengths: Int64[np.ndarray, " D"]  # tokens of each of them
    spanned: list[TextTokens]  # tokens of the other texts


class Parts:
    """The parts of one preparation."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, number: int, digest: str) -> EncodedBatch | None:
        """Return the tokens of the texts of a part; None if there is none for texts with this digest."""
        path = self._path(number)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                part = {name: arrays[name] for name in arrays.files}
            return _batch(part) if str(part["digest"]) == digest else None
        # A damaged part only costs the time to make it again. The archive has a checksum of each array, and
        # numpy and zipfile raise errors of many kinds.
        except Exception as error:
            log.warning("%s is damaged (%s), and is made again", path, error)
            return None

    def write(self, number: int, digest: str, batch: EncodedBatch) -> None:
        """Store the tokens of the texts of a part.

        Raises:
          OSError: the file cannot be written, for example on a full disk.
        """
        spanned = {
            name: np.concatenate(
                [np.zeros(0, np.int32), *(getattr(tokens, name) for tokens in batch.spanned)]
            )
            for name in _SPANNED
        }
        with atomic_file(self._path(number)) as temporary, temporary.open("wb") as stream:
            np.savez(
                stream,
                allow_pickle=False,
                digest=np.asarray(digest),
                documents=batch.documents,
                lengths=batch.lengths,
                spanned_lengths=np.asarray([len(tokens.ids) for tokens in batch.spanned], np.int64),
                **spanned,
            )
        faults.at("data.part", number)

    def _path(self, number: int) -> Path:
        return self._directory / f"part-{number:06d}.npz"


def _batch(part: dict[str, np.ndarray]) -> EncodedBatch:
    """Return the batch of a part. Raises ValueError for arrays that do not fit."""
    ends = np.cumsum(part["spanned_lengths"], dtype=np.int64)
    if part["lengths"].sum() != len(part["documents"]) or ends[-1:].sum() != len(part["ids"]):
        raise ValueError("its lengths do not add up")
    columns = [np.split(part[name], ends[:-1]) if len(ends) else [] for name in _SPANNED]
    return EncodedBatch(
        documents=part["documents"],
        lengths=part["lengths"],
        spanned=[
            TextTokens(ids=ids, starts=starts, ends=ends_of_text)
            for ids, starts, ends_of_text in zip(*columns, strict=True)
        ],
    )
