"""The GPT line: GPT-2, OPT, GPT-NeoX (Pythia)."""

from typing import Any

from tokjax.models.config import ModelConfig
from tokjax.models.huggingface.common import linear, normed
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
from tokjax.models.huggingface.rope import read_rope, write_rope

_BIASED = {"norm": "layer", "norm_bias": True, "gated": False}


def _read_gpt2(fields: Fields) -> ModelConfig:
    check_feature(fields, "scale_attn_weights", True)
    check_feature(fields, "scale_attn_by_inverse_layer_idx", False)
    check_feature(fields, "add_cross_attention", False)
    return ModelConfig(
        vocab_size=fields["vocab_size"],
        d_model=fields["n_embd"],
        n_layers=fields["n_layer"],
        n_heads=fields["n_head"],
        d_ff=fields.get("n_inner") or 4 * fields["n_embd"],
        max_positions=fields.get("n_positions", 1024),
        positions="learned",
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        activation=activation(fields, "activation_function", "gelu_new"),
        attention_bias=True,
        out_bias=True,
        mlp_bias=True,
        tie_embeddings=fields.get("tie_word_embeddings", True),
        **_BIASED,  # type: ignore[arg-type]
    )


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocabulary,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.ff_width,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": ACTIVATION_NAMES[config.activation],
    }


def _gpt2_tensors(config: ModelConfig) -> dict[str, Tensor]:
    block, D = "transformer.h.{layer}", config.d_model
    found = normed(
        {
            "norm": "transformer.ln_f",
            "layers/attention/norm": f"{block}.ln_1",
            "layers/mlp/norm": f"{block}.ln_2",
        }
    )
    found |= {
        "embedding": Tensor("transformer.wte.weight"),
        "position_embedding": Tensor("transformer.wpe.weight"),
        "head": Tensor("lm_head.weight"),
        "layers/attention/out": Tensor(f"{block}.attn.c_proj.weight"),
        "layers/attention/out_bias": Tensor(f"{block}.attn.c_proj.bias"),
        "layers/mlp/up": Tensor(f"{block}.mlp.c_fc.weight"),
        "layers/mlp/up_bias": Tensor(f"{block}.mlp.c_fc.bias"),
        "layers/mlp/down": Tensor(f"{block}.mlp.c_proj.weight"),
        "layers/mlp/down_bias": Tensor(f"{block}.mlp.c_proj.bias"),
    }
    for i, name in enumerate(("query", "key", "value")):
        path, fused = f"layers/attention/{name}", f"{block}.attn.c_attn"
        found[path] = Tensor(f"{fused}.weight", split=Split((D, D, D), i, axis=1))
        found[f"{path}_bias"] = Tensor(f"{fused}.bias", split=Split((D, D, D), i))
    return found


def _read_opt(fields: Fields) -> ModelConfig:
    check_feature(fields, "layer_norm_elementwise_affine", True)
    check_feature(fields, "_remove_final_layer_norm", False)
    before, biased = fields.get("do_layer_norm_before", True), fields.get("enable_bias", True)
    width = fields.get("word_embed_proj_dim") or fields["hidden_size"]
    return ModelConfig(
        vocab_size=fields["vocab_size"],
        d_model=fields["hidden_size"],
        n_layers=fields["num_hidden_layers"],
        n_heads=fields["num_attention_heads"],
        d_ff=fields["ffn_dim"],
        max_positions=fields.get("max_position_embeddings", 2048),
        positions="learned",
        position_offset=2,
        activation=activation(fields, "activation_function", "relu"),
        attention_bias=biased,
        out_bias=biased,
        mlp_bias=biased,
        norm_placement="pre" if before else "post",
        final_norm=before,
        embedding_width=None if width == fields["hidden_size"] else width,
        tie_embeddings=fields.get("tie_word_embeddings", True),
        **_BIASED,  # type: ignore[arg-type]
    )


def _write_opt(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "ffn_dim": config.ff_width,
        "max_position_embeddings": config.max_positions,
        "activation_function": ACTIVATION_NAMES[config.activation],
        "enable_bias": config.attention_bias,
        "do_layer_norm_before": config.norm_placement == "pre",
        "word_embed_proj_dim": config.table_width,
    }


