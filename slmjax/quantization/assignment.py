"""Assignments: for every parameter and cache its number format, or why it stays in floating point.

Dims of shapes are those of one layer. The groups of a weight lie along the dim that its product sums over:
the second to last of a matrix [in, out] or of experts [E, in, out], the last of a table [V, D].
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from slmjax.formats.presets import name_of
from slmjax.formats.spec import Granularity, QuantSpec, check_width
from slmjax.quantization.estimators import (
    SIGN,
    Calibrated,
    Estimator,
    LearnedClip,
    LearnedScale,
    LearnedScaleAndOffset,
    QuantizerParams,
    StraightThrough,
)
from slmjax.quantization.rules import QuantRule

TABLES = ("embed/table", "embed/per_layer", "head/weight")
CACHE = "/mixer/cache"  # the end of the path of a mixer's cache
# Norms, biases and sinks have none of these names.
_WEIGHTS = re.compile(r"(^embed/(table|per_layer)|(^|/)weight|/experts/(gate|up|down))$")
# Estimators whose scales are parameters or buffers, not computed from the numbers.
SCALE_ESTIMATORS = (Calibrated, LearnedClip, LearnedScale, LearnedScaleAndOffset)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorQuant:
    """How one tensor is quantized: format, estimator, and the axis of its groups."""

    spec: QuantSpec
    estimator: Estimator
    axis: int  # of the groups, from the end
    # store a sign with each scale though this format has none: that of another phase has, and shapes stay the
    # same
    keeps_sign: bool = False

    def init_params(self, x: Float[Array, "..."]) -> QuantizerParams:
        """Return the initial quantizer parameters for `x`."""
        params = self.estimator.init_params(x, self.spec, axis=self.axis)
        return {SIGN: jnp.ones_like(params["log_scale"]), **params} if self.keeps_sign else params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment:
    """The formats of one path."""

    path: str  # logical
    shape: tuple[int, ...]  # of the parameter; of a cache what it stores of a token
    weight: TensorQuant | None = None  # format of the parameter, or of the cache
    input: TensorQuant | None = None  # format of the inputs that the parameter is multiplied with
    reason: str = ""  # why it stays in floating point; empty where it does not


def axis_of(path: str) -> int:
    """Return the axis of a weight's groups, from the end: the dim that its product sums over."""
    # A table is [V, D], and its product with hidden states sums over D.
    return -1 if path in TABLES else -2


def assign_formats(
    rules: Sequence[QuantRule], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Assignment]:
    """Return the assignment of every path.

    Args:
      rules: the first that matches a path applies. Rules that have a format for caches alone are skipped for
        parameters, and rules that have none are skipped for caches.
      shapes: of every parameter, and of every cache under its path, which ends in `mixer/cache`.

    Raises:
      ValueError: a rule is the first for no path, a format does not divide a parameter's width, or an
        estimator does not suit the inputs.
    """
    used: set[tuple[int, bool]] = set()  # indices of rules, and whether for a cache
    assignments = {path: _assign(rules, path, shape, used) for path, shape in shapes.items()}
    # A rule with formats for parameters and for caches must be the first for some of each.
    for index, rule in enumerate(rules):
        parts = [is_cache for is_cache in (False, True) if _is_for(rule, is_cache=is_cache)]
        if missing := [is_cache for is_cache in parts if (index, is_cache) not in used]:
            examples = [path for path in shapes if _reason_to_keep(path) is None][:3]
            what = "cache" if missing[0] else "parameter"
            raise ValueError(
                f"quant: the rule for {rule.paths!r} never applies to a {what}: it matches none, or earlier "
                "rules match everything that it matches. Example paths: "
                f"{', '.join(examples)}; `slmjax formats table` lists all. Correct the rule, move it up or "
                "leave it out"
            )
    return assignments


def _reason_to_keep(path: str) -> str | None:
    """Why a parameter is never quantized; None for one that can be."""
    if path.endswith(CACHE):
        return None
    # A small part of the weights: rounding it would change which experts are selected.
    if "/router/" in path or path.endswith("router_bias"):
        return "chooses the experts: stays in floating point"
    # A single column, whose rounding errors do not average out over outputs.
    if "/shared_gate/" in path:
        return "scales all of the shared expert: stays in floating point"
    if path.startswith("positions/"):
        return "added to embeddings, not multiplied with"
    return None if _WEIGHTS.search(path) else "no matrix that inputs are multiplied with"


