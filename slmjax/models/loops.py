"""Stacks that run several times in a row with the same weights, and the gate that chooses a loop.

    ModelConfig(stack=stack_of(blocks), loops=StackLoops(num_loops=4, exit_gate=ExitGateConfig()), ...)

As in Ouro (Zhu et al. 2025) the final norm ends each loop, and the next loop begins with its result. From the
result of loop t the gate computes lambda_t, the probability that a token that has come this far stops there;
the last loop stops all that are left:

- p_t = lambda_t * prod over s < t of (1 - lambda_s)

Training minimises the expected cross entropy, sum over t of p_t * CE_t, minus the entropy of p times a
weight: without it the gate settles on one loop before the loops have learned to differ. In inference a token
takes the result of the first loop at which the probability of having stopped reaches a threshold.

All loops are computed for every token, in decoding too: a later token that stops later attends in loop t to
what all tokens before it wrote in loop t.

Dims: L loops, B batch, T time, D model.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax.models.layers import ModelDims, truncated_normal

MOST_STACK_LOOPS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitGateConfig:
    """The gate that chooses a loop for each token, and how it is trained."""

    # inference: a token stops where the probability of having stopped reaches this (1: in the last loop)
    threshold: float = 1.0
    entropy_weight: float = 0.05  # training: multiplies the entropy of the exits, which the loss subtracts

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"exit_gate.threshold is a probability, got {self.threshold}")
        if self.entropy_weight < 0.0:
            raise ValueError(f"exit_gate.entropy_weight must not be negative, got {self.entropy_weight}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackLoops:
    """How often all layers run, one after another."""

    num_loops: int  # how many times in a row
    # chooses the loop whose result counts, for each token (none: the last one for all)
    exit_gate: ExitGateConfig | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.num_loops <= MOST_STACK_LOOPS:
            raise ValueError(
                f"loops.num_loops must lie between 2 and {MOST_STACK_LOOPS}, got {self.num_loops}: to run "
                "the layers once, leave loops out"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopOutputs:
    """The results of all loops, for a loss on each of them. Typed `Any` because this is a pytree."""

    hidden: Any  # Float[Array, "L B T D"], as `Output.hidden`
    log_probs: Any  # Float[Array, "L B T"]: of stopping after each loop


def exit_log_probs(gate_logits: Float[Array, "L B T"]) -> Float[Array, "L B T"]:
    """Return the logarithms of the probabilities of stopping after each loop; they add up to 1.

    The gate of the last loop has no effect.

    >>> jnp.exp(exit_log_probs(jnp.zeros((3, 1, 1)))).ravel().tolist()
    [0.5, 0.25, 0.25]
    """
    # As logarithms, a probability that underflows still has a finite gradient.
    passes_on = jax.nn.log_sigmoid(-gate_logits[:-1])
    reaches = jnp.cumsum(jnp.concatenate([jnp.zeros_like(gate_logits[:1]), passes_on]), axis=0)
    stops = jax.nn.log_sigmoid(gate_logits[:-1])
    return reaches + jnp.concatenate([stops, jnp.zeros_like(gate_logits[:1])])


def exit_entropy(log_probs: Float[Array, "L B T"]) -> Float[Array, "B T"]:
    """Return the entropy of the loop after which each token stops, in nats."""
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=0)


def exit_loops(log_probs: Float[Array, "L B T"], *, threshold: float) -> Int[Array, "B T"]:
    """Return the index of the first loop at which the probability of having stopped reaches the threshold."""
    stopped = jnp.cumsum(jnp.exp(log_probs), axis=0) >= threshold
    # The sum over all loops is 1 but for rounding, which must not decide.
    return jnp.argmax(stopped.at[-1].set(True), axis=0)


def results_of(hidden: Float[Array, "L B T D"], loops: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Return for each token the result of its loop."""
    return jnp.take_along_axis(hidden, loops[None, :, :, None], axis=0)[0]


class ExitGate(nnx.Module):
    """A logit for each token: its sigmoid is the probability of stopping."""

    # A vector, which formats, Muon and weight decay leave alone: the gate is small, and decides.
    def __init__(self, dims: ModelDims, *, key: Array) -> None:
        self.direction = nnx.Param(truncated_normal(key, (dims.embed_dim,), dims.router_std))
        self.bias = nnx.Param(jnp.zeros((1,), jnp.float32))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        # In float32, as in routers: the result is compared with a threshold.
        return x.astype(jnp.float32) @ self.direction[...] + self.bias[0]
