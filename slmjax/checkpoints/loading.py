"""From a directory back to a model: `load_model`, and the parts of it that training and exports need.

loaded = load_model("runs/nano-...")          # or an imported model's directory
loaded, codes = load_with_codes("runs/...")   # and the codes and scales of the weights that have a format
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slmjax import losses
from slmjax.checkpoints import safetensors_files
from slmjax.checkpoints.model_file import read_config, read_quant_phases
from slmjax.checkpoints.run_checkpoints import CheckpointConfig, Checkpointer
from slmjax.checkpoints.step_directories import newest_step
from slmjax.data.tokenizers import Tokenizer
from slmjax.formats.coding import Encoded
from slmjax.models.architecture import ModelConfig
from slmjax.models.decoder import Decoder
from slmjax.models.definition import Definition, Params, define, inference_config, stored_shapes
from slmjax.models.paths import logical_paths
from slmjax.parallel.rules import partition_spec
from slmjax.quantization import weights
from slmjax.quantization.assignment import TABLES, TensorQuant
from slmjax.quantization.fake_quantization import define_quantized, phase_of, weight_formats
from slmjax.quantization.rules import QuantPhase, phase_at

log = logging.getLogger(__name__)

Codes = dict[str, tuple[TensorQuant, Encoded]]  # by logical path, as NumPy arrays


# Models -----------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A trained model, ready to evaluate or sample from."""

    config: ModelConfig
    quant_phases: tuple[QuantPhase, ...] = ()  # of the run; empty for one in floating point
    model: Decoder
    definition: Definition  # for these parameters: weights that have a format are rounded already
    params: Params
    buffers: Params
    path: Path
    step: int  # 0 for a model that was imported
    own_tokenizer: Tokenizer | None  # None for a model that was imported without one

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ValueError for a model that was imported without one."""
        if self.own_tokenizer is None:
            raise ValueError(
                f"{self.path} was imported without a tokenizer, and text needs one: import it again with "
                "--tokenizer FILE"
            )
        return self.own_tokenizer


def load_model(path: str | Path, *, step: int | None = None) -> Loaded:
    """Return the model of a run directory or of an imported model.

    Of a run it is the newest checkpoint, or that of `step`, with averaged weights where the run stored them.
    Needs `model.json`, `tokenizer/` and `checkpoints/` (or `weights/`) only. Arrays are replicated over the
    current mesh, or on one device where none is set.

    Raises:
      ValueError: this is no such directory, or holds no intact checkpoint.
    """
    return _fake_quantized(_read(Path(path), step=step))


def load_unrounded(path: str | Path, *, step: int | None = None) -> Loaded:
    """Return the model of a quantized run with its weights before rounding.

    Inputs and caches are quantized as in the run.

    Raises:
      ValueError: as `load_model`; or the directory has no such weights.
    """
    stored = _read(Path(path), step=step)
    if not weight_formats(stored.definition):
        raise ValueError(
            f"{path} has no weights before rounding: name a run that was trained in number formats, at a "
            "step after they began"
        )
    # A transformed definition takes its weights as they are, without rounding them.
    definition = stored.definition.transformed()
    # Without the parameters of weight quantizers, which no layer has.
    params = {name: leaf for name, leaf in stored.params.items() if name in definition.params}
    return _loaded(stored, params, definition)


def load_with_codes(path: str | Path, *, step: int | None = None) -> tuple[Loaded, Codes]:
    """Return the model of a run, and the codes and scales of its weights that have a format.

    They are encoded here, on the device that this runs on.

    Raises:
      ValueError: as `load_model`.
    """
    stored = _read(Path(path), step=step)
    formats = weight_formats(stored.definition)
    # Compiled as in training: other programs may round sums, and so codes, differently.
    encode = jax.jit(lambda params: weights.encode_weights(params, formats))
    # On the host, since exports pack codes with NumPy.
    encoded_by_path = jax.device_get(encode(stored.params))
    codes: Codes = {}
    for stack_path, by_layer in formats.items():
        logical = logical_paths(stored.definition.config, stack_path)
        for name, tensor_quant, encoded in zip(logical, by_layer, encoded_by_path[stack_path], strict=True):
            if tensor_quant is not None and encoded is not None:
                codes[name] = (tensor_quant, encoded)
    return _fake_quantized(stored), codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stored:
    """A model as its checkpoint has it."""

    path: Path
    config: ModelConfig
    quant_phases: tuple[QuantPhase, ...]
    definition: Definition
    step: int
    params: Params
    buffers: Params


def _read(path: Path, *, step: int | None) -> _Stored:
    config = read_config(path)
    phases = read_quant_phases(path)
    definition = inference_definition(path, config, phases, step=step)
    mesh = jax.sharding.get_mesh()
    # Replicated: sampling and evaluation need every parameter on every device.
    sharding = _one_device() if mesh.empty else NamedSharding(mesh, PartitionSpec())
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        (definition.params, definition.buffers),
    )
    step, params, buffers = read_parameters(path, definition.config, *like, step=step)
    # Where the newest checkpoint is damaged an older one is read, which may be of an earlier phase.
    is_other_phase = phase_at(phases, max(step - 1, 0)) != phase_of(definition)
    if is_other_phase and not safetensors_files.is_imported(path):
        definition = inference_definition(path, config, phases, step=step)
    return _Stored(
        path=path,
        config=config,
        quant_phases=phases,
        definition=definition,
        step=step,
        params=params,
        buffers=buffers,
    )


def _fake_quantized(stored: _Stored) -> Loaded:
    return _loaded(stored, *stored.definition.transform_once(stored.params))


def _loaded(stored: _Stored, params: Params, definition: Definition) -> Loaded:
    # A run always has a tokenizer: without its directory, the error should be about that.
    has_tokenizer = (stored.path / "tokenizer").is_dir() or not safetensors_files.is_imported(stored.path)
    return Loaded(
        config=stored.config,
        quant_phases=stored.quant_phases,
        model=definition.merge(params, stored.buffers),
        definition=definition,
        params=params,
        buffers=stored.buffers,
        path=stored.path,
        step=stored.step,
        own_tokenizer=Tokenizer.load(stored.path / "tokenizer") if has_tokenizer else None,
    )


def inference_definition(
    path: Path, config: ModelConfig, phases: Sequence[QuantPhase], *, step: int | None
) -> Definition:
    """Return the definition for the parameters in a directory.

    Args:
      config: the architecture, which may be computed in another precision.
      phases: of quantization (`read_quant_phases`); the one that the checkpoint was trained in holds. An
        imported model's weights are rounded already.
    """
    definition = define_quantized(inference_config(config), phases, step=phase_step(path, step))
    return definition.transformed() if safetensors_files.is_imported(path) else definition


def phase_step(path: Path, step: int | None) -> int | None:
    """Return the training step whose phase of quantization a checkpoint has; None for an imported model.

    A checkpoint of step n is the result of its last training step, the one after n - 1.

    Args:
      step: of the checkpoint; None for the newest.
    """
    if safetensors_files.is_imported(path):
        return None
    if step is None:
        # Without verifying a checkpoint: which phase holds must be known before its shapes are.
        step = newest_step(path / "checkpoints")
    return None if step is None else max(step - 1, 0)


def changed_rows(loaded: Loaded, codes: Codes) -> tuple[int, int] | None:
    """Return how many rows of codes and scales differ from the training devices', and how many there are.

    None where the checkpoint has no checksums to compare with.

    Args:
      loaded: as `load_with_codes` returned it.
      codes: likewise.
    """
    # Sums, since a checkpoint with the codes themselves would be much larger.
    sums = jax.device_get(
        {
            name: weights.sum_of_codes(encoded, axis=tensor_quant.axis)
            for name, (tensor_quant, encoded) in codes.items()
        }
    )
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_one_device())
        for name, leaf in sums.items()
    }
    checkpointer = Checkpointer(loaded.path / "checkpoints", model=loaded.config, config=CheckpointConfig())
    try:
        stored = checkpointer.read_some(loaded.step, "codes", like)
    finally:
        checkpointer.close()
    if stored is None:
        return None
    num_changed = sum(int(np.sum(np.asarray(stored[name]) != leaf)) for name, leaf in sums.items())
    return num_changed, sum(leaf.size for leaf in sums.values())


def _one_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


# Parameters -------------------------------------------------------------------------------------------------
def read_parameters(
    path: Path,
    config: ModelConfig,
    params: dict[str, Any],
    buffers: dict[str, Any],
    *,
    step: int | None = None,
    whole: bool = True,
) -> tuple[int, Params, Params]:
    """Return the step, the parameters and the buffers in a run's or an imported model's directory.

    Parameters are averages where a run stored them.

    Args:
      params: shapes of the parameters to read, with the shardings of the result; likewise `buffers`.
      step: of a run; None for the newest.
      whole: False to read only these; `params` and `buffers` are then by logical path. Quantizer parameters
        of a quantized run are left out where they are not among them.

    Raises:
      ValueError: the directory holds no intact checkpoint, or other parameters.
    """
    if safetensors_files.is_imported(path):
        # `Loaded.step` of an imported model is 0, and callers pass it on.
        if step not in (None, 0):
            raise ValueError(f"{path} is an imported model, which has no step {step}: leave --step out")
        return (
            0,
            safetensors_files.read_stacked(path, config, params),
            safetensors_files.read_stacked(path, config, buffers),
        )
    checkpointer = Checkpointer(path / "checkpoints", model=config, config=CheckpointConfig())
    # Orbax restores all of a checkpoint or names what differs: the quantizers' parameters are read and
    # dropped.
    more = _quantizer_shapes(path, config, params, buffers) if whole else ({}, {})
    params = {**params, **more[0]}
    buffers = {**buffers, **more[1]}
    like: dict[str, Any] = {"model": {"params": params, "buffers": buffers}}
    try:
        # A run has averages in all its checkpoints or in none, but any of them may be the damaged one.
        if any(checkpointer.has(known, "ema") for known in checkpointer.steps()):
            # Averages vary less from step to step than the last weights.
            like["ema"] = params
            if not whole:
                like["model"] = {"params": {}, "buffers": buffers}
        step, items = checkpointer.restore(like, step=step, whole=whole)
    finally:
        checkpointer.close()
    read_params = items.get("ema", items["model"]["params"])
    read_buffers = items["model"]["buffers"]
    return (
        step,
        {name: leaf for name, leaf in read_params.items() if name not in more[0]},
        {name: leaf for name, leaf in read_buffers.items() if name not in more[1]},
    )


def read_fitted(
    path: Path, config: ModelConfig, params: dict[str, Any], buffers: dict[str, Any]
) -> tuple[int, Params, Params]:
    """Return `read_parameters` for a model whose tables may have another number of padding rows.

    They are dropped, or added as zeros.

    Args:
      config: of the model that takes the parameters over, which has these `params` and `buffers`, and a row
        for each token of both. Rows of the directory's model beyond its vocabulary are of no token, and are
        dropped too.

    Raises:
      ValueError: as `read_parameters`; or this model's softmax includes rows that the directory's model
        lacks.
    """
    source = read_config(path)
    if source.known_vocab_size < config.known_vocab_size:
        raise ValueError(
            f"{path} has a vocabulary of {source.known_vocab_size} rows, and model.vocab_size is "
            f"{config.known_vocab_size}: the rows beyond would be real ones that were never trained. Set "
            f"model.vocab_size to {source.known_vocab_size}; rows of padding come from model.vocab_multiple"
        )
    # Rows above the tokenizer's vocabulary, which some releases have for alignment.
    if (num_dropped := source.known_vocab_size - config.known_vocab_size) > 0:
        log.info("%s: %d rows of its tables stand for no token, and are left out", path, num_dropped)
    # Read with the rows that are stored, then fitted to those of this model.
    tables = [name for name in TABLES if name in params and params[name].shape[0] != source.table_rows]
    stored = {
        name: _with_rows(leaf, name, source.table_rows) if name in tables else leaf
        for name, leaf in params.items()
    }
    step, read_params, read_buffers = read_parameters(path, config, stored, buffers)
    for name in tables:
        # Padding in the directory may be longer or shorter than here: both start from the real rows.
        real = read_params[name][: config.known_vocab_size]
        fit = functools.partial(losses.fit_table, num_rows=params[name].shape[0])
        read_params[name] = jax.jit(fit, out_shardings=params[name].sharding)(real)
    return step, read_params, read_buffers


def _with_rows(leaf: jax.ShapeDtypeStruct, name: str, num_rows: int) -> jax.ShapeDtypeStruct:
    """The shape of a table with another number of rows, sharded by the rules."""
    shape = (num_rows, *leaf.shape[1:])
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        # Other row counts may not be divisible by the same axes.
        sharding = NamedSharding(sharding.mesh, partition_spec(name, shape, sharding.mesh))
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)


def _quantizer_shapes(
    path: Path, config: ModelConfig, params: dict[str, Any], buffers: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes of a run's quantizer parameters and buffers, by stored name, without the requested ones."""
    phases = read_quant_phases(path)
    if not phases:
        return {}, {}
    # The run's own layers: the caller's config may group or compute them in another way.
    run_config = read_config(path)
    definition = define_quantized(run_config, phases)
    plain = define(run_config)

    def missing(stored: dict[str, Any], requested: dict[str, Any]) -> dict[str, Any]:
        known = {
            *stored_shapes(config, requested),
            *stored_shapes(run_config, {**plain.params, **plain.buffers}),
        }
        # On the caller's devices: Orbax restores all arrays of a checkpoint at once.
        sharding = next(iter(requested.values())).sharding if requested else _one_device()
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        return {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for name, leaf in stored_shapes(definition.config, stored).items()
            if name not in known
        }

    return missing(definition.params, params), missing(definition.buffers, buffers or params)
