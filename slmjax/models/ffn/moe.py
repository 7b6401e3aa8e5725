"""Mixture of experts: a router sends each token to a few of many gated MLPs, and adds their outputs by its
weights.

Tokens are dispatched without drops (rows sorted by expert, one grouped product) or with a capacity per row of
the batch and expert, beyond which the later tokens are dropped. Experts may be divided over devices: each
computes its own experts for the tokens of all, and the sums go back to where the tokens live. Load is
balanced by an auxiliary loss or by a bias on the scores that the trainer moves once per optimizer step.
Everything here is per token or per row of the batch, so that neither gradient accumulation nor which rows
share a batch changes anything.

Dims: B batch, T time, D model, E experts, K selected, F hidden of an expert; M tokens (B T); R slots, the
rows that the experts compute; C capacity.
"""

import dataclasses
import enum
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from slmjax import kernels
from slmjax.models.ffn.mlp import Activation, MlpConfig, gated
from slmjax.models.layers import ArrayFunction, Linear, ModelDims, truncated_normal
from slmjax.models.protocols import Ffn, FfnAux, FfnConfig
from slmjax.parallel import communication


class RouterScore(enum.Enum):
    """How router logits become scores of experts."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


class Balance(enum.Enum):
    """What keeps the load of experts even."""

    AUX_LOSS = "aux_loss"
    BIAS = "bias"
    NONE = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig(FfnConfig):
    """A mixture-of-experts feed-forward layer."""

    num_experts: int = 8  # E
    num_selected: int = 2  # experts that each token uses
    hidden_dim: int  # width of the hidden layer of one expert
    activation: Activation = Activation.SILU  # non-linearity of the gated experts
    bias: bool = False  # biases of the router and of the experts' projections
    score: RouterScore = RouterScore.SOFTMAX  # scores of experts from router logits
    normalize_weights: bool = True  # the weights of a token's selected experts sum to one
    routed_scale: float = 1.0  # multiplies the weights of the selected experts
    shared_hidden_dim: int = 0  # width of a gated MLP that every token uses beside its experts; 0 for none
    # what keeps the load even: a loss, a bias on the scores (DeepSeek-V3), or nothing
    balance: Balance = Balance.AUX_LOSS
    balance_weight: float = 0.01  # coefficient of the balance loss
    bias_rate: float = 0.001  # how far a bias moves in an optimizer step
    z_weight: float = 0.0  # coefficient of the squared log-sum-exp of router logits
    # room per expert and row, as a multiple of an even share; None drops nothing
    capacity_factor: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_selected <= self.num_experts:
            raise ValueError(
                f"ffn.num_selected is {self.num_selected}: set it between 1 and ffn.num_experts, "
                f"{self.num_experts}"
            )
        if self.hidden_dim < 1:
            raise ValueError(f"ffn.hidden_dim must be at least 1, got {self.hidden_dim}")
        if self.shared_hidden_dim < 0:
            raise ValueError(
                f"ffn.shared_hidden_dim is {self.shared_hidden_dim}: set a width, or 0 for no shared expert"
            )
        if negative := [
            name for name in ("balance_weight", "bias_rate", "z_weight") if getattr(self, name) < 0
        ]:
            raise ValueError(f"ffn.{negative[0]} must not be negative: 0 turns it off")
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(
                f"ffn.capacity_factor is {self.capacity_factor}: 1.25 is usual, and None drops no tokens"
            )

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "Moe":
        """The module, with freshly initialised parameters."""
        return Moe(self, dims, rngs=rngs)

    def active_share(self) -> float:
        """Share of the experts that one token uses."""
        return self.num_selected / self.num_experts

    def training_note(self) -> str | None:
        """Return what a user must know who trains this layer; None if there is nothing."""
        if self.num_selected > 1 or not self.normalize_weights:
            return None
        terms = {
            "balance_weight": self.balance_weight if self.balance is Balance.AUX_LOSS else 0.0,
            "z_weight": self.z_weight,
        }
        trained_by = " and ".join(f"ffn.{name}={weight:g}" for name, weight in terms.items() if weight)
        trained = f"only {trained_by} trains it" if trained_by else "nothing trains it"
        return (
            "with ffn.num_selected=1 and ffn.normalize_weights every token's expert has the weight 1: the "
            "loss gives the router no "
            f"gradient, and {trained}. For a router that learns from the loss set ffn.normalize_weights=False"
        )

    def for_inference(self) -> "MoeConfig":
        """Without a capacity: which tokens an expert has no room for depends on the others, and on how many
        are asked at a time.
        """
        return dataclasses.replace(self, capacity_factor=None)

    def capacity(self, length: int) -> int:
        """Tokens of a row of `length` that an expert has room for; of use only with a capacity factor."""
        even_share = length * self.num_selected / self.num_experts
        return min(length, math.ceil(even_share * (self.capacity_factor or 1.0)))


# Routing ----------------------------------------------------------------------------------------------------
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """Where tokens go. A padding token has weights 0 and the expert E, which does not exist."""

    weights: Float[Array, "B T K"]  # what the outputs of the selected experts are multiplied by
    experts: Int[Array, "B T K"]  # the selected experts, best first
    probabilities: Float[Array, "B T E"]  # scores that sum to one over experts, for the balance loss


def route(
    logits: Float[Array, "B T E"],
    real: Bool[Array, "B T"],
    bias: Float[Array, " E"] | None,
    *,
    config: MoeConfig,
) -> Routing:
    """Scores, selects and weighs experts, in float32.

    Args:
      real: False for padding.
      bias: added to the scores for the selection, not for the weights (auxiliary-loss-free balancing, Wang et
        al. 2024).
    """
    if config.score is RouterScore.SOFTMAX:
        scores = probabilities = jax.nn.softmax(logits, axis=-1)
    else:
        scores = jax.nn.sigmoid(logits)
        probabilities = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
    preference = scores if bias is None else scores + bias[None, None, :]
    _, experts = jax.lax.top_k(jax.lax.stop_gradient(preference), config.num_selected)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if config.normalize_weights and config.num_selected == 1:
        # what a score over itself is, without the rounding that would pass for its gradient
        weights = jnp.ones_like(weights)
    elif config.normalize_weights:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return Routing(
        weights=jnp.where(real[:, :, None], weights * config.routed_scale, 0.0),
        experts=jnp.where(real[:, :, None], experts, config.num_experts),
        probabilities=probabilities,
    )


def row_expert_counts(experts: Int[Array, "B T K"], num_experts: int) -> Float[Array, "B E"]:
    """How many real tokens of each row selected each expert."""
    chosen = experts[:, :, :, None] == jnp.arange(num_experts)[None, None, None, :]
    return jnp.sum(chosen, axis=(1, 2), dtype=jnp.float32)


def balance_loss(routing: Routing, real: Bool[Array, "B T"]) -> Float[Array, ""]:
    """`E * sum_e f_e p_e` of each row, times its number of real tokens, summed over rows (Fedus et al. 2021,
    by row).

    f is the share of the row's selections that went to an expert and p its mean probability over the row's
    real tokens, so that an even load gives 1 per real token. Divided by the global count of real tokens it is
    a mean over tokens.
    """
    num_experts = routing.probabilities.shape[-1]
    num_selected = routing.experts.shape[-1]
    num_real = jnp.maximum(jnp.sum(real, axis=1, dtype=jnp.float32), 1.0)
    share = row_expert_counts(routing.experts, num_experts) / (num_selected * num_real[:, None])
    # Not divided by the number of real tokens: that makes it the mean times the weight of the row.
    probability = jnp.sum(jnp.where(real[:, :, None], routing.probabilities, 0.0), axis=1)
    return num_experts * jnp.sum(share * probability)


def z_loss(logits: Float[Array, "B T E"], real: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Squared log-sum-exp of the router logits, summed over real tokens (Zoph et al. 2022): keeps logits
    small.
    """
    return jnp.sum(jnp.where(real, jnp.square(jax.nn.logsumexp(logits, axis=-1)), 0.0))


