"""Teachers: whole and unchanged beside a student, several as one, with its vocabulary, refused where they do
not fit.
"""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slmjax
from slmjax.checkpoints.loading import read_config
from slmjax.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer
from slmjax.distill import objective as distillation
from slmjax.distill.config import DistillConfig, Ramp, ShortContext, TeacherConfig
from slmjax.distill.teachers import TeacherPlan, Teachers, plan_teachers, split_devices
from slmjax.losses import (
    DistillLossConfig,
    ForwardKl,
    Head,
    ReverseKl,
    Taid,
    TeacherMean,
    TeacherOutput,
    distill_loss,
)
from slmjax.models.architecture import BlockConfig, HeadKind, LayerGroup, ModelConfig, Precision
from slmjax.models.definition import Definition, define
from slmjax.models.ffn.moe import Balance, MoeConfig
from slmjax.models.mixers.attention import AttentionConfig, Biases, QkNorm
from slmjax.parallel import communication
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.training.objective import ObjectiveConfig
from slmjax.training.step import loss_terms
from tests.distill.lessons import (
    BLOCK,
    BYTES,
    LENGTH,
    STUDENT,
    TEACHER,
    VOCAB,
    build,
    dense_logits,
    forward_kl,
    log_softmax,
    make_batch,
    mean_over,
    write_parameters,
    write_teacher,
)
from tests.training.test_step import assert_bits_equal
from tests.untrained import untrained

BATCH = jax.tree.map(jnp.asarray, make_batch(0))
MESH = functools.cache(lambda: make_mesh(MeshConfig(), jax.devices()[:1]))


def plans_of(
    *teachers: Path | TeacherConfig,
    student: ModelConfig = STUDENT,
    tokenizer: Tokenizer | None = None,
    length: int = LENGTH,
    **how: Any,
) -> tuple[TeacherPlan, ...]:
    named = tuple(one if isinstance(one, TeacherConfig) else TeacherConfig(path=str(one)) for one in teachers)
    distill = DistillConfig(teachers=named, **how)
    return plan_teachers(
        distill, student, sequence_length=length, mesh=MESH(), teacher_mesh=MESH(), tokenizer=tokenizer
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teachers") / "teacher")


@functools.cache
def student() -> tuple[Definition, dict[str, jax.Array], Any]:
    """A definition, parameters, and the hidden states of `BATCH`."""
    definition = define(STUDENT)
    params = untrained(STUDENT, tokenizer=BYTES, path=Path()).params
    model = definition.merge(params, {})
    run = jax.jit(
        lambda model: model(BATCH.tokens, segment_ids=BATCH.segment_ids, positions=BATCH.positions).hidden
    )
    return definition, params, run(model)


def soft_mean(distill: DistillConfig, said: Any, head: Head) -> tuple[Any, Any]:
    """The objective's mean over scored tokens, and its gradient by the table of the student's head."""
    weights = distillation.distill_weights_at(
        distill, jnp.zeros((), jnp.int32), total_steps=10, state={}, key=jax.random.key(0)
    )
    assert weights is not None

    def mean(table: jax.Array) -> jax.Array:
        own = dataclasses.replace(head, weight=table)
        value, _ = distillation.batch_loss(
            distill, student()[2], own, BATCH, said, weights=weights, chunk_size=None
        )
        return value / BATCH.loss_mask.sum()

    return jax.value_and_grad(mean)(head.weight)


# One teacher ------------------------------------------------------------------------------------------------
ODD = dataclasses.replace(
    TEACHER,
    head=HeadKind.UNTIED,
    embed_dim=16,
    learned_positions=LENGTH,
    stack=(
        LayerGroup(
            pattern=(
                dataclasses.replace(
                    BLOCK,
                    mixer=AttentionConfig(
                        num_heads=4, num_kv_heads=2, qk_norm=QkNorm.ALL_HEADS, biases=Biases.ALL, sinks=True
                    ),
                ),
                BlockConfig(
                    mixer=AttentionConfig(num_heads=4),
                    ffn=MoeConfig(
                        num_experts=4, hidden_dim=16, shared_hidden_dim=8, balance=Balance.BIAS, bias=True
                    ),
                ),
            )
        ),
    ),
)


def test_matrices_are_kept_as_they_are_computed_with(tmp_path: Path) -> None:
    """In bfloat16, which gives the bits that float32 parameters give in a computation in bfloat16; what is
    computed wider stays so.
    """
    (plan,) = plans_of(TeacherConfig(path=str(write_teacher(tmp_path, ODD)), precision=Precision.BFLOAT16))
    model = slmjax.load_model(tmp_path)
    kept = plan.stored(model.params)
    narrow = {path for path, leaf in kept.items() if leaf.dtype == jnp.bfloat16}
    assert (
        kept.keys() - narrow
        == {path for path in kept if "/router/" in path or path.endswith(("scale", "bias", "sinks"))} - narrow
    )
    assert {"embed/table", "head/weight", "positions/weight", "segments/0/blocks/1/ffn/experts/up"} <= narrow
    assert not any("/router/" in path or path.endswith("scale") for path in narrow)

    @jax.jit
    def run(params: Any) -> Any:
        return plan.hidden(
            params, model.buffers, BATCH.tokens, BATCH.segment_ids, BATCH.positions
        ), plan.head(params, model.buffers)

    (hidden, head) = run(kept)
    expected = run(model.params)
    assert hidden.dtype == head.weight.dtype == jnp.bfloat16
    assert_bits_equal((hidden, head), expected)
    (said,) = Teachers((plan,), num_microbatches=2)(BATCH)
    assert_bits_equal(said, (hidden, head))


def test_a_teacher_leaves_no_trace_in_the_state(teacher: Path) -> None:
    """No parameter, moment or average of it; of the divergence what it remembers alone."""
    named = (TeacherConfig(path=str(teacher)),)
    plain = build(None)
    taught = build(DistillConfig(teachers=named))
    shapes = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), lesson.programs.shapes.items())
        for lesson in (plain, taught)
    ]
    assert shapes[0] == shapes[1] and "objective" not in shapes[1]
    items = build(DistillConfig(teachers=named, divergence=Taid())).programs.shapes.items()
    assert {name: leaf.shape for name, leaf in items.pop("objective").items()} == dict.fromkeys(
        ("share", "momentum", "previous"), ()
    )
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), items) == shapes[0]


