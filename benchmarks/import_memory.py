"""Peak memory of importing a model in several files, and of reading it into the shards of a mesh.

    python benchmarks/import_memory.py

A model of SmolLM2-360M's shape is written as a Hugging Face directory in bfloat16, in files of a fixed size.
Each measurement runs in a process of its own and counts memory above that of the process with everything
imported. Devices are simulated, so their arrays are in the same memory and are subtracted: the rest is the
need of a host with accelerators.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

MB = 1e6


def write_model(directory: Path, *, largest_file: int) -> None:
    """Write a Hugging Face directory with random weights, tensor by tensor."""
    import jax.numpy as jnp

    from slmjax.checkpoints import safetensors_files
    from slmjax.convert.families import llama
    from slmjax.convert.family import bind, foreign_tensors, logical_shapes
    from slmjax.models import zoo
    from slmjax.models.canonical_form import canonical

    model = canonical(zoo.ARCHITECTURES["smollm2_360m"]())
    shapes = logical_shapes(model)
    draws = np.random.default_rng(0)

    def read(name: str) -> np.ndarray:
        return (0.02 * draws.standard_normal(shapes[name], np.float32)).astype(jnp.bfloat16)

    bound = bind(llama.HF.table_of(model), model)
    safetensors_files.write_tensors(directory, foreign_tensors(bound, read), largest_file=largest_file)
    config = {"architectures": ["LlamaForCausalLM"], **llama.HF.write(model)}
    (directory / "config.json").write_text(json.dumps(config))


def resident() -> float:
    """Return the bytes of memory that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> float:
    """Return the most bytes of memory that this process has used."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_import(source: Path, out: Path) -> dict[str, float]:
    """Return the peak of an import, in bytes above the process itself."""
    from slmjax.convert.import_export import import_model

    before = resident()
    import_model(source, out)
    return {"peak": peak() - before}


def measure_reading(model: Path) -> dict[str, float]:
    """Return the peak of reading, in bytes above the process and the arrays that it ends with."""
    import jax

    from slmjax.checkpoints import loading, safetensors_files
    from slmjax.models.definition import define
    from slmjax.parallel.mesh import MeshConfig, make_mesh
    from slmjax.parallel.rules import parameter_shardings

    config = loading.read_config(model)
    definition = define(config)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    shardings = parameter_shardings(definition.params, mesh)
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
        for name, leaf in definition.params.items()
    }
    jax.block_until_ready(jax.device_put(np.zeros(8), jax.devices()[0]))
    # Measured after the backend is initialised, which is part of the process.
    before = resident()
    params = jax.block_until_ready(safetensors_files.read_stacked(model, config, like))
    array_bytes = sum(shard.data.nbytes for array in params.values() for shard in array.addressable_shards)
    return {"peak": peak() - before - array_bytes, "arrays": float(array_bytes)}


def in_process(*argv: str) -> dict[str, float]:
    """Run this script with other arguments in a process of its own, and return what it prints."""
    done = subprocess.run([sys.executable, __file__, *argv], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--file-mb", type=int, default=100, help="largest safetensors file, in MB")
    parser.add_argument("--measure", nargs="*", help=argparse.SUPPRESS)
    args: Any = parser.parse_args()
    if args.measure:
        kind, *paths = args.measure
        measured = (
            measure_import(*map(Path, paths)) if kind == "import" else measure_reading(*map(Path, paths))
        )
        print(json.dumps(measured))
        return
    with tempfile.TemporaryDirectory() as name:
        theirs = Path(name) / "theirs"
        ours = Path(name) / "ours"
        write_model(theirs, largest_file=args.file_mb * 10**6)
        sizes = [file.stat().st_size for file in theirs.glob("*.safetensors")]
        imported = in_process("--measure", "import", str(theirs), str(ours))
        read = in_process("--measure", "read", str(ours))
    arrays = f"{read['arrays'] / MB:,.0f} MB"
    print(
        "| model | files | largest file | import, above the process | into 8 shards, above process and "
        f"arrays ({arrays}) |"
    )
    print("|---|---|---|---|---|")
    print(
        f"| SmolLM2-360M's shape, {sum(sizes) / MB:,.0f} MB | {len(sizes)} | {max(sizes) / MB:,.0f} MB | "
        f"{imported['peak'] / MB:,.0f} MB | "
        f"{read['peak'] / MB:,.0f} MB |"
    )


if __name__ == "__main__":
    import os

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    main()