def updated_bias(
    bias: Float[Array, "*R E"], counts: Float[Array, "*R E"], rate: float
) -> Float[Array, "*R E"]:
    """Selection biases after an optimizer step: up by `rate` for experts with less than the mean load, down
    for more.

    Args:
      counts: tokens that selected each expert, over the global batch of the step.
    """
    return bias + rate * jnp.sign(jnp.mean(counts, axis=-1, keepdims=True) - counts)


# Dispatch ---------------------------------------------------------------------------------------------------
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """The rows that the experts compute, each of one selection (token m, choice j), which has the number m *
    K + j.
    """

    selection: Int[Array, " R"]  # whose row it is; M * K where a slot is empty
    slot: Int[Array, "M K"]  # where a selection is computed; R where it is not computed here
    group_sizes: Int[Array, " E"]  # slots of each expert, empty ones included, in the order of experts


def sorted_slots(experts: Int[Array, "M K"], num_experts: int) -> Slots:
    """A slot for every selection of the experts 0 to `num_experts` - 1, in the order of experts; nothing is
    dropped.
    """
    num_tokens, num_selected = experts.shape
    num_slots = num_tokens * min(num_selected, num_experts)  # a token selects an expert once
    order = jnp.argsort(experts.reshape(-1), stable=True)
    group_sizes = jnp.sum(experts.reshape(-1, 1) == jnp.arange(num_experts)[None, :], axis=0, dtype=jnp.int32)
    slot = jnp.argsort(order).reshape(num_tokens, num_selected)
    in_use = jnp.arange(num_slots) < jnp.sum(group_sizes)
    return Slots(
        selection=jnp.where(in_use, order[:num_slots], experts.size),
        slot=jnp.where(experts < num_experts, slot, num_slots),
        group_sizes=group_sizes,
    )


