"""What the rules of quantization come to: for every parameter and cache its format, or why it stays in
floating point.

Dims of shapes are those of one layer. A weight has its groups along the dim that is contracted: the second to
last of a matrix [in, out] or of experts [E, in, out], the last of a table [V, D].
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

TABLES = ("embed/table", "head/weight")
CACHE = "/mixer/cache"  # ends the path of what a mixer remembers of tokens
_WEIGHTS = re.compile(r"(^embed/table|(^|/)weight|/experts/(gate|up|down))$")
SCALE_ESTIMATORS = (Calibrated, LearnedClip, LearnedScale, LearnedScaleAndOffset)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorQuant:
    """A format, and how it is trained."""

    spec: QuantSpec
    estimator: Estimator
    axis: int  # along which groups lie, from the end
    # whether a sign is kept beside each learned scale though this format has none: another phase's has
    keeps_sign: bool = False

    def init_params(self, x: Float[Array, "..."]) -> QuantizerParams:
        """Return the initial values of what is learned beside `x`."""
        found = self.estimator.init_params(x, self.spec, axis=self.axis)
        return {SIGN: jnp.ones_like(found["log_scale"]), **found} if self.keeps_sign else found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment:
    """What the rules say of one path."""

    path: str  # logical
    shape: tuple[int, ...]  # of the parameter; of a cache the numbers that it keeps of a token
    weight: TensorQuant | None = None  # the format of the parameter, or of what the cache keeps
    input: TensorQuant | None = None  # the format of what the parameter is multiplied with
    reason: str = ""  # why it stays in floating point; empty where it does not


def axis_of(path: str) -> int:
    """Along which dim, from the end, the groups of a weight lie: the one that is summed over in its
    product.
    """
    return -1 if path in TABLES else -2


def assign_formats(
    rules: Sequence[QuantRule], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Assignment]:
    """An entry for every path.

    Args:
      rules: the first that names a path counts. Those that have a format for caches alone are passed over for
        parameters, and those that have none are for caches.
      shapes: of every parameter, and of every cache under its path, which ends in `mixer/cache`.

    Raises:
      ValueError: a rule is the first for no path, a format cannot hold a parameter's width, or an input's
        estimator does not suit it.
    """
    used: set[tuple[int, bool]] = set()  # rules, and whether for a cache
    entries = {path: _entry(rules, path, shape, used) for path, shape in shapes.items()}
    for index, rule in enumerate(rules):
        parts = [is_cache for is_cache in (False, True) if _concerns(rule, is_cache=is_cache)]
        if missing := [is_cache for is_cache in parts if (index, is_cache) not in used]:
            examples = [path for path in shapes if _kind(path) is None][:3]
            what = "cache" if missing[0] else "parameter"
            raise ValueError(
                f"quant: the rule for {rule.paths!r} names no {what} that an earlier rule does not name "
                "already. Paths are such as "
                f"{', '.join(examples)}; `slmjax formats table` lists all. Correct the rule, move it up or "
                "leave it out"
            )
    return entries


def _kind(path: str) -> str | None:
    """Why a parameter is never rounded; None for one that can be."""
    if path.endswith(CACHE):
        return None
    if "/router/" in path or path.endswith("router_bias"):
        return "decides which experts compute: kept whole"
    if path.startswith("positions/"):
        return "added to embeddings, not multiplied with"
    return None if _WEIGHTS.search(path) else "no matrix that inputs are multiplied with"


def _entry(
    rules: Sequence[QuantRule], path: str, shape: tuple[int, ...], used: set[tuple[int, bool]]
) -> Assignment:
    if reason := _kind(path):
        return Assignment(path=path, shape=shape, reason=reason)
    is_cache = path.endswith(CACHE)
    found = next(
        (
            index
            for index, rule in enumerate(rules)
            if _concerns(rule, is_cache=is_cache) and rule.names(path)
        ),
        None,
    )
    if found is None:
        return Assignment(path=path, shape=shape, reason="no rule names it")
    used.add((found, is_cache))
    rule = rules[found]
    if is_cache:
        assert rule.cache is not None
        check_width(rule.cache, shape[-1], what=path, name=name_of(rule.cache))
        _check_tokens_apart(rule.cache, path)
        return Assignment(
            path=path, shape=shape, weight=TensorQuant(spec=rule.cache, estimator=StraightThrough(), axis=-1)
        )
    weight = _weight(rule, path, shape)
    reason = "" if weight is not None else f"the rule for {rule.paths!r} leaves it so"
    return Assignment(path=path, shape=shape, weight=weight, input=_input(rule, path, shape), reason=reason)


def _concerns(rule: QuantRule, *, is_cache: bool) -> bool:
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
        if rule.fallback is None:
            raise
        spec = rule.fallback
        check_width(spec, shape[axis], what=path, name=name_of(spec))
    return TensorQuant(spec=spec, estimator=rule.for_weight(spec), axis=axis)


def _input(rule: QuantRule, path: str, shape: tuple[int, ...]) -> TensorQuant | None:
    if rule.input is None:
        return None
    check_width(rule.input, shape[axis_of(path)], what=f"the input of {path}", name=name_of(rule.input))
    estimator = rule.input_estimator or StraightThrough()
    if isinstance(estimator, SCALE_ESTIMATORS) and rule.input.granularity is not Granularity.PER_TENSOR:
        raise ValueError(
            f"the input of {path}: {type(estimator).__name__} keeps one scale for all tokens, and "
            f"{name_of(rule.input)} has one for "
            "each: take a format with granularity=Granularity.PER_TENSOR, or leave input_estimator out"
        )
    if not isinstance(estimator, SCALE_ESTIMATORS):
        _check_tokens_apart(rule.input, f"the input of {path}")
    elif path.endswith("/experts/down"):
        raise ValueError(
            f"the input of {path}: {type(estimator).__name__} is not there for the hidden layer of experts: "
            "leave input_estimator out, and "
            "its scales are computed for each token"
        )
    return TensorQuant(spec=rule.input, estimator=estimator, axis=-1)


def _check_tokens_apart(spec: QuantSpec, what: str) -> None:
    """Refuses a computed scale that all tokens share: a later one would change what an earlier one is rounded
    to.
    """
    if spec.granularity is Granularity.PER_TENSOR or spec.is_two_level:
        raise ValueError(
            f"{what}: {name_of(spec)} computes a scale from all tokens, so that a token would see later "
            "ones: take a format with groups or "
            "rows of a token, or for inputs one with granularity=Granularity.PER_TENSOR and "
            "input_estimator=Calibrated()"
        )
