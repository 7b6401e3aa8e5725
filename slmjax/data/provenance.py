"""The data record of a run: the text it was trained on and the text it held out, and whether that text is
still the same.

    record = read_record(run_dir)                # data.json of a run, or "data" in origin.json of a model
    made of one now = describe(prepared, data) differences(record, now)                     # a sentence for
    each changed source documents_to_evaluate(run_dir, data, ...)    # held-out documents, with the record
    checked overlap(teacher_dir, data, now)              # a sentence for each source of which that model was
    trained on held-out text

Membership of the held-out set follows the content of a record and the name of a file
(`DataConfig.heldout_by`), so a changed source does not by itself put training text into the held-out set; but
figures are then of other text.
"""

import dataclasses
import enum
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmjax.config import ConfigError, from_json
from slmjax.data.config import DataConfig, HeldOutBy, Split, TextSource
from slmjax.data.encoding import HELDOUT
from slmjax.data.preparation import Prepared, prepare
from slmjax.data.shards import TokenShards
from slmjax.data.tokenizers import TokenizerConfig

log = logging.getLogger(__name__)

RECORD_FILE = "data.json"
Record = list[dict[str, Any]]  # one entry per source of the mixture


class ChangedData(enum.Enum):
    """The behaviour of an evaluation on a run's own held-out text whose sources have changed since
    training.
    """

    REFUSE = "refuse"  # an error that names the changed sources
    ALLOW = "allow"  # evaluate the text as it is now
    RECORDED = "recorded"  # evaluate the text as it was prepared for training, as long as the cache has it


# The record -------------------------------------------------------------------------------------------------
def describe(prepared: Prepared, data: DataConfig) -> Record:
    """The record of prepared data: per source its share, and sizes and hashes of what is trained on and what
    is held out.
    """
    record = []
    for i, (shards, weight) in enumerate(prepared.train):
        record.append(
            {
                "source": data.mixture[i].source.describe(),
                "weight": weight,
                **_sizes(shards),
                "fingerprint": shards.manifest.source_hash,
                "tokenizer": shards.manifest.tokenizer_hash,
                "shards": shards.directory.parent.name,
                HELDOUT: _sizes(prepared.heldout[i]) if prepared.heldout else None,
            }
        )
    return record


def _sizes(shards: TokenShards) -> dict[str, Any]:
    manifest = shards.manifest
    return {
        "documents": manifest.num_documents,
        "bytes": manifest.num_bytes,
        "tokens": manifest.num_tokens,
        "hash": shards.hash,
    }


def read_record(directory: Path) -> Record | None:
    """The record of a run or of a model made of one; None if it has none. Raises ValueError if it is
    damaged.
    """
    if (directory / RECORD_FILE).is_file():
        return _read(directory / RECORD_FILE)
    origin = directory / "origin.json"
    return _read(origin).get("data") if origin.is_file() else None


def read_settings(directory: Path) -> dict[str, Any]:
    """The experiment, as JSON, of a run or of a model made of one; empty for a model of other people."""
    if (directory / "config.json").is_file():
        return _read(directory / "config.json")
    origin = directory / "origin.json"
    return _read(origin).get("experiment", {}) if origin.is_file() else {}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is no JSON ({error}): restore it") from error


# Then and now -----------------------------------------------------------------------------------------------
def differences(before: Record, now: Record) -> list[str]:
    """How the text that is there now differs from a record: a sentence for each changed source, without a
    full stop.
    """
    if len(before) != len(now):
        names = [", ".join(entry["source"] for entry in entries) for entries in (before, now)]
        return [f"the mixture had {len(before)} source(s) ({names[0]}) and has {len(now)} ({names[1]})"]
    found = []
    for entry, other in zip(before, now, strict=True):
        if not _is_same(entry, other):
            moved = "" if entry["source"] == other["source"] else f" (then {entry['source']})"
            found.append(f"{other['source']}{moved} {_difference(entry, other)}")
    return found


