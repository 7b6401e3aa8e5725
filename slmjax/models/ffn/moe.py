"""Mixture of experts: a router sends each token to a few of many gated MLPs and sums their weighted outputs.

Tokens are dispatched without drops (sorted by expert, one grouped product) or with a capacity per expert and
sequence, beyond which later tokens are dropped. Experts may be sharded over devices: each device computes its
own experts for the tokens of all, and the sums return to the tokens' devices. The load is balanced by an
auxiliary loss or by a bias on the scores that the trainer updates once per optimizer step. Everything here is
per token or per sequence, so that results depend neither on gradient accumulation nor on which sequences
share a batch.

Dims: B batch, T time, D model, E experts, K selected experts of a token, F hidden of an expert; M tokens
(B T); R slots, the rows that the experts compute; C capacity.
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
from slmjax.config import added_field
from slmjax.models.ffn.mlp import Activation, MlpConfig, gated
from slmjax.models.layers import ArrayFunction, Linear, ModelDims, truncated_normal
from slmjax.models.protocols import Ffn, FfnAux, FfnConfig
from slmjax.parallel import communication


class RouterScore(enum.Enum):
    """Function from router logits to scores of experts."""

    # Scores compete: one expert's rises only as others fall (Switch Transformer, OLMoE).
    SOFTMAX = "softmax"
    # Scores are independent of each other (DeepSeek-V3).
    SIGMOID = "sigmoid"


class Balance(enum.Enum):
    """Method that keeps the load of experts even."""

    AUX_LOSS = "aux_loss"  # a loss (Fedus et al. 2021)
    BIAS = "bias"  # a bias on the scores for selection (Wang et al. 2024, DeepSeek-V3)
    NONE = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig(FfnConfig):
    """A mixture-of-experts feed-forward layer."""

    num_experts: int = 8  # E
    num_selected: int = 2  # experts that each token uses, K
    hidden_dim: int  # width of the hidden layer of one expert, F
    activation: Activation = Activation.SILU  # non-linearity of the gated experts
    bias: bool = False  # biases of the router and of the experts' projections
    score: RouterScore = RouterScore.SOFTMAX  # scores of experts from router logits
    normalize_weights: bool = True  # the weights of a token's selected experts sum to one
    routed_scale: float = 1.0  # factor of the weights of the selected experts
    shared_hidden_dim: int = 0  # width of a gated MLP that every token uses in addition; 0 for none
    # multiply the output of the shared MLP by the sigmoid of a projection of its input to one number (Qwen)
    shared_gate: bool = added_field(False, before=False)
    balance: Balance = Balance.AUX_LOSS  # method that keeps the load even
    # 0.01 as in Switch Transformer (Fedus et al. 2021), 0.001 for the bias as in DeepSeek-V3.
    balance_weight: float = 0.01  # coefficient of the balance loss
    bias_rate: float = 0.001  # change of a bias in an optimizer step
    # ST-MoE has 0.001 (Zoph et al. 2022): large router logits make the softmax sensitive to rounding.
    z_weight: float = 0.0  # coefficient of the squared log-sum-exp of router logits
    # capacity per expert and sequence, as a multiple of the tokens under an even load; None drops no tokens
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
        if self.shared_gate and not self.shared_hidden_dim:
            raise ValueError("ffn.shared_gate needs a shared expert: set ffn.shared_hidden_dim")
        if negative := [
            name for name in ("balance_weight", "bias_rate", "z_weight") if getattr(self, name) < 0
        ]:
            raise ValueError(f"ffn.{negative[0]} must not be negative: 0 turns it off")
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(
                f"ffn.capacity_factor is {self.capacity_factor}: 1.25 is usual, and None drops no tokens"
            )

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "Moe":
        """Build the module, with freshly initialised parameters."""
        return Moe(self, dims, rngs=rngs)

    def active_fraction(self) -> float:
        """Return the fraction of the experts that one token uses."""
        return self.num_selected / self.num_experts

    def training_note(self) -> str | None:
        """Return a warning about training with these settings; None if there is none."""
        # One weight normalized by itself is the constant 1 (`route`).
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
            f"loss gives the router no gradient, and {trained}. For a router that learns from the loss set "
            "ffn.normalize_weights=False"
        )

    def for_inference(self) -> "MoeConfig":
        """Return the config without a capacity.

        With one, dropped tokens would depend on the other tokens, and on how many are computed at once.
        """
        return dataclasses.replace(self, capacity_factor=None)

    def capacity(self, length: int) -> int:
        """Return an expert's capacity for a sequence of `length` tokens, if there is a capacity factor."""
        # A token selects an expert at most once: slots beyond `length` would stay empty.
        even_load = length * self.num_selected / self.num_experts
        return min(length, math.ceil(even_load * (self.capacity_factor or 1.0)))


