"""Joining processes, the sequences each of them reads, and the checksum that shows they saw the same data."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from slmjax.models import zoo
from slmjax.parallel import batches, hosts
from slmjax.parallel.batches import _sequences_of, local_sequences, place_batch
from slmjax.parallel.hosts import Join, Meeting, how_to_join
from slmjax.parallel.mesh import AXES, LOGICAL_DIMS, MeshConfig, make_mesh
from slmjax.runner import launch
from slmjax.runner.setup import Setup
from slmjax.training.metrics import data_checksum, named_metrics

THREE = {"COORDINATOR": "node0:4321", "RANK": "1", "WORLD": "2"}
TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[0-1]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
}


# How to join ------------------------------------------------------------------------------------------------
def variables(**changes) -> Join:
    return Join(
        meeting=Meeting.VARIABLES,
        **{"seconds": 300, "coordinator": "node0:4321", "process_index": 1, "process_count": 2} | changes,
    )


@pytest.mark.parametrize(
    ("environ", "has_tpu", "expected"),
    [
        ({}, False, None),
        (THREE, False, variables()),
        (THREE | {"LOCAL_RANK": "3"}, False, variables(local_device=3)),
        (
            THREE | {"COORDINATOR": "[fd00::1]:80", "SLMJAX_JOIN_SECONDS": "20"},
            True,
            variables(coordinator="[fd00::1]:80", seconds=20),
        ),
        (THREE | {"RANK": "0", "WORLD": "1"}, False, variables(process_index=0, process_count=1)),
        (THREE | TASK, False, variables()),  # the user's variables go first
        (THREE | {"SLMJAX_DISTRIBUTED": "auto"}, False, variables()),
        (THREE | TASK | {"SLMJAX_DISTRIBUTED": "off"}, True, None),
        # What torchrun and others leave behind.
        ({"RANK": "1", "WORLD": "2"}, False, None),
        ({"RANK": "nonsense", "WORLD_SIZE": "2", "COORDINATOR": ""}, False, None),
        (TASK, False, Join(meeting=Meeting.SLURM, seconds=300)),
        (TASK, True, Join(meeting=Meeting.SLURM, seconds=300)),
        (TASK | {"SLURM_STEP_NUM_TASKS": "1"}, False, None),  # srun --pty bash
        # The script of sbatch.
        ({name: value for name, value in TASK.items() if "STEP" not in name}, False, None),
        ({}, True, Join(meeting=Meeting.TPU, seconds=300)),
        (
            {"JAX_PLATFORMS": "tpu,cpu", "SLMJAX_JOIN_SECONDS": "60"},
            True,
            Join(meeting=Meeting.TPU, seconds=60),
        ),
        ({"JAX_PLATFORMS": "cpu"}, True, None),
    ],
)
def test_how_to_join_follows_the_environment(
    environ: dict[str, str], has_tpu: bool, expected: Join | None
) -> None:
    assert how_to_join(environ, has_tpu=has_tpu) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": ""}, "COORDINATOR=node0:4321 is set, but RANK not: set all three"),
        ({"RANK": "", "WORLD": ""}, "but RANK and WORLD not"),
        ({"RANK": "one"}, "RANK=one must be a whole number, at least 0"),
        ({"RANK": "-1"}, "RANK=-1 must be a whole number, at least 0"),
        ({"WORLD": "0"}, "WORLD=0 must be a whole number, at least 1"),
        ({"WORLD": "2.0"}, "WORLD=2.0 must be"),
        ({"RANK": "2"}, "RANK=2 is not one of the WORLD=2 processes: they are numbered from 0 to 1"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x must be"),
        ({"COORDINATOR": "node0"}, "COORDINATOR=node0 must be HOST:PORT"),
        ({"COORDINATOR": ":4321"}, "COORDINATOR=:4321 must be HOST:PORT"),
        ({"COORDINATOR": "node0:port"}, "must be HOST:PORT"),
        ({"COORDINATOR": "node0:70000"}, "must be HOST:PORT"),
        ({"SLMJAX_DISTRIBUTED": "on"}, "SLMJAX_DISTRIBUTED=on is not known"),
        ({"SLMJAX_JOIN_SECONDS": "0"}, "SLMJAX_JOIN_SECONDS=0 must be a whole number, at least 1"),
    ],
)
def test_invalid_variables_are_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        how_to_join(THREE | changes)


@pytest.mark.parametrize(
    ("coordinator", "names", "expected"),
    [
        ("127.0.0.1:4321", {}, "127.0.0.1:4321"),
        ("[::1]:4321", {}, "[::1]:4321"),
        ("localhost:4321", {"localhost": ["127.0.0.1"]}, "127.0.0.1:4321"),
        # A name that the host itself takes for its loopback, one of another machine, an unknown one.
        ("node0:4321", {"node0": ["127.0.1.1"]}, None),
        ("service:4321", {"service": ["192.0.2.7"]}, None),
        ("nowhere:4321", {"nowhere": []}, None),
    ],
)
def test_the_coordinator_listens_where_it_is_told(
    coordinator: str,
    names: dict[str, list[str]],
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(hosts, "_addresses", lambda host: names.get(host, [host]))
    monkeypatch.setattr(hosts, "_is_own", lambda address: address.startswith("127.") or address == "::1")
    assert hosts.bind_address(coordinator) == expected
    assert ("JAX_COORDINATOR_BIND_ADDRESS=ADDRESS:4321" in caplog.text) is (expected is None)


def test_addresses_are_those_of_this_host() -> None:
    assert hosts._addresses("127.0.0.1") == ["127.0.0.1"] and hosts._addresses("a.invalid") == []
    assert hosts._is_own("127.0.0.1") and not hosts._is_own("192.0.2.7")  # reserved for documentation


def test_slurm_without_the_addresses_of_the_others_is_refused() -> None:
    with pytest.raises(ValueError, match="one of 4 tasks of srun, but SLURM_STEP_NODELIST, which is needed"):
        how_to_join({name: value for name, value in TASK.items() if name != "SLURM_STEP_NODELIST"})


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (
            THREE | {"LOCAL_RANK": "1"},
            {
                "coordinator_address": "node0:4321",
                "num_processes": 2,
                "process_id": 1,
                "local_device_ids": 1,
                "cluster_detection_method": "deactivate",
                "initialization_timeout": 330,
            },
        ),
        (TASK, {"cluster_detection_method": "slurm", "initialization_timeout": 330}),
    ],
)
def test_arguments_of_jax_distributed_initialize(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], expected: dict[str, object]
) -> None:
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(hosts, "joined", None)
    assert hosts.join(environ) == hosts.joined == how_to_join(environ)
    assert calls == [expected]
    assert hosts.join({}) is None and len(calls) == 1


def test_a_failure_of_jax_is_reported_with_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise RuntimeError("UNKNOWN: Failed to start RPC server\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(
        ValueError,
        match=r"1 of 2 did not meet .*COORDINATOR=node0:4321 \(UNKNOWN: Failed to start RPC server\)\. Chec",
    ):
        hosts.join(THREE)
    with pytest.raises(ValueError, match="not found through Slurm .*SLMJAX_DISTRIBUTED=off"):
        hosts.join(TASK)


def test_a_coordinator_that_does_not_answer(user_environment: dict[str, str]) -> None:
    """On a port that no program may listen on by chance: the lowest."""
    environment = user_environment | {
        "COORDINATOR": "127.0.0.1:1",
        "RANK": "1",
        "WORLD": "2",
        "SLMJAX_JOIN_SECONDS": "1",
    }
    command = [sys.executable, "-m", "slmjax", "train", "nano"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: process 1 of 2 did not meet the others at COORDINATOR=127.0.0.1:1 ("
    ), done.stderr
    assert "refused" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_run_directory_that_this_host_does_not_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(launch, "broadcast_text", lambda _: str(tmp_path / "elsewhere"))
    with pytest.raises(
        ValueError, match=r"process 1 does not see .*elsewhere, which process 0 made: set --run\.directory"
    ):
        launch.new_run(Setup.__new__(Setup), None)
    monkeypatch.setattr(launch, "broadcast_text", lambda _: "")
    with pytest.raises(ValueError, match="process 0 could not make the run directory: its error says why"):
        launch.new_run(Setup.__new__(Setup), None)


# Sequences --------------------------------------------------------------------------------------------------
def fake_mesh(order: list[int], processes_of: int, **sizes: int) -> SimpleNamespace:
    """A mesh of devices in this order, `processes_of` of them to a process."""
    shape = [sizes.get(axis, 1) for axis in AXES]
    devices = np.array(
        [SimpleNamespace(process_index=number // processes_of) for number in order], dtype=object
    ).reshape(shape)
    return SimpleNamespace(devices=devices, axis_names=AXES)


@pytest.mark.parametrize(
    ("sizes", "order", "per_process", "expected"),
    [
        ({"data": 4}, range(4), 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ({"data": 2, "fsdp": 2, "tensor": 2}, range(8), 2, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        # The tensor axis spans processes.
        (
            {"data": 2, "tensor": 2},
            range(4),
            1,
            [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]],
        ),
        (
            {"expert": 2, "context": 2, "tensor": 2},
            range(8),
            2,
            [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]],
        ),
        ({"context": 4}, range(4), 2, [[*range(8)], [*range(8)]]),
        # Devices in another order than processes.
        ({"data": 4}, [0, 2, 1, 3], 2, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        # A batch that does not divide is replicated.
        ({"data": 3}, range(3), 1, [[*range(8)]] * 3),
    ],
)
def test_each_process_reads_the_sequences_that_its_devices_hold(
    monkeypatch, sizes, order, per_process, expected
) -> None:
    mesh = fake_mesh(list(order), per_process, **sizes)
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    read = [_sequences_of(process, owners, mesh.axis_names, 8).tolist() for process in range(len(expected))]
    assert read == expected


def test_sequences_are_those_that_jax_gives_each_device() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    sharding = NamedSharding(mesh, PartitionSpec(LOGICAL_DIMS["batch"]))
    owners = np.vectorize(lambda device: device.id)(mesh.devices)  # as if each device were a process
    for device, (rows,) in sharding.devices_indices_map((12,)).items():
        assert _sequences_of(device.id, owners, mesh.axis_names, 12).tolist() == list(range(12))[rows]
    assert local_sequences(mesh, 12).tolist() == list(range(12))


@pytest.mark.parametrize("local_shards", [(0, 1, 2, 3), (1, 3), (2,)])
def test_shards_are_cut_out_of_the_local_sequences(
    monkeypatch: pytest.MonkeyPatch, local_shards: tuple[int, ...]
) -> None:
    """A process holds some shards of the batch: sequences of the global batch, cut by the context axis."""
    mesh = make_mesh(MeshConfig(data=4, context=2))
    rows = np.concatenate([np.arange(8).reshape(4, 2)[shard] for shard in local_shards])
    global_batch = {
        "tokens": np.arange(8 * 6, dtype=np.int32).reshape(8, 6),
        "row_ids": np.arange(8, dtype=np.int32),
    }
    shards: dict[tuple[int, ...], list[np.ndarray]] = {}

    def local_only(shape, sharding, shard) -> jax.Array:
        indices = [
            index
            for index in sharding.devices_indices_map(shape).values()
            if (index[0].start or 0) // 2 in local_shards
        ]
        shards[shape] = [shard(index) for index in indices]
        expected = global_batch["tokens" if len(shape) == 2 else "row_ids"]
        for part, index in zip(shards[shape], indices, strict=True):
            np.testing.assert_array_equal(part, expected[index])
        return jnp.zeros(())

    monkeypatch.setattr(batches, "local_sequences", lambda _, batch_size: rows)
    monkeypatch.setattr(jax, "make_array_from_callback", local_only)
    place_batch({name: array[rows] for name, array in global_batch.items()}, mesh, batch_size=8)
    assert [part.shape for part in shards[8, 6]] == [(2, 3)] * (2 * len(local_shards))
    assert len(shards[(8,)]) == 2 * len(local_shards)
    with pytest.raises(AssertionError, match="got 3 sequences, but this process holds"):
        place_batch(np.zeros(3, np.int32), mesh, batch_size=8)


# The checksum -----------------------------------------------------------------------------------------------
def checksum_of(row_ids: np.ndarray) -> int:
    """The same, in Python's integers."""
    total = 0
    for place, row in enumerate(row_ids.tolist()):
        bits = (row * 0x9E3779B1 + place * 0x85EBCA77) % 2**32
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = (bits ^ (bits >> shift)) * factor % 2**32
        total += bits ^ (bits >> 16)
    return total % 2**32


