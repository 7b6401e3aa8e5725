"""Rules that assign a number format to each part of a model: `quant` of an experiment, and phases of a run.

    rules = (QuantRule(paths=".", weight=preset("q4_0")),)       # every matrix in q4_0
    QuantConfig(phases=(QuantPhase(rules=rules),))               # what `--quant q4_0` stands for
    QuantConfig(phases=(QuantPhase(step=500, rules=rules),))     # in full precision for 500 steps

A rule selects logical paths (`embed/table`, `layers/3/mixer/query/weight`, `layers/3/mixer/cache`) by a
regular expression; the first rule whose expression is found in a path applies to it. `assignment.py` lists
the result for every path.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from slmjax.config import added_field
from slmjax.formats.presets import name_of, preset
from slmjax.formats.spec import QuantSpec
from slmjax.quantization.estimators import Estimator, default_estimator


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantRule:
    """The formats of parameters, inputs and caches whose paths a regular expression is found in."""

    paths: str  # regular expression, searched for in logical paths; "." is found in all of them
    weight: QuantSpec | None = None  # format of the parameter (none: it stays in floating point)
    # format of parameters whose width `weight` cannot hold (none: these are refused)
    fallback: QuantSpec | None = None
    # gradient and scale of the parameter (none: what suits its format)
    estimator: Estimator | None = None
    input: QuantSpec | None = None  # format of the inputs of the product (none: floating point)
    # gradient and scale of the inputs (none: dynamic, straight through)
    input_estimator: Estimator | None = None
    # format of keys and values, for paths that end in `mixer/cache` (none: floating point)
    cache: QuantSpec | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.paths)
        except re.error as error:
            raise ValueError(f"quant: {self.paths!r} is not a valid regular expression ({error})") from None
        if self.fallback is not None and self.weight is None:
            raise ValueError(
                f"the rule for {self.paths!r} has a fallback of {name_of(self.fallback)} and no format to "
                "fall back from"
            )
        for spec, estimator in (
            (self.weight, self.estimator),
            (self.fallback, self.estimator),
            (self.input, self.input_estimator),
        ):
            if spec is not None and estimator is not None:
                estimator.check(spec)

    def matches(self, path: str) -> bool:
        """Return whether the expression is found in a path."""
        return re.search(self.paths, path) is not None

    def for_weight(self, spec: QuantSpec) -> Estimator:
        """Return the estimator of a parameter in this format."""
        return default_estimator(spec) if self.estimator is None else self.estimator


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantPhase:
    """The rules that apply from a step on."""

    rules: tuple[QuantRule, ...]  # the first that matches a path applies
    step: int = 0  # the first training step with them
    # reset the optimizer's moments when the phase begins; the learning rate schedule continues
    restart_optimizer: bool = added_field(False, before=False)

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"a phase of quantization begins at step {self.step}: give 0 or more")
        if not self.rules:
            raise ValueError("a phase of quantization has no rule: give some, or leave quant out")

    def without_weights(self) -> "QuantPhase":
        """Return the phase for weights that are rounded already: only inputs and caches are quantized."""
        # The first matching rule applies: every rule stays, though it may have no format left.
        rules: list[QuantRule] = []
        for rule in self.rules:
            if rule.cache is not None:
                rules.append(QuantRule(paths=rule.paths, cache=rule.cache))
            if rule.cache is None or rule.weight is not None or rule.input is not None:
                rules.append(
                    QuantRule(paths=rule.paths, input=rule.input, input_estimator=rule.input_estimator)
                )
        return QuantPhase(rules=tuple(rules))


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Quantization-aware training: formats by step, and the schedule (warm-up, damping, freezing)."""

    # by step; before the first everything is in full precision, and the last is what is deployed
    phases: tuple[QuantPhase, ...]
    # added to the steps of all phases (none: where the learning rate of wsd begins to fall)
    start_step: int | None = 0
    warmup_steps: int = 0  # steps in which the rounding error of weights grows from none to all of it
    # weight of the damping loss, the squared rounding errors of all weights, summed (against oscillation)
    damping: float = 0.0
    # last steps of the run, in which one layer after another is frozen, beginning with the first (none: none
    # is)
    freeze_steps: int | None = None

    def __post_init__(self) -> None:
        check_phases(self.phases)
        if not self.phases:
            raise ValueError("quant.phases is empty: give a phase with rules, or leave quant out")
        if (self.start_step or 0) < 0 or self.warmup_steps < 0:
            raise ValueError(
                f"quant.start_step={self.start_step} and quant.warmup_steps={self.warmup_steps} must not be "
                "negative"
            )
        if self.damping < 0:
            raise ValueError(f"quant.damping must not be negative, got {self.damping}")
        if self.freeze_steps is not None and self.freeze_steps < 1:
            raise ValueError(
                f"quant.freeze_steps must be at least 1, or none to freeze no layer, got {self.freeze_steps}"
            )

    def resolved(self, *, cooldown_step: int | None, total_steps: int) -> tuple[QuantPhase, ...]:
        """Return the phases with the steps of the run at which they begin.

        Args:
          cooldown_step: where the learning rate begins to fall, for a schedule with such a step.

        Raises:
          ValueError: a phase begins after the end of the run, or with a cooldown that the schedule lacks.
        """
        start = cooldown_step if self.start_step is None else self.start_step
        if start is None:
            raise ValueError(
                "quant.start_step is none, the step where the learning rate of wsd begins to fall: set "
                "optim.schedule to wsd"
            )
        phases = tuple(dataclasses.replace(phase, step=phase.step + start) for phase in self.phases)
        if phases[-1].step >= total_steps:
            raise ValueError(
                f"quantization begins its last phase at step {phases[-1].step}, and the run ends at "
                f"{total_steps}: lower quant.start_step"
            )
        return phases


