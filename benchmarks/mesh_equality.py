"""Loss and gradient on meshes of 8 devices against one device: every pair of axes, several models.

    python benchmarks/mesh_equality.py                     # the table of all pairs, 5 minutes on 2 cores
    python benchmarks/mesh_equality.py --pairs fsdp,context

The dense model and the mixture have a window that is longer than a shard of the sequence, and full attention
with one key-value head, which the tensor axis does not divide; the mixture drops tokens in one of its layers.
The third model has latent attention. All have packed documents and padding. Differences are relative: of the
loss, and of each parameter's gradient by its norm, of which the largest is printed. float32.
"""

import argparse
import functools
import itertools
import os

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 "
        "--xla_backend_optimization_level=0"
    )

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.data.batch import Batch
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.definition import define
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import Balance, MoeConfig, RouterScore
from slmjax.models.mixers.attention import AttentionConfig, QkNorm
from slmjax.models.mixers.latent import LatentAttentionConfig
from slmjax.parallel.batches import place_batch
from slmjax.parallel.mesh import AXES, MeshConfig, make_mesh
from slmjax.parallel.rules import parameter_shardings
from slmjax.training.objective import ObjectiveConfig
from slmjax.training.step import count_targets, loss_terms

ROWS = 8
LENGTH = 64
VOCAB = 96
WINDOWED = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=20, qk_norm=QkNorm.PER_HEAD)
ODD = AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=6, rope_base=None, softcap=20.0)
FFNS = {
    "dense": (MlpConfig(hidden_dim=48), MlpConfig(hidden_dim=24)),
    "experts": (
        MoeConfig(num_experts=8, num_selected=2, hidden_dim=16, shared_hidden_dim=8, z_weight=0.01),
        MoeConfig(
            num_experts=4,
            num_selected=2,
            hidden_dim=16,
            capacity_factor=1.0,
            score=RouterScore.SIGMOID,
            balance=Balance.BIAS,
        ),
    ),
}
LATENT = LatentAttentionConfig(
    num_heads=4, query_rank=16, latent_dim=12, plain_dim=6, rope_dim=4, value_dim=8, bias=True
)


def model(*blocks: BlockConfig) -> ModelConfig:
    """Return a tiny model of these blocks, each twice."""
    stack = (LayerGroup(pattern=blocks, repeats=2),)
    return ModelConfig(
        embed_dim=32, vocab_size=VOCAB, vocab_multiple=8, init_std=0.2, context_length=LENGTH, stack=stack
    )


MODELS = {
    kind: model(BlockConfig(mixer=WINDOWED, ffn=ffns[0]), BlockConfig(mixer=ODD, ffn=ffns[1]))
    for kind, ffns in FFNS.items()
} | {"latent": model(BlockConfig(mixer=LATENT, ffn=FFNS["dense"][0]))}


def make_batch() -> Batch:
    """Return rows of two documents each, cut where no shard ends, and some padding."""
    draw = np.random.default_rng(0)
    place = np.arange(LENGTH)[None, :]
    cut = draw.integers(5, LENGTH - 9, (ROWS, 1))
    is_second = place >= cut
    is_padding = place >= LENGTH - 1 - np.arange(ROWS)[:, None]
    segment_ids = np.where(is_padding, 0, 1 + is_second).astype(np.int32)
    return Batch(
        tokens=draw.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
        targets=draw.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
        loss_mask=(segment_ids > 0).astype(np.float32),
        segment_ids=segment_ids,
        positions=np.where(is_second, place - cut, place).astype(np.int32),
        row_ids=np.arange(ROWS, dtype=np.int32),
        num_bytes=np.full(ROWS, LENGTH, np.int32),
    )


def loss_and_gradient(kind: str, params: dict, buffers: dict, batch: Batch) -> tuple[jax.Array, dict]:
    """Return the objective of a train step, and its gradient."""
    definition = define(MODELS[kind])
    totals = count_targets(batch, definition.config)

    def loss(params: dict) -> jax.Array:
        sums, _ = loss_terms(definition, ObjectiveConfig(z_loss=1e-3), params, buffers, batch, key=None)
        return sum((value / totals[count] for value, count in sums.values()), jnp.zeros(()))

    return jax.value_and_grad(loss)(params)


@functools.cache
def parameters(kind: str) -> tuple[dict, dict]:
    """Return parameters and buffers, larger than initialised so that every part has an influence."""
    definition = define(MODELS[kind])
    draw = np.random.default_rng(0)
    return tuple(
        {path: draw.normal(0, 0.3, leaf.shape).astype(np.float32) for path, leaf in leaves.items()}
        for leaves in (definition.params, definition.buffers)
    )  # pyright: ignore[reportReturnType]


@functools.cache
def on_one_device(kind: str) -> tuple[jax.Array, dict]:
    """Return loss and gradient on one device, with which all meshes are compared."""
    return jax.device_get(
        jax.jit(functools.partial(loss_and_gradient, kind))(*parameters(kind), make_batch())
    )


def differences(kind: str, axes: dict[str, int]) -> tuple[float, float]:
    """Return the relative differences of loss and gradient between a mesh and one device."""
    mesh = make_mesh(MeshConfig(**{"data": 1, **axes}))
    params, buffers = parameters(kind)
    shardings = parameter_shardings(params, mesh)
    with jax.set_mesh(mesh):
        program = jax.jit(functools.partial(loss_and_gradient, kind), out_shardings=(None, shardings))
        value, gradient = program(jax.device_put(params, shardings), buffers, place_batch(make_batch(), mesh))
    expected_value, expected = on_one_device(kind)
    errors = {
        path: np.linalg.norm(gradient[path] - leaf) / np.linalg.norm(leaf) for path, leaf in expected.items()
    }
    return abs(float(value) - float(expected_value)) / float(expected_value), float(max(errors.values()))


PAIRS = list(itertools.combinations(AXES, 2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs",
        nargs="*",
        default=[",".join(pair) for pair in PAIRS],
        help="two axes with a comma between them",
    )
    args = parser.parse_args()
    columns = [f"{kind}: {what}" for kind in MODELS for what in ("loss", "gradient")]
    print("| " + " | ".join(["axes", *columns]) + " |\n" + "|---" * (1 + len(columns)) + "|")
    for pair in args.pairs:
        axes = dict(zip(pair.split(","), (2, 4), strict=True))
        errors = [f"{error:.1e}" for kind in MODELS for error in differences(kind, axes)]
        print(
            "| " + " | ".join([" x ".join(f"{axis} {size}" for axis, size in axes.items()), *errors]) + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