def test_a_teacher_is_the_same_after_training(teacher: Path) -> None:
    """It says the same of a batch when the student has learned from it; and nothing of it has a gradient."""
    distill = DistillConfig(teachers=(TeacherConfig(path=str(teacher)),), divergence=ReverseKl())
    lesson = build(distill)
    assert lesson.teachers is not None
    before = jax.tree.map(np.array, lesson.teachers(BATCH))
    first, last = (lesson.run(*[make_batch(0)] * count)[1]["divergence"] for count in (1, 12))
    assert last < 0.9 * first
    assert_bits_equal(lesson.teachers(BATCH), before)
    np.testing.assert_allclose(
        dense_logits(slmjax.load_model(teacher).model, BATCH),
        before[0].hidden @ before[0].head.weight.T[:, :VOCAB],
        atol=1e-4,
    )

    definition, params, _ = student()
    weights = distillation.distill_weights_at(
        distill, jnp.zeros((), jnp.int32), total_steps=10, state={}, key=jax.random.key(0)
    )

    def loss(teacher_outputs: Any) -> jax.Array:
        return loss_terms(
            definition,
            ObjectiveConfig(distill=distill),
            params,
            {},
            BATCH,
            key=None,
            teacher_outputs=teacher_outputs,
            weights=weights,
        )[0]["distillation"][0]

    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(lesson.teachers(BATCH))))


# Several ----------------------------------------------------------------------------------------------------
def test_two_teachers_with_weights(teacher: Path, tmp_path: Path) -> None:
    """Of another width, three times the weight; the mean of logits and that of probabilities, at temperature
    2, beside cross entropy.
    """
    other = write_teacher(tmp_path, dataclasses.replace(TEACHER, embed_dim=32), scale=0.3)
    named = TeacherConfig(path=str(teacher)), TeacherConfig(path=str(other), weight=3.0)
    how = {
        "teachers": named,
        "hard_weight": Ramp(start=0.5),
        "temperature": Ramp(start=2.0),
        "weight": Ramp(start=0.8),
    }
    settings = [DistillConfig(mean=mean, **how) for mean in TeacherMean]
    said = Teachers(plans_of(*named), num_microbatches=1)(BATCH)
    definition, params, _ = student()
    model = definition.merge(params, {})
    head = model.make_head()
    found = jax.jit(lambda said: [soft_mean(one, said, head)[0] for one in settings])(said)
    theirs = [
        dense_logits(slmjax.load_model(path).model, BATCH).astype(np.float64) / 2 for path in (teacher, other)
    ]
    ours = dense_logits(model, BATCH)
    mixture = np.log(0.25 * np.exp(log_softmax(theirs[0])) + 0.75 * np.exp(log_softmax(theirs[1])))
    targets = np.asarray(BATCH.targets)[..., None]
    nll = mean_over(-np.take_along_axis(log_softmax(ours), targets, axis=-1)[..., 0], BATCH.loss_mask)
    for value, logits in zip(found, (0.25 * theirs[0] + 0.75 * theirs[1], mixture), strict=True):
        divergence = mean_over(4 * forward_kl(logits, ours / 2), BATCH.loss_mask)
        assert float(value) == pytest.approx(0.8 * divergence + 0.5 * nll, rel=1e-5)
    assert abs(found[0] - found[1]) > 1e-2


