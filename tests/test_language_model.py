"""The front door: loading from everywhere, scoring, generating, saving."""

import html
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokjax
from tokjax import strategies
from tokjax.config import resolve
from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.errors import CheckpointError, ConfigError, DataError
from tokjax.generate import WHOLE
from tokjax.language_model import LanguageModel
from tokjax.models import ModelConfig, Transformer
from tokjax.models.huggingface import save as save_model
from tokjax.models.quantized import is_quantized
from tokjax.parallel.mesh import MeshConfig, build_mesh
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.run import build_run

TEXTS = ["Hello <b>world</b>", "\u65e5\u672c a\n\nb", "x"]


@pytest.fixture(scope="module")
def lm():
    tokenizer = ByteTokenizer()
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, d_model=32, n_layers=2, n_heads=4, max_positions=128
    )
    model = Transformer(config)
    return LanguageModel(model, model.init(jax.random.key(0)), tokenizer)


def same_params(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_importing_tokjax_is_instant_and_brings_no_jax():
    code = (
        "import sys, time; t = time.process_time(); import tokjax; t = time.process_time() - t\n"
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules)\n"
        "assert 'load' in dir(tokjax) and t < 0.05, t"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="laod"):
        tokjax.laod  # noqa: B018


def test_scores_are_those_of_the_logits(lm):
    scores = lm.score(TEXTS)
    assert scores.nll.shape == (3, scores.lengths.max())
    for b, text in enumerate(TEXTS):
        ids = lm.encode(text)
        n = len(ids)
        assert scores.tokens[b].tolist() == ids + [0] * (scores.tokens.shape[1] - n)
        logprobs = jax.nn.log_softmax(lm.logits([ids])[0])
        own = np.asarray(logprobs)[np.arange(n - 1), ids[1:]]
        np.testing.assert_allclose(scores.nll[b, 1:n], -own, atol=1e-5)
        np.testing.assert_allclose(scores.logprob[b, 1:n], own, atol=1e-5)
        entropy = -(jnp.exp(logprobs) * logprobs).sum(-1)
        np.testing.assert_allclose(scores.entropy[b, 1:n], entropy[:-1], atol=1e-5)
        rank = (logprobs[:-1] > own[:, None]).sum(-1)
        np.testing.assert_array_equal(scores.rank[b, 1:n], rank)
        best = logprobs[:-1].argmax(-1)
        np.testing.assert_array_equal(scores.stats.top_ids[b, 1:n, 0], best)
        assert scores.mean_nll[b] == pytest.approx(-own.mean(), abs=1e-5)
        assert scores.mask[b].tolist() == [0 < t < n for t in range(scores.nll.shape[1])]
        assert np.isnan(scores.nll[b, ~scores.mask[b]]).all()
        assert (scores.rank[b, ~scores.mask[b]] == -1).all()


def test_offsets_name_the_characters_of_each_token(lm):
    scores = lm.score(TEXTS)
    for b, text in enumerate(TEXTS):
        (first, *offsets), n = scores.offsets[b], scores.lengths[b]
        assert first == (0, 0)  # BOS
        assert len(offsets) == n - 1
        assert "".join(text[a:z] for a, z in dict.fromkeys(offsets)) == text


def test_batches_do_not_change_the_numbers(lm):
    texts = [TEXTS[0], "a", "", "a longer text than all others " * 2, TEXTS[1]]
    whole, parts = lm.score(texts), lm.score(texts, batch_size=2)
    np.testing.assert_array_equal(whole.tokens, parts.tokens)
    np.testing.assert_allclose(whole.nll, parts.nll, atol=1e-5)
    np.testing.assert_array_equal(whole.mask, parts.mask)
    assert whole.mask[2].sum() == 0 and np.isnan(whole.mean_nll[2])


def test_without_bos_the_first_token_has_no_prediction(lm):
    bare = LanguageModel(lm.model, lm.params, lm.tokenizer, add_bos=False)
    scores = bare.score(["ab", ""])
    assert scores.lengths.tolist() == [2, 0]
    assert scores.mask.tolist() == [[False, True], [False, False]]
    assert scores.offsets[0] == ((0, 1), (1, 2))
    with pytest.raises(ConfigError, match="prompt 0 has no tokens"):
        bare.generate([""])


