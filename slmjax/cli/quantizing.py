"""`slmjax quantize` and `slmjax verify-export`."""

import dataclasses
import enum
import itertools
from collections.abc import Sequence
from typing import Annotated, Any

from slmjax.cli.options import by_place, load_code, parse, print_aside, print_json, repeated


class Method(enum.Enum):
    """How a trained model is quantized."""

    RTN = "rtn"  # each number to the nearest level


def quantize_command(words: Sequence[str]) -> int:
    """round a model to number formats: slmjax quantize RUN_OR_MODEL_DIR OUT_DIR --format q4_0 [--clip
    search]
    """
    from slmjax.quantization.ptq.round_to_nearest import Clip, quantize_model
    from slmjax.quantization.rules import quant_of

    load_code(words)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        source: Annotated[
            str, *by_place("RUN_OR_MODEL_DIR")
        ]  # run directory, or directory of an imported model
        out: Annotated[str, *by_place("OUT_DIR")]  # directory to write
        method: Method = Method.RTN  # how numbers are rounded
        format: str | None = (
            # formats WEIGHTS[+INPUTS[+CACHE]] of all matrices that no --rule names (none: floating point)
            None
        )
        # REGEX=WEIGHTS[+INPUTS] for paths that the expression is found in, or REGEX=none; given again for
        # each; the first that fits counts
        rule: Annotated[tuple[str, ...], repeated()] = ()
        # scales as the format computes them, or of each group the one with the smallest squared error
        clip: Clip = Clip.NONE
        step: int | None = None  # checkpoint of the run (none: the newest)
        # Python file that defines the classes of your own which the run's settings name
        code: str | None = None
        json: bool = False  # print what was written as JSON

    given = parse(Arguments, words, command="quantize", description=quantize_command.__doc__)
    rules = [_rule(text) for text in given.rule] + (
        [] if given.format is None else list(quant_of(given.format).phases[0].rules)
    )
    if not rules:
        raise ValueError(
            "say which number format: --format q4_0, or --rule REGEX=FORMAT for some of the matrices"
        )
    found = quantize_model(given.source, given.out, rules=rules, clip=given.clip, step=given.step)
    _tell_quantized(found, is_json=given.json)
    return 0


def _rule(text: str) -> Any:
    """The rule that REGEX=FORMAT stands for; an expression may have an = in it, a format has none."""
    from slmjax.quantization.rules import NOTHING, QuantRule, quant_of

    paths, _, name = text.rpartition("=")
    if not paths or not name:
        raise ValueError(f"--rule is REGEX=FORMAT, as in --rule 'head=q8_0', got {text!r}")
    if name == NOTHING:
        return QuantRule(paths=paths)
    *cache, rule = quant_of(name).phases[0].rules
    if cache:
        raise ValueError(
            f"--rule {text!r} has a format for caches, which are not parameters: give it with --format"
        )
    return dataclasses.replace(rule, paths=paths)


def _tell_quantized(found: Any, *, is_json: bool) -> None:
    figures = {"nearest_error": found.nearest_error, "error": found.error}
    if is_json:
        print_json({**dataclasses.asdict(found), **figures})
        return
    formats: dict[str, tuple[int, int, int]] = {}
    for one in found.matrices:
        count, numbers, size = formats.get(one.format, (0, 0, 0))
        formats[one.format] = count + 1, numbers + one.numbers, size + one.bytes
    print(f"{found.path}: {found.parameters:,} parameters, {found.bytes / 1e6:,.2f} MB with codes packed")
    for name, (count, numbers, size) in formats.items():
        print(
            f"  {name}: {count} matrices, {numbers:,} numbers, {size / 1e6:,.2f} MB, "
            f"{8 * size / numbers:.2f} bits a number"
        )
    searched = f", {found.error:.4%} with the best clips" if found.error != found.nearest_error else ""
    print(f"squared error over squares: {found.nearest_error:.4%} with the formats' own scales{searched}")
    print(f"try: slmjax export {found.path} {found.path}.gguf --to gguf")


def verify_export_command(words: Sequence[str]) -> int:
    """compare an exported file with the model, in the engine that runs it: slmjax verify-export
    RUN_OR_MODEL_DIR FILE.gguf
    """
    from slmjax.convert.verify.export import DEFAULT_TOKENS, DEFAULT_WINDOW, verify_export
    from slmjax.data.config import DataConfig
    from slmjax.data.provenance import ChangedData

    load_code(words)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        source: Annotated[
            str, *by_place("RUN_OR_MODEL_DIR")
        ]  # run directory, or directory of an imported or quantized model
        file: Annotated[str, *by_place("FILE.gguf")]  # what was exported
        data: str | None = None  # text to compare losses on (none: the held-out text of the run)
        # if the run's text has changed: refuse it, allow it as it is now, or take the recorded text that the
        # cache has
        changed_data: ChangedData = ChangedData.REFUSE
        max_tokens: int = DEFAULT_TOKENS  # tokens of the text
        window: int = DEFAULT_WINDOW  # tokens that are scored in one go
        step: int | None = None  # checkpoint of the run (none: the newest)
        # Python file that defines the classes of your own which the run's settings name
        code: str | None = None
        json: bool = False  # print the comparison as JSON

    given = parse(Arguments, words, command="verify-export", description=verify_export_command.__doc__)
    data = None if given.data is None else DataConfig(path=given.data, heldout_fraction=0.0)
    found = verify_export(
        given.source,
        given.file,
        data=data,
        max_tokens=given.max_tokens,
        window=given.window,
        step=given.step,
        changed_data=given.changed_data,
        log=print_aside,
    )
    if given.json:
        print_json({**dataclasses.asdict(found), **_verdicts(found)})
    else:
        _show(found)
    return 0 if found.holds else 1


