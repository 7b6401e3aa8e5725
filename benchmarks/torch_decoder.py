"""The decoders of the experiments in plain PyTorch: the same shapes, objective and optimizer."""

import contextlib
import dataclasses

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A model and its batch."""

    layers: int
    dim: int
    heads: int
    hidden: int
    vocab: int
    length: int
    rows: int
    gated: bool = True  # SwiGLU; else GELU
    kv_heads: int | None = None  # none: as many as query heads


SIZES = {
    "12m": Size(layers=6, dim=384, heads=6, hidden=1024, vocab=4096, length=256, rows=8),
    "0.8m": Size(layers=4, dim=128, heads=4, hidden=512, vocab=128, length=64, rows=12, gated=False),
    "124m": Size(layers=12, dim=768, heads=12, hidden=2048, vocab=50_304, length=1024, rows=32),
    "360m": Size(layers=32, dim=960, heads=15, kv_heads=5, hidden=2560, vocab=49_152, length=2048, rows=8),
    "1.7b": Size(layers=24, dim=2048, heads=32, hidden=8192, vocab=49_152, length=2048, rows=4),
}


class Block(nn.Module):
    """Attention with rotary positions, then a feed-forward layer."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.kv_heads = size.kv_heads or size.heads
        self.gated = size.gated
        self.attention_norm = nn.RMSNorm(size.dim, eps=1e-6)
        self.ffn_norm = nn.RMSNorm(size.dim, eps=1e-6)
        self.inputs = nn.Linear(
            size.dim, (self.heads + 2 * self.kv_heads) * (size.dim // self.heads), bias=False
        )
        self.output = nn.Linear(size.dim, size.dim, bias=False)
        self.up = nn.Linear(size.dim, (2 if size.gated else 1) * size.hidden, bias=False)
        self.down = nn.Linear(size.hidden, size.dim, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        rows, length, dim = x.shape
        split = self.inputs(self.attention_norm(x)).view(rows, length, -1, dim // self.heads).transpose(1, 2)
        q, k, v = split.split([self.heads, self.kv_heads, self.kv_heads], dim=1)

        def turned(t: torch.Tensor) -> torch.Tensor:
            first, second = t.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(v.dtype)

        mixed = F.scaled_dot_product_attention(
            turned(q), turned(k), v, is_causal=True, enable_gqa=self.kv_heads < self.heads
        )
        x = x + self.output(mixed.transpose(1, 2).reshape(rows, length, dim))
        hidden = self.up(self.ffn_norm(x))
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = F.gelu(hidden, approximate="tanh")
        return x + self.down(hidden)


class Decoder(nn.Module):
    """Tied embedding, blocks, cross entropy."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.table = nn.Embedding(size.vocab, size.dim)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.dim, eps=1e-6)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                narrow = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * size.layers) ** 0.5 if narrow else 0.02)
        half = size.dim // size.heads // 2
        angles = torch.arange(size.length)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        length = tokens.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length])
        logits = F.linear(self.norm(x), self.table.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.reshape(-1))


class Training:
    """A model, its optimizer, and the step that both take."""

    def __init__(self, size: Size, *, half: bool, compiled: bool, lr: float = 1e-3) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.half = half
        torch.manual_seed(0)
        self.model = Decoder(size).to(self.device)
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
        self.loss = torch.compile(self.model) if compiled else self.model

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return a context of bfloat16 where `half` is set."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.half)

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of one update, with gradients clipped to a norm of 1."""
        with self.autocast():
            loss = self.loss(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()
