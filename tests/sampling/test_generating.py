"""`slmjax generate`: where prompts come from, where continuations go, and the errors for what does not
fit.
"""

import io
import json
import shutil
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
    """The output of the command with these arguments; SystemExit with a status other than 0 is raised."""

    def call(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["generate", *LENGTH, run_dir, *words])
        if stopped.value.code:
            raise stopped.value
        return capsys.readouterr().out

    return call


def test_every_source_of_prompts_gives_the_same(
    generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["The ", "def"]
    records = json.loads(generate("--json", "--prompt", *prompts))
    assert [item["prompt"] for item in records] == prompts and [item["seed"] for item in records] == [0, 1]
    assert all(
        len(item["tokens"]) <= 6 and item["reason"] in ("eos", "length") and "logprobs" not in item
        for item in records
    )
    lines = tmp_path / "prompts.txt"
    objects = tmp_path / "prompts.jsonl"
    lines.write_text("\n".join(["The ", "", "def"]))
    objects.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    for file in (lines, objects):
        assert json.loads(generate("--json", "--file", str(file))) == records
    monkeypatch.setattr("sys.stdin", io.StringIO("The \ndef\n"))
    assert json.loads(generate("--format", "json", "-")) == records
    # One at a time is the same: a draw depends on the prompt and its seed alone.
    assert [
        json.loads(line)
        for line in generate("--format", "jsonl", "--batch-size", "1", "--prompt", *prompts).splitlines()
    ] == records


def test_text_is_streamed_or_written_whole(generate, tmp_path: Path) -> None:
    streamed = generate("--prompt", "The ")
    whole = generate("--no-stream", "--prompt", "The ")
    assert streamed == whole and streamed.startswith("The ") and streamed.endswith("\n")
    two = generate("--prompt", "The ", "def")
    assert two.startswith(whole[:-1] + "\n\ndef")
    output = tmp_path / "out.txt"
    assert generate("--output", str(output), "--prompt", "The ") == "" and output.read_text() == whole


def test_a_text_is_shown_while_it_grows(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece after the first token and after every few more, each flushed before the model continues."""
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
    shown = ["write", "flush"]
    # Output that cannot be written is noticed as the command ends, which flushes once more.
    while events[-2:] == ["flush", "flush"]:
        events.pop()
    assert events == [*shown, *(["decode", *shown] * 3), *shown]
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
        (("--file", "absent.txt"), None, ("absent.txt", "one prompt per line")),
        (("--file", "prompts.txt"), b"\n \n", ("prompts.txt", "has no prompts")),
        (("--file", "prompts.txt"), b"\xff\xfe", ("prompts.txt", "not UTF-8")),
        (
            ("--file", "prompts.jsonl"),
            b'{"prompt": "a"}\n{"text": "b"}\n',
            ("prompts.jsonl, line 2", '"prompt"'),
        ),
        (("--file", "prompts.jsonl"), b"{prompt\n", ("prompts.jsonl, line 1", "not JSON")),
        (("--file", "prompts.jsonl"), b'{"prompt": "a", "seed": -1}\n', ("seed is -1", "2**32")),
        (("--top-p", "1.5"), None, ("top_p", "1.5")),
        (("--batch-size", "0"), None, ("--batch-size", "at least 1")),
        (("--prompt", "x" * 200), None, ("201 tokens", "context_length=64", "shorten it to 63")),
        (("--output", "absent/out.txt"), None, ("absent/out.txt", "No such file or directory")),
    ],
)
def test_what_does_not_fit_is_named(
    words: tuple[str, ...],
    content: bytes | None,
    expected: tuple[str, ...],
    run_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / words[1]).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        main(["generate", run_dir, *words])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and not printed.out and "Traceback" not in printed.err
    assert all(part in " ".join(printed.err.split()) for part in expected), printed.err


# Chats ------------------------------------------------------------------------------------------------------
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}a:"


@pytest.fixture(scope="module")
def chat_dir(run_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run, with a chat template next to its tokenizer."""
    path = tmp_path_factory.mktemp("chat") / "run"
    shutil.copytree(run_dir, path)
    (path / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    return str(path)


@pytest.fixture
def chat(chat_dir: str, capsys: pytest.CaptureFixture[str]):
    def call(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["generate", chat_dir, *LENGTH, *words])
        assert not stopped.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    return call


def test_a_chat_gives_the_answer_alone(generate, chat, tmp_path: Path) -> None:
    plain = json.loads(generate("--json", "--prompt", "u: Hello\na:", "s: Be brief\nu: Hi\na:"))
    [record] = json.loads(chat("--json", "--chat", "Hello"))
    assert record == {**plain[0], "prompt": "Hello"}  # BOS once: the template wrote it
    assert chat("--chat", "Hello") == plain[0]["text"] + "\n" == chat("--no-stream", "--chat", "Hello")
    conversations = tmp_path / "conversations.jsonl"
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    lines = [{"prompt": "Hello"}, {"messages": messages}, {"messages": messages[1:], "seed": 1}]
    conversations.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second, third = json.loads(chat("--json", "--chat", "--file", str(conversations)))
    assert first == record and second == {
        **{k: v for k, v in plain[1].items() if k != "prompt"},
        "messages": messages,
    }
    assert third["messages"] == messages[1:] and third["prompt_tokens"] != second["prompt_tokens"]
    # A system message for those that have none of their own.
    first, second, third = json.loads(
        chat("--json", "--chat", "--system", "Be brief", "--file", str(conversations))
    )
    assert (
        third["tokens"] == second["tokens"]
        and third["messages"] == messages[1:]
        and first["tokens"] != record["tokens"]
    )
    assert chat("--chat", "--prompt", "Hello", "Hello", "--batch-size", "1").startswith(
        plain[0]["text"] + "\n\n"
    )


@pytest.mark.parametrize(
    ("words", "line", "expected"),
    [
        (("--chat", "Hello"), None, ("no chat template", "chat_template.jinja")),
        (("--chat",), None, ("--chat needs a message",)),
        (("--system", "Be brief", "Hello"), None, ("add --chat",)),
        (
            ("--file", "c.jsonl"),
            '{"messages": [{"role": "user", "content": "a"}]}',
            ("c.jsonl", "add --chat"),
        ),
        (("--chat", "--file", "c.jsonl"), '{"messages": []}', ("c.jsonl, line 1", "non-empty list")),
        (("--chat", "--file", "c.jsonl"), '{"messages": ["a"]}', ("c.jsonl, line 1", '"role": "user"')),
    ],
)
def test_what_is_no_chat_is_named(
    words: tuple[str, ...],
    line: str | None,
    expected: tuple[str, ...],
    run_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if line is not None:
        (tmp_path / "c.jsonl").write_text(line)
    with pytest.raises(SystemExit) as stopped:
        main(["generate", run_dir, *words])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and not printed.out and "Traceback" not in printed.err
    assert all(part in " ".join(printed.err.split()) for part in expected), printed.err
