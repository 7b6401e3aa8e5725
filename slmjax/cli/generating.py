"""`slmjax generate`."""

import contextlib
import dataclasses
import enum
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from slmjax.cli.options import load_code, parse, positional, print_stderr, without_prefix


class Format(enum.Enum):
    """Output formats of `slmjax generate`."""

    TEXT = "text"  # prompt and continuation, separated by blank lines; only the answer in a chat
    JSON = "json"  # one list of records
    JSONL = "jsonl"  # a record on each line, written as soon as it is ready


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt or a conversation to continue, with the seed of its samples."""

    prompt: str | None
    seed: int | None = None  # None: the seed of the settings plus the request's position
    messages: Any = None  # for a conversation: a list of {"role": ..., "content": ...}
    tokens: tuple[int, ...] | None = None  # for a chat: the tokens that the template renders it to

    @property
    def identity(self) -> dict[str, Any]:
        """Fields of an output record that identify its request."""
        return {"prompt": self.prompt} if self.messages is None else {"messages": self.messages}

    @property
    def input(self) -> str | tuple[int, ...]:
        """Text or tokens to pass to `generate`."""
        if self.tokens is not None:
            return self.tokens
        assert self.prompt is not None, "a conversation is rendered to tokens first"
        return self.prompt


def generate_command(argv: Sequence[str]) -> int:
    """Continue prompts, or answer chat messages.

    slmjax generate RUN_DIR ["def main(" ...] [--file FILE] [--chat]
    """
    from slmjax.checkpoints import loading
    from slmjax.sampling import encode_prompts

    load_code(argv)
    args = parse(_generate_arguments(), argv, command="generate", description=generate_command.__doc__)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    # Seeds are assigned before batching, so that samples do not depend on --batch-size.
    requests = [
        request
        if request.seed is not None
        else dataclasses.replace(request, seed=(args.settings.seed + i) % 2**32)
        for i, request in enumerate(_requests([*args.prompts, *args.prompt], args))
    ]
    loaded = loading.load_model(Path(args.run_dir), step=args.step)
    if args.chat:
        requests = [_render_chat(loaded, request, args.system) for request in requests]
    # Refuse prompts that cannot be continued before an existing output file is overwritten.
    encode_prompts(loaded, [request.input for request in requests], config=args.settings)
    output_format = Format.JSON if args.json else args.format
    with _writer(args.output) as write:
        if output_format is Format.TEXT and args.stream and len(requests) == 1:
            _stream(loaded, requests[0], args.settings, write)
        else:
            _write_all(loaded, requests, args, output_format, write)
    return 0


def _print_drafts(generations: Sequence[Any]) -> None:
    """Print how many of all drafts were accepted; nothing where there were none."""
    drafted = sum(generation.drafted for generation in generations)
    if drafted:
        accepted = sum(generation.accepted for generation in generations)
        print_stderr(f"accepted {accepted:,} of {drafted:,} drafted tokens ({accepted / drafted:.0%})")


def _generate_arguments() -> type:
    from slmjax.sampling import SamplingConfig

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # run directory, or directory of an imported or quantized model
        run_dir: Annotated[str, *positional("RUN_DIR")]
        # texts to continue; "-" reads them from standard input, one per line
        prompts: Annotated[tuple[str, ...], *positional("[PROMPT ...]")] = ()
        # texts to continue, given as an option
        prompt: tuple[str, ...] = ()
        # file of prompts: one per line, or records (JSONL, JSON, CSV) with a "prompt" and optionally a
        # "seed"
        file: str | None = None
        # treat each prompt as a user message and apply the model's chat template; records may have the field
        # "messages" instead
        chat: bool = False
        # with --chat: system message before each prompt
        system: str | None = None
        # file to write to (none: standard output)
        output: str | None = None
        # format of the output
        format: Format = Format.TEXT
        # the same as --format json
        json: bool = False
        # with JSON: include the log-probability of every token, in nats, before temperature and filters
        logprobs: bool = False
        # print the continuation of a single prompt while it is generated
        stream: bool = True
        # prompts per batch
        batch_size: int = 16
        # checkpoint to sample from (none: the newest)
        step: int | None = None
        # Python file that defines your own classes, if the run's config names any
        code: str | None = None
        settings: Annotated[SamplingConfig, without_prefix()] = SamplingConfig()

    return Arguments


# Prompts ----------------------------------------------------------------------------------------------------
def _requests(prompts: Sequence[str], args: Any) -> list[Request]:
    """Collect prompts of the command line, standard input ("-") and `--file`; if none, one empty prompt."""
    requests: list[Request] = []
    for prompt in prompts:
        requests += _lines(sys.stdin.read(), "standard input") if prompt == "-" else [Request(prompt)]
    if args.file is not None:
        path = Path(args.file)
        if not path.is_file():
            raise ValueError(
                f"there is no file of prompts {path}: --file takes one prompt per line, or records (JSONL, "
                "JSON, CSV, ...)"
            )
        requests += _read_requests(path)
    if args.chat and not requests:
        raise ValueError("--chat needs a message: slmjax generate RUN_DIR --chat --prompt 'Hello'")
    if not args.chat and args.system is not None:
        raise ValueError("--system is the first message of a conversation: add --chat")
    if not args.chat and any(request.messages is not None for request in requests):
        raise ValueError(f'{args.file} has the field "messages", a conversation: add --chat')
    return requests or [Request("")]


def _render_chat(loaded: Any, request: Request, system: str | None) -> Request:
    """Apply the chat template; `system` is used unless the conversation has a system message."""
    from slmjax.sampling import encode_chat

    messages = [{"role": "user", "content": request.prompt}] if request.messages is None else request.messages
    if system is not None and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return dataclasses.replace(request, tokens=tuple(encode_chat(loaded.tokenizer, messages)))


def _read_requests(path: Path) -> list[Request]:
    """Read the prompts of a file of records, or of a text file with one per line."""
    from slmjax.data.files import file_kind, read_bytes
    from slmjax.data.records import read_objects

    kind = file_kind(path)
    if kind.has_records:
        requests = [_record(record.values or {}, record.where) for record in read_objects(path)]
        if not requests:
            raise ValueError(f'{path} has no prompts: write records with a field "prompt"')
        return requests
    if kind.binary:
        raise ValueError(f"{path} is not UTF-8 text: it is {kind.binary}")
    try:
        return _lines(read_bytes(path, kind).decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it first") from error


def _lines(text: str, where: str) -> list[Request]:
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{where} has no prompts: write one per line")
    return [Request(line.removesuffix("\r")) for line in lines]


def _record(record: Mapping[str, Any], where: str) -> Request:
    from slmjax.data.records import value_in_cell

    prompt = record.get("prompt")
    messages = value_in_cell(record.get("messages"))
    seed = value_in_cell(record.get("seed"))
    if messages is not None:
        _check_messages(messages, where)
        prompt = None
    elif not isinstance(prompt, str):
        raise ValueError(f'{where} has no text in a field "prompt": write {{"prompt": "..."}}')
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32):
        raise ValueError(f"{where}: seed is {seed!r}, but must be an integer from 0 to 2**32 - 1")
    return Request(prompt, seed, messages)


def _check_messages(messages: Any, where: str) -> None:
    well_formed = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    )
    if not messages or not well_formed:
        raise ValueError(
            f'{where}: "messages" must be a non-empty list of objects like '
            '{"role": "user", "content": "..."}'
        )


# Continuations ----------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _writer(output: str | None) -> Iterator[Callable[[str], None]]:
    """Yield a function that writes text to a file or standard output and flushes it."""
    with (
        contextlib.nullcontext(sys.stdout)
        if output is None
        else Path(output).open("w", encoding="utf-8") as stream
    ):

        def write(text: str) -> None:
            stream.write(text)
            stream.flush()

        yield write


def _stream(loaded: Any, request: Request, settings: Any, write: Callable[[str], None]) -> None:
    from slmjax.sampling import generate

    has_started = False

    def on_text(_: int, text: str) -> None:
        nonlocal has_started
        # The prompt is echoed with the first text, so that a refused prompt is not.
        write(text if has_started else _echo(request) + text)
        has_started = True

    generations = generate(loaded, [request.input], config=settings, seeds=[_seed(request)], on_text=on_text)
    write("\n" if has_started else _echo(request) + "\n")
    _print_drafts(generations)


def _write_all(
    loaded: Any, requests: Sequence[Request], args: Any, output_format: Format, write: Callable[[str], None]
) -> None:
    from slmjax.sampling import generate
    from slmjax.telemetry.run_directory import plain

    records = []
    generations = []
    for first in range(0, len(requests), args.batch_size):
        batch = requests[first : first + args.batch_size]
        continuations = generate(
            loaded,
            [request.input for request in batch],
            config=args.settings,
            seeds=[_seed(request) for request in batch],
        )
        generations += continuations
        for request, continuation in zip(batch, continuations, strict=True):
            if output_format is Format.TEXT:
                write(_echo(request) + continuation.text + ("\n\n" if len(requests) > 1 else "\n"))
                continue
            record = plain({**request.identity, **dataclasses.asdict(continuation)})
            if not args.logprobs:
                del record["logprobs"]
            if args.settings.draft_tokens is None:
                del record["drafted"]
                del record["accepted"]
            records.append(record)
            if output_format is Format.JSONL:
                write(json.dumps(record) + "\n")
    if output_format is Format.JSON:
        write(json.dumps(records, indent=2) + "\n")
    _print_drafts(generations)


def _seed(request: Request) -> int:
    assert request.seed is not None, "generate_command gives each request a seed"
    return request.seed


def _echo(request: Request) -> str:
    """Return the text to print before a continuation: the prompt, or nothing in a chat."""
    return (request.prompt or "") if request.tokens is None else ""
