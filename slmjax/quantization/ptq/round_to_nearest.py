"""Round to nearest: every matrix of a trained model in a number format, without any further training.

    rules = (QuantRule(paths=".", weight=preset("q4_0")),)
    quantize_model("runs/nano", "nano_q4", rules=rules, clip=Clip.SEARCH)

The result is a directory like that of an imported model, with codes and scales: every command takes it, and
none of them rounds again. The clipping range is searched for each group by itself: of the scales around the
one that the format computes, the one with the smallest squared error.

Dims of a matrix: I inputs, O outputs; those of a table [V, D] are in the other order. Experts have a dim in
front, mapped over.
"""

import dataclasses
import enum
import functools
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
from slmjax.data.provenance import read_record, read_settings
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
    """The clipping range of each group."""

    NONE = "none"  # at the scale that the format computes
    # To clip a few large numbers may cost less than a coarser step for all (Banner et al. 2019).
    SEARCH = "search"  # at the one with the smallest squared error, of each group


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundedMatrix:
    """The errors of rounding one parameter."""

    path: str  # logical
    format: str
    numbers: int
    bytes: int  # as stored, codes packed
    nearest_error: float  # mean squared error with the scales that the format computes
    error: float  # mean squared error as written
    power: float  # mean square of the parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized:
    """The result of `quantize_model`."""

    path: str
    parameters: int  # numbers in all weights
    bytes: int  # of them as stored, codes packed, the rest in float32
    matrices: tuple[RoundedMatrix, ...]

    @property
    def nearest_error(self) -> float:
        """Relative squared error of all rounded parameters, with the scales that the formats compute."""
        return _relative_error(self.matrices, "nearest_error")

    @property
    def error(self) -> float:
        """Relative squared error as written."""
        return _relative_error(self.matrices, "error")


def _relative_error(matrices: Sequence[RoundedMatrix], name: str) -> float:
    power = sum(matrix.numbers * matrix.power for matrix in matrices)
    error = sum(matrix.numbers * getattr(matrix, name) for matrix in matrices)
    return error / power if power else 0.0


def quantize_model(
    source: str | Path,
    out: str | Path,
    *,
    rules: Sequence[QuantRule],
    clip: Clip = Clip.NONE,
    step: int | None = None,
) -> Quantized:
    """Write a run's or an imported model with its matrices in number formats.

    Args:
      source: a run directory or an imported model's; of a quantized one, its dequantized weights are rounded.
      out: the directory to write, which does not exist.
      rules: the formats; the first rule that matches a path applies.
      clip: how scales are chosen.
      step: of a run, the checkpoint; None for the newest.

    Raises:
      ValueError: a rule matches nothing, a format does not divide a width, or `out` exists already.
    """
    _check_needs_no_training(rules)
    source = Path(source)
    out = Path(out)
    original = open_local_model(source, step=step)
    # Tables are written without their padding.
    model = dataclasses.replace(original.config, vocab_multiple=1)
    # Caches are rounded as they are computed: a file has nothing of them.
    assignments = {
        path: assignment
        for path, assignment in assign_model_formats(rules, model, shapes_of(model)).items()
        if not path.endswith(CACHE)
    }
    matrices: list[RoundedMatrix] = []
    sizes: list[tuple[int, int]] = []

    # A generator: one matrix after another is read, rounded and written.
    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, assignment in assignments.items():
            array = original.read(name)
            if assignment.weight is None:
                sizes.append((array.size, array.size * 4))
                yield name, array
                continue
            encoded, report = _round(assignment, np.asarray(array, np.float32), clip)
            matrices.append(report)
            sizes.append((report.numbers, report.bytes))
            yield from safetensors_files.in_codes(name, encoded)

    # A failure leaves no directory that looks like a model.
    with atomic_directory(out) as directory:
        safetensors_files.write_tensors(directory / safetensors_files.DIRECTORY, tensors())
        formats = {
            name: StoredFormat(spec=assignment.weight.spec, axis=assignment.weight.axis)
            for name, assignment in assignments.items()
            if assignment.weight is not None
        }
        safetensors_files.write_formats(directory, formats)
        write_model_file(directory, model, phases=(QuantPhase(rules=tuple(rules)),))
        if (source / "tokenizer").is_dir():
            Tokenizer.load(source / "tokenizer").save(directory / "tokenizer")
        # `matrices` is complete: `write_tensors` has consumed the generator.
        write_json(directory / "origin.json", _origin(original, matrices, clip))
    return Quantized(
        path=str(out),
        parameters=sum(count for count, _ in sizes),
        bytes=sum(size for _, size in sizes),
        matrices=tuple(matrices),
    )


