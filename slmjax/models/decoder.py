"""The decoder: groups of layers, each a repeating pattern of blocks, scanned over its repeats.

`ModelConfig` is the architecture. `Decoder` computes final hidden states and returns them with its `Head`;
logits are computed by the loss or the sampler. `definition.py` has the model as functions of a flat dict of
parameters.

Dims: B batch, T time, D model, V vocabulary, R repeats of a group.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from slmjax import kernels, losses
from slmjax.models.architecture import BlockConfig, HeadKind, LayerGroup, ModelConfig, NormPlacement, Remat
from slmjax.models.layers import ArrayFunction, Embedding, Norm, dropout, lookup, truncated_normal
from slmjax.models.protocols import (
    CachingMixer,
    ContextMixer,
    FfnAux,
    MixerContext,
    StatefulFfn,
    Visibility,
)
from slmjax.parallel import communication


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """The results of a forward pass. Losses and metrics are sums over the real tokens of the batch.

    The arrays are typed `Any` because this is a pytree: it may hold shapes.
    """

    hidden: Any  # Float[Array, "B T D"], after the final norm and the head's quantizer
    head: losses.Head
    # auxiliary losses, multiplied by their coefficients, summed over layers: Float[Array, ""]
    losses: dict[str, Any]
    metrics: dict[str, Any]  # by stack path of the module that reports, layer dim first
    captured: dict[str, Any]  # the activations of `capture`, by logical path
    state: Any  # decoding state, None in training


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """The inputs of every layer of one forward pass, in addition to the residual stream."""

    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    max_lengths: Int[Array, " B"] | None
    capture: Mapping[str, Callable[[Array], Array]]
    visibility: Visibility = Visibility.CAUSAL
    is_prefix: Bool[Array, "B T"] | None = None


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
        self.ffn = None if config.ffn is None else config.ffn.build(ffn_dims, rngs=rngs)
        self.ffn_norm = norm(before and config.ffn is not None)
        self.ffn_post_norm = norm(after and config.ffn is not None)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        inputs: LayerInputs,
        state: BlockState | None,
        key: Array | None,
        context: MixerContext | None = None,
    ) -> tuple[Array, BlockState | None, FfnAux, dict[str, Array]]:
        mixed, mixer_state = self.mixer(
            _maybe(self.mixer_norm, x),
            segment_ids=inputs.segment_ids,
            positions=inputs.positions,
            state=None if state is None else state.mixer,
            **self._optional_arguments(inputs, context),
        )
        x = self._add(x, _maybe(self.mixer_post_norm, mixed), key, 0)
        # Captured is what a sublayer returns, before its post-norm and the residual multiplier.
        activations = {"mixer_output": mixed}
        aux = FfnAux(losses={}, metrics={})
        ffn_state = None
        if self.ffn is not None:
            normed = _maybe(self.ffn_norm, x)
            if isinstance(self.ffn, StatefulFfn):
                ffn_state = None if state is None else state.ffn
                fed, aux, ffn_state = self.ffn(normed, segment_ids=inputs.segment_ids, state=ffn_state)
            else:
                fed, aux = self.ffn(normed, segment_ids=inputs.segment_ids)
            x = self._add(x, _maybe(self.ffn_post_norm, fed), key, 1)
            activations["ffn_output"] = fed
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

    def _optional_arguments(self, inputs: LayerInputs, context: MixerContext | None) -> dict[str, Any]:
        """Return the arguments that only some kinds of mixer take."""
        arguments: dict[str, Any] = {}
        if isinstance(self.mixer, CachingMixer):
            arguments["max_lengths"] = inputs.max_lengths
        if isinstance(self.mixer, ContextMixer) and context is not None:
            arguments["context"] = context
        return arguments

    def _add(
        self, x: Float[Array, "B T D"], update: Float[Array, "B T D"], key: Array | None, index: int
    ) -> Float[Array, "B T D"]:
        if key is not None:
            # The index gives mixer and feed-forward layer different masks.
            update = dropout(update, jax.random.fold_in(key, index), rate=self.dropout)
        return x + update * self.multiplier


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
            constants = layer_constants(block, model, self._layers(offset))

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

    def _layers(self, offset: int) -> list[int]:
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
            layer_constants(block, self.model, self._layers(offset))["mixer"]
            for offset, block in enumerate(self.config.pattern)
        ]
        # What blocks only read stays outside the carry: a backward pass would save it for every repeat.
        written = _written(self.config.pattern)

        def repeat(carry: tuple[Array, dict[str, Any]], xs: Any) -> tuple[Any, Any]:
            x, values = carry
            values = {**shared, **values}
            params, constants, states, index = xs
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
                    block, x, inputs=inputs, states=block_state, key=block_key, context=context
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
        xs = (params, constants, states, jnp.arange(self.config.repeats))
        initial = _initial_values(repeat, x, xs, shared=shared, pattern=self.config.pattern)
        (x, values), (new_states, reports, captures) = jax.lax.scan(body, (x, initial), xs, unroll=unroll)
        return x, None if states is None else new_states, reports, captures, {**shared, **values}


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
    block: Block, x: Array, *, inputs: LayerInputs, states: Any, key: Array | None, context: MixerContext
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
        )
        new_states.append(state)
        reports.append(aux)
    # Reports are sums over tokens, which may be added; each loop has routed its tokens again.
    return x, new_states, jax.tree.map(lambda *sums: sum(sums), *reports), captured


def _rematerialized(body: Callable, remat: Remat) -> Callable:
    # DOTS saves products with weights, which cost most to repeat. The scores of attention have batch dims:
    # they are large, and recomputed.
    policies = {
        Remat.DOTS: jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        Remat.FULL: jax.checkpoint_policies.nothing_saveable,
    }
    # The scan is a barrier already: preventing common subexpressions again would cost time for nothing.
    return jax.checkpoint(body, policy=policies[remat], prevent_cse=False)


class Decoder(nnx.Module):
    """Embedding, groups of blocks, final norm, head."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.dtype = config.layer_dims().dtype
        self.vocab_size = config.known_vocab_size
        key = rngs.params()
        embed_key, head_key, layer_key = jax.random.split(key, 3)
        self.embed = Embedding(
            config.table_rows, config.embed_dim, std=config.init_std, rngs=nnx.Rngs(params=embed_key)
        )
        rows = config.learned_positions
        # Derived, not split off with the others, whose values would change with the number of keys.
        position_key = jax.random.fold_in(embed_key, 1)
        self.positions = (
            None
            if rows is None
            else VocabTable(rows, config.embed_dim, std=config.init_std, key=position_key)
        )
        stacks = []
        first_layer = 0
        for group in config.stack:
            stacks.append(BlockStack(group, config, first_layer=first_layer, key=layer_key))
            first_layer += len(group.pattern) * group.repeats
        # The attribute's name begins every stack path: `paths.layer_indices` recognises stacks by it.
        self.segments = nnx.List(stacks)
        self.final_norm = config.layer_dims().norm(config.embed_dim)
        self.head = (
            VocabTable(config.table_rows, config.embed_dim, std=config.init_std, key=head_key)
            if config.head is HeadKind.UNTIED
            else None
        )
        # Marked as data, because quantization may set a module with variables here.
        self.head_quantizer: ArrayFunction | None = nnx.data(None)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: Any = None,
        max_lengths: Int[Array, " B"] | None = None,
        key: Array | None = None,
        capture: Mapping[str, Callable[[Array], Array]] | None = None,
        visibility: Visibility = Visibility.CAUSAL,
        is_prefix: Bool[Array, "B T"] | None = None,
    ) -> Output:
        """Return the final hidden states of a batch, and the head.

        Args:
          tokens: token ids.
          segment_ids: the document each token belongs to, from 1; 0 is padding.
          positions: index of each token within its document.
          state: decoding state from `init_state` or an earlier call; None for whole sequences.
          max_lengths: tokens that each sequence may reach, prompt and new ones together, the same in every
            call for it. LongRoPE needs them with a `state`; without one, None stands for the length of each
            document.
          key: randomness of dropout; None for evaluation.
          capture: named activations to return (`CAPTURES`; of the last loop of a block), each with the
            function that reduces it inside the scan.
          visibility: which tokens of its document a token sees.
          is_prefix: tokens of the prefix, which all tokens of their document see, with `Visibility.PREFIX`.

        Raises:
          ValueError: an activation has no such name, or a mixer or a decoding state has no such visibility.
        """
        _check_visibility(visibility, is_prefix=is_prefix, state=state)
        inputs = LayerInputs(
            segment_ids=segment_ids,
            positions=positions,
            max_lengths=max_lengths,
            capture=_checked_capture(capture or {}),
            visibility=visibility,
            is_prefix=is_prefix,
        )
        dtype = self.dtype
        # The multiplier is cast first, as in Gemma's reference: its rounding to bfloat16 is part of the
        # model.
        x = self.embed(tokens, dtype=dtype) * jnp.asarray(self.config.embed_multiplier, dtype)
        if self.positions is not None:
            x = x + lookup(self.positions.weight[...], positions, dtype=dtype)
        x = communication.constrain(x, ("batch", "time", None))
        if key is not None:
            # The index after that of the last layer, so that no layer has the same key.
            x = dropout(x, jax.random.fold_in(key, self.config.num_layers), rate=self.config.dropout)
        # Groups differ in their structure and run one after another; only inside one is there a scan.
        new_states = []
        losses_by_name = {}
        metrics = {}
        captured = {}
        first_layer = 0
        shared: dict[str, Any] = {}
        for index, stack in enumerate(self.segments):
            stack_state = None if state is None else state[index]
            x, stack_state, reports, captures, shared = stack(
                x, inputs=inputs, states=stack_state, key=key, shared=shared
            )
            new_states.append(stack_state)
            for offset, (aux, activations) in enumerate(zip(reports, captures, strict=True)):
                # Reports have a leading dim of repeats: losses are summed over it, metrics keep it.
                for name, sums in aux.losses.items():
                    losses_by_name[name] = losses_by_name.get(name, 0.0) + jnp.sum(sums)
                metrics |= {
                    f"segments/{index}/blocks/{offset}/ffn/{name}": sums for name, sums in aux.metrics.items()
                }
                # Blocks of a pattern alternate: repeat r of block i is layer first + i + r * (blocks of the
                # pattern).
                captured |= {
                    f"layers/{first_layer + offset + len(reports) * repeat}/{name}": value[repeat]
                    for name, value in activations.items()
                    for repeat in range(value.shape[0])
                }
            first_layer += stack.config.repeats * len(reports)
        # Logits are not computed here: no array [B, T, V] exists in training.
        hidden = self.final_norm(x)
        return Output(
            hidden=hidden if self.head_quantizer is None else self.head_quantizer(hidden),
            head=self.make_head(),
            losses=losses_by_name,
            metrics=metrics,
            captured=captured,
            state=None if state is None else new_states,
        )

    def make_head(self) -> losses.Head:
        """Return the output projection, for the loss and the sampler."""
        config = self.config
        table = self.embed.table[...] if self.head is None else self.head.weight[...]
        return losses.Head(
            weight=table.astype(self.dtype),
            bias=None,
            softcap=config.logit_softcap,
            scale=config.logit_multiplier * config.scaling.logits,
            vocab_size=self.vocab_size,
        )

    def init_state(self, batch_size: int, *, max_length: int) -> Any:
        """Return an empty decoding state: per group, per block, per loop, with a leading dim of repeats."""

        def repeated(block: Block, repeats: int) -> list[Any]:
            # Each loop has a cache of its own: its keys come from another state of the residual stream.
            state = block.init_state(batch_size, max_length=max_length)
            return [
                jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (repeats, *leaf.shape)), state)
                for _ in range(block.config.num_loops)
            ]

        return [[repeated(block, stack.config.repeats) for block in stack.blocks] for stack in self.segments]


