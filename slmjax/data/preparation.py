"""Prepared data: the tokenizer and the token shards of a mixture, made once and found again by hash.

    prepared = prepare(DataConfig(), BpeTokenizer(vocab_size=4096))
    prepared.train[0][0].tokens(0);  prepared.tokenizer.decode(...);  prepared.heldout_text()

The cache directory has tokenizers/KEY and shards/KEY/{train,heldout}, where KEY is a hash of everything that
decides the content. A directory is written under a temporary name and renamed when it is complete, so that a
killed process leaves nothing that could be mistaken for data. What it has tokenized is in parts/KEY, and the
next preparation uses it. Of several processes that prepare the same data, one works and the others wait
(`locks.py`).
"""

import contextlib
import dataclasses
import functools
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slmjax.atomic_files import atomic_directory
from slmjax.config import fingerprint, to_json
from slmjax.data.config import DataConfig
from slmjax.data.documents import Gatekeeper, check_bad_fraction
from slmjax.data.encoding import require_template, write_source
from slmjax.data.locks import exclusive
from slmjax.data.lost_text import check_lost_text, lost_fraction
from slmjax.data.parts import Parts
from slmjax.data.scored import is_all_scored
from slmjax.data.shards import FORMAT_VERSION, TokenShards
from slmjax.data.sources import changed_fields, combined_hash
from slmjax.data.splitting import HELDOUT, TRAIN, SplitRule, little_text_note, split_document, split_rule
from slmjax.data.tokenizers import Reads, Tokenizer, TokenizerConfig

log = logging.getLogger(__name__)

