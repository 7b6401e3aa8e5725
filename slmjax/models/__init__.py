"""Decoders: what an experiment file describes a model with, and what a layer of one's own is written with.

    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32, qk_norm=QkNorm.PER_HEAD)
    block = BlockConfig(mixer=attention, ffn=MlpConfig(hidden_dim=320))
    config = ModelConfig(embed_dim=128, stack=(LayerGroup(pattern=(block,), repeats=2),), context_length=256)
    config = zoo.nano()  # or a named architecture

These names are public: `from slmjax.models import AttentionConfig`.

Files in reading order:

- parameterization.py: factors of initial weights and multipliers, by width and depth
- layers.py: norms, linear maps, embeddings
- protocols.py: interfaces of mixers and feed-forward layers
- padding.py: padding on the right, in decoding states
- per_layer.py: per-layer embeddings
- loops.py: stacks that run several times, and their exit gate
- rope.py: rotary positions and their scalings
- ffn: feed-forward layers
- mixers: token mixers
- architecture.py: `ModelConfig`, a stack of layer groups
- shared_layers.py: layers that use what other layers have
- canonical_form.py: one form for equal architectures
- blocks.py: blocks, scanned over the repeats of their group
- multi_token.py: modules that predict the tokens after the next one
- decoder.py: the decoder, group after group
- paths.py: paths of parameters, by stack and by layer
- nested_ffn.py: feed-forward layers whose prefixes are smaller layers
- definition.py: a model as functions of flat dicts of parameters
- zoo: named architectures and their costs
"""

from slmjax.models import zoo
from slmjax.models.architecture import (
    BlockConfig,
    HeadKind,
    LayerGroup,
    ModelConfig,
    MultiTokenConfig,
    NormPlacement,
    Precision,
    Remat,
    stack_of,
)
from slmjax.models.ffn.channel_mix import ChannelMixConfig
from slmjax.models.ffn.mlp import Activation, MlpConfig
from slmjax.models.ffn.moe import Balance, MoeConfig, RouterScore
from slmjax.models.layers import Linear, ModelDims, NormKind, truncated_normal
from slmjax.models.loops import ExitGateConfig, StackLoops
from slmjax.models.mixers.attention import AttentionConfig, Biases, OutputGate, QkNorm
from slmjax.models.mixers.delta_net import DeltaNetConfig, GatedDeltaNetConfig, KimiDeltaAttentionConfig
from slmjax.models.mixers.differential import DifferentialAttentionConfig
from slmjax.models.mixers.gated_linear import GatedLinearAttentionConfig
from slmjax.models.mixers.griffin import RgLruConfig
from slmjax.models.mixers.latent import LatentAttentionConfig
from slmjax.models.mixers.linear_attention import LinearAttentionConfig
from slmjax.models.mixers.mamba import MambaConfig
from slmjax.models.mixers.mamba2 import GatedNorm, Mamba2Config
from slmjax.models.mixers.parallel import Combine, ParallelMixerConfig
from slmjax.models.mixers.retention import RetentionConfig, RetentionDecay
from slmjax.models.mixers.rwkv4 import Rwkv4Config
from slmjax.models.mixers.rwkv7 import Rwkv7Config
from slmjax.models.mixers.short_convolution import ShortConvolutionConfig
from slmjax.models.padding import fill_padding, last_real
from slmjax.models.parameterization import Parameterization
from slmjax.models.per_layer import PerLayerEmbeddingConfig
from slmjax.models.protocols import (
    NO_CONTEXT,
    CachingMixer,
    CompositeMixer,
    ContextMixer,
    Ffn,
    FfnAux,
    FfnConfig,
    Mixer,
    MixerConfig,
    MixerContext,
    StatefulFfn,
    StateSize,
    Visibility,
    optional_arguments,
)
from slmjax.models.rope import (
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    RopeScaling,
    YarnScaling,
    sequence_lengths,
)
from slmjax.models.shared_layers import with_shared_ffn, with_shared_key_values

__all__ = [
    "NO_CONTEXT",
    "Activation",
    "AttentionConfig",
    "Balance",
    "Biases",
    "BlockConfig",
    "CachingMixer",
    "ChannelMixConfig",
    "Combine",
    "CompositeMixer",
    "ContextMixer",
    "DeltaNetConfig",
    "DifferentialAttentionConfig",
    "ExitGateConfig",
    "Ffn",
    "FfnAux",
    "FfnConfig",
    "GatedDeltaNetConfig",
    "GatedLinearAttentionConfig",
    "GatedNorm",
    "HeadKind",
    "KimiDeltaAttentionConfig",
    "LatentAttentionConfig",
    "LayerGroup",
    "Linear",
    "LinearAttentionConfig",
    "LinearScaling",
    "Llama3Scaling",
    "LongScaling",
    "Mamba2Config",
    "MambaConfig",
    "Mixer",
    "MixerConfig",
    "MixerContext",
    "MlpConfig",
    "ModelConfig",
    "ModelDims",
    "MultiTokenConfig",
    "MoeConfig",
    "NormKind",
    "NormPlacement",
    "OutputGate",
    "ParallelMixerConfig",
    "Parameterization",
    "PerLayerEmbeddingConfig",
    "Precision",
    "QkNorm",
    "Remat",
    "RetentionConfig",
    "RetentionDecay",
    "RgLruConfig",
    "RopeScaling",
    "RouterScore",
    "Rwkv4Config",
    "Rwkv7Config",
    "ShortConvolutionConfig",
    "StackLoops",
    "StateSize",
    "StatefulFfn",
    "Visibility",
    "YarnScaling",
    "fill_padding",
    "last_real",
    "optional_arguments",
    "sequence_lengths",
    "stack_of",
    "truncated_normal",
    "with_shared_ffn",
    "with_shared_key_values",
    "zoo",
]
