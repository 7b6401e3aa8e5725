"""`slmjax eval`."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from slmjax.cli.fields import full_names, options_of
from slmjax.cli.options import asks_for_help, load_code, parse, peek_option, positional, print_json


def eval_command(argv: Sequence[str]) -> int:
    """Measure loss, bits per byte, benchmark accuracy or efficiency.

    slmjax eval RUN_DIR [--data.path FILE] [--multiple-choice FILE]
    slmjax eval RUN_DIR [--tasks recall,copy,parity,s3] [--task-lengths 8 32]
    slmjax eval RUN_DIR [--lm-eval TASK] [--efficiency]
    """
    from slmjax.checkpoints import loading
    from slmjax.data.config import DataConfig

    load_code(argv)
    if not asks_for_help(argv):
        # In full, since what is asked for depends on the names that begin with `--data.`.
        argv = full_names(argv, options_of(_eval_arguments(DataConfig())), command="eval")
    args = parse(_eval_arguments(_default_data(argv)), argv, command="eval", description=eval_command.__doc__)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    loaded = loading.load_model(Path(args.run_dir), step=args.step)
    # None: the held-out text of the run, and an error if it has none.
    data = args.data if any(argument.startswith("--data.") for argument in argv) else None
    results = {"run_dir": args.run_dir, "step": loaded.step, **_evaluations(loaded, args, data)}
    print_json(results) if args.json else _print_results(results)
    return 0


def _default_data(argv: Sequence[str]) -> Any:
    """Return the defaults of `--data.*`: the data settings of the run that is evaluated."""
    from slmjax.data.config import DataConfig
    from slmjax.data.provenance import own_data

    # tyro needs the defaults before it parses, so the run is the first argument that is one. The value of
    # --teacher may be a run too, and is left out.
    paths = (
        argument
        for before, argument in itertools.pairwise(["", *argv])
        if not argument.startswith("-") and before != "--teacher"
    )
    data = next(filter(None, map(own_data, map(Path, paths))), DataConfig())
    if peek_option(argv, "--data.path") is None:
        return data
    # Other text is evaluated in full, unless a fraction is given.
    return dataclasses.replace(data, heldout_fraction=0.0)


def _eval_arguments(run_data: Any) -> type:
    from slmjax.data.config import DataConfig
    from slmjax.data.provenance import ChangedData
    from slmjax.data.scored import ScoredText

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # run directory, or directory of an imported or quantized model
        run_dir: Annotated[str, *positional("RUN_DIR")]
        # measure loss and bits per byte in addition to the other evaluations (alone: always measured)
        text: bool = False
        # evaluate only the first held-out documents (none: all)
        max_documents: int | None = None
        # context tokens that each later window of a long document repeats (none: as in the run)
        overlap: int | None = None
        # if the run's text has changed: refuse it, allow the current text, or use the recorded text from the
        # cache
        changed_data: ChangedData = ChangedData.REFUSE
        # tokens to score: completions (as training does) or all, prompts included (none: as in the run)
        score: ScoredText | None = None
        # files of questions (JSONL, JSON, CSV, Parquet) with the fields prompt, choices and answer
        multiple_choice: tuple[str, ...] = ()
        # synthetic tasks, for a model that is trained on them: recall, copy, parity, s3
        tasks: tuple[str, ...] = ()
        # lengths of their examples (none: those of 4, 8, ..., 128 that fit the context)
        task_lengths: tuple[int, ...] | None = None
        # examples of each synthetic task and length
        task_examples: int = 200
        # tasks of lm-eval (needs the eval extra)
        lm_eval: tuple[str, ...] = ()
        # directory with your own lm-eval tasks
        lm_eval_path: str | None = None
        # examples of each lm-eval task (none: all)
        lm_eval_limit: int | None = None
        # measure sizes, FLOPs, cache, speed and memory
        efficiency: bool = False
        # also measure energy per token (needs the energy extra)
        energy: bool = False
        # sequences per batch, for multiple choice and lm-eval
        batch_size: int = 16
        # checkpoint to evaluate (none: the newest)
        step: int | None = None
        # for a quantized run: also measure the loss with the weights before rounding
        unrounded: bool = False
        # run or imported model whose predictions on the text are compared with the model's
        teacher: str | None = None
        # Python file that defines your own classes, if the run's config names any
        code: str | None = None
        # print the results as JSON
        json: bool = False
        data: DataConfig = run_data

    return Arguments


def _evaluations(loaded: Any, args: Any, data: Any) -> dict[str, Any]:
    """Run the requested evaluations and return their results by name."""
    from slmjax import evaluation

    others = args.multiple_choice or args.tasks or args.lm_eval or args.efficiency or args.energy
    results: dict[str, Any] = {}
    if args.text or args.teacher or args.unrounded or data is not None or not others:
        results["text"] = dataclasses.asdict(_evaluate_text(loaded, args, data))
        # Arrays, which a run keeps in a file of their own.
        del results["text"]["document_sums"]
    if args.multiple_choice:
        accuracies = (
            evaluation.answer_questions(loaded, path, batch_size=args.batch_size)
            for path in args.multiple_choice
        )
        results["multiple_choice"] = [dataclasses.asdict(accuracy) for accuracy in accuracies]
    if args.tasks:
        accuracies = evaluation.evaluate_tasks(
            loaded,
            _synthetic_tasks(args.tasks),
            lengths=args.task_lengths,
            num_examples=args.task_examples,
            batch_size=args.batch_size,
        )
        results["tasks"] = [dataclasses.asdict(accuracy) for accuracy in accuracies]
    if args.lm_eval:
        results["lm_eval"] = _lm_eval(loaded, args)
    if args.efficiency or args.energy:
        results["efficiency"] = dataclasses.asdict(evaluation.measure_efficiency(loaded, energy=args.energy))
    return results


def _evaluate_text(loaded: Any, args: Any, data: Any) -> Any:
    from slmjax import evaluation
    from slmjax.checkpoints import loading
    from slmjax.distill.teachers import load_teacher

    teachers = None if args.teacher is None else load_teacher(Path(args.teacher), loaded)
    evaluate = functools.partial(
        evaluation.evaluate,
        data=data,
        max_documents=args.max_documents,
        overlap=args.overlap,
        score=args.score,
        changed_data=args.changed_data,
    )
    result = evaluate(loaded, teachers=teachers)
    if not args.unrounded:
        return result
    unrounded = evaluate(loading.load_unrounded(Path(args.run_dir), step=args.step))
    return dataclasses.replace(
        result, unrounded_loss=unrounded.loss, unrounded_bits_per_byte=unrounded.bits_per_byte
    )


def _synthetic_tasks(names: Sequence[str]) -> list[Any]:
    """Return tasks by their names, which may also be joined by commas."""
    from slmjax.config import near_names
    from slmjax.data.synthetic_tasks import SyntheticTask

    known = {task.value: task for task in SyntheticTask}
    split = [name.strip() for part in names for name in part.split(",") if name.strip()]
    if unknown := [name for name in split if name not in known]:
        raise ValueError(
            f"--tasks {unknown[0]!r}: the tasks are {', '.join(known)}.{near_names(unknown[0], known)}"
        )
    return [known[name] for name in dict.fromkeys(split)]


def _lm_eval(loaded: Any, args: Any) -> dict[str, Any]:
    try:
        from slmjax.evaluation.lm_eval_adapter import run_tasks
    except ImportError as error:
        raise ValueError(
            f"--lm-eval needs lm-eval, which is not installed ({error}): pip install 'slmjax[eval]'"
        ) from error
    return run_tasks(
        loaded,
        args.lm_eval,
        include_path=args.lm_eval_path,
        limit=args.lm_eval_limit,
        batch_size=args.batch_size,
    )


# Table of results -------------------------------------------------------------------------------------------
# name, value, explanation
Row = tuple[str, str, str]


def _print_results(results: Mapping[str, Any]) -> None:
    from slmjax.telemetry.columns import print_columns

    step = f", step {results['step']:,}" if results["step"] else ""  # none for an imported model
    kinds = (_text_rows, _choice_rows, _task_rows, _lm_eval_rows, _efficiency_rows)
    rows = [row for rows_of in kinds for row in rows_of(results)]
    print(f"{results['run_dir']}{step}")
    print_columns(("metric", "value", ""), rows, right=(1,))


def _text_rows(results: Mapping[str, Any]) -> Iterator[Row]:
    if (text := results.get("text")) is None:
        return
    scored = f"{text['tokens']:,} tokens of {text['documents']:,} documents"
    if text["tokens"] < text["total_tokens"]:
        scored = (
            f"{text['tokens']:,} of {text['total_tokens']:,} tokens of {text['documents']:,} documents: "
            "the completions"
        )
    yield "loss", f"{text['loss']:.4f}", f"nats per token, {scored}"
    yield "perplexity", f"{text['perplexity']:.2f}", ""
    timing = f"{text['bytes']:,} bytes, in {text['seconds']:.1f} s"
    yield "bits per byte", f"{text['bits_per_byte']:.4f}", timing
    if text["lost_text"]:
        yield (
            "  not comparable",
            f"{text['lost_text']:.2%}",
            "of the text's bytes are lost by the tokenizer: bits per byte are too low",
        )
    for kind, role in (("bos", "documents begin with"), ("eos", "documents end with")):
        if (token := text[kind]) is not None:
            yield role, repr(token["name"]), f"id {token['id']}, {token['source']}"
    calibration = "mean gap between confidence and accuracy"
    yield "calibration error", f"{text['calibration_error']:.4f}", calibration
    if text["unrounded_loss"] is not None:
        loss = f"loss {text['unrounded_loss']:.4f} with the weights before rounding"
        yield "  before rounding", f"{text['unrounded_bits_per_byte']:.4f}", loss
    if text["teacher_kl"] is not None:
        yield "teacher: bits per byte", f"{text['teacher_bits_per_byte']:.4f}", "on the same tokens"
        yield "  KL(teacher, model)", f"{text['teacher_kl']:.4f}", "nats per token, temperature 1"
        yield "  agreement", f"{text['teacher_agreement']:.1%}", "same most likely token"


def _choice_rows(results: Mapping[str, Any]) -> Iterator[Row]:
    for result in results.get("multiple_choice", ()):
        cut = f", {result['truncated']:,} prompts truncated" if result["truncated"] else ""
        on = f"{result['questions']:,} questions, chance {result['chance']:.3f}{cut}"
        yield (
            f"{Path(result['file']).name}: accuracy",
            f"{result['accuracy']:.3f}",
            f"± {result['accuracy_stderr']:.3f}, {on}",
        )
        yield (
            "  per byte",
            f"{result['accuracy_per_byte']:.3f}",
            f"± {result['accuracy_per_byte_stderr']:.3f}",
        )


def _task_rows(results: Mapping[str, Any]) -> Iterator[Row]:
    for result in results.get("tasks", ()):
        trained = result["trained_length"]
        scope = "not trained on it" if trained is None else f"trained up to {trained}"
        yield (
            f"{result['task']}, length {result['length']}: accuracy",
            f"{result['accuracy']:.3f}",
            f"± {result['accuracy_stderr']:.3f}, chance {result['chance']:.3f}, "
            f"{result['bits_per_symbol']:.3f} bits per symbol, {scope}",
        )


def _lm_eval_rows(results: Mapping[str, Any]) -> Iterator[Row]:
    for task, metrics in results.get("lm_eval", {}).items():
        for name, value in metrics.items():
            if "_stderr" not in name:
                error = metrics.get(f"{name}_stderr")
                yield f"{task}: {name}", f"{value:.4f}", "" if error is None else f"± {error:.4f}"


def _efficiency_rows(results: Mapping[str, Any]) -> Iterator[Row]:
    if (result := results.get("efficiency")) is None:
        return
    yield "parameters", f"{result['parameters']:,}", f"{result['active_parameters']:,} active"
    for dtype, size in result["bytes_by_dtype"].items():
        yield f"  in {dtype}", f"{size / 1e6:,.1f} MB", ""
    yield (
        "FLOPs per token",
        f"{result['forward_flops_per_token']:.3g}",
        f"forward; {result['training_flops_per_token']:.3g} in training",
    )
    yield (
        "cache per token",
        f"{result['cache_bytes_per_token']:,.0f} B",
        f"{result['cache_bytes'] / 1e6:,.2f} MB for a full context",
    )
    yield (
        "time to first token",
        f"{1e3 * result['time_to_first_token']:,.1f} ms",
        f"prompt of {result['prompt_tokens']:,} tokens",
    )
    speed = result["decode_tokens_per_second"]
    is_measured = not math.isnan(speed)
    yield "decoding", f"{speed:,.0f} tokens/s" if is_measured else "too short to measure", "one sequence"
    yield "peak memory", f"{result['peak_memory_bytes'] / 1e6:,.0f} MB", ""
    if (energy := result["energy_joules_per_token"]) is not None:
        yield "energy", f"{energy:.3g} J/token", "from codecarbon, which estimates what it cannot measure"
