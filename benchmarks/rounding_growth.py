"""Does training on several devices differ from one by rounding alone? Differences over many steps.

    python benchmarks/rounding_growth.py              # the tables, 3 minutes on 2 busy cores
    python benchmarks/rounding_growth.py --lr 0.1     # a rate at which training is chaotic
    python benchmarks/rounding_growth.py --plot FILE  # also a chart as SVG

A tiny dense model trains at a high rate, with the same batches, on one device, on eight (the data axis), on
two devices of one process, and in two processes of one device each. Printed is the relative difference of
the parameters (the norm of the difference, divided by the norm) to those on one device, and of the loss.

- "one last bit": one device, but one parameter begins with its next float32 number. What grows from this is
  rounding alone.
- "float64": the same in float64, of which a rounding error is 5e8 times smaller. A difference in what is
  computed would stay as large as it is in float32.
- "from one state": at every step both meshes take the state of one device, so that nothing can grow.
"""

import argparse
import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slmjax.data.batch import Batch
from slmjax.data.config import DataConfig
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.parallel.batches import local_sequences, place_batch
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.training.experiment import Experiment, RunConfig
from slmjax.training.optim import OptimConfig, Schedule
from slmjax.training.programs import make_programs
from slmjax.training.state import TrainState, init_state

ROWS = 8
LENGTH = 48
VOCAB = 64
NUM_STEPS = 240
KEPT = (1, 2, 5, *range(10, NUM_STEPS + 1, 10))  # steps whose parameters are compared
SHOWN = (1, 5, 10, 20, 50, 100, 150, 200, 240)  # those in the tables
BLOCK = BlockConfig(mixer=AttentionConfig(num_heads=4, num_kv_heads=2), ffn=MlpConfig(hidden_dim=64))
MODEL = ModelConfig(embed_dim=32, context_length=LENGTH, stack=(LayerGroup(pattern=(BLOCK,), repeats=2),))

