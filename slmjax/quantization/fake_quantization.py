"""Definitions of quantized models: weights are fake-quantized once a step, inputs and caches inside layers.

definition = define_quantized(config, phases, step=500)     # the phase of the training step after step 500
layer_params = definition.transform(params)                 # fake-quantized weights, float32
weight_formats(definition)                                  # {} where weights are in full precision
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax.models.architecture import ModelConfig
from slmjax.models.decoder import Decoder
from slmjax.models.definition import Definition, Params, ParamTransform, define, definition_of
from slmjax.quantization import weights
from slmjax.quantization.assignment import TensorQuant
from slmjax.quantization.plan import plan_quantization, set_quantizers, stack_shapes
from slmjax.quantization.quantizer_params import is_weight_quantizer_param
from slmjax.quantization.rules import QuantPhase, phase_at
from slmjax.quantization.schedule import QuantSchedule
from slmjax.quantization.weights import Formats


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeQuantization(ParamTransform):
    """Rounds weights to their formats, with the gradients of their estimators."""

    phases: tuple[QuantPhase, ...]  # all of a run
    phase: QuantPhase | None  # the one that this is for; None before the first
    formats: Formats  # of weights, by stack path
    learned_formats: Formats  # of weights that have quantizer parameters in any phase
    input_formats: Mapping[str, TensorQuant | None]  # of layer inputs, by stack path of the weight

    @property
    def is_identity(self) -> bool:
        """Return whether no weight has a format or quantizer parameters: the transform changes nothing."""
        return not self.formats and not self.learned_formats

    def __call__(self, params: Mapping[str, Array], *, key: Array | None) -> Params:
        """Return the parameters with fake-quantized weights (`weights.fake_quantize`)."""
        return weights.fake_quantize(params, self.formats, key=key)

    def init(self, params: Mapping[str, Array]) -> Params:
        """Return `params` with quantizer parameters that suit these weights."""
        return {**params, **weights.init_quantizer_params(params, self.learned_formats)}

    def init_changed(self, params: Params, *, before: "FakeQuantization") -> Params:
        """Return `params` with initial quantizer parameters for weights whose format is another than before.

        At the first step of a phase: weights whose format stays keep the scales that they have learned.
        """
        # Weights without a format in this phase move without their scales, which are set again.
        changed = {
            path: formats
            for path, formats in self.learned_formats.items()
            if path not in self.formats or before.formats.get(path) != self.formats[path]
        }
        return {**params, **weights.init_quantizer_params(params, changed)}

    def strip(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return `params` without parameters of weight quantizers."""
        return {path: leaf for path, leaf in params.items() if not is_weight_quantizer_param(path)}

    def applied(self) -> "FakeQuantization":
        """Return the transform for fake-quantized parameters; inputs and caches are quantized as here."""
        # Quantizers of inputs and caches are set by a phase: one without weights has the same ones.
        phases = () if self.phase is None else (self.phase.without_weights(),)
        return dataclasses.replace(
            self, phases=phases, phase=phases[0] if phases else None, formats={}, learned_formats={}
        )


def define_quantized(
    config: ModelConfig,
    phases: Sequence[QuantPhase],
    *,
    step: int | None = None,
    is_calibrating: bool = False,
) -> Definition:
    """Return the definition of a model in one phase of quantization; without phases, that of `define`.

    Its config may divide groups of layers, where quantizers differ within one.

    Args:
      phases: all phases of the run, by step: parameters have the same shapes in each of them.
      step: the phase is that of the training step after this one; None for the last phase, which is deployed.
      is_calibrating: nothing is rounded, and the gradient of an activation quantizer's parameters is their
        initial value for these inputs (`activations.ActivationQuantizer`).

    Raises:
      ValueError: the rules do not fit the model.
    """
    if not phases:
        return define(config)
    # Only shapes are computed: the key has no effect.
    key = jax.random.key(0)
    plain = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=key)))
    # The plan may divide groups: the model is built again from its config, with quantizers in its layers.
    plan = plan_quantization(config, phases, stack_shapes(plain), step=step)

    def build() -> Decoder:
        model = Decoder(plan.config, rngs=nnx.Rngs(params=key))
        set_quantizers(model, plan, is_calibrating=is_calibrating)
        return model

    transform = FakeQuantization(
        phases=tuple(phases),
        phase=phase_at(phases, step),
        formats=plan.formats,
        learned_formats=plan.learned_formats,
        input_formats={path: current for path, (current, _) in plan.inputs.items()},
    )
    return definition_of(nnx.eval_shape(build), transforms=(transform,))


def quantization_of(definition: Definition) -> FakeQuantization | None:
    """Return the quantization of a definition, or None for a model that has none in any phase."""
    return next((part for part in definition.transforms if isinstance(part, FakeQuantization)), None)


def phases_of(definition: Definition) -> tuple[QuantPhase, ...]:
    """Return all phases of a definition's run; empty for a model that is not quantized."""
    quantization = quantization_of(definition)
    return () if quantization is None else quantization.phases


def phase_of(definition: Definition) -> QuantPhase | None:
    """Return the phase that a definition is for, or None in full precision."""
    quantization = quantization_of(definition)
    return None if quantization is None else quantization.phase


def weight_formats(definition: Definition) -> Formats:
    """Return the formats of weights by stack path; empty in full precision."""
    quantization = quantization_of(definition)
    return {} if quantization is None else quantization.formats


def fake_quantize(
    definition: Definition,
    params: Params,
    *,
    schedule: QuantSchedule | None,
    step: Int[Array, ""],
    key: Array,
) -> tuple[Params, Float[Array, ""]]:
    """Return what layers multiply with in a training step, and the damping loss of weights off their codes.

    Differentiable: take its vjp once a step, outside the loop over microbatches.

    Args:
      definition: one whose parameters are transformed.
      params: the trained parameters.
      schedule: warm-up and damping; None for neither.
      step: the number of earlier training steps.
      key: randomness of estimators that round stochastically.
    """
    # Before the warm-up is applied: the damping loss compares weights with the codes that will be deployed.
    rounded = definition.transform(params, key=key)
    formats = weight_formats(definition)
    if schedule is None:
        return rounded, jnp.zeros(())
    # Without damping the sum over all weights is not computed.
    damping_loss = (
        schedule.damping * weights.damping_loss(params, rounded, formats)
        if schedule.damping
        else jnp.zeros(())
    )
    fraction = schedule.warmup_fraction(step)
    if fraction is None:
        return rounded, damping_loss
    return weights.blend_fake_quantized(params, rounded, formats, fraction=fraction), damping_loss
