"""Time of online distillation, compared with plain training and the teacher's own forward pass.

    python benchmarks/distill_step.py                        # nano learns from a decoder of 12M parameters
    python benchmarks/distill_step.py --teacher nano --rounds 21

In one process, in turn, on one batch: a plain training step, the teacher's forward pass with its logits (in
chunks, as an evaluation computes them), and for each divergence the teacher's call and the step that learns
from it. Prints the median over the rounds of distillation / (plain + teacher). The target is at most 1.10.
Weights are random: only time is measured.
"""

import argparse
import dataclasses
import statistics
import time
from typing import Any

from slmjax import startup

startup.keep_memory()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from slmjax import losses  # noqa: E402
from slmjax.data.batch import empty_batch  # noqa: E402
from slmjax.distill.config import DistillConfig, TeacherConfig, divergence_of  # noqa: E402
from slmjax.distill.teachers import TeacherPlan  # noqa: E402
from slmjax.models import zoo  # noqa: E402
from slmjax.models.definition import define, define_for_inference  # noqa: E402
from slmjax.parallel import communication  # noqa: E402
from slmjax.parallel.batches import place_batch  # noqa: E402
from slmjax.parallel.mesh import MeshConfig, make_mesh  # noqa: E402
from slmjax.training.objective import ObjectiveConfig  # noqa: E402
from slmjax.training.optim import make_optimizer  # noqa: E402
from slmjax.training.recipes import nano  # noqa: E402
from slmjax.training.state import init_state, state_shapes  # noqa: E402
from slmjax.training.step import make_train_step  # noqa: E402

TEACHERS = {"12m": zoo.slm_12m, "nano": zoo.nano}
VOCABULARY = 4096
ROWS = 8
LENGTH = 256


def batch() -> Any:
    """Return a batch of random tokens, without padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (ROWS, LENGTH + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    return dataclasses.replace(
        empty_batch(ROWS, LENGTH),
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=np.ones((ROWS, LENGTH), np.float32),
        segment_ids=np.ones((ROWS, LENGTH), np.int32),
        positions=positions,
        row_ids=np.arange(ROWS, dtype=np.int32),
        num_bytes=np.full(ROWS, 3 * LENGTH, np.int32),
    )


class Student:
    """A state and its train step, which can be called any number of times."""

    def __init__(self, mesh: Any, distill: DistillConfig | None) -> None:
        experiment = nano()
        definition = define(zoo.nano(vocab_size=VOCABULARY))
        objective = ObjectiveConfig(distill=distill)
        optimizer = make_optimizer(experiment.optim, definition.params, total_steps=1000)
        shapes = state_shapes(definition, optimizer, with_ema=False, mesh=mesh, objective=objective)
        self.step = make_train_step(
            definition,
            optimizer,
            objective=objective,
            optim=experiment.optim,
            shapes=shapes,
            total_steps=1000,
        )
        self.state = init_state(definition, optimizer, shapes=shapes, seed=0, objective=objective)

    def run(self, *inputs: Any) -> None:
        self.state, _ = self.step(self.state, *inputs)
        jax.block_until_ready(self.state)


def seconds(fn: Any) -> float:
    started = time.perf_counter()
    fn()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", choices=sorted(TEACHERS), default="12m")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--divergences", nargs="*", default=["forward_kl", "reverse_kl", "jsd", "taid", "top_k"]
    )
    args = parser.parse_args()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        definition = define_for_inference(TEACHERS[args.teacher](vocab_size=VOCABULARY))
        plan = TeacherPlan(
            settings=TeacherConfig(path="random"),
            definition=definition,
            mesh=mesh,
            student_mesh=mesh,
            num_rows=VOCABULARY,
            vocab_size=VOCABULARY,
            overlap=0,
        )
        params, buffers = jax.jit(definition.init)(jax.random.key(1))
        head = jax.jit(plan.head)(params, buffers)
        placed = place_batch(batch(), mesh)
        rows = (placed.tokens, placed.segment_ids, placed.positions)
        call = jax.jit(lambda *inputs: communication.constrain(plan.hidden(*inputs), ("batch", "time", None)))

        @jax.jit
        def with_logits(params: Any, buffers: Any, batch: Any) -> Any:
            hidden = plan.hidden(params, buffers, batch.tokens, batch.segment_ids, batch.positions)
            return losses.cross_entropy(hidden, plan.head(params, buffers), batch.targets, batch.loss_mask)

        def teacher_alone() -> None:
            jax.block_until_ready(with_logits(params, buffers, placed))

        plain = Student(mesh, None)
        timed: dict[str, Any] = {"plain": lambda: plain.run(placed), "teacher": teacher_alone}
        for name in args.divergences:
            student = Student(mesh, DistillConfig(teachers=(plan.settings,), divergence=divergence_of(name)))
            timed[name] = lambda student=student: student.run(
                placed, (losses.TeacherOutput(hidden=call(params, buffers, *rows), head=head),)
            )
        for fn in timed.values():
            fn()  # compiles
        measured: dict[str, list[float]] = {name: [] for name in timed}
        for index in range(args.rounds):
            for name in timed if index % 2 else reversed(list(timed)):
                measured[name].append(seconds(timed[name]))
    base = [plain + teacher for plain, teacher in zip(measured["plain"], measured["teacher"], strict=True)]
    print(
        f"plain step {1e3 * statistics.median(measured['plain']):.0f} ms, teacher "
        f"{1e3 * statistics.median(measured['teacher']):.0f} ms"
    )
    print("| divergence | step, median | over plain + teacher | middle half of the rounds |")
    print("|---|---|---|---|")
    for name in args.divergences:
        ratios = sorted(distilled / both for distilled, both in zip(measured[name], base, strict=True))
        middle = len(ratios) // 4
        print(
            f"| {name} | {1e3 * statistics.median(measured[name]):.0f} ms | "
            f"{statistics.median(ratios):.2f} | {ratios[middle]:.2f} to {ratios[-middle - 1]:.2f} |"
        )


if __name__ == "__main__":
    main()
