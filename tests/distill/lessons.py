"""Teachers that nobody trained, in directories as of imported models, and the compiled step of a student
beside them.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slmjax import config as config_io
from slmjax import losses
from slmjax.checkpoints import safetensors_files
from slmjax.data.batch import Batch
from slmjax.data.config import DataConfig
from slmjax.data.tokenizers import ByteTokenizer, Tokenizer
from slmjax.distill.config import DistillConfig
from slmjax.distill.teachers import Teachers, split_devices
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.definition import unstack
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.parallel.batches import place_batch
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.training.experiment import Experiment, RunConfig
from slmjax.training.metrics import named_metrics
from slmjax.training.objective import ObjectiveConfig
from slmjax.training.optim import OptimConfig, make_optimizer
from slmjax.training.programs import Programs, make_programs, teacher_plans
from slmjax.training.state import TrainState
from tests.training import test_step
from tests.untrained import untrained

VOCAB = 61
LENGTH = 16
ROWS = 8
TOTAL_STEPS = 100
BYTES = ByteTokenizer().build(())
# Adam divides by the size of the gradient; this eps keeps differences of rounding from growing where it is
# tiny.
OPTIM = OptimConfig(lr=2e-2, warmup_steps=2, eps=1e-4, grad_clip=0.5)
BLOCK = BlockConfig(mixer=AttentionConfig(num_heads=4, num_kv_heads=2), ffn=MlpConfig(hidden_dim=24))
STUDENT = ModelConfig(
    embed_dim=16,
    context_length=LENGTH,
    vocab_size=VOCAB,
    vocab_multiple=8,
    stack=(LayerGroup(pattern=(BLOCK,)),),
)
TEACHER = dataclasses.replace(STUDENT, embed_dim=24, vocab_multiple=1)


def write_teacher(
    path: Path,
    config: ModelConfig = TEACHER,
    *,
    tokenizer: Tokenizer | None = BYTES,
    scale: float = 0.4,
    embed: float = 1.0,
) -> Path:
    """The directory of a model with these settings; another scale makes it another model, and a large `embed`
    one that repeats tokens.
    """
    loaded = untrained(config, tokenizer=BYTES, path=path, scale=scale)
    table = {"embed/table": embed * loaded.params["embed/table"]}
    write_parameters(path, config, loaded.params | loaded.buffers | table)
    if tokenizer is not None:
        tokenizer.save(path / "tokenizer")
    return path


def write_parameters(path: Path, config: ModelConfig, arrays: dict[str, Any]) -> None:
    """A model's settings and its parameters and buffers, by stack path, as an imported model has them."""
    layers = jax.tree.map(np.asarray, unstack(config, arrays))
    safetensors_files.write_tensors(path / safetensors_files.DIRECTORY, layers.items())
    (path / "model.json").write_text(config_io.dumps(config))


def make_batch(seed: int = 0) -> Batch:
    """Rows of two documents and padding, unevenly filled and scored, each with a number of its own."""
    batch = test_step.make_batch(seed)
    batch.row_ids[:] = ROWS * seed + np.arange(ROWS)
    return batch


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """A student's compiled step on its mesh, and its teachers."""

    mesh: jax.sharding.Mesh
    programs: Programs
    teachers: Teachers | None
    optimizer: Any
    experiment: Experiment

    def start(self) -> TrainState:
        """A first state, the same on every mesh; made by numpy, because compiling the initialisation takes
        longer.
        """
        model = untrained(self.experiment.model, tokenizer=BYTES, path=Path(), scale=0.2)
        distill = self.experiment.objective.distill
        return TrainState(
            params=model.params,
            buffers=model.buffers,
            optimizer=self.optimizer.init(model.params),
            ema=None,
            divergence={} if distill is None else distill.divergence.initial_state(),
            rng=jax.random.key_data(jax.random.key(0)),
            **{name: jnp.zeros((), jnp.int32) for name in ("step", "skipped", "skipped_in_a_row")},
        )

    def place(self, batch: Batch) -> Batch:
        """The batch on the student's mesh."""
        return place_batch(batch, self.mesh)

    def run(self, *batches: Batch, state: TrainState | None = None) -> tuple[TrainState, dict[str, Any]]:
        """The state after these batches and the metrics of the last; the state that is given is left
        alone.
        """
        places = jax.tree.map(lambda leaf: leaf.sharding, self.programs.shapes)
        new: TrainState = jax.device_put(
            jax.tree.map(jnp.copy, self.start() if state is None else state), places
        )
        metrics: dict[str, Any] = {}
        with jax.set_mesh(self.mesh):
            for batch in map(self.place, batches):
                said = () if self.teachers is None else (self.teachers(batch),)
                new, metrics = self.programs.train_step(new, batch, *said)
        return new, named_metrics(self.programs.definition.config, jax.device_get(metrics))


@functools.cache
def build(
    distill: DistillConfig | None,
    student: ModelConfig = STUDENT,
    *,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008  # it is frozen
    num_devices: int = 1,
    num_microbatches: int = 1,
) -> Lesson:
    """As `setup.set_up` makes it, without data; `num_devices` of all, or those that the teachers leave."""
    experiment = Experiment(
        model=student,
        data=DataConfig(sequence_length=LENGTH, batch_size=ROWS),
        objective=ObjectiveConfig(distill=distill),
        mesh=mesh,
        optim=dataclasses.replace(OPTIM, accumulation_steps=num_microbatches),
        run=RunConfig(steps=TOTAL_STEPS),
    )
    own = make_mesh(mesh, split_devices(distill, jax.devices())[0][:num_devices])
    programs = make_programs(experiment, vocab_size=VOCAB, mesh=own)
    plans = teacher_plans(experiment, student, mesh=own)
    return Lesson(
        mesh=own,
        programs=programs,
        teachers=Teachers(plans, num_microbatches=num_microbatches) if plans else None,
        experiment=experiment,
        optimizer=make_optimizer(experiment.optim, programs.definition.params, total_steps=TOTAL_STEPS),
    )


def dense_logits(model: Any, batch: Batch) -> np.ndarray:
    """All logits of a batch by one model, padding left out: [B, T, V]."""
    rows = jax.tree.map(jnp.asarray, (batch.tokens, batch.segment_ids, batch.positions))

    def run(model: Any, tokens: Any, segment_ids: Any, positions: Any) -> Any:
        output = model(tokens, segment_ids=segment_ids, positions=positions)
        return losses.logits(output.hidden, output.head)[..., : output.head.vocab_size]

    return np.asarray(jax.jit(run)(model, *rows))


# Dense formulas ---------------------------------------------------------------------------------------------
def log_softmax(logits: Any) -> np.ndarray:
    """In float64."""
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def forward_kl(teacher: Any, student: Any, *, temperature: float = 1.0) -> np.ndarray:
    """KL(teacher || student) of logits, per token, in float64."""
    log_p, log_q = (
        log_softmax(np.asarray(logits, np.float64) / temperature) for logits in (teacher, student)
    )
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def mean_over(values: np.ndarray, mask: Any) -> float:
    """The mean of what is scored."""
    mask = np.asarray(mask, np.float64)
    return float((values * mask).sum() / mask.sum())
