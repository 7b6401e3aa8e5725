"""Whole runs on meshes of three axes, with accumulation, averages, dropout and experts: as on one device, and
resumed to the bit.
"""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import slmjax
from slmjax.parallel.mesh import MeshConfig
from slmjax.telemetry.run_directory import read_log
from tests.composed import composed_model

MESHES = {
    "tiny": MeshConfig(data=1, fsdp=2, context=2, tensor=2),
    "composed": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}


def losses(result):
    return {
        record["step"]: record["loss"]
        for record in read_log(Path(result.run_dir) / "log.jsonl", kind="train")
    }


@pytest.fixture(scope="module", params=["tiny", pytest.param("composed", marks=pytest.mark.nightly)])
def experiment(request, workplace, tmp_path_factory):
    """Of the tiny experiment, one repeat, for six steps; and the model of `composed.py` in its place, for
    two.
    """
    tiny = slmjax.load_experiment(str(workplace / "tiny.py"))
    (segment,) = tiny.model.stack
    whole = request.param == "tiny"
    model = (
        dataclasses.replace(tiny.model, stack=(dataclasses.replace(segment, repeats=1),))
        if whole
        else composed_model(dropout=0.1)
    )
    steps = 6 if whole else 2
    directory = tmp_path_factory.mktemp("mesh") / "runs"
    return dataclasses.replace(
        tiny,
        model=model,
        data=dataclasses.replace(tiny.data, path=str(workplace / "text.txt")),
        optim=dataclasses.replace(tiny.optim, accumulation_steps=2, warmup_steps=min(5, steps - 1)),
        mesh=MESHES[request.param],
        checkpoint=dataclasses.replace(tiny.checkpoint, every=steps // 2),
        eval=dataclasses.replace(tiny.eval, max_documents=None if whole else 1),
        run=dataclasses.replace(tiny.run, steps=steps, directory=str(directory), sample_prompts=()),
    )


@pytest.mark.composes("mesh", "experts", "accumulation", "resume")
def test_a_run_on_a_mesh_equals_one_device_and_resumes_to_the_bit(experiment, monkeypatch):
    quiet = Console(quiet=True)
    whole = slmjax.train(experiment, console=quiet)
    expected = losses(whole)

    # As if it had been killed after the checkpoint at half of its steps.
    run_dir = Path(whole.run_dir)
    steps = experiment.run.steps
    shutil.rmtree(run_dir / "checkpoints" / str(steps))
    (run_dir / "result.json").unlink()
    resumed = slmjax.train(experiment, resume=run_dir, console=quiet)
    assert len(read_log(run_dir / "log.jsonl", kind="train")) == steps + steps // 2
    assert losses(resumed) == expected  # the same bits
    assert resumed.bits_per_byte == whole.bits_per_byte

    mesh = MeshConfig(data=1)
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    alone = slmjax.train(dataclasses.replace(experiment, mesh=mesh), console=quiet)
    np.testing.assert_allclose(list(expected.values()), list(losses(alone).values()), rtol=1e-4)