def test_a_table_has_a_line_for_each_token(lm):
    table = lm.score(TEXTS).table()
    lines = lm.score(TEXTS).table(1).splitlines()
    ids = lm.encode(TEXTS[1])
    assert len(lines) == len(ids) + 2  # a heading and the mean
    assert "\\n" in lines[-2 - 2] and "perplexity" in lines[-1]
    assert table.count("likeliest") == 3


def test_a_heatmap_shows_the_text_and_runs_nothing(lm):
    page = lm.score(TEXTS).heatmap()
    assert "<b>" not in page and "<script" not in page and "http" not in page
    boxes = re.findall(r'<div class="box heat">(.*?)</div>', page, re.DOTALL)
    for text, box in zip(TEXTS, boxes, strict=True):
        box = re.sub(r'<span class="unscored special"[^>]*>.*?</span>', "", box, flags=re.DOTALL)
        assert html.unescape(re.sub(r"<[^>]*>", "", box)) == text
    # The three bytes of one character share a span and are told apart in its tooltip.
    (three,) = re.findall(r'<span[^>]*title="([^"]*)">\u65e5</span>', boxes[1])
    assert three.count("nll") == 3
    assert lm.score(TEXTS)._repr_html_() in page or "<style>" in lm.score(TEXTS)._repr_html_()


def test_a_heatmap_is_redder_where_a_token_surprises(lm):
    scores = lm.score([TEXTS[0]])
    shares = [float(a) for a in re.findall(r"rgba\(214, 69, 65, ([0-9.]+)\)", scores.heatmap())]
    np.testing.assert_allclose(shares, 0.085 * scores.nll[0, 1:], atol=1e-3)


def test_generated_numbers_are_those_of_scoring(lm):
    found = lm.generate(["ab", "a longer prompt"], max_new_tokens=12, temperature=1.0, seed=3)
    assert found.tokens.shape == found.logprobs.shape == found.entropies.shape
    for b, prompt in enumerate(["ab", "a longer prompt"]):
        n, before = found.lengths[b], lm.encode(prompt)
        row = found.tokens[b, :n].tolist()
        logprobs = jax.nn.log_softmax(lm.logits([before + row])[0])[len(before) - 1 : -1]
        own = np.asarray(logprobs)[np.arange(n), row]
        np.testing.assert_allclose(found.logprobs[b, :n], own, atol=1e-5)
        entropy = -(jnp.exp(logprobs) * logprobs).sum(-1)
        np.testing.assert_allclose(found.entropies[b, :n], entropy, atol=1e-5)
        assert found.texts[b] == lm.tokenizer.decode(row)


def test_settings_reach_the_sampler(lm):
    prompts, n = ["ab"] * 2, 12
    greedy = lm.generate(prompts, max_new_tokens=n)
    assert greedy.texts == lm.generate(prompts, max_new_tokens=n, temperature=5.0, top_k=1).texts
    drawn = lm.generate(prompts, max_new_tokens=n, temperature=2.0, seed=1)
    assert drawn.texts == lm.generate(prompts, max_new_tokens=n, temperature=2.0, seed=1).texts
    assert drawn.texts[0] != drawn.texts[1]  # each row draws for itself
    assert drawn.texts != lm.generate(prompts, max_new_tokens=n, temperature=2.0, seed=2).texts
    for off in ({"top_p": 1e-6}, {"min_p": 1.0}):
        limited = lm.generate(prompts, max_new_tokens=n, temperature=2.0, **off)
        assert limited.texts == greedy.texts
    never = lm.generate(prompts, max_new_tokens=n, repetition_penalty=1e9)
    assert len(set(never.tokens[0])) == n


def test_stops_are_ids_special_tokens_or_texts(lm):
    def generate(stop):
        return lm.generate(["ab"], max_new_tokens=64, temperature=1.0, seed=3, stop=stop)

    free = generate([])
    (tokens,), (text,) = free.tokens.tolist(), free.texts
    found = generate([tokens[5]])
    first = tokens.index(tokens[5]) + 1
    assert found.lengths.tolist() == [first] and found.stopped.all()
    # Two bytes of ASCII one behind the other: a random model writes few whole characters.
    at = next(i for i in range(8, 62) if max(tokens[i : i + 2]) < 128)
    wanted = bytes(tokens[at : at + 2])
    found = generate([wanted.decode(), "never written"])
    assert found.stopped.all()
    assert found.texts == [text.split(wanted.decode())[0]]
    assert found.lengths[0] == bytes(t for t in tokens if t < 256).index(wanted) + 2
    assert generate(["never written"]).texts == free.texts
    special = next(iter(lm.tokenizer.special_tokens))
    assert generate([special]).lengths[0] > 0
    with pytest.raises(ConfigError, match="stop='a' must be a list"):
        lm.generate(["ab"], stop="a")
    with pytest.raises(ConfigError, match="empty"):
        lm.generate(["ab"], stop=[""])


