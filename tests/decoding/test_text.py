import jax
import numpy as np
import pytest

from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.decoding import Prompts, decode, on_tokens
from tokjax.decoding.text import encode_prompts, generate_text
from tokjax.errors import ConfigError, DataError
from tokjax.models import ModelConfig, Transformer

MODEL = Transformer(
    ModelConfig(257, d_model=32, n_layers=1, max_positions=64, tie_embeddings=False)
)
TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def params():
    params = MODEL.init(jax.random.key(2))
    # Sharper than a fresh model, so that the likeliest token leads by a margin.
    return {**params, "embedding": 50 * params["embedding"], "head": 3 * params["head"]}


def test_a_continuation_is_the_decoded_new_tokens(params):
    prompts = ["a cat", "<|endoftext|>é"]
    texts = generate_text(MODEL, params, TOKENIZER, prompts, max_new_tokens=12, temperature=0)
    ids = [[256, *text.encode()] for text in prompts]  # special-token text is plain text
    expected = decode(
        MODEL, params, Prompts.of(ids), max_new_tokens=12, stop=on_tokens([256])
    ).rows()
    assert texts == [
        bytes(i for i in row if i < 256).decode("utf-8", "replace") for row in expected
    ]
    assert all(texts)


def test_bos_is_added_only_when_asked_for():
    with_bos = encode_prompts(MODEL, TOKENIZER, ["ab", ""], max_new_tokens=4)
    assert with_bos.lengths.tolist() == [3, 1]
    assert with_bos.tokens[0, :3].tolist() == [256, 97, 98]
    without = encode_prompts(MODEL, TOKENIZER, ["ab"], max_new_tokens=4, add_bos=False)
    assert without.tokens[0, : without.lengths[0]].tolist() == [97, 98]


def test_texts_depend_on_the_seed_alone(params):
    def sample(seed):
        return generate_text(
            MODEL,
            params,
            TOKENIZER,
            ["x", "x"],
            max_new_tokens=12,
            temperature=1.1,
            top_k=50,
            top_p=0.95,
            min_p=0.001,
            repetition_penalty=1.1,
            seed=seed,
        )

    assert sample(1) == sample(1) != sample(2)
    assert sample(1)[0] != sample(1)[1]


def test_a_text_ends_before_its_stop_token(params):
    prompts = ["q", "r"]
    free = generate_text(
        MODEL, params, TOKENIZER, prompts, max_new_tokens=12, temperature=0, stop_ids=()
    )
    row = decode(MODEL, params, Prompts.of([[256, 113], [256, 114]]), max_new_tokens=12).rows()[0]
    assert free[0] == bytes(i for i in row if i < 256).decode("utf-8", "replace")

    class EndsWith(ByteTokenizer):
        """The byte tokenizer with the fourth greedy token as its EOS, which has no bytes."""

        def __init__(self):
            super().__init__()
            self.eos_id = row[3]
            self._token_bytes[row[3]] = b""

    assert row[3] not in row[:3]
    ended = generate_text(MODEL, params, EndsWith(), prompts, max_new_tokens=12, temperature=0)
    assert ended[0] == bytes(i for i in row[:3] if i < 256).decode("utf-8", "replace")


def test_no_prompts_give_no_texts(params):
    assert generate_text(MODEL, params, TOKENIZER, []) == []


def test_a_leading_space_of_the_continuation_is_kept(params):
    class DropsFirstSpace(ByteTokenizer):
        """Like SentencePiece: a space is put before each text and taken away again."""

        def __init__(self):
            super().__init__()
            self._prefix = "first"

        def _encode_raw(self, texts, prefix):
            return [list((" " * prefix + text).encode()) for text in texts]

    from tokjax.decoding.text import continuation

    tokenizer = DropsFirstSpace()
    prompt = tokenizer.encode("Once")
    assert tokenizer.decode(prompt) == "Once"
    assert continuation(tokenizer, prompt, list(b" upon")) == " upon"


def test_impossible_prompts_are_refused_early():
    with pytest.raises(ConfigError, match=r"prompt 0 has 61 .*65.*max_positions=64"):
        encode_prompts(MODEL, TOKENIZER, ["a" * 60], max_new_tokens=4)
    with pytest.raises(ConfigError, match="no tokens"):
        encode_prompts(MODEL, TOKENIZER, [""], max_new_tokens=4, add_bos=False)
    small = Transformer(ModelConfig(100, d_model=32, n_layers=1))
    with pytest.raises(DataError, match="another tokenizer"):
        encode_prompts(small, TOKENIZER, ["hello"], max_new_tokens=4)
    assert np.asarray(encode_prompts(MODEL, TOKENIZER, ["a" * 59], max_new_tokens=4).lengths) == 60
