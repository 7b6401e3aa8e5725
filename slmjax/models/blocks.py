"""Blocks, and the groups of them that a scan runs.

A block is a mixer and a feed-forward layer with their norms, on the residual stream. `BlockStack` runs the
blocks of a layer group for all its repeats, and passes on what differs between layers: parameters, constants,
decoding states, and the values that layers write for later ones.

Dims: B batch, T time, D model, R repeats of a group.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from slmjax import kernels
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig, NormPlacement, Remat
from slmjax.models.layers import Norm, dropout
from slmjax.models.per_layer import PerLayerUpdate, by_layer
from slmjax.models.protocols import (
    NO_CONTEXT,
    Ffn,
    FfnAux,
    FfnConfig,
    MixerContext,
    StatefulFfn,
    Visibility,
    optional_arguments,
)
from slmjax.parallel import communication


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """The inputs of every layer of one forward pass, in addition to the residual stream."""

    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    max_lengths: Int[Array, " B"] | None
    capture: Mapping[str, Callable[[Array], Array]]
    visibility: Visibility = Visibility.CAUSAL
    is_prefix: Bool[Array, "B T"] | None = None
    shared_ffns: Mapping[str, Ffn] = dataclasses.field(default_factory=dict)  # by `FfnConfig.shared_name`
    per_layer: Float[Array, "B T N P"] | None = None  # inputs of each layer (`models/per_layer.py`)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockState:
    """The decoding state of a block's two parts. The fields are typed `Any` because this is a pytree."""

    mixer: Any
    ffn: Any  # None, but for a `StatefulFfn`


# Activations are reduced inside the scan: [B, T, D] of every layer would cost what rematerialization saves.
CAPTURES = ("mixer_output", "ffn_output", "block_output")


class Block(nnx.Module):
    """Mixer and feed-forward layer with their norms, on a residual stream."""

    def __init__(
        self,
        config: BlockConfig,
        model: ModelConfig,
        *,
        rngs: nnx.Rngs,
        constants: "LayerConstants | None" = None,
    ) -> None:
        dims = model.layer_dims()
        constants = {"mixer": {}, "ffn": {}} if constants is None else constants
        mixer_dims = dataclasses.replace(dims, constants=constants["mixer"])
        ffn_dims = dataclasses.replace(dims, constants=constants["ffn"])

        def norm(is_present: bool) -> Norm | None:
            return dims.norm(dims.embed_dim) if is_present else None

        # SANDWICH is neither of the two, and so has both norms.
        before = config.norm is not NormPlacement.POST
        after = config.norm is not NormPlacement.PRE
        self.config = config
        self.dropout = model.dropout
        self.multiplier = model.residual_multiplier * model.scaling.residual
        self.mixer = config.mixer.build(mixer_dims, rngs=rngs)
        self.mixer_norm = norm(before)
        self.mixer_post_norm = norm(after)
        self.ffn = config.ffn.build(ffn_dims, rngs=rngs) if _has_own_weights(config.ffn) else None
        self.ffn_norm = norm(before and config.ffn is not None)
        self.ffn_post_norm = norm(after and config.ffn is not None)
        per_layer = model.per_layer_embeddings
        self.per_layer = None if per_layer is None else PerLayerUpdate(per_layer, dims, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        inputs: LayerInputs,
        state: BlockState | None,
        key: Array | None,
        context: MixerContext | None = None,
        layer_inputs: Float[Array, "B T P"] | None = None,
    ) -> tuple[Array, BlockState | None, FfnAux, dict[str, Array]]:
        mixed, mixer_state = self.mixer(
            _maybe(self.mixer_norm, x),
            segment_ids=inputs.segment_ids,
            positions=inputs.positions,
            state=None if state is None else state.mixer,
            **optional_arguments(self.mixer, max_lengths=inputs.max_lengths, context=context or NO_CONTEXT),
        )
        x = self._add(x, _maybe(self.mixer_post_norm, mixed), key, 0)
        # Captured is what a sublayer returns, before its post-norm and the residual multiplier.
        activations = {"mixer_output": mixed}
        aux = FfnAux(losses={}, metrics={})
        ffn_state = None
        ffn = self._ffn(inputs)
        if ffn is not None:
            normed = _maybe(self.ffn_norm, x)
            if isinstance(ffn, StatefulFfn):
                ffn_state = None if state is None else state.ffn
                fed, aux, ffn_state = ffn(normed, segment_ids=inputs.segment_ids, state=ffn_state)
            else:
                fed, aux = ffn(normed, segment_ids=inputs.segment_ids)
            x = self._add(x, _maybe(self.ffn_post_norm, fed), key, 1)
            activations["ffn_output"] = fed
        if self.per_layer is not None:
            assert layer_inputs is not None
            x = self._add(x, self.per_layer(x, layer_inputs), key, 2)
        # One constraint per block keeps the residual stream sharded by batch and time.
        activations["block_output"] = x = communication.constrain(x, ("batch", "time", None))
        captured = {
            name: reduce(activations[name]) for name, reduce in inputs.capture.items() if name in activations
        }
        state = None if state is None else BlockState(mixer=mixer_state, ffn=ffn_state)
        return x, state, aux, captured

    def init_state(self, batch_size: int, *, max_length: int) -> BlockState:
        """Return an empty decoding state for sequences of at most `max_length` tokens."""
        return BlockState(
            mixer=self.mixer.init_state(batch_size, max_length=max_length),
            ffn=self.ffn.init_state(batch_size) if isinstance(self.ffn, StatefulFfn) else None,
        )

    def _ffn(self, inputs: LayerInputs) -> Ffn | StatefulFfn | None:
        name = None if self.config.ffn is None else self.config.ffn.shared_name()
        return self.ffn if name is None else inputs.shared_ffns[name]

    def _add(
        self, x: Float[Array, "B T D"], update: Float[Array, "B T D"], key: Array | None, index: int
    ) -> Float[Array, "B T D"]:
        if key is not None:
            # The index gives the parts of a block different masks.
            update = dropout(update, jax.random.fold_in(key, index), rate=self.dropout)
        return x + update * self.multiplier


