"""Logits against the transformers library, on random weights, by the table's tensor names."""

import jax
import numpy as np
import pytest

from tokjax.models import ModelConfig, Transformer, parameters

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
torch = pytest.importorskip("torch")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
}
COMMON = {
    "vocab_size": 97,
    "d_model": 32,
    "d_ff": 56,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-6,
    "rope_theta": 700.0,
}


def family(name):
    """Returns (torch model with random weights, tokjax configuration)."""
    import transformers

    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(**SIZES, head_dim=16, tie_word_embeddings=False)
        ours = ModelConfig(**COMMON, head_dim=16, tie_embeddings=False)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.Qwen2Config(**SIZES, tie_word_embeddings=True)
        ours = ModelConfig(**COMMON, tie_embeddings=True, attention_bias=True)
        model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases too: ones and zeros would hide a part left out.
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval(), ours


def from_torch(tensors, config):
    """Returns tokjax parameters by the names of the table; counts that no tensor is left over."""
    unread = set(tensors)

    def visit(path, parameter, stacked):
        names = [
            parameter.hf_name.format(layer=i) for i in range(config.n_layers if stacked else 1)
        ]
        unread.difference_update(names)
        arrays = [tensors[n].T if parameter.transposed else tensors[n] for n in names]
        assert all(a.shape == parameter.shape for a in arrays), path
        return np.stack(arrays) if stacked else arrays[0]

    params = parameters.map_table(config, visit)
    return params, unread - ({"lm_head.weight"} if config.tie_embeddings else set())


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_logits_and_attention_equal_transformers(name):
    theirs, config = family(name)
    params, unread = from_torch({k: v.numpy() for k, v in theirs.state_dict().items()}, config)
    assert not unread
    tokens = np.random.default_rng(0).integers(0, 97, (2, 20))
    with torch.no_grad():
        theirs.set_attn_implementation("eager")
        expected = theirs(torch.tensor(tokens), output_attentions=True)
    forward = jax.jit(
        lambda p: Transformer(config)(p, tokens.astype(np.int32), capture={"attn_probs"})
    )
    logits, out = forward(params)
    np.testing.assert_allclose(logits, expected.logits.numpy(), rtol=1e-4, atol=1e-4)
    probabilities = np.stack([a.numpy() for a in expected.attentions])
    np.testing.assert_allclose(out.captured["attn_probs"], probabilities, atol=1e-5)
