"""Datasets by name: TFDS, read from array_record files without TensorFlow, and Hugging Face (extra `hf`)."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slmjax.config import added_field, near_names
from slmjax.data.documents import Document
from slmjax.data.records import require_fields
from slmjax.data.sources import (
    SourceConfig,
    combined_hash,
    conversation_document,
    file_fingerprint,
    record_document,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsSource(SourceConfig):
    """A TensorFlow Datasets dataset, which is prepared in the array_record format if necessary."""

    name: str  # e.g. "lm1b", "wiki40b/en", "my_dataset:1.0.0"
    split: str = "train"  # a split or a slice of one, e.g. "train[:10%]"
    text_field: str = "text"  # the feature that holds the text
    data_dir: str | None = None  # the directory of datasets (default: that of TFDS)

    def documents(self) -> Iterator[Document]:
        builder = self._builder()
        require_fields((self.text_field,), list(builder.info.features), where=self.describe())
        data = builder.as_data_source(split=self.split)
        for i in range(len(data)):
            yield record_document(
                data[i], (self.text_field,), id=f"{self.name}:{i}", where=f"{self.describe()}, record {i}"
            )

    def fingerprint(self) -> str:
        builder = self._builder()
        instructions = builder.info.splits[self.split].file_instructions
        files = [f"{file.skip} {file.take} {file_fingerprint(Path(file.filename))}" for file in instructions]
        return combined_hash("tfds", builder.info.full_name, self.split, self.text_field, *files)

    def describe(self) -> str:
        return f"TFDS {self.name} [{self.split}]"

    def size_hint(self) -> int | None:
        return None

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.registered import DatasetNotFoundError

        try:
            # array_record files can be read without TensorFlow.
            builder = tfds.builder(self.name, data_dir=self.data_dir, file_format="array_record")
        except DatasetNotFoundError as error:
            # Listing community datasets needs TensorFlow.
            known = tfds.list_builders(with_community_datasets=False)
            raise ValueError(f"TFDS has no dataset {self.name!r}.{near_names(self.name, known)}") from error
        # TFDS reports downloads on standard output, which is for the results of a command.
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare()
        return builder


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceSource(SourceConfig):
    """A dataset of the Hugging Face Hub, or of a local directory in its format, through `datasets`."""

    name: str  # e.g. "roneneldan/TinyStories"
    subset: str | None = None  # the dataset's configuration, where it has several
    split: str = "train"  # a split or a slice of one, e.g. "train[:10%]"
    text_field: str = "text"  # the column that holds the text
    # the column of conversations: the messages, {"role", "content"} each
    messages_field: str | None = added_field(None, before=None)

    def documents(self) -> Iterator[Document]:
        make = record_document if self.messages_field is None else conversation_document
        for i, record in enumerate(self._dataset()):
            yield make(record, (self._field,), id=f"{self.name}:{i}", where=f"{self.describe()}, record {i}")

    def fingerprint(self) -> str:
        dataset = self._dataset()
        # Added only if used, so that older fingerprints stay.
        layout = () if self.messages_field is None else ("messages",)
        return combined_hash(
            "hf", self.name, str(self.subset), self.split, self._field, dataset._fingerprint, *layout
        )

    def describe(self) -> str:
        return f"Hugging Face {self.name} [{self.split}]"

    def size_hint(self) -> int | None:
        return None

    def _dataset(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                f"{self.name}: Hugging Face datasets need an extra: pip install 'slmjax[hf]'"
            ) from error
        try:
            dataset = datasets.load_dataset(self.name, self.subset, split=self.split)
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.name}: {error} Name a dataset as OWNER/NAME, or a local directory."
            ) from error
        require_fields((self._field,), dataset.column_names, where=self.describe())
        return dataset

    @property
    def _field(self) -> str:
        return self.messages_field or self.text_field
