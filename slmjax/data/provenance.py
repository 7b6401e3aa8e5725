"""The data record of a run: the text it was trained on and held out, and whether that text is still the same.

    record = read_record(run_dir)                   # data.json of a run, or "data" in origin.json of a model
    now = describe(prepared, data)
    differences(record, now)                        # a sentence for each changed source
    documents_to_evaluate(run_dir, data, ...)       # held-out documents, with the record checked
    overlap(teacher_dir, data, now)                 # a sentence for each source whose held-out text that
    model
                                                    # was trained on

Documents are held out by the content of a record or the name of a file (`DataConfig.heldout_by`), so that a
changed source does not by itself move training text into the held-out set. But metrics are then of other
text.
"""

import dataclasses
import enum
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmjax.config import ConfigError, from_json
from slmjax.data.config import DataConfig, HeldOutBy, TextSource
from slmjax.data.preparation import Prepared, prepare
from slmjax.data.shards import TokenShards
from slmjax.data.splitting import HELDOUT, SplitRule
from slmjax.data.tokenizers import TokenizerConfig
from slmjax.stored_json import DamagedFile, check_list, check_object, read_json, read_object

log = logging.getLogger(__name__)

RECORD_FILE = "data.json"
Record = list[dict[str, Any]]  # one entry per source of the mixture


class ChangedData(enum.Enum):
    """The behaviour of an evaluation on a run's held-out text if its sources have changed since training."""

    REFUSE = "refuse"  # an error that names the changed sources
    ALLOW = "allow"  # evaluate the text as it is now
    RECORDED = "recorded"  # evaluate the text as it was prepared for training, if the cache still has it


# The record -------------------------------------------------------------------------------------------------
def describe(prepared: Prepared, data: DataConfig) -> Record:
    """Return the record of prepared data: per source its weight, and sizes and hashes of both sides."""
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
                "split": shards.manifest.split_rule or data.split.value,
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


_REMEDY = "restore it from a backup, or delete it: evaluations then cannot tell whether the text has changed"
_COUNTS: dict[str, type] = {"documents": int, "bytes": int, "hash": str}
# Records of early versions lack some of these.
_ADDED: dict[str, type] = {
    "weight": float,
    "fingerprint": str,
    "tokenizer": str,
    "shards": str,
    HELDOUT: dict,
}


def read_record(directory: Path) -> Record | None:
    """Return the record of a run or of a model made from one; None without. ValueError if damaged."""
    path = directory / RECORD_FILE
    if path.is_file():
        return _checked(read_json(path, remedy=_REMEDY), str(path))
    origin = directory / "origin.json"
    data = read_object(origin, remedy=_REMEDY).get("data") if origin.is_file() else None
    return None if data is None else _checked(data, f"data of {origin}")


def _checked(value: Any, name: str) -> Record:
    record = check_list(value, {"source": str, **_COUNTS}, optional=_ADDED, name=name, remedy=_REMEDY)
    sizes = {**_COUNTS, "tokens": int}
    for entry in record:
        # Sources are recognised by the sum of both sides, of which the second may be empty.
        if HELDOUT in entry:
            check_object(entry, sizes, name=name, remedy=_REMEDY)
        rules = [rule.value for rule in SplitRule]
        if entry.get("split", rules[0]) not in rules:
            raise DamagedFile(f"{name} has split {entry['split']!r}, none of {rules}: {_REMEDY}")
        if entry.get(HELDOUT) is not None:
            check_object(entry[HELDOUT], sizes, name=f"{HELDOUT} of {name}", remedy=_REMEDY)
            # The text is looked for by these, in the cache of prepared text.
            check_object(entry, {"tokenizer": str, "shards": str}, name=name, remedy=_REMEDY)
    return record


