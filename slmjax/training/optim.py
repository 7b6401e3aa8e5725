"""Optimizers and learning-rate schedules: `OptimConfig` to an optax chain over a flat dict of parameters.

    optimizer = make_optimizer(config, params, total_steps=1000)   # an optax.GradientTransformation
    state = optimizer.init(params)       # params: {"segments/0/blocks/0/mixer/query/weight": ...}

The chain is: clip the global norm, transform every parameter by the optimizer of its group, add the decoupled
weight decay, scale by the learning rate. So a parameter moves by `-learning_rate * (direction + weight_decay
* parameter)` for every kind of optimizer. Parameters under `segments/` are stacks of layers, and experts are
stacks of matrices: every matrix of every layer and expert is treated as a parameter of its own, whatever the
segmentation.
Moments are float32.

Dims: L layers of a stack, E experts.
"""

import dataclasses
import enum
import functools
import logging
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from optax import contrib

from slmjax.config import added_field
from slmjax.models.parameterization import UNSCALED, Parameterization, Scaling
from slmjax.models.paths import PER_CHANNEL
from slmjax.quantization.quantizer_params import is_activation_quantizer_param, is_quantizer_param, is_sign
from slmjax.training.hyperparameters import Hyperparameters
from slmjax.training.multipliers import Multipliers, multipliers_of

log = logging.getLogger(__name__)


class Optimizer(enum.Enum):
    """How a gradient becomes a direction."""

    ADAMW = "adamw"
    ADAFACTOR = "adafactor"
    LION = "lion"
    MUON = "muon"