def capacity_slots(experts: Int[Array, "B T K"], num_experts: int, *, capacity: int) -> Slots:
    """Slots for every expert and row, [E, B, C] flattened: `capacity` of them, of which the earlier tokens
    come first.

    Under `sharding.local` a row may be a part of one: earlier tokens that other devices hold have used up
    their share.
    """
    num_rows, length, num_selected = experts.shape
    by_row = experts.reshape(num_rows, length * num_selected)
    counts = jnp.sum(by_row[:, :, None] == jnp.arange(num_experts)[None, None, :], axis=1, dtype=jnp.int32)
    kept = jnp.clip(capacity - communication.sum_before(counts, "time"), 0, counts)  # [B, E]
    capacity = min(capacity, length)  # a token selects an expert once
    num_slots = num_experts * num_rows * capacity
    per_row = length * num_selected
    row = jnp.arange(num_rows)[:, None]
    room = jnp.arange(capacity)[None, None, :]
    order = jnp.argsort(by_row, axis=1, stable=True)
    starts = jnp.cumsum(counts, axis=1) - counts
    expert = jnp.minimum(by_row, num_experts - 1)
    rank = jnp.argsort(order, axis=1) - jnp.take_along_axis(starts, expert, axis=1)
    has_slot = (by_row < num_experts) & (rank < jnp.take_along_axis(kept, expert, axis=1))
    slot = jnp.where(has_slot, (by_row * num_rows + row) * capacity + rank, num_slots)
    place = jnp.minimum(starts[:, :, None] + room, per_row - 1)  # [B, E, C], into the sorted row
    selection = (
        jnp.take_along_axis(order, place.reshape(num_rows, -1), axis=1).reshape(place.shape)
        + per_row * row[:, :, None]
    )
    selection = jnp.where(room < kept[:, :, None], selection, experts.size)
    return Slots(
        selection=jnp.swapaxes(selection, 0, 1).reshape(-1),
        slot=slot.reshape(-1, num_selected),
        group_sizes=jnp.full((num_experts,), num_rows * capacity, jnp.int32),
    )


def take_rows(
    x: Float[Array, "M D"], index: Int[Array, "..."], inverse: Int[Array, "M J"]
) -> Float[Array, "... D"]:
    """`x[index]`, zeros where `index` is M. The gradient gathers too: it is deterministic, and faster than a
    scatter.

    Args:
      inverse: for each row of `x` the places in the flattened result that hold it; the number of places for
        none.
    """
    return _take_rows(*communication.match_varying(x, index, inverse))


@jax.custom_vjp
def _take_rows(x: Array, index: Array, inverse: Array) -> Array:
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _take_rows_backward(inverse: Array, dy: Array) -> tuple[Array, None, None]:
    taken = jnp.take(dy.reshape(-1, dy.shape[-1]), inverse, axis=0, mode="fill", fill_value=0)
    return jnp.sum(taken, axis=1, dtype=jnp.float32).astype(dy.dtype), None, None