def _has_own_weights(config: FfnConfig | None) -> TypeGuard[FfnConfig]:
    return config is not None and config.shared_name() is None


def _maybe(norm: Norm | None, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return x if norm is None else norm(x)


# What depends on a layer's index, by part of the block ("mixer", "ffn") and name.
LayerConstants = Mapping[str, Mapping[str, Any]]


def layer_constants(block: BlockConfig, model: ModelConfig, layers: Sequence[int]) -> LayerConstants:
    """Return the constants of equal blocks at these indices of the model, stacked: the layer dim is first.

    Raises:
      ValueError: the layers have constants of different names or shapes.
    """
    dims = model.layer_dims()
    stacked = {}
    for part in ("mixer", "ffn"):
        config = getattr(block, part)
        by_layer = [
            {} if config is None else config.layer_constants(dims, index=index, num_layers=model.num_layers)
            for index in layers
        ]
        shapes = [{name: np.shape(value) for name, value in constants.items()} for constants in by_layer]
        if any(other != shapes[0] for other in shapes):
            raise ValueError(
                f"{type(config).__name__}.layer_constants returns {shapes[0]} for layer {layers[0]}, and "
                "other names or shapes for another layer of the same config: they must be the same"
            )
        stacked[part] = {
            # In float32 and int32, the dtypes of JAX.
            name: jnp.asarray(np.stack([np.asarray(constants[name]) for constants in by_layer]))
            for name in by_layer[0]
        }
    return stacked


class BlockStack(nnx.Module):
    """The blocks of one group: parameters are stacked over its repeats, which a scan runs."""

    def __init__(self, config: LayerGroup, model: ModelConfig, *, first_layer: int, key: Array) -> None:
        self.config = config
        self.model = model
        self.remat = model.remat
        self.first_layer = first_layer
        blocks = []
        for offset, block in enumerate(config.pattern):
            # Initial weights depend on a layer's position in the model only, not on how layers are grouped.
            layers = first_layer + offset + len(config.pattern) * jnp.arange(config.repeats)
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, layers)
            constants = layer_constants(block, model, self.layers(offset))

            # The default argument binds this iteration's block; a closure would see the last one.
            def build(layer_key: Array, constants: LayerConstants, block: BlockConfig = block) -> Block:
                return Block(block, model, rngs=nnx.Rngs(params=layer_key), constants=constants)

            # A vmapped initialisation stacks the parameters without building every repeat in Python.
            first = jax.tree.map(lambda leaf: leaf[0], constants)
            graphdef = nnx.graphdef(nnx.eval_shape(build, keys[0], first))
            blocks.append(
                nnx.merge(
                    graphdef,
                    jax.vmap(
                        lambda layer_key, constants, build=build: nnx.state(build(layer_key, constants))
                    )(keys, constants),
                )
            )
        self.blocks = nnx.List(blocks)

    def layers(self, offset: int) -> list[int]:
        """Return the indices in the model of the layers of one block of the pattern."""
        size = len(self.config.pattern)
        return [self.first_layer + offset + size * repeat for repeat in range(self.config.repeats)]

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        inputs: LayerInputs,
        states: Any,
        key: Array | None,
        shared: Mapping[str, Any],
    ) -> tuple[Array, Any, list[FfnAux], list, dict[str, Any]]:
        """Run all repeats.

        States, reports and captured activations have one entry per block, with a leading dim of repeats.

        Args:
          shared: values that blocks of earlier groups wrote. Those of this group are added to the result.
        """
        # Modules cannot cross the boundary of a scan: their parameters are scanned over, and merged inside.
        graphdef, params = nnx.split(self.blocks)
        constants = [
            layer_constants(block, self.model, self.layers(offset))["mixer"]
            for offset, block in enumerate(self.config.pattern)
        ]
        # What blocks only read stays outside the carry: a backward pass would save it for every repeat.
        written = _written(self.config.pattern)

        def repeat(carry: tuple[Array, dict[str, Any]], xs: Any) -> tuple[Any, Any]:
            x, values = carry
            values = {**shared, **values}
            params, constants, states, layer_inputs, index = xs
            new_states = []
            reports = []
            captures = []
            for offset, block in enumerate(nnx.merge(graphdef, params)):
                # Keys are folded from the layer's index in the model, as those of initial weights are:
                # dropout does not depend on how layers are grouped.
                layer = self.first_layer + index * len(self.blocks) + offset
                block_key = None if key is None else jax.random.fold_in(key, layer)
                block_state = None if states is None else states[offset]
                context = _context(block.config, inputs, constants[offset], values)
                x, state, aux, captured = _run_loops(
                    block,
                    x,
                    inputs=inputs,
                    states=block_state,
                    key=block_key,
                    context=context,
                    layer_inputs=layer_inputs[offset],
                )
                values |= _checked_written(block.config, context)
                new_states.append(state)
                reports.append(aux)
                captures.append(captured)
            return (x, {name: values[name] for name in written}), (new_states, reports, captures)

        body = repeat if self.remat is Remat.NONE else _rematerialized(repeat, self.remat)
        # Rematerialization needs the loop: in unrolled code the compiler would find the first result and
        # reuse it.
        unroll = 1
        if self.remat is Remat.NONE:
            unroll = kernels.unrolled_repeats(self.config.repeats, num_blocks=len(self.blocks))
        layer_inputs = [
            None if inputs.per_layer is None else by_layer(inputs.per_layer, self.layers(offset))
            for offset in range(len(self.config.pattern))
        ]
        xs = (params, constants, states, layer_inputs, jnp.arange(self.config.repeats))
        initial = _initial_values(repeat, x, xs, shared=shared, pattern=self.config.pattern)
        (x, values), (new_states, reports, captures) = jax.lax.scan(body, (x, initial), xs, unroll=unroll)
        return x, None if states is None else new_states, reports, captures, {**shared, **values}