def read_settings(directory: Path) -> dict[str, Any]:
    """Return the experiment, as JSON, of a run or of a model made from one; empty for other models.

    Raises:
      ValueError: it is damaged.
    """
    remedy = "restore it from a backup"
    name = str(directory / "config.json")
    if (directory / "config.json").is_file():
        experiment = read_object(directory / "config.json", remedy=remedy)
    elif (origin := directory / "origin.json").is_file():
        name = f"experiment of {origin}"
        experiment = read_object(origin, optional={"experiment": dict}, remedy=remedy).get("experiment")
    else:
        experiment = None
    if experiment is None:
        return {}
    check_object(experiment, optional={"data": dict, "eval": dict}, name=name, remedy=remedy)
    # Evaluations of the model have the run's own settings.
    evaluation = {"overlap": int, "score": str}
    check_object(experiment.get("eval") or {}, optional=evaluation, name=f"eval of {name}", remedy=remedy)
    return {part: settings for part, settings in experiment.items() if settings is not None}


# Then and now -----------------------------------------------------------------------------------------------
def differences(before: Record, now: Record) -> list[str]:
    """Describe how the present text differs from a record: a clause for each changed source."""
    # Sources are compared in order, which needs equal numbers of them.
    if len(before) != len(now):
        names = [", ".join(entry["source"] for entry in entries) for entries in (before, now)]
        return [f"the mixture had {len(before)} source(s) ({names[0]}) and has {len(now)} ({names[1]})"]
    changes = []
    for entry, other in zip(before, now, strict=True):
        if not _is_same(entry, other):
            moved = "" if entry["source"] == other["source"] else f" (formerly {entry['source']})"
            changes.append(f"{other['source']}{moved} {_difference(entry, other)}")
    return changes


