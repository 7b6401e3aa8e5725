"""The process that renders chat templates: whatever they compute, it takes bounded time and memory."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slmjax.data import template_process
from slmjax.data.template_process import TemplateFailed, render

MESSAGES = {"messages": [{"role": "user", "content": "Hi"}]}
# Lists of lists whose parts are the same lists: small in memory, and 2**40 comparisons.
DOUBLED = (
    "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(40) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}"
)
MEMORY = "more than 1,024 MiB of memory"
TIME = "more than 1 s of CPU time"
QUICK = {
    "comparison": (DOUBLED + "{{ n.x == n.y }}", TIME),
    "printed": (DOUBLED + "{{ n.x }}", "more than 100,000 parts"),
    "replace": ("{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}", MEMORY),
    "indent": (r"{{ ('a\n' * 1000000) | indent(1000000) }}", MEMORY),
    "multiplication": (
        "{% for i in range(90000) %}{% set x = 'a' * 9999999 %}{% endfor %}",
        "9,999,999 parts",
    ),
    "join": ("{{ range(99999) | join('x' * 9999999) }}", MEMORY),
    "range": ("{{ range(10 ** 9) | list | length }}", "the number 1,000,000,000"),
    "loops": (
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "100,000 steps",
    ),
    "recursion": (
        "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "RecursionError",
    ),
    "tabs": (r"{{ ('\t' * 9999999).expandtabs(9999999) }}", MEMORY),
    "nested source": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
}
SLOW = {
    "tree of calls": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "100,000 steps",
    ),
    "width": ("{{ ('%99999d' * 100000) % ((1,) * 100000) }}", MEMORY),
    "format": ("{{ ('{:99999}' * 100000).format(*((1,) * 100000)) }}", MEMORY),
    "constant": ("{{ 'a' | center(9999999) | replace(' ', 'b' | center(9999999)) }}", MEMORY),
    "membership": (DOUBLED + "{{ n.x in [n.y] }}", TIME),
    "slices": (
        "{% set x = 'a' * 9999999 %}{% for i in range(90000) %}{% set y = x[1:] %}{% endfor %}",
        TIME,
    ),
    "slice": ("{{ range(99999) | list | slice(9999999) | list }}", TIME),
    "batch": ("{{ [1] | batch(9999999, 'x') | list }}", f"{MEMORY}|{TIME}"),
    "groups": ("{% for i in range(9999) %}{{ range(9999) | groupby('real') | length }}{% endfor %}", TIME),
    "urlize": ("{{ ('http://a.bc ' * 800000) | urlize }}", f"parts|{TIME}"),
    "wordwrap": ("{{ ('a ' * 5000000) | wordwrap(1) }}", TIME),
    "translate": ("{{ ('a' * 9999999).translate({97: 'b' * 999999}) }}", f"{MEMORY}|{TIME}"),
}


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(name, marks=pytest.mark.nightly) for name in SLOW)])
def test_a_template_ends(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In time and memory: the process has the limits, so that no operation needs its own."""
    template, reason = (QUICK | SLOW)[case]
    # A slow machine takes longer than a second to fill the memory.
    monkeypatch.setattr(template_process, "MAX_SECONDS", 1 if "CPU time" in reason else 20)
    with pytest.raises(TemplateFailed, match=reason):
        render(template, MESSAGES)
    # The next template has a process, and its own limits.
    assert render("{{ messages[0].content }}", MESSAGES) == "Hi"


def _process() -> subprocess.Popen[bytes]:
    process = template_process._process._process
    assert process is not None
    return process


def test_the_process_has_limits_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    template_process._process.close()
    monkeypatch.setenv("A_SECRET_TOKEN", "canary")
    assert render("{{ 1 + 1 }}", {}) == "2"
    of_system = Path(f"/proc/{_process().pid}")
    assert b"canary" not in (of_system / "environ").read_bytes()
    limits = {
        line[:26].strip(): line[26:47].strip() for line in (of_system / "limits").read_text().splitlines()
    }
    assert limits["Max address space"] == str(template_process.MAX_MEMORY)
    assert limits["Max file size"] == limits["Max core file size"] == "0"
    assert int(limits["Max cpu time"]) <= template_process.MAX_SECONDS + 2


def test_a_process_that_was_ended_is_replaced() -> None:
    render("", {})
    before = _process()
    before.kill()
    before.wait()
    assert render("b", {}) == "b" and _process().pid != before.pid
    # In the middle of a template there is no text to return.
    threading.Timer(0.3, lambda process: process.send_signal(signal.SIGSEGV), [_process()]).start()
    with pytest.raises(TemplateFailed, match="its process ended by SIGSEGV"):
        render(DOUBLED + "{{ n.x == n.y }}", {})


def test_threads_take_turns() -> None:
    texts: dict[int, str] = {}

    def run(index: int) -> None:
        texts[index] = "".join(render("{{ index }},", {"index": index}) for _ in range(50))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {index: f"{index}," * 50 for index in range(4)}


def test_an_interrupted_rendering_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    render("", {})
    before = _process()
    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            render(DOUBLED + "{{ n.x == n.y }}", {})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert before.poll() is not None
    assert render("{{ 3 }}", {}) == "3"


@pytest.mark.parametrize("end", ["exit", pytest.param("kill", marks=pytest.mark.nightly)])
def test_the_process_ends_with_the_one_that_started_it(end: str, tmp_path: Path) -> None:
    """Also in a fork, which uses a process of its own, and after a kill that runs no clean-up."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from slmjax.data import template_process\n"
        "print(template_process.render('a', {}), template_process._process._process.pid, flush=True)\n"
        "if os.fork() == 0:\n"
        "    print(template_process.render('b', {}), template_process._process._process.pid, flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "print(template_process.render('c', {}), template_process._process._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9) if sys.argv[1] == 'kill' else None\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), end],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        timeout=60,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [text for text, _ in lines] == ["a", "b", "c"], done.stderr
    assert lines[0][1] == lines[2][1] != lines[1][1]
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for _, pid in lines):
        assert time.monotonic() < deadline, "a process is left behind"
        time.sleep(0.05)
