"""Llama and its kin: Mistral, Qwen2, Qwen3, Gemma 1 to 3, Phi-3."""

from typing import Any

from tokjax.errors import ConfigError
from tokjax.models.config import ModelConfig
from tokjax.models.huggingface.common import layer_types, linear, window_pattern
from tokjax.models.huggingface.family import (
    ACTIVATION_NAMES,
    Family,
    Fields,
    Split,
    Tensor,
    activation,
    add_family,
    check_feature,
)
from tokjax.models.huggingface.rope import read_rope, read_scaling, write_rope


def _sizes(fields: Fields, **defaults: Any) -> dict[str, Any]:
    """Returns what all of them have in common."""
    return {
        "vocab_size": fields["vocab_size"],
        "d_model": fields["hidden_size"],
        "n_layers": fields["num_hidden_layers"],
        "n_heads": fields["num_attention_heads"],
        "n_kv_heads": fields.get("num_key_value_heads") or defaults.get("kv_heads"),
        "head_dim": fields.get("head_dim") or defaults.get("head_dim"),
        "d_ff": fields["intermediate_size"],
        "max_positions": fields.get("max_position_embeddings", defaults.get("positions", 2048)),
        "norm_eps": fields.get("rms_norm_eps", 1e-6),
        "tie_embeddings": fields.get("tie_word_embeddings", defaults.get("tied", False)),
        "activation": activation(fields, "hidden_act", "silu"),
    }


def _write_sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.ff_width,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": ACTIVATION_NAMES[config.activation],
    }


def _windows(fields: Fields, window: int | None, default: tuple[bool, ...]) -> dict[str, Any]:
    pattern = window_pattern(fields, default)
    if window is None or (pattern and not any(pattern)):
        return {}
    return {"sliding_window": window, "window_pattern": pattern}


def _tensors(config: ModelConfig) -> dict[str, Tensor]:
    at, ff = "model.layers.{layer}.self_attn", "model.layers.{layer}.mlp"
    block = "model.layers.{layer}"
    found = {
        "embedding": Tensor("model.embed_tokens.weight"),
        "norm": Tensor("model.norm.weight"),
        "head": Tensor("lm_head.weight"),
        "layers/attention/norm": Tensor(f"{block}.input_layernorm.weight"),
        "layers/attention/query_norm": Tensor(f"{at}.q_norm.weight"),
        "layers/attention/key_norm": Tensor(f"{at}.k_norm.weight"),
        "layers/mlp/norm": Tensor(f"{block}.post_attention_layernorm.weight"),
    }
    if config.norm_placement == "both":
        found |= {
            "layers/attention/post_norm": Tensor(f"{block}.post_attention_layernorm.weight"),
            "layers/mlp/norm": Tensor(f"{block}.pre_feedforward_layernorm.weight"),
            "layers/mlp/post_norm": Tensor(f"{block}.post_feedforward_layernorm.weight"),
        }
    for part, names in (
        (at, {"query": "q", "key": "k", "value": "v", "out": "o"}),
        (ff, {"gate": "gate", "up": "up", "down": "down"}),
    ):
        group = "attention" if part == at else "mlp"
        found |= linear({f"layers/{group}/{n}": f"{part}.{m}_proj" for n, m in names.items()})
    return found


def _phi3_tensors(config: ModelConfig) -> dict[str, Tensor]:
    at, ff = "model.layers.{layer}.self_attn", "model.layers.{layer}.mlp"
    d, F = config.head_width, config.ff_width
    qkv = (config.n_heads * d, config.kv_heads * d, config.kv_heads * d)
    fused = {
        f"layers/attention/{name}": Tensor(f"{at}.qkv_proj.weight", True, Split(qkv, i))
        for i, name in enumerate(("query", "key", "value"))
    }
    fused |= {
        f"layers/mlp/{name}": Tensor(f"{ff}.gate_up_proj.weight", True, Split((F, F), i))
        for i, name in enumerate(("gate", "up"))
    }
    return _tensors(config) | fused