WORKER = "--worker"
# The model computes parts of itself in float32 whatever its precision is: here they are float64, too.
IN_FLOAT64 = """
import runpy, sys, jax.numpy
jax.numpy.float32 = jax.numpy.float64
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# After a step: all parameters as one float64 vector, and the loss.
Point = tuple[np.ndarray, float]


def experiment(lr: float) -> Experiment:
    """Return the experiment with this rate, constant after 5 steps."""
    return Experiment(
        model=MODEL,
        data=DataConfig(sequence_length=LENGTH, batch_size=ROWS),
        optim=OptimConfig(lr=lr, schedule=Schedule.CONSTANT, warmup_steps=5),
        run=RunConfig(steps=NUM_STEPS),
    )


def batch_of(step: int) -> Batch:
    """Return the batch of a step: walks through a fixed graph in which each token has three successors."""
    successors = np.random.default_rng(0).integers(0, VOCAB, (VOCAB, 3))
    draw = np.random.default_rng(step + 1)
    tokens = np.empty((ROWS, LENGTH + 1), np.int32)
    tokens[:, 0] = draw.integers(0, VOCAB, ROWS)
    for place in range(LENGTH):
        tokens[:, place + 1] = successors[tokens[:, place], draw.integers(0, 3, ROWS)]
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=np.ones((ROWS, LENGTH), np.float32),
        segment_ids=np.ones((ROWS, LENGTH), np.int32),
        positions=np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        row_ids=np.arange(ROWS, dtype=np.int32) + ROWS * step,
        num_bytes=np.full(ROWS, LENGTH, np.int32),
    )


class Training:
    """The experiment on some devices, whose axis is `data`."""

    def __init__(self, devices: Sequence[Any], lr: float) -> None:
        self.mesh = make_mesh(MeshConfig(), devices)
        self.programs = make_programs(experiment(lr), vocab_size=VOCAB, mesh=self.mesh)
        self.rows = local_sequences(self.mesh, ROWS)

    def first_state(self) -> TrainState:
        """Return the state before the first step, the same numbers on all devices."""
        programs = self.programs
        with jax.set_mesh(self.mesh):
            return init_state(programs.definition, programs.optimizer, shapes=programs.shapes, seed=0)

    def placed(self, state: TrainState) -> TrainState:
        """Return a state of the host on these devices."""
        return jax.tree.map(
            lambda leaf, shape: jax.device_put(leaf, shape.sharding), state, self.programs.shapes
        )

    def step(self, state: TrainState, number: int) -> tuple[TrainState, Point]:
        """Return the state after a step, whose batch has this number, and its parameters and loss."""
        batch = jax.tree.map(lambda leaf: leaf[self.rows], batch_of(number))
        with jax.set_mesh(self.mesh):
            placed = place_batch(batch, self.mesh, batch_size=ROWS)
            state, metrics = self.programs.train_step(state, placed)
        return state, (vector(state), float(metrics["loss"]))

    def points(self, state: TrainState) -> dict[int, Point]:
        """Train from a state, and return parameters and loss after the steps in KEPT."""
        points = {}
        for number in range(NUM_STEPS):
            state, point = self.step(state, number)
            if number + 1 in KEPT:
                points[number + 1] = point
        return points


def vector(state: TrainState) -> np.ndarray:
    """Return all parameters as one float64 vector. The data axis replicates them."""
    leaves = [np.asarray(leaf.addressable_data(0), np.float64).ravel() for leaf in state.params.values()]
    return np.concatenate(leaves)


def with_a_changed_bit(state: TrainState) -> TrainState:
    """Return a state of the host in which one parameter is the next number of its dtype."""
    params = dict(state.params)
    path = min(params)
    leaf = np.array(params[path])
    leaf.flat[0] = np.nextafter(leaf.flat[0], leaf.dtype.type(np.inf))
    return dataclasses.replace(state, params=params | {path: leaf})


def from_one_state(reference: Training, eight: Training) -> np.ndarray:
    """Return the relative difference of the parameters after each step, taken by both from the same state."""
    state = reference.first_state()
    differences = []
    for number in range(NUM_STEPS):
        _, (other, _) = eight.step(eight.placed(jax.device_get(state)), number)
        state, (own, _) = reference.step(state, number)
        differences.append(np.linalg.norm(other - own) / np.linalg.norm(own))
    return np.asarray(differences)


# Workers ----------------------------------------------------------------------------------------------------
def work(kind: str, output: Path, lr: float) -> None:
    """Train on the devices of this process, and write the points to a file."""
    devices = jax.devices()
    if kind == "processes":
        training = Training(devices, lr)
        runs = {"two processes": training.points(training.first_state())}
        if jax.process_index() == 0:
            write(output, runs, {})
        return
    reference = Training(devices[:1], lr)
    eight = Training(devices, lr)
    runs = {
        "one": reference.points(reference.first_state()),
        "8 devices": eight.points(eight.first_state()),
        "one last bit": reference.points(
            reference.placed(with_a_changed_bit(jax.device_get(reference.first_state())))
        ),
    }
    further = {}
    if kind == "float32":
        two = Training(devices[:2], lr)
        runs["2 devices"] = two.points(two.first_state())
        further = {"from one state": from_one_state(reference, eight)}
    write(output, runs, further)


def write(path: Path, runs: dict[str, dict[int, Point]], further: dict[str, Any]) -> None:
    """Write the points of runs, and further arrays, to a file."""
    arrays = dict(further)
    for name, points in runs.items():
        arrays[f"{name}/params"] = np.stack([params for params, _ in points.values()])
        arrays[f"{name}/loss"] = np.asarray([loss for _, loss in points.values()])
    np.savez(path, **arrays)


def main_worker() -> None:
    """Do what the arguments after `--worker` say."""
    kind, output, lr, rank, port = sys.argv[sys.argv.index(WORKER) + 1 :]
    if kind == "processes":
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(rank))
    work(kind, Path(output), float(lr))


def run_workers(
    kind: str, directory: Path, lr: float, *, num_devices: int, num_processes: int = 1
) -> dict[str, np.ndarray]:
    """Run this file as one worker or several, and return what they wrote."""
    output = directory / f"{kind}.npz"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    program = [__file__]
    if kind == "float64":
        environment["JAX_ENABLE_X64"] = "1"
        program = ["-c", IN_FLOAT64, __file__]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, *program, WORKER, kind, str(output), str(lr), str(rank), port], env=environment
        )
        for rank in range(num_processes)
    ]
    if any([process.wait() for process in started]):
        raise SystemExit(f"a worker of {kind} failed")
    return dict(np.load(output))


# Results ----------------------------------------------------------------------------------------------------
def measure(directory: Path, lr: float) -> dict[str, np.ndarray]:
    """Return relative differences to one device, by column: of the parameters and of the loss, at KEPT."""
    single = run_workers("float32", directory, lr, num_devices=8)
    double = run_workers("float64", directory, lr, num_devices=8)
    apart = run_workers("processes", directory, lr, num_devices=1, num_processes=2)
    runs = {
        "one last bit": (single, "one last bit"),
        "8 devices": (single, "8 devices"),
        "2 devices": (single, "2 devices"),
        "2 processes": (apart, "two processes"),
        "one last bit, float64": (double, "one last bit"),
        "8 devices, float64": (double, "8 devices"),
    }
    columns = {}
    for column, (arrays, name) in runs.items():
        base = double if arrays is double else single
        own = base["one/params"]
        apart_by = np.linalg.norm(arrays[f"{name}/params"] - own, axis=1)
        columns[column] = apart_by / np.linalg.norm(own, axis=1)
        columns[f"{column}: loss"] = np.abs(arrays[f"{name}/loss"] - base["one/loss"]) / base["one/loss"]
    columns["8 devices, from one state"] = single["from one state"][np.asarray(KEPT) - 1]
    columns["loss"] = single["one/loss"]
    # Whether two processes have the bits of two devices in one.
    columns["equal"] = (apart["two processes/params"] == single["2 devices/params"]).all(axis=1)
    return columns


PARAMETERS = (
    "one last bit",
    "8 devices",
    "2 devices",
    "2 processes",
    "8 devices, from one state",
    "one last bit, float64",
    "8 devices, float64",
)
LOSSES = ("one last bit", "8 devices", "2 processes", "8 devices, float64")


def tables(columns: dict[str, np.ndarray]) -> str:
    """Return the differences of parameters and losses as two tables in Markdown."""
    at = [KEPT.index(step) for step in SHOWN]
    lines = ["| step | " + " | ".join(PARAMETERS) + " |", "|---" * (1 + len(PARAMETERS)) + "|"]
    lines += [
        f"| {KEPT[i]} | " + " | ".join(f"{columns[name][i]:.0e}" for name in PARAMETERS) + " |" for i in at
    ]
    heads = ["loss on one device", *(f"its difference, {name}" for name in LOSSES)]
    lines += ["", "| step | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    lines += [
        f"| {KEPT[i]} | {columns['loss'][i]:.4f} | "
        + " | ".join(f"{columns[f'{name}: loss'][i]:.0e}" for name in LOSSES)
        + " |"
        for i in at
    ]
    equal = int(columns["equal"].sum())
    lines += ["", f"2 processes have all bits of 2 devices after {equal} of {len(KEPT)} steps."]
    return "\n".join(lines)


def specification(columns: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return a chart of the parameters' differences over the steps, as Vega-Lite."""
    # In one process two devices have the bits of two processes.
    names = [name for name in PARAMETERS if name != "2 devices"]
    points = [
        {"step": step, "run": name, "difference": float(value)}
        for name in names
        for step, value in zip(KEPT, columns[name], strict=True)
        if value > 0  # the axis is logarithmic
    ]
    from slmjax.telemetry.report.charts import COLOURS

    axis = {"format": ".0e", "tickCount": 9}
    return {
        "data": {"values": points},
        "width": 640,
        "height": 320,
        "mark": {"type": "line", "strokeWidth": 2},
        "encoding": {
            "x": {"field": "step", "type": "quantitative", "title": "step"},
            "y": {
                "field": "difference",
                "type": "quantitative",
                "scale": {"type": "log"},
                "axis": axis,
                "title": "relative difference of the parameters",
            },
            "color": {
                "field": "run",
                "type": "nominal",
                "scale": {"domain": names, "range": COLOURS[: len(names)]},
                "legend": {"title": None, "columns": 3, "orient": "bottom", "labelLimit": 250},
            },
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", type=Path, help="an SVG file for the chart; needs the extra `plot`")
    parser.add_argument("--lr", type=float, default=0.03, help="peak learning rate (0.03)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        columns = measure(Path(scratch), args.lr)
    print(tables(columns))
    if args.plot is not None:
        from slmjax.telemetry.report.charts import converter, theme

        config = {**theme(dark=False), "font": "Helvetica, Arial, sans-serif"}
        svg = converter().vegalite_to_svg(specification(columns), config=config)
        args.plot.write_text(svg + "\n", encoding="utf-8")


if __name__ == "__main__":
    main_worker() if WORKER in sys.argv else main()