class Schedule(enum.Enum):
    """The learning rate after the warm-up."""

    COSINE = "cosine"  # half a cosine down to the minimum
    LINEAR = "linear"  # a line down to the minimum
    CONSTANT = "constant"
    WSD = "wsd"  # warm-up, stable, decay: constant, then a line down to the minimum


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, schedule and what belongs to an update."""

    kind: Optimizer = Optimizer.ADAMW  # muon: matrices inside the layers by Muon, the rest by AdamW
    lr: float = 1e-3  # peak learning rate (adafactor: relative to a parameter's own size, so about 1e-2)
    min_lr_ratio: float = 0.1  # the schedule ends at this fraction of the peak
    schedule: Schedule = Schedule.COSINE  # after the warm-up
    # the learning rate rises linearly for this many steps, or, below 1, for this fraction of the run
    warmup_steps: int | float = 100
    decay_fraction: float = 0.2  # wsd: fraction of all steps in which the learning rate falls
    betas: tuple[float, float] = (0.9, 0.95)  # adamw, lion: decay of the moments
    eps: float = 1e-8  # adamw: added to the root of the second moment
    weight_decay: float = 0.1  # decoupled, multiplied by the learning rate
    # no weight decay for paths that match one of these, nor for vectors
    no_decay: tuple[str, ...] = (r"(scale|/offset|bias)$", r"^(embed|positions)/")
    grad_clip: float | None = 1.0  # largest global norm of the gradient; None: no clipping
    muon_lr: float = 0.02  # muon: peak learning rate of its matrices, on the same schedule
    muon_momentum: float = 0.95  # muon: decay of the momentum
    muon_iterations: int = 5  # muon: Newton-Schulz iterations
    # muon: divide momentum and gradient by what their decay leaves out of early steps, as optax does and the
    # published Muon does not
    muon_bias_correction: bool = added_field(False, before=True)
    # muon: matrices that AdamW takes, by patterns
    muon_exclude: tuple[str, ...] = (
        r"^(embed|head|positions)/",
        r"(^|/)router/",
        r"bias$",
        r"/(log_scale|offset)$",
    )
    # peak learning rate of learned scales, clips and zero points of number formats, on the same schedule
    # (none: lr)
    scale_lr: float | None = added_field(None, before=None)
    # the batch is cut into this many parts, whose gradients are added up before an update
    accumulation_steps: int = 1
    # keep an exponential moving average of the weights and evaluate it; None: do not
    ema_decay: float | None = None
    # end the run when a log line finds this many updates in a row skipped as non-finite
    max_consecutive_skips: int = 20

    def __post_init__(self) -> None:
        positive = ("lr", "muon_lr", "muon_iterations", "accumulation_steps", "max_consecutive_skips", "eps")
        at_least_zero = ("warmup_steps", "weight_decay")
        for names, holds, condition in (
            (positive, lambda value: value > 0, "greater than 0"),
            (at_least_zero, lambda value: value >= 0, "0 or greater"),
            (("min_lr_ratio", "decay_fraction"), lambda value: 0 <= value <= 1, "between 0 and 1"),
            (("muon_momentum",), lambda value: 0 <= value < 1, "at least 0 and below 1"),
        ):
            for name in names:
                if not holds(value := getattr(self, name)):
                    raise ValueError(f"optim.{name} is {value}: it must be {condition}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas are {self.betas}: each must be at least 0 and below 1")
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError(
                f"optim.warmup_steps is {self.warmup_steps}: give a whole number of steps, or a fraction of "
                "the run below 1"
            )
        if self.scale_lr is not None and self.scale_lr <= 0:
            raise ValueError(
                f"optim.scale_lr is {self.scale_lr}: it must be greater than 0; none stands for optim.lr"
            )
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise ValueError(
                f"optim.grad_clip is {self.grad_clip}: give a norm above 0, or None for no clipping"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"optim.ema_decay is {self.ema_decay}: give a decay between 0 and 1, or None for no average"
            )
        for name in ("no_decay", "muon_exclude"):
            for pattern in getattr(self, name):
                # Compiled here, because patterns are first matched after the data is prepared.
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(
                        f"optim.{name}: {pattern!r} is not a valid regular expression ({error})"
                    ) from None


# Schedules --------------------------------------------------------------------------------------------------
SHORTENED_WARMUP = 0.1  # of the steps of a run that is too short for the warm-up of its settings


def learning_rate(
    config: OptimConfig, step: int | Int[Array, "..."], *, total_steps: int
) -> Float[Array, "..."]:
    """Return the learning rate of an update, for parameters that Muon does not take.

    The first update has number 0. The rate rises as (step + 1) / (W + 1) for the W steps of
    `num_warmup_steps`, so that no update is wasted at zero, is at its peak at W, and reaches its minimum at
    `total_steps`, one past the last update; it stays there.
    """
    warmup = num_warmup_steps(config, total_steps=total_steps)
    end = config.lr * config.min_lr_ratio
    after_warmup = total_steps - warmup
    if config.schedule is Schedule.COSINE:
        schedule = optax.cosine_decay_schedule(config.lr, after_warmup, alpha=config.min_lr_ratio)
    elif config.schedule is Schedule.LINEAR:
        schedule = optax.linear_schedule(config.lr, end, after_warmup)
    elif config.schedule is Schedule.CONSTANT:
        schedule = optax.constant_schedule(config.lr)
    else:
        # WSD (Hu et al., https://arxiv.org/abs/2404.06395): the rate is constant, so a run can be extended
        # until its decay begins. The decay is at the end, whatever the length of the run.
        decay = _num_decay_steps(config, total_steps)
        schedule = optax.linear_schedule(config.lr, end, decay, transition_begin=after_warmup - decay)
    if warmup:
        rise = optax.linear_schedule(config.lr / (warmup + 1), config.lr, warmup)
        schedule = optax.join_schedules([rise, schedule], [warmup])
    return jnp.asarray(schedule(jnp.asarray(step)), jnp.float32)


def num_warmup_steps(config: OptimConfig, *, total_steps: int) -> int:
    """Return the number of steps in which the rate rises.

    A warm-up that leaves the run no step after it, or no room for the decay of wsd, is `SHORTENED_WARMUP` of
    the run instead.
    """
    asked = _asked_warmup(config, total_steps)
    # At least one step has the peak rate: with wsd the first of the decay, which begins there.
    after = _num_decay_steps(config, total_steps) if config.schedule is Schedule.WSD else 1
    longest = total_steps - after
    return asked if asked <= longest else min(int(SHORTENED_WARMUP * total_steps), longest)


def warn_of_shortened_warmup(config: OptimConfig, *, total_steps: int) -> None:
    """Log a warning if the warm-up is too long for a run of `total_steps`, with what it has instead."""
    asked = _asked_warmup(config, total_steps)
    warmup = num_warmup_steps(config, total_steps=total_steps)
    if warmup == asked:
        return
    has_decay = config.schedule is Schedule.WSD
    decay = f", of which {_num_decay_steps(config, total_steps)} are the decay" if has_decay else ""
    log.warning(
        "optim.warmup_steps is %g, too long for a run of %d step(s)%s: the warm-up is shortened to %d",
        config.warmup_steps,
        total_steps,
        decay,
        warmup,
    )


def _asked_warmup(config: OptimConfig, total_steps: int) -> int:
    """Return the steps of warm-up that the settings ask for, whether or not the run has as many."""
    is_fraction = 0 < config.warmup_steps < 1
    return round(config.warmup_steps * total_steps) if is_fraction else int(config.warmup_steps)


def _num_decay_steps(config: OptimConfig, total_steps: int) -> int:
    """Return the steps in which the rate of a wsd schedule falls."""
    return max(1, round(config.decay_fraction * total_steps))


def cooldown_step(config: OptimConfig, *, total_steps: int) -> int | None:
    """Return the step from which the learning rate of a wsd schedule falls; None for other schedules."""
    if config.schedule is not Schedule.WSD:
        return None
    return total_steps - _num_decay_steps(config, total_steps)


# Groups -----------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Optimizer and weight decay of a parameter, and what its parameterization multiplies them with."""

    optimizer: Optimizer
    weight_decay: float
    multipliers: Multipliers = Multipliers()


