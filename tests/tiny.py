"""The experiment that the end-to-end tests train: seconds on a CPU, and something of everything.

Sliding-window and full attention, grouped queries, dense and mixture-of-experts layers, dropout, averaged
weights. It reads text.txt in the current directory and writes to runs/.
"""

from slmjax.checkpoints.run_checkpoints import CheckpointConfig
from slmjax.data.config import DataConfig, Split
from slmjax.data.tokenizers import ByteTokenizer
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import Balance, MoeConfig
from slmjax.models.mixers.attention import AttentionConfig, QkNorm
from slmjax.sampling import SamplingConfig
from slmjax.training.experiment import EvalConfig, Experiment, RunConfig
from slmjax.training.optim import OptimConfig


def experiment() -> Experiment:
    """60 steps; checkpoints at 10, 20, ..., evaluations at 20 and 40."""
    window = BlockConfig(
        mixer=AttentionConfig(num_heads=4, num_kv_heads=2, window=16, qk_norm=QkNorm.PER_HEAD),
        ffn=MlpConfig(hidden_dim=64),
    )
    experts = BlockConfig(
        mixer=AttentionConfig(num_heads=4),
        ffn=MoeConfig(num_experts=4, num_selected=2, hidden_dim=32, balance=Balance.BIAS),
    )
    return Experiment(
        model=ModelConfig(
            embed_dim=32,
            context_length=64,
            stack=(LayerGroup(pattern=(window, experts), repeats=2),),
            dropout=0.1,
        ),
        data=DataConfig(
            path="text.txt", split=Split.TAIL, heldout_fraction=0.1, sequence_length=48, batch_size=8
        ),
        tokenizer=ByteTokenizer(),
        optim=OptimConfig(lr=1e-2, warmup_steps=5, ema_decay=0.9),
        eval=EvalConfig(every=20, overlap=8, max_documents=None),
        checkpoint=CheckpointConfig(every=10),
        run=RunConfig(
            name="tiny", steps=60, log_every=1, sample_prompts=("The ",), sample=SamplingConfig(max_tokens=10)
        ),
    )