# Vocabularies -----------------------------------------------------------------------------------------------
ALPHABET = "".join(map(chr, range(65, 65 + VOCAB - 2)))


def test_padding_of_either_vocabulary_changes_nothing(tmp_path: Path) -> None:
    """61 tokens in tables of 61, 64 or 80 rows, or of 70 that a model takes for real ones; what stands in the
    padding is far from zero.
    """
    tokenizer = CharTokenizer().build([ALPHABET])
    assert tokenizer.vocab_size == VOCAB
    draws = np.random.default_rng(9)

    def padded(table: Any, num_rows: int) -> jax.Array:
        return jnp.concatenate(
            [table, jnp.asarray(5 * draws.normal(size=(num_rows - VOCAB, table.shape[1])), jnp.float32)]
        )

    params = untrained(TEACHER, tokenizer=tokenizer, path=Path()).params
    teachers = {}
    for name, rows in (("plain", {}), ("wide", {"vocab_multiple": 80}), ("real", {"vocab_size": 70})):
        config = dataclasses.replace(TEACHER, **rows)
        path = tmp_path / name
        write_parameters(
            path, config, params | {"embed/table": padded(params["embed/table"], config.table_rows)}
        )
        tokenizer.save(path / "tokenizer")
        teachers[name] = path
    table = student()[1]["embed/table"][:VOCAB]
    found = {}
    for name, own in [("plain", 1), ("plain", 8), ("wide", 1), ("wide", 8), ("real", 8), ("real", 100)]:
        plans = plans_of(
            teachers[name], student=dataclasses.replace(STUDENT, vocab_multiple=own), tokenizer=tokenizer
        )
        head = Head(weight=padded(table, plans[0].num_rows), vocab_size=VOCAB)
        said = Teachers(plans, num_microbatches=1)(BATCH)
        assert said[0].head.weight.shape[0] == plans[0].num_rows == -(-VOCAB // own) * own
        found[name, own] = jax.jit(
            functools.partial(soft_mean, DistillConfig(teachers=(plans[0].settings,)), head=head)
        )(said)
    (value, gradient) = found["plain", 1]
    assert value > 0.1
    for key, (other, with_padding) in found.items():
        assert float(other) == pytest.approx(float(value), rel=1e-6), key
        np.testing.assert_allclose(with_padding[:VOCAB], gradient, rtol=1e-5, atol=1e-7, err_msg=str(key))
        assert not np.any(with_padding[VOCAB:]), key


def test_other_tokens_are_refused(teacher: Path, tmp_path: Path) -> None:
    swapped = CharTokenizer().build([ALPHABET.replace("B", "é")])
    path = write_teacher(tmp_path / "swapped", tokenizer=swapped)
    mine = CharTokenizer().build([ALPHABET])
    with pytest.raises(
        ValueError,
        match=(
            r"token 3 is 'B' to the student and 'C' to the teacher .*swapped: they must have the same "
            r"tokens"
        ),
    ):
        plans_of(path, tokenizer=mine)
    longer = CharTokenizer().build([ALPHABET + "é"])
    with pytest.raises(
        ValueError,
        match=(
            r"token 61 is 'é' to the student and None to the teacher .*Set the experiment's tokenizer to "
            r"the teacher's, File"
        ),
    ):
        plans_of(write_teacher(tmp_path / "shorter", tokenizer=mine), tokenizer=longer)
    with pytest.raises(
        ValueError,
        match=r"has no tokenizer to compare with the student's: import it again with --tokenizer FILE",
    ):
        plans_of(write_teacher(tmp_path / "silent", tokenizer=None), tokenizer=BYTES)
    assert len(plans_of(teacher, tokenizer=ByteTokenizer().build(()))) == 1


@pytest.mark.parametrize("own_multiple", [pytest.param(1, marks=pytest.mark.nightly), 8])
def test_a_head_with_other_rows_than_its_table_is_divided_as_the_loss_wants_it(
    tmp_path: Path, own_multiple: int
) -> None:
    """Of 61 rows that become 64 or the other way round: no device holds the whole table, at loading or in a
    step.
    """
    config = dataclasses.replace(TEACHER, vocab_multiple=9 - own_multiple)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    (plan,) = plan_teachers(
        DistillConfig(teachers=(TeacherConfig(path=str(write_teacher(tmp_path, config))),)),
        dataclasses.replace(STUDENT, vocab_multiple=own_multiple),
        sequence_length=LENGTH,
        mesh=mesh,
        teacher_mesh=mesh,
        tokenizer=None,
    )
    head = Teachers([plan], num_microbatches=1)._heads[0]
    wanted = plan.output_shapes(8, LENGTH).head.weight
    assert head.weight.shape == (plan.num_rows, 24) and head.weight.sharding.is_equivalent_to(
        wanted.sharding, 2
    )
    if own_multiple == 1:
        return
    with jax.set_mesh(mesh):

        @jax.jit
        def loss(states: jax.Array, targets: jax.Array, weights: jax.Array, head: Head) -> Any:
            states = communication.constrain(states, ("batch", "time", None))
            said = (TeacherOutput(hidden=2.0 * states, head=head),)
            return distill_loss(
                states, head, said, DistillLossConfig(divergence=ForwardKl()), targets, weights
            )[0]

        rows = jnp.zeros((8, LENGTH, 24)), jnp.zeros((8, LENGTH), jnp.int32), jnp.zeros((8, LENGTH))
        text = loss.lower(*rows, head).compile().as_text()
    gathered = re.findall(r"(f32\[[\d,]+\])\S* all-gather", text)
    assert "f32[32,24]" in gathered and "f32[64,24]" not in gathered, gathered


# Contexts ---------------------------------------------------------------------------------------------------
def test_a_short_context(tmp_path: Path) -> None:
    """Refused, or read in windows of 8 that repeat 3: states 8 to 12 are those of a window that begins at
    5.
    """
    path = write_teacher(tmp_path, dataclasses.replace(TEACHER, context_length=8))
    with pytest.raises(
        ValueError,
        match=r"reads 8 tokens at most, and rows have data.sequence_length=16: .*short-context=window",
    ):
        plans_of(path)
    plans = plans_of(path, short_context=ShortContext.WINDOW, overlap=3)
    row = np.arange(LENGTH) % 50 + 2
    batch = dataclasses.replace(
        BATCH,
        tokens=jnp.asarray(np.tile(row, (8, 1)), jnp.int32),
        segment_ids=jnp.ones((8, LENGTH), jnp.int32),
        positions=jnp.asarray(np.tile(np.arange(LENGTH), (8, 1)), jnp.int32),
    )
    (said,) = Teachers(plans, num_microbatches=2)(batch)
    model = slmjax.load_model(path).model

    def direct(start: int) -> jax.Array:
        window = jnp.asarray(np.pad(row, (0, 8))[None, start : start + 8], jnp.int32)
        return jax.jit(
            lambda tokens: (
                model(tokens, segment_ids=jnp.ones((1, 8), jnp.int32), positions=jnp.arange(8)[None]).hidden
            )
        )(window)[0]

    for first, kept in ((0, range(8)), (5, range(8, 13)), (10, range(13, 16))):
        wanted = direct(first)[jnp.asarray([place - first for place in kept])]
        np.testing.assert_allclose(said.hidden[3, list(kept)], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("overlap", [8, -1])
def test_an_overlap_that_does_not_fit_is_refused_before_the_run(tmp_path: Path, overlap: int) -> None:
    path = write_teacher(tmp_path, dataclasses.replace(TEACHER, context_length=8))
    with pytest.raises(
        ValueError, match=rf"an overlap of {overlap} tokens does not fit the teacher's context of 8"
    ):
        plans_of(path, short_context=ShortContext.WINDOW, overlap=overlap)


# Directories and devices ------------------------------------------------------------------------------------
def test_what_is_no_teacher(tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is neither a run directory nor an imported model"):
        plans_of(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is an imported model, which has no step 7"):
        Teachers(plans_of(TeacherConfig(path=str(teacher), step=7)), num_microbatches=1)
    assert read_config(teacher) == TEACHER


def test_devices_that_are_divided(teacher: Path) -> None:
    distill = DistillConfig(teachers=(TeacherConfig(path=str(teacher)),), mesh=MeshConfig(), devices=3)
    assert split_devices(distill, range(8)) == ([0, 1, 2, 3, 4], [5, 6, 7])
    assert split_devices(None, range(8)) == (list(range(8)), list(range(8)))
    with pytest.raises(
        ValueError, match=r"objective.distill.devices=3 leaves the student none of the 3 device"
    ):
        split_devices(distill, range(3))
