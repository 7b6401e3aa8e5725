"""Round to nearest: every matrix of a trained model in a number format, without any further training.

    quantize_model("runs/nano", "nano_q4", rules=(QuantRule(paths=".", weight=preset("q4_0")),),
    clip=Clip.SEARCH)

What is written is a directory like that of an imported model, with codes and scales as they are: every
command takes it, and none of them rounds again. The best clip is searched for each group by itself: of the
scales around the format's own, that with the smallest squared error.

Dims of a matrix: I inputs, O outputs; those of a table [V, D] the other way around. Experts have a dim in
front, mapped over.
"""

import dataclasses
import enum
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slmjax.atomic_files import atomic_directory
from slmjax.checkpoints import safetensors_files
from slmjax.checkpoints.model_file import write_model_file
from slmjax.checkpoints.safetensors_files import StoredFormat
from slmjax.checkpoints.stored_model import LocalModel, open_local_model, read_origin
from slmjax.data.provenance import read_record
from slmjax.data.tokenizers import Tokenizer
from slmjax.formats.coding import Encoded, decode, encode, expanded
from slmjax.formats.presets import name_of
from slmjax.formats.spec import QuantSpec, stored_bytes
from slmjax.quantization.assignment import CACHE, SCALE_ESTIMATORS, Assignment
from slmjax.quantization.estimators import best_scale, squared_error
from slmjax.quantization.plan import assign_model_formats, shapes_of
from slmjax.quantization.rules import QuantPhase, QuantRule
from slmjax.quantization.weights import map_matrices
from slmjax.telemetry.run_directory import write_json


class Clip(enum.Enum):
    """Where numbers are cut off."""

    NONE = "none"  # at the scale that the format computes
    SEARCH = "search"  # at the one with the smallest squared error, of each group


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundedMatrix:
    """What rounding did to one parameter."""

    path: str  # logical
    format: str
    numbers: int
    bytes: int  # as stored, codes packed
    nearest_error: float  # mean squared error with the format's own scales
    error: float  # mean squared error as written
    power: float  # mean square of the numbers themselves


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized:
    """What `quantize_model` wrote."""

    path: str
    parameters: int  # numbers in all weights
    bytes: int  # of them as stored, codes packed, the rest in float32
    matrices: tuple[RoundedMatrix, ...]

    @property
    def nearest_error(self) -> float:
        """Squared error of all rounded numbers over their squares, with the formats' own scales."""
        return _share(self.matrices, "nearest_error")

    @property
    def error(self) -> float:
        """The same as written."""
        return _share(self.matrices, "error")


def _share(matrices: Sequence[RoundedMatrix], name: str) -> float:
    power = sum(one.numbers * one.power for one in matrices)
    return sum(one.numbers * getattr(one, name) for one in matrices) / power if power else 0.0


def quantize_model(
    source: str | Path,
    out: str | Path,
    *,
    rules: Sequence[QuantRule],
    clip: Clip = Clip.NONE,
    step: int | None = None,
) -> Quantized:
    """Writes a run's or an imported model with its matrices in number formats.

    Args:
      source: a run directory or an imported model's. What it multiplies with is rounded: of a quantized one,
        the decoded numbers.
      out: the directory to write, which is not there yet.
      rules: the formats; the first whose expression is found in a path counts.
      clip: how scales are chosen.
      step: of a run, the checkpoint; None for the newest.

    Raises:
      ValueError: a rule names nothing, a format cannot hold a parameter's width, or `out` exists already.
    """
    _refuse_learned(rules)
    source = Path(source)
    out = Path(out)
    own = open_local_model(source, step=step)
    model = dataclasses.replace(own.config, vocab_multiple=1)
    entries = {
        path: entry
        for path, entry in assign_model_formats(rules, model, shapes_of(model)).items()
        if not path.endswith(CACHE)
    }
    matrices: list[RoundedMatrix] = []
    sizes: list[tuple[int, int]] = []

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, entry in entries.items():
            array = own.read(name)
            if entry.weight is None:
                sizes.append((array.size, array.size * 4))
                yield name, array
                continue
            encoded, report = _rounded(entry, np.asarray(array, np.float32), clip)
            matrices.append(report)
            sizes.append((report.numbers, report.bytes))
            yield from safetensors_files.in_codes(name, encoded)

    with atomic_directory(out) as directory:
        safetensors_files.write_tensors(directory / safetensors_files.DIRECTORY, tensors())
        coded = {name: entry.weight for name, entry in entries.items() if entry.weight is not None}
        safetensors_files.write_formats(
            directory, {name: StoredFormat(spec=one.spec, axis=one.axis) for name, one in coded.items()}
        )
        write_model_file(directory, model, phases=(QuantPhase(rules=tuple(rules)),))
        if (source / "tokenizer").is_dir():
            Tokenizer.load(source / "tokenizer").save(directory / "tokenizer")
        write_json(directory / "origin.json", _origin(own, matrices, clip))
    return Quantized(
        path=str(out),
        parameters=sum(numbers for numbers, _ in sizes),
        bytes=sum(size for _, size in sizes),
        matrices=tuple(matrices),
    )


