"""`slmjax generate`."""

import contextlib
import dataclasses
import enum
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from slmjax.cli.options import by_place, load_code, parse, without_prefix


class Format(enum.Enum):
    """How continuations are written."""

    TEXT = "text"  # prompt and continuation, or the answer alone in a chat, blank lines between
    JSON = "json"  # one list of records
    JSONL = "jsonl"  # a record on each line, as soon as it is there


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt or a conversation as it was given, its seed where it has one of its own, and what the model is
    given of it.
    """

    prompt: str | None
    seed: int | None = None
    messages: Any = None  # a list of {"role": ..., "content": ...}
    tokens: tuple[int, ...] | None = None  # of a chat

    @property
    def given(self) -> dict[str, Any]:
        """What a record of the answer says that was asked."""
        return {"prompt": self.prompt} if self.messages is None else {"messages": self.messages}

    @property
    def input(self) -> Any:
        """What `generate` takes."""
        return self.prompt if self.tokens is None else self.tokens


def generate_command(words: Sequence[str]) -> int:
    """continue prompts: slmjax generate RUN_DIR ["def main(" ...] [--file FILE]"""
    from slmjax.checkpoints import loading
    from slmjax.sampling import SamplingConfig, encode_prompts

    load_code(words)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        run_dir: Annotated[str, *by_place("RUN_DIR")]  # run directory with the model
        prompts: Annotated[
            tuple[str, ...], *by_place("[PROMPT ...]")
        ] = ()  # texts to continue; "-" reads them from standard input, line by line
        prompt: tuple[str, ...] = ()  # texts to continue, as an option
        file: str | None = (
            # file of prompts: one on each line, or records (JSONL, JSON, CSV) with "prompt", and "seed" if
            # need be
            None
        )
        # each prompt is a user's message, put as the model's chat template says; records may have
        # "messages" instead
        chat: bool = False
        system: str | None = None  # with --chat: the system message before each
        output: str | None = None  # file to write to (none: standard output)
        format: Format = Format.TEXT  # how continuations are written
        json: bool = False  # the same as --format json
        # with JSON: the log-probability of every token, in nats, under the model's own distribution
        logprobs: bool = False
        stream: bool = True  # show the text of a single prompt as it comes
        batch_size: int = 16  # prompts at a time
        step: int | None = None  # checkpoint to sample from (none: the newest)
        # Python file that defines the classes of your own which the run's settings name
        code: str | None = None
        settings: Annotated[SamplingConfig, without_prefix()] = SamplingConfig()

    given = parse(Arguments, words, command="generate", description=generate_command.__doc__)
    if given.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {given.batch_size}")
    requests = _requests([*given.prompts, *given.prompt], given)
    requests = [
        one if one.seed is not None else dataclasses.replace(one, seed=(given.settings.seed + i) % 2**32)
        for i, one in enumerate(requests)
    ]
    loaded = loading.load_model(Path(given.run_dir), step=given.step)
    if given.chat:
        requests = [_rendered(loaded, one, given.system) for one in requests]
    # What cannot be continued is said before a file that is there is written over.
    encode_prompts(loaded, [one.input for one in requests], config=given.settings)
    how = Format.JSON if given.json else given.format
    with _writer(given.output) as write:
        if how is Format.TEXT and given.stream and len(requests) == 1:
            _stream(loaded, requests[0], given.settings, write)
        else:
            _write_all(loaded, requests, given, how, write)
    return 0


# Prompts ----------------------------------------------------------------------------------------------------
def _requests(prompts: Sequence[str], given: Any) -> list[Request]:
    """The prompts of the command line, of standard input where one of them is "-", and of a file; one empty
    prompt if there are none.
    """
    found: list[Request] = []
    for prompt in prompts:
        found += _lines(sys.stdin.read(), "standard input") if prompt == "-" else [Request(prompt)]
    if given.file is not None:
        path = Path(given.file)
        if not path.is_file():
            raise ValueError(
                f"there is no file of prompts {path}: --file takes one prompt on each line, or records "
                "(JSONL, JSON, CSV, ...)"
            )
        found += _in_file(path)
    if given.chat and not found:
        raise ValueError("--chat needs a message: slmjax generate RUN_DIR --chat --prompt 'Hello'")
    if not given.chat and given.system is not None:
        raise ValueError("--system is the first message of a conversation: add --chat")
    if not given.chat and any(one.messages is not None for one in found):
        raise ValueError(f'{given.file} has "messages", which are a conversation: add --chat')
    return found or [Request("")]


def _rendered(loaded: Any, request: Request, system: str | None) -> Request:
    """The conversation as the model's tokens; a system message of its own stands."""
    from slmjax.sampling import encode_chat

    messages = [{"role": "user", "content": request.prompt}] if request.messages is None else request.messages
    if system is not None and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return dataclasses.replace(request, tokens=tuple(encode_chat(loaded.tokenizer, messages)))


def _in_file(path: Path) -> list[Request]:
    """The prompts of a file: of its records, or one on each line of text."""
    from slmjax.data.files import file_kind, read_bytes
    from slmjax.data.records import read_objects

    kind = file_kind(path)
    if kind.has_records:
        requests = [_record(record.values or {}, record.where) for record in read_objects(path)]
        if not requests:
            raise ValueError(f'{path} holds no prompt: write records with a field "prompt"')
        return requests
    if kind.binary:
        raise ValueError(f"{path} is no UTF-8 text: it is {kind.binary}")
    try:
        return _lines(read_bytes(path, kind).decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}): convert it first") from error


def _lines(text: str, where: str) -> list[Request]:
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{where} holds no prompt: write one on each line")
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
        raise ValueError(f"{where}: seed is {seed!r}, and must be a whole number between 0 and 2**32 - 1")
    return Request(prompt, seed, messages)


def _check_messages(messages: Any, where: str) -> None:
    well_formed = isinstance(messages, list) and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) for one in messages
    )
    if not messages or not well_formed:
        raise ValueError(
            f'{where}: "messages" must be a list of objects like {{"role": "user", "content": "..."}}, and '
            "not empty"
        )


# Continuations ----------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _writer(output: str | None) -> Iterator[Callable[[str], None]]:
    """A function that writes a piece of text and flushes."""
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

    begun = False

    def tell(_: int, text: str) -> None:
        nonlocal begun
        write(text if begun else _echo(request) + text)  # a prompt that is refused is not echoed
        begun = True

    generate(loaded, [request.input], config=settings, seeds=[_seed(request)], on_text=tell)
    write("\n" if begun else _echo(request) + "\n")


def _write_all(
    loaded: Any, requests: Sequence[Request], given: Any, how: Format, write: Callable[[str], None]
) -> None:
    from slmjax.sampling import generate
    from slmjax.telemetry.run_directory import plain

    records = []
    for first in range(0, len(requests), given.batch_size):
        part = requests[first : first + given.batch_size]
        found = generate(
            loaded, [one.input for one in part], config=given.settings, seeds=[_seed(one) for one in part]
        )
        for request, one in zip(part, found, strict=True):
            if how is Format.TEXT:
                write(_echo(request) + one.text + ("\n\n" if len(requests) > 1 else "\n"))
                continue
            record = plain({**request.given, **dataclasses.asdict(one)})
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


def _echo(request: Request) -> str:
    """What is shown before a continuation: the prompt that it continues; of a chat the answer stands
    alone.
    """
    return (request.prompt or "") if request.tokens is None else ""
