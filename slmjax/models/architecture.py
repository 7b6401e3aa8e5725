"""The configuration of a model: `ModelConfig`, a stack of groups of blocks.

    stack = stack_of([local, local, full] * 4)        # one LayerGroup of three blocks, repeated 4 times
    config = ModelConfig(embed_dim=256, stack=stack, ...)

Dims: D model, V vocabulary.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from slmjax.config import added_field, renamed_field, renamed_values
from slmjax.models.ffn.channel_mix import ChannelMixConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.layers import ModelDims, NormKind
from slmjax.models.loops import ExitGateConfig, StackLoops
from slmjax.models.mixers.attention import AttentionConfig, with_rope_fraction, with_rotary_dim
from slmjax.models.mixers.delta_net import DeltaNetConfig, GatedDeltaNetConfig, KimiDeltaAttentionConfig
from slmjax.models.mixers.differential import DifferentialAttentionConfig
from slmjax.models.mixers.gated_linear import GatedLinearAttentionConfig
from slmjax.models.mixers.griffin import RgLruConfig
from slmjax.models.mixers.latent import LatentAttentionConfig
from slmjax.models.mixers.linear_attention import LinearAttentionConfig
from slmjax.models.mixers.mamba import MambaConfig
from slmjax.models.mixers.mamba2 import Mamba2Config
from slmjax.models.mixers.parallel import ParallelMixerConfig
from slmjax.models.mixers.retention import RetentionConfig
from slmjax.models.mixers.rwkv4 import Rwkv4Config
from slmjax.models.mixers.rwkv7 import Rwkv7Config
from slmjax.models.mixers.short_convolution import ShortConvolutionConfig
from slmjax.models.parameterization import UNSCALED, Parameterization, Scaling
from slmjax.models.per_layer import PerLayerEmbeddingConfig
from slmjax.models.protocols import FfnConfig, MixerConfig, innermost

# More is a mistake, or a file that is made to take all memory and time.
MOST_LAYERS = 4096
MOST_BLOCKS = 128  # in all patterns: each is built and compiled
LARGEST_SIZE = 2**31 - 1  # of a dim, or any other integer

# A config that is read from JSON finds its class among the imported ones: these are imported with the model.
PARTS: tuple[type, ...] = (
    AttentionConfig,
    DifferentialAttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    RetentionConfig,
    GatedLinearAttentionConfig,
    Mamba2Config,
    DeltaNetConfig,
    GatedDeltaNetConfig,
    KimiDeltaAttentionConfig,
    Rwkv7Config,
    MambaConfig,
    RgLruConfig,
    Rwkv4Config,
    ShortConvolutionConfig,
    ParallelMixerConfig,
    MlpConfig,
    MoeConfig,
    ChannelMixConfig,
)


class NormPlacement(enum.Enum):
    """The positions of a block's norms."""

    # Pre-norm leaves an identity path through the residual stream, which trains stably at any depth (Xiong et
    # al. 2020).
    PRE = "pre"  # x + f(norm(x))
    POST = "post"  # x + norm(f(x)), as in OLMo 2
    SANDWICH = "sandwich"  # x + norm(f(norm(x))), as in Gemma 2


