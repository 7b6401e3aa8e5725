"""`slmjax generate`."""

import contextlib
import dataclasses
import enum
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from slmjax.cli.options import by_place, load_code, parse, without_prefix


class Format(enum.Enum):
    """How continuations are written."""

    TEXT = "text"  # prompt and continuation, blank lines between
    JSON = "json"  # one list of records
    JSONL = "jsonl"  # a record on each line, as soon as it is there


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and its seed where it has one of its own."""

    prompt: str
    seed: int | None = None


def generate_command(words: Sequence[str]) -> int:
    """continue prompts: slmjax generate RUN_DIR ["def main(" ...] [--file FILE]"""
    from slmjax import checkpoint
    from slmjax.sampling import SamplingConfig, encode_prompts

    load_code(words)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        run_dir: Annotated[str, *by_place("RUN_DIR")]  # run directory with the model
        prompts: Annotated[
            tuple[str, ...], *by_place("[PROMPT ...]")
        ] = ()  # texts to continue; "-" reads them from standard input, line by line
        prompt: tuple[str, ...] = ()  # texts to continue, as an option
        file: str | None = None  # file of prompts: one on each line, or JSONL with a field "prompt" (and "seed", where it has its own)
        output: str | None = None  # file to write to (none: standard output)
        format: Format = Format.TEXT  # how continuations are written
        json: bool = False  # the same as --format json
        logprobs: bool = False  # with JSON: the log-probability of every token, in nats, under the model's own distribution
        stream: bool = True  # show the text of a single prompt as it comes
        batch_size: int = 16  # prompts at a time
        step: int | None = None  # checkpoint to sample from (none: the newest)
        code: str | None = None  # Python file that defines the classes of your own which the run's settings name
        settings: Annotated[SamplingConfig, without_prefix()] = SamplingConfig()

    given = parse(Arguments, words, command="generate", description=generate_command.__doc__)
    if given.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {given.batch_size}")
    requests = _requests([*given.prompts, *given.prompt], given.file)
    requests = [
        one if one.seed is not None else Request(one.prompt, (given.settings.seed + i) % 2**32) for i, one in enumerate(requests)
    ]  # fmt: skip
    loaded = checkpoint.load_model(Path(given.run_dir), step=given.step)
    # What cannot be continued is said before a file that is there is written over.
    encode_prompts(loaded, [one.prompt for one in requests], config=given.settings)
    how = Format.JSON if given.json else given.format
    with _writer(given.output) as write:
        if how is Format.TEXT and given.stream and len(requests) == 1:
            _stream(loaded, requests[0], given.settings, write)
        else:
            _write_all(loaded, requests, given, how, write)
    return 0


# Prompts --------------------------------------------------------------------------------------------------------------
def _requests(prompts: Sequence[str], file: str | None) -> list[Request]:
    """The prompts of the command line, of standard input where one of them is "-", and of a file; one empty prompt if there are none."""
    found: list[Request] = []
    for prompt in prompts:
        found += _parsed(sys.stdin.read(), "standard input", is_jsonl=False) if prompt == "-" else [Request(prompt)]
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise ValueError(f"there is no file of prompts {file}: --file takes one prompt on each line, or JSONL")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no UTF-8 text ({error}): convert it first") from error
        found += _parsed(text, file, is_jsonl=path.suffix == ".jsonl")
    return found or [Request("")]


def _parsed(text: str, where: str, *, is_jsonl: bool) -> list[Request]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{where} holds no prompt: write one on each line")
    return [_record(line, f"{where}, line {number}") if is_jsonl else Request(line.removesuffix("\r")) for number, line in lines]


def _record(line: str, where: str) -> Request:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error})") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    seed = record.get("seed") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise ValueError(f'{where} has no text in a field "prompt": write {{"prompt": "..."}}')
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32):
        raise ValueError(f"{where}: seed is {seed!r}, and must be a whole number between 0 and 2**32 - 1")
    return Request(prompt, seed)


# Continuations --------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _writer(output: str | None) -> Iterator[Callable[[str], None]]:
    """A function that writes a piece of text and flushes."""
    with contextlib.nullcontext(sys.stdout) if output is None else Path(output).open("w", encoding="utf-8") as stream:

        def write(text: str) -> None:
            stream.write(text)
            stream.flush()

        yield write


def _stream(loaded: Any, request: Request, settings: Any, write: Callable[[str], None]) -> None:
    from slmjax.sampling import generate

    begun = False

    def tell(_: int, text: str) -> None:
        nonlocal begun
        write(text if begun else request.prompt + text)  # a prompt that is refused is not echoed
        begun = True

    generate(loaded, [request.prompt], config=settings, seeds=[_seed(request)], on_text=tell)
    write("\n" if begun else request.prompt + "\n")


def _write_all(loaded: Any, requests: Sequence[Request], given: Any, how: Format, write: Callable[[str], None]) -> None:
    from slmjax.runlog import plain
    from slmjax.sampling import generate

    records = []
    for first in range(0, len(requests), given.batch_size):
        part = requests[first : first + given.batch_size]
        found = generate(loaded, [one.prompt for one in part], config=given.settings, seeds=[_seed(one) for one in part])
        for request, one in zip(part, found, strict=True):
            if how is Format.TEXT:
                write(request.prompt + one.text + ("\n\n" if len(requests) > 1 else "\n"))
                continue
            record = plain({"prompt": request.prompt, **dataclasses.asdict(one)})
            if not given.logprobs:
                del record["logprobs"]
            records.append(record)
            if how is Format.JSONL:
                write(json.dumps(record) + "\n")
    if how is Format.JSON:
        write(json.dumps(records, indent=2) + "\n")


def _seed(request: Request) -> int:
    assert request.seed is not None, "each request was given one"
    return request.seed
