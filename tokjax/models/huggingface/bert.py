"""Encoders: BERT, RoBERTa and XLM-RoBERTa, ModernBERT."""

from typing import Any

from tokjax.errors import ConfigError
from tokjax.models.config import ModelConfig
from tokjax.models.huggingface.common import (
    is_backbone,
    layer_types,
    linear,
    normed,
    window_pattern,
)
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
from tokjax.models.huggingface.rope import read_scaling

_POST_NORM: dict[str, Any] = {
    "causal": False,
    "norm": "layer",
    "norm_bias": True,
    "norm_placement": "post",
    "final_norm": False,
    "embedding_norm": True,
    "gated": False,
    "positions": "learned",
    "attention_bias": True,
    "out_bias": True,
    "mlp_bias": True,
}


def _has_head(config: ModelConfig) -> bool:
    return config.mlm_head is not None


def _read_bert(fields: Fields) -> ModelConfig:
    check_feature(fields, "is_decoder", False)
    check_feature(fields, "position_embedding_type", "absolute")
    name = activation(fields, "hidden_act", "gelu")
    headless = is_backbone(fields, "BertModel")
    return ModelConfig(
        **_sizes(fields),
        **_POST_NORM,
        max_positions=fields.get("max_position_embeddings", 512),
        activation=name,
        mlm_head=None if headless else name,
        head_bias=not headless,
    )


def _sizes(fields: Fields) -> dict[str, Any]:
    return {
        "vocab_size": fields["vocab_size"],
        "d_model": fields["hidden_size"],
        "n_layers": fields["num_hidden_layers"],
        "n_heads": fields["num_attention_heads"],
        "d_ff": fields["intermediate_size"],
        "token_types": fields.get("type_vocab_size", 2),
        "norm_eps": fields.get("layer_norm_eps", 1e-12),
        "tie_embeddings": fields.get("tie_word_embeddings", True),
    }


def _write_bert(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.ff_width,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": ACTIVATION_NAMES[config.activation],
    }


def _read_roberta(fields: Fields) -> ModelConfig:
    check_feature(fields, "is_decoder", False)
    check_feature(fields, "position_embedding_type", "absolute")
    headless = is_backbone(fields, "RobertaModel", "XLMRobertaModel")
    # The row of the padding id is no position's, and neither are those before it.
    offset = fields.get("pad_token_id", 1) + 1
    return ModelConfig(
        **_sizes(fields),
        **_POST_NORM,
        max_positions=fields.get("max_position_embeddings", 512) - offset,
        position_offset=offset,
        activation=activation(fields, "hidden_act", "gelu"),
        mlm_head=None if headless else "gelu",
        head_bias=not headless,
    )


def _write_roberta(config: ModelConfig) -> dict[str, Any]:
    return _write_bert(config) | {
        "max_position_embeddings": config.max_positions + config.position_offset,
        "pad_token_id": config.position_offset - 1,
    }


def _bert_tensors(prefix: str) -> dict[str, Tensor]:
    embeddings, block = f"{prefix}.embeddings", prefix + ".encoder.layer.{layer}"
    found = normed(
        {
            "embedding_norm": f"{embeddings}.LayerNorm",
            "layers/attention/norm": f"{block}.attention.output.LayerNorm",
            "layers/mlp/norm": f"{block}.output.LayerNorm",
        }
    )
    found |= {
        "embedding": Tensor(f"{embeddings}.word_embeddings.weight"),
        "position_embedding": Tensor(f"{embeddings}.position_embeddings.weight"),
        "type_embedding": Tensor(f"{embeddings}.token_type_embeddings.weight"),
    }
    return found | linear(
        {
            "layers/attention/query": f"{block}.attention.self.query",
            "layers/attention/key": f"{block}.attention.self.key",
            "layers/attention/value": f"{block}.attention.self.value",
            "layers/attention/out": f"{block}.attention.output.dense",
            "layers/mlp/up": f"{block}.intermediate.dense",
            "layers/mlp/down": f"{block}.output.dense",
        }
    )


def _with_bert_head(config: ModelConfig) -> dict[str, Tensor]:
    head = "cls.predictions"
    return (
        _bert_tensors("bert")
        | linear({"mlm/dense": f"{head}.transform.dense"})
        | normed({"mlm/norm": f"{head}.transform.LayerNorm"})
        | {"head": Tensor(f"{head}.decoder.weight"), "head_bias": Tensor(f"{head}.bias")}
    )


def _with_roberta_head(config: ModelConfig) -> dict[str, Tensor]:
    return (
        _bert_tensors("roberta")
        | linear({"mlm/dense": "lm_head.dense"})
        | normed({"mlm/norm": "lm_head.layer_norm"})
        | {"head": Tensor("lm_head.decoder.weight"), "head_bias": Tensor("lm_head.bias")}
    )