def _verdicts(found: Any) -> dict[str, Any]:
    loss = (
        {} if found.loss is None else {"loss_tolerance": found.loss.tolerance, "loss_holds": found.loss.holds}
    )
    held = {
        "bytes_hold": found.bytes_hold,
        "products_hold": found.products_hold,
        **loss,
        "tokenizer_holds": found.tokenizer.holds,
    }
    return {**held, "holds": found.holds}


def _show(found: Any) -> None:
    """In words; what does not hold is named."""
    types: dict[str, int] = {}
    for one in found.tensors:
        types[one.type or "missing"] = types.get(one.type or "missing", 0) + 1
    print(f"{found.file} against {found.run}, by {found.engine}")
    kinds = ", ".join(f"{count} {name}" for name, count in types.items())
    print(
        f"1 bytes     {_word(found.bytes_hold)}: {len(found.tensors)} tensors ({kinds}) decode to what the "
        "model multiplies with"
    )
    if found.changed_rows is not None and found.changed_rows[0]:
        changed, rows = found.changed_rows
        print(
            f"    codes or scales of {changed:,} of {rows:,} rows are others than on the devices that it was "
            "trained on"
        )
    for text in found.settings:
        print(f"    the file's settings differ: {text}")
    for name in found.extra:
        print(f"    {name}: the model has no place for it")
    for one in found.tensors:
        if not one.holds:
            print(f"    {_tensor_text(one)}")
    if found.products:
        _show_products(found)
    else:
        print("2 products  not compared: the file is of another model")
    if found.loss is None:
        print("3 loss      not compared: the engine cannot load the file as this model")
    else:
        _show_loss(found.loss)
    _show_tokenizer(found.tokenizer)


def _show_products(found: Any) -> None:
    worst = max((one.error for one in found.products), default=0.0)
    coded, flipped = (
        sum(getattr(one, name) for one in found.products) for name in ("input_codes", "flipped_codes")
    )
    inputs = f", of {coded:,} codes of inputs {flipped:,} differ" if coded else ""
    print(
        f"2 products  {_word(found.products_hold)}: {len(found.products)} matrices, largest difference "
        f"{worst:.1e} of the sums{inputs}"
    )
    for one in found.products:
        if not one.holds:
            print(
                f"    {one.name}: {one.error:.1e}, where sums in another order differ by {one.bound:.1e} at "
                "the most"
            )


def _show_loss(loss: Any) -> None:
    print(
        f"3 loss      {_word(loss.holds)}: {loss.engine:.6f} nats per token in the engine, {loss.ours:.6f} "
        f"in ours ({loss.tokens:,} tokens)"
    )
    print(
        f"    difference {loss.difference:+.1e} ± {loss.standard_error:.1e}; noise of 1e-6 moves ours by "
        f"{loss.floor:.1e}; "
        f"may be {loss.tolerance:.1e}"
    )
    if loss.as_trained != loss.ours:
        print(
            f"    with inputs as in training, ours is {loss.as_trained:.6f}: there inputs are rounded "
            "otherwise, or in bfloat16"
        )


def _show_tokenizer(check: Any) -> None:
    engine = (
        f"the engine gives other ids for {len(check.differing_texts):,} of {check.texts:,} texts"
        if check.texts
        else "no text encoded"
    )
    print(
        f"4 tokenizer {_word(check.holds)}: {len(check.differences):,} of {check.keys:,} keys differ, "
        f"{engine}"
    )
    for text in check.differences:
        print(f"    {text}")
    for one in check.differing_texts:
        print(f"    {one.text[:40]!r}: {one.reason or _ids_text(one.ours, one.engine)}")


def _ids_text(ours: Sequence[int], engine: Sequence[int]) -> str:
    """The first ids at which two lists differ, in words."""
    shared = sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, engine, strict=False))
    )
    shown = slice(shared, shared + 6)
    return f"ids from {shared} on are {list(engine[shown])} in the engine, {list(ours[shown])} in the model"


def _tensor_text(one: Any) -> str:
    if one.is_missing:
        return f"{one.name}: the file has none of this shape"
    codes = (
        ""
        if one.differing_codes is None
        else f" ({one.differing_codes:,} codes, {one.differing_scales:,} scales)"
    )
    return f"{one.name} ({one.type}): {one.differing:,} of {one.numbers:,} numbers differ{codes}"


def _word(holds: bool) -> str:
    return "holds" if holds else "FAILS"
