"""`check_mixer`: all properties of a mixer, in a few seconds or in detail."""

import dataclasses
import enum
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from slmjax.models.architecture import Remat
from slmjax.models.protocols import MixerConfig
from slmjax.parallel.mesh import MeshConfig
from slmjax.testing import properties, training_step
from slmjax.testing.report import Check, MixerError, Report
from slmjax.testing.subject import LENGTH, Rows, Subject, Values, model_around, whole_rows

log = logging.getLogger(__name__)

NUM_DEVICES = 8
SMALL_CHUNK = 8  # three to a row


class Level(enum.Enum):
    """How much is checked."""

    DEFAULT = "default"  # each property once
    FULL = (
        "full"  # also train steps, a scan, more sizes of chunks, and the axes of meshes in other combinations
    )


def check_mixer(
    config: MixerConfig,
    *,
    level: Level | str = Level.DEFAULT,
    embed_dim: int = 32,
    before: Sequence[MixerConfig] = (),
    slow_decay: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Report:
    """Check that a mixer has the properties that every mixer must have, and return what was measured.

    The mixer is one layer of a small model with random weights. Checked are: no token sees a later one;
    packed documents equal the same documents alone, in values and gradients; decoding equals the full pass,
    with prompts of different lengths; sizes of chunks change nothing, if the config has a field `chunk_size`;
    neither do a mesh and rematerialisation; gradients of parts of a batch add up; bfloat16 is close; values
    and gradients are finite for extreme parameters; linear maps can be rounded; FLOPs and the size of the
    state are those of the arrays. In full also: train steps with rounded weights, a teacher, accumulation and
    a stop in between; layers in a scan.

    Meshes need 8 devices: set XLA_FLAGS=--xla_force_host_platform_device_count=8 before jax is imported. With
    fewer they are left out, as the report says.

    Args:
      config: settings of the mixer, small enough for a model of `embed_dim`.
      level: how much is checked; "full" takes about five times as long.
      embed_dim: width of the model.
      before: mixers of the layers before it, for one that reads values of earlier layers.
      slow_decay: values of parameters with which the state decays slowly, by the end of their path, such as
        {"rate/bias": -6.0}. A mistake at the boundary of documents hides behind a fast decay.
      seed: of parameters.

    Raises:
      MixerError: properties that the mixer lacks, each with its error and where it is.
      ValueError: no parameter has a name of `slow_decay`.
    """
    level = Level(level)
    mixer: Any = config
    # Rows are short: a chunk of the usual size would hold all of one.
    has_chunks = any(field.name == "chunk_size" for field in dataclasses.fields(mixer))
    if has_chunks:
        mixer = dataclasses.replace(mixer, chunk_size=SMALL_CHUNK)
    subject = Subject(model_around(mixer, before, embed_dim=embed_dim), seed=seed)
    rows = whole_rows()
    weights = properties.weights_of(rows, embed_dim)
    whole = subject.values(rows, weights)
    checks = [
        *properties.check_causality(subject, whole, rows, weights),
        *properties.check_documents(subject, subject.params, kind=""),
        *properties.check_decoding(subject, whole, rows),
        *properties.check_state_size(subject.config),
        *properties.check_flops(subject.config, [*before, mixer]),
        *properties.check_accumulation(subject, whole, rows, weights),
        *properties.check_bfloat16(subject, whole, rows),
        *properties.check_extremes(subject, rows, weights),
        *properties.check_gradients_reach(subject, whole),
        *properties.check_formats(subject.config),
    ]
    if slow_decay:
        slow = _with_values(subject.params, slow_decay)
        checks += properties.check_documents(subject, slow, kind=", with slow decays")
    if has_chunks:
        sizes = (LENGTH,) if level is Level.DEFAULT else (1, 2, 3, 5, 16, LENGTH, 64)
        checks += properties.check_chunks(subject, whole, rows, mixer, sizes)
    # Meshes need devices, which JAX has from its start.
    skipped: list[str] = []
    if jax.device_count() < NUM_DEVICES:
        skipped.append(f"meshes: {jax.device_count()} device(s), and {NUM_DEVICES} are needed")
    else:
        mesh_checks, skipped = _check_meshes(subject, whole, rows, weights, level)
        checks += mesh_checks
    if level is Level.FULL:
        checks += training_step.check_training(subject, rows)
        checks += properties.check_rematerialisation(subject, whole, rows, weights)
        checks += training_step.check_accumulation(subject, rows)
        checks += properties.check_scan(subject.config, rows)
    report = Report(mixer=type(config).__name__, checks=tuple(checks), skipped=tuple(skipped))
    log.info("%s", report)
    if report.failed:
        lines = "\n".join(f"  {check}" for check in report.failed)
        raise MixerError(
            f"{report.mixer} lacks {len(report.failed)} of {len(checks)} properties of a mixer:\n{lines}"
        )
    return report


def _check_meshes(
    subject: Subject, whole: Values, rows: Rows, weights: np.ndarray, level: Level
) -> tuple[list[Check], list[str]]:
    """Parameters and rows sharded over several axes at once and, in detail, over each alone."""
    meshes = [MeshConfig(data=1, fsdp=2, tensor=2, context=2)]
    # Where sequences are refused, the other axes are checked without them.
    without = MeshConfig(data=2, fsdp=2, tensor=2)
    if level is Level.FULL:
        meshes += [
            MeshConfig(data=1, fsdp=4, tensor=2),
            MeshConfig(data=4, tensor=2),
            MeshConfig(data=2, context=4),
            MeshConfig(data=2, fsdp=2, tensor=2),
        ]
    checks: list[Check] = []
    skipped: list[str] = []
    for mesh in meshes:
        # One program less: gradients of the first mesh are rematerialised.
        remat = Remat.FULL if mesh is meshes[0] else Remat.NONE
        mesh_checks, refused = properties.check_mesh(subject, whole, rows, weights, mesh, remat=remat)
        checks += mesh_checks
        skipped += refused
        if refused and mesh is meshes[0]:
            checks += properties.check_mesh(subject, whole, rows, weights, without, remat=remat)[0]
    return checks, skipped


def _with_values(params: Mapping[str, Array], values: Mapping[str, float]) -> dict[str, Array]:
    changed = dict(params)
    for name, value in values.items():
        paths = [path for path in params if path.endswith(f"/{name}")]
        if not paths:
            names = ", ".join(path.split("/mixer/")[-1] for path in params if "/mixer/" in path)
            raise ValueError(f"slow_decay names {name!r}, and the parameters of the mixer are {names}")
        changed |= {path: jnp.full_like(params[path], value) for path in paths}
    return changed