def _is_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether all documents are the same. Records of early versions lack the held-out side."""
    return before["hash"] == now["hash"] and (HELDOUT not in before or before[HELDOUT] == now[HELDOUT])


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if before.get("tokenizer", now["tokenizer"]) != now["tokenizer"]:
        return "is encoded by another tokenizer"
    was = _counted(before)
    counts = f"had {was}, and has {_counted(now)}"
    # Equal sources with other documents: the settings or the version have changed the preparation.
    if "fingerprint" in before and before["fingerprint"] == now["fingerprint"]:
        return f"is the same text, prepared with other settings or by another version of slmjax: it {counts}"
    if was == _counted(now if HELDOUT in before else {**now, HELDOUT: None}):
        older = (
            ""
            if "fingerprint" in before
            else ", or an earlier version of slmjax encoded the same text in another way"
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


def held_out_after_change(data: DataConfig, record: Record) -> str:
    """Return a sentence on the consequences of a changed source for the held-out text of a run.

    `record` is that of the run, or of the present text.
    """
    if any(_rule(entry, data) is not SplitRule.DOCUMENTS for entry in record):
        return (
            "The held-out tail of an edited document begins at another place, so that text that was trained "
            "on may be held out now."
        )
    if data.heldout_by is HeldOutBy.ID:
        return (
            "This run holds out records by file and line, so that records that moved may have been trained "
            "on and be held out now."
        )
    return (
        "Records are held out by their content and files by their name, so that no document that was trained "
        "on is held out now, but the held-out text may be other text."
    )


def _rule(entry: Mapping[str, Any], data: DataConfig) -> SplitRule:
    """Return how a source was split. Records of earlier versions leave it to the settings."""
    return SplitRule(entry.get("split", data.split.value))


def changes_on_resume(run: Path, data: DataConfig, now: Record) -> list[str]:
    """Return sentences about changed sources, or another split of the same text, for a run that resumes."""
    own = own_data(run)
    before = read_record(run)
    if own is not None and any(
        getattr(own, name) != getattr(data, name) for name in ("split", "heldout_by", "heldout_fraction")
    ):
        return overlap(run, data, now)
    before = before or []
    changed = differences(before, now) if before else []
    return (
        [
            f"the data of {run} changed since it was trained: {'; '.join(changed)}. The run continues with "
            f"the text as it is now. {held_out_after_change(data, [*before, *now])}"
        ]
        if changed
        else []
    )


# What is evaluated ------------------------------------------------------------------------------------------
def documents_to_evaluate(
    directory: Path, data: DataConfig, tokenizer: TokenizerConfig, *, changed_data: ChangedData
) -> tuple[TokenShards, ...]:
    """Return the held-out documents of `data`, or all of them if nothing is held out.

    If `data` is what the model in `directory` was trained on, it is compared with the model's record. If its
    sources cannot be read any more, the text that was prepared for training is evaluated, if the cache has
    it. If `data` splits the same text in another way, a warning names the sources on which the model may have
    been trained.

    Raises:
      ValueError: the text has changed and `changed_data` is REFUSE; it is RECORDED and the cache does not
        have the text; or as `prepare`.
    """
    own = _readable_own_data(directory)
    record = read_record(directory)
    # Other data, or another split of it: the record says nothing about this text.
    if own is None or _split_settings(own) != _split_settings(data):
        prepared = prepare(data, tokenizer)
        for sentence in overlap(directory, data, describe(prepared, data)):
            log.warning("%s.", sentence)
        return _documents(prepared)
    if record is None:
        log.warning(
            "%s has no record of its data: it is unknown whether its text is still what it was trained on.",
            directory,
        )
        return _documents(prepare(data, tokenizer))
    # The cache may still have the text of training, even if its source has changed or is gone.
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
    # Metrics of changed text would not compare with those of the run, so the user has to decide.
    if changed := differences(record, describe(prepared, data)):
        message = (
            f"the data of {directory} changed since it was trained: {'; '.join(changed)}. "
            f"{held_out_after_change(data, record)}"
        )
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
    # Data that holds nothing out is evaluated completely, for example a separate test file.
    return prepared.heldout or tuple(shards for shards, _ in prepared.train)


def recorded_heldout(record: Record, data: DataConfig) -> tuple[TokenShards, ...] | None:
    """Return the held-out documents of a record from the cache; None if they are incomplete or changed."""
    heldout = []
    for entry in record:
        held_out = entry.get(HELDOUT)
        if held_out is None:
            return None
        try:
            shards = TokenShards.open(
                data.cache_path / "shards" / entry["shards"] / HELDOUT, tokenizer_hash=entry["tokenizer"]
            )
        except ValueError:  # missing, damaged or of another format
            return None
        if shards.hash != held_out["hash"]:
            return None
        heldout.append(shards)
    return tuple(heldout)


# Other models -----------------------------------------------------------------------------------------------
def overlap(directory: Path, data: DataConfig, now: Record) -> list[str]:
    """Return a sentence for each source where the model in `directory` may be trained on evaluated text.

    That is a source which is in its record, too, by its name or its content, and is split in another way
    here.

    Args:
      directory: a run, or a model; nothing is known of models that slmjax did not train.
      data: the evaluated data: its held-out part, or all of it if nothing is held out.
      now: its record (`describe`).
    """
    try:
        own = own_data(directory)
    except ConfigError as error:
        return [
            f"it is unknown whether {directory} was trained on the text held out here: its settings cannot "
            f"be read ({error})"
        ]
    if own is None:
        return []
    before = read_record(directory)
    if before is None:
        # Runs of early versions have no record. Their sources are known by name alone.
        before = [{"source": weighted.source.describe()} for weighted in own.mixture]
    sentences = []
    for entry in now:
        # A source may occur several times in a mixture.
        same = [other for other in before if _is_same_source(other, entry)]
        if same and not any(_holds_out_the_same(other, entry, own, data) for other in same):
            sentences.append(
                f"{directory} was trained on text of {entry['source']} too, and there "
                f"{_held_out_clause(own, same[0])}, here {_held_out_clause(data, entry)}: some of the text "
                "evaluated here may have been trained on, so that its loss may be too low"
            )
    return sentences


def overlap_with_own(directory: Path, own: Path) -> list[str]:
    """Return `overlap` with the text that the model in `own` holds out; empty if that is unknown."""
    data = _readable_own_data(own)
    now = read_record(own)
    return [] if data is None or now is None or data.heldout_fraction == 0 else overlap(directory, data, now)


def _is_same_source(before: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    # A renamed dataset is recognised by its content.
    has_same_content = "fingerprint" in before and before["fingerprint"] == other.get("fingerprint")
    # Records in a file that was renamed are the same text, but the fingerprint includes the name.
    has_same_sizes = (
        HELDOUT in before
        and before.get("tokenizer") == other["tokenizer"]
        and _total(before) == _total(other)
    )
    return before["source"] == other["source"] or has_same_content or has_same_sizes


def _total(entry: Mapping[str, Any]) -> tuple[int, ...]:
    """Return documents, bytes and tokens of both sides of a source."""
    sides = [entry, entry[HELDOUT]] if entry[HELDOUT] is not None else [entry]
    return tuple(sum(int(side[name]) for side in sides) for name in ("documents", "bytes", "tokens"))


def _holds_out_the_same(
    before: Mapping[str, Any], now: Mapping[str, Any], own: DataConfig, data: DataConfig
) -> bool:
    """Return whether all evaluated text was held out of the other training, too."""
    if (
        data.heldout_fraction > 0
        and before.get("hash") == now["hash"]
        and before.get(HELDOUT, now.get(HELDOUT)) == now.get(HELDOUT)
    ):
        return True
    # A smaller fraction under the same rule holds out a subset of the documents.
    rule = _rule(now, data)
    # Where the end of each document is held out from a boundary on, fractions are not nested.
    is_nested = data.heldout_fraction == own.heldout_fraction or rule is not SplitRule.BOUNDARY
    is_within = (
        is_nested
        and 0 < data.heldout_fraction <= own.heldout_fraction
        and (_rule(before, own), own.heldout_by) == (rule, data.heldout_by)
    )
    follows_content = rule is SplitRule.DOCUMENTS and data.heldout_by is HeldOutBy.CONTENT
    return is_within and (
        follows_content or ("fingerprint" in before and before["fingerprint"] == now.get("fingerprint"))
    )


def _held_out_clause(data: DataConfig, entry: Mapping[str, Any]) -> str:
    if data.heldout_fraction == 0:
        return "nothing is held out"
    kind = (
        "of each document's tail"
        if _rule(entry, data) is not SplitRule.DOCUMENTS
        else f"of the documents, by {data.heldout_by.value},"
    )
    return f"{data.heldout_fraction:g} {kind} is held out"


def own_data(directory: Path) -> DataConfig | None:
    """Return the data settings of a run, or of a model made from one; None for other models.

    Raises:
      ConfigError: they have classes that are not known.
    """
    settings = read_settings(directory).get("data")
    try:
        return None if settings is None else from_json(DataConfig, settings)
    except ConfigError as error:
        raise ConfigError(f"{directory}: data.{error}") from error


def _readable_own_data(directory: Path) -> DataConfig | None:
    """Return `own_data`, or None if the settings cannot be read."""
    try:
        return own_data(directory)
    except ConfigError:
        return None


def _split_settings(data: DataConfig) -> tuple[Any, ...]:
    """Return the settings that decide the held-out documents and their text."""
    sources: list[Any] = []
    for weighted in data.mixture:
        source = weighted.source
        if isinstance(source, TextSource):
            # Paths may be written in several ways.
            source = dataclasses.replace(source, path=str(Path(source.path).expanduser().absolute()))
        sources.append(source)
    rules = data.split, data.heldout_by, data.heldout_fraction, data.on_bad_document, data.max_document_bytes
    return sources, rules, data.scored_turns, data.special_tokens
