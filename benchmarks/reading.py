"""Number of files and functions of the package that one train step enters: what a reader opens to follow it.

    python benchmarks/reading.py                       # the three counts, for a tiny dense model
    python benchmarks/reading.py --list                # with every function by file
    PYTHONPATH=CHECKOUT python benchmarks/reading.py   # the same of another checkout, older ones included

`slmjax train nano` runs in this process for one step, in a smaller shape, once in floating point and once
with `--quant q4_0`. A profile hook sees every Python function while JAX traces the step: the forward pass,
the loss, the gradient (rules of `custom_vjp` too) and the update.

What is counted:
  function  a function of the package that was entered and has a name, methods, properties and nested
            functions included. Not counted: bodies of modules and classes; comprehensions, generator
            expressions and lambdas, which are read with the function around them; methods that `dataclasses`
            generates, which have no file; and handlers of log records.
  file      a file of the package with at least one such function.
  inside    between the call and the return of the function `train_step`.
  command   the files inside, and those of the functions that lead there: whatever is on the call stack, from
            the entry point of the command, when the step is first called, and when its parts and arguments
            are made: `make_train_step`, `define`, `make_optimizer`, `init_state`.

The count does not depend on the machine. Evaluation, checkpoints, logging and data are no part of a step.
"""

import argparse
import collections
import inspect
import logging
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

from slmjax import startup

startup.keep_memory()

import slmjax  # noqa: E402
from slmjax.cli import main as command  # noqa: E402

PACKAGE = Path(slmjax.__file__).parent
STEPS = ("train_step", "make_train_step.<locals>.train_step")  # the second in older checkouts
MAKERS = ("make_train_step", "define", "make_optimizer", "init_state")

Functions = set[types.CodeType]


class Reader:
    """A profile hook that notes the functions of the package inside the step, and those that lead to it."""

    def __init__(self) -> None:
        self.inside: Functions = set()
        self.leading: Functions = set()
        self._step: types.FrameType | None = None
        self._is_traced = False

    def __call__(self, frame: types.FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "return" and frame is self._step:
            self._step = None
            self._is_traced = True
        if event != "call" or not code.co_filename.startswith(f"{PACKAGE}/"):
            return
        if code.co_qualname in STEPS:
            self._step = frame
        if code.co_qualname in (*STEPS, *MAKERS) and not self._is_traced:
            self.leading |= {caller for caller in callers(frame) if is_function(caller)}
        if self._step is not None and is_function(code) and not is_logging(frame):
            self.inside.add(code)


def callers(frame: types.FrameType | None) -> list[types.CodeType]:
    """Return the code of a frame and of its callers."""
    codes = []
    while frame is not None:
        codes.append(frame.f_code)
        frame = frame.f_back
    return codes


def is_function(code: types.CodeType) -> bool:
    """Return whether this is a function of the package with a name of its own."""
    is_in_package = code.co_filename.startswith(f"{PACKAGE}/")
    is_body = code.co_flags & inspect.CO_NEWLOCALS == 0  # of a module or a class
    return is_in_package and not is_body and not code.co_name.startswith("<")


def is_logging(frame: types.FrameType) -> bool:
    """Return whether this call handles a log record."""
    return any(code.co_filename == logging.__file__ for code in callers(frame))


def files(functions: Functions) -> list[str]:
    """Return the files of these functions, relative to the package."""
    return sorted({str(Path(code.co_filename).relative_to(PACKAGE)) for code in functions})


def read_step(*options: str) -> Reader:
    """Trace one step of `slmjax train nano` with these options."""
    reader = Reader()
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text"
        text.mkdir()
        for index in range(8):
            content = " ".join(f"word{number % (7 + index)}" for number in range(200))
            (text / f"{index}.txt").write_text(content)
        arguments = [
            "train",
            "nano",
            f"--run.directory={scratch}/runs",
            f"--data.path={text}",
            "--data.split=tail",
            "--data.sequence-length=32",
            "--data.batch-size=2",
            "--tokenizer.vocab-size=300",
            "--optim.warmup-steps=0",
            "--run.steps=1",
            *options,
        ]
        sys.setprofile(reader)
        try:
            command(arguments)
        except SystemExit as exit:
            assert exit.code == 0, exit.code
        finally:
            sys.setprofile(None)
    assert reader.inside, "no step was traced"
    return reader


def show(functions: Functions) -> None:
    """Print every function by its file."""
    by_file: dict[str, list[str]] = collections.defaultdict(list)
    for code in functions:
        name = f"{code.co_qualname}:{code.co_firstlineno}"
        by_file[str(Path(code.co_filename).relative_to(PACKAGE))].append(name)
    for file, names in sorted(by_file.items()):
        print(f"  {file} ({len(names)}): {', '.join(sorted(names))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the functions by file")
    is_listed = parser.parse_args().list
    dense = read_step()
    quantized = read_step("--quant", "q4_0")
    for title, functions in (
        ("inside the dense step", dense.inside),
        ("from the command to the gradient", dense.inside | dense.leading),
        ("inside the quantized step (q4_0)", quantized.inside),
    ):
        print(f"{title}: {len(files(functions))} files, {len(functions)} functions")
        if is_listed:
            show(functions)


if __name__ == "__main__":
    main()
