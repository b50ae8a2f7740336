"""T5 and its kin: T5 version 1.0 and 1.1, Flan-T5, mT5."""

import dataclasses
from typing import Any

from tokjax.errors import ConfigError
from tokjax.models.config import EncDecConfig, ModelConfig
from tokjax.models.huggingface.common import linear
from tokjax.models.huggingface.family import (
    ACTIVATION_NAMES,
    Family,
    Fields,
    Tensor,
    activation,
    add_family,
)


def _read(fields: Fields) -> EncDecConfig:
    of_mt5 = fields["model_type"] == "mt5"
    projection = fields.get("feed_forward_proj", "gated-gelu" if of_mt5 else "relu")
    gated, name = projection.startswith("gated-"), projection.removeprefix("gated-")
    # Published as "gated-gelu" and always computed with the approximation.
    name = "gelu_new" if projection == "gated-gelu" else name
    layers = fields["num_layers"]
    stack: dict[str, Any] = {
        "d_model": fields["d_model"],
        "n_heads": fields["num_heads"],
        "head_dim": fields["d_kv"],
        "d_ff": fields["d_ff"],
        "max_positions": fields.get("n_positions", 512),
        "norm_eps": fields.get("layer_norm_epsilon", 1e-6),
        "positions": "relative",
        "relative_buckets": fields.get("relative_attention_num_buckets", 32),
        "relative_distance": fields.get("relative_attention_max_distance", 128),
        "attention_scale": 1.0,
        "activation": activation({"feed_forward_proj": name}, "feed_forward_proj", name),
        "gated": gated,
    }
    tied = fields.get("tie_word_embeddings", True) is not False
    scaled = not of_mt5 and fields.get("scale_decoder_outputs", tied)
    return EncDecConfig(
        encoder=ModelConfig(**stack, n_layers=layers, causal=False),
        decoder=ModelConfig(
            **stack,
            vocab_size=fields["vocab_size"],
            n_layers=fields.get("num_decoder_layers") or layers,
            cross_attention=True,
            tie_embeddings=tied,
            logit_scale=fields["d_model"] ** -0.5 if scaled else None,
        ),
    )


def _adapt(config: EncDecConfig, names: frozenset[str]) -> EncDecConfig:
    # transformers from version 5 on says of every T5 that it is tied, but reads an own head.
    decoder = config.decoder
    if "lm_head.weight" not in names or decoder.logit_scale is not None:
        return config
    return dataclasses.replace(config, decoder=dataclasses.replace(decoder, tie_embeddings=False))


def _write(config: EncDecConfig) -> dict[str, Any]:
    stack = config.decoder
    if stack.logit_scale not in (None, stack.d_model**-0.5):
        raise ConfigError(
            f"a {config.family} checkpoint cannot hold a model with "
            f"decoder.logit_scale={stack.logit_scale}: only None or d_model^-0.5"
        )
    name = ACTIVATION_NAMES[stack.activation]
    if stack.gated:
        name = "gated-gelu" if stack.activation == "gelu_tanh" else f"gated-{name}"
    return {
        "vocab_size": stack.vocabulary,
        "d_model": stack.d_model,
        "d_kv": stack.head_width,
        "d_ff": stack.ff_width,
        "num_layers": config.encoder.n_layers,
        "num_decoder_layers": stack.n_layers,
        "num_heads": stack.n_heads,
        "n_positions": stack.max_positions,
        "relative_attention_num_buckets": stack.relative_buckets,
        "relative_attention_max_distance": stack.relative_distance,
        "layer_norm_epsilon": stack.norm_eps,
        "feed_forward_proj": name,
        "scale_decoder_outputs": stack.logit_scale is not None,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
    }


def _stack(stack: str, gated: bool) -> dict[str, Tensor]:
    block, cross = stack + ".block.{layer}.layer", stack == "decoder"
    parts = {"attention": f"{block}.0", "mlp": f"{block}.{2 if cross else 1}"}
    attentions = {"attention": f"{parts['attention']}.SelfAttention"}
    if cross:
        parts["cross"] = f"{block}.1"
        attentions["cross"] = f"{block}.1.EncDecAttention"
    found = {
        f"{stack}/norm": Tensor(f"{stack}.final_layer_norm.weight"),
        f"{stack}/relative_bias": Tensor(
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ),
    }
    for part, name in parts.items():
        found[f"{stack}/layers/{part}/norm"] = Tensor(f"{name}.layer_norm.weight")
    for part, name in attentions.items():
        names = {"query": "q", "key": "k", "value": "v", "out": "o"}
        found |= linear({f"{stack}/layers/{part}/{n}": f"{name}.{m}" for n, m in names.items()})
    names = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
    ff = f"{parts['mlp']}.DenseReluDense"
    return found | linear({f"{stack}/layers/mlp/{n}": f"{ff}.{m}" for n, m in names.items()})


def _tensors(config: EncDecConfig) -> dict[str, Tensor]:
    return {
        "decoder/embedding": Tensor("shared.weight"),
        "decoder/head": Tensor("lm_head.weight"),
        **_stack("encoder", config.encoder.gated),
        **_stack("decoder", config.decoder.gated),
    }


for _name, _architecture in (
    ("t5", "T5ForConditionalGeneration"),
    ("mt5", "MT5ForConditionalGeneration"),
):
    add_family(
        Family(
            _name,
            _architecture,
            _read,
            _write,
            _tensors,
            prefix="",
            # A table that the first files had and no version of the model reads.
            unused=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
            copies=dict.fromkeys(
                ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "decoder/embedding"
            ),
            adapt=_adapt,
        )
    )
