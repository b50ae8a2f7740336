"""Encoder-decoders against transformers: logits, padding, caches, greedy text, the way back."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from other_families import ENCODER_DECODERS, auto_class, build_other

from tokjax.decoding import Conditioned, Prompts, decode, repetition_penalty
from tokjax.errors import CheckpointError, ConfigError
from tokjax.models import EncoderDecoder, padding, parameters
from tokjax.models.huggingface import config_from_fields, config_to_fields, load, save
from tokjax.models.huggingface.safetensors_files import find_tensors
from tokjax.models.relative import bucket_of
from tokjax.parallel.mesh import MeshConfig, build_mesh

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
CLOSE = {"rtol": 0, "atol": 1e-4}
B, S, T = 2, 20, 15


@pytest.fixture(scope="module", params=list(ENCODER_DECODERS))
def family(request, tmp_path_factory):
    """One family: transformers' model, its folder, and ours with two compiled passes."""
    model, folder = build_other(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    ours, params = load(folder)
    rng = np.random.default_rng(1)
    whisper = request.param == "whisper"
    inputs = rng.integers(3, 97, (B, S)).astype(np.int32)
    if whisper:
        inputs = rng.normal(size=(B, 2 * S, 10)).astype(np.float32)
    # This one counts the places of a row and not its tokens.
    places = np.tile(np.arange(S), (B, 1)) if request.param == "bart" else None

    @jax.jit
    def encoded(inputs, mask, positions):
        given = ours.embed_frames(params, inputs) if whisper else inputs
        return ours.encode(params, given, mask, positions=positions)

    def encode(inputs=inputs, mask=None, positions=places):
        mask = WHOLE if mask is None else mask
        return encoded(inputs, mask, padding(mask)[0] if positions is None else positions)

    @jax.jit
    def decoded(tokens, memory):
        return ours.decode(params, tokens, memory)[0]

    def theirs(tokens, mask=None, model=model):
        given = {"decoder_input_ids": torch.tensor(tokens)}
        if whisper:
            given["input_features"] = torch.tensor(inputs).transpose(1, 2)
        else:
            given["input_ids"] = torch.tensor(inputs)
            given["attention_mask"] = torch.tensor((WHOLE if mask is None else mask).astype(int))
        with torch.no_grad():
            return model(**given, output_hidden_states=True)

    return SimpleNamespace(
        name=request.param,
        model=model,
        folder=folder,
        ours=ours,
        params=params,
        inputs=inputs,
        tokens=rng.integers(3, 97, (B, T)).astype(np.int32),
        encode=encode,
        decode=decoded,
        theirs=theirs,
    )


WHOLE = np.ones((B, S), bool)
PADDED = WHOLE.copy()
PADDED[0, :5] = PADDED[1, 17:] = False
TOKENS_IN = ["t5", "t5-v1.1", "bart"]


def test_logits_and_memory_equal_transformers(family):
    assert isinstance(family.ours, EncoderDecoder)
    memory, expected = family.encode(), family.theirs(family.tokens)
    np.testing.assert_allclose(memory.x, expected.encoder_last_hidden_state.numpy(), **CLOSE)
    logits = family.decode(family.tokens, memory)
    np.testing.assert_allclose(logits, expected.logits.numpy(), **CLOSE)


@pytest.mark.parametrize("family", TOKENS_IN, indirect=True)
def test_padded_inputs_equal_transformers(family):
    logits = family.decode(family.tokens, family.encode(mask=PADDED))
    expected = family.theirs(family.tokens, PADDED).logits.numpy()
    np.testing.assert_allclose(logits, expected, **CLOSE)


@pytest.mark.parametrize("family", TOKENS_IN, indirect=True)
def test_padded_inputs_are_neither_read_nor_counted(family):
    changed = family.inputs.copy()
    changed[~PADDED] = 5
    one, two = (
        family.decode(family.tokens, family.encode(inputs, PADDED))
        for inputs in (family.inputs, changed)
    )
    np.testing.assert_array_equal(one, two)
    # When positions count inputs, the side of the padding does not matter.
    left, right = (
        family.decode(family.tokens, family.encode(inputs, mask, padding(mask)[0]))[0]
        for inputs, mask in (
            (family.inputs, PADDED),
            (np.roll(family.inputs, -5, 1), np.roll(PADDED, -5, 1)),
        )
    )
    np.testing.assert_allclose(left, right, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", [*TOKENS_IN, "whisper"], indirect=True)
def test_neither_the_future_nor_masked_memory_moves_anything(family):
    memory = family.encode()
    changed = family.tokens.copy()
    changed[:, 9:] = (changed[:, 9:] + 5) % 97
    one, two = family.decode(family.tokens, memory), family.decode(changed, memory)
    np.testing.assert_array_equal(one[:, :9], two[:, :9])
    assert (one[:, 9:] != two[:, 9:]).any(-1).all()
    masked = dataclasses.replace(memory, mask=jax.numpy.asarray(PADDED))
    shown = family.decode(family.tokens, masked)
    other = memory.x.at[~PADDED].add(1.0)
    moved = family.decode(family.tokens, dataclasses.replace(masked, x=other))
    np.testing.assert_array_equal(moved, shown)
    assert (shown != one).any(-1).all()
    assert (family.decode(family.tokens, dataclasses.replace(memory, x=other)) != one).any()


@pytest.mark.parametrize("family", ["t5", "whisper"], indirect=True)
def test_cached_steps_equal_the_whole_pass(family):
    params, ours = parameters.unstack(family.params), family.ours
    memory = ours.remember(params, family.encode(mask=PADDED))

    @jax.jit
    def step(cache, tokens):
        logits, out = ours.decode(params, tokens, memory, cache=cache)
        return logits, out.cache

    cache, parts = ours.init_cache(B, T), []
    for start, stop in ((0, 5), *((t, t + 1) for t in range(5, T))):
        logits, cache = step(cache, family.tokens[:, start:stop])
        parts.append(logits)
    expected = family.decode(family.tokens, family.encode(mask=PADDED))
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["t5-v1.1", "bart", "whisper"], indirect=True)
def test_greedy_text_equals_transformers(family):
    whisper, prompts = family.name == "whisper", family.tokens[:, :5].copy()
    prompts[:, 0] = family.model.config.decoder_start_token_id
    found = decode(
        family.ours,
        Conditioned(family.params, family.encode(mask=WHOLE if whisper else PADDED)),
        Prompts.of(prompts.tolist()),
        # Tiny random models would repeat one token for ever.
        transform=None if whisper else repetition_penalty(2.0),
        max_new_tokens=16,
    ).rows()
    if whisper:  # whose `generate` forces and forbids tokens of a real vocabulary
        written = prompts
        for _ in range(16):
            new = family.theirs(written).logits.numpy()[:, -1:].argmax(-1)
            written = np.concatenate([written, new], axis=1)
    else:
        written = family.model.generate(
            torch.tensor(family.inputs),
            attention_mask=torch.tensor(PADDED.astype(int)),
            decoder_input_ids=torch.tensor(prompts),
            max_new_tokens=16,
            do_sample=False,
            num_beams=1,
            repetition_penalty=2.0,
            eos_token_id=None,
            use_cache=False,  # theirs has as many layers as the encoder
        ).numpy()
    assert found == written[:, 5:].tolist()
    assert all(len(set(row)) > 2 for row in found)


def test_what_is_saved_is_what_was_loaded_and_transformers_agrees(family, tmp_path):
    save(tmp_path / "again", family.ours, family.params, source=family.folder)
    before, after = (
        {name: entry.read() for name, entry in find_tensors(path).items()}
        for path in (family.folder, tmp_path / "again")
    )
    assert set(after) == set(before)
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    again = auto_class(family.name).from_pretrained(tmp_path / "again", attn_implementation="eager")
    assert again.config.decoder_start_token_id == family.model.config.decoder_start_token_id
    expected = family.theirs(family.tokens).logits.numpy()
    logits = family.theirs(family.tokens, model=again.eval()).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    config = family.ours.config
    assert config_from_fields(config_to_fields(config)).decoder.tie_embeddings == (
        config.decoder.tie_embeddings
    )


@pytest.mark.parametrize("family", ["bart"], indirect=True)
def test_a_checkpoint_without_head_stays_one(family, tmp_path):
    base = family.model.model
    base.save_pretrained(tmp_path / "base")
    ours, params = load(tmp_path / "base")
    hidden = jax.jit(lambda p: ours(p, family.inputs, family.tokens)[1].x)(params)
    expected = family.theirs(family.tokens, model=base).last_hidden_state.numpy()
    np.testing.assert_allclose(hidden, expected, **CLOSE)
    save(tmp_path / "again", ours, params)
    assert set(find_tensors(tmp_path / "again")) == set(find_tensors(tmp_path / "base"))


@pytest.mark.parametrize("family", ["t5"], indirect=True)
def test_parameters_land_on_a_mesh(family):
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, params = load(family.folder, mesh=mesh)
    cross = params["decoder"]["layers"]["cross"]["query"]
    assert cross.addressable_shards[0].data.shape == (3, 16, 24)
    jax.tree.map(np.testing.assert_array_equal, params, family.params)


@pytest.mark.parametrize("family", ["t5", "t5-v1.1"], indirect=True)
def test_copies_of_the_table_must_be_copies_and_odd_tensors_are_refused(family, tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(family.folder / "model.safetensors")
    fields = json.loads((family.folder / "config.json").read_text())

    def again(change, **config):
        (tmp_path / "config.json").write_text(json.dumps(fields | config))
        changed = {name: tensor.copy() for name, tensor in tensors.items()}
        change(changed)
        save_file(changed, tmp_path / "model.safetensors")
        return load(tmp_path)

    copied = dict.fromkeys(("encoder.embed_tokens.weight",), tensors["shared.weight"])
    _, params = again(lambda t: t.update(copied))
    jax.tree.map(np.testing.assert_array_equal, params, family.params)
    with pytest.raises(CheckpointError, match=r"'encoder.embed_tokens.weight' differs from 'sha"):
        again(lambda t: t.update({n: a + 1 for n, a in copied.items()}))
    with pytest.raises(CheckpointError, match=r"'encoder.block.2.x' has no place .*\(2 and 3 lay"):
        again(lambda t: t.update({"encoder.block.2.x": np.zeros(3, np.float32)}))
    name = "decoder.block.2.layer.1.EncDecAttention.k.weight"
    with pytest.raises(CheckpointError, match=f"no tensor '{name}'"):
        again(lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=rf"'{name}' has shape \[4, 4\].*\[48, 32\]"):
        again(lambda t: t.update({name: np.zeros((4, 4), np.float32)}))
    if family.name == "t5-v1.1":  # as Google published it: an own head, which must be there
        published = {"tie_word_embeddings": False, "scale_decoder_outputs": False}
        assert again(lambda t: None, **published)[0].config == family.ours.config
        with pytest.raises(CheckpointError, match=r"no tensor 'lm_head.weight'"):
            again(lambda t: t.pop("lm_head.weight"), **published)


@pytest.mark.parametrize("family", ["t5", "whisper"], indirect=True)
def test_a_family_refuses_to_save_what_it_cannot_express(family):
    config = family.ours.config
    changed = dataclasses.replace(config.encoder, qk_norm=True)
    with pytest.raises(ConfigError, match=r"cannot hold a model with encoder.qk_norm=True"):
        config_to_fields(dataclasses.replace(config, encoder=changed))
    changed = dataclasses.replace(config.decoder, logit_scale=0.5)
    with pytest.raises(ConfigError, match=r"decoder.logit_scale=0\.5"):
        config_to_fields(dataclasses.replace(config, decoder=changed))


@pytest.mark.parametrize("causal", [True, False])
def test_every_distance_falls_into_the_bucket_that_transformers_gives_it(causal):
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = np.arange(-3000, 3000)
    for buckets, limit in ((32, 128), (8, 12), (64, 1000)):
        expected = T5Attention._relative_position_bucket(
            torch.tensor(distances), not causal, buckets, limit
        )
        found = bucket_of(distances, buckets, limit, causal=causal)
        np.testing.assert_array_equal(found, expected.numpy())