def _check_needs_no_training(rules: Sequence[QuantRule]) -> None:
    """Raise ValueError for scales that only training or calibration finds."""
    if learned := [rule for rule in rules if isinstance(rule.input_estimator, SCALE_ESTIMATORS)]:
        raise ValueError(
            f"the rule for {learned[0].paths!r} has inputs whose scale is learned or measured, which takes "
            "training: leave input_estimator out, or train with it (`slmjax train --init-from`)"
        )


def _origin(model: LocalModel, matrices: Sequence[RoundedMatrix], clip: Clip) -> dict[str, Any]:
    """The record of the source of the weights, and of the text that its run held out."""
    # Of a model that was imported, the record of its own origin stays.
    before = read_origin(model.path)
    experiment = read_settings(model.path)
    return {
        "format": "slmjax",
        "family": model.family,
        "source": str(model.path.absolute()),
        "step": model.step,
        "license": before.get("license"),
        "quantized": {
            "method": "rtn",
            "clip": clip.value,
            "formats": {matrix.path: matrix.format for matrix in matrices},
        },
        "experiment": {name: experiment[name] for name in ("data", "eval") if name in experiment},
        "data": read_record(model.path),
    }


def _round(assignment: Assignment, array: np.ndarray, clip: Clip) -> tuple[Encoded, RoundedMatrix]:
    assert assignment.weight is not None
    spec = assignment.weight.spec
    axis = assignment.weight.axis
    encoded, nearest_error, error = jax.device_get(_encode(array, spec, axis, clip))
    return encoded, RoundedMatrix(
        path=assignment.path,
        format=name_of(spec),
        numbers=array.size,
        bytes=stored_bytes(spec, array.shape, axis=axis),
        # Experts are of one size: the mean of their errors is that of the array.
        nearest_error=float(np.mean(nearest_error)),
        error=float(np.mean(error)),
        power=float(np.mean(np.square(array, dtype=np.float64))),
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _encode(array: Array, spec: QuantSpec, axis: int, clip: Clip) -> tuple[Encoded, Array, Array]:
    """Codes of a matrix or of each expert's, and mean squared errors with computed scales and as written."""

    def encode_matrix(matrix: Array) -> tuple[Encoded, Array, Array]:
        return nearest(matrix, spec, axis) if clip is Clip.NONE else with_best_clip(matrix, spec, axis)

    return map_matrices(encode_matrix, array.ndim)(array)


def nearest(
    x: Float[Array, "I O"], spec: QuantSpec, axis: int
) -> tuple[Encoded, Float[Array, ""], Float[Array, ""]]:
    """Return codes on the scales that the format computes, and their mean squared error, twice."""
    encoded = encode(x, spec, axis=axis)
    error = jnp.mean(jnp.square(decode(encoded, spec, axis=axis) - x))
    return encoded, error, error


def with_best_clip(
    x: Float[Array, "I O"], spec: QuantSpec, axis: int
) -> tuple[Encoded, Float[Array, ""], Float[Array, ""]]:
    """Return codes on the scales with the smallest squared error, and that error before and after the search.

    The scales that the format computes are among the candidates, so that no group is worse than without it.
    """
    plain = encode(x, spec, axis=axis)
    before = squared_error(x, plain, spec, axis=axis)
    scale, error = best_scale(x, spec, axis=axis)
    # The format's own codes may still be better: GGUF computes them with the scale before it is rounded,
    # which a given scale does not allow.
    searched = encode(x, spec, axis=axis, scale=scale)
    is_better = error < before

    def chosen(new: Array | None, old: Array | None) -> Array | None:
        return None if new is None or old is None else jnp.where(is_better, new, old)

    # From one decision per group to one per number.
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
