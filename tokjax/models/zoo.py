"""Named sizes for training from scratch; `model.base` of a configuration takes these names.

The vocabulary is left open: it becomes the tokenizer's. The parameters named are those without it.
"""

from collections.abc import Mapping

from tokjax.models.config import ModelConfig, RopeScaling

_LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_positions=8192)

ZOO: Mapping[str, ModelConfig] = {
    # 0.8M: seconds on a laptop
    "nano": ModelConfig(d_model=128, n_layers=4, n_heads=4, max_positions=512),
    # 25.3M: the size of the throughput benchmark
    "small": ModelConfig(d_model=512, n_layers=8, n_heads=8, d_ff=1376),
    # 85M: as GPT-2's smallest, in today's architecture
    "base": ModelConfig(d_model=768, n_layers=12, n_heads=12, d_ff=2048),
    # 106M without the vocabulary of 49,152: SmolLM2's smallest
    "smollm2-135m": ModelConfig(
        d_model=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        d_ff=1536,
        max_positions=8192,
        rope_theta=100000.0,
    ),
    # 315M
    "smollm2-360m": ModelConfig(
        d_model=960,
        n_layers=32,
        n_heads=15,
        n_kv_heads=5,
        d_ff=2560,
        max_positions=8192,
        rope_theta=100000.0,
    ),
    # 0.97B: Llama 3.2's smallest
    "llama3-1b": ModelConfig(
        d_model=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        d_ff=8192,
        max_positions=131072,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=32.0, original_positions=8192),
    ),
    # 6.98B: Llama 3.1
    "llama3-8b": ModelConfig(
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        d_ff=14336,
        max_positions=131072,
        rope_theta=500000.0,
        rope_scaling=_LLAMA3,
        tie_embeddings=False,
    ),
    # 68.5B: Llama 3.1
    "llama3-70b": ModelConfig(
        d_model=8192,
        n_layers=80,
        n_heads=64,
        n_kv_heads=8,
        d_ff=28672,
        max_positions=131072,
        rope_theta=500000.0,
        rope_scaling=_LLAMA3,
        tie_embeddings=False,
    ),
}
