"""The decoder: a stack of segments, each a repeating pattern of blocks, scanned over its repeats.

`ModelConfig` says what the model is, `Decoder` computes final hidden states and hands out its `Head`; logits
are made by the loss or the sampler. How its parameters look from outside is told in `parameters.py`.

Dims: B batch, T time, D model, V vocabulary, R repeats of a segment.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax import kernels, losses
from slmjax.models.architecture import BlockConfig, HeadKind, LayerGroup, ModelConfig, NormPlacement, Remat
from slmjax.models.layers import ArrayFunction, Embedding, Norm, dropout, lookup, truncated_normal
from slmjax.models.protocols import CachingMixer, FfnAux
from slmjax.parallel import communication


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What the decoder computes. Losses and metrics are sums over the real tokens of the batch.

    The arrays are typed `Any` because this is a pytree: it may hold shapes.
    """

    hidden: Any  # Float[Array, "B T D"], final norm applied, rounded where rules of quantization say so
    head: losses.Head
    losses: dict[
        str, Any
    ]  # auxiliary losses, multiplied by their coefficients, summed over layers: Float[Array, ""]
    metrics: dict[str, Any]  # by stack path of the module that reports, layer dim first
    captured: dict[str, Any]  # by logical path, what `capture` asked for
    state: Any  # decoding state, None in training


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """What every layer of one forward pass is given beside the residual stream."""

    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    max_lengths: Int[Array, " B"] | None
    capture: Mapping[str, Callable[[Array], Array]]


CAPTURES = ("mixer_output", "ffn_output", "block_output")


class Block(nnx.Module):
    """Mixer and feed-forward layer with their norms, on a residual stream."""

    def __init__(self, config: BlockConfig, model: ModelConfig, *, rngs: nnx.Rngs) -> None:
        shape = model.layer_shape()

        def norm(wanted: bool) -> Norm | None:
            return shape.norm(shape.embed_dim) if wanted else None

        before = config.norm is not NormPlacement.POST
        after = config.norm is not NormPlacement.PRE
        self.config = config
        self.dropout = model.dropout
        self.multiplier = model.residual_multiplier
        self.mixer = config.mixer.build(shape, rngs=rngs)
        self.mixer_norm = norm(before)
        self.mixer_post_norm = norm(after)
        self.ffn = None if config.ffn is None else config.ffn.build(shape, rngs=rngs)
        self.ffn_norm = norm(before and config.ffn is not None)
        self.ffn_post_norm = norm(after and config.ffn is not None)

    def __call__(
        self, x: Float[Array, "B T D"], *, inputs: LayerInputs, state: Any, key: Array | None
    ) -> tuple[Array, Any, FfnAux, dict[str, Array]]:
        lengths = {"max_lengths": inputs.max_lengths} if isinstance(self.mixer, CachingMixer) else {}
        mixed, state = self.mixer(
            _maybe(self.mixer_norm, x),
            segment_ids=inputs.segment_ids,
            positions=inputs.positions,
            state=state,
            **lengths,
        )
        x = self._add(x, _maybe(self.mixer_post_norm, mixed), key, 0)
        values = {"mixer_output": mixed}
        aux = FfnAux(losses={}, metrics={})
        if self.ffn is not None:
            fed, aux = self.ffn(_maybe(self.ffn_norm, x), segment_ids=inputs.segment_ids)
            x = self._add(x, _maybe(self.ffn_post_norm, fed), key, 1)
            values["ffn_output"] = fed
        values["block_output"] = x = communication.constrain(x, ("batch", "time", None))
        return (
            x,
            state,
            aux,
            {name: reduce(values[name]) for name, reduce in inputs.capture.items() if name in values},
        )

    def _add(
        self, x: Float[Array, "B T D"], update: Float[Array, "B T D"], key: Array | None, index: int
    ) -> Float[Array, "B T D"]:
        if key is not None:
            update = dropout(update, jax.random.fold_in(key, index), rate=self.dropout)
        return x + update * self.multiplier


