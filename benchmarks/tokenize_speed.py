"""Speed and memory of preparation, compared with the `tokenizers` library alone.

    python benchmarks/tokenize_speed.py [--megabytes 64]

Each measurement is of a process of its own. CPU seconds count user and system time of all threads. The
library alone reads the same JSON lines, encodes the texts in batches of 4 MiB with `encode_batch_fast`, and
takes the ids; slmjax also checks, splits, hashes and writes them. Memory is the peak of the resident set,
less that before the work.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_BATCH_BYTES = 4 << 20
_DOCUMENT_MEGABYTES = 50
_LONGEST = (1000, 4000, 1_000_000)  # characters of a document


def write_corpus(path: Path, num_bytes: int, *, longest: int) -> None:
    """Write JSON lines of about `num_bytes` of text: the standard library, in pieces, again and again."""
    from slmjax.data.stdlib_corpus import StdlibSource

    written = 0
    with path.open("w", encoding="utf-8") as stream:
        while written < num_bytes:
            for document in StdlibSource().documents():
                for start in range(0, len(document.text), longest):
                    text = document.text[start : start + longest]
                    stream.write(json.dumps({"text": text}) + "\n")
                    written += len(text)


def bare(corpus: Path, tokenizer: Path) -> dict[str, Any]:
    """Encode the corpus with the library alone."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))

    def encode(texts: list[str]) -> int:
        return sum(
            len(encoding.ids) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)
        )

    num_tokens = size = 0
    texts: list[str] = []
    with corpus.open(encoding="utf-8") as stream:
        for line in stream:
            texts.append(json.loads(line)["text"])
            size += len(texts[-1])
            if size >= _BATCH_BYTES:
                num_tokens += encode(texts)
                size = 0
                texts = []
    return {"tokens": num_tokens + encode(texts)}


def prepared(corpus: Path, tokenizer: Path, *, split_tail: bool = False) -> dict[str, Any]:
    """Prepare the corpus as training does."""
    from slmjax.data.config import DataConfig, Split
    from slmjax.data.preparation import prepare
    from slmjax.data.tokenizers import FileTokenizer

    with tempfile.TemporaryDirectory() as cache:
        data = DataConfig(
            path=str(corpus),
            cache_dir=cache,
            max_bad_fraction=1.0,
            split=Split.TAIL if split_tail else Split.DOCUMENTS,
        )
        result = prepare(data, FileTokenizer(path=str(tokenizer)))
        sides = [*(shards for shards, _ in result.train), *result.heldout]
        return {"tokens": sum(shards.manifest.num_tokens - 2 * len(shards) for shards in sides)}


def measured(kind: str, corpus: Path, tokenizer: Path) -> dict[str, Any]:
    """Return the metrics of one kind of work in this process."""
    # Imports and threads are not part of the work.
    import slmjax.data.preparation

    del slmjax.data.preparation
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before = os.times()
    started = time.perf_counter()
    work = {"bare": bare, "slmjax": prepared}[kind]
    result = work(corpus, tokenizer)
    after = os.times()
    return result | {
        "wall": time.perf_counter() - started,
        "cpu": after.user + after.system - before.user - before.system,
        "memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024,
    }


def in_process(kind: str, corpus: Path, tokenizer: Path) -> dict[str, Any]:
    """Return the metrics of one kind of work in a process of its own."""
    command = [sys.executable, __file__, "--only", kind, str(corpus), str(tokenizer)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=16_384)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", nargs=3)
    args = parser.parse_args()
    if args.only:
        kind, corpus, tokenizer = args.only
        print(json.dumps(measured(kind, Path(corpus), Path(tokenizer))))
        return
    from slmjax.data.stdlib_corpus import StdlibSource
    from slmjax.data.tokenizers import BpeTokenizer

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        texts = [document.text for document in StdlibSource().documents()]
        BpeTokenizer(vocab_size=args.vocab_size).build(texts).save(root / "tokenizer")
        for longest in _LONGEST:
            write_corpus(root / "corpus.jsonl", args.megabytes << 20, longest=longest)
            print(f"documents of up to {longest:,} characters")
            speed: dict[str, list[float]] = {"bare": [], "slmjax": []}
            for _ in range(args.repetitions):
                for kind in speed:
                    metrics = in_process(kind, root / "corpus.jsonl", root / "tokenizer")
                    speed[kind].append(metrics["tokens"] / metrics["cpu"])
                    print(kind, {name: round(value, 2) for name, value in metrics.items()}, flush=True)
            # The median of each, since other processes disturb both.
            ratio = statistics.median(speed["slmjax"]) / statistics.median(speed["bare"])
            print(f"slmjax / bare, tokens per CPU second: {ratio:.3f}", flush=True)
        # One document, whose end is held out.
        text = "".join(texts)
        document = root / "document.txt"
        repeated = text * (1 + (_DOCUMENT_MEGABYTES << 20) // len(text))
        document.write_text(repeated[: _DOCUMENT_MEGABYTES << 20], encoding="utf-8")
        metrics = in_process("slmjax", document, root / "tokenizer")
        print(f"one document of {_DOCUMENT_MEGABYTES} MiB: {metrics['memory'] / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
