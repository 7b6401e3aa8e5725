"""`slmjax eval`."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from slmjax.cli.options import by_place, load_code, option, parse, print_aside, print_json


def eval_command(words: Sequence[str]) -> int:
    """evaluate a model: slmjax eval RUN_DIR [--data.path FILE] [--multiple-choice FILE] [--lm-eval TASK]
    [--efficiency]
    """
    from slmjax.checkpoints import loading
    from slmjax.data.config import DataConfig
    from slmjax.data.provenance import ChangedData, own_data
    from slmjax.data.scored import ScoredText

    load_code(words)
    # The run is found before tyro parses the words, for the defaults of --data.*: a teacher may be a run too.
    paths = (
        word
        for before, word in itertools.pairwise(["", *words])
        if not word.startswith("-") and before != "--teacher"
    )
    of_run = next(filter(None, map(own_data, map(Path, paths))), DataConfig())
    if option(words, "--data.path") is not None:
        # another text is evaluated whole, unless a fraction is given
        of_run = dataclasses.replace(of_run, heldout_fraction=0.0)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        run_dir: Annotated[str, *by_place("RUN_DIR")]  # run directory with the model
        # loss and bits per byte of text beside another evaluation: alone, it is what is done anyway
        text: bool = False
        max_documents: int | None = None  # evaluate the first held-out documents only (none: all)
        overlap: int | None = (
            # tokens of context that each further window of a long document repeats (none: as in the run)
            None
        )
        # if the run's text has changed: refuse it, allow it as it is now, or take the recorded text that the
        # cache has
        changed_data: ChangedData = ChangedData.REFUSE
        score: ScoredText | None = (
            # text that is scored: completions (what training scores) or all, prompts too (none: as in the
            # run)
            None
        )
        multiple_choice: tuple[
            str, ...
        ] = ()  # files of questions (JSONL, JSON, CSV, Parquet): prompt, choices, answer
        lm_eval: tuple[str, ...] = ()  # tasks of lm-eval (the eval extra)
        lm_eval_path: str | None = None  # directory with lm-eval tasks of your own
        lm_eval_limit: int | None = None  # examples of each task (none: all)
        efficiency: bool = False  # sizes, FLOPs, cache, speed and memory
        energy: bool = False  # energy per token as well (the energy extra)
        batch_size: int = 16  # rows at a time, of multiple choice and lm-eval
        step: int | None = None  # checkpoint to evaluate (none: the newest)
        unrounded: bool = False  # of a quantized run: the text's loss with weights before rounding as well
        # run or imported model to compare the text's predictions with, token by token
        teacher: str | None = None
        # Python file that defines the classes of your own which the run's settings name
        code: str | None = None
        json: bool = False  # print the results as JSON
        data: DataConfig = of_run

    given = parse(Arguments, words, command="eval", description=eval_command.__doc__)
    if given.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {given.batch_size}")
    loaded = loading.load_model(Path(given.run_dir), step=given.step)
    # None: the held-out text of the run, and an error if it has none.
    data = given.data if any(word.startswith("--data.") for word in words) else None
    results = {"run_dir": given.run_dir, "step": loaded.step, **_evaluations(loaded, given, data)}
    print_json(results) if given.json else _show(results)
    return 0


def _evaluations(loaded: Any, given: Any, data: Any) -> dict[str, Any]:
    """What was asked for, by the name of the evaluation."""
    from slmjax import evaluation
    from slmjax.checkpoints import loading
    from slmjax.distill.teachers import load_teacher

    others = given.multiple_choice or given.lm_eval or given.efficiency or given.energy
    found: dict[str, Any] = {}
    if given.text or given.teacher or given.unrounded or data is not None or not others:
        teachers = None if given.teacher is None else load_teacher(Path(given.teacher), loaded)
        evaluated = functools.partial(
            evaluation.evaluate,
            data=data,
            max_documents=given.max_documents,
            overlap=given.overlap,
            score=given.score,
            changed_data=given.changed_data,
            log=print_aside,
        )
        result = evaluated(loaded, teachers=teachers)
        if given.unrounded:
            before = evaluated(loading.load_unrounded(Path(given.run_dir), step=given.step))
            result = dataclasses.replace(
                result, unrounded_loss=before.loss, unrounded_bits_per_byte=before.bits_per_byte
            )
        found["text"] = dataclasses.asdict(result)
    if given.multiple_choice:
        answers = (
            evaluation.answer_questions(loaded, path, batch_size=given.batch_size)
            for path in given.multiple_choice
        )
        found["multiple_choice"] = [dataclasses.asdict(one) for one in answers]
    if given.lm_eval:
        found["lm_eval"] = _lm_eval(loaded, given)
    if given.efficiency or given.energy:
        found["efficiency"] = dataclasses.asdict(evaluation.measure_efficiency(loaded, energy=given.energy))
    return found


def _lm_eval(loaded: Any, given: Any) -> dict[str, Any]:
    try:
        from slmjax.evaluation.lm_eval_adapter import run_tasks
    except ImportError as error:
        raise ValueError(
            f"--lm-eval needs lm-eval, which is not installed ({error}): pip install 'slmjax[eval]'"
        ) from error
    return run_tasks(
        loaded,
        given.lm_eval,
        include_path=given.lm_eval_path,
        limit=given.lm_eval_limit,
        batch_size=given.batch_size,
    )


# The table --------------------------------------------------------------------------------------------------
Row = tuple[str, str, str]


def _show(results: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    step = f", step {results['step']:,}" if results["step"] else ""  # an imported model has none
    table = Table()
    table.add_column("what", overflow="fold")
    table.add_column("value", justify="right")
    table.add_column("")
    for rows in (
        _text_rows(results),
        _choice_rows(results),
        _lm_eval_rows(results),
        _efficiency_rows(results),
    ):
        for row in rows:
            table.add_row(*row)
        table.add_section()
    console = Console(highlight=False)
    console.print(f"{results['run_dir']}{step}", soft_wrap=True)  # a path is not broken
    console.print(table)


def _text_rows(results: Mapping[str, Any]) -> Iterator[Row]:
    if (found := results.get("text")) is not None:
        scored = f"{found['tokens']:,} tokens of {found['documents']:,} documents"
        if found["tokens"] < found["total_tokens"]:
            scored = f"{found['tokens']:,} of {found['total_tokens']:,} tokens of {found['documents']:,} documents: the completions"
        yield "loss", f"{found['loss']:.4f}", f"nats per token, {scored}"
        yield "perplexity", f"{found['perplexity']:.2f}", ""
        yield (
            "bits per byte",
            f"{found['bits_per_byte']:.4f}",
            f"{found['bytes']:,} bytes, in {found['seconds']:.1f} s",
        )
        if found["lost_text"]:
            yield (
                "  not comparable",
                f"{found['lost_text']:.2%}",
                "of the text's bytes are lost by the tokenizer: bits per byte are too low",
            )
        for kind, role in (("bos", "documents begin with"), ("eos", "documents end with")):
            if (token := found[kind]) is not None:
                yield role, repr(token["name"]), f"id {token['id']}, {token['source']}"
        yield (
            "calibration error",
            f"{found['calibration_error']:.4f}",
            "mean gap between confidence and accuracy",
        )
        if found["unrounded_loss"] is not None:
            on = f"loss {found['unrounded_loss']:.4f} with weights before rounding"
            yield "  before rounding", f"{found['unrounded_bits_per_byte']:.4f}", on
        if found["teacher_kl"] is not None:
            yield "teacher: bits per byte", f"{found['teacher_bits_per_byte']:.4f}", "on the same tokens"
            yield "  KL(teacher, model)", f"{found['teacher_kl']:.4f}", "nats per token, temperature 1"
            yield "  agreement", f"{found['teacher_agreement']:.1%}", "same likeliest token"


def _choice_rows(results: Mapping[str, Any]) -> Iterator[Row]:
    for found in results.get("multiple_choice", ()):
        cut = f", {found['truncated']:,} prompts truncated" if found["truncated"] else ""
        on = f"{found['questions']:,} questions, chance {found['chance']:.3f}{cut}"
        yield (
            f"{Path(found['file']).name}: accuracy",
            f"{found['accuracy']:.3f}",
            f"± {found['accuracy_stderr']:.3f}, {on}",
        )
        yield "  per byte", f"{found['accuracy_per_byte']:.3f}", f"± {found['accuracy_per_byte_stderr']:.3f}"


def _lm_eval_rows(results: Mapping[str, Any]) -> Iterator[Row]:
    for task, metrics in results.get("lm_eval", {}).items():
        for name, value in metrics.items():
            if "_stderr" not in name:
                error = metrics.get(f"{name}_stderr")
                yield f"{task}: {name}", f"{value:.4f}", "" if error is None else f"± {error:.4f}"


def _efficiency_rows(results: Mapping[str, Any]) -> Iterator[Row]:
    if (found := results.get("efficiency")) is None:
        return
    yield "parameters", f"{found['parameters']:,}", f"{found['active_parameters']:,} active"
    for dtype, size in found["bytes_by_dtype"].items():
        yield f"  in {dtype}", f"{size / 1e6:,.1f} MB", ""
    yield (
        "FLOPs per token",
        f"{found['forward_flops_per_token']:.3g}",
        f"forward; {found['training_flops_per_token']:.3g} in training",
    )
    yield (
        "cache per token",
        f"{found['cache_bytes_per_token']:,.0f} B",
        f"{found['cache_bytes'] / 1e6:,.2f} MB for a full context",
    )
    yield (
        "time to first token",
        f"{1e3 * found['time_to_first_token']:,.1f} ms",
        f"prompt of {found['prompt_tokens']:,} tokens",
    )
    yield "decoding", f"{found['decode_tokens_per_second']:,.0f} tokens/s", "one sequence"
    yield "peak memory", f"{found['peak_memory_bytes'] / 1e6:,.0f} MB", ""
    if (energy := found["energy_joules_per_token"]) is not None:
        yield "energy", f"{energy:.3g} J/token", "by codecarbon, which estimates what it cannot read"