def run_block(
    block: Block,
    x: Float[Array, "B T D"],
    *,
    inputs: LayerInputs,
    state: BlockState | None,
    key: Array | None,
    constants: Mapping[str, Any],
    remat: Remat,
) -> tuple[Array, BlockState | None, FfnAux]:
    """Run a block outside the stack, once, without values of other layers."""
    # Modules cannot cross the boundary of rematerialization.
    graphdef, params = nnx.split(block)

    def run(params: Any, x: Array, state: BlockState | None) -> tuple[Array, BlockState | None, FfnAux]:
        context = _context(block.config, inputs, constants, {})
        merged = nnx.merge(graphdef, params)
        x, state, aux, _ = merged(x, inputs=inputs, state=state, key=key, context=context)
        return x, state, aux

    # No scan is around it that would keep the compiler from reusing the first result.
    run = run if remat is Remat.NONE else _rematerialized(run, remat, prevent_cse=True)
    return run(params, x, state)


def _context(
    config: BlockConfig, inputs: LayerInputs, constants: Mapping[str, Any], values: Mapping[str, Any]
) -> MixerContext:
    """Return what the mixer of a block receives besides its tokens.

    Raises:
      ValueError: the mixer cannot compute this visibility.
    """
    mixer = config.mixer
    if inputs.visibility not in mixer.visibilities():
        known = ", ".join(sorted(kind.value for kind in mixer.visibilities()))
        raise ValueError(
            f"visibility={inputs.visibility.value} was asked for, and {type(mixer).__name__} computes "
            f"{known}: choose another visibility, or another mixer"
        )
    return MixerContext(
        constants=constants,
        shared={name: values[name] for name in mixer.reads()},
        visibility=inputs.visibility,
        is_prefix=inputs.is_prefix,
    )


