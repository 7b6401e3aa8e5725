"""Coordinate check: how activations, logits and updates change with the width and the depth of a model.

    check = coordinate_check(experiment, widths=(64, 256), depths=(2, 8), kinds=(Parameterization.MUP,))
    check.rows[0].slope, check.verdicts

Models of several sizes take a few steps with the same settings. If hyperparameters are to transfer between
sizes, then neither the size of an activation nor its change in training may depend on the size of the model
(Yang et al. 2022, section D.1). The size is a root mean square over tokens and units; it should vary as
size**s with s near 0. Full-precision models on one device are measured, with the peak learning rate from the
first step on.

Dims: S steps, B batch, T time, D model, V vocabulary.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slmjax import losses
from slmjax.data.batch import Batch
from slmjax.data.pipeline import BatchSource
from slmjax.data.preparation import prepare
from slmjax.models.architecture import ModelConfig
from slmjax.models.decoder import CAPTURES
from slmjax.models.definition import Definition, Params, define
from slmjax.models.parameterization import Parameterization
from slmjax.planning.sizes import HeadGrowth, at_depth, at_width, head_growth, query_dim
from slmjax.training.experiment import Experiment
from slmjax.training.multipliers import role_of
from slmjax.training.objective import CROSS_ENTROPY
from slmjax.training.optim import OptimConfig, Optimizer, Schedule, make_optimizer
from slmjax.training.programs import resolved_model
from slmjax.training.step import count_targets, loss_terms

# Largest absolute exponent that counts as flat: nearer to 0 than to 1/2, the smallest by which sizes vary in
# a wrong parameterization.
TOLERANCE = 0.25
VOCAB_SIZE = 256  # of synthetic tokens
BATCH_SHAPE = (8, 64)  # of synthetic batches, B and T
REPEATED = 0.7  # fraction of synthetic tokens that the token before them determines


# What is measured -------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One quantity over the sizes of one parameterization."""

    parameterization: str
    axis: str  # "width" or "depth"
    layer: str  # number of the layer, "first", "middle" and "last" over depths, or "" outside the layers
    name: str  # of the activation, "logits", or the role of updated parameters
    measure: str  # "size", "change" since the first step, or "update" of parameters in the last step
    step: int  # steps taken
    sizes: tuple[int, ...]  # widths or depths
    values: tuple[float, ...]  # root mean squares, geometric means over seeds
    slope: float | None  # exponent s of size**s by least squares; None where a value is 0 or not finite

    @property
    def trend(self) -> str:
        """The slope in words."""
        if self.slope is None:
            return "not finite" if not np.all(np.isfinite(self.values)) else "zero"
        if abs(self.slope) < TOLERANCE:
            return "flat"
        verb = "grows" if self.slope > 0 else "shrinks"
        return f"{verb} as {self.axis}^{self.slope:.2f}"

    @property
    def is_judged(self) -> bool:
        """Whether theory asks for a flat row: activations, and their changes and those of logits."""
        if self.step == 0 or self.measure == "update":
            # Updates of matrices shrink as 1 / width under muP.
            return False
        if self.name == "logits":
            # Those of fresh weights shrink as width**-1/2 under muP.
            return self.measure == "change"
        # The inputs of a sublayer are at another fraction of every depth, unlike outputs of blocks.
        return self.axis == "width" or self.name == "block_output"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """All judged rows of one parameterization and axis."""

    parameterization: str
    axis: str
    num_rows: int
    num_flat: int
    steepest: Row | None  # the row with the largest absolute slope

    @property
    def holds(self) -> bool:
        """Whether every row is flat."""
        return self.num_flat == self.num_rows

    @property
    def text(self) -> str:
        """The verdict in a sentence."""
        sizes = {"width": "widths", "depth": "depths"}[self.axis]
        start = f"{self.parameterization} over {sizes}"
        if self.holds or self.steepest is None:
            return f"{start}: all {self.num_rows} rows are flat"
        row = self.steepest
        where = f"layer {row.layer} " if row.layer else ""
        return (
            f"{start}: {self.num_flat} of {self.num_rows} rows are flat; {where}{row.name} ({row.measure}) "
            f"{row.trend}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoordinateCheck:
    """All rows, with the settings that they were measured with."""

    experiment: str
    optimizer: str
    learning_rate: float  # peak
    muon_lr: float | None  # peak of matrices that Muon takes; None without Muon
    tokens: str  # whose they are
    heads: str  # how attention grows with the width
    base: tuple[int, int]  # width and depth of the base
    steps: tuple[int, ...]
    seeds: int
    tolerance: float
    rows: tuple[Row, ...]

    @property
    def last_rows(self) -> tuple[Row, ...]:
        """The rows after the last step."""
        return tuple(row for row in self.rows if row.step == self.steps[-1])

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """One verdict for each parameterization and axis, on the rows after the last step."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.last_rows:
            if row.is_judged:
                groups.setdefault((row.parameterization, row.axis), []).append(row)
        return tuple(
            Verdict(
                parameterization=kind,
                axis=axis,
                num_rows=len(rows),
                num_flat=sum(row.trend == "flat" for row in rows),
                # A row without a slope is worse than any slope.
                steepest=max(rows, key=lambda row: np.inf if row.slope is None else abs(row.slope)),
            )
            for (kind, axis), rows in groups.items()
        )


def coordinate_check(
    experiment: Experiment,
    *,
    widths: Sequence[int] = (64, 128, 256, 512, 1024),
    depths: Sequence[int] = (2, 4, 8, 16),
    kinds: Sequence[Parameterization] = tuple(Parameterization),
    steps: Sequence[int] = (1, 4, 8),
    seeds: int = 1,
    batches: Batch | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> CoordinateCheck:
    """Train models of several widths and depths for a few steps, and compare their activations.

    Widths are compared at the experiment's depth, and depths at its width. The base of the parameterizations
    is that of the experiment's model, or its own size if it has none.

    Args:
      experiment: model, optimizer and learning rate.
      widths: embed_dim of the models; fewer than two for no comparison of widths.
      depths: layers of the models; fewer than two for no comparison of depths.
      kinds: parameterizations.
      steps: numbers of steps after which is measured; 0 stands for the initial weights.
      seeds: number of initialisations, over which sizes are averaged.
      batches: one batch for each step, stacked; None for synthetic tokens.
      progress: called with a line for each model before it is trained.

    Raises:
      ValueError: a size is not possible for the model, or an option is out of range.
    """
    asked = tuple(sorted(set(steps)))
    if not asked or asked[0] < 0 or asked[-1] < 1 or seeds < 1:
        raise ValueError(
            f"steps are {list(steps)}, of which one must be at least 1 and none negative, and seeds are "
            f"{seeds}, which must be at least 1"
        )
    if max(len(set(widths)), len(set(depths))) < 2 or not kinds:
        raise ValueError(
            f"widths {list(widths)} and depths {list(depths)} leave nothing to compare: give two widths or "
            "two depths, and a parameterization"
        )
    model = experiment.model
    source = "synthetic" if batches is None else "the experiment's"
    if batches is None:
        model = dataclasses.replace(model, vocab_size=VOCAB_SIZE, vocab_multiple=1)
        batches = synthetic_batches(num_steps=asked[-1], vocab_size=VOCAB_SIZE)
    model = dataclasses.replace(
        model, context_length=max(batches.tokens.shape[-1], 2), learned_positions=_positions(model, batches)
    )
    growth = head_growth(model, widths=widths)
    bases = {kind: _with_base(model, kind, growth) for kind in kinds}
    measure = functools.partial(
        _measured, optim=_constant_rate(experiment.optim), batches=batches, steps=asked, seeds=seeds
    )
    rows: list[Row] = []
    for (kind, base), axis in itertools.product(bases.items(), ("width", "depth")):
        sizes = tuple(sorted(set(widths if axis == "width" else depths)))
        if len(sizes) < 2:
            continue
        by_size = []
        for size in sizes:
            progress(f"{kind.value}, {axis} {size}")
            resized = at_width(base, size, growth=growth) if axis == "width" else at_depth(base, size)
            by_size.append(_named(measure(resized), axis=axis, depth=resized.num_layers))
        rows += _rows(kind.value, axis, sizes, by_size, asked)
    base = next(iter(bases.values()))
    return CoordinateCheck(
        experiment=experiment.run.name,
        optimizer=experiment.optim.kind.value,
        learning_rate=experiment.optim.lr,
        muon_lr=experiment.optim.muon_lr if experiment.optim.kind is Optimizer.MUON else None,
        tokens=source,
        heads=growth.value,
        base=(base.base_width or base.embed_dim, base.base_depth or base.depth),
        steps=asked,
        seeds=seeds,
        tolerance=TOLERANCE,
        rows=tuple(rows),
    )


def _positions(model: ModelConfig, batches: Batch) -> int | None:
    length = batches.tokens.shape[-1]
    return None if model.learned_positions is None else max(model.learned_positions, length)


def _with_base(model: ModelConfig, kind: Parameterization, growth: HeadGrowth) -> ModelConfig:
    """Return the model with a parameterization, and its own size as the base where it has none."""
    head_dim = model.base_head_dim
    if head_dim is None and growth is HeadGrowth.SIZE:
        head_dim = query_dim(model)
    return dataclasses.replace(
        model,
        parameterization=kind,
        base_width=model.base_width or model.embed_dim,
        base_depth=model.base_depth or model.depth,
        base_head_dim=head_dim,
    )


def _constant_rate(optim: OptimConfig) -> OptimConfig:
    # A warm-up would leave a few steps without any change to see.
    return dataclasses.replace(
        optim, schedule=Schedule.CONSTANT, warmup_steps=0, accumulation_steps=1, ema_decay=None
    )


# Tokens -----------------------------------------------------------------------------------------------------
def synthetic_batches(
    *, num_steps: int, vocab_size: int, shape: tuple[int, int] = BATCH_SHAPE, seed: int = 0
) -> Batch:
    """Return stacked batches of tokens with something to learn: most follow from the token before them."""
    random = np.random.default_rng(seed)
    rows, length = shape
    successor = random.permutation(vocab_size)
    # Frequencies fall as 1 / rank, as those of words do.
    frequencies = 1.0 / np.arange(1, vocab_size + 1)
    drawn = random.choice(
        vocab_size, size=(num_steps, rows, length + 1), p=frequencies / frequencies.sum()
    ).astype(np.int32)
    for index in range(1, length + 1):
        is_repeated = random.random((num_steps, rows)) < REPEATED
        drawn[..., index] = np.where(is_repeated, successor[drawn[..., index - 1]], drawn[..., index])
    full = (num_steps, rows, length)
    return Batch(
        tokens=drawn[..., :-1],
        targets=drawn[..., 1:],
        loss_mask=np.ones(full, np.float32),
        segment_ids=np.ones(full, np.int32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), full),
        row_ids=np.zeros(full[:2], np.int32),
        num_bytes=np.zeros(full[:2], np.int32),
    )


def text_batches(experiment: Experiment, *, num_steps: int) -> tuple[Experiment, Batch]:
    """Return stacked batches of the experiment's own text, and the experiment with its vocabulary.

    Raises:
      ValueError: the text cannot be prepared, or the model has fewer tokens than the tokenizer.
    """
    prepared = prepare(experiment.data, experiment.tokenizer)
    source = BatchSource(prepared.train, experiment.data)
    batches = [source.batch(step) for step in range(num_steps)]
    model = resolved_model(experiment, vocab_size=prepared.tokenizer.vocab_size)
    if model.known_vocab_size < prepared.tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's "
            f"{prepared.tokenizer.vocab_size}: leave it out, or raise it"
        )
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    return dataclasses.replace(experiment, model=model), stacked


# Measuring --------------------------------------------------------------------------------------------------
Values = dict[str, Float[np.ndarray, " S"]]  # root mean squares by measure and path, at each asked step


def _measured(
    model: ModelConfig, *, optim: OptimConfig, batches: Batch, steps: tuple[int, ...], seeds: int
) -> Values:
    """Return the geometric mean over seeds of every root mean square, after each number of steps."""
    definition = define(model)
    optimizer = make_optimizer(optim, definition.params, total_steps=steps[-1], scaling=model.scaling)
    first = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), batches)

    def of_seed(key: Array, batches: Batch) -> dict[str, Array]:
        params, buffers = definition.init(key)
        initial = captured_activations(definition, params, buffers, first)

        def step(carry: tuple[Params, Any], batch: Batch) -> tuple[Any, dict[str, Array]]:
            params, state = carry
            grads = jax.grad(functools.partial(_loss, definition))(params, buffers, batch)
            updates: Any
            updates, state = optimizer.update(grads, state, params)
            params = jax.tree.map(jnp.add, params, updates)
            values = captured_activations(definition, params, buffers, first)
            return (params, state), _root_mean_squares(values, initial, updates)

        zeros = jax.tree.map(jnp.zeros_like, params)
        start = _root_mean_squares(initial, initial, zeros)
        _, later = jax.lax.scan(step, (params, optimizer.init(params)), batches)
        return {name: jnp.concatenate([start[name][None], later[name]]) for name in later}

    # One seed after another: activations of several large models would not fit together.
    program = jax.jit(lambda keys, batches: jax.lax.map(lambda key: of_seed(key, batches), keys))
    taken = jax.tree.map(lambda leaf: jnp.asarray(leaf[: steps[-1]]), batches)
    results = program(jax.random.split(jax.random.key(0), seeds), taken)
    with np.errstate(divide="ignore"):
        return {
            name: np.exp(np.mean(np.log(np.asarray(value)), axis=0))[list(steps)]
            for name, value in results.items()
        }


def captured_activations(
    definition: Definition, params: Params, buffers: Params, batch: Batch
) -> dict[str, Float[Array, "B T _"]]:
    """Return the captured activations of every layer, by logical path, and the logits."""
    output = definition.merge(params, buffers)(
        batch.tokens,
        segment_ids=batch.segment_ids,
        positions=batch.positions,
        capture=dict.fromkeys(CAPTURES, lambda value: value),
    )
    logits = losses.logits(output.hidden, output.head)[..., : output.head.vocab_size]
    return {**output.captured, "logits": logits}


def _loss(definition: Definition, params: Params, buffers: Params, batch: Batch) -> Array:
    terms, _ = loss_terms(definition, CROSS_ENTROPY, params, buffers, batch, key=None)
    counts = count_targets(batch, definition.config)
    return jnp.sum(jnp.stack([value / jnp.maximum(counts[count], 1) for value, count in terms.values()]))


def _root_mean_squares(
    values: Mapping[str, Array], initial: Mapping[str, Array], updates: Mapping[str, Array]
) -> dict[str, Array]:
    sizes = {f"size:{name}": _rms(value) for name, value in values.items()}
    changes = {
        f"change:{name}": _rms(value.astype(jnp.float32) - initial[name].astype(jnp.float32))
        for name, value in values.items()
    }
    by_role: dict[str, list[Array]] = {}
    for path, update in updates.items():
        num_dims = update.ndim - path.startswith("segments/") - ("/experts/" in path)
        by_role.setdefault(f"update:{role_of(path, num_dims=num_dims).value}", []).append(update)
    return {**sizes, **changes, **{name: _rms_of_all(group) for name, group in by_role.items()}}


def _rms(value: Array) -> Float[Array, ""]:
    return jnp.sqrt(jnp.mean(jnp.square(value.astype(jnp.float32))))


def _rms_of_all(values: Sequence[Array]) -> Float[Array, ""]:
    total = sum(jnp.sum(jnp.square(value)) for value in values)
    return jnp.sqrt(total / sum(value.size for value in values))


# Rows -------------------------------------------------------------------------------------------------------
Key = tuple[str, str, str]  # layer, name, measure


def _named(values: Values, *, axis: str, depth: int) -> dict[Key, np.ndarray]:
    """Return the values by layer, name and measure; over depths only layers that every depth has."""
    named: dict[Key, np.ndarray] = {}
    # The stream at the same fraction of the depth: after the first half of the layers, and after all.
    ends = {0: "first", depth // 2 - 1: "middle", depth - 1: "last"}
    for key, value in values.items():
        measure, _, path = key.partition(":")
        layer = ""
        if path.startswith("layers/"):
            _, layer, path = path.split("/")
            if axis == "depth":
                layer = ends.get(int(layer), "")
                # After the first layer, another fraction of every depth, the stream is no comparison.
                if not layer or (layer == "first" and path == "block_output"):
                    continue
        named[layer, path, measure] = value
    return named


def _rows(
    kind: str,
    axis: str,
    sizes: tuple[int, ...],
    by_size: Sequence[Mapping[Key, np.ndarray]],
    steps: tuple[int, ...],
) -> list[Row]:
    shared = [key for key in by_size[-1] if all(key in values for values in by_size)]
    return [
        Row(
            parameterization=kind,
            axis=axis,
            layer=layer,
            name=name,
            measure=measure,
            step=step,
            sizes=sizes,
            values=(values := tuple(float(each[layer, name, measure][index]) for each in by_size)),
            slope=log_slope(sizes, values),
        )
        for layer, name, measure in shared
        for index, step in enumerate(steps)
        # Before the first step nothing has changed.
        if step > 0 or measure == "size"
    ]


def log_slope(sizes: Sequence[int], values: Sequence[float]) -> float | None:
    """Return the exponent s of `size**s` by least squares of logarithms; None if a value has no logarithm."""
    if not all(np.isfinite(value) and value > 0 for value in values):
        return None
    x = np.log(np.asarray(sizes, float))
    y = np.log(np.asarray(values, float))
    centered = x - x.mean()
    return float(centered @ y / (centered @ centered))
