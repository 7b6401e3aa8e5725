"""`slmjax generate`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from slmjax.cli.options import load_code, needed, parse, positional, print_json, without_prefix


def generate_command(words: Sequence[str]) -> int:
    """continue prompts: slmjax generate RUN_DIR --prompt "def main(" """
    from slmjax import checkpoint
    from slmjax.sampling import SamplingConfig, generate

    path, options = positional(words)
    load_code(options)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        prompt: tuple[str, ...] = ("",)  # texts to continue; an empty one starts a document
        step: int | None = None  # checkpoint to sample from (none: the newest)
        code: str | None = None  # Python file that defines the classes of your own which the run's settings name
        json: bool = False  # print texts, tokens and reasons as JSON
        settings: Annotated[SamplingConfig, without_prefix()] = SamplingConfig()

    given = parse(Arguments, options, default=Arguments(), command="generate RUN_DIR", description=generate_command.__doc__)
    loaded = checkpoint.load_model(needed(path, "generate RUN_DIR"), step=given.step)
    found = generate(loaded, given.prompt, config=given.settings)
    if given.json:
        print_json([{"prompt": prompt, **dataclasses.asdict(one)} for prompt, one in zip(given.prompt, found, strict=True)])
        return 0
    for prompt, one in zip(given.prompt, found, strict=True):
        print(prompt + one.text, end="\n\n" if len(found) > 1 else "\n")
    return 0
