import gzip
import json
import multiprocessing
import subprocess
import sys

import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tokjax.data.bpe import cached_bpe
from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.data.cache import cache_directory
from tokjax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from tokjax.data.tokenizers import Tokenizer, TokenizerConfig, build_tokenizer, sequence_ends
from tokjax.errors import ConfigError, DataError, StorageError

TEXT = (
    "The quick brown fox, 12345 times; it jumps\n    over the lazy dog's café.\n"
    "Seven wizards brew strange potions while nobody watches; return self.value\n"
) * 40
LETTERS = "".join(map(chr, range(32, 127)))
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MARK = "\u2581"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bpe(corpus, tmp_path_factory):
    config = TokenizerConfig(name="bpe", vocab_size=320, corpus=str(corpus))
    return build_tokenizer(config, tmp_path_factory.mktemp("cache"))


def train_sentencepiece(folder, **options):
    source = folder / "sp.txt"
    source.write_text(TEXT, encoding="utf-8")
    settings = {
        "vocab_size": 320,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 1.0,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(source), model_prefix=str(folder / "sp"), **(settings | options)
    )
    return folder / "sp.model"


@pytest.fixture(scope="module")
def sp_model(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("sp"))


@pytest.fixture(scope="module")
def sp(sp_model):
    config = TokenizerConfig(name="sentencepiece", path=str(sp_model))
    return build_tokenizer(config, sp_model.parent)


def write_llama_like(folder, normalizer=None, pre_tokenizer=None):
    """A tokenizer.json as Llama's: BPE over characters, bytes for what it does not know."""
    words = ["<unk>", "<s>", "</s>", *BYTES, MARK, *LETTERS, MARK + "a", "th", "the", MARK + "the"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(words))}
    merges = [(MARK, "a"), ("t", "h"), ("th", "e"), (MARK, "the")]
    backend = Backend(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<s>", "</s>")])
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def llama_normalizer():
    return normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = write_llama_like(tmp_path_factory.mktemp("llama"), llama_normalizer())
    return build_tokenizer(TokenizerConfig(name="huggingface", path=str(folder)), folder)


@pytest.fixture(scope="module")
def every(bpe, sp, llama):
    return [ByteTokenizer(), bpe, sp, llama]


HARD = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(
            [
                *(" ", "  ", "\n", "\r\n", "\t", "\0", "a", "é", "e\u0301", MARK, "日本", "<s>"),
                *("<|endoftext|>", "<0x0A>", "\U0001f468\u200d\U0001f469", "\u0120", "the"),
                *("<unk>", "</s>"),
            ]
        ),
        max_size=12,
    ).map("".join),
)


def check_offsets(tokenizer, text):
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    assert len(offsets) == len(ids)
    position = 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        assert 0 <= start <= end <= len(text)
        assert position - 1 <= start <= position or start == end  # one shared character at most
        if start < position and start < end:
            assert len(text[start].encode()) > 1
        # The token's bytes lie in its characters, but for the space SentencePiece puts first.
        within = b" " + text[start:end].encode()
        assert tokenizer.token_bytes(token) in within
        position = max(position, end)
    assert position == len(text)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(" ")
@example("\0 \r\n ")
@example("<|endoftext|></s>")
@example(f"{MARK} {MARK}{MARK}a")
@given(text=HARD)
def test_any_text_round_trips_with_offsets_that_cover_it(every, text):
    for tokenizer in every:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.special_tokens.values())
        check_offsets(tokenizer, text)


def test_every_tokenizer_knows_that_it_is_lossless(every):
    assert [(t.lossless, t.lossy_reason) for t in every] == [(True, "")] * 4


def test_batches_give_what_single_texts_give(every):
    texts = ["", "the quick", " a  b", f"x{MARK}y", "日本 </s>"]
    for tokenizer in every:
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
        assert tokenizer.encode_batch([]) == []


def test_a_character_of_several_tokens_gives_each_its_range(every):
    for tokenizer in every:
        ids, offsets = tokenizer.encode_with_offsets("a日b")
        ranges = [r for i, r in zip(ids, offsets, strict=True) if r == (1, 2)]
        assert len(ranges) == 3, tokenizer.title