@pytest.mark.parametrize("given", ["a text", []])
def test_a_list_of_texts_is_wanted(lm, given):
    with pytest.raises(ConfigError, match="must be a list"):
        lm.score(given)
    with pytest.raises(ConfigError, match="must be a list"):
        lm.generate(given)


def test_what_does_not_fit_is_said_first(lm):
    with pytest.raises(ConfigError, match=r"text 1 has 151 tokens.*max_positions=128"):
        lm.score(["a", "a" * 150])
    with pytest.raises(DataError, match="Unicode"):
        lm.score(["\ud800"])


def test_a_chat_becomes_a_prompt(lm):
    with pytest.raises(ConfigError, match="chatml"):
        lm.chat([{"role": "user", "content": "hi"}])
    ids = lm.chat([{"role": "user", "content": "hi"}], template="chatml")
    assert lm.tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    found = lm.generate([ids, "hi"], max_new_tokens=4)
    assert found.lengths.max() <= 4 and len(found.texts) == 2


def test_a_model_on_a_mesh_gives_the_same_numbers(lm, tmp_path):
    lm.save(tmp_path / "saved")
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spread = tokjax.load(tmp_path / "saved", mesh=mesh)
    assert spread.params["layers"]["mlp"]["up"].sharding.mesh == mesh
    texts = [*TEXTS, "ab"]
    np.testing.assert_allclose(spread.score(texts).nll, lm.score(texts).nll, atol=1e-5)
    given = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    assert spread.generate(["ab", "c"], **given).texts == lm.generate(["ab", "c"], **given).texts


def test_saving_and_loading_give_the_same_model(lm, tmp_path):
    lm.save(tmp_path / "saved")
    again = tokjax.load(tmp_path / "saved")
    assert again.model.config.d_model == 32
    assert again.tokenizer.fingerprint == lm.tokenizer.fingerprint
    assert again.add_bos is True
    same_params(again.params, lm.params)
    bare = LanguageModel(lm.model, lm.params, lm.tokenizer, add_bos=False)
    bare.save(tmp_path / "saved", overwrite=True)
    assert tokjax.load(str(tmp_path / "saved")).add_bos is False
    assert tokjax.load(tmp_path / "saved", dtype="bfloat16").model.config.dtype == "bfloat16"
    assert "32" in repr(again) and "llama" in repr(again)