def _read_llama(fields: Fields) -> ModelConfig:
    check_feature(fields, "pretraining_tp", 1)
    biased = bool(fields.get("attention_bias", False))
    return ModelConfig(
        **_sizes(fields),
        **read_rope(fields),
        attention_bias=biased,
        out_bias=biased,
        mlp_bias=bool(fields.get("mlp_bias", False)),
    )


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return (
        _write_sizes(config)
        | write_rope(config)
        | {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    )


def _read_mistral(fields: Fields) -> ModelConfig:
    window = fields.get("sliding_window", 4096)
    sizes = _sizes(fields, kv_heads=8, positions=4096 * 32)
    return ModelConfig(**sizes, **read_rope(fields), **_windows(fields, window, ()))


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return _write_sizes(config) | write_rope(config) | {"sliding_window": config.sliding_window}


def _read_qwen(fields: Fields, **features: Any) -> ModelConfig:
    first = fields.get("max_window_layers", 28)
    default = tuple(i >= first for i in range(fields["num_hidden_layers"]))
    window = fields.get("sliding_window", 4096) if fields.get("use_sliding_window") else None
    return ModelConfig(
        **_sizes(fields, positions=32768, **features.pop("sizes", {})),
        **read_rope(fields),
        **_windows(fields, window, default),
        **features,
    )


def _read_qwen2(fields: Fields) -> ModelConfig:
    return _read_qwen(fields, attention_bias=True, sizes={"kv_heads": 32})


def _read_qwen3(fields: Fields) -> ModelConfig:
    biased = bool(fields.get("attention_bias", False))
    sizes = {"kv_heads": 32, "head_dim": 128}
    return _read_qwen(fields, qk_norm=True, attention_bias=biased, out_bias=biased, sizes=sizes)


def _write_qwen(config: ModelConfig) -> dict[str, Any]:
    windowed = config.sliding_window is not None
    return (
        _write_sizes(config)
        | write_rope(config)
        | {
            "use_sliding_window": windowed,
            "sliding_window": config.sliding_window,
            "layer_types": layer_types(config),
        }
    )


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return _write_qwen(config) | {"attention_bias": config.attention_bias}


def _gemma(fields: Fields, **defaults: Any) -> dict[str, Any]:
    """Returns what every Gemma has: scaled embeddings and norms that multiply by 1 + weight."""
    check_feature(fields, "use_bidirectional_attention", None, False)
    name = fields.get("hidden_activation") or fields.get("hidden_act") or "gelu_pytorch_tanh"
    # The first Gemma was published as "gelu" and always computed with the approximation.
    name = "gelu_pytorch_tanh" if name == "gelu" and "hidden_activation" not in fields else name
    sizes = _sizes(dict(fields) | {"hidden_act": name}, tied=True, head_dim=256, **defaults)
    biased = bool(fields.get("attention_bias", False))
    return sizes | {
        "norm_plus_one": True,
        "embedding_scale": float(fields["hidden_size"]) ** 0.5,
        "attention_bias": biased,
        "out_bias": biased,
    }


def _write_gemma(config: ModelConfig) -> dict[str, Any]:
    name = ACTIVATION_NAMES[config.activation]
    return _write_sizes(config) | {
        "hidden_act": name,
        "hidden_activation": name,
        "attention_bias": config.attention_bias,
    }


def _read_gemma(fields: Fields) -> ModelConfig:
    return ModelConfig(**_gemma(fields, kv_heads=16, positions=8192), **read_rope(fields))


def _gemma2_features(fields: Fields, **defaults: Any) -> dict[str, Any]:
    def cap(key: str) -> float | None:
        value = fields.get(key, defaults.get(key))
        return None if value is None else float(value)

    return {
        "norm_placement": "both",
        "attention_scale": float(fields.get("query_pre_attn_scalar", 256)) ** -0.5,
        "attention_softcap": cap("attn_logit_softcapping"),
        "logit_softcap": cap("final_logit_softcapping"),
    }


def _read_gemma2(fields: Fields) -> ModelConfig:
    window = fields.get("sliding_window", 4096)
    layers = fields["num_hidden_layers"]
    return ModelConfig(
        **_gemma(fields, kv_heads=4, positions=8192),
        **_gemma2_features(fields, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
        **read_rope(fields),
        **_windows(fields, window, tuple(i % 2 == 0 for i in range(layers))),
    )


def _write_gemma2(config: ModelConfig) -> dict[str, Any]:
    return (
        _write_gemma(config)
        | write_rope(config)
        | {
            "query_pre_attn_scalar": _whole(config.score_scale**-2),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
            "sliding_window": config.sliding_window,
            "layer_types": layer_types(config),
        }
    )


def _whole(value: float) -> float | int:
    """Returns a number without the rounding of its way through a square root."""
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


def _read_gemma3(fields: Fields) -> ModelConfig:
    layers, every = fields["num_hidden_layers"], fields.get("sliding_window_pattern", 6)
    nested = fields.get("rope_parameters") or {}
    full = dict(nested.get("full_attention") or fields.get("rope_scaling") or {})
    local = dict(nested.get("sliding_attention") or {})
    if read_scaling(local, fields).kind != "none":
        raise ConfigError("config.json scales rotary positions of windowed layers: not supported")
    theta = full.get("rope_theta", fields.get("rope_theta", 1e6))
    return ModelConfig(
        **_gemma(fields, kv_heads=4, positions=131072),
        **_gemma2_features(fields),
        **_windows(
            fields,
            fields.get("sliding_window", 4096),
            tuple((i + 1) % every != 0 for i in range(layers)),
        ),
        qk_norm=True,
        rope_theta=float(theta),
        rope_local_theta=float(
            local.get("rope_theta", fields.get("rope_local_base_freq", 10000.0))
        ),
        rope_scaling=read_scaling(full, fields),
    )


def _write_gemma3(config: ModelConfig) -> dict[str, Any]:
    local = config.rope_theta if config.rope_local_theta is None else config.rope_local_theta
    return _write_gemma2(config) | {"rope_local_base_freq": local}


def _read_phi3(fields: Fields) -> ModelConfig:
    rope = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    if rope.get("rope_type", rope.get("type")) == "yarn":  # what Phi-3 once called longrope
        rope |= {"rope_type": "longrope", "type": "longrope"}
    sizes = _sizes({"rms_norm_eps": 1e-5} | dict(fields), positions=4096)
    without = {k: v for k, v in fields.items() if k not in ("rope_parameters", "rope_scaling")}
    return ModelConfig(
        **sizes,
        **read_rope(without | {"rope_parameters": rope}),
        **_windows(fields, fields.get("sliding_window"), ()),
    )


def _write_phi3(config: ModelConfig) -> dict[str, Any]:
    written = _write_sizes(config) | write_rope(config)
    original = config.rope_scaling.original_positions or config.max_positions
    return written | {
        "partial_rotary_factor": config.rotary_fraction,
        "original_max_position_embeddings": original,
        "sliding_window": config.sliding_window,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


for _name, _architecture, _read, _write in (
    ("llama", "LlamaForCausalLM", _read_llama, _write_llama),
    ("mistral", "MistralForCausalLM", _read_mistral, _write_mistral),
    ("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen),
    ("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3),
    ("gemma", "GemmaForCausalLM", _read_gemma, lambda c: _write_gemma(c) | write_rope(c)),
    ("gemma2", "Gemma2ForCausalLM", _read_gemma2, _write_gemma2),
    ("gemma3_text", "Gemma3ForCausalLM", _read_gemma3, _write_gemma3),
):
    add_family(Family(_name, _architecture, _read, _write, _tensors))
add_family(Family("phi3", "Phi3ForCausalLM", _read_phi3, _write_phi3, _phi3_tensors))
