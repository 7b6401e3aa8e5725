"""A student that begins as a part of its teacher: the right numbers in the right places, or a refusal that
says why.
"""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import slmjax
from slmjax import config as config_io
from slmjax.checkpoints import safetensors_files
from slmjax.checkpoints.loading import Loaded, read_parameters
from slmjax.checkpoints.run_checkpoints import CheckpointConfig, Checkpointer
from slmjax.convert.import_export import import_model
from slmjax.data.tokenizers import ByteTokenizer, CharTokenizer
from slmjax.distill.layers import chosen_layers, shared_rows, student_parameters
from slmjax.distill.slices import student_cuts
from slmjax.models.architecture import BlockConfig, HeadKind, LayerGroup, ModelConfig, NormPlacement, stack_of
from slmjax.models.definition import define, restack, stored_shapes, unstack
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import Balance, MoeConfig
from slmjax.models.layers import NormKind
from slmjax.models.mixers.attention import AttentionConfig, Biases, OutputGate, QkNorm
from slmjax.models.mixers.latent import LatentAttentionConfig
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.parallel.rules import parameter_shardings
from slmjax.runner.initial_state import fresh_state
from slmjax.runner.setup import set_up
from slmjax.telemetry.run_directory import read_log
from slmjax.training.experiment import FromTeacherLayers
from tests.convert.synthetic import VOCAB_SIZE, write_model
from tests.convert.test_families import read_golden
from tests.one_layer import one_layer
from tests.untrained import untrained

ATTENTION = AttentionConfig(
    num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=QkNorm.PER_HEAD, biases=Biases.ALL
)
DENSE = BlockConfig(mixer=ATTENTION, ffn=MlpConfig(hidden_dim=48))
MOE = MoeConfig(num_experts=4, hidden_dim=24, shared_hidden_dim=16, balance=Balance.BIAS, bias=True)
EXPERTS = BlockConfig(
    mixer=dataclasses.replace(
        ATTENTION, qk_norm=QkNorm.ALL_HEADS, sinks=True, output_gate=OutputGate.PER_ELEMENT
    ),
    ffn=MOE,
)
TEACHER = ModelConfig(
    embed_dim=32,
    stack=(LayerGroup(pattern=(DENSE, EXPERTS), repeats=2),),
    vocab_size=258,
    vocab_multiple=8,
    head=HeadKind.UNTIED,
)
WORDS = ByteTokenizer().build(())


