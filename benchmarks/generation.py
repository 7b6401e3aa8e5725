"""Decoding speed compared with Hugging Face `generate`: the 12M model, the same weights, greedy.

    python benchmarks/generation.py                     # needs the oracle extra (torch, transformers)

Both run in turn in one process. Prints tokens per second of both, prefill included, for 1 and 16 prompts of
32 tokens and 128 new tokens each, and the ratio.
"""

import argparse
import time
from collections.abc import Callable

from slmjax.startup import keep_memory

keep_memory()

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from slmjax.models import zoo  # noqa: E402
from slmjax.models.definition import define, unstack  # noqa: E402
from slmjax.sampling import SamplingConfig, sample  # noqa: E402

CONFIG = zoo.slm_12m()
PROMPT = 32
NEW = 128


def hugging_face(flat: dict[str, np.ndarray]) -> LlamaForCausalLM:
    """Return the same model with the same weights."""
    config = LlamaConfig(
        vocab_size=CONFIG.known_vocab_size,
        hidden_size=CONFIG.embed_dim,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=6,
        intermediate_size=1024,
        rms_norm_eps=CONFIG.norm_eps,
        tie_word_embeddings=True,
        rope_theta=10_000.0,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    names = {
        "mixer/query": "self_attn.q_proj",
        "mixer/key": "self_attn.k_proj",
        "mixer/value": "self_attn.v_proj",
        "mixer/output": "self_attn.o_proj",
        "ffn/gate": "mlp.gate_proj",
        "ffn/up": "mlp.up_proj",
        "ffn/down": "mlp.down_proj",
        "mixer_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    state = {"model.embed_tokens.weight": flat["embed/table"], "model.norm.weight": flat["final_norm/scale"]}
    for layer in range(CONFIG.num_layers):
        for ours, theirs in names.items():
            # PyTorch stores linear layers as [out, in].
            value = flat[f"layers/{layer}/{ours}/{'scale' if ours.endswith('norm') else 'weight'}"]
            state[f"model.layers.{layer}.{theirs}.weight"] = value if value.ndim == 1 else value.T
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict({name: torch.tensor(np.ascontiguousarray(value)) for name, value in state.items()})
    return model


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    definition = define(CONFIG)
    params, buffers = jax.jit(definition.init)(jax.random.key(0))
    # A larger table spreads the logits, so that rounding does not decide the greedy choice.
    params = {path: value * (8.0 if path == "embed/table" else 1.0) for path, value in params.items()}
    flat = {path: np.asarray(value) for path, value in unstack(CONFIG, params).items()}
    theirs = hugging_face(flat)
    torch.set_num_threads(2)
    config = SamplingConfig(temperature=0.0, max_tokens=NEW)
    print(
        "| prompts | slmjax tokens/s | transformers tokens/s | ratio of medians (lowest and highest of "
        "pairs) | same tokens |"
    )
    for batch in (1, 16):
        prompts = np.random.default_rng(batch).integers(1, CONFIG.known_vocab_size, (batch, PROMPT))
        asked = torch.tensor(prompts)

        def ours(prompts: np.ndarray = prompts) -> list[list[int]]:
            return [
                completion.tokens
                for completion in sample(
                    definition, params, buffers, prompts.tolist(), config=config, eos_id=None
                )
            ]

        def peer(asked: torch.Tensor = asked) -> list[list[int]]:
            with torch.inference_mode():
                mask = torch.ones_like(asked)
                output = theirs.generate(
                    asked, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
                )
            return output[:, PROMPT:].tolist()

        agreed = np.mean(np.asarray(ours()) == np.asarray(peer()))
        pairs = [(seconds(ours), seconds(peer)) for _ in range(args.rounds)]
        own, other = (float(np.median(side)) for side in zip(*pairs, strict=True))
        ratios = sorted(b / a for a, b in pairs)
        rate = batch * NEW
        ratio = f"{other / own:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {batch} | {rate / own:,.0f} | {rate / other:,.0f} | {ratio} | {agreed:.1%} |")


if __name__ == "__main__":
    main()
