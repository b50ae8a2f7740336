"""Tunix's side of `benchmarks/peers.py`.

Tunix 0.1.7 turns the positions of a Llama with a base of 1,000,000 whatever its configuration says,
so the weights' configuration says that. Its sampler gets a cache of just the length needed, prompts
of a length that it does not pad, and no end of text.
"""

import json
from pathlib import Path

DISTRIBUTION = "google-tunix"
BASE = 1_000_000.0  # of the rotation of positions
FIELDS = {"rope_parameters": {"rope_type": "default", "rope_theta": BASE}}


class _Numbers:
    """A tokenizer of texts that are ids with spaces between."""

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def bos_id(self):
        return None

    def eos_id(self):
        return -1

    def pad_id(self):
        return -1  # an id that no model writes: the sampler hides padding wherever it stands


def load(folder: str) -> dict:
    """What Tunix can be asked for, by name, with the weights in `folder`."""
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.llama3.model import ModelConfig
    from tunix.models.llama3.params import create_model_from_safe_tensors

    fields = json.loads((Path(folder) / "config.json").read_text())
    heads = fields["num_attention_heads"]
    config = ModelConfig(
        num_layers=fields["num_hidden_layers"],
        vocab_size=fields["vocab_size"],
        embed_dim=fields["hidden_size"],
        hidden_dim=fields["intermediate_size"],
        num_heads=heads,
        head_dim=fields["hidden_size"] // heads,
        num_kv_heads=fields["num_key_value_heads"],
        rope_theta=int(BASE),
        norm_eps=fields["rms_norm_eps"],
        weight_tying=fields["tie_word_embeddings"],
    )
    model = create_model_from_safe_tensors(folder, config)
    samplers = {}

    def decode(prompts, new_tokens):
        length = len(prompts[0]) + new_tokens
        if length not in samplers:
            shape = (config.num_layers, config.num_kv_heads, config.head_dim)
            samplers[length] = Sampler(model, _Numbers(), CacheConfig(length, *shape))
        texts = [" ".join(map(str, ids)) for ids in prompts]
        found = samplers[length](
            texts, max_generation_steps=new_tokens, max_prompt_length=len(prompts[0])
        )
        return [ids.tolist() for ids in found.tokens]

    return {"decode": decode}
