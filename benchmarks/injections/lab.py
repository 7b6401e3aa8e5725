"""The runs that injections break, the undisturbed reference, and the check that a run ends as it should.

The model has one layer of width 32 over bytes and trains for 12 steps, with checkpoints at steps 4, 8 and 12
and evaluations at 6 and 12. All of a session but its first compilation takes about a second.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.injections.sessions import End, Plan, session
from benchmarks.injections.verdicts import Defect, Outcome, refused, require_clean, require_refusal, survived

STEPS = 12
EVERY = 4
INTERRUPTED = 75
EXPERIMENT = """
from slmjax.checkpoints.run_checkpoints import CheckpointConfig
from slmjax.data.config import DataConfig, Split
from slmjax.data.tokenizers import ByteTokenizer
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.training.experiment import EvalConfig, Experiment, RunConfig
from slmjax.training.optim import OptimConfig


def experiment():
    block = BlockConfig(mixer=AttentionConfig(num_heads=2), ffn=MlpConfig(hidden_dim=32))
    stack = (LayerGroup(pattern=(block,), repeats=1),)
    return Experiment(
        model=ModelConfig(embed_dim=32, context_length=32, stack=stack),
        data=DataConfig(
            path="text.txt", split=Split.TAIL, heldout_fraction=0.1, sequence_length=32, batch_size=4
        ),
        tokenizer=ByteTokenizer(),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        eval=EvalConfig(every=6, overlap=0, max_documents=None),
        checkpoint=CheckpointConfig(every=4),
        run=RunConfig(name="tiny", steps=12, log_every=1, sample_prompts=()),
    )
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """What a run computed, for comparison bit by bit."""

    losses: dict[int, tuple[Any, Any]]  # step: loss, gradient norm
    final: Any  # held-out loss of result.json
    parameters: str  # digest of parameters and optimizer state of the last checkpoint


