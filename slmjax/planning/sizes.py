"""A model at other widths and depths, with all that grows with them.

growth = head_growth(model, widths=(64, 128, 256))
wider = at_width(model, 128, growth=growth)
deeper = at_depth(model, 16)
"""

import dataclasses
import enum
from collections.abc import Sequence
from fractions import Fraction

from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.mixers.differential import DifferentialAttentionConfig
from slmjax.models.mixers.latent import LatentAttentionConfig
from slmjax.models.mixers.parallel import ParallelMixerConfig, with_parts_changed
from slmjax.models.protocols import FfnConfig, MixerConfig, innermost


class HeadGrowth(enum.Enum):
    """How attention grows with the width of a model."""

    NUMBER = "number"  # more heads of the same dims
    SIZE = "size"  # as many heads of more dims


def head_growth(model: ModelConfig, *, widths: Sequence[int]) -> HeadGrowth:
    """Return `NUMBER` if all of these widths have whole numbers of heads of the model's size, else `SIZE`."""
    counts = set()
    for mixer in (mixer for block in model.blocks() for mixer in innermost(block.mixer)):
        if isinstance(mixer, AttentionConfig | DifferentialAttentionConfig):
            counts |= {mixer.num_heads, mixer.kv_heads}
        elif isinstance(mixer, LatentAttentionConfig):
            counts |= {mixer.num_heads}
    ratios = [Fraction(width, model.embed_dim) for width in widths]
    is_whole = all((count * ratio).denominator == 1 for count in counts for ratio in ratios)
    return HeadGrowth.NUMBER if is_whole else HeadGrowth.SIZE


def query_dim(model: ModelConfig) -> int:
    """Return the dims of a query of the first layer, which attention scores are divided by."""
    first = next(model.blocks()).mixer
    for mixer in innermost(first):
        if isinstance(mixer, LatentAttentionConfig):
            return mixer.key_dim
        if isinstance(mixer, AttentionConfig | DifferentialAttentionConfig):
            return mixer.resolved_head_dim(model.layer_dims())
    raise ValueError(f"{type(first).__name__} has no queries: only attention has other widths here")


def at_width(model: ModelConfig, width: int, *, growth: HeadGrowth) -> ModelConfig:
    """Return a model with `embed_dim=width`, whose other widths are multiplied by the same ratio.

    Raises:
      ValueError: a width would not be a whole number, or a layer is of a kind whose widths are not known.
    """
    ratio = Fraction(width, model.embed_dim)

    def wider(block: BlockConfig) -> BlockConfig:
        mixer = _wider_mixer(block.mixer, model, ratio, growth)
        ffn = None if block.ffn is None else _wider_ffn(block.ffn, ratio)
        return dataclasses.replace(block, mixer=mixer, ffn=ffn)

    stack = tuple(
        dataclasses.replace(group, pattern=tuple(map(wider, group.pattern))) for group in model.stack
    )
    further = model.multi_token
    if further is not None and further.block is not None:
        further = dataclasses.replace(further, block=wider(further.block))
    return dataclasses.replace(model, embed_dim=width, stack=stack, multi_token=further)


def _wider_mixer(mixer: MixerConfig, model: ModelConfig, ratio: Fraction, growth: HeadGrowth) -> MixerConfig:
    is_number = growth is HeadGrowth.NUMBER
    if isinstance(mixer, AttentionConfig):
        dims = model.layer_dims()
        head_dim = mixer.resolved_head_dim(dims)
        if is_number:
            heads = {
                "num_heads": _times("num_heads", mixer.num_heads, ratio),
                "num_kv_heads": _times("num_kv_heads", mixer.kv_heads, ratio),
            }
            return dataclasses.replace(mixer, head_dim=head_dim, **heads)
        rotary_dim = mixer.rotary_dim
        return dataclasses.replace(
            mixer,
            head_dim=_times("head_dim", head_dim, ratio),
            rotary_dim=None if rotary_dim is None else _times("rotary_dim", rotary_dim, ratio),
        )
    if isinstance(mixer, DifferentialAttentionConfig):
        head_dim = mixer.resolved_head_dim(model.layer_dims())
        if not is_number:
            return dataclasses.replace(mixer, head_dim=_times("head_dim", head_dim, ratio))
        return dataclasses.replace(
            mixer,
            head_dim=head_dim,
            num_heads=_times("num_heads", mixer.num_heads, ratio),
            num_kv_heads=_times("num_kv_heads", mixer.kv_heads, ratio),
        )
    if isinstance(mixer, ParallelMixerConfig):
        return with_parts_changed(mixer, lambda part: _wider_mixer(part, model, ratio, growth))
    if isinstance(mixer, LatentAttentionConfig):
        # Latents grow in either case: they are widths between two matrices.
        names = ["latent_dim", "query_rank"]
        names += ["num_heads"] if is_number else ["plain_dim", "rope_dim", "value_dim"]
        sizes = {name: getattr(mixer, name) for name in names}
        return dataclasses.replace(
            mixer, **{name: _times(name, size, ratio) for name, size in sizes.items() if size is not None}
        )
    raise ValueError(f"the widths inside {type(mixer).__name__} are not known: it has no other widths here")


def _wider_ffn(ffn: FfnConfig, ratio: Fraction) -> FfnConfig:
    if isinstance(ffn, MlpConfig):
        return dataclasses.replace(ffn, hidden_dim=_times("hidden_dim", ffn.hidden_dim, ratio))
    if isinstance(ffn, MoeConfig):
        return dataclasses.replace(
            ffn,
            hidden_dim=_times("hidden_dim", ffn.hidden_dim, ratio),
            shared_hidden_dim=_times("shared_hidden_dim", ffn.shared_hidden_dim, ratio),
        )
    raise ValueError(f"the widths inside {type(ffn).__name__} are not known: it has no other widths here")


def _times(name: str, size: int, ratio: Fraction) -> int:
    result = size * ratio
    if result.denominator != 1:
        raise ValueError(
            f"{name}={size} times {ratio}, the ratio of the widths, is no whole number: choose widths that "
            "divide evenly"
        )
    return int(result)


def at_depth(model: ModelConfig, depth: int) -> ModelConfig:
    """Return a model of `depth` layers, loops included, whose groups are repeated in the same ratios.

    Raises:
      ValueError: a group would not be repeated a whole number of times.
    """
    ratio = Fraction(depth, model.depth)
    repeats = [group.repeats * ratio for group in model.stack]
    if not depth or any(count.denominator != 1 for count in repeats):
        layers = model.depth // min(group.repeats for group in model.stack)
        raise ValueError(
            f"a stack of {model.depth} layers cannot have {depth}: choose multiples of {layers}, or a model "
            "with shorter patterns"
        )
    stack = tuple(
        dataclasses.replace(group, repeats=int(count))
        for group, count in zip(model.stack, repeats, strict=True)
    )
    return dataclasses.replace(model, stack=stack)