def _maybe(norm: Norm | None, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return x if norm is None else norm(x)


class SegmentStack(nnx.Module):
    """The blocks of one segment, parameters stacked over its repeats and run by a scan."""

    def __init__(self, config: LayerGroup, model: ModelConfig, *, first_layer: int, key: Array) -> None:
        self.config = config
        self.remat = model.remat
        self.first_layer = first_layer
        blocks = []
        for offset, block in enumerate(config.pattern):
            # A layer's initial weights depend on its place in the model alone, not on how layers are grouped.
            layers = first_layer + offset + len(config.pattern) * jnp.arange(config.repeats)
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, layers)

            def build(layer_key: Array, block: BlockConfig = block) -> Block:
                return Block(block, model, rngs=nnx.Rngs(params=layer_key))

            graphdef = nnx.graphdef(nnx.eval_shape(build, keys[0]))
            blocks.append(
                nnx.merge(
                    graphdef, jax.vmap(lambda layer_key, build=build: nnx.state(build(layer_key)))(keys)
                )
            )
        self.blocks = nnx.List(blocks)

    def __call__(
        self, x: Float[Array, "B T D"], *, inputs: LayerInputs, states: Any, key: Array | None
    ) -> tuple[Array, Any, list[FfnAux], list]:
        """Runs all repeats. States, aux and captures come and go with a leading dim of repeats, one entry per
        block.
        """
        graphdef, params = nnx.split(self.blocks)

        def repeat(x: Array, xs: tuple[Any, Any, Array]) -> tuple[Array, tuple[Any, list[FfnAux], list]]:
            params, states, index = xs
            new_states = []
            reports = []
            captures = []
            for offset, block in enumerate(nnx.merge(graphdef, params)):
                # Like initial weights, what a layer drops does not depend on how layers are grouped.
                layer = self.first_layer + index * len(self.blocks) + offset
                block_key = None if key is None else jax.random.fold_in(key, layer)
                block_state = None if states is None else states[offset]
                x, state, aux, captured = _run_passes(
                    block, x, inputs=inputs, states=block_state, key=block_key
                )
                new_states.append(state)
                reports.append(aux)
                captures.append(captured)
            return x, (new_states, reports, captures)

        body = _rematerialised(repeat, self.remat)
        # What is to be computed again stays in a loop: outside of one the compiler would see that it has it
        # already.
        spelled_out = kernels.unrolled_repeats(self.config.repeats, num_blocks=len(self.blocks))
        unroll = spelled_out if self.remat is Remat.NONE else 1
        x, (new_states, reports, captures) = jax.lax.scan(
            body, x, (params, states, jnp.arange(self.config.repeats)), unroll=unroll
        )
        return x, None if states is None else new_states, reports, captures


def _run_passes(
    block: Block, x: Array, *, inputs: LayerInputs, states: Any, key: Array | None
) -> tuple[Array, Any, FfnAux, dict]:
    """A block as often as it repeats itself; each pass has a decoding state of its own, reports are
    summed.
    """
    new_states = []
    reports = []
    captured = {}
    for index in range(block.config.num_loops):
        pass_key = None if key is None else jax.random.fold_in(key, index)
        x, state, aux, captured = block(
            x, inputs=inputs, state=None if states is None else states[index], key=pass_key
        )
        new_states.append(state)
        reports.append(aux)
    return x, new_states, jax.tree.map(lambda *sums: sum(sums), *reports), captured


def _rematerialised(body: Callable, remat: Remat) -> Callable:
    policies = {
        Remat.DOTS: jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        Remat.FULL: jax.checkpoint_policies.nothing_saveable,
    }
    return body if remat is Remat.NONE else jax.checkpoint(body, policy=policies[remat], prevent_cse=False)


