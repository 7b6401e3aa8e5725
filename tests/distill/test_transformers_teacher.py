"""One step of an imported student with an imported teacher, beside the dense one of PyTorch and transformers.
Needs the oracle extra.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slmjax
from slmjax.convert.import_export import import_model
from slmjax.data.batch import Batch, empty_batch
from slmjax.distill.config import DistillConfig, Ramp, TeacherConfig
from slmjax.training.optim import learning_rate
from tests.convert.synthetic import VOCAB_SIZE, write_model
from tests.convert.test_families import read_golden, tiny_tokenizer
from tests.distill.lessons import LENGTH, OPTIM, ROWS, TOTAL_STEPS, build, dense_logits

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch and transformers, about themselves
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TEMPERATURE = 2.0
HARD_WEIGHT = 0.5
GRAD_CLIP = OPTIM.grad_clip or 1.0


def imported(case: str, directory: Path) -> tuple[Path, Path]:
    """A model of this family as transformers has it, and as we import it."""
    found = read_golden(case)
    write_model(directory / f"{case}-theirs", found["config"], found["shapes"])
    import_model(
        directory / f"{case}-theirs",
        directory / f"{case}-ours",
        tokenizer=tiny_tokenizer(directory),
        vocab_multiple=8,
    )
    return directory / f"{case}-theirs", directory / f"{case}-ours"


def one_document_a_row() -> Batch:
    """Of different lengths, with padding after them and some targets that are not scored."""
    draws = np.random.default_rng(4)
    batch = empty_batch(ROWS, LENGTH)
    for row in range(ROWS):
        length = LENGTH - row
        ids = draws.integers(0, VOCAB_SIZE, size=length + 1)
        batch.tokens[row, :length] = ids[:-1]
        batch.targets[row, :length] = ids[1:]
        batch.loss_mask[row, :length] = draws.random(length) < 0.7
        batch.segment_ids[row, :length] = 1
        batch.positions[row, :length] = np.arange(length)
        batch.row_ids[row] = row
    return batch


def dense_step(student: Path, teacher: Path, batch: Batch) -> tuple[dict[str, float], np.ndarray]:
    """Loss and gradient norm of the same step in PyTorch, and the student's logits after it."""
    import torch
    import transformers

    def load(path: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, attn_implementation="eager", dtype=torch.float32
        ).eval()

    ids = torch.from_numpy(batch.tokens.astype(np.int64))
    mask = torch.from_numpy(batch.loss_mask)
    given = {"input_ids": ids, "attention_mask": torch.from_numpy((batch.segment_ids > 0).astype(np.int64))}
    model = load(student)
    with torch.no_grad():
        theirs = load(teacher)(**given).logits
    ours = model(**given).logits
    log_p, log_q = (torch.log_softmax(logits / TEMPERATURE, dim=-1) for logits in (theirs, ours))
    divergence = TEMPERATURE**2 * (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    nll = torch.nn.functional.cross_entropy(
        ours.transpose(1, 2), torch.from_numpy(batch.targets.astype(np.int64)), reduction="none"
    )
    means = [(values * mask).sum() / mask.sum() for values in (divergence, nll)]
    loss = means[0] + HARD_WEIGHT * means[1]
    loss.backward()
    decayed = [
        value for name, value in model.named_parameters() if value.ndim > 1 and "embed_tokens" not in name
    ]
    others = [value for name, value in model.named_parameters() if value.ndim == 1 or "embed_tokens" in name]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
    groups = [
        {"params": decayed, "weight_decay": OPTIM.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    rate = float(learning_rate(OPTIM, 0, total_steps=TOTAL_STEPS))
    torch.optim.AdamW(groups, lr=rate, betas=OPTIM.betas, eps=OPTIM.eps).step()
    with torch.no_grad():
        after = model(**given).logits.numpy()
    found = {"objective": loss, "divergence": means[0], "loss": means[1], "grad_norm": norm}
    return {name: float(value.detach()) for name, value in found.items()}, after


@pytest.mark.parametrize(("student", "teacher"), [("llama", "qwen3"), ("qwen3", "gemma3")])
@pytest.mark.composes("distillation", "import or export")
def test_a_step_is_that_of_pytorch(student: str, teacher: str, tmp_path: Path) -> None:
    """Forward KL at temperature 2 and half the cross entropy: loss to 1e-5; gradient norm, and logits after a
    step of AdamW, to 1e-4.
    """
    (their_student, our_student), (their_teacher, our_teacher) = (
        imported(case, tmp_path) for case in (student, teacher)
    )
    batch = one_document_a_row()
    loaded = slmjax.load_model(our_student)
    expected, logits_after = dense_step(their_student, their_teacher, batch)
    distill = DistillConfig(
        teachers=(TeacherConfig(path=str(our_teacher)),),
        temperature=Ramp(start=TEMPERATURE),
        hard_weight=Ramp(start=HARD_WEIGHT),
    )
    lesson = build(distill, loaded.config)
    start = dataclasses.replace(
        lesson.start(), params=loaded.params, optimizer=lesson.optimizer.init(loaded.params)
    )
    state, metrics = lesson.run(batch, state=start)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4 if name == "grad_norm" else 1e-5), name
    assert expected["divergence"] > 0.1 and expected["grad_norm"] > GRAD_CLIP
    is_real = batch.segment_ids > 0
    after = dense_logits(lesson.programs.definition.merge(state.params, state.buffers), batch)
    before = dense_logits(loaded.model, batch)
    np.testing.assert_allclose(after[is_real], logits_after[is_real], atol=1e-4 * np.abs(logits_after).max())
    assert np.abs(after - before)[is_real].max() > 0.05
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))
