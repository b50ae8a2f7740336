"""Every family against transformers: logits, padding, hidden states, and the way back."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from families import FAMILIES, build

from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, padding, parameters
from tokjax.models.huggingface import config_from_fields, config_to_fields, load, save
from tokjax.models.huggingface.safetensors_files import find_tensors

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
CLOSE = {"rtol": 0, "atol": 1e-4}
# Their frequencies depend on the longest row of the batch in transformers, here on each row's own.
BY_LENGTH = ("llama-dynamic", "phi3-longrope")
# One of each kind of cache: full, biased, rings of one and of several layers, learned positions.
CACHED = ("llama", "mistral", "qwen2-windowed", "gemma2", "gemma3", "gpt2", "opt", "gpt-neox")


def theirs(model, tokens, mask=None, positions=None, **more):
    given = {}
    if mask is not None:
        given["attention_mask"] = torch.tensor(mask.astype(int))
        if model.config.model_type != "opt":  # it counts the mask itself
            given["position_ids"] = torch.tensor(np.asarray(positions)).long()
    with torch.no_grad():
        return model(torch.tensor(tokens), **given, **more)


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, checkpoint):
    """One family: its name, transformers' model, the folder, and ours with one compiled pass."""
    model, folder = checkpoint(request.param)
    ours, params = load(folder)

    @jax.jit
    def forward(tokens, positions, segments):
        out = ours(params, tokens, positions=positions, segments=segments, capture={"resid_post"})
        return out[0], out[1].captured["resid_post"]

    def whole(tokens, mask=None):
        """Logits and hidden states of rows with the given mask; one program for all tests."""
        mask = np.ones(tokens.shape, bool) if mask is None else mask
        return forward(tokens, *padding(mask))

    return SimpleNamespace(
        name=request.param, theirs=model, folder=folder, ours=ours, params=params, whole=whole
    )


def test_logits_and_hidden_states_equal_transformers(family, tokens):
    expected = theirs(family.theirs, tokens, output_hidden_states=True)
    logits, hidden = family.whole(tokens)
    np.testing.assert_allclose(logits, expected.logits.numpy(), **CLOSE)
    behind_blocks = np.stack([h.numpy() for h in expected.hidden_states[1:-1]])
    np.testing.assert_allclose(hidden[: len(behind_blocks)], behind_blocks, **CLOSE)


def test_padded_batches_equal_transformers(family, tokens):
    mask = np.ones(tokens.shape, bool)
    mask[0, :5] = mask[1, 17:] = False  # padded left and right
    logits, _ = family.whole(tokens, mask)
    positions = np.asarray(padding(mask)[0])
    for b in range(2):
        rows, model = [0, 1], family.theirs
        if family.name in BY_LENGTH:
            # Alone, and in a new model: theirs also remembers the longest row it has seen.
            rows, model = [b], build(family.name)
        expected = theirs(model, tokens[rows], mask[rows], positions[rows]).logits
        row = expected[rows.index(b)].numpy()
        np.testing.assert_allclose(logits[b][mask[b]], row[mask[b]], **CLOSE)


def test_the_future_never_moves_the_past(family, tokens):
    changed = tokens.copy()
    changed[:, 12:] = (changed[:, 12:] + 5) % 97
    one, two = family.whole(tokens)[0], family.whole(changed)[0]
    np.testing.assert_array_equal(one[:, :12], two[:, :12])
    assert (one[:, 12:] != two[:, 12:]).any()


@pytest.mark.parametrize("family", CACHED, indirect=True)
def test_cached_steps_equal_the_whole_pass(family, tokens):
    params, ours = parameters.unstack(family.params), family.ours

    @jax.jit
    def step(cache, tokens):
        logits, out = ours(params, tokens, cache=cache)
        return logits, out.cache

    cache, parts = ours.init_cache(2, 20, chunk=6), []
    for start, stop in ((0, 6), (6, 12), *((t, t + 1) for t in range(12, 20))):
        logits, cache = step(cache, tokens[:, start:stop])
        parts.append(logits)
    expected, _ = family.whole(tokens)
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, rtol=0, atol=2e-5)


def test_what_is_saved_is_what_was_loaded_and_transformers_agrees(family, tokens, tmp_path):
    import transformers

    save(tmp_path / "again", family.ours, family.params, source=family.folder)
    before, after = (
        {name: entry.read() for name, entry in find_tensors(path).items()}
        for path in (family.folder, tmp_path / "again")
    )
    kept = {n for n in before if n != "lm_head.weight" or not family.ours.config.tie_embeddings}
    assert set(after) == kept
    for tensor in kept:
        assert after[tensor].dtype == before[tensor].dtype
        np.testing.assert_array_equal(after[tensor], before[tensor], err_msg=tensor)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", attn_implementation="eager"
    )
    model = build(family.name) if family.name in BY_LENGTH else family.theirs
    expected = theirs(model, tokens).logits.numpy()
    np.testing.assert_allclose(theirs(again, tokens).logits.numpy(), expected, rtol=0, atol=1e-5)


def test_a_configuration_survives_the_way_through_its_file(family):
    config = family.ours.config
    again = config_from_fields(config_to_fields(config))
    for field in ("windows", "rope_scaling", "score_scale", "norm_placement", "table_width"):
        assert getattr(again, field) == getattr(config, field), field


def test_greedy_text_equals_transformers(checkpoint, tokens):
    from tokjax.decoding import Prompts, decode

    for name in ("gemma3", "gpt2", "qwen2-windowed"):
        model, folder = checkpoint(name)
        ours, params = load(folder)
        generation = decode(ours, params, Prompts.of(tokens.tolist()), max_new_tokens=24)
        with torch.no_grad():
            expected = model.generate(
                torch.tensor(tokens), max_new_tokens=24, do_sample=False, eos_token_id=None
            )
        assert generation.rows() == expected[:, 20:].tolist()


def test_a_family_refuses_to_save_what_it_cannot_express(tmp_path):
    config = ModelConfig(vocab_size=10, d_model=8, n_heads=2, n_layers=2, qk_norm=True)
    with pytest.raises(ConfigError, match="llama checkpoint cannot hold a model with qk_norm=True"):
        config_to_fields(config)
    capped = dataclasses.replace(config, family="qwen3", logit_softcap=30.0)
    with pytest.raises(ConfigError, match=r"qwen3 .* logit_softcap=30\.0"):
        config_to_fields(capped)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "no model of type 'lama'.*Did you mean 'llama'"),
        ({"model_type": None}, "no 'model_type'"),
        ({"hidden_size": None}, "has no key 'hidden_size'"),
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
        ({"rope_parameters": {"rope_type": "xpos"}}, "'xpos'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised .*'gptq'"),
        ({"num_attention_heads": 5}, "not divisible by n_heads=5"),
    ],
)
def test_configurations_that_cannot_be_read_are_refused(checkpoint, tmp_path, changes, message):
    fields = json.loads((checkpoint("llama-biased")[1] / "config.json").read_text())
    fields.pop("head_dim", None)
    for key, value in changes.items():
        if value is None:
            del fields[key]
        else:
            fields[key] = value
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path)
    assert "config.json" in str(error.value)