def test_byte_ids_are_the_bytes_and_256_is_special():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("Aé\0") == [65, 195, 169, 0]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (256, 256, 256)
    assert tokenizer.vocab_size == 257
    assert tokenizer.token_bytes(256) == b""
    assert tokenizer.token_text(256) == "<|endoftext|>"
    assert tokenizer.token_text(0xC3) == "\\xc3"
    assert tokenizer.decode([256, 72, 105, 256]) == "Hi"


def test_ids_outside_the_vocabulary_are_named(every):
    for tokenizer in every:
        for bad in (-1, tokenizer.vocab_size):
            with pytest.raises(DataError, match=f"token id {bad} is not in the vocabulary"):
                tokenizer.decode([0, bad])


def test_lone_surrogates_are_refused_by_place(every):
    for tokenizer in every:
        with pytest.raises(DataError, match=r"character 2 is the lone surrogate U\+D800"):
            tokenizer.encode("ab\ud800")


def test_bpe_has_the_asked_vocabulary_and_one_special_token(bpe):
    assert bpe.vocab_size == 320
    assert bpe.special_tokens == {"<|endoftext|>": bpe.eos_id}
    assert bpe.bos_id == bpe.eos_id == bpe.pad_id
    assert len(bpe.encode(TEXT)) < len(TEXT) / 1.5
    assert sorted(b for i in range(320) if len(b := bpe.token_bytes(i)) == 1) == [
        bytes([byte]) for byte in range(256)
    ]


def test_bpe_is_cached_and_a_damaged_cache_is_trained_anew(corpus, tmp_path):
    first = cached_bpe(str(corpus), 300, tmp_path)
    (file,) = (p for p in (tmp_path / "tokenizers").iterdir() if p.suffix == ".json")
    stamp = file.stat().st_mtime_ns
    assert cached_bpe(str(corpus), 300, tmp_path).fingerprint == first.fingerprint
    assert file.stat().st_mtime_ns == stamp
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert cached_bpe(str(corpus), 300, tmp_path).fingerprint == first.fingerprint
    assert file.read_bytes() != bytes(data)


def test_bpe_trained_on_other_text_is_another(corpus, tmp_path):
    first = cached_bpe(str(corpus), 300, tmp_path)
    other = tmp_path / "b.txt"
    other.write_text("zebra zebra zero zoo " * 99 + TEXT[::-1])
    assert cached_bpe(str(other), 300, tmp_path).fingerprint != first.fingerprint
    assert cached_bpe(str(corpus), 301, tmp_path).fingerprint != first.fingerprint


def _train(corpus, cache):
    sys.exit(0 if cached_bpe(corpus, 310, cache).vocab_size == 310 else 1)


def test_two_processes_may_train_the_same_bpe_at_once(corpus, tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_train, args=(str(corpus), tmp_path)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    left = [p.name for p in (tmp_path / "tokenizers").iterdir() if not p.name.endswith(".lock")]
    assert len(left) == 1


def test_bpe_of_too_little_text_says_how_many_tokens_there_are(tmp_path):
    (tmp_path / "a.txt").write_text("abc abc")
    with pytest.raises(
        ConfigError, match=r"vocab_size=400 is more than the corpus has.* only 2\d\d"
    ):
        cached_bpe(str(tmp_path / "a.txt"), 400, tmp_path)


def test_unwritable_cache_is_a_storage_error_with_its_path(corpus, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StorageError, match="file"):
        cached_bpe(str(corpus), 300, blocked)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "byts"}, "Did you mean 'bytes'"),
        ({"vocab_size": 259}, "vocab_size=259 is impossible.*choose 260"),
        ({"name": "huggingface"}, "needs tokenizer.path"),
        ({"name": "sentencepiece"}, "needs tokenizer.path: the .model file"),
        ({"name": "bytes", "path": "x"}, "tokenizer.path='x' has no meaning"),
        ({"eos": "</s>"}, "tokenizer.eos='</s>' has no meaning"),
        ({"corpus": "/no/such"}, "'/no/such' does not exist"),
        ({"name": "sentencepiece", "path": "/no/such.model"}, "/no/such.model.*No such file"),
        ({"name": "huggingface", "path": "org/model"}, "no file org.*must be downloaded first"),
    ],
)
def test_impossible_configurations_are_explained(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        build_tokenizer(TokenizerConfig(**settings), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds a JSON list"),
        ("{}", "no section 'model'"),
        ('{"model": {"type": "None"}}', "no usable tokenizer.json"),
        ('{"model": {}, "added_tokens": [3]}', "malformed entry in added_tokens"),
    ],
)
def test_corrupt_tokenizer_json_is_a_config_error(content, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        build_tokenizer(TokenizerConfig(name="huggingface", path=str(tmp_path)), tmp_path)


def test_corrupt_sentencepiece_model_is_a_config_error(tmp_path):
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match=r"x\.model cannot be read"):
        build_tokenizer(
            TokenizerConfig(name="sentencepiece", path=str(tmp_path / "x.model")), tmp_path
        )
    with pytest.raises(ConfigError, match=r"is a folder; name the file\. It holds x\.model"):
        build_tokenizer(TokenizerConfig(name="sentencepiece", path=str(tmp_path)), tmp_path)
    with pytest.raises(ConfigError, match=r"For x\.model use tokenizer\.name='sentencepiece'"):
        build_tokenizer(TokenizerConfig(name="huggingface", path=str(tmp_path)), tmp_path)


