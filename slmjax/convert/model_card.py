"""model_card.md of an exported model: what it is, what it was trained on, how good it is, and what is left
for its author to say.
"""

import collections
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slmjax.checkpoints.stored_model import LocalModel, read_origin
from slmjax.data.lost_text import lost_note
from slmjax.formats.presets import name_of
from slmjax.models import zoo

TO_FILL_IN = "to be filled in"


def write_card(own: LocalModel, path: Path, *, title: str, family: str) -> None:
    """Writes the card of a run's or an imported model. Figures that nobody measured are said to be
    missing.
    """
    path.write_text("\n".join(_lines(own, title=title, family=family)) + "\n", encoding="utf-8")


def _lines(own: LocalModel, *, title: str, family: str) -> Iterator[str]:
    origin = read_origin(own.path)
    base = _json(own.path / "config.json").get("init", {}).get("path")  # what a run started from
    before = read_origin(Path(base)) if base else {}
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
    yield from _table("Model", _model_rows(own, family))
    if origin:
        yield from _table("Origin", _origin_rows(origin))
    else:
        if base:
            known = (
                [("licence", str(before.get("license") or "unknown")), *_origin_rows(before)]
                if before
                else []
            )
            yield from _table("Base model", [("started from", base), *known])
        yield from _table("Training", _training_rows(own))
        yield from _table("Quality", _quality_rows(_json(own.path / "result.json")))
        yield from _table("Data", _data_rows(own.path))
    yield from _table("Licence", [("of the weights", license_name), ("of the training data", TO_FILL_IN)])
    yield from ("## Intended use", "", TO_FILL_IN.capitalize() + ".", "")


def _table(heading: str, rows: list[tuple[str, str]]) -> Iterator[str]:
    yield from (f"## {heading}", "", "| | |", "|---|---|")
    for name, value in rows:
        yield f"| {name} | {value} |"
    yield ""


def _model_rows(own: LocalModel, family: str) -> list[tuple[str, str]]:
    summary = zoo.describe(own.config)
    config = own.config
    formats = collections.Counter(name_of(stored.spec) for stored in own.formats.values())
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
    files = [(f"SHA-256 of {name}", digest) for name, digest in origin.get("files", {}).items()]
    if "quantized" in origin:
        how = origin["quantized"]
        return [
            ("quantized from", f"{origin.get('source')}, step {origin.get('step')}"),
            ("by", f"{how['method']}, clip {how['clip']}"),
        ]
    return [
        ("imported from", str(origin.get("source"))),
        ("as", f"{origin.get('family')} ({origin.get('format')})"),
        *files,
    ]


def _training_rows(own: LocalModel) -> list[tuple[str, str]]:
    result, environment, experiment = (
        _json(own.path / f"{name}.json") for name in ("result", "environment", "config")
    )
    optim, data, run = (experiment.get(name, {}) for name in ("optim", "data", "run"))
    commit = environment.get("commit")
    return [
        ("steps", str(own.step)),
        ("tokens", _number(result.get("tokens"))),
        ("seconds", _number(result.get("seconds"))),
        ("seed", str(run.get("seed", "unknown"))),
        ("batch", f"{data.get('batch_size')} rows of {data.get('sequence_length')} tokens"),
        ("optimizer", f"{optim.get('kind')}, learning rate {optim.get('lr')}"),
        ("commit", f"{commit}{' with changes' if environment.get('dirty') else ''}" if commit else "unknown"),
        (
            "packages",
            ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items())
            or "unknown",
        ),
    ]


def _quality_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    if not result:
        return [("loss", "not measured: the run did not come to its end"), ("bits per byte", "not measured")]
    return [
        ("measured on", f"{result.get('measured_on')}, after step {_number(result.get('step'))}"),
        ("loss", f"{_digits(result.get('loss'))} nats per token"),
        (
            "bits per byte",
            _digits(result.get("bits_per_byte"))
            + (f" ({lost_note(lost)})" if (lost := result.get("lost_text")) else ""),
        ),
        *(
            (f"bits per byte of {name}", _digits(bits))
            for name, bits in result.get("compressors", {}).items()
        ),
    ]


def _data_rows(run: Path) -> list[tuple[str, str]]:
    path = run / "data.json"
    sources = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [
        (
            one["source"],
            (
                f"weight {one['weight']:g}, {one['documents']:,} documents, {one['tokens']:,} tokens, hash "
                f"`{one['hash']}`"
            ),
        )
        for one in sources
    ] or [("sources", "unknown")]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _number(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else "unknown"


def _digits(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "not measured"