def parameter_groups(
    config: OptimConfig, params: Mapping[str, Any], *, scaling: Scaling = UNSCALED
) -> dict[str, Group]:
    """Return the optimizer and weight decay of every parameter; `params` need only have `.ndim`."""
    return {
        path: _group(
            config,
            path,
            # Like vectors, numbers of each channel are neither orthogonalised nor decayed.
            1 if PER_CHANNEL.search(path) else leaf.ndim - _num_stacked_dims(path),
            scaling,
        )
        for path, leaf in params.items()
    }


def _group(config: OptimConfig, path: str, num_dims: int, scaling: Scaling) -> Group:
    optimizer = config.kind
    if optimizer is Optimizer.MUON and (
        num_dims != 2 or is_sign(path) or _matches(config.muon_exclude, path)
    ):
        # Muon orthogonalises a matrix between two hidden spaces. Vectors have no such form, embedding and
        # head map tokens, for which its author recommends AdamW, and signs of scales are not trained.
        optimizer = Optimizer.ADAMW
    # Norm scales and biases are vectors: decay would only drive scales to 0.
    decays = num_dims >= 2 and not _matches(config.no_decay, path)
    return Group(
        optimizer=optimizer,
        weight_decay=config.weight_decay if decays else 0.0,
        multipliers=multipliers_of(
            path,
            num_dims=num_dims,
            scaling=scaling,
            is_orthogonalized=optimizer is Optimizer.MUON,
        ),
    )


def _matches(patterns: tuple[str, ...], path: str) -> bool:
    return any(re.search(pattern, path) for pattern in patterns)


def _num_stacked_dims(path: str) -> int:
    """Return the number of leading dims that count parameters: layers of a group, experts of a layer."""
    return path.startswith("segments/") + ("/experts/" in path and not is_activation_quantizer_param(path))


