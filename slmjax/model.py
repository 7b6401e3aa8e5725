"""The decoder: a stack of segments, each a repeating pattern of blocks, scanned over its repeats.

`ModelConfig` says what the model is, `Decoder` computes final hidden states and hands out its `Head`; logits are made by the
loss or the sampler. How its parameters look from outside is told in `parameters.py`.

Dims: B batch, T time, D model, V vocabulary, R repeats of a segment.
"""

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax import kernels, losses, sharding
from slmjax.attention import AttentionConfig
from slmjax.layers import Embedding, FfnAux, FfnConfig, MixerConfig, MlpConfig, RmsNorm, Shape, dropout, effective_weight, truncated_normal
from slmjax.mixers.latent import LatentAttentionConfig
from slmjax.moe import MoeConfig

# A config read from JSON finds its class among those that have been imported: with the model, these always are.
PARTS: tuple[type, ...] = (AttentionConfig, LatentAttentionConfig, MlpConfig, MoeConfig)


class NormPlacement(enum.Enum):
    """Where a block normalises."""

    PRE = "pre"  # x + f(norm(x))
    POST = "post"  # x + norm(f(x)), as in OLMo 2
    SANDWICH = "sandwich"  # x + norm(f(norm(x))), as in Gemma 2


class Precision(enum.Enum):
    """Dtype of the computation; parameters are float32 in either case."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Remat(enum.Enum):
    """What the backward pass recomputes instead of keeping."""

    NONE = "none"
    DOTS = "dots"  # keeps the results of matrix products with weights
    FULL = "full"  # keeps only the input of each repeat of a pattern


class HeadKind(enum.Enum):
    """Where the output projection comes from."""

    TIED = "tied"  # the embedding table
    FREE = "free"  # a table of its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One layer: a token mixer, then a feed-forward layer."""

    mixer: MixerConfig  # token mixer
    ffn: FfnConfig | None  # feed-forward layer (none: the mixer alone)
    norm: NormPlacement = NormPlacement.PRE  # where the block normalises
    passes: int = 1  # how many times in a row the block runs with the same weights

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise ValueError(f"passes must be at least 1, got {self.passes}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """A pattern of blocks, repeated."""

    pattern: tuple[BlockConfig, ...]  # the blocks of one repeat, in order
    repeats: int = 1  # how many times the pattern occurs

    def __post_init__(self) -> None:
        if self.repeats < 1 or not self.pattern:
            raise ValueError(f"a segment needs a pattern of blocks and at least one repeat, got repeats={self.repeats}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only language model."""

    embed_dim: int  # width of the residual stream, D
    stack: tuple[Segment, ...]  # the layers
    context_length: int = 1024  # longest sequence the model is meant for, in tokens
    vocab_size: int | None = None  # tokens of the vocabulary (none: the tokenizer's)
    vocab_multiple: int = 1  # the table is padded to a multiple of this many rows
    head: HeadKind = HeadKind.TIED  # output projection
    norm_eps: float = 1e-6  # added to the mean square in every norm
    init_std: float = 0.02  # deviation of initial weights (truncated normal)
    embed_multiplier: float = 1.0  # multiplies the embedded tokens
    residual_multiplier: float = 1.0  # multiplies what a block adds to the residual stream
    logit_multiplier: float = 1.0  # multiplies the logits
    logit_softcap: float | None = None  # logits are bounded to this by a tanh
    dropout: float = 0.0  # rate, on the embedded tokens and on what a block adds
    precision: Precision = Precision.FLOAT32  # dtype of the computation
    remat: Remat = Remat.NONE  # what the backward pass recomputes

    def __post_init__(self) -> None:
        if self.embed_dim < 1 or not self.stack:
            raise ValueError(f"a model needs embed_dim >= 1 and at least one segment, got embed_dim={self.embed_dim}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is a rate between 0 and 1, got {self.dropout}")
        if self.context_length < 2:
            raise ValueError(f"context_length must be at least 2, got {self.context_length}")
        if self.vocab_multiple < 1 or (self.vocab_size is not None and self.vocab_size < 1):
            raise ValueError(f"vocab_size and vocab_multiple must be at least 1, got {self.vocab_size} and {self.vocab_multiple}")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ValueError(f"logit_softcap must be positive or none, got {self.logit_softcap}")
        if self.init_std <= 0 or self.norm_eps <= 0:
            raise ValueError(f"init_std and norm_eps must be positive, got {self.init_std} and {self.norm_eps}")

    def blocks(self) -> Iterator[BlockConfig]:
        """The configuration of every layer, first to last."""
        return (block for segment in self.stack for _ in range(segment.repeats) for block in segment.pattern)

    @property
    def num_layers(self) -> int:
        """Number of layers with weights of their own."""
        return sum(len(segment.pattern) * segment.repeats for segment in self.stack)

    @property
    def known_vocab_size(self) -> int:
        """Tokens of the vocabulary. Raises ValueError where neither config nor tokenizer said."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not set: give it, or let the tokenizer set it by training")
        return self.vocab_size

    @property
    def table_rows(self) -> int:
        """Rows of the embedding table, padding included."""
        return -(-self.known_vocab_size // self.vocab_multiple) * self.vocab_multiple

    def layer_shape(self) -> Shape:
        """What every layer shares."""
        depth = sum(block.passes for block in self.blocks())
        dtype = jnp.bfloat16 if self.precision is Precision.BFLOAT16 else jnp.float32
        return Shape(embed_dim=self.embed_dim, num_layers=depth, norm_eps=self.norm_eps, init_std=self.init_std, dtype=dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What the decoder computes. Losses and metrics are sums over the real tokens of the batch.

    The arrays are typed `Any` because this is a pytree: it may hold shapes.
    """

    hidden: Any  # Float[Array, "B T D"], final norm applied
    head: losses.Head
    losses: dict[str, Any]  # auxiliary losses, multiplied by their coefficients, summed over layers: Float[Array, ""]
    metrics: dict[str, Any]  # by stack path of the module that reports, layer dim first
    captured: dict[str, Any]  # by logical path, what `capture` asked for
    state: Any  # decoding state, None in training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """What every layer of one forward pass is given beside the residual stream."""

    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    capture: Mapping[str, Callable[[Array], Array]]


CAPTURES = ("mixer_output", "ffn_output", "block_output")


class Block(nnx.Module):
    """Mixer and feed-forward layer with their norms, on a residual stream."""

    def __init__(self, config: BlockConfig, model: ModelConfig, *, rngs: nnx.Rngs) -> None:
        shape = model.layer_shape()

        def norm(wanted: bool) -> RmsNorm | None:
            return RmsNorm(shape.embed_dim, eps=shape.norm_eps) if wanted else None

        before, after = config.norm is not NormPlacement.POST, config.norm is not NormPlacement.PRE
        self.config, self.dropout, self.multiplier = config, model.dropout, model.residual_multiplier
        self.mixer = config.mixer.build(shape, rngs=rngs)
        self.mixer_norm, self.mixer_post_norm = norm(before), norm(after)
        self.ffn = None if config.ffn is None else config.ffn.build(shape, rngs=rngs)
        self.ffn_norm, self.ffn_post_norm = norm(before and config.ffn is not None), norm(after and config.ffn is not None)

    def __call__(
        self, x: Float[Array, "B T D"], *, given: Pass, state: Any, key: Array | None
    ) -> tuple[Array, Any, FfnAux, dict[str, Array]]:
        mixed, state = self.mixer(_maybe(self.mixer_norm, x), segment_ids=given.segment_ids, positions=given.positions, state=state)
        x = self._add(x, _maybe(self.mixer_post_norm, mixed), key, 0)
        values, aux = {"mixer_output": mixed}, FfnAux(losses={}, metrics={})
        if self.ffn is not None:
            fed, aux = self.ffn(_maybe(self.ffn_norm, x), segment_ids=given.segment_ids)
            x = self._add(x, _maybe(self.ffn_post_norm, fed), key, 1)
            values["ffn_output"] = fed
        values["block_output"] = x = sharding.constrain(x, ("batch", "time", None))
        return x, state, aux, {name: reduce(values[name]) for name, reduce in given.capture.items() if name in values}

    def _add(self, x: Float[Array, "B T D"], update: Float[Array, "B T D"], key: Array | None, index: int) -> Float[Array, "B T D"]:
        if key is not None:
            update = dropout(update, jax.random.fold_in(key, index), rate=self.dropout)
        return x + update * self.multiplier


def _maybe(norm: RmsNorm | None, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return x if norm is None else norm(x)


class SegmentStack(nnx.Module):
    """The blocks of one segment, parameters stacked over its repeats and run by a scan."""

    def __init__(self, config: Segment, model: ModelConfig, *, first_layer: int, key: Array) -> None:
        self.config, self.remat, self.first_layer = config, model.remat, first_layer
        blocks = []
        for offset, block in enumerate(config.pattern):
            # A layer's initial weights depend on its place in the model alone, not on how layers are grouped.
            layers = first_layer + offset + len(config.pattern) * jnp.arange(config.repeats)
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, layers)

            def build(layer_key: Array, block: BlockConfig = block) -> Block:
                return Block(block, model, rngs=nnx.Rngs(params=layer_key))

            graphdef = nnx.graphdef(nnx.eval_shape(build, keys[0]))
            blocks.append(nnx.merge(graphdef, jax.vmap(lambda layer_key, build=build: nnx.state(build(layer_key)))(keys)))
        self.blocks = nnx.List(blocks)

    def __call__(self, x: Float[Array, "B T D"], *, given: Pass, states: Any, key: Array | None) -> tuple[Array, Any, list[FfnAux], list]:
        """Runs all repeats. States, aux and captures come and go with a leading dim of repeats, one entry per block."""
        graphdef, params = nnx.split(self.blocks)

        def repeat(x: Array, xs: tuple[Any, Any, Array]) -> tuple[Array, tuple[Any, list[FfnAux], list]]:
            params, states, index = xs
            new_states, reports, captures = [], [], []
            for offset, block in enumerate(nnx.merge(graphdef, params)):
                # Like initial weights, what a layer drops does not depend on how layers are grouped.
                layer = self.first_layer + index * len(self.blocks) + offset
                block_key = None if key is None else jax.random.fold_in(key, layer)
                block_state = None if states is None else states[offset]
                x, state, aux, captured = _run_passes(block, x, given=given, states=block_state, key=block_key)
                new_states.append(state)
                reports.append(aux)
                captures.append(captured)
            return x, (new_states, reports, captures)

        body = _rematerialised(repeat, self.remat)
        # What is to be computed again stays in a loop: outside of one the compiler would see that it has it already.
        unroll = kernels.unrolled_layers(self.config.repeats) if self.remat is Remat.NONE else 1
        x, (new_states, reports, captures) = jax.lax.scan(body, x, (params, states, jnp.arange(self.config.repeats)), unroll=unroll)
        return x, None if states is None else new_states, reports, captures


def _run_passes(block: Block, x: Array, *, given: Pass, states: Any, key: Array | None) -> tuple[Array, Any, FfnAux, dict]:
    """A block as often as it repeats itself; each pass has a decoding state of its own, reports are summed."""
    new_states, reports, captured = [], [], {}
    for index in range(block.config.passes):
        pass_key = None if key is None else jax.random.fold_in(key, index)
        x, state, aux, captured = block(x, given=given, state=None if states is None else states[index], key=pass_key)
        new_states.append(state)
        reports.append(aux)
    return x, new_states, jax.tree.map(lambda *sums: sum(sums), *reports), captured


def _rematerialised(body: Callable, remat: Remat) -> Callable:
    policies = {Remat.DOTS: jax.checkpoint_policies.dots_with_no_batch_dims_saveable, Remat.FULL: jax.checkpoint_policies.nothing_saveable}
    return body if remat is Remat.NONE else jax.checkpoint(body, policy=policies[remat], prevent_cse=False)


class Decoder(nnx.Module):
    """Embedding, segments of blocks, final norm, head."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        key = rngs.params()
        embed_key, head_key, layer_key = jax.random.split(key, 3)
        self.embed = Embedding(config.table_rows, config.embed_dim, std=config.init_std, rngs=nnx.Rngs(params=embed_key))
        segments, first_layer = [], 0
        for segment in config.stack:
            segments.append(SegmentStack(segment, config, first_layer=first_layer, key=layer_key))
            first_layer += len(segment.pattern) * segment.repeats
        self.segments = nnx.List(segments)
        self.final_norm = RmsNorm(config.embed_dim, eps=config.norm_eps)
        free = config.head is HeadKind.FREE
        self.head = Table(config.table_rows, config.embed_dim, std=config.init_std, key=head_key) if free else None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: Any = None,
        key: Array | None = None,
        capture: Mapping[str, Callable[[Array], Array]] | None = None,
    ) -> Output:
        """Final hidden states of a batch.

        Args:
          tokens: token ids.
          segment_ids: the document each token belongs to, from 1; 0 is padding.
          positions: index of each token within its document.
          state: decoding state from `init_state` or an earlier call; None for whole sequences.
          key: randomness of dropout; None for evaluation.
          capture: named activations to return (`CAPTURES`; of the last pass, where a block has several), each with the
            function that reduces it on the way.
        """
        given = Pass(segment_ids=segment_ids, positions=positions, capture=_known(capture or {}))
        dtype = self.config.layer_shape().dtype
        x = self.embed(tokens, dtype=dtype) * jnp.asarray(self.config.embed_multiplier, dtype)
        x = sharding.constrain(x, ("batch", "time", None))
        if key is not None:
            x = dropout(x, jax.random.fold_in(key, self.config.num_layers), rate=self.config.dropout)
        new_states, losses_by_name, metrics, captured, first_layer = [], {}, {}, {}, 0
        for index, segment in enumerate(self.segments):
            x, segment_state, reports, captures = segment(x, given=given, states=None if state is None else state[index], key=key)
            new_states.append(segment_state)
            for offset, (aux, kept) in enumerate(zip(reports, captures, strict=True)):
                for name, sums in aux.losses.items():
                    losses_by_name[name] = losses_by_name.get(name, 0.0) + jnp.sum(sums)
                metrics |= {f"segments/{index}/blocks/{offset}/ffn/{name}": sums for name, sums in aux.metrics.items()}
                step = len(reports)
                captured |= {f"layers/{first_layer + offset + step * r}/{n}": v[r] for n, v in kept.items() for r in range(v.shape[0])}
            first_layer += segment.config.repeats * len(reports)
        return Output(
            hidden=self.final_norm(x), head=self.make_head(), losses=losses_by_name, metrics=metrics, captured=captured,
            state=None if state is None else new_states,
        )  # fmt: skip

    def make_head(self) -> losses.Head:
        """The output projection, for the loss and the sampler."""
        config = self.config
        table = self.embed.table[...] if self.head is None else self.head.weight[...]
        return losses.Head(
            weight=effective_weight(table, config.layer_shape().dtype), bias=None, softcap=config.logit_softcap,
            scale=config.logit_multiplier, vocab_size=config.known_vocab_size,
        )  # fmt: skip

    def init_state(self, batch_size: int, *, max_length: int) -> Any:
        """Empty decoding state: per segment, per block, per pass, with a leading dim of repeats."""

        def repeated(block: Block, repeats: int) -> list[Any]:
            one = block.mixer.init_state(batch_size, max_length=max_length)
            return [jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (repeats, *leaf.shape)), one) for _ in range(block.config.passes)]

        return [[repeated(block, segment.config.repeats) for block in segment.blocks] for segment in self.segments]


class Table(nnx.Module):
    """An output table [V, D] of its own."""

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
