"""Loss and gradient of complete models on eight devices against one, and what each axis shards."""

import pytest

from benchmarks import mesh_equality
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.parallel.rules import parameter_shardings

MIXED = {"fsdp": 2, "expert": 2, "tensor": 2}
CONTEXT = {"context": 4, "tensor": 2}
EXPERTS = {"expert": 4, "context": 2}
MIXED_CONTEXT = {"context": 2, "expert": 2, "tensor": 2}
LATENT = {"fsdp": 2, "context": 2, "tensor": 2}


def assert_equal_to_one_device(kind, axes):
    # float32 sums in another order; a wrong mask, halo or capacity shows as 1e-2 or more.
    loss, gradient = mesh_equality.differences(kind, axes)
    assert loss < 1e-6 and gradient < 1e-5, (kind, axes)


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        ("experts", MIXED_CONTEXT),
        ("dense", CONTEXT),
        ("latent", LATENT),
        pytest.param("experts", MIXED, marks=pytest.mark.nightly),
        pytest.param("experts", EXPERTS, marks=pytest.mark.nightly),
    ],
)
def test_a_mesh_of_several_axes_equals_one_device(kind, axes):
    assert_equal_to_one_device(kind, axes)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", list(mesh_equality.MODELS))
@pytest.mark.parametrize("pair", mesh_equality.PAIRS, ids=" x ".join)
def test_every_pair_of_axes_equals_one_device(kind, pair):
    assert_equal_to_one_device(kind, dict(zip(pair, (4, 2), strict=True)))


@pytest.mark.nightly
@pytest.mark.parametrize("kind", list(mesh_equality.MODELS))
def test_four_axes_at_once_equal_one_device(kind):
    assert_equal_to_one_device(kind, {"fsdp": 2, "context": 2, "tensor": 2})


def test_each_axis_shards_what_it_should():
    params, _ = mesh_equality.parameters("experts")
    mesh = make_mesh(MeshConfig(data=1, **MIXED))
    shapes = {
        path: leaf.shard_shape(params[path].shape) for path, leaf in parameter_shardings(params, mesh).items()
    }
    assert shapes["embed/table"] == (96 // 4, 32)
    assert shapes["segments/0/blocks/0/mixer/query/weight"] == (2, 32 // 2, 32 // 2)
    assert shapes["segments/0/blocks/0/ffn/experts/up"] == (2, 8 // 2, 32 // 2, 16 // 2)
    assert shapes["segments/0/blocks/0/ffn/experts/down"] == (2, 8 // 2, 16 // 4, 32)
    assert shapes["final_norm/scale"] == (32,)


def test_latent_attention_is_sharded_by_heads_with_replicated_latents():
    params, _ = mesh_equality.parameters("latent")
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    shapes = {
        path: leaf.shard_shape(params[path].shape) for path, leaf in parameter_shardings(params, mesh).items()
    }
    mixer = {
        path.removeprefix("segments/0/blocks/0/mixer/"): shape[1:]
        for path, shape in shapes.items()
        if "/mixer/" in path
    }
    assert mixer["query_down/weight"] == (32 // 4, 16) and mixer["query_up/weight"] == (16 // 4, 40 // 2)
    assert mixer["latent_down/weight"] == (32 // 4, 16) and mixer["latent_up/weight"] == (12 // 4, 56 // 2)
    assert mixer["output/weight"] == (32 // 8, 32) and mixer["latent_down/bias"] == (16,)
