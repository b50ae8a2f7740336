"""Tiny random encoders and encoder-decoders, made by transformers."""

from collections.abc import Mapping
from typing import Any

from families import randomise

_ENCODER = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_MODERN = _ENCODER | {
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"cls_token_id": 1, "sep_token_id": 2},
}
_BIASES = dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True)

# name -> (transformers class of the configuration, its arguments)
ENCODERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _ENCODER),
    "roberta": ("Roberta", _ENCODER | {"max_position_embeddings": 66, "pad_token_id": 1}),
    "xlm-roberta": ("XLMRoberta", _ENCODER | {"pad_token_id": 1, "type_vocab_size": 1}),
    "modernbert": ("ModernBert", _MODERN | {"local_attention": 6}),
    "modernbert-biased": (
        "ModernBert",
        _MODERN | _BIASES | {"local_attention": 5, "layer_types": ["sliding_attention"] * 3},
    ),
}

_T5 = {
    "vocab_size": 97,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 56,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    # Scores are not scaled: with larger weights the softmax multiplies rounding errors.
    "initializer_factor": 0.5,
}
_BUCKETS = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
_BART = {
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 48,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_WHISPER = _BART | {
    **{"max_source_positions": 20, "max_target_positions": 32, "num_mel_bins": 10},
    "begin_suppress_tokens": None,
}
ENCODER_DECODERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", _T5),
    "t5-v1.1": (
        "T5",
        _T5 | _BUCKETS | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "mt5": ("MT5", _T5),
    "bart": ("Bart", _BART | {"max_position_embeddings": 64, "scale_embedding": True}),
    "whisper": ("Whisper", _WHISPER),
}
_AUTO = {"Whisper": "AutoModelForSpeechSeq2Seq"}


def auto_class(name: str) -> Any:
    """Returns the class that transformers loads the model `name` with."""
    import transformers

    if name in ENCODERS:
        return transformers.AutoModelForMaskedLM
    kind = ENCODER_DECODERS[name][0]
    return getattr(transformers, _AUTO.get(kind, "AutoModelForSeq2SeqLM"))


def build_other(name: str) -> Any:
    """Returns the transformers model `name`, every parameter random."""
    import torch
    import transformers

    kind, arguments = (ENCODERS | ENCODER_DECODERS)[name]
    config = getattr(transformers, f"{kind}Config")(**arguments)
    torch.manual_seed(0)
    model = auto_class(name).from_config(config, attn_implementation="eager")
    if name in ("t5-v1.1", "mt5"):  # transformers makes them with a tied head and reads their own
        model.lm_head.weight = torch.nn.Parameter(torch.randn(97, 32) / 6)
    randomise(model, torch)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.add_(0.2 * torch.randn(1, 97))
    return model.eval()