def _opt_tensors(config: ModelConfig) -> dict[str, Tensor]:
    stack = "model.decoder"
    block = stack + ".layers.{layer}"
    found = normed(
        {
            "norm": f"{stack}.final_layer_norm",
            "layers/attention/norm": f"{block}.self_attn_layer_norm",
            "layers/mlp/norm": f"{block}.final_layer_norm",
        }
    )
    found |= {
        "embedding": Tensor(f"{stack}.embed_tokens.weight"),
        "position_embedding": Tensor(f"{stack}.embed_positions.weight"),
        "embedding_in": Tensor(f"{stack}.project_in.weight", transposed=True),
        "embedding_out": Tensor(f"{stack}.project_out.weight", transposed=True),
        "head": Tensor("lm_head.weight"),
    }
    return found | linear(
        {
            "layers/attention/query": f"{block}.self_attn.q_proj",
            "layers/attention/key": f"{block}.self_attn.k_proj",
            "layers/attention/value": f"{block}.self_attn.v_proj",
            "layers/attention/out": f"{block}.self_attn.out_proj",
            "layers/mlp/up": f"{block}.fc1",
            "layers/mlp/down": f"{block}.fc2",
        }
    )


def _read_neox(fields: Fields) -> ModelConfig:
    older = {
        "rope_theta": fields.get("rope_theta", fields.get("rotary_emb_base", 10000.0)),
        "partial_rotary_factor": fields.get(
            "partial_rotary_factor", fields.get("rotary_pct", 0.25)
        ),
    }
    biased = fields.get("attention_bias", True)
    return ModelConfig(
        vocab_size=fields["vocab_size"],
        d_model=fields["hidden_size"],
        n_layers=fields["num_hidden_layers"],
        n_heads=fields["num_attention_heads"],
        d_ff=fields["intermediate_size"],
        max_positions=fields.get("max_position_embeddings", 2048),
        norm_eps=fields.get("layer_norm_eps", 1e-5),
        activation=activation(fields, "hidden_act", "gelu"),
        attention_bias=biased,
        out_bias=biased,
        mlp_bias=True,
        parallel_residual=fields.get("use_parallel_residual", True),
        tie_embeddings=fields.get("tie_word_embeddings", False),
        **read_rope(dict(fields) | older),
        **_BIASED,  # type: ignore[arg-type]
    )


def _write_neox(config: ModelConfig) -> dict[str, Any]:
    rope = write_rope(config)
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.ff_width,
        "max_position_embeddings": config.max_positions,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "attention_bias": config.attention_bias,
        "use_parallel_residual": config.parallel_residual,
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": rope["rope_theta"],
        "rope_scaling": rope["rope_scaling"],
    }


def _neox_tensors(config: ModelConfig) -> dict[str, Tensor]:
    block, d = "gpt_neox.layers.{layer}", config.head_width
    found = normed(
        {
            "norm": "gpt_neox.final_layer_norm",
            "layers/attention/norm": f"{block}.input_layernorm",
            "layers/mlp/norm": f"{block}.post_attention_layernorm",
        }
    )
    found |= {
        "embedding": Tensor("gpt_neox.embed_in.weight"),
        "head": Tensor("embed_out.weight"),
    }
    found |= linear(
        {
            "layers/attention/out": f"{block}.attention.dense",
            "layers/mlp/up": f"{block}.mlp.dense_h_to_4h",
            "layers/mlp/down": f"{block}.mlp.dense_4h_to_h",
        }
    )
    for i, name in enumerate(("query", "key", "value")):
        split = Split((d, d, d), i, groups=config.n_heads)
        path, fused = f"layers/attention/{name}", f"{block}.attention.query_key_value"
        found[path] = Tensor(f"{fused}.weight", True, split)
        found[f"{path}_bias"] = Tensor(f"{fused}.bias", split=split)
    return found


add_family(
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        _read_gpt2,
        _write_gpt2,
        _gpt2_tensors,
        prefix="transformer.",
        ignored=(".attn.bias", ".attn.masked_bias"),
    )
)
add_family(Family("opt", "OPTForCausalLM", _read_opt, _write_opt, _opt_tensors))
add_family(
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        _read_neox,
        _write_neox,
        _neox_tensors,
        prefix="gpt_neox.",
        ignored=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    )
)
