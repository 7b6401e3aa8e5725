"""What programs send, against counts by hand; and that window layers of divided sequences send their halo
alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.definition import define
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.parallel import communication
from slmjax.parallel.batches import place_batch
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.planning.traffic import collectives


def sent(fn, *arguments):
    return collectives(jax.jit(fn).lower(*arguments).compile().as_text())


def test_each_kind_by_hand():
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    x = np.ones((8, 12), np.float32)

    def on_device(x):  # [4, 3] of float32: 48 bytes
        whole = communication.gather(x, "heads", axis=1)  # [4, 12]
        parts = communication.scatter_sum(jnp.sin(whole), "heads", axis=1)
        return jnp.cos(parts), communication.sum_over(jnp.sum(x), "batch", "heads")

    with jax.set_mesh(mesh):
        run = communication.shard_mapped(
            on_device, in_dims=(("batch", "heads"),), out_dims=(("batch", "heads"), ())
        )
        found = {one.kind: one for one in sent(run, x)}
    assert (found["all-gather"].sent_bytes, found["all-gather"].group_size) == (3 * 48, 4)
    assert (found["reduce-scatter"].sent_bytes, found["reduce-scatter"].group_size) == (3 * 48, 4)
    assert (found["all-reduce"].sent_bytes, found["all-reduce"].group_size) == (2 * 4 * 7 / 8, 8)


def test_loops_count_as_often_as_they_run_and_one_device_sends_nothing():
    mesh = make_mesh(MeshConfig(data=2, context=4))

    def on_device(x):
        def body(x, _):
            return jnp.sin(
                communication.halo(x, "time", size=2, axis=1)[:, 2:]
                * communication.halo(x, "time", size=2, axis=1)[:, :-2]
            ), None

        return jax.lax.scan(body, x, length=5)[0]

    rows = ("batch", "time", None)
    with jax.set_mesh(mesh):
        (one,) = sent(
            communication.shard_mapped(on_device, in_dims=(rows,), out_dims=rows),
            np.ones((4, 16, 3), np.float32),
        )
    assert (one.kind, one.times, one.sent_bytes) == ("collective-permute", 5, 5 * 2 * 2 * 3 * 4)
    assert sent(lambda x: x @ x, np.ones((4, 4), np.float32)) == []


def test_a_loop_without_a_known_end_is_refused():
    mesh = make_mesh(MeshConfig(data=8))

    def on_device(x):
        return jax.lax.while_loop(
            lambda x: communication.sum_over(jnp.sum(x), "batch") < 100.0, lambda x: x * 2, x
        )

    with jax.set_mesh(mesh), pytest.raises(ValueError, match="how often its loop runs is not known"):
        sent(
            communication.shard_mapped(on_device, in_dims=(("batch",),), out_dims=("batch",)),
            np.ones(8, np.float32),
        )


@pytest.mark.parametrize(("window", "length", "halo"), [(9, 64, 8), (21, 64, 20), (None, 64, None)])
def test_a_window_layer_exchanges_its_halo_and_nothing_else(window, length, halo):
    """Over shards of 16 tokens: a part of the neighbour's, more than the neighbour's, and all keys where
    there is no window.
    """
    heads = 2
    head_dim = 8
    layers = 3
    attention = AttentionConfig(num_heads=4, num_kv_heads=heads, head_dim=head_dim, window=window)
    stack = (LayerGroup(pattern=(BlockConfig(mixer=attention, ffn=None),), repeats=layers),)
    definition = define(ModelConfig(embed_dim=16, vocab_size=32, stack=stack))
    mesh = make_mesh(MeshConfig(data=1, context=4), jax.devices()[:4])
    tokens = np.ones((1, length), np.int32)

    def hidden(params, tokens):
        return definition.merge(params, {})(
            tokens, segment_ids=tokens, positions=jnp.cumsum(tokens, axis=1) - 1
        ).hidden

    params = jax.device_put(
        {path: np.zeros(leaf.shape, np.float32) for path, leaf in definition.params.items()},
        jax.sharding.NamedSharding(mesh, jax.P()),
    )
    with jax.set_mesh(mesh):
        found = sent(functools.partial(hidden), params, place_batch(tokens, mesh))
    found = [one for one in found if "shard_map" in one.source]  # not of the positions made here
    in_layers = sum(one.sent_bytes for one in found if "ppermute" in one.source or "all_gather" in one.source)
    seen = 3 * length // 4 if halo is None else halo
    assert in_layers == pytest.approx(layers * seen * 2 * heads * head_dim * 4, abs=layers * seen * 4)
    assert {one.kind for one in found} == {"all-gather" if halo is None else "collective-permute"}