# Routing ----------------------------------------------------------------------------------------------------
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """Experts of each token. A padding token has weights 0 and the expert E, which does not exist."""

    weights: Float[Array, "B T K"]  # factors of the selected experts' outputs
    experts: Int[Array, "B T K"]  # the selected experts, best first
    probabilities: Float[Array, "B T E"]  # scores that sum to one over experts, for the balance loss


def route(
    logits: Float[Array, "B T E"],
    real: Bool[Array, "B T"],
    bias: Float[Array, " E"] | None,
    *,
    config: MoeConfig,
) -> Routing:
    """Score, select and weight experts, in float32.

    Args:
      logits: router logits.
      real: False for padding.
      bias: added to the scores for the selection, not for the weights (auxiliary-loss-free balancing, Wang et
        al. 2024).
      config: settings of the layer.
    """
    if config.score is RouterScore.SOFTMAX:
        scores = jax.nn.softmax(logits, axis=-1)
        probabilities = scores
    else:
        scores = jax.nn.sigmoid(logits)
        # Sigmoids do not sum to one, and the balance loss needs a distribution. They may all underflow to 0.
        probabilities = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
    # The bias changes the selection only: weights are unbiased scores, so balancing adds no gradient to the
    # loss.
    preference = scores if bias is None else scores + bias[None, None, :]
    # The choice has no gradient. The router learns through the weights of the chosen experts.
    _, experts = jax.lax.top_k(jax.lax.stop_gradient(preference), config.num_selected)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if config.normalize_weights and config.num_selected == 1:
        # A score divided by itself, without the rounding errors that would make a gradient of it.
        weights = jnp.ones_like(weights)
    elif config.normalize_weights:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return Routing(
        weights=jnp.where(real[:, :, None], weights * config.routed_scale, 0.0),
        # Padding counts for no expert, takes no slot and uses no capacity.
        experts=jnp.where(real[:, :, None], experts, config.num_experts),
        probabilities=probabilities,
    )


def row_expert_counts(experts: Int[Array, "B T K"], num_experts: int) -> Float[Array, "B E"]:
    """Count the real tokens of each sequence that selected each expert."""
    # A comparison that fuses into the sum, instead of a scatter-add, whose order of additions is undefined.
    is_selected = experts[:, :, :, None] == jnp.arange(num_experts)[None, None, None, :]
    return jnp.sum(is_selected, axis=(1, 2), dtype=jnp.float32)