def test_the_checksum_is_exact_on_any_mesh_and_depends_on_the_order() -> None:
    row_ids = np.random.default_rng(0).permutation(100_000)[:16].astype(np.int32)
    row_ids[5] = -1  # padding
    expected = checksum_of(row_ids)
    for sizes in ({"data": 8}, {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}, {"data": 1, "context": 8}):
        mesh = make_mesh(MeshConfig(**sizes))
        with jax.set_mesh(mesh):
            assert int(jax.jit(data_checksum)(place_batch(row_ids, mesh))) == expected
    others = [
        np.roll(row_ids, 1),
        np.sort(row_ids),
        row_ids[:-1],
        row_ids + 1,
        np.where(np.arange(16) == 3, 7, row_ids),
    ]
    assert len({expected, *(int(data_checksum(jnp.asarray(other))) for other in others)}) == 6


def test_the_checksum_is_written_as_the_integer_it_is() -> None:
    metrics = {
        "data_checksum": np.uint32(4_000_000_001),
        "loss": np.float32(1.5),
        "grad_norms": np.ones(6, np.float32),
    }
    named = named_metrics(zoo.nano(), metrics)
    assert named["data_checksum"] == 4_000_000_001 and isinstance(named["data_checksum"], int)
    assert isinstance(named["loss"], float)
