"""A whole run on a mesh of four axes, with accumulation, averages, dropout and experts: as on one device, and resumed to the bit."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import slmjax
from slmjax import sharding
from slmjax.runlog import read_log

MESH = sharding.MeshConfig(data=1, fsdp=2, context=2, tensor=2)


def losses(result):
    return {record["step"]: record["loss"] for record in read_log(Path(result.run_dir) / "log.jsonl", kind="train")}


@pytest.fixture(scope="module")
def experiment(workplace, tmp_path_factory):
    tiny = slmjax.load_experiment(str(workplace / "tiny.py"))
    (segment,) = tiny.model.stack
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, stack=(dataclasses.replace(segment, repeats=1),)),
        data=dataclasses.replace(tiny.data, path=str(workplace / "text.txt")),
        optim=dataclasses.replace(tiny.optim, accumulation_steps=2),
        mesh=MESH,
        checkpoint=dataclasses.replace(tiny.checkpoint, every=3),
        run=dataclasses.replace(tiny.run, steps=6, directory=str(tmp_path_factory.mktemp("mesh") / "runs"), sample_prompts=()),
    )


def test_a_run_on_four_axes_equals_one_device_and_resumes_to_the_bit(experiment, monkeypatch):
    quiet = Console(quiet=True)
    whole = slmjax.train(experiment, console=quiet)

    def stops_after_three(loop, *arguments):
        loop.setup = dataclasses.replace(loop.setup, experiment=dataclasses.replace(experiment, run=run_of_three))
        return run(loop, *arguments)

    run_of_three = dataclasses.replace(experiment.run, steps=3)
    run = slmjax.trainer.Loop.run
    with monkeypatch.context() as patched:  # a schedule of six steps, of which three are taken
        patched.setattr(slmjax.trainer.Loop, "run", stops_after_three)
        cut = slmjax.train(experiment, console=quiet)
    assert max(losses(cut)) == 3
    resumed = slmjax.train(experiment, resume=cut.run_dir, console=quiet)
    assert losses(resumed) == losses(whole)  # the same bits
    assert resumed.bits_per_byte == whole.bits_per_byte

    mesh = sharding.MeshConfig(data=1)
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    alone = slmjax.train(dataclasses.replace(experiment, mesh=mesh), console=quiet)
    np.testing.assert_allclose(list(losses(whole).values()), list(losses(alone).values()), rtol=1e-4)
