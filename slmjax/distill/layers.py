"""Initialise a student from its teacher: from some of its layers, and the leading rows and columns of each.

    chosen = chosen_layers(num_teacher=12, num_student=6)                 # (0, 2, 4, 7, 9, 11)
    params, buffers = student_parameters(
        Path("runs/large"), definition=student, chosen=chosen, fresh=fresh, num_rows=2048, mesh=mesh
    )

`slices.py` finds the part of the teacher for each parameter; this file chooses the layers and reads them. The
rows of tables for tokens that the teacher does not have, and for padding, keep their fresh initialisation.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from slmjax.checkpoints.loading import read_config, read_parameters
from slmjax.data.tokenizers import Tokenizer
from slmjax.distill.slices import TABLES, Dim, student_cuts
from slmjax.models.definition import Definition, define, restack, stored_shapes, unstack
from slmjax.parallel.rules import partition_spec


def chosen_layers(
    *, num_teacher: int, num_student: int, layers: Sequence[int] | None = None, every: int | None = None
) -> tuple[int, ...]:
    """Return the teacher's layer for each layer of the student.

    Args:
      num_teacher: layers of the teacher, N.
      num_student: layers of the student, n.
      layers: a layer of the teacher for each of the student's, in order; repetitions are allowed.
      every: take the teacher's layers 0, `every`, 2 `every`, ... Without `layers` and `every`, they are
        spread evenly from the first to the last: layer i of n is the teacher's i (N - 1) / (n - 1), rounded,
        halves up; a student of one layer takes the first.

    Raises:
      ValueError: the number of layers is not the student's, or a layer is not the teacher's.
    """
    if layers is not None:
        chosen = tuple(layers)
        setting = f"init.layers names {len(layers)} layer(s)"
    elif every is not None:
        chosen = tuple(range(0, num_teacher, every))
        setting = f"init.every={every} gives {len(chosen)} of the teacher's {num_teacher} layers"
    else:
        # Integer arithmetic: rounding halves up does not depend on floating point.
        steps = max(1, num_student - 1)
        return tuple((2 * i * (num_teacher - 1) + steps) // (2 * steps) for i in range(num_student))
    if len(chosen) != num_student:
        raise ValueError(
            f"{setting}, and the student has {num_student}: name one for each of these in init.layers, give "
            f"the student {len(chosen)}, or leave out both init.layers and init.every for layers that are "
            "spread evenly"
        )
    if outside := [layer for layer in chosen if not 0 <= layer < num_teacher]:
        raise ValueError(
            f"init.layers names layer {outside[0]}, and the teacher's are 0 to {num_teacher - 1}: choose "
            "among these"
        )
    return chosen


def shared_rows(teacher: Tokenizer, student: Tokenizer, *, num_rows: int, path: Path) -> int:
    """Return the number of leading rows of a table that stand for the same tokens in both models.

    These are the rows of all tokens of the smaller vocabulary. If both vocabularies are equal, they are all
    `num_rows` rows that both models have: a model may have rows without a token, which take part in its
    softmax all the same.

    Args:
      teacher: tokenizer of the teacher.
      student: tokenizer of the student.
      num_rows: rows that both tables have.
      path: directory of the teacher, for the message.

    Raises:
      ValueError: an id stands for different tokens in the two.
    """
    sizes = (teacher.vocab_size, student.vocab_size)
    # A difference beyond the smaller vocabulary is only a token that one of them lacks.
    if (id := teacher.differs_at(student)) is not None and id < min(sizes):
        raise ValueError(
            f"init.path={path} was trained with another tokenizer, so its parameters mean nothing here: "
            f"token {id} is {teacher.name_of(id)!r} there and {student.name_of(id)!r} here. Set the "
            f"experiment's tokenizer to FileTokenizer(path='{path / 'tokenizer'}')"
        )
    return num_rows if sizes[0] == sizes[1] else min(*sizes, num_rows)


def student_parameters(
    path: Path,
    *,
    definition: Definition,
    chosen: Sequence[int],
    fresh: tuple[dict[str, Any], dict[str, Any]],
    num_rows: int,
    mesh: Mesh,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return parameters and buffers of a student, cut out of those of a run or an imported model.

    They have the paths and shardings of `fresh`. Of a run with moving averages, the averages are used. Only
    the chosen layers of the teacher are read, sharded over the mesh by the rules, and freed on return.

    Args:
      path: directory of the teacher.
      definition: definition of the student.
      chosen: the teacher's layer for each of the student's.
      fresh: the student's initial parameters and buffers: those without a counterpart in the teacher stay.
      num_rows: rows of the tables to take (`shared_rows`); the others keep their initial values.
      mesh: mesh of the student.

    Raises:
      ValueError: the two do not fit (`slices.student_cuts`), or the directory holds no intact model.
    """
    teacher = define(read_config(path))
    # Without quantizer parameters, which are initialised when their phase starts.
    plain = define(definition.config)
    cuts = student_cuts(teacher, plain, chosen=chosen)
    # A parameter of the teacher may serve several of the student's: it is read once.
    needed = {cut.source for cut in cuts.values()}

    def needed_shapes(tree: dict[str, Any]) -> dict[str, Any]:
        shapes = stored_shapes(teacher.config, tree)
        shardings = {
            name: NamedSharding(mesh, partition_spec(name, shapes[name].shape, mesh))
            for name in sorted(needed & shapes.keys())
        }
        return {
            name: jax.ShapeDtypeStruct(shapes[name].shape, shapes[name].dtype, sharding=sharding)
            for name, sharding in shardings.items()
        }

    _, params, buffers = read_parameters(
        path, teacher.config, needed_shapes(teacher.params), needed_shapes(teacher.buffers), whole=False
    )

    def build(
        of_teacher: dict[str, Any], fresh: tuple[dict[str, Any], dict[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        flat = unstack(definition.config, {**fresh[0], **fresh[1]})
        for name, cut in cuts.items():
            value = _take(of_teacher[cut.source], cut.indices) * cut.scale
            if name in TABLES:
                value = flat[name].at[:num_rows].set(value[:num_rows])
            flat[name] = value
        return tuple(restack(definition.config, flat, like=tree) for tree in fresh)

    # One compiled program, so that a full-size copy of a sharded parameter is on no device.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, fresh)
    return jax.jit(build, out_shardings=shardings)(params | buffers, fresh)


def _take(array: Array, indices: tuple[Dim, ...]) -> Array:
    for axis, index in enumerate(indices):
        # Indices ascend, so the last one tells a leading slice, which needs no gather.
        if index[-1] == len(index) - 1:
            array = jax.lax.slice_in_dim(array, 0, len(index), axis=axis)
        else:
            array = array.take(index, axis=axis)
    return array