class Precision(enum.Enum):
    """Dtype of the computation; parameters are float32 in either case."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Remat(enum.Enum):
    """What the backward pass recomputes instead of saving."""

    NONE = "none"
    DOTS = "dots"  # saves the results of matrix products with weights
    FULL = "full"  # saves only the input of each repeat of a pattern


@renamed_values(free="untied")
class HeadKind(enum.Enum):
    """The table of the output projection."""

    # Tying spares V x D parameters, which may be most of those of a small model (Press & Wolf 2017).
    TIED = "tied"  # the embedding table
    UNTIED = "untied"  # a separate table


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One layer: a token mixer, then a feed-forward layer."""

    mixer: MixerConfig  # token mixer
    ffn: FfnConfig | None  # feed-forward layer (none: the mixer alone)
    norm: NormPlacement = NormPlacement.PRE  # positions of the norms
    # how many times in a row the block runs with the same weights
    num_loops: int = renamed_field(1, was="passes")

    def __post_init__(self) -> None:
        if self.num_loops < 1:
            raise ValueError(f"num_loops must be at least 1, got {self.num_loops}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """A pattern of blocks, repeated."""

    pattern: tuple[BlockConfig, ...]  # the blocks of one repeat, in order
    repeats: int = 1  # how many times the pattern occurs

    def __post_init__(self) -> None:
        if self.repeats < 1 or not self.pattern:
            raise ValueError(
                f"a layer group needs a pattern of blocks and at least one repeat, got repeats={self.repeats}"
            )


MOST_FURTHER_TOKENS = 8  # each has a module of its own, which is compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiTokenConfig:
    """Multi-token prediction: modules that predict tokens after the next one (`models/multi_token.py`)."""

    num_tokens: int = 1  # tokens after the next one that are predicted; a module for each
    weight: float = 0.3  # multiplies the mean of the modules' cross entropies, which is added to the loss
    block: BlockConfig | None = None  # layer of each module (none: as the last layer of the model)

    def __post_init__(self) -> None:
        if not 1 <= self.num_tokens <= MOST_FURTHER_TOKENS:
            raise ValueError(
                f"multi_token.num_tokens must lie between 1 and {MOST_FURTHER_TOKENS}, got {self.num_tokens}"
            )
        if not 0.0 < self.weight < float("inf"):
            raise ValueError(
                f"multi_token.weight must be above 0, got {self.weight}: to train no further tokens, leave "
                "multi_token out"
            )


# Parts that use `ModelDims.scaling`, and for whose parameters `training/multipliers.py` has rules.
SCALED_PARTS: tuple[type, ...] = (
    AttentionConfig,
    DifferentialAttentionConfig,
    LatentAttentionConfig,
    MlpConfig,
    MoeConfig,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only language model."""

    embed_dim: int  # width of the residual stream, D
    stack: tuple[LayerGroup, ...]  # the layers
    context_length: int = 1024  # longest sequence that the model is made for, in tokens
    vocab_size: int | None = None  # tokens of the vocabulary (none: the tokenizer's)
    # 50,257 rows shard over no power of two and fill no whole tiles: nanoGPT pads them to 50,304.
    vocab_multiple: int = 1  # the table is padded to a multiple of this many rows
    head: HeadKind = HeadKind.TIED  # output projection
    norm_kind: NormKind = NormKind.RMS  # what every norm computes
    norm_eps: float = 1e-6  # added to the mean square in every norm
    init_std: float = 0.02  # deviation of initial weights (truncated normal)
    # how settings that were tuned at a base model apply to this one (`models/parameterization.py`)
    parameterization: Parameterization = added_field(
        Parameterization.STANDARD, before=Parameterization.STANDARD
    )
    base_width: int | None = added_field(None, before=None)  # mup, completep: embed_dim of the base
    base_depth: int | None = added_field(None, before=None)  # completep: layers of the base, loops included
    # mup, completep: dims of a query of the base (none: those of this model, which has more heads instead)
    base_head_dim: int | None = added_field(None, before=None)
    # rows of a table whose row for a token's position is added to it (none: no such table)
    learned_positions: int | None = None
    # The multipliers are Granite's, in the manner of muP (Yang et al. 2022); Gemma has the first of them.
    embed_multiplier: float = 1.0  # multiplies the embedded tokens
    residual_multiplier: float = 1.0  # multiplies what a block adds to the residual stream
    logit_multiplier: float = 1.0  # multiplies the logits
    # cap * tanh(logits / cap), as in Gemma 2.
    logit_softcap: float | None = None  # logits are bounded to this by a tanh
    dropout: float = 0.0  # rate, on the embedded tokens and on what a block adds
    # prediction of the tokens after the next one, for training and for drafts (none: of the next token alone)
    multi_token: MultiTokenConfig | None = added_field(None, before=None)
    # a table from which every layer reads a few numbers of each token (none: no such table)
    per_layer_embeddings: PerLayerEmbeddingConfig | None = added_field(None, before=None)
    # all layers run several times in a row with the same weights (none: once)
    loops: StackLoops | None = added_field(None, before=None)
    precision: Precision = Precision.FLOAT32  # dtype of the computation
    remat: Remat = Remat.NONE  # what the backward pass recomputes

    def __post_init__(self) -> None:
        if self.embed_dim < 1 or not self.stack:
            raise ValueError(
                f"a model needs embed_dim >= 1 and at least one layer group, got embed_dim={self.embed_dim}"
            )
        for path, size in _integers(self):
            if abs(size) > LARGEST_SIZE:
                raise ValueError(f"{path} is {_shown(size)}, and at most {LARGEST_SIZE:,} is supported")
        # Before anything counts or builds the layers one by one.
        depth = self.depth
        compiled = sum(len(group.pattern) for group in self.stack)
        if depth > MOST_LAYERS or compiled > MOST_BLOCKS:
            raise ValueError(
                f"the stack has {depth:,} layers, loops included, of {compiled:,} blocks: at most "
                f"{MOST_LAYERS:,} and {MOST_BLOCKS:,} are supported"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is a rate between 0 and 1, got {self.dropout}")
        if self.context_length < 2:
            raise ValueError(f"context_length must be at least 2, got {self.context_length}")
        if self.vocab_multiple < 1 or (self.vocab_size is not None and self.vocab_size < 1):
            raise ValueError(
                f"vocab_size and vocab_multiple must be at least 1, got {self.vocab_size} and "
                f"{self.vocab_multiple}"
            )
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ValueError(f"logit_softcap must be positive or none, got {self.logit_softcap}")
        # The lookup clips its indices: a position without a row would silently take the last one.
        if self.learned_positions is not None and self.learned_positions < self.context_length:
            raise ValueError(
                f"learned_positions={self.learned_positions} must be at least "
                f"context_length={self.context_length}: a row for each position"
            )
        if self.init_std <= 0 or self.norm_eps <= 0:
            raise ValueError(
                f"init_std and norm_eps must be positive, got {self.init_std} and {self.norm_eps}"
            )
        self._check_parameterization()
        self._check_shared_values()
        self._check_shared_ffns()
        self._check_multi_token()
        if len(counts := {len(ffn.nested) for ffn in self.nested_ffns}) > 1:
            raise ValueError(
                f"layers have {' and '.join(map(str, sorted(counts)))} fractions in ffn.nested: a step draws "
                "one index for all layers, so that each must have as many"
            )

    def _check_shared_values(self) -> None:
        """Raise ValueError for a layer that reads what no earlier layer writes, or not of that kind."""
        sources: dict[str, MixerConfig] = {}
        index = 0
        for group in self.stack:
            # The first repeat has the fewest layers before it; in the others a layer may read what a later
            # one of the pattern has written.
            for offset, block in enumerate(group.pattern * min(group.repeats, 2)):
                layer = index + offset
                for mixer in innermost(block.mixer):
                    self._check_reader(mixer, sources, layer)
                sources |= {name: mixer for mixer in innermost(block.mixer) for name in mixer.writes()}
            index += len(group.pattern) * group.repeats

    def _check_reader(self, mixer: MixerConfig, sources: dict[str, MixerConfig], layer: int) -> None:
        for name in mixer.reads():
            if name not in sources:
                raise ValueError(
                    f"layer {layer} ({type(mixer).__name__}) reads {name!r}, and no earlier layer writes it: "
                    "put a layer before it that does"
                )
            if problem := mixer.source_problem(name, sources[name], self.layer_dims()):
                raise ValueError(f"layer {layer} reads {name!r}: {problem}")

    def _check_shared_ffns(self) -> None:
        """Raise ValueError for layers that share a feed-forward layer and have other settings for it."""
        shared = self.shared_ffns
        for layer, block in enumerate(self.blocks()):
            name = None if block.ffn is None else block.ffn.shared_name()
            if name is not None and block.ffn != shared[name]:
                raise ValueError(
                    f"layer {layer} shares the feed-forward layer {name!r} with others, whose settings "
                    f"differ: {block.ffn} and {shared[name]}. Give it the same settings, or another name"
                )

    def _check_parameterization(self) -> None:
        for name in ("base_width", "base_depth", "base_head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or none, got {value}")
        kind = self.parameterization
        if kind is Parameterization.STANDARD:
            return
        needed = ("base_width", "base_depth") if kind is Parameterization.COMPLETEP else ("base_width",)
        for name in needed:
            if getattr(self, name) is None:
                dim = "embed_dim" if name == "base_width" else "number of layers"
                raise ValueError(
                    f"parameterization={kind.value} needs {name}: set it to the {dim} of the model at which "
                    "the learning rate was tuned"
                )
        if self.per_layer_embeddings is not None:
            raise ValueError(
                f"parameterization={kind.value} has no rules for per_layer_embeddings: set "
                "parameterization=standard"
            )
        # A layer of another kind would silently train with factors that are not its own.
        for block in dict.fromkeys(block for group in self.stack for block in group.pattern):
            for part in (*innermost(block.mixer), block.ffn):
                if part is not None and type(part) not in SCALED_PARTS:
                    known = ", ".join(cls.__name__ for cls in SCALED_PARTS)
                    raise ValueError(
                        f"parameterization={kind.value} has rules for {known}, not for "
                        f"{type(part).__name__}: set parameterization=standard"
                    )

    def _check_multi_token(self) -> None:
        """Raise ValueError for modules of further tokens that cannot be built or trained."""
        if self.multi_token is None:
            return
        if self.parameterization is not Parameterization.STANDARD:
            raise ValueError(
                f"parameterization={self.parameterization.value} has no rule for multi_token: leave "
                "multi_token out, or set parameterization=standard"
            )
        for name in ("loops", "per_layer_embeddings"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"multi_token and {name}: the modules of multi_token run once, and read no table of "
                    "their own. Leave out one of them"
                )
        block = self.multi_token_block
        if isinstance(block.ffn, MoeConfig):
            raise ValueError(
                "the layer of multi_token must have a dense feed-forward layer, not experts: set "
                "multi_token.block to such a layer"
            )
        if block.ffn is not None and (name := block.ffn.shared_name()) is not None:
            raise ValueError(
                f"the layer of multi_token has the feed-forward layer {name!r}, which the model's layers "
                "share: set multi_token.block to a layer with its own"
            )
        if names := [name for mixer in innermost(block.mixer) for name in mixer.reads()]:
            raise ValueError(
                f"the layer of multi_token reads {names[0]!r} of other layers, which its modules do not get: "
                "set multi_token.block to a layer that reads nothing"
            )

    @property
    def nested_ffns(self) -> list[MlpConfig]:
        """The feed-forward layers with smaller prefixes, those of `multi_token` included."""
        blocks = [block for group in self.stack for block in group.pattern]
        blocks += [] if self.multi_token is None else [self.multi_token_block]
        return [block.ffn for block in blocks if isinstance(block.ffn, MlpConfig) and block.ffn.nested]

    @property
    def multi_token_block(self) -> BlockConfig:
        """The layer of each module of `multi_token`: run once, without a depth of its own."""
        own = None if self.multi_token is None else self.multi_token.block
        return dataclasses.replace(own or self.stack[-1].pattern[-1], num_loops=1)

    @classmethod
    def upgraded(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Read files of earlier versions.

        Phases of quantization, which stood here, are left out: `checkpoints.loading.read_quant_phases` reads
        them from model.json, and an experiment has them in `quant`. Attention had a fraction of rotated dims.
        """
        fields = {name: value for name, value in fields.items() if name != "quant"}
        # The width of a head may follow from `embed_dim`, which an attention config does not contain.
        return _with_attention(fields, functools.partial(with_rotary_dim, embed_dim=fields.get("embed_dim")))

    @classmethod
    def downgraded(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the fields as files of earlier versions had them, for the fingerprint."""
        fields = _with_attention(
            fields, functools.partial(with_rope_fraction, embed_dim=fields.get("embed_dim"))
        )
        # A field that models had: their fingerprints include its empty value.
        return {**fields, "quant": []}

    def blocks(self) -> Iterator[BlockConfig]:
        """Return the configuration of every layer, first to last."""
        return (block for group in self.stack for _ in range(group.repeats) for block in group.pattern)

    def training_notes(self) -> list[str]:
        """Return what should be known before these layers are trained, each sentence once."""
        dims = self.layer_dims()
        parts = [block for group in self.stack for block in group.pattern]
        mixers = [block.mixer.training_note(dims) for block in parts if block.mixer is not None]
        ffns = [block.ffn.training_note() for block in parts if block.ffn is not None]
        return [*dict.fromkeys(filter(None, [*mixers, *ffns]))]

    @property
    def shared_ffns(self) -> dict[str, FfnConfig]:
        """The feed-forward layers that several layers share, by name, in the order of their first use."""
        shared: dict[str, FfnConfig] = {}
        for block in (block for group in self.stack for block in group.pattern):
            name = None if block.ffn is None else block.ffn.shared_name()
            if block.ffn is not None and name is not None:
                # All of one name are equal (`_check_shared_ffns`).
                shared.setdefault(name, block.ffn)
        return shared

    @property
    def num_layers(self) -> int:
        """Number of layers, each of which has its own weights."""
        return sum(len(group.pattern) * group.repeats for group in self.stack)

    @property
    def known_vocab_size(self) -> int:
        """Tokens of the vocabulary. Raises ValueError where neither config nor tokenizer has set it."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not set: give it, or let the tokenizer set it by training")
        return self.vocab_size

    @property
    def scaling(self) -> Scaling:
        """Size relative to the base of the parameterization; 1 in all respects for the standard one."""
        kind = self.parameterization
        if kind is Parameterization.STANDARD or self.base_width is None:
            return UNSCALED
        depth = 1.0
        if kind is Parameterization.COMPLETEP and self.base_depth is not None:
            depth = self.depth / self.base_depth
        return Scaling(
            kind=kind,
            width=self.embed_dim / self.base_width,
            depth=depth,
            base_head_dim=self.base_head_dim,
        )

    @property
    def depth(self) -> int:
        """Number of layers as executed: each loop of a block adds to the residual stream once more."""
        once = sum(group.repeats * sum(block.num_loops for block in group.pattern) for group in self.stack)
        return once * self.num_stack_loops

    @property
    def per_layer_dim(self) -> int | None:
        """Numbers in a row of the table of per-layer embeddings, those of all layers; None without one."""
        config = self.per_layer_embeddings
        return None if config is None else self.num_layers * config.dim

    @property
    def num_stack_loops(self) -> int:
        """How many times all layers run."""
        return 1 if self.loops is None else self.loops.num_loops

    @property
    def exit_gate(self) -> ExitGateConfig | None:
        """The gate that chooses a loop of the stack for each token, if there is one."""
        return None if self.loops is None else self.loops.exit_gate

    @property
    def table_rows(self) -> int:
        """Rows of the embedding table, padding included."""
        return -(-self.known_vocab_size // self.vocab_multiple) * self.vocab_multiple

    def layer_dims(self) -> ModelDims:
        """Return the settings that every layer shares."""
        # Parameters stay in float32: most updates are smaller than the last of bfloat16's 8 bits.
        dtype = jnp.bfloat16 if self.precision is Precision.BFLOAT16 else jnp.float32
        scaling = self.scaling
        return ModelDims(
            embed_dim=self.embed_dim,
            num_layers=self.depth,
            norm_kind=self.norm_kind,
            norm_eps=self.norm_eps,
            init_std=self.init_std * scaling.hidden_std,
            dtype=dtype,
            scaling=scaling,
        )


def _integers(value: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """Yield all integers in a config with their paths."""
    if isinstance(value, int):
        yield path, value
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _integers(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            name = f"{path}.{field.name}" if path else field.name
            yield from _integers(getattr(value, field.name), name)


def _shown(number: int) -> str:
    # Python converts no integer of thousands of digits to text.
    return f"{number:,}" if number.bit_length() < 200 else f"an integer of {number.bit_length():,} bits"


def _with_attention(value: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """JSON in which `change` is applied to the fields of every `AttentionConfig`, at any depth."""
    if isinstance(value, list):
        return [_with_attention(item, change) for item in value]
    if not isinstance(value, dict):
        return value
    fields = {name: _with_attention(item, change) for name, item in value.items()}
    return change(fields) if fields.get("type") == AttentionConfig.__name__ else fields


# Stacks -----------------------------------------------------------------------------------------------------
LONGEST_PATTERN = 12  # blocks; a longer pattern would save little compilation


def stack_of(blocks: Sequence[BlockConfig]) -> tuple[LayerGroup, ...]:
    """Return the groups that hold these layers in order with the fewest blocks to compile.

    Of 26 layers of which every sixth differs, there are 4 repeats of 6 blocks and one of 2. Among equals the
    one with the fewest groups is taken.

    Raises:
      ValueError: there are no layers.
    """
    if not blocks:
        raise ValueError("a model needs at least one layer")
    # Blocks as small integers: comparing dataclasses takes long.
    kinds = {block: kind for kind, block in enumerate(dict.fromkeys(blocks))}
    row = [kinds[block] for block in blocks]
    # Dynamic programming over ends, in steps that do not grow with the number of repeats. Costs are the
    # blocks to compile, and the groups.
    cheapest: list[tuple[int, int]] = [(0, 0)]  # of the first n layers
    # Of the first n, the last group: its start, and the size of its pattern.
    last_groups: list[tuple[int, int]] = [(0, 0)]
    # Of the last group with this end and size: the cheapest cost of what comes before it, and its start.
    befores: dict[tuple[int, int], tuple[tuple[int, int], int]] = {}
    for end in range(1, len(blocks) + 1):
        options = []
        for size in range(1, min(LONGEST_PATTERN, end) + 1):
            start = end - size
            before = cheapest[start], start
            # The group may also have the repeats that end here before its last one.
            if start >= size and row[start - size : start] == row[start:end]:
                longer = befores[start, size]
                before = longer if longer[0] < before[0] else before
            befores[end, size] = before
            (num_blocks, num_groups), start = before
            options.append(((num_blocks + size, num_groups + 1), start, size))
        # Fewer compiled blocks first, then fewer groups.
        cost, start, size = min(options, key=lambda option: option[0])
        cheapest.append(cost)
        last_groups.append((start, size))
    groups = []
    end = len(blocks)
    while end:
        start, size = last_groups[end]
        groups.append(LayerGroup(pattern=tuple(blocks[end - size : end]), repeats=(end - start) // size))
        end = start
    return tuple(reversed(groups))