def test_sequence_ends_follow_the_configuration(llama, tmp_path):
    folder = write_llama_like(tmp_path / "t", llama_normalizer())
    config = TokenizerConfig(name="huggingface", path=str(folder))
    assert sequence_ends(config, llama) == ([1], [2])
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r"names no end token.*'</s>'"):
        build_tokenizer(config, tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer.eos='</S>'.*Did you mean '</s>'"):
        build_tokenizer(TokenizerConfig(name="huggingface", path=str(folder), eos="</S>"), tmp_path)
    named = TokenizerConfig(name="huggingface", path=str(folder), eos="</s>", add_bos=False)
    assert sequence_ends(named, build_tokenizer(named, tmp_path)) == ([], [2])


def test_huggingface_reads_special_tokens_and_template_beside_it(llama, tmp_path):
    assert (llama.bos_id, llama.eos_id, llama.pad_id) == (1, 2, 2)
    assert llama.chat_template == "{{ messages }}"
    folder = write_llama_like(tmp_path / "t", llama_normalizer())
    (folder / "tokenizer_config.json").unlink()
    names = {"eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}")
    file = TokenizerConfig(name="huggingface", path=str(folder / "tokenizer.json"))
    tokenizer = build_tokenizer(file, tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 2, 0)
    assert tokenizer.chat_template == "{{ bos_token }}"


def test_saved_tokenizers_load_and_give_the_same_ids(every, tmp_path):
    text = f" the quick {MARK}日本\n</s>"
    for k, tokenizer in enumerate(every):
        tokenizer.save(tmp_path / str(k))
        loaded = Tokenizer.load(tmp_path / str(k))
        assert type(loaded) is type(tokenizer)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode_with_offsets(text) == tokenizer.encode_with_offsets(text)
        assert loaded.special_tokens == tokenizer.special_tokens
        assert loaded.chat_template == tokenizer.chat_template
        ids = (loaded.bos_id, loaded.eos_id, loaded.pad_id)
        assert ids == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)


def test_damaged_saved_tokenizers_are_noticed(bpe, sp, tmp_path):
    with pytest.raises(DataError, match="no saved tokenizer"):
        Tokenizer.load(tmp_path)
    bpe.save(tmp_path / "bpe")
    file = tmp_path / "bpe" / "tokenizer.json"
    spec = json.loads(file.read_text())
    one, two = (t for t, i in spec["model"]["vocab"].items() if i in (300, 301))
    spec["model"]["vocab"].update({one: 301, two: 300})
    file.write_text(json.dumps(spec))
    with pytest.raises(DataError, match="damaged"):
        Tokenizer.load(tmp_path / "bpe")
    sp.save(tmp_path / "sp")
    file = tmp_path / "sp" / "tokenizer.model"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match="damaged"):
        Tokenizer.load(tmp_path / "sp")