def _assign(
    rules: Sequence[QuantRule], path: str, shape: tuple[int, ...], used: set[tuple[int, bool]]
) -> Assignment:
    if reason := _reason_to_keep(path):
        return Assignment(path=path, shape=shape, reason=reason)
    is_cache = path.endswith(CACHE)
    candidates = (
        index for index, rule in enumerate(rules) if _is_for(rule, is_cache=is_cache) and rule.matches(path)
    )
    if (index := next(candidates, None)) is None:
        return Assignment(path=path, shape=shape, reason="no rule names it")
    # A rule that is used by nothing is a mistake, which `assign_formats` reports.
    used.add((index, is_cache))
    rule = rules[index]
    if is_cache:
        assert rule.cache is not None
        check_width(rule.cache, shape[-1], what=path, name=name_of(rule.cache))
        _check_causal(rule.cache, path)
        return Assignment(
            path=path, shape=shape, weight=TensorQuant(spec=rule.cache, estimator=StraightThrough(), axis=-1)
        )
    weight = _weight(rule, path, shape)
    reason = "" if weight is not None else f"the rule for {rule.paths!r} leaves it so"
    return Assignment(path=path, shape=shape, weight=weight, input=_input(rule, path, shape), reason=reason)


def _is_for(rule: QuantRule, *, is_cache: bool) -> bool:
    return (
        rule.cache is not None
        if is_cache
        else rule.cache is None or rule.weight is not None or rule.input is not None
    )


def _weight(rule: QuantRule, path: str, shape: tuple[int, ...]) -> TensorQuant | None:
    if rule.weight is None:
        return None
    axis = axis_of(path)
    spec = rule.weight
    try:
        check_width(spec, shape[axis], what=path, name=name_of(spec))
    except ValueError:
        # The fallback is for widths that the first format does not divide.
        if rule.fallback is None:
            raise
        spec = rule.fallback
        check_width(spec, shape[axis], what=path, name=name_of(spec))
    return TensorQuant(spec=spec, estimator=rule.for_weight(spec), axis=axis)


def _input(rule: QuantRule, path: str, shape: tuple[int, ...]) -> TensorQuant | None:
    if rule.input is None:
        return None
    check_width(rule.input, shape[axis_of(path)], what=f"the input of {path}", name=name_of(rule.input))
    # Dynamic scales by default: those of each token are computed from it alone.
    estimator = rule.input_estimator or StraightThrough()
    if isinstance(estimator, SCALE_ESTIMATORS) and rule.input.granularity is not Granularity.PER_TENSOR:
        raise ValueError(
            f"the input of {path}: {type(estimator).__name__} has one scale for all tokens, and "
            f"{name_of(rule.input)} has one for "
            "each: take a format with granularity=Granularity.PER_TENSOR, or leave input_estimator out"
        )
    if not isinstance(estimator, SCALE_ESTIMATORS):
        _check_causal(rule.input, f"the input of {path}")
    # The hidden layer of experts has a quantizer without parameters (`ShardActivationQuantizer`).
    elif path.endswith("/experts/down"):
        raise ValueError(
            f"the input of {path}: {type(estimator).__name__} is not there for the hidden layer of experts: "
            "leave input_estimator out, and "
            "its scales are computed for each token"
        )
    return TensorQuant(spec=rule.input, estimator=estimator, axis=-1)


def _check_causal(spec: QuantSpec, what: str) -> None:
    """Raise ValueError for a computed scale that all tokens share.

    A later token would change how an earlier one is rounded: the model would no longer be causal.
    """
    if spec.granularity is Granularity.PER_TENSOR or spec.is_two_level:
        raise ValueError(
            f"{what}: {name_of(spec)} computes a scale from all tokens, so that a token would see later "
            "ones: take a format with groups or "
            "rows of a token, or for inputs one with granularity=Granularity.PER_TENSOR and "
            "input_estimator=Calibrated()"
        )
