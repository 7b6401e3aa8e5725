"""The decoder: groups of layers, each a repeating pattern of blocks, scanned over its repeats.

`ModelConfig` is the architecture. `Decoder` computes final hidden states and returns them with its `Head`;
logits are computed by the loss or the sampler. `definition.py` has the model as functions of a flat dict of
parameters.

Dims: B batch, T time, D model, V vocabulary, R repeats of a group.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from slmjax import losses
from slmjax.models.architecture import HeadKind, ModelConfig
from slmjax.models.blocks import CAPTURES, Block, BlockStack, LayerInputs
from slmjax.models.layers import ArrayFunction, Embedding, ModelDims, dropout, lookup, truncated_normal
from slmjax.models.loops import ExitGate, LoopOutputs, exit_log_probs, exit_loops, results_of
from slmjax.models.multi_token import MultiTokenModule
from slmjax.models.per_layer import PerLayerInputs
from slmjax.models.protocols import Ffn, FfnAux, FfnConfig, Visibility
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
    loops: Any = None  # LoopOutputs | None: of a model with an exit gate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reports:
    """What the layers return besides hidden states, as in `Output`."""

    states: Any
    losses: dict[str, Any]
    metrics: dict[str, Any]
    captured: dict[str, Any]


class Decoder(nnx.Module):
    """Embedding, groups of blocks, final norm, head."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.dtype = config.layer_dims().dtype
        self.vocab_size = config.known_vocab_size
        key = rngs.params()
        embed_key, head_key, layer_key = jax.random.split(key, 3)
        self.embed = Embedding(
            config.table_rows,
            config.embed_dim,
            std=config.init_std,
            rngs=nnx.Rngs(params=embed_key),
            per_layer_dim=config.per_layer_dim,
        )
        rows = config.learned_positions
        # Derived, not split off with the others, whose values would change with the number of keys.
        position_key = jax.random.fold_in(embed_key, 1)
        self.positions = (
            None
            if rows is None
            else VocabTable(rows, config.embed_dim, std=config.init_std, key=position_key)
        )
        # Outside the groups, whose scans have them as constants: their gradient is the sum over all layers.
        self.shared = nnx.Dict(_shared_ffns(config, key=head_key))
        per_layer = config.per_layer_embeddings
        self.per_layer = (
            None
            if per_layer is None
            else PerLayerInputs(
                per_layer,
                config.layer_dims(),
                num_layers=config.num_layers,
                rngs=nnx.Rngs(params=jax.random.fold_in(embed_key, 3)),
            )
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
        further = config.multi_token
        self.multi_token = (
            None
            if further is None
            # Keys after those of the layers.
            else nnx.List(
                MultiTokenModule(config, key=jax.random.fold_in(layer_key, config.num_layers + index))
                for index in range(further.num_tokens)
            )
        )
        gate_key = jax.random.fold_in(embed_key, 2)
        self.exit_gate = None if config.exit_gate is None else ExitGate(config.layer_dims(), key=gate_key)
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
        x = self._embedded(tokens)
        inputs = LayerInputs(
            segment_ids=segment_ids,
            positions=positions,
            max_lengths=max_lengths,
            capture=_checked_capture(capture or {}),
            visibility=visibility,
            is_prefix=is_prefix,
            shared_ffns={name: module.ffn for name, module in self.shared.items()},
            per_layer=self._per_layer_inputs(x, tokens),
        )
        if self.positions is not None:
            x = x + lookup(self.positions.weight[...], positions, dtype=self.dtype)
        x = communication.constrain(x, ("batch", "time", None))
        if key is not None:
            # The index after that of the last layer, so that no layer has the same key.
            x = dropout(x, jax.random.fold_in(key, self.config.num_layers), rate=self.config.dropout)
        loops = None
        if self.config.loops is None:
            x, reports = self._run_groups(x, inputs=inputs, states=state, key=key)
            hidden = self._head_inputs(self.final_norm(x))
        else:
            by_loop, reports = self._run_loops(x, inputs=inputs, states=state, key=key)
            hidden, loops = self._exited(by_loop)
        # Logits are not computed here: no array [B, T, V] exists in training.
        return Output(
            hidden=hidden,
            head=self.make_head(),
            losses=reports.losses,
            metrics=reports.metrics,
            captured=reports.captured,
            state=None if state is None else reports.states,
            loops=loops,
        )

    def _per_layer_inputs(
        self, x: Float[Array, "B T D"], tokens: Int[Array, "B T"]
    ) -> Float[Array, "B T N P"] | None:
        if self.per_layer is None or self.embed.per_layer is None:
            return None
        return self.per_layer(x, lookup(self.embed.per_layer[...], tokens, dtype=self.dtype))

    def _run_groups(
        self, x: Float[Array, "B T D"], *, inputs: LayerInputs, states: Any, key: Array | None
    ) -> tuple[Float[Array, "B T D"], _Reports]:
        """Run all layers once."""
        # Groups differ in their structure and run one after another; only inside one is there a scan.
        new_states = []
        losses_by_name = {}
        metrics = {}
        captured = {}
        shared: dict[str, Any] = {}
        for index, stack in enumerate(self.segments):
            stack_state = None if states is None else states[index]
            x, stack_state, reports, captures, shared = stack(
                x, inputs=inputs, states=stack_state, key=key, shared=shared
            )
            new_states.append(stack_state)
            for offset, aux in enumerate(reports):
                # Reports have a leading dim of repeats: losses are summed over it, metrics keep it.
                for name, sums in aux.losses.items():
                    losses_by_name[name] = losses_by_name.get(name, 0.0) + jnp.sum(sums)
                metrics |= {
                    f"segments/{index}/blocks/{offset}/ffn/{name}": sums for name, sums in aux.metrics.items()
                }
            captured |= _by_layer(stack, captures)
        return x, _Reports(states=new_states, losses=losses_by_name, metrics=metrics, captured=captured)

    def _run_loops(
        self, x: Float[Array, "B T D"], *, inputs: LayerInputs, states: Any, key: Array | None
    ) -> tuple[Float[Array, "L B T D"], _Reports]:
        """Run all layers `loops.num_loops` times, and return the normed result of each loop."""

        def loop(x: Array, xs: tuple[Any, Array]) -> tuple[Array, tuple[Array, _Reports]]:
            states, index = xs
            # Keys after that of the embedded tokens.
            loop_key = None if key is None else jax.random.fold_in(key, self.config.num_layers + 1 + index)
            x, reports = self._run_groups(x, inputs=inputs, states=states, key=loop_key)
            x = self.final_norm(x)
            return x, (x, reports)

        xs = (states, jnp.arange(self.config.num_stack_loops))
        _, (by_loop, reports) = jax.lax.scan(loop, x, xs)
        # Sums over tokens are summed over loops; activations are those of the last.
        summed = jax.tree.map(lambda sums: jnp.sum(sums, axis=0), (reports.losses, reports.metrics))
        captured = jax.tree.map(lambda activation: activation[-1], reports.captured)
        return by_loop, _Reports(
            states=reports.states, losses=summed[0], metrics=summed[1], captured=captured
        )

    def further(
        self,
        index: int,
        hidden: Float[Array, "B T D"],
        next_tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: Any = None,
        max_lengths: Int[Array, " B"] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], FfnAux, Any]:
        """Return hidden states with which the head predicts one token further than with `hidden`.

        Args:
          index: number of the module of `config.multi_token`, from 0: it predicts the token 2 + index after
            each.
          hidden: final hidden states; of module 0 those of the decoder, else those of the module before.
          next_tokens: the token that `hidden` predicts: 1 + index after each. What it is at the end of a
            document, where there is none, changes no other token.
          segment_ids: as in the call of the decoder, as are positions, max_lengths and key.
          state: decoding state from `init_further_state` or an earlier call; None for whole sequences.

        Returns:
          The hidden states, the report of the module's feed-forward layer, and the new decoding state.
        """
        assert self.multi_token is not None
        inputs = LayerInputs(
            segment_ids=segment_ids, positions=positions, max_lengths=max_lengths, capture={}
        )
        if key is not None:
            # After the indices of the layers and of the embedded tokens.
            key = jax.random.fold_in(key, self.config.num_layers + 1 + index)
        module = self.multi_token[index]
        hidden, aux, state = module(
            hidden, self._embedded(next_tokens), inputs=inputs, state=state, key=key, remat=self.config.remat
        )
        return self._head_inputs(hidden), aux, state

    def init_further_state(self, index: int, batch_size: int, *, max_length: int) -> Any:
        """Return an empty decoding state of a module of `config.multi_token`."""
        assert self.multi_token is not None
        return self.multi_token[index].block.init_state(batch_size, max_length=max_length)

    def _embedded(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        # The multiplier is cast first, as in Gemma's reference: its rounding to bfloat16 is part of the
        # model.
        multiplier = jnp.asarray(self.config.embed_multiplier, self.dtype)
        return self.embed(tokens, dtype=self.dtype) * multiplier

    def _exited(self, by_loop: Float[Array, "L B T D"]) -> tuple[Float[Array, "B T D"], LoopOutputs | None]:
        """Return what the head reads: the result of the loop that the gate chooses, or of the last."""
        config = self.config.exit_gate
        if self.exit_gate is None or config is None:
            return self._head_inputs(by_loop[-1]), None
        log_probs = exit_log_probs(self.exit_gate(by_loop))
        by_loop = self._head_inputs(by_loop)
        exits = exit_loops(log_probs, threshold=config.threshold)
        return results_of(by_loop, exits), LoopOutputs(hidden=by_loop, log_probs=log_probs)

    def _head_inputs(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return hidden if self.head_quantizer is None else self.head_quantizer(hidden)

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

        states = [
            [repeated(block, stack.config.repeats) for block in stack.blocks] for stack in self.segments
        ]
        if self.config.loops is None:
            return states
        # So has each loop of the stack, in a dim before that of the repeats.
        num_loops = self.config.num_stack_loops
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_loops, *leaf.shape)), states)