def _refuse_learned(rules: Sequence[QuantRule]) -> None:
    """Refuses scales that only training finds."""
    if learned := [rule for rule in rules if isinstance(rule.input_estimator, SCALE_ESTIMATORS)]:
        raise ValueError(
            f"the rule for {learned[0].paths!r} has inputs whose scale is learned or measured, which takes "
            "training: leave input_estimator "
            "out, or train with it (`slmjax train --init-from`)"
        )


def _origin(own: LocalModel, matrices: Sequence[RoundedMatrix], clip: Clip) -> dict[str, Any]:
    """Where the numbers come from, and what text the run held out."""
    before = read_origin(own.path)
    file = own.path / "config.json"
    experiment = (
        json.loads(file.read_text(encoding="utf-8")) if file.is_file() else before.get("experiment", {})
    )
    return {
        "format": "slmjax",
        "family": own.family,
        "source": str(own.path.absolute()),
        "step": own.step,
        "license": before.get("license"),
        "quantized": {
            "method": "rtn",
            "clip": clip.value,
            "formats": {one.path: one.format for one in matrices},
        },
        "experiment": {name: experiment[name] for name in ("data", "eval") if name in experiment},
        "data": read_record(own.path),
    }


def _rounded(entry: Assignment, array: np.ndarray, clip: Clip) -> tuple[Encoded, RoundedMatrix]:
    assert entry.weight is not None
    spec = entry.weight.spec
    axis = entry.weight.axis
    encoded, nearest_error, error = jax.device_get(_coded(array, spec, axis, clip))
    return encoded, RoundedMatrix(
        path=entry.path,
        format=name_of(spec),
        numbers=array.size,
        bytes=stored_bytes(spec, array.shape, axis=axis),
        nearest_error=float(np.mean(nearest_error)),
        error=float(np.mean(error)),
        power=float(np.mean(np.square(array, dtype=np.float64))),
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _coded(array: Array, spec: QuantSpec, axis: int, clip: Clip) -> tuple[Encoded, Array, Array]:
    """One matrix, or that of each expert by itself."""

    def one(matrix: Array) -> tuple[Encoded, Array, Array]:
        return nearest(matrix, spec, axis) if clip is Clip.NONE else with_best_clip(matrix, spec, axis)

    return map_matrices(one, array.ndim)(array)


def nearest(
    x: Float[Array, "I O"], spec: QuantSpec, axis: int
) -> tuple[Encoded, Float[Array, ""], Float[Array, ""]]:
    """Codes on the format's own scales, and the mean squared error, twice."""
    encoded = encode(x, spec, axis=axis)
    error = jnp.mean(jnp.square(decode(encoded, spec, axis=axis) - x))
    return encoded, error, error


def with_best_clip(
    x: Float[Array, "I O"], spec: QuantSpec, axis: int
) -> tuple[Encoded, Float[Array, ""], Float[Array, ""]]:
    """Codes on scales of which each has the smallest squared error of those tried, and the mean squared error
    before and after.

    The format's own codes are among what is tried, so that no group is worse than without the search.
    """
    plain = encode(x, spec, axis=axis)
    before = squared_error(x, plain, spec, axis=axis)
    scale, error = best_scale(x, spec, axis=axis)
    searched = encode(x, spec, axis=axis, scale=scale)
    is_better = error < before

    def chosen(new: Array | None, old: Array | None) -> Array | None:
        return None if new is None or old is None else jnp.where(is_better, new, old)

    better_codes = (
        jnp.broadcast_to(expanded(is_better.astype(jnp.float32), x.shape[axis], axis=axis), x.shape) > 0
    )
    encoded = dataclasses.replace(
        plain,
        codes=jnp.where(better_codes, searched.codes, plain.codes),
        scale=chosen(searched.scale, plain.scale),
        zero=chosen(searched.zero, plain.zero),
    )
    return encoded, jnp.sum(before) / x.size, jnp.sum(jnp.minimum(error, before)) / x.size
