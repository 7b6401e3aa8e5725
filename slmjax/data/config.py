"""DataConfig: sources, split, packing and batches of training text, and the directory of prepared data."""

import dataclasses
import enum
from pathlib import Path

from slmjax.config import added_field
from slmjax.data.conversations import ScoredTurns
from slmjax.data.dataset_sources import HuggingFaceSource, TfdsSource
from slmjax.data.documents import HeldOutBy, OnBadDocument
from slmjax.data.marks import SpecialNames
from slmjax.data.sources import SourceConfig, TextSource
from slmjax.data.stdlib_corpus import StdlibSource
from slmjax.data.synthetic_tasks import SyntheticSource, SyntheticTask
from slmjax.startup import cache_directory

__all__ = [
    "DataConfig",
    "HeldOutBy",
    "HuggingFaceSource",
    "OnBadDocument",
    "Packing",
    "ScoredTurns",
    "SourceConfig",
    "SpecialNames",
    "Split",
    "StdlibSource",
    "SyntheticSource",
    "SyntheticTask",
    "TextSource",
    "TfdsSource",
    "WeightedSource",
]


class Split(enum.Enum):
    """How text is held out for evaluation."""

    DOCUMENTS = "documents"  # entire documents, chosen by a hash (DataConfig.heldout_by)
    TAIL = "tail"  # the last part of each document's text: for a corpus that is one or a few files


class Packing(enum.Enum):
    """How documents fill rows of sequence_length tokens."""

    BEST_FIT = "best_fit"  # complete documents in one row, each attending only to itself
    CONCATENATE = "concatenate"  # one stream of documents, cut into rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightedSource:
    """One source of a mixture."""

    source: SourceConfig  # where its text comes from
    weight: float = 1.0  # its fraction of the rows, relative to the other weights

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight is {self.weight}, must be above 0: leave the source out instead")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Sources, split, packing, batches, and the treatment of bad documents."""

    sources: tuple[WeightedSource, ...] = (WeightedSource(source=StdlibSource()),)  # the mixture
    path: str | None = None  # local text (a file, a directory or a glob): replaces the sources
    text_field: str = "text"  # with path: the field of a record that holds the text
    # with path: the field of a prompt, which is not trained on; goes with completion_field
    prompt_field: str | None = None
    completion_field: str | None = None  # with path: the field that is trained on after prompt_field
    # with path: the field of a conversation's messages, often "messages"
    messages_field: str | None = added_field(None, before=None)
    # the answers of a conversation that are trained on
    scored_turns: ScoredTurns = added_field(ScoredTurns.ALL, before=ScoredTurns.ALL)
    # names of special tokens in a document: text like any other, or encode (they stand for the tokens)
    special_tokens: SpecialNames = added_field(SpecialNames.TEXT, before=SpecialNames.TEXT)
    split: Split = Split.DOCUMENTS  # hold out entire documents, or the tail of each
    # documents are held out by a hash of the content of a record, or of its id (file and line); of a text
    # file, by a hash of its name
    heldout_by: HeldOutBy = added_field(HeldOutBy.CONTENT, before=HeldOutBy.ID)
    heldout_fraction: float = 0.05  # fraction of the text that is never trained on; 0 holds out nothing
    packing: Packing = Packing.BEST_FIT  # how documents fill rows
    packing_window: int = 4096  # documents that best-fit packing chooses among at a time
    sequence_length: int = 256  # tokens of a sequence (a packed row)
    batch_size: int = 32  # sequences of the global batch, over all devices and hosts
    seed: int = 0  # random seed of the order of sequences
    on_bad_document: OnBadDocument = OnBadDocument.SKIP  # invalid UTF-8, empty, field missing, broken record
    max_bad_fraction: float = 0.01  # stop if more than this fraction of a source's documents is bad
    # stop if the tokenizer loses more than this fraction of the text's bytes: those that decoding its ids
    # does not return
    max_lost_text: float = added_field(0.001, before=1.0)
    # longer documents are tokenized in windows of this size, to the same tokens
    max_document_bytes: int = 1_000_000
    cache_dir: str | None = None  # prepared data; default: $SLMJAX_CACHE, else ~/.cache/slmjax
    read_threads: int = 2  # threads that read rows ahead of the step
    prefetch: int = 8  # batches kept ready ahead of the step

    def __post_init__(self) -> None:
        if not self.sources and self.path is None:
            raise ValueError("data.sources is empty: give at least one source, or data.path")
        if self.path is not None:
            # TextSource checks its fields, now rather than when the data is read.
            _ = self.mixture
        for name in ("heldout_fraction", "max_bad_fraction", "max_lost_text"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}, must be between 0 and 1")
        for name in ("packing_window", "sequence_length", "batch_size", "read_threads", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}, must be at least 1")
        if self.max_document_bytes < 1024:
            raise ValueError(f"data.max_document_bytes is {self.max_document_bytes}, must be at least 1024")

    @property
    def mixture(self) -> tuple[WeightedSource, ...]:
        """The sources to read: `sources`, or the one that `path` describes."""
        if self.path is None:
            return self.sources
        names = ("text_field", "prompt_field", "completion_field", "messages_field")
        fields = {name: getattr(self, name) for name in names}
        return (WeightedSource(source=TextSource(path=self.path, **fields)),)

    @property
    def cache_path(self) -> Path:
        """The directory of prepared data."""
        return cache_directory() if self.cache_dir is None else Path(self.cache_dir).expanduser()
