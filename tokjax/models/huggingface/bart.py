"""BART and Whisper: encoder-decoders with learned positions."""

from typing import Any

from tokjax.models.config import EncDecConfig, ModelConfig
from tokjax.models.huggingface.common import is_backbone, linear, normed
from tokjax.models.huggingface.family import (
    ACTIVATION_NAMES,
    Family,
    Fields,
    Tensor,
    activation,
    add_family,
    check_feature,
)

_BIASED: dict[str, Any] = {
    "norm": "layer",
    "norm_eps": 1e-5,
    "norm_bias": True,
    "positions": "learned",
    "attention_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "gated": False,
}


def _stacks(fields: Fields, **features: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what encoder and decoder are configured by."""
    name = activation(fields, "activation_function", "gelu")
    encoder, decoder = (
        {
            "d_model": fields["d_model"],
            "n_layers": fields[f"{stack}_layers"],
            "n_heads": fields[f"{stack}_attention_heads"],
            "d_ff": fields[f"{stack}_ffn_dim"],
            "activation": name,
            **_BIASED,
            **features,
        }
        for stack in ("encoder", "decoder")
    )
    return encoder | {"causal": False}, decoder | {
        "vocab_size": fields["vocab_size"],
        "tie_embeddings": fields.get("tie_word_embeddings", True),
        "cross_attention": True,
    }


def _write_stacks(config: EncDecConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "vocab_size": config.decoder.vocabulary,
        "d_model": config.decoder.d_model,
        "activation_function": ACTIVATION_NAMES[config.decoder.activation],
        "is_encoder_decoder": True,
    }
    for name, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        fields |= {
            f"{name}_layers": stack.n_layers,
            f"{name}_attention_heads": stack.n_heads,
            f"{name}_ffn_dim": stack.ff_width,
        }
    return fields


def _read_bart(fields: Fields) -> EncDecConfig:
    check_feature(fields, "normalize_before", False)
    check_feature(fields, "add_final_layer_norm", False)
    encoder, decoder = _stacks(
        fields,
        max_positions=fields.get("max_position_embeddings", 1024),
        position_offset=2,
        norm_placement="post",
        final_norm=False,
        embedding_norm=True,
        embedding_scale=fields["d_model"] ** 0.5 if fields.get("scale_embedding") else None,
    )
    has_bias = not is_backbone(fields, "BartModel")
    return EncDecConfig(ModelConfig(**encoder), ModelConfig(**decoder, head_bias=has_bias))


def _write_bart(config: EncDecConfig) -> dict[str, Any]:
    return _write_stacks(config) | {
        "max_position_embeddings": config.decoder.max_positions,
        "scale_embedding": config.decoder.embedding_scale is not None,
    }


def _read_whisper(fields: Fields) -> EncDecConfig:
    encoder, decoder = _stacks(fields, key_bias=False)
    return EncDecConfig(
        ModelConfig(**encoder, max_positions=fields.get("max_source_positions", 1500)),
        ModelConfig(**decoder, max_positions=fields.get("max_target_positions", 448)),
        inputs="frames",
        frame_width=fields.get("num_mel_bins", 80),
    )


def _write_whisper(config: EncDecConfig) -> dict[str, Any]:
    return _write_stacks(config) | {
        "max_source_positions": config.encoder.max_positions,
        "max_target_positions": config.decoder.max_positions,
        "num_mel_bins": config.frame_width,
    }


def _stack(stack: str) -> dict[str, Tensor]:
    block, ours = f"model.{stack}.layers." + "{layer}", f"{stack}/layers"
    found = normed(
        {
            f"{ours}/attention/norm": f"{block}.self_attn_layer_norm",
            f"{ours}/cross/norm": f"{block}.encoder_attn_layer_norm",
            f"{ours}/mlp/norm": f"{block}.final_layer_norm",
        }
    )
    for part, name in (("attention", "self_attn"), ("cross", "encoder_attn")):
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
        found |= linear({f"{ours}/{part}/{n}": f"{block}.{name}.{m}" for n, m in names.items()})
    found |= linear({f"{ours}/mlp/up": f"{block}.fc1", f"{ours}/mlp/down": f"{block}.fc2"})
    found[f"{stack}/position_embedding"] = Tensor(f"model.{stack}.embed_positions.weight")
    return found


def _bart_tensors(config: EncDecConfig) -> dict[str, Tensor]:
    norms = {f"{s}/embedding_norm": f"model.{s}.layernorm_embedding" for s in _STACKS}
    return {
        **_stack("encoder"),
        **_stack("decoder"),
        **normed(norms),
        "decoder/embedding": Tensor("model.shared.weight"),
        "decoder/head": Tensor("lm_head.weight"),
        "decoder/head_bias": Tensor("final_logits_bias", row=True),
    }


def _whisper_tensors(config: EncDecConfig) -> dict[str, Tensor]:
    found = {
        **_stack("encoder"),
        **_stack("decoder"),
        **normed({f"{s}/norm": f"model.{s}.layer_norm" for s in _STACKS}),
        "decoder/embedding": Tensor("model.decoder.embed_tokens.weight"),
        "decoder/head": Tensor("proj_out.weight"),
    }
    for ours, theirs in (("first", "conv1"), ("second", "conv2")):
        path, name = f"encoder/frames/{ours}", f"model.encoder.{theirs}"
        found[path] = Tensor(f"{name}.weight", transposed=True)
        found[f"{path}_bias"] = Tensor(f"{name}.bias")
    return found


_STACKS = ("encoder", "decoder")
_TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

add_family(
    Family(
        "bart",
        "BartForConditionalGeneration",
        _read_bart,
        _write_bart,
        _bart_tensors,
        ignored=("encoder.version", "decoder.version"),
        copies=dict.fromkeys((*_TABLES, *(f"model.{n}" for n in _TABLES)), "decoder/embedding"),
        backbone="BartModel",
        has_head=lambda config: config.decoder.head_bias,
    )
)
add_family(
    Family(
        "whisper",
        "WhisperForConditionalGeneration",
        _read_whisper,
        _write_whisper,
        _whisper_tensors,
    )
)