_take_rows.defvjp(lambda x, index, inverse: (_take_rows(x, index, inverse), inverse), _take_rows_backward)


def apply_experts(
    x: Float[Array, "B T D"],
    routing: Routing,
    *,
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    biases: tuple[Float[Array, "E F"], Float[Array, "E F"], Float[Array, "E D"]] | None = None,
    activation: Activation,
    capacity: int | None,
    hidden_quantizer: ArrayFunction | None = None,
) -> Float[Array, "B T D"]:
    """The weighted sum of the outputs of each token's experts, divided over the mesh where there is one.

    Args:
      biases: of gate, up and down, where the experts have any.
      hidden_quantizer: applied to a device's shard of the hidden layer before the product with `down`.
      capacity: tokens that an expert takes from a row, the earlier ones; None for all.
    """
    rows = ("batch", "time", None)
    matrices_in = ("expert", None, "ffn")
    matrices_out = ("expert", "ffn", None)

    def on_shard(x: Array, weights: Array, experts: Array, *matrices: Array) -> Array:
        rows_divided = communication.is_sharded("batch")
        if rows_divided:  # the devices that share out the experts hold different rows: each needs all of them
            x, weights, experts = (
                communication.gather(part, "expert", axis=0) for part in (x, weights, experts)
            )
        num_experts = matrices[0].shape[0]
        mine = experts - communication.index_along("expert") * num_experts
        mine = jnp.where((mine >= 0) & (mine < num_experts), mine, num_experts)
        added = _compute_slots(
            x,
            weights,
            mine,
            matrices,
            activation=activation,
            capacity=capacity,
            hidden_quantizer=hidden_quantizer,
        )
        y = communication.sum_over(added, "ffn")
        return (
            communication.scatter_sum(y, "expert", axis=0)
            if rows_divided
            else communication.sum_over(y, "expert")
        )

    in_dims = (rows, rows, rows, matrices_in, matrices_in, matrices_out)
    if biases is not None:
        in_dims = (*in_dims, ("expert", "ffn"), ("expert", "ffn"), ("expert", None))
    arrays = (x, routing.weights, routing.experts, gate, up, down, *(biases or ()))
    return communication.shard_mapped(on_shard, in_dims=in_dims, out_dims=rows)(*arrays)