def of_blocks(*blocks: BlockConfig, **changes: Any) -> ModelConfig:
    return dataclasses.replace(TEACHER, stack=stack_of(blocks), **changes)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A model that nobody trained, in a directory as of an imported one."""
    path = tmp_path_factory.mktemp("teacher")
    loaded = untrained(TEACHER, tokenizer=WORDS, path=path)
    safetensors_files.write_tensors(
        path / safetensors_files.DIRECTORY, layers_of(TEACHER, loaded.params, loaded.buffers).items()
    )
    (path / "model.json").write_text(config_io.dumps(TEACHER))
    return loaded


def layers_of(
    config: ModelConfig, params: dict[str, jax.Array], buffers: dict[str, jax.Array]
) -> dict[str, np.ndarray]:
    """By logical path."""
    return jax.tree.map(np.asarray, unstack(config, params | buffers))


def start(
    teacher: Loaded, config: ModelConfig, chosen: tuple[int, ...], *, num_rows: int = 258, **axes: int
) -> Any:
    """Definition, parameters and buffers of a student, and what it would have had without a teacher."""
    mesh = make_mesh(MeshConfig(**axes), None if axes else jax.devices()[:1])
    definition = define(config)
    fresh = untrained(config, tokenizer=WORDS, path=teacher.path, scale=1e3)
    places = [parameter_shardings(tree, mesh) for tree in (fresh.params, fresh.buffers)]
    placed = jax.device_put((fresh.params, fresh.buffers), tuple(places))
    params, buffers = student_parameters(
        teacher.path, definition=definition, chosen=chosen, fresh=placed, num_rows=num_rows, mesh=mesh
    )
    assert jax.tree.map(lambda leaf: leaf.sharding, (params, buffers)) == tuple(places)
    return definition, params, buffers, fresh


# Which layers -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("num_teacher", "num_student", "how", "chosen"),
    [
        (4, 4, {}, (0, 1, 2, 3)),
        (12, 6, {}, (0, 2, 4, 7, 9, 11)),
        (6, 3, {}, (0, 3, 5)),  # 2.5 is rounded up
        (30, 2, {}, (0, 29)),
        (5, 1, {}, (0,)),
        (2, 3, {}, (0, 1, 1)),
        (4, 2, {"every": 2}, (0, 2)),
        (7, 3, {"every": 3}, (0, 3, 6)),
        (4, 3, {"layers": (3, 0, 0)}, (3, 0, 0)),
    ],
)
def test_chosen_layers(
    num_teacher: int, num_student: int, how: dict[str, Any], chosen: tuple[int, ...]
) -> None:
    assert chosen_layers(num_teacher=num_teacher, num_student=num_student, **how) == chosen


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"every": 3},
            (
                r"init.every=3 gives 2 of the teacher's 4 layers, and the student has 3: .*give the student "
                r"2, "
                r"or leave out both"
            ),
        ),
        ({"layers": (0, 1)}, r"init.layers names 2 layer\(s\), and the student has 3"),
        ({"layers": (0, 1, 4)}, r"init.layers names layer 4, and the teacher's are 0 to 3"),
        ({"layers": (0, 1, -1)}, r"init.layers names layer -1"),
    ],
)
def test_layers_that_cannot_be_chosen(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chosen_layers(num_teacher=4, num_student=3, **how)


def test_one_way_of_choosing() -> None:
    with pytest.raises(ValueError, match=r"init.layers=\(0, 2\) and init.every=2 both choose"):
        FromTeacherLayers(path="runs/teacher", layers=(0, 2), every=2)
    with pytest.raises(ValueError, match=r"init.every must be at least 1, got 0"):
        FromTeacherLayers(path="runs/teacher", every=0)


# What they hold ---------------------------------------------------------------------------------------------
def test_all_layers_are_the_teacher(teacher: Loaded) -> None:
    """Also where the student groups its layers otherwise."""
    blocks = tuple(TEACHER.blocks())
    config = dataclasses.replace(
        TEACHER, stack=(LayerGroup(pattern=blocks[:1]), LayerGroup(pattern=blocks[1:]))
    )
    _, params, buffers, _ = start(teacher, config, (0, 1, 2, 3))
    mine = layers_of(config, params, buffers)
    for name, value in layers_of(TEACHER, teacher.params, teacher.buffers).items():
        # padding means nothing
        rows = slice(0, 258) if name in ("embed/table", "head/weight") else slice(None)
        np.testing.assert_array_equal(mine[name][rows], value[rows], err_msg=name)
    tokens = jnp.arange(12)[None] * 7
    restacked = tuple(
        restack(TEACHER, jax.tree.map(jnp.asarray, mine), like=tree)
        for tree in (teacher.params, teacher.buffers)
    )
    forward = jax.jit(lambda arrays: slmjax.logits(teacher.definition.merge(*arrays), tokens))
    np.testing.assert_array_equal(forward(restacked), forward((teacher.params, teacher.buffers)))


@pytest.mark.parametrize(("block", "chosen"), [(DENSE, (0, 2)), (EXPERTS, (3, 1, 1))])
def test_some_layers(teacher: Loaded, block: BlockConfig, chosen: tuple[int, ...]) -> None:
    config = of_blocks(*[block] * len(chosen))
    definition, params, buffers, _ = start(teacher, config, chosen)
    theirs = layers_of(TEACHER, teacher.params, teacher.buffers)
    mine = layers_of(config, params, buffers)
    assert len(mine) == len(stored_shapes(config, definition.params | definition.buffers))
    for name, value in mine.items():
        if name.startswith("layers/"):
            _, index, rest = name.split("/", 2)
            np.testing.assert_array_equal(value, theirs[f"layers/{chosen[int(index)]}/{rest}"], err_msg=name)
    np.testing.assert_array_equal(mine["final_norm/scale"], theirs["final_norm/scale"])


NARROW_ATTENTION = dataclasses.replace(EXPERTS.mixer, num_heads=1, num_kv_heads=1)
NARROW = BlockConfig(
    mixer=NARROW_ATTENTION, ffn=dataclasses.replace(MOE, num_experts=3, hidden_dim=16, shared_hidden_dim=8)
)


def expected_narrow(
    theirs: dict[str, np.ndarray], layer: int, *, kv_heads: int, group: int
) -> dict[str, np.ndarray]:
    """What a student of width 24 has of a layer of experts: written with plain slices, dims [D, K, G, H]."""
    own = {
        name.split("/", 2)[2]: value for name, value in theirs.items() if name.startswith(f"layers/{layer}/")
    }
    num = kv_heads * group

    def queries(value: np.ndarray) -> np.ndarray:
        return value.reshape(-1, 2, 2, 8)[:, :kv_heads, :group].reshape(-1, num * 8)

    return {
        "mixer/query/weight": queries(own["mixer/query/weight"])[:24],
        "mixer/query/bias": queries(own["mixer/query/bias"])[0],
        "mixer/query_norm/scale": queries(own["mixer/query_norm/scale"])[0],
        "mixer/output/weight": own["mixer/output/weight"]
        .reshape(2, 2, 8, 32)[:kv_heads, :group, :, :24]
        .reshape(-1, 24),
        "mixer/output/bias": own["mixer/output/bias"][:24],
        "mixer/output_gate/weight": queries(own["mixer/output_gate/weight"])[:24],
        "mixer/output_gate/bias": queries(own["mixer/output_gate/bias"])[0],
        "mixer/sinks": own["mixer/sinks"].reshape(2, 2)[:kv_heads, :group].reshape(-1),
        "mixer/key/weight": own["mixer/key/weight"][:24, : 8 * kv_heads],
        "mixer/key/bias": own["mixer/key/bias"][: 8 * kv_heads],
        "mixer/key_norm/scale": own["mixer/key_norm/scale"][: 8 * kv_heads],
        "mixer/value/weight": own["mixer/value/weight"][:24, : 8 * kv_heads],
        "mixer/value/bias": own["mixer/value/bias"][: 8 * kv_heads],
        "mixer_norm/scale": own["mixer_norm/scale"][:24],
        "ffn_norm/scale": own["ffn_norm/scale"][:24],
        "ffn/router/weight": own["ffn/router/weight"][:24, :3],
        "ffn/router/bias": own["ffn/router/bias"][:3],
        "ffn/router_bias": own["ffn/router_bias"][:3],
        "ffn/experts/gate": own["ffn/experts/gate"][:3, :24, :16],
        "ffn/experts/up": own["ffn/experts/up"][:3, :24, :16],
        "ffn/experts/down": own["ffn/experts/down"][:3, :16, :24],
        "ffn/experts/gate_bias": own["ffn/experts/gate_bias"][:3, :16],
        "ffn/experts/up_bias": own["ffn/experts/up_bias"][:3, :16],
        "ffn/experts/down_bias": own["ffn/experts/down_bias"][:3, :24],
        "ffn/shared/gate/weight": own["ffn/shared/gate/weight"][:24, :8],
        "ffn/shared/up/weight": own["ffn/shared/up/weight"][:24, :8],
        "ffn/shared/down/weight": own["ffn/shared/down/weight"][:8, :24],
    }


def test_gates_of_heads_are_cut_as_their_heads() -> None:
    gated = dataclasses.replace(ATTENTION, output_gate=OutputGate.PER_HEAD)
    halved = dataclasses.replace(gated, num_heads=2)
    teacher, student = (
        define(of_blocks(dataclasses.replace(DENSE, mixer=mixer))) for mixer in (gated, halved)
    )
    cut = student_cuts(teacher, student, chosen=(0,))["layers/0/mixer/output_gate/weight"]
    # The first query head of each key-value head.
    np.testing.assert_array_equal(cut.indices[1], [0, 2])


@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (1, 2), (2, 1)])
def test_a_narrower_student(teacher: Loaded, kv_heads: int, group: int) -> None:
    mixer = dataclasses.replace(NARROW_ATTENTION, num_heads=kv_heads * group, num_kv_heads=kv_heads)
    config = of_blocks(dataclasses.replace(NARROW, mixer=mixer), embed_dim=24)
    _, params, buffers, _ = start(teacher, config, (3,))
    theirs = layers_of(TEACHER, teacher.params, teacher.buffers)
    mine = layers_of(config, params, buffers)
    expected = {
        f"layers/0/{name}": value
        for name, value in expected_narrow(theirs, 3, kv_heads=kv_heads, group=group).items()
    }
    outside = {"embed/table", "head/weight", "final_norm/scale"}
    assert mine.keys() == expected.keys() | outside
    for name, value in expected.items():
        full = theirs[name.replace("layers/0", "layers/3")]
        # each output is the sum of fewer numbers
        scale = (full.shape[-2] / value.shape[-2]) ** 0.5 if value.ndim > 1 else 1.0
        np.testing.assert_allclose(mine[name], value * scale, rtol=1e-6, err_msg=name)
    assert (
        student_cuts(teacher.definition, define(config), chosen=(3,))["layers/0/ffn/experts/up"].scale
        == (32 / 24) ** 0.5
    )
    np.testing.assert_array_equal(mine["embed/table"][:258], theirs["embed/table"][:258, :24])
    np.testing.assert_array_equal(mine["final_norm/scale"], theirs["final_norm/scale"][:24])


def test_a_narrower_latent_attention() -> None:
    """The columns of the first projection are the latent and, after it, the key that turns."""
    mixer = LatentAttentionConfig(
        num_heads=4, latent_dim=16, plain_dim=8, rope_dim=4, value_dim=8, query_rank=12
    )
    small = dataclasses.replace(mixer, num_heads=2, latent_dim=10, query_rank=6)
    definitions = [define(of_blocks(BlockConfig(mixer=one, ffn=None))) for one in (mixer, small)]
    cuts = student_cuts(*definitions, chosen=(0,))
    rows, columns = cuts["layers/0/mixer/latent_down/weight"].indices
    assert len(rows) == 32 and columns.tolist() == [*range(10), *range(16, 20)]
    assert [len(index) for index in cuts["layers/0/mixer/latent_up/weight"].indices] == [10, 2 * (8 + 8)]
    assert [len(index) for index in cuts["layers/0/mixer/query_up/weight"].indices] == [6, 2 * (8 + 4)]
    wide = define(of_blocks(BlockConfig(mixer=dataclasses.replace(mixer, rope_dim=2), ffn=None)))
    with pytest.raises(ValueError, match=r"differ in rope_dim, which cannot be cut: 2 here and 4 there"):
        student_cuts(definitions[0], wide, chosen=(0,))


@pytest.mark.parametrize(
    ("head", "source"), [(HeadKind.UNTIED, "head/weight"), (HeadKind.TIED, "embed/table")]
)
def test_rows_of_tables(teacher: Loaded, head: HeadKind, source: str) -> None:
    """A token that the teacher has not keeps its fresh row, and so does padding."""
    config = of_blocks(DENSE, vocab_size=300, head=head)
    _, params, _, fresh = start(teacher, config, (2,), num_rows=250)
    name = source if head is HeadKind.UNTIED else "embed/table"
    np.testing.assert_array_equal(params[name][:250], teacher.params[source][:250])
    np.testing.assert_array_equal(params[name][250:], fresh.params[name][250:])


def test_a_free_head_begins_as_the_embedding_it_was_tied_to() -> None:
    tied, free = (define(of_blocks(DENSE, head=head)) for head in (HeadKind.TIED, HeadKind.UNTIED))
    assert student_cuts(tied, free, chosen=(0,))["head/weight"].source == "embed/table"
    assert student_cuts(free, free, chosen=(0,))["head/weight"].source == "head/weight"


def test_router_biases_may_be_new() -> None:
    """They are state of the balance and no parameter: a student may begin with none."""
    balanced = define(of_blocks(EXPERTS))
    unbalanced = define(
        of_blocks(dataclasses.replace(EXPERTS, ffn=dataclasses.replace(MOE, balance=Balance.AUX_LOSS)))
    )
    assert "layers/0/ffn/router_bias" not in student_cuts(unbalanced, balanced, chosen=(0,))
    with pytest.raises(
        ValueError,
        match=r"the teacher has layers/0/ffn/router_bias, without which .* no layers/0/ffn/router_bias",
    ):
        student_cuts(balanced, unbalanced, chosen=(0,))


def test_only_what_is_named_is_read(teacher: Loaded, tmp_path: Path) -> None:
    """Of a run that keeps no averages; from one that does, `test_runs` starts."""
    checkpointer = Checkpointer(tmp_path / "checkpoints", model=TEACHER, config=CheckpointConfig())
    checkpointer.save(7, {"model": {"params": teacher.params, "buffers": teacher.buffers}})
    checkpointer.close()
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    sinks = "layers/3/mixer/sinks"
    bias = "layers/1/ffn/router_bias"
    wanted = [{name: jax.ShapeDtypeStruct((4,), jnp.float32, sharding=place)} for name in (sinks, bias)]
    step, params, buffers = read_parameters(tmp_path, TEACHER, *wanted, whole=False)
    assert (step, [*params], [*buffers]) == (7, [sinks], [bias])
    np.testing.assert_array_equal(params[sinks], teacher.params["segments/0/blocks/1/mixer/sinks"][1])
    np.testing.assert_array_equal(buffers[bias], teacher.buffers["segments/0/blocks/1/ffn/router_bias"][0])
    with pytest.raises(
        ValueError,
        match=r"params/layers/0/mixer/sinks is absent in the checkpoint and float32\[4\] in the model",
    ):
        read_parameters(tmp_path, TEACHER, {"layers/0/mixer/sinks": wanted[0][sinks]}, {}, whole=False)


def test_on_a_mesh(teacher: Loaded) -> None:
    """Read and placed by 8 devices, the same numbers as by one."""
    config = of_blocks(
        dataclasses.replace(NARROW, mixer=dataclasses.replace(NARROW_ATTENTION, num_heads=2, num_kv_heads=2)),
        embed_dim=24,
    )
    alone = start(teacher, config, (1,))
    divided = start(teacher, config, (1,), data=1, fsdp=4, tensor=2)
    assert any(not leaf.sharding.is_fully_replicated for leaf in divided[1].values())
    for one, other in zip(alone[1:3], divided[1:3], strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# What is refused --------------------------------------------------------------------------------------------
def mixed(**changes: Any) -> BlockConfig:
    return dataclasses.replace(DENSE, mixer=dataclasses.replace(ATTENTION, **changes))


def fed(hidden_dim: int, **changes: Any) -> BlockConfig:
    return dataclasses.replace(DENSE, ffn=MlpConfig(hidden_dim=hidden_dim, **changes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doubled(MlpConfig):
    """A feed-forward layer of somebody's own, whose inside nobody knows."""


