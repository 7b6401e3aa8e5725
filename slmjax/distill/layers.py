"""A student that begins as a part of its teacher: some of its layers, and of each the leading rows and
columns.

    chosen = chosen_layers(num_teacher=12, num_student=6)                 # (0, 2, 4, 7, 9, 11)
    params, buffers = student_parameters(Path("runs/large"), definition=student, chosen=chosen, fresh=fresh,
    num_rows=2048, mesh=mesh)

Which part each parameter is, `slices.py` tells; here the layers are chosen and read. A row of a table whose
token the teacher has not, and one that only pads the table, is freshly initialised.
"""

import dataclasses
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

Params = dict[str, Any]  # arrays by path


def chosen_layers(
    *, num_teacher: int, num_student: int, layers: Sequence[int] | None = None, every: int | None = None
) -> tuple[int, ...]:
    """The teacher's layer that each layer of the student begins as.

    Args:
      layers: one for each layer of the student, in its order; one may come several times.
      every: the teacher's layers 0, `every`, 2 `every`, ... With neither, they are spread evenly from the
        first to the last: layer i of n is the teacher's i (N - 1) / (n - 1), rounded, halves up; a student of
        one layer takes the first.

    Raises:
      ValueError: these are not as many as the student has, or not layers of the teacher.
    """
    if layers is not None:
        chosen = tuple(layers)
        asked = f"init.layers names {len(layers)} layer(s)"
    elif every is not None:
        chosen = tuple(range(0, num_teacher, every))
        asked = f"init.every={every} gives {len(chosen)} of the teacher's {num_teacher} layers"
    else:
        steps = max(1, num_student - 1)
        return tuple((2 * i * (num_teacher - 1) + steps) // (2 * steps) for i in range(num_student))
    if len(chosen) != num_student:
        raise ValueError(
            f"{asked}, and the student has {num_student}: name one for each of these in init.layers, give "
            f"the student {len(chosen)}, or "
            "leave out both init.layers and init.every for layers that are spread evenly"
        )
    if outside := [layer for layer in chosen if not 0 <= layer < num_teacher]:
        raise ValueError(
            f"init.layers names layer {outside[0]}, and the teacher's are 0 to {num_teacher - 1}: choose "
            "among these"
        )
    return chosen


def shared_rows(teacher: Tokenizer, student: Tokenizer, *, num_rows: int, path: Path) -> int:
    """How many rows of a table, from the first, mean the same to both vocabularies.

    Those are the rows of all tokens of the smaller one. Where neither has a token that the other has not,
    they are all `num_rows` that both
    models have: a model may have rows without a token, which take part in its softmax all the same.

    Args:
      path: of the teacher, for the message.

    Raises:
      ValueError: an id stands for different tokens in the two.
    """
    sizes = teacher.vocab_size, student.vocab_size
    if (id := teacher.differs_at(student)) is not None and id < min(sizes):
        raise ValueError(
            f"init.path={path} was trained with another tokenizer, so its parameters mean nothing here: "
            f"token {id} is "
            f"{teacher.name_of(id)!r} there and {student.name_of(id)!r} here. Give the experiment "
            f"FileTokenizer(path='{path / 'tokenizer'}')"
        )
    return num_rows if sizes[0] == sizes[1] else min(*sizes, num_rows)


def student_parameters(
    path: Path,
    *,
    definition: Definition,
    chosen: Sequence[int],
    fresh: tuple[Params, Params],
    num_rows: int,
    mesh: Mesh,
) -> tuple[Params, Params]:
    """Parameters and buffers of a student, by stack path and placed as `fresh`, cut out of those of a run or
    an imported model.

    They are a run's averages where it kept averages. Of the teacher only the layers that are chosen are read,
    divided over the mesh by the rules; they are gone when this returns.

    Args:
      definition: of the student.
      chosen: the teacher's layer for each of the student's.
      fresh: the student's parameters and buffers as they were initialised: what the teacher has no
        counterpart of stays so.
      num_rows: of the tables, that are taken (`shared_rows`); others stay fresh.

    Raises:
      ValueError: the two do not fit (`slices.student_cuts`), or the directory holds no intact model.
    """
    teacher = define(dataclasses.replace(read_config(path), quant=()))
    # What is learned beside weights of some format begins with its phase.
    plain = define(dataclasses.replace(definition.config, quant=()))
    cuts = student_cuts(teacher, plain, chosen=chosen)
    needed = {cut.source for cut in cuts.values()}

    def placed(tree: Params) -> Params:
        shapes = stored_shapes(teacher.config, tree)
        places = {
            name: NamedSharding(mesh, partition_spec(name, shapes[name].shape, mesh))
            for name in sorted(needed & shapes.keys())
        }
        return {
            name: jax.ShapeDtypeStruct(shapes[name].shape, shapes[name].dtype, sharding=place)
            for name, place in places.items()
        }

    _, params, buffers = read_parameters(
        path, teacher.config, placed(teacher.params), placed(teacher.buffers), whole=False
    )

    def build(taken: Params, fresh: tuple[Params, Params]) -> tuple[Params, Params]:
        flat = unstack(definition.config, {**fresh[0], **fresh[1]})
        for name, cut in cuts.items():
            value = _take(taken[cut.source], cut.kept) * cut.scale
            flat[name] = flat[name].at[:num_rows].set(value[:num_rows]) if name in TABLES else value
        return tuple(restack(definition.config, flat, like=tree) for tree in fresh)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, fresh)
    return jax.jit(build, out_shardings=shardings)(params | buffers, fresh)


def _take(array: Array, kept: tuple[Dim, ...]) -> Array:
    for axis, index in enumerate(kept):
        is_leading = index[-1] == len(index) - 1  # indices ascend
        array = (
            jax.lax.slice_in_dim(array, 0, len(index), axis=axis)
            if is_leading
            else array.take(index, axis=axis)
        )
    return array
