"""model_card.md of an exported model: architecture, training, quality, data, and fields for its author."""

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slmjax.checkpoints.stored_model import LocalModel, read_origin
from slmjax.data import provenance
from slmjax.data.lost_text import lost_note
from slmjax.formats.presets import name_of
from slmjax.models import zoo
from slmjax.stored_json import read_object
from slmjax.telemetry.report.settings import History, changed_settings
from slmjax.telemetry.run_directory import read_result, sessions

TO_FILL_IN = "to be filled in"


def write_card(local_model: LocalModel, path: Path, *, title: str, family: str) -> None:
    """Write the card of a run's model or an imported one. Metrics that were not measured are marked so."""
    path.write_text("\n".join(_lines(local_model, title=title, family=family)) + "\n", encoding="utf-8")


def _lines(local_model: LocalModel, *, title: str, family: str) -> Iterator[str]:
    origin = read_origin(local_model.path)
    # A run that started from an imported model inherits its licence terms, which the card must show.
    settings = _json(local_model.path / "config.json", init=dict)
    base = (settings.get("init") or {}).get("path")  # model that a run started from
    base_origin = read_origin(Path(base)) if base else {}
    license_name = origin.get("license") or TO_FILL_IN
    yield from (
        "---",
        f"license: {origin.get('license') or 'other'}",
        "library_name: slmjax",
        "---",
        "",
        f"# {title}",
        "",
    )
    yield from _table("Model", _model_rows(local_model, family))
    if origin:
        yield from _table("Origin", _origin_rows(origin))
    else:
        if base:
            rows = [("started from", base)]
            if base_origin:
                rows.append(("licence", str(base_origin.get("license") or "unknown")))
                rows += _origin_rows(base_origin)
            yield from _table("Base model", rows)
        yield from _table("Training", _training_rows(local_model))
        yield from _table("Quality", _quality_rows(read_result(local_model.path) or {}))
        yield from _table("Data", _data_rows(local_model.path))
    yield from _table("Licence", [("of the weights", license_name), ("of the training data", TO_FILL_IN)])
    yield from ("## Intended use", "", TO_FILL_IN.capitalize() + ".", "")


def _table(heading: str, rows: list[tuple[str, str]]) -> Iterator[str]:
    yield from (f"## {heading}", "", "| | |", "|---|---|")
    # A table without a header is not Markdown, so that the header cells are empty.
    for name, value in rows:
        yield f"| {name} | {value} |"
    yield ""


def _model_rows(local_model: LocalModel, family: str) -> list[tuple[str, str]]:
    summary = zoo.describe(local_model.config)
    config = local_model.config
    formats = collections.Counter(name_of(stored.spec) for stored in local_model.formats.values())
    return [
        ("architecture", family),
        ("parameters", f"{summary.parameters:,} ({summary.active_parameters:,} active)"),
        ("layers", str(config.num_layers)),
        ("width", str(config.embed_dim)),
        ("vocabulary", f"{config.known_vocab_size:,} tokens"),
        ("context", f"{config.context_length:,} tokens"),
        *(
            [("number formats", ", ".join(f"{name} ({count} matrices)" for name, count in formats.items()))]
            if formats
            else []
        ),
    ]


def _origin_rows(origin: dict[str, Any]) -> list[tuple[str, str]]:
    files = [(f"SHA-256 of {name}", digest) for name, digest in (origin.get("files") or {}).items()]
    # A quantized model's origin is a run or model of ours, an imported one's another library's files.
    if quantized := origin.get("quantized"):
        return [
            ("quantized from", f"{origin.get('source')}, step {origin.get('step')}"),
            ("by", f"{quantized.get('method')}, clip {quantized.get('clip')}"),
        ]
    return [
        ("imported from", str(origin.get("source"))),
        ("as", f"{origin.get('family')} ({origin.get('format')})"),
        *files,
    ]


def _training_rows(local_model: LocalModel) -> list[tuple[str, str]]:
    # A run that was stopped has no result yet: each file may be absent, and its rows are then "unknown".
    result = read_result(local_model.path) or {}
    environment = _json(local_model.path / "environment.json", packages=dict)
    experiment = _json(local_model.path / "config.json", optim=dict, data=dict, run=dict)
    optim, data, run = (experiment.get(name) or {} for name in ("optim", "data", "run"))
    commit = environment.get("commit")
    return [
        ("steps", str(local_model.step)),
        ("tokens", _number(result.get("run_tokens"))),
        ("seconds", _number(result.get("run_seconds"))),
        ("seed", str(run.get("seed", "unknown"))),
        ("batch", f"{data.get('batch_size')} sequences of {data.get('sequence_length')} tokens"),
        ("optimizer", f"{optim.get('kind')}, learning rate {optim.get('lr')}"),
        ("commit", f"{commit}{' with changes' if environment.get('dirty') else ''}" if commit else "unknown"),
        (
            "packages",
            ", ".join(f"{name} {version}" for name, version in (environment.get("packages") or {}).items())
            or "unknown",
        ),
        *_changes(local_model.path, experiment),
    ]


def _changes(path: Path, experiment: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a row for each setting that a resumed session of a run changed: the rows above have the last."""
    for name, values in changed_settings(experiment, sessions(path)).items():
        yield f"{name}, changed", History(tuple(values)).text()


def _measured_on(result: dict[str, Any]) -> str:
    text = str(result.get("measured_on"))
    # An evaluation of an earlier step names the step itself.
    return text if ", after step" in text else f"{text}, after step {_number(result.get('step'))}"


def _quality_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    if not result:
        return [("loss", "not measured: the run did not finish"), ("bits per byte", "not measured")]
    return [
        ("measured on", _measured_on(result)),
        ("loss", f"{_digits(result.get('loss'))} nats per token"),
        (
            "bits per byte",
            _digits(result.get("bits_per_byte"))
            + (f" ({lost_note(lost)})" if (lost := result.get("lost_text")) else ""),
        ),
        *(
            (f"bits per byte of {name}", _digits(bits))
            for name, bits in (result.get("compressors") or {}).items()
        ),
    ]


def _data_rows(run: Path) -> list[tuple[str, str]]:
    return [
        (
            source["source"],
            (
                f"weight {source.get('weight') or 1.0:g}, {source['documents']:,} documents, "
                f"{_number(source.get('tokens'))} tokens, hash `{source['hash']}`"
            ),
        )
        for source in provenance.read_record(run) or ()
    ] or [("sources", "unknown")]


def _json(path: Path, **parts: type) -> dict[str, Any]:
    """Return the object in a file of a run, empty where there is none; `parts` are objects in it."""
    if not path.is_file():
        return {}
    return read_object(path, optional=parts, remedy="restore it, or delete it: the card then lacks it")


def _number(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else "unknown"


def _digits(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "not measured"