def balance_loss(routing: Routing, real: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Return `E * sum_e f_e p_e` of each sequence times its real tokens, summed (Fedus et al. 2021).

    f is the fraction of the sequence's selections that went to an expert, and p the expert's mean probability
    over the sequence's real tokens, so that an even load gives 1 per real token. Divided by the global count
    of real tokens this is a mean over tokens. Fedus et al. compute f and p over the batch; computed per
    sequence, the loss depends on no other sequence.
    """
    num_experts = routing.probabilities.shape[-1]
    num_selected = routing.experts.shape[-1]
    # Rows that are all padding must not divide by zero.
    num_real = jnp.maximum(jnp.sum(real, axis=1, dtype=jnp.float32), 1.0)
    # Counts are constants to autodiff: the gradient flows through the probabilities only.
    fraction = row_expert_counts(routing.experts, num_experts) / (num_selected * num_real[:, None])
    # A sum over real tokens: the mean p times the number of real tokens, the weight of the sequence.
    probability = jnp.sum(jnp.where(real[:, :, None], routing.probabilities, 0.0), axis=1)
    return num_experts * jnp.sum(fraction * probability)


def z_loss(logits: Float[Array, "B T E"], real: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Return the squared log-sum-exp of router logits, summed over real tokens (Zoph et al. 2022)."""
    return jnp.sum(jnp.where(real, jnp.square(jax.nn.logsumexp(logits, axis=-1)), 0.0))


def updated_bias(
    bias: Float[Array, "*R E"], counts: Float[Array, "*R E"], rate: float
) -> Float[Array, "*R E"]:
    """Return selection biases after an optimizer step: `rate` higher for experts below the mean load.

    Those above the mean load get a bias lower by `rate` (Wang et al. 2024).

    Args:
      bias: biases before the step.
      counts: tokens that selected each expert, over the global batch of the step.
      rate: size of the change.
    """
    # The sign alone: the size of a change does not depend on the tokens in a batch.
    return bias + rate * jnp.sign(jnp.mean(counts, axis=-1, keepdims=True) - counts)


# Dispatch ---------------------------------------------------------------------------------------------------
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """Assignment of selections to slots, the rows that the experts compute.

    A selection is the choice j of a token m and has the index m * K + j. The two arrays of indices are
    inverses of each other, so that dispatch and combination, forward and backward, are all gathers.
    """

    selection: Int[Array, " R"]  # selection in each slot; M * K for an empty slot
    slot: Int[Array, "M K"]  # slot of each selection; R if it is not computed here
    group_sizes: Int[Array, " E"]  # slots of each expert, empty ones included, in the order of experts


def sorted_slots(experts: Int[Array, "M K"], num_experts: int) -> Slots:
    """Assign a slot to every selection of the experts 0 to `num_experts` - 1, sorted by expert."""
    num_tokens, num_selected = experts.shape
    # A token selects an expert at most once, which bounds the slots where a device has few experts.
    num_slots = num_tokens * min(num_selected, num_experts)
    # Experts of other devices have the number `num_experts`: they sort behind all slots in use.
    order = jnp.argsort(experts.reshape(-1), stable=True)
    group_sizes = jnp.sum(experts.reshape(-1, 1) == jnp.arange(num_experts)[None, :], axis=0, dtype=jnp.int32)
    # The inverse of a permutation is its argsort.
    slot = jnp.argsort(order).reshape(num_tokens, num_selected)
    in_use = jnp.arange(num_slots) < jnp.sum(group_sizes)
    return Slots(
        selection=jnp.where(in_use, order[:num_slots], experts.size),
        slot=jnp.where(experts < num_experts, slot, num_slots),
        group_sizes=group_sizes,
    )


def capacity_slots(experts: Int[Array, "B T K"], num_experts: int, *, capacity: int) -> Slots:
    """Assign `capacity` slots to every expert and sequence, [E, B, C] flattened; earlier tokens come first.

    Inside `shard_mapped` a sequence may be sharded: earlier tokens on other devices have used up some of the
    capacity.
    """
    num_sequences, length, num_selected = experts.shape
    by_sequence = experts.reshape(num_sequences, length * num_selected)
    is_selected = by_sequence[:, :, None] == jnp.arange(num_experts)[None, None, :]
    counts = jnp.sum(is_selected, axis=1, dtype=jnp.int32)
    # The part of the capacity that earlier tokens on other devices leave to these.
    num_computed = jnp.clip(capacity - communication.sum_before(counts, "time"), 0, counts)  # [B, E]
    # A token selects an expert at most once.
    capacity = min(capacity, length)
    num_slots = num_experts * num_sequences * capacity
    num_selections = length * num_selected
    sequence = jnp.arange(num_sequences)[:, None]

    # The slot of each selection: its rank among the sequence's selections of the same expert, if that is
    # below the capacity. The sort is stable, so the rank counts earlier tokens.
    order = jnp.argsort(by_sequence, axis=1, stable=True)
    starts = jnp.cumsum(counts, axis=1) - counts
    # Clamped to be a valid index: `has_slot` masks the experts of other devices.
    expert = jnp.minimum(by_sequence, num_experts - 1)
    rank = jnp.argsort(order, axis=1) - jnp.take_along_axis(starts, expert, axis=1)
    has_slot = (by_sequence < num_experts) & (rank < jnp.take_along_axis(num_computed, expert, axis=1))
    slot = jnp.where(has_slot, (by_sequence * num_sequences + sequence) * capacity + rank, num_slots)

    # The selection in each slot, [B, E, C].
    rank_in_slot = jnp.arange(capacity)[None, None, :]
    # Slots without a selection would index past the end: clamped here, masked below.
    sorted_index = jnp.minimum(starts[:, :, None] + rank_in_slot, num_selections - 1)
    selection = jnp.take_along_axis(order, sorted_index.reshape(num_sequences, -1), axis=1)
    selection = selection.reshape(sorted_index.shape) + num_selections * sequence[:, :, None]
    selection = jnp.where(rank_in_slot < num_computed[:, :, None], selection, experts.size)
    return Slots(
        # Experts come first, so that the slots of each are contiguous.
        selection=jnp.swapaxes(selection, 0, 1).reshape(-1),
        slot=slot.reshape(-1, num_selected),
        group_sizes=jnp.full((num_experts,), num_sequences * capacity, jnp.int32),
    )


def take_rows(
    x: Float[Array, "M D"], index: Int[Array, "..."], inverse: Int[Array, "M J"]
) -> Float[Array, "... D"]:
    """Return `x[index]`, and zeros where `index` is M.

    The gradient is a gather too: it is deterministic, and faster than the scatter that autodiff would make.

    Args:
      x: rows.
      index: row of `x` for each row of the result.
      inverse: for each row of `x` the flattened indices of the result that hold it; the size of the result
        for none.
    """
    return _take_rows(*communication.match_varying(x, index, inverse))


@jax.custom_vjp
def _take_rows(x: Array, index: Array, inverse: Array) -> Array:
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _take_rows_backward(inverse: Array, dy: Array) -> tuple[Array, None, None]:
    taken = jnp.take(dy.reshape(-1, dy.shape[-1]), inverse, axis=0, mode="fill", fill_value=0)
    # A token's gradient is the sum over its K experts, in float32 whatever the dtype.
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
    """Return the weighted sum of the outputs of each token's experts, computed on the devices of the mesh.

    Args:
      x: inputs of the experts.
      routing: experts of each token.
      gate: gate projections.
      up: up-projections.
      down: down-projections.
      biases: biases of gate, up and down, if the experts have any.
      activation: non-linearity.
      hidden_quantizer: applied to a device's shard of the hidden layer before the product with `down`.
      capacity: maximum tokens that an expert takes from a sequence, the earlier ones; None for all.
    """
    token_dims = ("batch", "time", None)
    in_matrix_dims = ("expert", None, "ffn")
    out_matrix_dims = ("expert", "ffn", None)

    def on_device(x: Array, weights: Array, experts: Array, *matrices: Array) -> Array:
        is_batch_sharded = communication.is_sharded("batch")
        # The batch is sharded over the expert axis too, and each expert needs all tokens of these devices.
        if is_batch_sharded:
            x, weights, experts = (
                communication.gather(part, "expert", axis=0) for part in (x, weights, experts)
            )
        # From here on experts are numbered from this device's first.
        num_experts = matrices[0].shape[0]
        local_experts = experts - communication.index_along("expert") * num_experts
        is_local = (local_experts >= 0) & (local_experts < num_experts)
        local_experts = jnp.where(is_local, local_experts, num_experts)
        y = _expert_outputs(
            x,
            weights,
            local_experts,
            matrices,
            activation=activation,
            capacity=capacity,
            hidden_quantizer=hidden_quantizer,
        )
        # Where the hidden dim is sharded, each device has a partial sum of the down-projection.
        y = communication.sum_over(y, "ffn")
        if is_batch_sharded:
            # One reduce-scatter adds the outputs of all experts and returns each device its own sequences.
            return communication.scatter_sum(y, "expert", axis=0)
        return communication.sum_over(y, "expert")

    in_dims = (token_dims, token_dims, token_dims, in_matrix_dims, in_matrix_dims, out_matrix_dims)
    if biases is not None:
        in_dims = (*in_dims, ("expert", "ffn"), ("expert", "ffn"), ("expert", None))
    arrays = (x, routing.weights, routing.experts, gate, up, down, *(biases or ()))
    return communication.shard_mapped(on_device, in_dims=in_dims, out_dims=token_dims)(*arrays)


def _expert_outputs(
    x: Array,
    weights: Array,
    experts: Array,
    matrices: tuple[Array, ...],
    *,
    activation: Activation,
    capacity: int | None,
    hidden_quantizer: ArrayFunction | None,
) -> Array:
    """Return the weighted outputs [B, T, D] of the experts of one device for the tokens of `x`.

    Args:
      x: inputs of the experts.
      weights: weights of each token's selected experts.
      experts: selected experts, numbered from this device's first; `num_experts` for those of other devices.
      matrices: gate, up and down of this device's experts, then their biases, if any.
      activation: non-linearity.
      capacity: maximum tokens of an expert and sequence; None for all.
      hidden_quantizer: applied to the hidden layer.
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
    # Selection // K is its token. An empty slot's M * K becomes M, for which `take_rows` returns zeros.
    rows = take_rows(x.reshape(-1, x.shape[-1]), slots.selection // num_selected, slots.slot)
    # Group sizes are traced, so the length of the result must be given.
    by_slot = [
        jnp.repeat(bias, slots.group_sizes, axis=0, total_repeat_length=rows.shape[0]) for bias in biases
    ]
    gate_bias, up_bias, down_bias = by_slot or (0, 0, 0)
    hidden = gated(activation, multiply(rows, gate) + gate_bias, multiply(rows, up) + up_bias)
    hidden = hidden if hidden_quantizer is None else hidden_quantizer(hidden)
    # If the hidden dim is sharded, the outputs of these devices are summed, so each adds a part of the bias.
    outputs = multiply(hidden, down) + down_bias / communication.num_shards("ffn")
    # The same two index arrays with their roles exchanged: each slot holds one selection.
    selected = take_rows(outputs, slots.slot, slots.selection[:, None])
    y = jnp.einsum(
        "mkd,mk->md", selected, weights.reshape(-1, num_selected), preferred_element_type=jnp.float32
    )
    return y.reshape(x.shape).astype(x.dtype)


def _even_groups(x: Array, weights: Array) -> Array:
    """Return `grouped_matmul` for groups of equal size: one batched product."""
    grouped = x.reshape(weights.shape[0], -1, x.shape[-1])
    return jnp.einsum("erd,edf->erf", grouped, weights).reshape(x.shape[0], -1)


# Modules ----------------------------------------------------------------------------------------------------
class RouterBias(nnx.Variable[Any]):
    """Selection biases: state that the trainer updates from expert counts, without gradients."""


class Experts(nnx.Module):
    """The weights of all experts, stacked."""

    def __init__(self, config: MoeConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        # One array for all experts shards over the expert axis and multiplies in one grouped product.
        in_shape = (config.num_experts, dims.embed_dim, config.hidden_dim)
        out_shape = (config.num_experts, config.hidden_dim, dims.embed_dim)
        self.gate = nnx.Param(truncated_normal(rngs.params(), in_shape, dims.init_std))
        self.up = nnx.Param(truncated_normal(rngs.params(), in_shape, dims.init_std))
        self.down = nnx.Param(truncated_normal(rngs.params(), out_shape, dims.output_std))
        self.gate_bias, self.up_bias, self.down_bias = (
            nnx.Param(jnp.zeros((config.num_experts, dim), jnp.float32)) if config.bias else None
            for dim in (config.hidden_dim, config.hidden_dim, dims.embed_dim)
        )
        self.input_quantizer: ArrayFunction | None = nnx.data(None)
        self.hidden_quantizer: ArrayFunction | None = nnx.data(None)


class Moe(Ffn):
    """Router, experts, and an optional shared expert."""

    def __init__(self, config: MoeConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.router = Linear(
            dims.embed_dim, config.num_experts, std=dims.router_std, bias=config.bias, rngs=rngs
        )
        self.router_bias = (
            RouterBias(jnp.zeros((config.num_experts,), jnp.float32))
            if config.balance is Balance.BIAS
            else None
        )
        self.experts = Experts(config, dims, rngs=rngs)
        # A shared expert learns what all tokens need, which routed ones then need not repeat (DeepSeekMoE,
        # Dai et al. 2024).
        shared = (
            MlpConfig(hidden_dim=config.shared_hidden_dim, activation=config.activation)
            if config.shared_hidden_dim
            else None
        )
        self.shared = None if shared is None else shared.build(dims, rngs=rngs)
        # Like the router it maps any width to a fixed number of outputs.
        gate_kwargs = {"std": dims.router_std, "rngs": rngs}
        self.shared_gate = Linear(dims.embed_dim, 1, **gate_kwargs) if config.shared_gate else None

    def __call__(
        self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], FfnAux]:
        config = self.config
        real = segment_ids != 0
        # The router is float32 throughout: rounding to bfloat16 changes which experts are selected.
        # GPUs and TPUs would otherwise multiply float32 arrays in TF32 or bfloat16.
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
            # Routed experts give padding zero through its weights; the shared one needs a mask.
            shared = self.shared(x, segment_ids=segment_ids)[0]
            if self.shared_gate is not None:
                gates = jax.nn.sigmoid(self.shared_gate(x).astype(jnp.float32))
                shared = (gates * shared).astype(x.dtype)
            y = y + jnp.where(real[:, :, None], shared, 0)
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
        # Selections as the router made them, dropped ones included: these are what balancing acts on.
        counts = row_expert_counts(routing.experts, self.config.num_experts)
        dropped = jnp.zeros((), jnp.float32)
        if capacity is not None:
            dropped = jnp.sum(jnp.maximum(counts - capacity, 0.0))
        return FfnAux(losses=losses, metrics={"expert_counts": jnp.sum(counts, axis=0), "dropped": dropped})
