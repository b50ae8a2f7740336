"""Tokenizers from GGUF files, against the libraries whose vocabularies they hold."""

import json
import subprocess
import sys

import gguf
import pytest
import sentencepiece
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from tokjax.data.chat import chat_template, encode_rendered
from tokjax.data.gguf_tokenizer import adds_bos, read_gguf_tokenizer
from tokjax.data.tokenizers import Tokenizer, TokenizerConfig, build_tokenizer
from tokjax.errors import CheckpointError, ConfigError, DataError
from tokjax.gguf_file import read_gguf

TEXT = [
    "The quick brown fox, 12345 times; it jumps\n    over the lazy dog's café.\n",
    "Seven wizards brew strange potions while nobody watches; return self.value\n",
    "I'll don't WE'VE they'RE 007 3.14 x_1 <html> [a] 日本語 \t\r\n\n",
] * 20
HARD = [
    *("", " ", "  ", "a", " a", "a  b", "don't DON'T", "12345 6", "\r\n\r\n x", "\n\n\n", "\t a"),
    *("<html>  </html>", "日本", "é e\u0301", "\u00a0 \u3000", "x=+1.5$ ^~|", "\U0001f469\u200d"),
    *("The quick brown foxes jumped 99 times.", "<s>", "<|im_end|>", "\u2581", "a\u2581 b"),
    *(" !?(hello)", "self.values[0]  # note", "0x1F 1,000,000"),
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def bytes_of(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


# As the models' own tokenizer.json have it.
CUTS = {
    "gpt-2": bytes_of(True),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), bytes_of(True)]),
    "qwen2": pre_tokenizers.Sequence([split(QWEN2), bytes_of(False)]),
    "llama-bpe": pre_tokenizers.Sequence(
        [split(QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), bytes_of(False)]
    ),
}


def write(path, **values):
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        name = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def trained(name):
    """A byte-level BPE that was learned with a model's own way of cutting words."""
    backend = Backend(models.BPE(ignore_merges=name == "llama-bpe"))
    backend.pre_tokenizer = CUTS[name]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend


def byte_level_values(name, backend):
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "model": "gpt2",
        "pre": name,
        "tokens": tokens,
        "token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 0,
        "chat_template": CHATML,
    }


@pytest.fixture(scope="module")
def values():
    return byte_level_values("smollm", trained("smollm"))


@pytest.mark.parametrize("name", CUTS)
def test_byte_level_ids_are_those_of_the_models_own_tokenizer(name, tmp_path):
    backend = trained(name)
    tokenizer = read_gguf_tokenizer(write(tmp_path / "t.gguf", **byte_level_values(name, backend)))
    assert tokenizer.lossless, tokenizer.lossy_reason
    backend.encode_special_tokens = True
    for text in [*HARD, *TEXT[:3]]:
        assert tokenizer.encode(text) == backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)


def test_without_a_name_words_are_cut_by_four_rules_in_turn(values, tmp_path):
    named = {k: v for k, v in values.items() if k != "pre"}
    tokenizer = read_gguf_tokenizer(write(tmp_path / "t.gguf", **named))
    cut = tokenizer._backend.pre_tokenizer.pre_tokenize_str
    words = [word.replace("\u0120", " ") for word, _ in cut("a 12345+6<b> it's")]
    assert words == ["a", " ", "123", "45", "+", "6", "<", "b", ">", " it", "'", "s"]


def test_special_tokens_are_text_in_a_text_and_tokens_in_a_chat(values, tmp_path):
    path = write(tmp_path / "t.gguf", **values)
    tokenizer = read_gguf_tokenizer(path)
    assert dict(tokenizer.special_tokens) == {text: i for i, text in enumerate(SPECIAL)}
    text = "a<|im_end|>"
    assert 2 not in tokenizer.encode(text)
    assert tokenizer.encode_parts(text, tokenizer.find_specials(text))[0][-1] == 2
    rendered = chat_template(tokenizer).render([{"role": "user", "content": text}])
    ids, _ = encode_rendered(tokenizer, rendered)
    assert [i for i in ids if i < 3] == [1, 2]
    assert tokenizer.decode(ids) == "user\na<|im_end|>\n"


def test_it_is_a_tokenizer_of_configurations_and_survives_saving(values, tmp_path):
    path = write(tmp_path / "t.gguf", **values)
    config = TokenizerConfig(name="gguf", path=str(path), eos="<|endoftext|>")
    tokenizer = build_tokenizer(config, tmp_path)
    assert tokenizer.eos_id == 0
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.chat_template == CHATML
    with pytest.raises(ConfigError, match=r"tokenizer\.path: the \.gguf file"):
        TokenizerConfig(name="gguf")
    with pytest.raises(CheckpointError, match="No such file"):
        build_tokenizer(TokenizerConfig(name="gguf", path=str(tmp_path / "no.gguf")), tmp_path)