# The chain --------------------------------------------------------------------------------------------------
def make_optimizer(
    config: OptimConfig,
    params: Mapping[str, Any],
    *,
    total_steps: int,
    hyperparameters: Hyperparameters | None = None,
    scaling: Scaling = UNSCALED,
) -> optax.GradientTransformation:
    """Return the optimizer of these parameters.

    Its state holds, next to one counter of updates, a dict from parameter path to that parameter's state, in
    which each leaf of a stacked parameter has the layer dim first (a counter too). Gradients are dicts with
    the same paths.

    Args:
      config: the settings.
      params: path to parameter, or to anything else with `.shape` and `.ndim`.
      total_steps: the number of updates the schedule is made for.
      hyperparameters: numbers that replace those of `config`, and may be traced. The state does not depend
        on them. Which parameters decay is still decided by `config`.
      scaling: of the model whose parameters these are (`ModelConfig.scaling`).

    Raises:
      ValueError: its parameterization has no rule for this optimizer.
    """
    if config.kind is Optimizer.ADAFACTOR and scaling.kind is not Parameterization.STANDARD:
        # Its steps are relative to a parameter's size, with a floor: they change with the width anyway.
        raise ValueError(
            f"parameterization={scaling.kind.value} has no rule for optim.kind=adafactor: use adamw, lion or "
            "muon, or set model.parameterization=standard"
        )
    schedule: Any = functools.partial(learning_rate, config, total_steps=total_steps)
    if hyperparameters is not None:
        schedule = hyperparameters.learning_rate
    numbers = hyperparameters or config
    groups = parameter_groups(config, params, scaling=scaling)

    def transform(path: str, group: Group) -> optax.GradientTransformation:
        if is_sign(path):
            # Signs of scales are not trained: after an update they would be other values than -1 and 1.
            return optax.set_to_zero()
        stacked = _stacked(_direction(config, group, numbers), num_dims=_num_stacked_dims(path))
        factor = group.multipliers.learning_rate
        if numbers.scale_lr is not None and is_quantizer_param(path):
            factor *= numbers.scale_lr / numbers.lr
        # Also a traced factor needs a product; that of most parameters is the number 1.
        return stacked if isinstance(factor, float) and factor == 1.0 else _times(stacked, factor)

    transforms = {path: transform(path, group) for path, group in groups.items()}
    # Clipping comes first, so that moments see the clipped gradient (Pascanu et al.,
    # https://arxiv.org/abs/1211.5063). Its norm is that of all parameters: the direction of the gradient
    # stays.
    return optax.chain(
        optax.identity() if numbers.grad_clip is None else optax.clip_by_global_norm(numbers.grad_clip),
        _each_parameter(transforms),
        optax.scale_by_learning_rate(schedule),
    )


def restarted(optimizer: optax.GradientTransformation, state: Any, params: Mapping[str, Array]) -> Any:
    """Return the state of `make_optimizer`'s optimizer with fresh moments; its schedule continues."""
    # The last part of the chain's state counts updates, for the learning rate.
    fresh: Any = optimizer.init(params)
    return (*fresh[:-1], state[-1])