class VocabTable(nnx.Module):
    """A separate table: the rows [V, D] of an untied head, or [P, D] of positions."""

    def __init__(self, num_rows: int, dim: int, *, std: float, key: Array) -> None:
        self.weight = nnx.Param(truncated_normal(key, (num_rows, dim), std))


class SharedFfn(nnx.Module):
    """A feed-forward layer that several layers use (`FfnConfig.shared_name`)."""

    # The attribute's name is part of the path, as in a block: rules of sharding and formats go by it.
    def __init__(self, config: FfnConfig, dims: ModelDims, *, key: Array) -> None:
        ffn = config.build(dims, rngs=nnx.Rngs(params=key))
        if not isinstance(ffn, Ffn):
            raise ValueError(
                f"{type(config).__name__} builds {type(ffn).__name__}, which has a decoding state: layers "
                "can share an Ffn only"
            )
        self.ffn = ffn


def _shared_ffns(config: ModelConfig, *, key: Array) -> dict[str, SharedFfn]:
    return {
        name: SharedFfn(ffn, config.layer_dims(), key=jax.random.fold_in(key, 1 + index))
        for index, (name, ffn) in enumerate(config.shared_ffns.items())
    }


def _by_layer(stack: BlockStack, captures: list[dict[str, Array]]) -> dict[str, Array]:
    """Return captured activations by logical path, of those of each block with a leading dim of repeats."""
    return {
        f"layers/{layer}/{name}": value[repeat]
        for offset, activations in enumerate(captures)
        for name, value in activations.items()
        for repeat, layer in enumerate(stack.layers(offset))
    }


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