def test_reading_one_imports_neither_jax_nor_tensorflow(values, tmp_path):
    path = write(tmp_path / "t.gguf", **values)
    code = (
        "import sys; from pathlib import Path\n"
        "from tokjax.data.tokenizers import TokenizerConfig, build_tokenizer\n"
        f"config = TokenizerConfig(name='gguf', path={str(path)!r})\n"
        "build_tokenizer(config, Path('.')).encode('x')\n"
        "sys.exit('tensorflow' in sys.modules or 'jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def train_sentencepiece(folder, **options):
    source = folder / "text.txt"
    source.write_text("".join(TEXT), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(source),
        model_prefix=str(folder / "sp"),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "sp.model"))


def sentencepiece_values(processor, add_space_prefix):
    ids = range(processor.get_piece_size())
    types = [2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 1 for i in ids]
    types = [6 if processor.is_byte(i) else kind for i, kind in zip(ids, types, strict=True)]
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [processor.id_to_piece(i) for i in ids],
        "scores": [float(processor.get_score(i)) for i in ids],
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_space_prefix": add_space_prefix,
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_from_scores_are_those_of_sentencepiece(prefix, tmp_path):
    processor = train_sentencepiece(tmp_path, add_dummy_prefix=prefix)
    values = sentencepiece_values(processor, prefix)
    tokenizer = read_gguf_tokenizer(write(tmp_path / "t.gguf", **values))
    assert tokenizer.lossless, tokenizer.lossy_reason
    for text in [*HARD, *TEXT[:3]]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        # That mark is a space to SentencePiece, and alone stays what it is here.
        if "\u2581" not in text:
            assert ids == processor.encode(text), text
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert len(ids) == len(offsets)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_user_defined_tokens_are_found_wherever_they_are(tmp_path):
    processor = train_sentencepiece(tmp_path, add_dummy_prefix=False)
    values = sentencepiece_values(processor, False)
    for token in ("\n\n", "  ", "<table>"):
        values["tokens"].append(token)
        values["scores"].append(-1000.0)
        values["token_type"].append(4)
    tokenizer = read_gguf_tokenizer(write(tmp_path / "t.gguf", **values))
    n = len(values["tokens"])
    ids = tokenizer.encode("a  b\n\n<table><table")
    assert [ids.count(n - k) for k in (3, 2, 1)] == [1, 1, 1]
    assert tokenizer.decode(ids) == "a  b\n\n<table><table"
    assert "<table>" not in tokenizer.special_tokens
    assert tokenizer.lossless, tokenizer.lossy_reason


def test_bos_is_added_where_the_file_or_the_kind_says_so(values, tmp_path):
    def says(**changes):
        return adds_bos(read_gguf(write(tmp_path / "t.gguf", **values | changes)))

    assert not says()
    assert says(add_bos_token=True)
    assert says(pre="llama-bpe")
    assert says(model="llama")
    assert not says(model="llama", add_bos_token=False)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "rwkv"}, ConfigError, r"t\.gguf.*'rwkv'.*'gpt2', 'llama'"),
        ({"pre": "qwen3"}, ConfigError, "'qwen3'.*Did you mean 'qwen2'"),
        ({"model": None}, ConfigError, r"no metadata key 'tokenizer\.ggml\.model'"),
        ({"merges": ["a b", "zq q"]}, CheckpointError, "lacks 'ab'|lacks 'zqq'"),
        ({"token_type": [1, 2]}, CheckpointError, "damaged: .* 2 kinds"),
        ({"eos_token_id": 5000}, CheckpointError, "eos token 5000"),
        ({"model": "llama", "scores": [0.5]}, CheckpointError, "1 scores"),
    ],
)
def test_what_cannot_be_read_is_named(changes, error, message, values, tmp_path):
    given = {k: v for k, v in (values | changes).items() if v is not None}
    with pytest.raises(error, match=message):
        read_gguf_tokenizer(write(tmp_path / "t.gguf", **given))


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("smollm2-135m", "smollm2_135m_instruct_q4_1"),
        ("gemma3-270m", "gemma3_270m_q4_k_m"),
    ],
)
def test_ids_of_pretrained_models_are_the_published_ones(name, golden, real_data):
    from tokjax.models.known import known_file

    try:
        path = known_file(name)
    except CheckpointError as error:
        pytest.skip(str(error).replace("\n", " "))
    tokenizer = read_gguf_tokenizer(path)
    before = [tokenizer.bos_id] if adds_bos(read_gguf(path)) else []
    for case in json.loads((real_data / f"golden/{golden}.json").read_text())["cases"]:
        text = case["text"]
        ids, _ = tokenizer.encode_parts(text, tokenizer.find_specials(text))
        assert [*before, *ids] == case["ids"]
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.real_data
def test_a_vocabulary_without_some_bytes_refuses_texts_that_have_them(real_data):
    from tokjax.models.known import known_file

    try:
        tokenizer = read_gguf_tokenizer(known_file("smollm2-135m"))
    except CheckpointError as error:
        pytest.skip(str(error).replace("\n", " "))
    assert not tokenizer.lossless
    with pytest.raises(DataError, match="cannot hold this text"):
        tokenizer.encode("a\x04b")
