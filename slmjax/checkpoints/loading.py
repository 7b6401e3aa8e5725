"""From a directory back to a model: `load_model`, and the parts of it that training and exports need.

loaded = load_model("runs/nano-...")        # or an imported model's directory
loaded, codes = load_with_codes("runs/...")   # and the codes and scales of the weights that have a format
"""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slmjax import config as config_io
from slmjax import losses
from slmjax.checkpoints import safetensors_files
from slmjax.checkpoints.run_checkpoints import CheckpointConfig, Checkpointer
from slmjax.data.tokenizers import Tokenizer
from slmjax.formats.coding import Encoded
from slmjax.models.architecture import ModelConfig
from slmjax.models.decoder import Decoder
from slmjax.models.definition import Definition, define, define_for_inference, stored_shapes
from slmjax.models.paths import logical_paths
from slmjax.parallel.rules import partition_spec
from slmjax.quantization import weights as numeric_weights
from slmjax.quantization.assignment import TABLES, TensorQuant
from slmjax.quantization.rules import phase_at

log = logging.getLogger(__name__)

Codes = dict[str, tuple[TensorQuant, Encoded]]  # by logical path, as NumPy arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A trained model, ready to evaluate or sample from."""

    config: ModelConfig
    model: Decoder
    definition: Definition
    params: dict[str, jax.Array]
    buffers: dict[str, jax.Array]
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


def read_config(path: Path) -> ModelConfig:
    """The architecture that a run directory or an imported model's directory holds. Raises ValueError if it
    is none.
    """
    if not (path / "model.json").is_file():
        raise ValueError(
            f"{path} is neither a run directory nor an imported model: it has no model.json. Name the "
            "directory that the last line of "
            "`slmjax train` printed, or one that `slmjax import` wrote"
        )
    try:
        return config_io.loads(ModelConfig, (path / "model.json").read_text())
    except ValueError as error:
        raise ValueError(f"{path / 'model.json'} is damaged: {error}") from error


def load_model(path: str | Path, *, step: int | None = None) -> Loaded:
    """The model of a run directory: the newest checkpoint, or that of `step`; averaged weights where the run
    kept them. Or an imported one.

    Needs `model.json`, `tokenizer/` and `checkpoints/` (or `weights/`) only. Arrays are replicated over the
    current mesh, or on one device where none is set.

    Raises:
      ValueError: this is no such directory, or holds no intact checkpoint.
    """
    return _decoded(_opened(Path(path), step=step))


def load_unrounded(path: str | Path, *, step: int | None = None) -> Loaded:
    """Return the model of a quantized run with its weights before rounding; inputs and caches are rounded as
    in the run.

    Raises:
      ValueError: as `load_model`; or the directory has no such weights.
    """
    stored = _opened(Path(path), step=step)
    definition = stored.definition
    if not definition.formats:
        raise ValueError(
            f"{path} has no weights before rounding: name a run that was trained in number formats, at a "
            "step after they began"
        )
    params = {
        name: leaf
        for name, leaf in stored.params.items()
        if not numeric_weights.is_weight_quantizer_param(name)
    }
    return _loaded(stored, params, definition.decoded())


def load_with_codes(path: str | Path, *, step: int | None = None) -> tuple[Loaded, Codes]:
    """The model of a run, and the codes and scales of its weights that have a format, as they are encoded on
    the device that this runs on.

    Raises:
      ValueError: as `load_model`.
    """
    stored = _opened(Path(path), step=step)
    definition = stored.definition
    coded = jax.device_get(
        jax.jit(lambda params: numeric_weights.coded(params, definition.formats))(stored.params)
    )
    found: Codes = {}
    for name, numbers in definition.formats.items():
        for logical, one, encoded in zip(
            logical_paths(definition.config, name), numbers, coded[name], strict=True
        ):
            if one is not None and encoded is not None:
                found[logical] = (one, encoded)
    return _decoded(stored), found


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stored:
    """A model as its checkpoint has it."""

    path: Path
    config: ModelConfig
    definition: Definition
    step: int
    params: dict[str, jax.Array]
    buffers: dict[str, jax.Array]


