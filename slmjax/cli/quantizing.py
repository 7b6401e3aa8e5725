"""`slmjax quantize` and `slmjax verify-export`."""

import dataclasses
import enum
import itertools
from collections.abc import Sequence
from typing import Annotated, Any

from slmjax.cli.options import load_code, parse, positional, print_json, repeated


class Method(enum.Enum):
    """Methods of post-training quantization."""

    RTN = "rtn"  # round each weight to the nearest level


def quantize_command(argv: Sequence[str]) -> int:
    """Quantize a trained or imported model, without training.

    slmjax quantize RUN_OR_MODEL_DIR OUT_DIR --format q4_0 [--clip search]
    """
    from slmjax.quantization.ptq.round_to_nearest import Clip, quantize_model
    from slmjax.quantization.rules import quant_of

    load_code(argv)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # run directory, or directory of an imported or quantized model
        source: Annotated[str, *positional("RUN_OR_MODEL_DIR")]
        # directory to write
        out: Annotated[str, *positional("OUT_DIR")]
        # method of quantization
        method: Method = Method.RTN
        # formats WEIGHTS[+INPUTS[+CACHE]] of all matrices without a --rule (none: floating point)
        format: str | None = None
        # REGEX=WEIGHTS[+INPUTS] for the paths that the expression matches, or REGEX=none; may be repeated,
        # the first match counts
        rule: Annotated[tuple[str, ...], repeated()] = ()
        # none: scales as the format computes them; search: for each group the scale with the smallest
        # squared error
        clip: Clip = Clip.NONE
        # checkpoint of the run (none: the newest)
        step: int | None = None
        # Python file that defines your own classes, if the run's config names any
        code: str | None = None
        # print a summary of what was written as JSON
        json: bool = False

    args = parse(Arguments, argv, command="quantize", description=quantize_command.__doc__)
    rules = [_parse_rule(text) for text in args.rule]
    if args.format is not None:
        rules += quant_of(args.format).phases[0].rules
    if not rules:
        raise ValueError(
            "no number format given: use --format q4_0, or --rule REGEX=FORMAT for some of the matrices"
        )
    quantized = quantize_model(args.source, args.out, rules=rules, clip=args.clip, step=args.step)
    _print_quantized(quantized, is_json=args.json)
    return 0


def _parse_rule(text: str) -> Any:
    """Return the rule for REGEX=FORMAT."""
    from slmjax.quantization.rules import NOTHING, QuantRule, quant_of

    # The expression may contain "=", a format does not: split at the last one.
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


def _print_quantized(quantized: Any, *, is_json: bool) -> None:
    errors = {"nearest_error": quantized.nearest_error, "error": quantized.error}
    if is_json:
        print_json({**dataclasses.asdict(quantized), **errors})
        return
    formats: dict[str, tuple[int, int, int]] = {}
    for matrix in quantized.matrices:
        count, numbers, size = formats.get(matrix.format, (0, 0, 0))
        formats[matrix.format] = count + 1, numbers + matrix.numbers, size + matrix.bytes
    print(
        f"{quantized.path}: {quantized.parameters:,} parameters, {quantized.bytes / 1e6:,.2f} MB with packed "
        "codes"
    )
    for name, (count, numbers, size) in formats.items():
        print(
            f"  {name}: {count} matrices, {numbers:,} weights, {size / 1e6:,.2f} MB, "
            f"{8 * size / numbers:.2f} bits per weight"
        )
    searched = ""
    if quantized.error != quantized.nearest_error:
        searched = f", {quantized.error:.4%} with the best clipping"
    print(f"relative squared error: {quantized.nearest_error:.4%} with the formats' own scales{searched}")
    print(f"try: slmjax export {quantized.path} {quantized.path}.gguf --to gguf")


def verify_export_command(argv: Sequence[str]) -> int:
    """Compare an exported GGUF file with the model, in llama.cpp.

    slmjax verify-export RUN_OR_MODEL_DIR FILE.gguf
    """
    from slmjax.convert.verify.export import DEFAULT_TOKENS, DEFAULT_WINDOW, verify_export
    from slmjax.data.config import DataConfig
    from slmjax.data.provenance import ChangedData

    load_code(argv)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # run directory, or directory of an imported or quantized model
        source: Annotated[str, *positional("RUN_OR_MODEL_DIR")]
        # the exported file
        file: Annotated[str, *positional("FILE.gguf")]
        # text on which losses are compared (none: the held-out text of the run)
        data: str | None = None
        # if the run's text has changed: refuse it, allow the current text, or use the recorded text from the
        # cache
        changed_data: ChangedData = ChangedData.REFUSE
        # tokens of the text to score
        max_tokens: int = DEFAULT_TOKENS
        # tokens per window; each is scored on its own
        window: int = DEFAULT_WINDOW
        # checkpoint of the run (none: the newest)
        step: int | None = None
        # Python file that defines your own classes, if the run's config names any
        code: str | None = None
        # print the comparison as JSON
        json: bool = False

    args = parse(Arguments, argv, command="verify-export", description=verify_export_command.__doc__)
    verification = verify_export(
        args.source,
        args.file,
        data=None if args.data is None else DataConfig(path=args.data, heldout_fraction=0.0),
        max_tokens=args.max_tokens,
        window=args.window,
        step=args.step,
        changed_data=args.changed_data,
    )
    if args.json:
        print_json({**dataclasses.asdict(verification), **_verdicts(verification)})
    else:
        _print_verification(verification)
    return 0 if verification.holds else 1


