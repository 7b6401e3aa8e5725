"""Bytes that a train step sends between TPUs, by compilation alone: no TPU is needed, only the extra `plan`.

    # SmolLM2-1.7B's shape on 8, 32, 128, 256 TPU v5e: about 10 minutes
    python benchmarks/collective_bytes.py weak-scaling
    # windows at 32k tokens over 4 devices: the halo, and no more
    python benchmarks/collective_bytes.py halo

Weak scaling has the same number of sequences on each device. Megabytes are those that a device sends in a
step, with collectives that go round a ring (`slmjax/planning/traffic.py`). The last column is the need of the
algorithm: under fsdp every matrix is gathered in the forward pass and again in the backward pass, which
recomputes activations, and its gradient is reduced; tensor parallelism adds activations, which do not depend
on the number of devices.
"""

import argparse
import collections
import dataclasses
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
from slmjax.startup import compile_for_tpu  # noqa: E402

compile_for_tpu()

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

from slmjax.data.batch import empty_batch  # noqa: E402
from slmjax.models import zoo  # noqa: E402
from slmjax.models.architecture import LayerGroup, ModelConfig, Precision, Remat  # noqa: E402
from slmjax.models.definition import define  # noqa: E402
from slmjax.models.protocols import MixerConfig  # noqa: E402
from slmjax.parallel.batches import batch_shapes  # noqa: E402
from slmjax.parallel.mesh import MeshConfig, make_mesh  # noqa: E402
from slmjax.planning.traffic import PLAIN, Collective, collectives  # noqa: E402
from slmjax.training import step  # noqa: E402
from slmjax.training.objective import ObjectiveConfig  # noqa: E402
from slmjax.training.optim import OptimConfig, make_optimizer  # noqa: E402
from slmjax.training.state import state_shapes  # noqa: E402

TOPOLOGIES = {4: "v5e:2x2", 8: "v5e:2x4", 32: "v5e:4x8", 128: "v5e:8x16", 256: "v5e:16x16"}
STEPS = 1000


def tpu_mesh(num_devices: int, **axes: int) -> Mesh:
    """Return a mesh of TPUs, which need not be attached."""
    devices = topologies.get_topology_desc(TOPOLOGIES[num_devices], "tpu").devices
    return make_mesh(MeshConfig(**{"data": 1, **axes}), devices)


def sent_by_step(model: ModelConfig, mesh: Mesh, *, rows: int, length: int) -> list[Collective]:
    """Return the collectives of a compiled train step of AdamW."""
    definition = define(model)
    optim = OptimConfig()
    optimizer = make_optimizer(optim, definition.params, total_steps=STEPS)
    shapes = state_shapes(definition, optimizer, with_ema=False, mesh=mesh)
    train_step = step.make_train_step(
        definition, optimizer, objective=ObjectiveConfig(), optim=optim, shapes=shapes, total_steps=STEPS
    )

    with jax.set_mesh(mesh):
        lowered = train_step.lower(shapes, batch_shapes(empty_batch(rows, length), mesh))  # pyright: ignore[reportFunctionMemberAccess]
    return collectives(lowered.compile(compiler_options=PLAIN).as_text())


def weak_scaling(sizes: list[int], families: list[dict[str, int]]) -> None:
    model = dataclasses.replace(zoo.smollm2_1_7b(), precision=Precision.BFLOAT16, remat=Remat.FULL)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(define(model).params))
    # The table is tied: it is looked up, with a float32 gradient, and it is the head.
    table = model.table_rows * model.embed_dim
    sequences_each = 2
    length = 2048
    print(
        (
            "| mesh | devices | all-gather | reduce-scatter | all-reduce | permute | in all, MB | the "
            "algorithm's, MB |\n"
        )
        + "|---" * 8
        + "|"
    )
    for axes in families:
        for num_devices in sizes:
            mesh = tpu_mesh(num_devices, **axes)
            sent = collections.Counter[str]()
            for collective in sent_by_step(model, mesh, rows=sequences_each * num_devices, length=length):
                sent[collective.kind] += collective.sent_bytes
            data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
            # In bfloat16: gathered twice, reduced once.
            matrices = (6 * (parameters - table) + 10 * table) / tensor * (fsdp - 1) / fsdp
            matrices += 2 * (2 * parameters + 4 * table) / tensor / fsdp * (data - 1) / data
            activations = (
                6
                * 2
                * sequences_each
                * tensor
                * length
                * model.embed_dim
                * model.num_layers
                * 2
                * (tensor - 1)
                / tensor
            )
            needed = matrices + (activations if tensor > 1 else 0)
            kinds = [
                sent["all-gather"],
                sent["reduce-scatter"],
                sent["all-reduce"],
                sent["collective-permute"],
                sent.total(),
                needed,
            ]
            name = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
            print(
                f"| {name} | {num_devices} | " + " | ".join(f"{size / 1e6:.0f}" for size in kinds) + " |",
                flush=True,
            )


def halo(window: int, length: int) -> None:
    base = dataclasses.replace(zoo.smollm2_135m(), precision=Precision.BFLOAT16, context_length=length)
    mesh = tpu_mesh(4, context=4)
    (segment,) = base.stack
    (block,) = segment.pattern
    mixer: MixerConfig = dataclasses.replace(block.mixer, window=window)  # pyright: ignore[reportCallIssue]
    model = dataclasses.replace(
        base,
        remat=Remat.FULL,
        stack=(LayerGroup(pattern=(dataclasses.replace(block, mixer=mixer),), repeats=segment.repeats),),
    )
    permutes = [
        collective
        for collective in sent_by_step(model, mesh, rows=1, length=length)
        if collective.kind == "collective-permute"
    ]
    kv_bytes = 2 * (window - 1) * 3 * 64 * 2  # keys and values of 3 heads of 64, bfloat16
    id_bytes = (window - 1) * 4
    forward = [collective for collective in permutes if "transpose(" not in collective.source]
    per_layer = [
        sum(collective.sent_bytes for collective in group) / model.num_layers for group in (forward, permutes)
    ]
    print(
        f"{length} tokens over context 4, window {window}, {model.num_layers} layers; bytes per layer and "
        "device:"
    )
    print(
        f"  forward: {per_layer[0]:,.0f}; the halo is {kv_bytes:,} and, once for all layers, {id_bytes:,} of "
        "segment ids"
    )
    print(f"  forward and backward, with recomputed activations: {per_layer[1]:,.0f}")
    print(f"  the keys and values of all other devices would be {3 * 2 * (length // 4) * 3 * 64 * 2:,}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("weak-scaling", "halo"))
    parser.add_argument("--devices", type=int, nargs="*", default=[8, 32, 128, 256])
    parser.add_argument(
        "--families", type=int, nargs="*", default=[0, 1], help="0 fsdp, 1 fsdp x tensor 4, 2 data x fsdp 32"
    )
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--length", type=int, default=32_768)
    args = parser.parse_args()
    families = [{"fsdp": -1}, {"fsdp": -1, "tensor": 4}, {"data": -1, "fsdp": 32}]
    if args.what == "halo":
        halo(args.window, args.length)
    else:
        weak_scaling(args.devices, [families[index] for index in args.families])


if __name__ == "__main__":
    main()