def _times(
    transform: optax.GradientTransformation, factor: float | Float[Array, ""]
) -> optax.GradientTransformation:
    """Return `transform` with its updates times a factor, and the same state."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        direction: Any
        direction, state = transform.update(updates, state, params)
        return factor * direction, state

    return optax.GradientTransformation(transform.init, update)


def _direction(
    config: OptimConfig, group: Group, numbers: OptimConfig | Hyperparameters
) -> optax.GradientTransformation:
    """Return the direction of one unstacked parameter, weight decay included, before the learning rate."""
    # Decoupled decay (AdamW, https://arxiv.org/abs/1711.05101): it is added after the moments, so that it
    # does not depend on the size of the gradient.
    weight_decay = numbers.weight_decay * group.multipliers.weight_decay
    decay = optax.add_decayed_weights(weight_decay) if group.weight_decay else optax.identity()
    beta1, beta2 = numbers.betas
    if group.optimizer is Optimizer.ADAMW:
        eps = numbers.eps * group.multipliers.eps
        return optax.chain(optax.scale_by_adam(beta1, beta2, eps=eps), decay)
    # Lion (https://arxiv.org/abs/2302.06675) moves by signs, so its rate is 3 to 10 times below AdamW's.
    if group.optimizer is Optimizer.LION:
        return optax.chain(optax.scale_by_lion(beta1, beta2), decay)
    if group.optimizer is Optimizer.ADAFACTOR:
        # https://arxiv.org/abs/1804.04235: factored second moment, update clipping, steps relative to the
        # parameter's size.
        return optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
            decay,
        )
    # The whole chain ends with AdamW's learning rate, so the ratio of both rates makes up for the difference.
    return optax.chain(
        _muon(config, beta=numbers.muon_momentum),
        _scale_by_aspect_ratio(),
        decay,
        optax.scale(numbers.muon_lr / numbers.lr),
    )


def _muon(config: OptimConfig, *, beta: Any) -> optax.GradientTransformation:
    """Orthogonalised Nesterov momentum of a matrix, by Newton-Schulz iterations.

    The published rule (Jordan, https://kellerjordan.github.io/posts/muon):

        m <- beta m + (1 - beta) g;   d = beta m + (1 - beta) g;   NS(d / (|d| + 1e-7))

    Orthogonalisation takes all scale from d. So optax's bias correction, which divides m by 1 - beta**(t + 1)
    and g by 1 - beta**t, only gives the gradient of early steps more weight relative to the momentum. State
    and checkpoints are the same with it and without.
    """
    numbers = contrib.MuonDimensionNumbers()
    corrected = contrib.scale_by_muon(
        beta=beta, ns_steps=config.muon_iterations, weight_dimension_numbers=numbers
    )
    if config.muon_bias_correction:
        return corrected
    # Without momentum optax's Muon is the orthogonalisation alone, so its tested coefficients serve both
    # rules.
    orthogonalize = contrib.scale_by_muon(
        beta=0.0, nesterov=False, ns_steps=config.muon_iterations, eps=1e-7, weight_dimension_numbers=numbers
    )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        momentum = beta * state.mu + (1 - beta) * updates
        direction = beta * momentum + (1 - beta) * updates
        # The inner state is not kept: without momentum it has no effect on the result.
        result, _ = orthogonalize.update(direction, orthogonalize.init(direction))
        return result, state._replace(count=optax.safe_increment(state.count), mu=momentum)

    return optax.GradientTransformation(corrected.init, update)


def _scale_by_aspect_ratio() -> optax.GradientTransformation:
    """Scale updates [inputs, outputs] by sqrt(max(1, outputs / inputs)), for equal changes at all widths."""

    def scale(update: Any, _: Any) -> Array:
        inputs, outputs = update.shape
        return update * max(1.0, outputs / inputs) ** 0.5

    return optax.stateless_with_tree_map(scale)


def _stacked(transform: optax.GradientTransformation, *, num_dims: int) -> optax.GradientTransformation:
    """Return `transform` of an array, mapped over the leading dims that count parameters, in float32."""

    def init(params: Any) -> Any:
        return transform.init(params.astype(jnp.promote_types(params.dtype, jnp.float32)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        dtype = jnp.promote_types(params.dtype, jnp.float32)
        return transform.update(updates.astype(dtype), state, params.astype(dtype))

    # Mapped, so that norms and factored moments are those of each matrix, not of the stack.
    for _ in range(num_dims):
        init = jax.vmap(init)
        update = jax.vmap(update)
    return optax.GradientTransformation(init, update)


def _each_parameter(transforms: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """Return one transformation per parameter of a flat dict; the state is a dict by the same paths."""

    def init(params: Any) -> Any:
        if different := sorted(set(params) ^ set(transforms)):
            raise ValueError(
                f"the optimizer was made for other parameters; added or missing: {', '.join(different[:5])}"
            )
        return {path: transforms[path].init(param) for path, param in params.items()}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        assert updates.keys() == transforms.keys(), "the optimizer was made for other parameters"
        directions = {}
        states = {}
        for path, gradient in updates.items():
            directions[path], states[path] = transforms[path].update(gradient, state[path], params[path])
        return directions, states

    return optax.GradientTransformation(init, update)