class Decoder(nnx.Module):
    """Embedding, segments of blocks, final norm, head."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        key = rngs.params()
        embed_key, head_key, layer_key = jax.random.split(key, 3)
        self.embed = Embedding(
            config.table_rows, config.embed_dim, std=config.init_std, rngs=nnx.Rngs(params=embed_key)
        )
        rows = config.learned_positions
        position_key = jax.random.fold_in(embed_key, 1)
        self.positions = (
            None
            if rows is None
            else VocabTable(rows, config.embed_dim, std=config.init_std, key=position_key)
        )
        segments = []
        first_layer = 0
        for segment in config.stack:
            segments.append(SegmentStack(segment, config, first_layer=first_layer, key=layer_key))
            first_layer += len(segment.pattern) * segment.repeats
        self.segments = nnx.List(segments)
        self.final_norm = config.layer_shape().norm(config.embed_dim)
        free = config.head is HeadKind.UNTIED
        self.head = (
            VocabTable(config.table_rows, config.embed_dim, std=config.init_std, key=head_key)
            if free
            else None
        )
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
    ) -> Output:
        """Final hidden states of a batch.

        Args:
          tokens: token ids.
          segment_ids: the document each token belongs to, from 1; 0 is padding.
          positions: index of each token within its document.
          state: decoding state from `init_state` or an earlier call; None for whole sequences.
          max_lengths: tokens that each row may reach, prompt and new ones together, the same in every call
            for a sequence. LongRoPE needs them with a `state`; None without one takes the length of each
            document.
          key: randomness of dropout; None for evaluation.
          capture: named activations to return (`CAPTURES`; of the last pass, where a block has several), each
            with the function that reduces it on the way.
        """
        rows = {"segment_ids": segment_ids, "positions": positions, "max_lengths": max_lengths}
        inputs = LayerInputs(**rows, capture=_known(capture or {}))
        dtype = self.config.layer_shape().dtype
        x = self.embed(tokens, dtype=dtype) * jnp.asarray(self.config.embed_multiplier, dtype)
        if self.positions is not None:
            x = x + lookup(self.positions.weight[...], positions, dtype=dtype)
        x = communication.constrain(x, ("batch", "time", None))
        if key is not None:
            x = dropout(x, jax.random.fold_in(key, self.config.num_layers), rate=self.config.dropout)
        new_states = []
        losses_by_name = {}
        metrics = {}
        captured = {}
        first_layer = 0
        for index, segment in enumerate(self.segments):
            x, segment_state, reports, captures = segment(
                x, inputs=inputs, states=None if state is None else state[index], key=key
            )
            new_states.append(segment_state)
            for offset, (aux, kept) in enumerate(zip(reports, captures, strict=True)):
                for name, sums in aux.losses.items():
                    losses_by_name[name] = losses_by_name.get(name, 0.0) + jnp.sum(sums)
                metrics |= {
                    f"segments/{index}/blocks/{offset}/ffn/{name}": sums for name, sums in aux.metrics.items()
                }
                step = len(reports)
                captured |= {
                    f"layers/{first_layer + offset + step * r}/{n}": v[r]
                    for n, v in kept.items()
                    for r in range(v.shape[0])
                }
            first_layer += segment.config.repeats * len(reports)
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
        """The output projection, for the loss and the sampler."""
        config = self.config
        table = self.embed.table[...] if self.head is None else self.head.weight[...]
        return losses.Head(
            weight=table.astype(config.layer_shape().dtype),
            bias=None,
            softcap=config.logit_softcap,
            scale=config.logit_multiplier,
            vocab_size=config.known_vocab_size,
        )

    def init_state(self, batch_size: int, *, max_length: int) -> Any:
        """Empty decoding state: per segment, per block, per pass, with a leading dim of repeats."""

        def repeated(block: Block, repeats: int) -> list[Any]:
            one = block.mixer.init_state(batch_size, max_length=max_length)
            return [
                jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (repeats, *leaf.shape)), one)
                for _ in range(block.config.num_loops)
            ]

        return [
            [repeated(block, segment.config.repeats) for block in segment.blocks] for segment in self.segments
        ]


class VocabTable(nnx.Module):
    """A table of its own: the rows [V, D] that make logits, or those [P, D] of positions."""

    def __init__(self, num_rows: int, dim: int, *, std: float, key: Array) -> None:
        self.weight = nnx.Param(truncated_normal(key, (num_rows, dim), std))


def _known(capture: Mapping[str, Callable[[Array], Array]]) -> Mapping[str, Callable[[Array], Array]]:
    if unknown := set(capture) - set(CAPTURES):
        raise ValueError(f"unknown activation(s) {sorted(unknown)}: capture takes {', '.join(CAPTURES)}")
    return capture


def logits(model: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Logits of whole sequences, float32, real vocabulary only: for tests and notebooks, not for training."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    output = model(tokens, segment_ids=jnp.ones_like(tokens), positions=positions)
    return losses.logits(output.hidden, output.head)[..., : output.head.vocab_size]