def check_phases(phases: Sequence[QuantPhase]) -> None:
    """Raise ValueError for phases that are not in the order of their steps."""
    steps = [phase.step for phase in phases]
    if any(later <= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
        raise ValueError(
            f"phases of quantization begin at steps {steps}: give them in order, each at a step of its own"
        )


def phase_at(phases: Sequence[QuantPhase], step: int | None) -> QuantPhase | None:
    """Return the phase of the training step after `step`, None in full precision; for None the last phase."""
    begun = [phase for phase in phases if step is None or phase.step <= step]
    return begun[-1] if begun else None


ALIASES: Mapping[str, str] = {"w4a8": "q4_0+q8_0", "8da4w": "torchao_int4+torchao_int8_token"}
NOTHING = "none"


def quant_of(name: str) -> QuantConfig:
    """Return the settings of a name: `WEIGHTS`, `WEIGHTS+INPUTS` or `WEIGHTS+INPUTS+CACHE`, or an alias.

    Each part is a format or `none`. `q4_0+q8_0`, alias `w4a8`, is what llama.cpp computes on CPUs. All
    matrices are in the first format, embedding and head included.

    Raises:
      ValueError: there is no such format, or nothing would be quantized.
    """
    parts = ALIASES.get(name, name).split("+")
    if len(parts) > 3:
        raise ValueError(
            f"quant {name!r} has {len(parts)} parts: give WEIGHTS, WEIGHTS+INPUTS or WEIGHTS+INPUTS+CACHE, "
            "such as q4_0+q8_0+q8_0"
        )
    formats = [None if part == NOTHING else preset(part) for part in parts] + [None] * (3 - len(parts))
    weight, inputs, cache = formats
    # The rule of caches is first; rules that have a format for caches alone are skipped for parameters.
    rules = [QuantRule(paths="cache$", cache=cache)] if cache is not None else []
    if weight is not None or inputs is not None:
        rules.append(QuantRule(paths=".", weight=weight, input=inputs))
    if not rules:
        raise ValueError(
            f"quant {name!r} leaves everything in floating point: leave it out, or name a format, such as "
            "q4_0"
        )
    return QuantConfig(phases=(QuantPhase(rules=tuple(rules)),))