def _compute_slots(
    x: Array,
    weights: Array,
    experts: Array,
    matrices: tuple[Array, ...],
    *,
    activation: Activation,
    capacity: int | None,
    hidden_quantizer: ArrayFunction | None,
) -> Array:
    """What the experts whose gate, up and down matrices (and biases) are given add to the tokens of `x`, [B,
    T, D].
    """
    gate, up, down, *biases = matrices
    num_experts = gate.shape[0]
    num_selected = experts.shape[-1]
    if capacity is None:
        slots = sorted_slots(experts.reshape(-1, num_selected), num_experts)
        multiply = functools.partial(kernels.grouped_matmul, group_sizes=slots.group_sizes)
    else:
        slots = capacity_slots(experts, num_experts, capacity=capacity)
        multiply = _even_groups
    rows = take_rows(x.reshape(-1, x.shape[-1]), slots.selection // num_selected, slots.slot)
    by_slot = [
        jnp.repeat(bias, slots.group_sizes, axis=0, total_repeat_length=rows.shape[0]) for bias in biases
    ]
    gate_bias, up_bias, down_bias = by_slot or (0, 0, 0)
    hidden = gated(activation, multiply(rows, gate) + gate_bias, multiply(rows, up) + up_bias)
    hidden = hidden if hidden_quantizer is None else hidden_quantizer(hidden)
    # Where the hidden dim is divided over devices, what they add is summed: the bias of the output comes in
    # as many parts.
    outputs = multiply(hidden, down) + down_bias / communication.num_shards("ffn")
    selected = take_rows(outputs, slots.slot, slots.selection[:, None])
    y = jnp.einsum(
        "mkd,mk->md", selected, weights.reshape(-1, num_selected), preferred_element_type=jnp.float32
    )
    return y.reshape(x.shape).astype(x.dtype)


def _even_groups(x: Array, weights: Array) -> Array:
    """`grouped_matmul` where all groups have the same number of rows: one batched product."""
    grouped = x.reshape(weights.shape[0], -1, x.shape[-1])
    return jnp.einsum("erd,edf->erf", grouped, weights).reshape(x.shape[0], -1)


# Modules ----------------------------------------------------------------------------------------------------
class RouterBias(nnx.Variable[Any]):
    """Selection biases: state that the trainer updates from expert counts, not trained by gradients."""


class Experts(nnx.Module):
    """The weights of all experts, stacked."""

    def __init__(self, config: MoeConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        wide = (config.num_experts, dims.embed_dim, config.hidden_dim)
        narrow = (config.num_experts, config.hidden_dim, dims.embed_dim)
        self.gate = nnx.Param(truncated_normal(rngs.params(), wide, dims.init_std))
        self.up = nnx.Param(truncated_normal(rngs.params(), wide, dims.init_std))
        self.down = nnx.Param(truncated_normal(rngs.params(), narrow, dims.output_std))
        self.gate_bias, self.up_bias, self.down_bias = (
            nnx.Param(jnp.zeros((config.num_experts, dim), jnp.float32)) if config.bias else None
            for dim in (config.hidden_dim, config.hidden_dim, dims.embed_dim)
        )
        self.input_quantizer: ArrayFunction | None = nnx.data(None)
        self.hidden_quantizer: ArrayFunction | None = nnx.data(None)


class Moe(Ffn):
    """Router, experts, and the shared expert if there is one."""

    def __init__(self, config: MoeConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.router = Linear(
            dims.embed_dim, config.num_experts, std=dims.init_std, bias=config.bias, rngs=rngs
        )
        self.router_bias = (
            RouterBias(jnp.zeros((config.num_experts,), jnp.float32))
            if config.balance is Balance.BIAS
            else None
        )
        self.experts = Experts(config, dims, rngs=rngs)
        shared = (
            MlpConfig(hidden_dim=config.shared_hidden_dim, activation=config.activation)
            if config.shared_hidden_dim
            else None
        )
        self.shared = None if shared is None else shared.build(dims, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], FfnAux]:
        config = self.config
        real = segment_ids != 0
        with jax.default_matmul_precision("float32"):
            logits = self.router(x.astype(jnp.float32))
        routing = route(
            logits, real, None if self.router_bias is None else self.router_bias[...], config=config
        )
        capacity = None if config.capacity_factor is None else config.capacity(x.shape[1])
        y = apply_experts(
            x if self.experts.input_quantizer is None else self.experts.input_quantizer(x),
            routing,
            gate=self.experts.gate[...].astype(x.dtype),
            up=self.experts.up[...].astype(x.dtype),
            down=self.experts.down[...].astype(x.dtype),
            biases=self._biases(x.dtype),
            activation=config.activation,
            capacity=capacity,
            hidden_quantizer=self.experts.hidden_quantizer,
        )
        if self.shared is not None:
            y = y + jnp.where(real[:, :, None], self.shared(x, segment_ids=segment_ids)[0], 0)
        return y, self._report(logits, routing, real, capacity)

    def _biases(self, dtype: Any) -> tuple[Array, Array, Array] | None:
        experts = self.experts
        if experts.gate_bias is None or experts.up_bias is None or experts.down_bias is None:
            return None
        return (
            experts.gate_bias[...].astype(dtype),
            experts.up_bias[...].astype(dtype),
            experts.down_bias[...].astype(dtype),
        )

    def _report(self, logits: Array, routing: Routing, real: Array, capacity: int | None) -> FfnAux:
        balance_weight = self.config.balance_weight if self.config.balance is Balance.AUX_LOSS else 0.0
        losses = {
            "moe_balance": balance_weight * balance_loss(routing, real),
            "moe_z": self.config.z_weight * z_loss(logits, real),
        }
        counts = row_expert_counts(routing.experts, self.config.num_experts)
        dropped = (
            jnp.zeros((), jnp.float32) if capacity is None else jnp.sum(jnp.maximum(counts - capacity, 0.0))
        )
        return FfnAux(losses=losses, metrics={"expert_counts": jnp.sum(counts, axis=0), "dropped": dropped})