def test_fingerprints_tell_tokenizers_apart(every):
    assert len({t.fingerprint for t in every}) == 4
    assert all(len(t.fingerprint) == 64 for t in every)


def test_normalising_tokenizer_is_found_lossy_and_refuses_what_it_would_change(tmp_path):
    folder = write_llama_like(
        tmp_path / "t", normalizers.Sequence([normalizers.NFC(), llama_normalizer()])
    )
    strict = build_tokenizer(TokenizerConfig(name="huggingface", path=str(folder)), tmp_path)
    assert not strict.lossless
    assert "e\u0301" in strict.lossy_reason
    assert strict.decode(strict.encode("café")) == "café"
    with pytest.raises(DataError, match="cannot hold this text exactly: at character 3"):
        strict.encode("cafe\u0301 x")
    lax_config = TokenizerConfig(name="huggingface", path=str(folder), allow_lossy=True)
    lax = build_tokenizer(lax_config, tmp_path)
    ids, offsets = lax.encode_with_offsets("cafe\u0301 x")
    assert lax.decode(ids) == "café x"
    assert len(ids) == len(offsets)
    assert offsets == sorted(offsets)
    assert offsets[-1] == (6, 7)
    assert lax.fingerprint == strict.fingerprint


def test_sentencepiece_without_byte_fallback_refuses_unknown_characters(tmp_path):
    model = train_sentencepiece(
        tmp_path, byte_fallback=False, vocab_size=80, normalization_rule_name="nmt_nfkc"
    )
    tokenizer = build_tokenizer(TokenizerConfig(name="sentencepiece", path=str(model)), tmp_path)
    assert not tokenizer.lossless
    assert tokenizer.decode(tokenizer.encode("the quick")) == "the quick"
    for text in ("日本", "ﬁ", f"{MARK}a"):
        with pytest.raises(DataError, match="cannot hold this text exactly"):
            tokenizer.encode(text)


def test_word_level_model_never_gives_its_special_tokens_for_text(tmp_path):
    words = {"[UNK]": 0, "</s>": 1, "a": 2, "b": 3, "<": 4, "/s>": 5}
    backend = Backend(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["</s>", "[UNK]"])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = TokenizerConfig(name="huggingface", path=str(tmp_path), eos="</s>", allow_lossy=True)
    tokenizer = build_tokenizer(config, tmp_path)
    assert not tokenizer.lossless
    assert tokenizer.encode("a b") == [2, 3]
    assert tokenizer.encode("a </s> b") == [2, 4, 5, 3]