def _opened(path: Path, *, step: int | None) -> _Stored:
    config = read_config(path)
    definition = inference_definition(path, config, step=step)
    mesh = jax.sharding.get_mesh()
    place = (
        jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        if mesh.empty
        else NamedSharding(mesh, PartitionSpec())
    )
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        (definition.params, definition.buffers),
    )
    step, params, buffers = read_parameters(path, definition.config, *like, step=step)
    if phase_at(config.quant, max(step - 1, 0)) != definition.phase and not safetensors_files.is_imported(
        path
    ):  # an older checkpoint was intact
        definition = inference_definition(path, config, step=step)
    return _Stored(path=path, config=config, definition=definition, step=step, params=params, buffers=buffers)


def _decoded(stored: _Stored) -> Loaded:
    return _loaded(stored, *stored.definition.decode(stored.params))


def _loaded(stored: _Stored, params: dict[str, jax.Array], definition: Definition) -> Loaded:
    has_tokenizer = (stored.path / "tokenizer").is_dir() or not safetensors_files.is_imported(stored.path)
    return Loaded(
        config=stored.config,
        model=definition.merge(params, stored.buffers),
        definition=definition,
        params=params,
        buffers=stored.buffers,
        path=stored.path,
        step=stored.step,
        own_tokenizer=Tokenizer.load(stored.path / "tokenizer") if has_tokenizer else None,
    )


def inference_definition(path: Path, config: ModelConfig, *, step: int | None) -> Definition:
    """The definition of what a directory holds, in the phase of that checkpoint; an imported model's
    parameters are decoded already.
    """
    definition = define_for_inference(config, step=phase_step(path, step))
    return definition.decoded() if safetensors_files.is_imported(path) else definition


def phase_step(path: Path, step: int | None) -> int | None:
    """The training step whose rules of quantization hold for a checkpoint (None: the newest); None for an
    imported model.

    A checkpoint of step n is what its last training step, the one after n - 1, made.
    """
    known = (
        []
        if safetensors_files.is_imported(path)
        else [int(entry.name) for entry in (path / "checkpoints").glob("*") if entry.name.isdigit()]
    )
    saved = max(known, default=None) if step is None else step
    return None if saved is None or safetensors_files.is_imported(path) else max(saved - 1, 0)


def changed_rows(loaded: Loaded, coded: Codes) -> tuple[int, int] | None:
    """How many rows of codes and scales are not those of the devices that a run was trained on, and of how
    many rows in all.

    Both arguments are what `load_with_codes` found. None where the checkpoint kept nothing to compare with.
    """
    sums = jax.device_get(
        {
            name: numeric_weights.sum_of_codes(encoded, axis=numbers.axis)
            for name, (numbers, encoded) in coded.items()
        }
    )
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {name: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=place) for name, one in sums.items()}
    checkpointer = Checkpointer(loaded.path / "checkpoints", model=loaded.config, config=CheckpointConfig())
    try:
        kept = checkpointer.read_some(loaded.step, "codes", wanted)
    finally:
        checkpointer.close()
    if kept is None:
        return None
    return sum(int(np.sum(np.asarray(kept[name]) != one)) for name, one in sums.items()), sum(
        one.size for one in sums.values()
    )