@dataclasses.dataclass(kw_only=True)
class Lab:
    """A directory of runs to copy, made once for a campaign."""

    work: Path
    seconds: float = 0.0  # that a whole session takes
    points: list[str] = dataclasses.field(
        default_factory=list
    )  # of the hook, as POINT:STEP, that a run passes
    reference: Trace | None = None

    @property
    def text(self) -> Path:
        """The text that all runs train on."""
        return self.work / "text.txt"

    def run(self, name: str) -> Path:
        """Return a run of the pool: `done`, `part` (killed after checkpoint 8), `begun` (before it)."""
        return self.work / "pool" / name

    def build(self) -> None:
        """Make the pool and the reference, unless an interrupted campaign has left them."""
        (self.work / "pool").mkdir(parents=True, exist_ok=True)
        rng = random.Random(0)
        vocabulary = "the a fox dog runs over lazy river stone light moon".split()
        lines = (" ".join(rng.choice(vocabulary) for _ in range(12)) for _ in range(60))
        self.text.write_text("\n".join(lines) + "\n")
        (self.work / "tiny.py").write_text(EXPERIMENT)
        faults = {"done": "", "part": "checkpoint.verified:8=kill", "begun": "checkpoint.save:4=kill"}
        for name, fault in faults.items():
            self._train(name, fault)
        self.points = self._passed_points()
        end = self._train("done", "")  # a second time, for its duration: the programs are compiled now
        self.seconds = end.seconds
        self.reference = self.trace(self.run("done"))
        steps = sorted(self.reference.losses)
        assert len(self.reference.parameters) == 64, self.reference.parameters
        assert steps == [*range(1, STEPS + 1)], f"the reference has the steps {steps}"

    def _passed_points(self) -> list[str]:
        """Return where a new run, which prepares its data too, passes the hook."""
        from slmjax import faults

        with self.scratch() as folder:
            written = folder / "points"
            environment = {"SLMJAX_CACHE": str(folder / "cache")}
            plan = Plan(in_child=functools.partial(_write_points, written), environment=environment)
            end = session(["train", "tiny.py"], folder=folder, plan=plan)
            assert end.status == 0, end.output
            # A line of the log that is of no step has the number -1, which cannot be asked for.
            passed = dict.fromkeys(name for name in written.read_text().split() if not name.endswith(":-1"))
        # A point that no run passes is one that nobody has put into the code, which its injection shows.
        missing = [point for point in faults.POINTS if not any(name.startswith(point) for name in passed)]
        return [*passed, *missing]

    def _train(self, name: str, fault: str) -> End:
        root = self.work / f"made-{name}"
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(self.run(name), ignore_errors=True)
        argv = ["train", "tiny.py", "--run.directory", str(root)]
        plan = Plan(fault=fault, at_end=functools.partial(_digest_quietly, root))
        end = session(argv, folder=self.work, plan=plan)
        expected = -9 if fault else 0
        assert end.status == expected, f"the pool cannot be made, status {end.status}: {end.output}"
        (made,) = (path for path in root.iterdir() if path.is_dir())
        if digest_path(made).exists():
            digest_path(made).rename(digest_path(self.run(name)))
        made.rename(self.run(name))
        return end

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield an empty directory with the experiment and its text, deleted at the end."""
        path = self.work / "scratch" / uuid.uuid4().hex[:12]
        path.mkdir(parents=True)
        try:
            shutil.copy(self.work / "tiny.py", path)
            shutil.copy(self.text, path)
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def copy(self, name: str, folder: Path) -> Path:
        """Return a copy of a run of the pool in `folder`."""
        return Path(shutil.copytree(self.run(name), folder / "run", symlinks=True))

    def resume(self, run: Path, *options: str, plan: Plan | None = None) -> End:
        """Resume a run with these options."""
        plan = plan or Plan()
        plan = dataclasses.replace(plan, at_end=functools.partial(_digest_quietly, run))
        return session(["train", "--resume", str(run), *options], folder=run.parent, plan=plan)

    def trace(self, run: Path, *, same_settings: bool = True) -> Trace:
        """Return what a finished run computed.

        Args:
          run: the run directory.
          same_settings: whether all sessions had the same settings, so that a step which was repeated must
            have the same bits.

        Raises:
          Defect: its files cannot be read, or a step that was repeated has other bits.
        """
        losses: dict[int, tuple[Any, Any]] = {}
        for record in records(run):
            if record.get("kind") == "train":
                values = (record["loss"], record["grad_norm"])
                step = record["step"]
                if losses.setdefault(step, values) != values and same_settings:
                    raise Defect(f"step {step} was repeated with other bits: {losses[step]} and {values}")
        result = json.loads((run / "result.json").read_text())
        written = digest_path(run)
        return Trace(
            losses=losses,
            final=result["loss"],
            parameters=written.read_text() if written.exists() else "",
        )

    def require_reference(self, run: Path, *, lost_lines: bool = False, partly: bool = False) -> None:
        """Raise Defect unless the finished run has the bits of the reference.

        Args:
          lost_lines: some records of the log may be missing.
          partly: only the final parameters and loss count, since the log itself was damaged, or sessions had
            other settings.
        """
        assert self.reference is not None
        result = json.loads((run / "result.json").read_text())
        if result["status"] != "finished" or result["step"] != STEPS:
            raise Defect(f"result.json says {result['status']} after step {result['step']}")
        try:
            trace = self.trace(run, same_settings=not partly)
        except (ValueError, KeyError) as error:
            if not partly:
                raise Defect(f"the log of the finished run cannot be read: {error}") from error
            return
        if trace.parameters != self.reference.parameters:
            raise Defect(f"other final parameters than without the fault ({trace.parameters[:12] or 'none'})")
        # A signal may have ended the final evaluation, which result.json then says.
        if result["measured_on"] == "held-out text" and trace.final != self.reference.final:
            raise Defect(f"other final loss than without the fault: {trace.final}")
        if partly:
            return
        for step, values in self.reference.losses.items():
            if trace.losses.get(step, values if lost_lines else None) != values:
                raise Defect(f"step {step} has {trace.losses.get(step)}, the reference {values}")

    def require_resumable(
        self, run: Path, *arguments: str, activity: str = "resuming", **options: Any
    ) -> None:
        """Resume a run to its end, and raise Defect unless it has the reference's bits."""
        end = self.resume(run, *arguments)
        require_clean(end, activity=activity)
        if end.status != 0 and is_complete(run) and "already" in end.output:
            # It had finished before: then its parameters are read as they are.
            end = session(["runs", str(run.parent)], folder=run.parent, plan=Plan(at_end=lambda: digest(run)))
        if end.status != 0:
            raise Defect(f"{activity}: status {end.status}: {end.output[-700:]}")
        self.require_reference(run, **options)

    def judge_resume(
        self, run: Path, end: End, *, activity: str, names: Sequence[str] = (), **options: Any
    ) -> Outcome:
        """Judge a resumption: the reference's bits, or a clean refusal."""
        require_clean(end, activity=activity)
        if end.status == 0:
            self.require_reference(run, **options)
            return survived("resumed to the reference's bits")
        require_refusal(end, activity=activity, names=names)
        return refused(end)