def test_unigram_model_never_gives_its_special_tokens_for_text(tmp_path):
    pieces = [("<unk>", 0.0), ("</s>", 0.0), (MARK, -2.0), (MARK + "a", -1.0)]
    pieces += [(letter, -5.0) for letter in "abs<>/"]
    backend = Backend(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = TokenizerConfig(name="huggingface", path=str(tmp_path), eos="</s>")
    tokenizer = build_tokenizer(config, tmp_path)
    assert not tokenizer.lossless
    ids = tokenizer.encode("a </s> b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "a </s> b"
    assert tokenizer.token_bytes(3) == b" a"
    assert tokenizer.encode_with_offsets("a b")[1] == [(0, 1), (1, 2), (2, 3)]
    with pytest.raises(DataError, match="cannot hold this text exactly: at character 1"):
        tokenizer.encode("aé")


def test_one_character_special_token_that_a_model_holds_is_refused_not_read(tmp_path):
    backend = Backend(models.WordLevel({"?": 0, "$": 1, "a": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["$"])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = TokenizerConfig(name="huggingface", path=str(tmp_path), eos="$", allow_lossy=True)
    tokenizer = build_tokenizer(config, tmp_path)
    assert "'$'" in tokenizer.lossy_reason
    with pytest.raises(DataError, match=r"cannot read '\$' in a text as plain text"):
        tokenizer.encode("a $ a")


def test_sentencepiece_ids_are_those_of_the_library(sp, sp_model):
    library = sentencepiece.SentencePieceProcessor(model_file=str(sp_model))
    for text in ("the quick", " the", "\n", "日本", "it's  12", "<s>", ""):
        assert sp.encode(text) == library.encode(text)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_prefix_is_taken_away_again(tmp_path, scheme):
    folder = write_llama_like(
        tmp_path / "t",
        pre_tokenizer=pre_tokenizers.Metaspace(
            replacement=MARK, prepend_scheme=scheme, split=False
        ),
    )
    tokenizer = build_tokenizer(TokenizerConfig(name="huggingface", path=str(folder)), tmp_path)
    for text in ("the a", "a", "x  y ", f"a{MARK}a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        check_offsets(tokenizer, text)
    # Metaspace puts no space before a text that begins with one: the two cannot be told apart.
    assert tokenizer.lossless == (scheme == "never")
    if scheme != "never":
        with pytest.raises(DataError, match="cannot hold this text exactly: at character 0"):
            tokenizer.encode(" a")


def test_special_tokens_may_take_the_blanks_beside_them(tmp_path):
    folder = write_llama_like(tmp_path / "t", llama_normalizer())
    file = folder / "tokenizer.json"
    spec = json.loads(file.read_text())
    for token in spec["added_tokens"]:
        token["rstrip"] = True
    file.write_text(json.dumps(spec))
    tokenizer = build_tokenizer(TokenizerConfig(name="huggingface", path=str(folder)), tmp_path)
    text = "a</s>  a"
    ids, offsets = tokenizer.encode_parts(text, tokenizer.find_specials(text))
    expected = Backend.from_file(str(file)).encode(text, add_special_tokens=False)
    assert ids == expected.ids
    assert offsets == [(0, 1), (1, 5), (7, 8)]


def test_tokenizing_imports_no_tensorflow(corpus, tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from tokjax.data.tokenizers import TokenizerConfig, build_tokenizer\n"
        f"config = TokenizerConfig(corpus={str(corpus)!r}, vocab_size=300)\n"
        f"build_tokenizer(config, Path({str(tmp_path)!r})).encode('x')\n"
        "sys.exit('tensorflow' in sys.modules or 'jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_cache_directory_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKJAX_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("TOKJAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "tokjax"


@pytest.fixture(scope="module")
def golden(real_data):
    return json.loads((real_data / "tokenizers" / "golden_token_ids.json").read_text())


def test_mistral_sentencepiece_gives_the_golden_ids(golden, real_data, tmp_path):
    path = real_data / "tokenizers" / "mistral_v1_sentencepiece.model"
    tokenizer = build_tokenizer(TokenizerConfig(name="sentencepiece", path=str(path)), tmp_path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer.lossless, tokenizer.vocab_size) == (True, 32000)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert len(golden) >= 30
    for case in golden:
        assert tokenizer.encode(case["text"]) == case["mistral_v1_sentencepiece"]
        assert tokenizer.decode(tokenizer.encode(case["text"])) == case["text"]
        check_offsets(tokenizer, case["text"])


def test_pythia_gives_the_golden_ids_but_for_spelled_special_tokens(golden, real_data, tmp_path):
    with gzip.open(real_data / "tokenizers" / "pythia_20B_tokenizer.json.gz") as file:
        (tmp_path / "tokenizer.json").write_bytes(file.read())
    config = TokenizerConfig(
        name="huggingface", path=str(tmp_path), eos="<|endoftext|>", allow_lossy=True
    )
    tokenizer = build_tokenizer(config, tmp_path)
    assert tokenizer.lossy_reason == "'e\u0301' comes back as 'é'"  # it normalises to NFC
    plain = [case for case in golden if "<|endoftext|>" not in case["text"]]
    assert len(plain) == len(golden) - 1
    for case in plain:
        assert tokenizer.encode(case["text"]) == case["pythia_20B"]
    (spelled,) = (case for case in golden if "<|endoftext|>" in case["text"])
    assert spelled["pythia_20B"][0] == tokenizer.eos_id
    assert tokenizer.eos_id not in tokenizer.encode(spelled["text"])
    ids, _ = tokenizer.encode_parts(spelled["text"], tokenizer.find_specials(spelled["text"]))
    assert ids == spelled["pythia_20B"]