def read_parameters(
    path: Path,
    config: ModelConfig,
    params: dict[str, Any],
    buffers: dict[str, Any],
    *,
    step: int | None = None,
    whole: bool = True,
) -> tuple[int, dict[str, jax.Array], dict[str, jax.Array]]:
    """The step, the parameters (averaged, where a run kept averages) and the buffers of a run's or an
    imported model's directory.

    Args:
      params: shapes, with the shardings in which they are wanted; so for `buffers`.
      step: of a run; None for the newest.
      whole: False where only some are wanted, `params` and `buffers` by logical path; no others are read.
        What a quantized run learned beside its weights is left out where it is not asked for.

    Raises:
      ValueError: the directory holds no intact checkpoint, or other parameters.
    """
    if safetensors_files.is_imported(path):
        if step not in (None, 0):
            raise ValueError(f"{path} is an imported model, which has no step {step}: leave --step out")
        return (
            0,
            safetensors_files.read_stacked(path, config, params),
            safetensors_files.read_stacked(path, config, buffers),
        )
    checkpointer = Checkpointer(path / "checkpoints", model=config, config=CheckpointConfig())
    # A checkpoint is read whole, so that what is not wanted of it is named too.
    beside = _beside(path, config, params, buffers) if whole else ({}, {})
    params = {**params, **beside[0]}
    buffers = {**buffers, **beside[1]}
    like: dict[str, Any] = {"model": {"params": params, "buffers": buffers}}
    try:
        # A run keeps averages from its first checkpoint on; any may be the damaged one.
        if any(checkpointer.has(known, "ema") for known in checkpointer.steps()):
            like["ema"] = params
            if not whole:
                like["model"] = {"params": {}, "buffers": buffers}
        step, items = checkpointer.restore(like, step=step, whole=whole)
    finally:
        checkpointer.close()
    found = items.get("ema", items["model"]["params"])
    kept = items["model"]["buffers"]
    return (
        step,
        {name: found[name] for name in found if name not in beside[0]},
        {name: kept[name] for name in kept if name not in beside[1]},
    )


def read_fitted(
    path: Path, config: ModelConfig, params: dict[str, Any], buffers: dict[str, Any]
) -> tuple[int, dict[str, jax.Array], dict[str, jax.Array]]:
    """`read_parameters` of a model whose tables may have other rows of padding than this one's: they are
    dropped, or added as zeros.

    Args:
      config: of the model that takes them over, which has these `params` and `buffers`, and a row for each
        token of both. What the directory's model has beyond its vocabulary stands for no token, and is
        dropped too.

    Raises:
      ValueError: as `read_parameters`; or this model's softmax is over rows that the directory's model has
        not.
    """
    source = read_config(path)
    if source.known_vocab_size < config.known_vocab_size:
        raise ValueError(
            f"{path} has a vocabulary of {source.known_vocab_size} rows, and model.vocab_size is "
            f"{config.known_vocab_size}: the rows "
            "beyond would be real ones that were never trained. Set model.vocab_size to "
            f"{source.known_vocab_size}; rows of padding come "
            "from model.vocab_multiple"
        )
    if (lost := source.known_vocab_size - config.known_vocab_size) > 0:
        log.info("%s: %d rows of its tables stand for no token, and are left out", path, lost)
    tables = [name for name in TABLES if name in params and params[name].shape[0] != source.table_rows]
    stored = {
        name: _with_rows(leaf, name, source.table_rows) if name in tables else leaf
        for name, leaf in params.items()
    }
    step, found, kept = read_parameters(path, config, stored, buffers)
    for name in tables:
        real = found[name][: config.known_vocab_size]
        fit = functools.partial(losses.fit_table, num_rows=params[name].shape[0])
        found[name] = jax.jit(fit, out_shardings=params[name].sharding)(real)
    return step, found, kept


def _with_rows(leaf: jax.ShapeDtypeStruct, name: str, num_rows: int) -> jax.ShapeDtypeStruct:
    """The shape of a table with other rows, placed by the rules."""
    shape = (num_rows, *leaf.shape[1:])
    place = leaf.sharding
    if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh):
        place = NamedSharding(place.mesh, partition_spec(name, shape, place.mesh))
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=place)


def _beside(
    path: Path, config: ModelConfig, params: dict[str, Any], buffers: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a quantized run keeps beside its weights, by logical path, as far as `params` and `buffers` do not
    name it.
    """
    own = read_config(path)
    if not own.quant:
        return {}, {}
    definition = define(own)

    def more(kept: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
        plain = define(dataclasses.replace(own, quant=()))
        known = {*stored_shapes(config, wanted), *stored_shapes(own, {**plain.params, **plain.buffers})}
        place = (
            next(iter(wanted.values())).sharding
            if wanted
            else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        )
        place = NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else place
        shapes = stored_shapes(own, kept).items()
        return {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
            for name, leaf in shapes
            if name not in known
        }

    return more(definition.params, params), more(definition.buffers, buffers or params)
