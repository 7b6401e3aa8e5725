"""`slmjax generate`: where prompts come from, where continuations go, and what is said of what does not fit."""

import io
import json
from pathlib import Path

import pytest

from slmjax.cli import main
from slmjax.sampling import decoding

LENGTH = ("--max-tokens", "6", "--temperature", "1.0")


@pytest.fixture(scope="module")
def run_dir(trained, workplace: Path) -> str:
    return str(workplace / json.loads(trained.stdout)["run_dir"])


@pytest.fixture
def generate(run_dir: str, capsys: pytest.CaptureFixture[str]):
    """The output of the command with these words; SystemExit with another status than 0 goes on."""

    def call(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["generate", *LENGTH, run_dir, *words])
        if stopped.value.code:
            raise stopped.value
        return capsys.readouterr().out

    return call


def test_every_source_of_prompts_gives_the_same(generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["The ", "def"]
    records = json.loads(generate("--json", "--prompt", *prompts))
    assert [one["prompt"] for one in records] == prompts and [one["seed"] for one in records] == [0, 1]
    assert all(len(one["tokens"]) <= 6 and one["reason"] in ("eos", "length") and "logprobs" not in one for one in records)
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("\n".join(["The ", "", "def"]))
    objects.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    for file in (lines, objects):
        assert json.loads(generate("--json", "--file", str(file))) == records
    monkeypatch.setattr("sys.stdin", io.StringIO("The \ndef\n"))
    assert json.loads(generate("--format", "json", "-")) == records
    # One at a time is the same: a draw depends on the prompt and its seed alone.
    assert [json.loads(line) for line in generate("--format", "jsonl", "--batch-size", "1", "--prompt", *prompts).splitlines()] == records


def test_text_is_streamed_or_written_whole(generate, tmp_path: Path) -> None:
    streamed, whole = generate("--prompt", "The "), generate("--no-stream", "--prompt", "The ")
    assert streamed == whole and streamed.startswith("The ") and streamed.endswith("\n")
    two = generate("--prompt", "The ", "def")
    assert two.startswith(whole[:-1] + "\n\ndef")
    output = tmp_path / "out.txt"
    assert generate("--output", str(output), "--prompt", "The ") == "" and output.read_text() == whole


def test_a_text_is_shown_while_it_grows(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece after the first token and after every few more, each flushed before the model goes on."""
    events: list[str] = []
    pieces: list[str] = []
    made = decoding._continue

    def continue_and_tell(*arguments):
        events.append("decode")
        return made(*arguments)

    class Terminal(io.StringIO):
        def write(self, text: str) -> int:
            events.append("write")
            pieces.append(text)
            return len(text)

        def flush(self) -> None:
            events.append("flush")

    monkeypatch.setattr(decoding, "_continue", continue_and_tell)
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout", Terminal())
        # Greedily, the model of the tests writes spaces: every token is one character.
        with pytest.raises(SystemExit) as stopped:
            main(["generate", run_dir, "--prompt", "The ", "--max-tokens", "12", "--temperature", "0.0"])
    assert not stopped.value.code
    told = ["write", "flush"]
    assert events == [*told, *(["decode", *told] * 3), *told]
    assert [len(piece) for piece in pieces] == [len("The ") + 1, 4, 4, 3, 1] and pieces[-1] == "\n"


def test_logprobs_and_seeds_of_ones_own(generate, tmp_path: Path) -> None:
    objects = tmp_path / "prompts.jsonl"
    objects.write_text('{"prompt": "The ", "seed": 41}\n{"prompt": "The "}\n')
    first, second = json.loads(generate("--json", "--logprobs", "--file", str(objects)))
    assert (first["seed"], second["seed"]) == (41, 1) and first["tokens"] != second["tokens"]
    assert len(first["logprobs"]) == len(first["tokens"]) and max(first["logprobs"]) < 0


@pytest.mark.parametrize(
    ("words", "content", "expected"),
    [
        (("--file", "absent.txt"), None, ("absent.txt", "one prompt on each line")),
        (("--file", "prompts.txt"), b"\n \n", ("prompts.txt", "holds no prompt")),
        (("--file", "prompts.txt"), b"\xff\xfe", ("prompts.txt", "no UTF-8")),
        (("--file", "prompts.jsonl"), b'{"prompt": "a"}\n{"text": "b"}\n', ("prompts.jsonl, line 2", '"prompt"')),
        (("--file", "prompts.jsonl"), b"{prompt\n", ("prompts.jsonl, line 1", "not JSON")),
        (("--file", "prompts.jsonl"), b'{"prompt": "a", "seed": -1}\n', ("seed is -1", "2**32")),
        (("--top-p", "1.5"), None, ("top_p", "1.5")),
        (("--batch-size", "0"), None, ("--batch-size", "at least 1")),
        (("--prompt", "x" * 200), None, ("201 tokens", "context_length=64", "shorten it to 63")),
        (("--output", "absent/out.txt"), None, ("absent/out.txt", "No such file or directory")),
    ],
)
def test_what_does_not_fit_is_named(
    words: tuple[str, ...], content: bytes | None, expected: tuple[str, ...], run_dir: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / words[1]).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        main(["generate", run_dir, *words])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and not said.out and "Traceback" not in said.err
    assert all(part in " ".join(said.err.split()) for part in expected), said.err