_STALE_SECONDS = 24 * 3600
_STALE_PARTS_SECONDS = 7 * _STALE_SECONDS  # of preparations that nobody has continued
_SAMPLE_TOKENS = 100
# Part of the key of a tokenizer: change it when the same text and settings give another vocabulary.
_MADE_FROM = "tokenizer, version 2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """The data of training and evaluation."""

    tokenizer: Tokenizer
    train: tuple[tuple[TokenShards, float], ...]  # one per source of the mixture, with its weight
    heldout: tuple[TokenShards, ...]  # one per source; empty if nothing is held out

    @property
    def lost_text(self) -> float:
        """The fraction of the held-out text (all text if none is held out) that the tokenizer loses."""
        shards = self.heldout or [shards for shards, _ in self.train]
        return lost_fraction(split.manifest.lost_text for split in shards)

    def heldout_text(self) -> bytes:
        """Return the UTF-8 text of all held-out documents, joined, to compare with compressors."""
        return b"".join(shards.text() for shards in self.heldout)


def prepare(data: DataConfig, tokenizer: TokenizerConfig) -> Prepared:
    """Open the prepared data of a mixture; prepare what is missing. ValueError for unusable sources."""
    if data.path is None and (fields := changed_fields(data)):
        raise ValueError(
            f"data.{fields[0]}={getattr(data, fields[0])!r} has no effect without data.path: leave it out, "
            f"or set {fields[0]} of the source"
        )
    # Fingerprints are enough to find prepared data: documents are only read to prepare them.
    hashes = [weighted.source.fingerprint() for weighted in data.mixture]

    # Reads the beginnings of the sources, so that most errors come before anything is trained or tokenized.
    @functools.cache
    def rules() -> tuple[SplitRule, ...]:
        return tuple(split_rule(weighted.source, data) for weighted in data.mixture)

    with _progress() as bar:
        built = _tokenizer(data, tokenizer, hashes=hashes, rules=rules, bar=bar)
        directories = [
            _shard_directory(index, data, source_hash=source_hash, tokenizer=built, rules=rules, bar=bar)
            for index, source_hash in enumerate(hashes)
        ]
    train = [TokenShards.open(directory / TRAIN, tokenizer_hash=built.hash) for directory in directories]
    heldout = [
        TokenShards.open(directory / HELDOUT, tokenizer_hash=built.hash)
        for directory in directories
        if data.heldout_fraction > 0
    ]
    # Limits are checked for prepared data, too: they may have been lowered since.
    for shards in (*train, *heldout):
        check_lost_text(
            shards.manifest.lost_text, data.max_lost_text, source_name=shards.manifest.source_name
        )
    for shards in train:
        check_bad_fraction(
            shards.manifest.bad_documents, data.max_bad_fraction, source_name=shards.manifest.source_name
        )
    for pair in zip(train, heldout, strict=bool(heldout)):
        _report_split(*pair, data)
    weights = [weighted.weight for weighted in data.mixture]
    return Prepared(tokenizer=built, train=tuple(zip(train, weights, strict=True)), heldout=tuple(heldout))


def _report_split(train: TokenShards, heldout: TokenShards, data: DataConfig) -> None:
    """Log that the end of each document is held out, if the user did not ask for it, or that little is."""
    held_out = heldout.manifest.num_bytes
    total = held_out + train.manifest.num_bytes
    name = train.manifest.source_name
    if note := little_text_note(name, held_out=held_out, total=total, fraction=data.heldout_fraction):
        log.warning("%s", note)
    if train.manifest.split_rule != SplitRule.BOUNDARY.value:
        return
    which = "its one document" if len(train) == 1 else f"each of its {len(train)} documents"
    log.info(
        "%s: the last %g%% of %s is held out for evaluation (%s of %s bytes), since there are too few "
        "documents to hold out entire ones. --data.heldout-fraction changes how much.",
        train.manifest.source_name,
        100 * data.heldout_fraction,
        which,
        f"{held_out:,}",
        f"{total:,}",
    )


def inspect(data: DataConfig, tokenizer: TokenizerConfig, *, num_samples: int = 3) -> dict[str, Any]:
    """Return statistics of the prepared data and decoded samples of the training text, as for JSON."""
    prepared = prepare(data, tokenizer)
    sources = []
    for i, (shards, weight) in enumerate(prepared.train):
        heldout = {HELDOUT: _statistics(prepared.heldout[i])} if prepared.heldout else {}
        about = {
            "name": shards.manifest.source_name,
            "weight": weight,
            "bad_documents": to_json(shards.manifest.bad_documents),
        }
        sources.append({**about, TRAIN: _statistics(shards), **heldout})
    built = prepared.tokenizer
    return {
        "tokenizer": {"kind": type(tokenizer).__name__, "vocab_size": built.vocab_size, "hash": built.hash},
        "sources": sources,
        "samples": [
            sample
            for shards, _ in prepared.train
            for sample in _samples(shards, built, seed=data.seed, count=num_samples)
        ],
    }


def _statistics(shards: TokenShards) -> dict[str, Any]:
    manifest = shards.manifest
    shortest, median, longest = np.quantile(shards.lengths, (0, 0.5, 1))
    return {
        "documents": manifest.num_documents,
        "bytes": manifest.num_bytes,
        "tokens": manifest.num_tokens,
        "bytes_per_token": round(manifest.num_bytes / manifest.num_tokens, 3),
        "tokens_per_document": {"shortest": int(shortest), "median": int(median), "longest": int(longest)},
        "documents_with_prompt": int(np.count_nonzero(~is_all_scored(shards.lengths, shards.num_scored))),
        "scored_tokens": manifest.num_scored,
        "scored_bytes": manifest.scored_bytes,
        "lost_text": manifest.lost_text.fraction,
        "directory": str(shards.directory),
    }


def _samples(shards: TokenShards, tokenizer: Tokenizer, *, seed: int, count: int) -> list[dict[str, Any]]:
    # The seed of the data, so that repeated inspections show the same samples.
    chosen = np.random.default_rng(seed).choice(len(shards), size=min(count, len(shards)), replace=False)
    samples = []
    for document in sorted(chosen.tolist()):
        tokens = shards.tokens(document, stop=min(int(shards.lengths[document]), _SAMPLE_TOKENS))
        about = {
            "source": shards.manifest.source_name,
            "document": document,
            "tokens": int(shards.lengths[document]),
        }
        samples.append({**about, "text": tokenizer.decode(tokens.tolist())})
    return samples


def _tokenizer(
    data: DataConfig,
    config: TokenizerConfig,
    *,
    hashes: list[str],
    rules: Callable[[], tuple[SplitRule, ...]],
    bar: "_Bar",
) -> Tokenizer:
    if config.reads is Reads.NOTHING:
        return config.build(())
    key = combined_hash(
        _MADE_FROM, fingerprint(config), type(config).__name__, *_split_settings(data), *hashes
    )[:32]
    final = data.cache_path / "tokenizers" / key
    files = ("tokenizer.json", "tokenizer_config.json", "hash")

    def make(directory: Path) -> None:
        started = time.monotonic()
        built = config.build(_texts(data, config.reads, rules=rules(), bar=bar))
        built.save(directory)
        (directory / "hash").write_text(built.hash)
        seconds = time.monotonic() - started
        log.info("tokenizer: %d tokens, made in %.1f s", built.vocab_size, seconds)

    _make_once(final, files=files, what="the tokenizer", make=make)
    try:
        loaded = Tokenizer.load(final)
    except ValueError as error:
        raise ValueError(f"{final} is damaged ({error}): delete it, and it is made again") from error
    # The file could be valid JSON and still be another vocabulary.
    if loaded.hash != (final / "hash").read_text():
        raise ValueError(
            f"{final} is damaged: the vocabulary is not the one that was written. Delete it, and it is made "
            "again"
        )
    return loaded


def _texts(data: DataConfig, reads: Reads, *, rules: Sequence[SplitRule], bar: "_Bar") -> Iterator[str]:
    """Yield the text for a vocabulary: of all sources, of one side or both."""
    for weighted, rule in zip(data.mixture, rules, strict=True):
        name = weighted.source.describe()
        # The vocabulary is made from the text that is trained on, after the same policy.
        gate = Gatekeeper(data.on_bad_document, max_bad_fraction=data.max_bad_fraction)
        bar.start(f"tokenizer: {name}", weighted.source.size_hint())
        for candidate in weighted.source.documents():
            document = gate.admit(candidate)
            if document is not None:
                # A vocabulary that is made here has no chat template.
                require_template(document, None)
            for side, half in split_document(document, data, rule=rule) if document is not None else ():
                if side == TRAIN or reads is Reads.ALL_TEXT:
                    yield half.prompt + half.text
                bar.advance(len(half.text))
        gate.check(name)


def _shard_directory(
    index: int,
    data: DataConfig,
    *,
    source_hash: str,
    tokenizer: Tokenizer,
    rules: Callable[[], tuple[SplitRule, ...]],
    bar: "_Bar",
) -> Path:
    """Return the directory of the shards of source `index`, written if it does not exist."""
    source = data.mixture[index].source
    settings = (
        *_split_settings(data),
        str(data.max_document_bytes),
        data.scored_turns.value,
        data.special_tokens.value,
    )
    # The text of conversations depends on these.
    bos = tokenizer.has_bos if tokenizer.named_bos in (None, tokenizer.bos) else tokenizer.named_bos
    chat = repr((tokenizer.chat_template, bos, tokenizer.unk, tokenizer.pad))
    # The key has everything that decides the content, so that changed settings never reuse old data.
    key = combined_hash("shards", str(FORMAT_VERSION), source_hash, tokenizer.hash, chat, *settings)[:32]
    final = data.cache_path / "shards" / key
    files = [f"{side}/manifest.json" for side in ([TRAIN, HELDOUT] if data.heldout_fraction > 0 else [TRAIN])]
    name = source.describe()
    parts_directory = data.cache_path / "parts" / key

    def make(directory: Path) -> None:
        rule = rules()[index]
        started = time.monotonic()
        bar.start(name, source.size_hint())
        if num_parts := len(list(parts_directory.glob("*.npz"))):
            log.info("%s: continues a preparation that was interrupted, from %d parts", name, num_parts)
        counts = write_source(
            source,
            directory,
            source_hash=source_hash,
            tokenizer=tokenizer,
            data=data,
            rule=rule,
            parts=Parts(parts_directory),
            advance=bar.advance,
        )
        seconds = time.monotonic() - started
        log.info("prepared %s: %d documents in %.1f s, in %s", name, counts.documents, seconds, final)
        # The log shows bad documents even if there are few enough.
        if counts.bad:
            log.warning("%s: %s", name, counts.describe())

    _make_once(final, files=files, what=name, make=make)
    # Also if they are of a process that was killed just before this line.
    shutil.rmtree(parts_directory, ignore_errors=True)
    return final


def _split_settings(data: DataConfig) -> tuple[str, ...]:
    return data.split.value, data.heldout_by.value, repr(data.heldout_fraction), data.on_bad_document.value


def _is_complete(directory: Path, files: Sequence[str]) -> bool:
    return all((directory / name).exists() for name in files)


def _make_once(final: Path, *, files: Sequence[str], what: str, make: Callable[[Path], None]) -> None:
    """Let `make` fill a directory that is then renamed to `final`, unless it is complete or another does it.

    Args:
      final: the directory.
      files: those that it has when it is complete.
      what: name of the content, for messages.
      make: fills the directory that it is called with.

    Raises:
      ValueError: the cache cannot be written to, or as `make`.
    """
    if _is_complete(final, files):
        return
    cache = final.parent.parent
    try:
        (cache / "locks").mkdir(parents=True, exist_ok=True)
        final.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(cache / "locks" / f"{final.parent.name}-{final.name}", what=what) as is_alone:
            # Another process may have been first.
            if _is_complete(final, files):
                return
            _remove_remains(final, is_alone=is_alone)
            with atomic_directory(final, keep_existing=True) as temporary:
                make(temporary)
    except OSError as error:
        raise ValueError(
            f"{cache}: prepared data cannot be written ({error}). Free space there, or give another "
            "directory with --data.cache-dir; what was tokenized so far is kept and is used by the next "
            "preparation"
        ) from error


def _remove_remains(final: Path, *, is_alone: bool) -> None:
    """Delete what killed processes have left of `final`, and old remains of others."""
    for other in final.parent.glob(".*"):
        is_own = is_alone and other.name.startswith(f".{final.name}-")
        if is_own or _age_of(other) > _STALE_SECONDS:
            shutil.rmtree(other, ignore_errors=True)
    for other in (final.parent.parent / "parts").glob("*"):
        if other.name != final.name and _age_of(other) > _STALE_PARTS_SECONDS:
            shutil.rmtree(other, ignore_errors=True)
    # A directory appears complete, so a person has deleted a part of this one.
    shutil.rmtree(final, ignore_errors=True)


def _age_of(path: Path) -> float:
    """Return the seconds since a directory was changed; 0 if it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


class _Bar:
    """A progress bar in bytes of text; nothing without a terminal."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._task: Any = None

    def start(self, description: str, total: int | None) -> None:
        if self._progress is not None:
            self._task = self._progress.add_task(description, total=total)

    def advance(self, num_bytes: int) -> None:
        if self._progress is not None:
            self._progress.advance(self._task, num_bytes)


@contextlib.contextmanager
def _progress() -> Iterator[_Bar]:
    # A log file should not fill with progress bars.
    if not sys.stderr.isatty():
        yield _Bar(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bar(progress)