def _verdicts(verification: Any) -> dict[str, Any]:
    """Return the computed properties, which asdict leaves out."""
    loss = verification.loss
    return {
        "bytes_hold": verification.bytes_hold,
        "products_hold": verification.products_hold,
        **({} if loss is None else {"loss_tolerance": loss.tolerance, "loss_holds": loss.holds}),
        "tokenizer_holds": verification.tokenizer.holds,
        "holds": verification.holds,
    }


# Printing a verification ------------------------------------------------------------------------------------
def _print_verification(verification: Any) -> None:
    """Print one line for each of the four levels, and one for each difference."""
    print(f"{verification.file} against {verification.run}, by {verification.engine}")
    _print_tensors(verification)
    if verification.products:
        _print_products(verification.products, holds=verification.products_hold)
    else:
        print("2 products  not compared: the file holds another model")
    if verification.loss is None:
        print("3 loss      not compared: the engine cannot load the file as this model")
    else:
        _print_loss(verification.loss)
    _print_tokenizer(verification.tokenizer)


def _print_tensors(verification: Any) -> None:
    types: dict[str, int] = {}
    for tensor in verification.tensors:
        types[tensor.type or "missing"] = types.get(tensor.type or "missing", 0) + 1
    kinds = ", ".join(f"{count} {name}" for name, count in types.items())
    print(
        f"1 bytes     {_verdict(verification.bytes_hold)}: {len(verification.tensors)} tensors ({kinds}) "
        "dequantize to the model's weights"
    )
    if verification.changed_rows is not None and verification.changed_rows[0]:
        changed, rows = verification.changed_rows
        print(
            f"    {changed:,} of {rows:,} rows have codes or scales that differ from those on the devices of "
            "the training"
        )
    for text in verification.settings:
        print(f"    the file's settings differ: {text}")
    for name in verification.extra:
        print(f"    {name}: not a tensor of the model")
    for tensor in verification.tensors:
        if not tensor.holds:
            print(f"    {_tensor_text(tensor)}")


def _print_products(products: Sequence[Any], *, holds: bool) -> None:
    worst = max(product.error for product in products)
    num_codes = sum(product.input_codes for product in products)
    num_flipped = sum(product.flipped_codes for product in products)
    inputs = f"; {num_flipped:,} of {num_codes:,} input codes differ" if num_codes else ""
    print(
        f"2 products  {_verdict(holds)}: {len(products)} matrices, largest difference {worst:.1e} relative "
        f"to the sums{inputs}"
    )
    for product in products:
        if not product.holds:
            print(
                f"    {product.name}: {product.error:.1e}, but the order of summation explains at most "
                f"{product.bound:.1e}"
            )


def _print_loss(loss: Any) -> None:
    print(
        f"3 loss      {_verdict(loss.holds)}: {loss.engine:.6f} nats per token in the engine, "
        f"{loss.ours:.6f} in slmjax ({loss.tokens:,} tokens)"
    )
    print(
        f"    difference {loss.difference:+.1e} ± {loss.standard_error:.1e}, tolerance {loss.tolerance:.1e}; "
        f"noise of 1e-6 changes the loss in slmjax by {loss.floor:.1e}"
    )
    if loss.as_trained != loss.ours:
        print(
            f"    with activations as in training, the loss in slmjax is {loss.as_trained:.6f}: training "
            "quantizes them differently, or computes in bfloat16"
        )


def _print_tokenizer(check: Any) -> None:
    engine = "no text encoded"
    if check.texts:
        engine = f"the engine's ids differ for {len(check.differing_texts):,} of {check.texts:,} texts"
    print(
        f"4 tokenizer {_verdict(check.holds)}: {len(check.differences):,} of {check.keys:,} keys differ, "
        f"{engine}"
    )
    for text in check.differences:
        print(f"    {text}")
    for text in check.differing_texts:
        print(f"    {text.text[:40]!r}: {text.reason or _ids_text(text.ours, text.engine)}")


def _ids_text(ours: Sequence[int], engine: Sequence[int]) -> str:
    """Describe the first ids in which two lists differ."""
    pairs = zip(ours, engine, strict=False)
    first = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    shown = slice(first, first + 6)
    return f"ids from {first} on are {list(engine[shown])} in the engine, {list(ours[shown])} in the model"


def _tensor_text(tensor: Any) -> str:
    if tensor.is_missing:
        return f"{tensor.name}: missing in the file, or of another shape"
    codes = ""
    if tensor.differing_codes is not None:
        codes = f" ({tensor.differing_codes:,} codes, {tensor.differing_scales:,} scales)"
    return f"{tensor.name} ({tensor.type}): {tensor.differing:,} of {tensor.numbers:,} values differ{codes}"


def _verdict(holds: bool) -> str:
    return "holds" if holds else "FAILS"