def _read_modernbert(fields: Fields) -> ModelConfig:
    check_feature(fields, "sparse_prediction", False)
    layers, every = fields["num_hidden_layers"], fields.get("global_attn_every_n_layers", 3)
    pattern = window_pattern(fields, tuple(bool(i % every) for i in range(layers)))
    window = {}
    if any(pattern):
        # Half of the tokens it sees lie to either side; ours counts the query itself too.
        half = fields.get("local_attention", 128) // 2 + 1
        window = {"sliding_window": half, "window_pattern": pattern}
    nested = fields.get("rope_parameters") or {}
    thetas = {}
    for key, kind, older, default in (
        ("rope_theta", "full_attention", "global_rope_theta", 160000.0),
        ("rope_local_theta", "sliding_attention", "local_rope_theta", 10000.0),
    ):
        rope = dict(nested.get(kind) or {})
        if read_scaling(rope, fields).kind != "none":
            raise ConfigError("config.json scales the rotary positions: not supported")
        thetas[key] = float(rope.get("rope_theta", fields.get(older) or default))
    headless = is_backbone(fields, "ModernBertModel")
    has_bias = bool(fields.get("attention_bias", False))
    return ModelConfig(
        vocab_size=fields["vocab_size"],
        d_model=fields["hidden_size"],
        n_layers=layers,
        n_heads=fields["num_attention_heads"],
        d_ff=fields["intermediate_size"],
        max_positions=fields.get("max_position_embeddings", 8192),
        causal=False,
        norm="layer",
        norm_eps=fields.get("norm_eps", 1e-5),
        norm_bias=bool(fields.get("norm_bias", False)),
        embedding_norm=True,
        first_attention_norm=False,
        attention_bias=has_bias,
        out_bias=has_bias,
        mlp_bias=bool(fields.get("mlp_bias", False)),
        activation=activation(fields, "hidden_activation", "gelu"),
        tie_embeddings=fields.get("tie_word_embeddings", True),
        mlm_head=None if headless else activation(fields, "classifier_activation", "gelu"),
        mlm_bias=bool(fields.get("classifier_bias", False)),
        head_bias=not headless and bool(fields.get("decoder_bias", True)),
        **thetas,
        **window,
    )


def _write_modernbert(config: ModelConfig) -> dict[str, Any]:
    local = config.rope_theta if config.rope_local_theta is None else config.rope_local_theta
    pattern = [w is not None for w in config.windows]
    depth = len(pattern)
    every = [n for n in range(1, depth + 1) if pattern == [i % n > 0 for i in range(depth)]]
    fields = {
        "vocab_size": config.vocabulary,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.ff_width,
        "max_position_embeddings": config.max_positions,
        "norm_eps": config.norm_eps,
        "norm_bias": config.norm_bias,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_activation": ACTIVATION_NAMES[config.activation],
        "classifier_activation": ACTIVATION_NAMES[config.mlm_head or "gelu"],
        "classifier_bias": config.mlm_head is not None and config.mlm_bias,
        "decoder_bias": config.head_bias,
        "layer_types": layer_types(config),
        "global_rope_theta": config.rope_theta,
        "local_rope_theta": local,
    }
    if config.sliding_window is not None:
        fields["local_attention"] = 2 * (config.sliding_window - 1)
    if every:  # what transformers before version 5 reads instead of `layer_types`
        fields["global_attn_every_n_layers"] = every[0]
    return fields


def _modernbert_tensors(config: ModelConfig) -> dict[str, Tensor]:
    block, D, F = "model.layers.{layer}", config.d_model, config.ff_width
    found = normed(
        {
            "embedding_norm": "model.embeddings.norm",
            "norm": "model.final_norm",
            "layers/mlp/norm": f"{block}.mlp_norm",
            "mlm/norm": "head.norm",
        }
    )
    found |= normed({"layers/attention/norm": f"{block}.attn_norm"}, first_layer=1)
    found |= linear(
        {
            "layers/attention/out": f"{block}.attn.Wo",
            "layers/mlp/down": f"{block}.mlp.Wo",
            "mlm/dense": "head.dense",
        }
    )
    found |= {
        "embedding": Tensor("model.embeddings.tok_embeddings.weight"),
        "head": Tensor("decoder.weight"),
        "head_bias": Tensor("decoder.bias"),
    }
    for part, fused, sizes, names in (
        ("attention", "attn.Wqkv", (D, D, D), ("query", "key", "value")),
        ("mlp", "mlp.Wi", (F, F), ("gate", "up")),
    ):
        for i, name in enumerate(names):
            path, stored = f"layers/{part}/{name}", f"{block}.{fused}"
            found[path] = Tensor(f"{stored}.weight", True, Split(sizes, i))
            found[f"{path}_bias"] = Tensor(f"{stored}.bias", split=Split(sizes, i))
    return found


_OLDER_NORMS = ((".gamma", ".weight"), (".beta", ".bias"))
_POOLER = ("pooler.dense.weight", "pooler.dense.bias")

add_family(
    Family(
        "bert",
        "BertForMaskedLM",
        _read_bert,
        _write_bert,
        _with_bert_head,
        prefix="bert.",
        ignored=("embeddings.position_ids",),
        unused=(
            *_POOLER,
            *(f"bert.{name}" for name in _POOLER),
            *("cls.seq_relationship.weight", "cls.seq_relationship.bias"),
        ),
        copies={"cls.predictions.decoder.bias": "head_bias"},
        renamed=_OLDER_NORMS,
        backbone="BertModel",
        has_head=_has_head,
    )
)
for _name, _class in (("roberta", "Roberta"), ("xlm-roberta", "XLMRoberta")):
    add_family(
        Family(
            _name,
            f"{_class}ForMaskedLM",
            _read_roberta,
            _write_roberta,
            _with_roberta_head,
            prefix="roberta.",
            ignored=("embeddings.position_ids",),
            unused=(*_POOLER, *(f"roberta.{name}" for name in _POOLER)),
            copies={"lm_head.decoder.bias": "head_bias"},
            renamed=_OLDER_NORMS,
            backbone=f"{_class}Model",
            has_head=_has_head,
        )
    )
add_family(
    Family(
        "modernbert",
        "ModernBertForMaskedLM",
        _read_modernbert,
        _write_modernbert,
        _modernbert_tensors,
        backbone="ModernBertModel",
        has_head=_has_head,
    )
)