class VocabTable(nnx.Module):
    """A separate table: the rows [V, D] of an untied head, or [P, D] of positions."""

    def __init__(self, num_rows: int, dim: int, *, std: float, key: Array) -> None:
        self.weight = nnx.Param(truncated_normal(key, (num_rows, dim), std))


def _checked_capture(
    capture: Mapping[str, Callable[[Array], Array]],
) -> Mapping[str, Callable[[Array], Array]]:
    if unknown := set(capture) - set(CAPTURES):
        raise ValueError(f"unknown activation(s) {sorted(unknown)}: capture takes {', '.join(CAPTURES)}")
    return capture


def _check_visibility(visibility: Visibility, *, is_prefix: Any, state: Any) -> None:
    if (visibility is Visibility.PREFIX) != (is_prefix is not None):
        raise ValueError(
            f"visibility={visibility.value} and is_prefix={'none' if is_prefix is None else 'an array'}: a "
            "prefix needs both, and the other kinds have no prefix"
        )
    if visibility is Visibility.BOTH and state is not None:
        raise ValueError(
            "visibility=both sees tokens that decoding has not made yet: leave out the state, or choose "
            "causal or prefix"
        )


def logits(model: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Return float32 logits of whole sequences: for tests and notebooks, not for training."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    output = model(tokens, segment_ids=jnp.ones_like(tokens), positions=positions)
    # Rows of padding beyond the vocabulary are cut off.
    return losses.logits(output.hidden, output.head)[..., : output.head.vocab_size]