def records(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run's log, without an unfinished last line."""
    lines = (run / "log.jsonl").read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def new_runs(folder: Path) -> list[Path]:
    """Return the run directories below the default `runs` of a folder."""
    root = folder / "runs"
    return sorted(path for path in root.iterdir() if not path.name.startswith(".")) if root.is_dir() else []


def is_complete(run: Path) -> bool:
    """Return whether the run has a readable result of its last step."""
    try:
        result = json.loads((run / "result.json").read_text())
        return result["status"] == "finished" and result["step"] == STEPS
    except (OSError, ValueError, KeyError, TypeError):
        return False


def contents(run: Path) -> dict[str, str]:
    """Return the digest of every file of a directory, to see what a command has changed."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*"))
        if path.is_file() and not path.name.startswith(".output-")
    }


def digest_path(run: Path) -> Path:
    """Return the file next to a run that has the digest of its last parameters."""
    return run.parent / f".digest-{run.name}"


def _write_points(path: Path) -> None:
    """Write each point of the hook that this process passes to a file; called in the child."""
    import collections

    from slmjax import faults

    original = faults.at
    counts: collections.Counter[str] = collections.Counter()

    def at(point: str, step: int | None = None) -> None:
        counts[point] += step is None
        with path.open("a") as stream:
            stream.write(f"{point}:{counts[point] if step is None else step}\n")
        original(point, step)

    faults.at = at


# Parameters -------------------------------------------------------------------------------------------------
def _digest_quietly(run: Path) -> None:
    """Write the digest of the run, or of the only run below; if there is none, the comparison reports it."""
    candidates = [run] if (run / "checkpoints").is_dir() else [*run.glob("*/")]
    for candidate in candidates:
        if (candidate / "checkpoints" / str(STEPS)).is_dir():
            try:
                digest(candidate)
            except Exception as error:
                digest_path(candidate).write_text(f"unreadable: {error!r}")


def digest(run: Path) -> None:
    """Write the digest of parameters and optimizer state of the last checkpoint to a file next to the run."""
    arrays = leaves(run / "checkpoints" / str(STEPS))
    hashed = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        hashed.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    digest_path(run).write_text(hashed.hexdigest())


def leaves(checkpoint: Path, items: Sequence[str] = ("model", "optimizer")) -> dict[str, Any]:
    """Read the arrays of a checkpoint, by item and path. For a forked process: it starts a backend."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    arrays = {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        for item in items:
            tree = reader.restore(checkpoint.absolute() / item)
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
                arrays[f"{item}{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    return arrays


def in_fork(action: Callable[[], Any], *, folder: Path) -> Any:
    """Return the JSON value of `action()`, called in a forked process that may start a backend."""
    answer = folder / f".answer-{uuid.uuid4().hex[:8]}"

    def act() -> None:
        answer.write_text(json.dumps(action()))
        os._exit(0)

    end = session(["--version"], folder=folder, plan=Plan(in_child=act))
    if not answer.exists():
        raise AssertionError(f"the campaign's own step failed: {end.output}")
    value = json.loads(answer.read_text())
    answer.unlink()
    return value


def is_finite_checkpoint(checkpoint: Path) -> bool:
    """Return whether all arrays of a checkpoint are finite. For a forked process."""
    import numpy as np

    return all(bool(np.isfinite(np.asarray(leaf, np.float64)).all()) for leaf in leaves(checkpoint).values())


def is_finite_number(value: Any) -> bool:
    """Return whether a value of a JSON file is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