def _checked_written(config: BlockConfig, context: MixerContext) -> dict[str, Any]:
    declared = set(config.mixer.writes())
    if set(context.written) != declared:
        raise ValueError(
            f"{type(config.mixer).__name__} wrote {sorted(context.written)} for later layers, and its "
            f"writes() returns {sorted(declared)}: both must name the same values"
        )
    return context.written


def _written(pattern: Sequence[BlockConfig]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for block in pattern for name in block.mixer.writes()))


def _initial_values(
    repeat: Callable, x: Array, xs: Any, *, shared: Mapping[str, Any], pattern: Sequence[BlockConfig]
) -> dict[str, Any]:
    """Return what the carry of a group's scan begins with, of the values that its blocks write.

    Zeros where the pattern writes a value before it reads it, else the value of an earlier group.

    Raises:
      ValueError: a block reads a value of an earlier group, and the group then writes one of other shapes.
    """
    if not _written(pattern):
        return {}
    # Only tracing the blocks shows the shapes of what they write.
    first = jax.tree.map(lambda leaf: leaf[0], xs)
    (_, values), _ = jax.eval_shape(lambda: repeat((x, {}), first))
    initial = {
        name: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), value)
        for name, value in values.items()
    }
    seen: set[str] = set()
    for block in pattern:
        for name in block.mixer.reads():
            if name not in values or name in seen:
                continue
            shapes = [_shapes(shared[name]), _shapes(values[name])]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{type(block.mixer).__name__} reads {name!r} of the shapes {shapes[0]}, and a layer of "
                    f"the same group writes {shapes[1]}: give the written value another name"
                )
            initial[name] = shared[name]
        seen |= set(block.mixer.writes())
    return initial


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _run_loops(
    block: Block,
    x: Array,
    *,
    inputs: LayerInputs,
    states: Any,
    key: Array | None,
    context: MixerContext,
    layer_inputs: Array | None,
) -> tuple[Array, Any, FfnAux, dict]:
    """Run a block `num_loops` times; each loop has its own decoding state, and reports are summed."""
    new_states = []
    reports = []
    # Every loop overwrites the activations: those of the last remain.
    captured = {}
    # Depth without parameters, as in Universal Transformers (Dehghani et al. 2019) and MobileLLM-LS.
    for index in range(block.config.num_loops):
        # Loops have the same weights, but masks of their own.
        loop_key = None if key is None else jax.random.fold_in(key, index)
        x, state, aux, captured = block(
            x,
            inputs=inputs,
            state=None if states is None else states[index],
            key=loop_key,
            context=context,
            layer_inputs=layer_inputs,
        )
        new_states.append(state)
        reports.append(aux)
    # Reports are sums over tokens, which may be added; each loop has routed its tokens again.
    return x, new_states, jax.tree.map(lambda *sums: sum(sums), *reports), captured


def _rematerialized(body: Callable, remat: Remat, *, prevent_cse: bool = False) -> Callable:
    # DOTS saves products with weights, which cost most to repeat. The scores of attention have batch dims:
    # they are large, and recomputed.
    policies = {
        Remat.DOTS: jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        Remat.FULL: jax.checkpoint_policies.nothing_saveable,
    }
    # A scan is a barrier already: preventing common subexpressions again would cost time for nothing.
    return jax.checkpoint(body, policy=policies[remat], prevent_cse=prevent_cse)
