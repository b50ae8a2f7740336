"""Tiny random models of every family, made by transformers: what ours are compared with."""

from collections.abc import Mapping
from typing import Any

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_GQA = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 700.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 700.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 700.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 2.0, 3.0, 4.5],
    "original_max_position_embeddings": 16,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

# name -> (transformers class of the configuration, its arguments)
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES | {"head_dim": 16, "tie_word_embeddings": False}),
    "llama-biased": ("Llama", SIZES | {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("Llama", SIZES | {"rope_parameters": LLAMA3}),
    "llama-linear": (
        "Llama",
        SIZES | {"rope_parameters": {"rope_type": "linear", "rope_theta": 700.0, "factor": 4.0}},
    ),
    "llama-dynamic": (
        "Llama",
        SIZES
        | {
            "max_position_embeddings": 12,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 700.0, "factor": 2.0},
        },
    ),
    "llama-yarn": ("Llama", SIZES | {"rope_parameters": YARN}),
    "llama-yarn-mscale": (
        "Llama",
        SIZES
        | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False}},
    ),
    "mistral": ("Mistral", SIZES | {"sliding_window": 7}),
    "qwen2": ("Qwen2", SIZES | {"tie_word_embeddings": True}),
    "qwen2-windowed": (
        "Qwen2",
        SIZES | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 16}),
    "gemma": ("Gemma", SIZES | {"head_dim": 16}),
    "gemma2": (
        "Gemma2",
        SIZES
        | {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24}
        | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
    ),
    "gemma3": (
        "Gemma3Text",
        SIZES
        | SLIDING
        | {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 9000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            }
        },
    ),
    "phi3": ("Phi3", SIZES | {"sliding_window": 9}),
    "phi3-longrope": (
        "Phi3",
        SIZES | {"original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
    ),
    "gpt2": (
        "GPT2",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    ),
    "opt": ("OPT", NO_GQA | {"ffn_dim": 56}),
    "opt-post-norm": (
        "OPT",
        NO_GQA | {"ffn_dim": 56, "do_layer_norm_before": False, "word_embed_proj_dim": 24},
    ),
    "gpt-neox": ("GPTNeoX", NO_GQA | {"rotary_pct": 0.5}),
    "gpt-neox-serial": ("GPTNeoX", NO_GQA | {"use_parallel_residual": False}),
}


def build(name: str) -> Any:
    """Returns the transformers model `name`, every parameter random."""
    import torch
    import transformers

    kind, arguments = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**arguments)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomise(model, torch)
    return model.eval()


def randomise(model: Any, torch: Any) -> None:
    """Adds noise to every parameter: ones and zeros would hide a part left out."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