def write_tokenizer(folder, add_bos, template):
    """A tokenizer.json with a BOS token, which its settings or its template may put first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(["<s>", *alphabet])}, []))
    backend.add_special_tokens(["<s>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>"} | ({} if add_bos is None else {"add_bos_token": add_bos})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("add_bos", "template", "expected"),
    [(True, False, True), (False, True, False), (None, True, True), (None, False, False)],
)
def test_a_folder_says_whether_texts_begin_with_bos(lm, tmp_path, add_bos, template, expected):
    save_model(tmp_path / "model", lm.model, lm.params)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        tokjax.load(tmp_path / "model")
    write_tokenizer(tmp_path / "model", add_bos, template)
    found = tokjax.load(tmp_path / "model")
    assert found.add_bos is expected
    assert (found.encode("a")[0] == 0) is expected
    # And what is saved is read by transformers, with the same ids.
    transformers = pytest.importorskip("transformers")
    found.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "a <b> \u65e5"
    assert theirs.encode(text, add_special_tokens=False) == found.tokenizer.encode(text)
    assert theirs.bos_token == "<s>"


def test_an_encoder_is_no_language_model(tmp_path):
    from tokjax.models import Encoder

    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.BertConfig(vocab_size=300, num_attention_heads=2, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, None, False)
    with pytest.raises(ConfigError, match=r"kind Encoder.*tokjax\.models\.load"):
        tokjax.load(tmp_path)
    assert isinstance(tokjax.models.load(tmp_path)[0], Encoder)


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_runs_workdir_gives_its_newest_model(tiny_tree, tmp_path, ema):
    tree = tiny_tree(steps=4, evaluation__every_steps=4, ema_decay=ema)
    run = build_run(resolve(TrainConfig, tree), devices=jax.devices()[:1])
    state = train(run, tmp_path / "run").state
    before = sorted(p for p in (tmp_path / "run").rglob("*"))
    lm = tokjax.load(tmp_path / "run")
    assert sorted(p for p in (tmp_path / "run").rglob("*")) == before
    same_params(lm.params, state.params if ema is None else state.ema)
    assert lm.tokenizer.fingerprint == run.tokenizer.fingerprint
    assert lm.model.config.vocabulary == run.model.config.vocabulary
    assert lm.score(["7919 tokens"]).mean_nll.shape == (1,)
    narrow = tokjax.load(tmp_path / "run", dtype="bfloat16")
    assert narrow.params["embedding"].dtype == narrow.model.config.param_dtype == "bfloat16"


def test_a_workdir_without_a_checkpoint_says_so(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no configuration of a run"):
        tokjax.load(tmp_path)


@pytest.mark.real_data
def test_a_trained_model_in_a_file_tells_its_story(real_data, tmp_path):
    import gguf

    folder = real_data / "checkpoints/stories260k"
    golden = json.loads((real_data / "golden/stories260k.json").read_text())
    writer = gguf.GGUFWriter(tmp_path / "stories.gguf", "llama")
    write_stories(writer, (folder / "stories260K.bin").read_bytes())
    write_pieces(writer, (folder / "tok512.bin").read_bytes())
    for step in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{step}")()
    writer.close()
    lm = tokjax.load(tmp_path / "stories.gguf")
    assert lm.encode("")[0] == 1
    found = lm.generate([""], max_new_tokens=200)
    assert found.texts[0].strip() == golden["greedy_200_text"].strip()
    assert [1, *found.tokens[0].tolist()] == golden["greedy_ids_bos_plus_200"]
    for case in golden["cases"]:
        if "text" in case:
            assert lm.encode(case["text"]) == case["ids"]
            nll = lm.score([case["text"]]).nll[0, 1:]
            np.testing.assert_allclose(nll, case["nll"], atol=2e-5)


def write_stories(writer, data):
    """The weights lie in the data as in this format, rows that are turned together side by side."""
    D, F, L, H, K, V, positions = map(int, np.frombuffer(data, "<i4", 7))
    floats, at = np.frombuffer(data, "<f4", offset=28), 0

    def take(*shape):
        nonlocal at
        size = int(np.prod(shape))
        at += size
        return floats[at - size : at].reshape(shape)

    kv = D // H * K
    shapes = {
        "token_embd": (V, D),
        "attn_norm": (L, D),
        "attn_q": (L, D, D),
        "attn_k": (L, kv, D),
        "attn_v": (L, kv, D),
        "attn_output": (L, D, D),
        "ffn_norm": (L, D),
        "ffn_gate": (L, F, D),
        "ffn_down": (L, D, F),
        "ffn_up": (L, F, D),
        "output_norm": (D,),
    }
    for name, shape in shapes.items():
        array = take(*shape)
        if shape[0] == L:
            for i, layer in enumerate(array):
                writer.add_tensor(f"blk.{i}.{name}.weight", layer.copy())
        else:
            writer.add_tensor(f"{name}.weight", array.copy())
    writer.add_context_length(positions)
    writer.add_embedding_length(D)
    writer.add_block_count(L)
    writer.add_feed_forward_length(F)
    writer.add_head_count(H)
    writer.add_head_count_kv(K)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(D // H)


def write_pieces(writer, data):
    tokens, scores, at = [], [], 4
    while at < len(data):
        score, length = (
            np.frombuffer(data, "<f4", 1, at)[0],
            np.frombuffer(data, "<i4", 1, at + 4)[0],
        )
        tokens.append(data[at + 8 : at + 8 + length].decode().replace(" ", "\u2581"))
        scores.append(float(score))
        at += 8 + int(length)
    tokens[1:3] = ["<s>", "</s>"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


@pytest.mark.real_data
def test_smollm2_knows_the_capital_of_japan(real_data, tmp_path):
    try:
        lm = tokjax.load("smollm2-135m")
    except CheckpointError as error:
        pytest.skip(str(error).replace("\n", " "))
    assert not lm.add_bos
    prompts = [
        "The capital of Japan is",
        lm.chat([{"role": "user", "content": "Japan's capital?"}]),
    ]
    found = lm.generate(prompts, max_new_tokens=16)
    assert found.texts[0].startswith(" Tokyo")
    assert "Tokyo" in found.texts[1]
    scores = lm.score(["The capital of Japan is Tokyo", "The capital of Japan is Paris"])
    assert scores.nll[0, 5] < 1 < scores.nll[1, 5]
    case = json.loads((real_data / "golden/smollm2_135m_instruct_q4_1.json").read_text())["cases"][
        2
    ]
    np.testing.assert_allclose(lm.score([case["text"]]).nll[0, 1:], case["nll"], atol=1e-3)
    lm.save(tmp_path / "saved")
    again = tokjax.load(tmp_path / "saved")
    assert again.model == lm.model
    same_params(again.params, lm.params)
    assert again.chat([{"role": "user", "content": "Japan's capital?"}]) == prompts[1]


def test_strategies_by_name(lm):
    def generate(**settings):
        return lm.generate(["ab, c", "x"], max_new_tokens=6, **settings).tokens.tolist()

    plain = generate()
    assert generate(strategy="guided", weight=1.0) == plain
    assert generate(strategy="guided", weight=4.0, negative="zz") != plain
    assert generate(strategy="dola", layers=[0]) != plain
    off = {"concept_threshold": 2.0, "punctuation_threshold": 2.0, "alpha": 1.0}
    assert generate(strategy="layercake", **off) == plain
    blocked = {"concept_layers": (0, 1), "punctuation_layers": (0, 1), "alpha": 0.0}
    thresholds = {"concept_threshold": -1.0, "punctuation_threshold": -1.0, "plausibility": 0.0}
    assert generate(strategy="layercake", **blocked, **thresholds) != plain


def test_searches_by_name(lm):
    def generate(**settings):
        return lm.generate(["ab, c", "x"], max_new_tokens=6, **settings)

    plain = generate()
    assert generate(strategy="beam", beams=1).tokens.tolist() == plain.tokens.tolist()
    best = generate(strategy="beam", beams=4, length_penalty=0.0)
    assert (best.logprobs.sum(1) >= plain.logprobs.sum(1) - 1e-4).all()
    assert np.isnan(best.entropies).all()
    same = generate(strategy="contrastive_search", alpha=0.0)
    assert same.texts == plain.texts
    for options in ({}, {"layers": 1, "gamma": 2}):
        assert generate(strategy="speculative", **options).texts == plain.texts
    constrained = generate(strategy="beam", choices=["ab", "ba"])
    assert set(constrained.texts) <= {"ab", "ba"}
    assert tuple(strategies.SEARCHES) == WHOLE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "beam", "temperature": 0.7}, "draws nothing, so temperature=0.7"),
        ({"strategy": "beam", "beam": 2}, "'beam' has no option 'beam'.*'beams'"),
        ({"strategy": "doal"}, "unknown strategy='doal'.*'dola'"),
        ({"strategy": "dola", "layer": [0]}, "'dola' has no option 'layer'.*'layers'"),
        ({"weight": 2.0}, "'sample' has no option 'weight'"),
    ],
)
def test_strategies_that_do_not_exist_are_refused(lm, settings, message):
    with pytest.raises(ConfigError, match=message):
        lm.generate(["ab"], **settings)


def test_a_search_is_not_streamed(lm):
    with pytest.raises(ConfigError, match="'beam' writes no text piece by piece"):
        lm.stream("ab", strategy="beam")


def test_int8_weights_by_name(lm, tmp_path):
    lm.save(tmp_path / "saved")
    small = tokjax.load(tmp_path / "saved", dtype="int8")
    assert is_quantized(small.params)
    texts = ["ab, c", "xyz"]
    apart = small.score(texts).nll - lm.score(texts).nll
    assert 0 < np.nanmax(np.abs(apart)) < 0.1
    assert small.generate(["ab"], max_new_tokens=4).lengths.tolist() == [4]
    with pytest.raises(ConfigError, match="dequantize"):
        small.save(tmp_path / "again")


def test_streamed_text_is_the_generated_text(lm):
    settings = {"max_new_tokens": 40, "temperature": 1.5}
    for seed in range(3):
        expected = lm.generate(["ab"], seed=seed, **settings).texts[0]
        assert "".join(lm.stream("ab", seed=seed, **settings)) == expected
    prompts = ["ab", lm.encode("c"), "a longer prompt"]
    expected = lm.generate(prompts, stop=["e", "\ufffd"], **settings).texts
    found = ["", "", ""]
    for b, piece in lm.stream(prompts, stop=["e", "\ufffd"], **settings):
        assert piece
        found[b] += piece
    assert found == expected
    ids = "".join(lm.stream(lm.encode("ab"), **settings))
    assert ids == lm.generate(["ab"], **settings).texts[0]
    with pytest.raises(ConfigError, match="has no option 'temprature'"):
        lm.stream("ab", temprature=1.0)  # before anything is read


def test_leaving_a_stream_early_leaves_the_model_usable(lm):
    stream = lm.stream("ab", max_new_tokens=40, temperature=1.0, stop=[])
    next(stream)
    stream.close()
    assert lm.generate(["ab"], max_new_tokens=4).lengths[0] <= 4


def test_constraints_hold_by_name(lm):
    pytest.importorskip("outlines_core", reason="the extra 'constrained' is not installed")
    settings = {"max_new_tokens": 24, "temperature": 1.0}
    found = lm.generate(["a", "b"], regex="[0-9]{2}:[0-5]{2}", **settings).texts
    assert all(re.fullmatch("[0-9]{2}:[0-5]{2}", text) for text in found)
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    for given in (schema, json.dumps(schema)):
        for text in lm.generate(["a", "b"], json_schema=given, **settings).texts:
            assert isinstance(json.loads(text)["n"], int)
    assert set(lm.generate(["a", "b"], choices=["yes", "no"], **settings).texts) <= {"yes", "no"}
    each = lm.generate(["a", "b", "c"], choices=[["x"], None, ["y", "yy"]], **settings).texts
    assert each[0] == "x" and each[2] in ("y", "yy") and each[1] not in ("x", "y", "yy")
    pieces = "".join(lm.stream("a", regex="\u00e9{3}", **settings))
    assert pieces == "\u00e9\u00e9\u00e9"
    guided = lm.generate(["a"], regex="[a-c]{5}", strategy="guided", weight=2.0, **settings)
    assert re.fullmatch("[a-c]{5}", guided.texts[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regex": "a", "choices": ["a"]}, "regex or choices, one of them"),
        ({"regex": ["a", "b"]}, "2 constraints for 1 prompts"),
        ({"regex": "a{50}", "max_new_tokens": 49}, "has 50 tokens: raise max_new_tokens=49"),
        ({"json_schema": "{"}, "no valid JSON"),
        ({"choices": []}, "choices"),
    ],
)
def test_constraints_that_cannot_be_meant_are_refused(lm, settings, message):
    pytest.importorskip("outlines_core", reason="the extra 'constrained' is not installed")
    with pytest.raises(ConfigError, match=message):
        lm.generate(["ab"], **settings)


def test_the_ids_that_end_a_text_travel_with_the_model(lm, tmp_path):
    lm.save(tmp_path / "one")
    generation = json.loads((tmp_path / "one/generation_config.json").read_text())
    assert generation["eos_token_id"] == lm.tokenizer.eos_id
    assert tokjax.load(tmp_path / "one").stop_ids == ()

    first = int(lm.generate(["ab"], max_new_tokens=1, stop=[]).tokens[0, 0])
    more = LanguageModel(lm.model, lm.params, lm.tokenizer, stop_ids=(first,))
    assert more.eos_ids == [lm.tokenizer.eos_id, first]
    more.save(tmp_path / "two")
    again = tokjax.load(tmp_path / "two")
    assert again.stop_ids == (first,) and again.eos_ids == more.eos_ids
    found = again.generate(["ab"], max_new_tokens=8)
    assert found.lengths.tolist() == [1] and found.stopped.all()
    # Where there is no generation_config.json, config.json says it; what the model has not is left.
    (tmp_path / "two/generation_config.json").unlink()
    config = json.loads((tmp_path / "two/config.json").read_text())
    config["eos_token_id"] = [first, 10**6, lm.tokenizer.eos_id]
    (tmp_path / "two/config.json").write_text(json.dumps(config))
    assert tokjax.load(tmp_path / "two").stop_ids == (first,)