def _is_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether all documents are the same; the records of earlier versions do not say what was held
    out.
    """
    return before["hash"] == now["hash"] and (HELDOUT not in before or before[HELDOUT] == now[HELDOUT])


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if before.get("tokenizer", now["tokenizer"]) != now["tokenizer"]:
        return "is encoded by another tokenizer"
    was = _counted(before)
    counts = f"had {was}, and has {_counted(now)}"
    if "fingerprint" in before and before["fingerprint"] == now["fingerprint"]:
        return f"is the same text, prepared with other settings or by another version of slmjax: it {counts}"
    if was == _counted(now if HELDOUT in before else {**now, HELDOUT: None}):
        older = (
            ""
            if "fingerprint" in before
            else ", or an earlier version of slmjax encoded the same text otherwise"
        )
        return f"has other text in as many documents and bytes{older}: {was}"
    return counts


def _counted(entry: Mapping[str, Any]) -> str:
    trained = f"{entry['documents']:,} documents ({entry['bytes']:,} bytes) to train on"
    held_out = entry.get(HELDOUT)
    return (
        trained
        if held_out is None
        else f"{trained} and {held_out['documents']:,} ({held_out['bytes']:,} bytes) held out"
    )


def held_out_after_change(data: DataConfig) -> str:
    """One sentence: what a changed source means for the held-out text of a run with these settings."""
    if data.split is Split.TAIL:
        return "The held-out tail of an edited document begins elsewhere, so that text that was trained on may be held out now."
    if data.heldout_by is HeldOutBy.ID:
        return "This run holds out records by file and line, so that records that moved may have been trained on and be held out now."
    return (
        "Records are held out by their content and files by their name, so that no document that was trained "
        "on is held out now, but"
        " what is held out may be other text."
    )


def changes_on_resume(run: Path, data: DataConfig, now: Record) -> list[str]:
    """Sentences about what a run goes on with: sources that changed since its record, or another division of
    the same text.
    """
    own = own_data(run)
    before = read_record(run)
    if own is not None and any(
        getattr(own, name) != getattr(data, name) for name in ("split", "heldout_by", "heldout_fraction")
    ):
        return overlap(run, data, now)
    changed = [] if before is None else differences(before, now)
    return (
        [
            f"the data of {run} changed since it was trained: {'; '.join(changed)}. It goes on with the text "
            "as it is now."
            f" {held_out_after_change(data)}"
        ]
        if changed
        else []
    )


# What is evaluated ------------------------------------------------------------------------------------------
def documents_to_evaluate(
    directory: Path, data: DataConfig, tokenizer: TokenizerConfig, *, changed_data: ChangedData
) -> tuple[TokenShards, ...]:
    """The held-out documents of `data`, or all of them where nothing is held out.

    Where `data` is what the model in `directory` was trained on, it is compared with the model's record.
    Where its sources cannot be read any more, the text that was prepared for training is evaluated, if the
    cache has it. Where `data` divides the same text otherwise, the log names the held-out text that the
    model was trained on.

    Raises:
      ValueError: the text has changed and `changed_data` is REFUSE; it is RECORDED and the cache does not
        have the text; or as `prepare`.
    """
    own = _readable_own_data(directory)
    record = read_record(directory)
    if own is None or _divided(own) != _divided(data):
        prepared = prepare(data, tokenizer)
        for sentence in overlap(directory, data, describe(prepared, data)):
            log.warning("%s.", sentence)
        return _documents(prepared)
    if record is None:
        log.warning(
            "%s has no record of its data: it is not known whether its text is still what it was trained on.",
            directory,
        )
        return _documents(prepare(data, tokenizer))
    recorded = recorded_heldout(record, data)
    if changed_data is ChangedData.RECORDED:
        if recorded is None:
            raise ValueError(
                f"{data.cache_path} does not have the text that was prepared for {directory}: leave "
                "--changed-data out"
            )
        return recorded
    try:
        prepared = prepare(data, tokenizer)
    except ValueError as error:
        if recorded is None:
            raise
        log.warning(
            "%s The held-out text is evaluated as it was prepared for training, in %s.",
            error,
            data.cache_path,
        )
        return recorded
    if changed := differences(record, describe(prepared, data)):
        message = f"the data of {directory} changed since it was trained: {'; '.join(changed)}. {held_out_after_change(data)}"
        if changed_data is ChangedData.REFUSE:
            raise ValueError(f"{message} {_way_out(recorded is not None)}")
        log.warning("%s", message)
    return _documents(prepared)


def _way_out(has_recorded: bool) -> str:
    cached = (
        ""
        if not has_recorded
        else ", or recorded to evaluate it as it was prepared for training, which the cache still has"
    )
    return (
        f"Pass --changed-data allow to evaluate the text as it is now{cached} (in Python"
        " changed_data=slmjax.data.provenance.ChangedData.ALLOW), or restore the text."
    )


def _documents(prepared: Prepared) -> tuple[TokenShards, ...]:
    return prepared.heldout or tuple(shards for shards, _ in prepared.train)


def recorded_heldout(record: Record, data: DataConfig) -> tuple[TokenShards, ...] | None:
    """The held-out documents of a record, from the cache; None if it does not have all of them, as they
    were.
    """
    found = []
    for entry in record:
        held_out = entry.get(HELDOUT)
        if held_out is None:
            return None
        try:
            shards = TokenShards.open(
                data.cache_path / "shards" / entry["shards"] / HELDOUT, tokenizer_hash=entry["tokenizer"]
            )
        except ValueError:  # gone, damaged or of another format
            return None
        if shards.hash != held_out["hash"]:
            return None
        found.append(shards)
    return tuple(found)


# Other models -----------------------------------------------------------------------------------------------
def overlap(directory: Path, data: DataConfig, now: Record) -> list[str]:
    """A sentence for each source of which the model in `directory` was, or may have been, trained on text
    that `data` evaluates.

    That is a source which is in its record too, by its name or its content, and is divided otherwise here.

    Args:
      directory: a run, or a model; nothing is known of a model of other people.
      data: what is evaluated: its held-out part, or all of it where nothing is held out.
      now: its record (`describe`).
    """
    try:
        own = own_data(directory)
    except ConfigError as error:
        return [
            (
                f"it is not known whether {directory} was trained on what is held out here: its settings "
                "cannot "
                f"be read ({error})"
            )
        ]
    if own is None:
        return []
    before = read_record(directory)
    if before is None:
        before = [{"source": weighted.source.describe()} for weighted in own.mixture]
    found = []
    for entry in now:
        same = [one for one in before if _is_same_source(one, entry)]
        if same and not any(_holds_out_the_same(one, entry, own, data) for one in same):
            found.append(
                f"{directory} was trained on text of {entry['source']} too, and there {_in_words(own)}, here "
                f"{_in_words(data)}: some of"
                " what is evaluated here may have been trained on, so that its loss may be too low"
            )
    return found


def overlap_with_own(directory: Path, own: Path) -> list[str]:
    """As `overlap`, with the text that the model in `own` holds out; nothing is said where it is not
    known.
    """
    data = _readable_own_data(own)
    now = read_record(own)
    return [] if data is None or now is None or data.heldout_fraction == 0 else overlap(directory, data, now)


def _is_same_source(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    has_same_content = "fingerprint" in one and one["fingerprint"] == other.get("fingerprint")
    # Records that were moved to a file of another name are the same text; the fingerprint of a file has its
    # name.
    has_same_sizes = (
        HELDOUT in one and one.get("tokenizer") == other["tokenizer"] and _total(one) == _total(other)
    )
    return one["source"] == other["source"] or has_same_content or has_same_sizes


def _total(entry: Mapping[str, Any]) -> tuple[int, ...]:
    """Documents, bytes and tokens of both sides of a source."""
    sides = [entry, entry[HELDOUT]] if entry[HELDOUT] is not None else [entry]
    return tuple(sum(int(side[name]) for side in sides) for name in ("documents", "bytes", "tokens"))


def _holds_out_the_same(
    before: Mapping[str, Any], now: Mapping[str, Any], own: DataConfig, data: DataConfig
) -> bool:
    """Return whether all that is evaluated was held out of the other training too."""
    if (
        data.heldout_fraction > 0
        and before.get("hash") == now["hash"]
        and before.get(HELDOUT, now.get(HELDOUT)) == now.get(HELDOUT)
    ):
        return True
    is_within = 0 < data.heldout_fraction <= own.heldout_fraction and (own.split, own.heldout_by) == (
        data.split,
        data.heldout_by,
    )
    follows_content = data.split is Split.DOCUMENTS and data.heldout_by is HeldOutBy.CONTENT
    return is_within and (
        follows_content or ("fingerprint" in before and before["fingerprint"] == now.get("fingerprint"))
    )


def _in_words(data: DataConfig) -> str:
    if data.heldout_fraction == 0:
        return "nothing is held out"
    kind = (
        "of each document's tail"
        if data.split is Split.TAIL
        else f"of the documents, by {data.heldout_by.value},"
    )
    return f"{data.heldout_fraction:g} {kind} is held out"


def own_data(directory: Path) -> DataConfig | None:
    """The data settings of a run, or of a model made of one; None for a model of other people.

    Raises:
      ConfigError: they name classes that are not known.
    """
    settings = read_settings(directory).get("data")
    try:
        return None if settings is None else from_json(DataConfig, settings)
    except ConfigError as error:
        raise ConfigError(f"{directory}: data.{error}") from error


def _readable_own_data(directory: Path) -> DataConfig | None:
    """As `own_data`; None too for settings that cannot be read."""
    try:
        return own_data(directory)
    except ConfigError:
        return None


def _divided(data: DataConfig) -> tuple[Any, ...]:
    """The settings that decide which documents are held out, and what they are."""
    sources: list[Any] = []
    for weighted in data.mixture:
        source = weighted.source
        if isinstance(source, TextSource):
            source = dataclasses.replace(source, path=str(Path(source.path).expanduser().absolute()))
        sources.append(source)
    rules = data.split, data.heldout_by, data.heldout_fraction, data.on_bad_document, data.max_document_bytes
    return sources, rules, data.scored_turns, data.special_tokens