@pytest.mark.parametrize(
    ("block", "changes", "message"),
    [
        (
            fed(64),
            {},
            (
                r"layers/0/ffn/down/weight is \[64, 32\] in .* layers/2/ffn/down/weight of .* is \[48, 32\]: "
                r".* "
                r"cannot be wider"
            ),
        ),
        (
            DENSE,
            {"embed_dim": 40},
            r"embed/table is \[264, 40\] in the student, and embed/table of the teacher is \[264, 32\]",
        ),
        (
            mixed(num_heads=4, num_kv_heads=1),
            {},
            r"layers/0/mixer/query/weight has 4 query heads for each .* layer 2 has 2",
        ),
        (mixed(num_heads=8, num_kv_heads=4), {}, r"layers/0/mixer/.* cannot be wider"),
        (
            mixed(head_dim=4),
            {},
            (
                r"layer 0 of the student and layer 2 of the teacher.*head_dim, which cannot be cut .*: 4 "
                r"here "
                r"and 8 there"
            ),
        ),
        (
            mixed(qk_norm=QkNorm.NONE),
            {},
            r"layer 2 of the teacher, .* differ in qk_norm: none here and per_head there",
        ),
        (
            mixed(output_gate=OutputGate.PER_HEAD),
            {},
            r"layer 2 of the teacher, .* differ in output_gate: per_head here and none there",
        ),
        (mixed(biases=Biases.NONE), {}, r"the teacher has layers/2/mixer/key/bias, without which"),
        (
            mixed(sinks=True),
            {},
            r"the student has layers/0/mixer/sinks, and the teacher has no layers/2/mixer/sinks",
        ),
        (
            dataclasses.replace(DENSE, ffn=None),
            {},
            r"layer 0 of the student and layer 2 .* ffn is none here and MlpConfig there",
        ),
        (
            dataclasses.replace(DENSE, ffn=MOE),
            {},
            r"differ in kind: ffn is MoeConfig here and MlpConfig there",
        ),
        (fed(48, gated=False), {}, r"the teacher has layers/2/ffn/gate/weight, without which"),
        (
            dataclasses.replace(DENSE, norm=NormPlacement.POST),
            {},
            r"differ in the place of their norms: post here and pre there",
        ),
        (
            DENSE,
            {"norm_kind": NormKind.CENTERED_RMS},
            r"model.norm_kind is rms in the teacher, .* for centered_rms",
        ),
        (
            DENSE,
            {"learned_positions": 1024},
            r"the student has positions/weight, and the teacher has no positions/weight",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    teacher: Loaded, block: BlockConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        student_cuts(teacher.definition, define(of_blocks(block, **changes)), chosen=(2,))


def test_the_inside_of_a_part_of_ones_own_is_not_cut() -> None:
    whole, narrow = (Doubled(hidden_dim=size) for size in (48, 40))
    teacher = define(of_blocks(dataclasses.replace(DENSE, ffn=whole)))
    student_cuts(teacher, define(of_blocks(dataclasses.replace(DENSE, ffn=whole), embed_dim=24)), chosen=(0,))
    with pytest.raises(ValueError, match=r"layers/0/ffn/.*: how the inside of Doubled is cut is not known"):
        student_cuts(teacher, define(of_blocks(dataclasses.replace(DENSE, ffn=narrow))), chosen=(0,))


def test_settings_that_no_parameter_shows_are_warned_of(
    teacher: Loaded, caplog: pytest.LogCaptureFixture
) -> None:
    config = of_blocks(mixed(rope_base=5e5, num_heads=2), DENSE, logit_softcap=30.0)
    with caplog.at_level(logging.WARNING):
        student_cuts(teacher.definition, define(config), chosen=(0, 2))
    assert [record.getMessage() for record in caplog.records] == [
        "init: logit_softcap is 30.0, and was None in the teacher: its parameters were not trained for that",
        (
            "init: rope_base of layer 0 is 500000.0, and was 10000.0 in the teacher: its parameters were not "
            "trained for that"
        ),
    ]


def test_vocabularies() -> None:
    more = WORDS.add_tokens(["<|chat|>"], special=True)
    given: dict[str, Any] = {
        "num_rows": 300,
        "path": Path("runs/teacher"),
    }  # models may have more rows than their tokenizer has tokens
    size = WORDS.vocab_size
    assert [shared_rows(*pair, **given) for pair in ((WORDS, WORDS), (WORDS, more), (more, WORDS))] == [
        300,
        size,
        size,
    ]
    assert shared_rows(WORDS, more, num_rows=200, path=given["path"]) == 200
    with pytest.raises(
        ValueError,
        match=(
            r"init.path=runs/teacher was trained with another tokenizer, .*token 2 is .* there and 'a' "
            r"here"
        ),
    ):
        shared_rows(WORDS, CharTokenizer().build(["abc"]), **given)


# Runs -------------------------------------------------------------------------------------------------------
def train(experiment: slmjax.Experiment, **options: Any) -> slmjax.Result:
    return slmjax.train(experiment, console=Console(quiet=True), **options)


def losses(result: slmjax.Result) -> dict[int, float]:
    return {
        record["step"]: record["loss"]
        for record in read_log(Path(result.run_dir) / "log.jsonl", kind="train")
    }


def first_state(experiment: slmjax.Experiment) -> Any:
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        return fresh_state(set_up(experiment, tokenizer=experiment.tokenizer, mesh=mesh))


def test_runs(tmp_path: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an imported model, trained and resumed; from that run and its averages; not with another
    tokenizer.
    """
    monkeypatch.setattr(
        jax, "devices", lambda *_: jax.local_devices()[:1]
    )  # which compiles faster than for a mesh
    golden = read_golden("llama")
    shapes = {
        name: [WORDS.vocab_size if size == VOCAB_SIZE else size for size in shape]
        for name, shape in golden["shapes"].items()
    }
    write_model(tmp_path / "theirs", golden["config"] | {"vocab_size": WORDS.vocab_size}, shapes)
    WORDS.save(tmp_path / "bytes")
    import_model(tmp_path / "theirs", tmp_path / "ours", tokenizer=tmp_path / "bytes")
    imported = slmjax.load_model(tmp_path / "ours")

    tiny = one_layer(workplace, tmp_path, steps=2)
    (block,) = {*imported.config.blocks()}
    assert isinstance(block.mixer, AttentionConfig) and isinstance(block.ffn, MlpConfig)
    mixer = dataclasses.replace(block.mixer, num_heads=2, num_kv_heads=1)
    narrow = dataclasses.replace(block, mixer=mixer, ffn=dataclasses.replace(block.ffn, hidden_dim=32))
    experiment = dataclasses.replace(
        tiny,
        model=dataclasses.replace(imported.config, embed_dim=16, stack=stack_of([narrow])),
        init=FromTeacherLayers(path=str(tmp_path / "ours"), layers=(1,)),
        checkpoint=dataclasses.replace(tiny.checkpoint, every=1),
        eval=dataclasses.replace(tiny.eval, max_documents=1),
    )
    whole = train(experiment)
    first = losses(whole)
    shutil.rmtree(Path(whole.run_dir) / "checkpoints" / "2")  # as if it had been killed after its first step
    (Path(whole.run_dir) / "result.json").unlink()
    assert losses(train(experiment, resume=whole.run_dir)) == first and len(first) == 2

    state = first_state(experiment)
    np.testing.assert_array_equal(state.params["embed/table"], imported.params["embed/table"][:, :16])
    up = "segments/0/blocks/0/ffn/up/weight"
    np.testing.assert_allclose(state.ema[up], imported.params[up][1:, :16, :32] * (24 / 16) ** 0.5, rtol=1e-6)
    assert int(state.step) == 0 and not np.any(jax.tree.leaves(state.optimizer)[-1])

    run = slmjax.load_model(whole.run_dir)  # its averages
    again = dataclasses.replace(experiment, init=FromTeacherLayers(path=whole.run_dir))
    for name, value in first_state(again).params.items():
        np.testing.assert_array_equal(value, run.params[name], err_msg=name)

    count = len(list((tmp_path / "runs").iterdir()))
    with pytest.raises(ValueError, match="was trained with another tokenizer"):
        train(
            dataclasses.replace(
                experiment,
                tokenizer=CharTokenizer(),
                model=dataclasses.replace(experiment.model, vocab_size=None),
            )
        )
    assert len(list((tmp_path / "runs").iterdir())) == count, "a run that cannot begin leaves nothing"
