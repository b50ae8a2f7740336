import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.decoding import Prompts, categorical, decode
from tokjax.decoding.edited import edited
from tokjax.errors import ConfigError
from tokjax.models import Edits, ModelConfig, Steer, Transformer, Write
from tokjax.training.compiles import CompileWatch

L, D, NEW, WIDTH = 2, 32, 14, 48
MODEL = Transformer(
    ModelConfig(
        vocab_size=61,
        d_model=D,
        n_layers=L,
        n_heads=4,
        n_kv_heads=2,
        max_positions=96,
        tie_embeddings=False,
    )
)
ROWS = [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [60, 0, 60, 0, 11]]
PROMPTS = Prompts.of(ROWS)


@pytest.fixture(scope="module")
def params():
    params = MODEL.init(jax.random.key(1))
    return {**params, "embedding": 50 * params["embedding"], "head": 3 * params["head"]}


@jax.jit
def forward(params, tokens, edits):
    return MODEL(params, tokens, edits=edits)[0]


def check_recomputed(params, generation, edits, b, prompt):
    """The text is what greedy decoding without a cache writes under the row's own edits."""
    own = jax.tree.map(lambda leaf: leaf if leaf.shape[1] == 1 else leaf[:, b : b + 1], edits)
    ids = list(prompt)
    for n in range(NEW):
        padded = np.zeros((1, WIDTH), np.int32)
        padded[0, : len(ids)] = ids
        logp = jax.nn.log_softmax(forward(params, padded, own)[0, len(ids) - 1])
        assert jnp.diff(jnp.sort(logp)[-2:])[0] > 1e-4
        ids.append(int(logp.argmax()))
        assert abs(float(generation.logprobs[b, n] - logp.max())) < 1e-3
    assert generation.rows()[b] == ids[len(prompt) :]


def some(kind, rows):
    rng = np.random.default_rng(3)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    if kind == "gate":
        return Edits(layer_gate=np.abs(normal(L, rows, 1)))
    if kind == "add":
        return Edits(add={"resid_mid": normal(L, 1, 1, D)})
    if kind == "write":
        heads = normal(L, rows, 1, 4, 8)
        return Edits(write={"attn_heads": Write(heads, np.array([[[True]], [[False]]]))})
    scale = rng.uniform(0.5, 2, (L, rows, 1)).astype(np.float32)
    return Edits(steer={"resid_post": Steer(normal(L, 1, 1, D), scale)})


@pytest.mark.parametrize("kind", ["gate", "add", "write", "steer"])
def test_decoding_equals_recomputation_under_the_same_edits(params, kind):
    edits = some(kind, len(ROWS))
    generation = decode(*edited(MODEL, params, edits), PROMPTS, max_new_tokens=NEW)
    for b, prompt in enumerate(ROWS):
        check_recomputed(params, generation, edits, b, prompt)
    plain = decode(MODEL, params, PROMPTS, max_new_tokens=NEW)
    assert generation.rows() != plain.rows()


def test_no_edits_are_plain_decoding_bit_for_bit(params):
    plain = decode(MODEL, params, PROMPTS, max_new_tokens=NEW)
    found = decode(*edited(MODEL, params, Edits()), PROMPTS, max_new_tokens=NEW)
    jax.tree.map(np.testing.assert_array_equal, found, plain)
    ones = Edits(layer_gate=np.ones((L, 1, 1), np.float32))
    found = decode(*edited(MODEL, params, ones), PROMPTS, max_new_tokens=NEW)
    jax.tree.map(np.testing.assert_array_equal, found, plain)


def test_new_values_compile_nothing(params):
    gates = [np.full((L, 1, 1), value, np.float32) for value in (0.5, 0.25)]
    first, second = (edited(MODEL, params, Edits(layer_gate=gate)) for gate in gates)
    rows = decode(*first, PROMPTS, max_new_tokens=NEW).rows()
    with CompileWatch() as watch:
        assert decode(*second, PROMPTS, max_new_tokens=NEW).rows() != rows
        assert watch.count == 0


def test_the_samples_of_a_prompt_share_its_edits(params):
    edits = some("steer", len(ROWS))
    together = decode(
        *edited(MODEL, params, edits),
        PROMPTS,
        max_new_tokens=NEW,
        samples=2,
        sampler=categorical(),
        seeds=range(8),
    )
    repeated = Edits(steer=jax.tree.map(lambda a: np.repeat(a, 2, 1), edits.steer))
    repeated.steer["resid_post"] = repeated.steer["resid_post"].replace(
        vector=edits.steer["resid_post"].vector
    )
    apart = decode(
        *edited(MODEL, params, repeated),
        Prompts.of([row for row in ROWS for _ in range(2)]),
        max_new_tokens=NEW,
        sampler=categorical(),
        seeds=range(8),
    )
    assert together.rows() == apart.rows()


def test_edits_that_do_not_hold_at_every_token_are_refused(params):
    with pytest.raises(ConfigError, match="same edit is made at every token"):
        edited(MODEL, params, Edits(layer_gate=np.ones((L, 1, 3))))
    with pytest.raises(ConfigError, match="same edit is made at every token"):
        edited(MODEL, params, Edits(add={"resid_post": np.ones((L, D))}))
    with pytest.raises(ConfigError, match="its first axis must be the model's 2 layers"):
        edited(MODEL, params, Edits(layer_gate=np.ones((3, 1, 1))))
    with pytest.raises(ConfigError, match="change as the text grows"):
        edited(MODEL, params, Edits(attention_bias=np.zeros((L, 1, 1, 1, 1))))
    wrong = edited(MODEL, params, Edits(layer_gate=np.ones((L, 3, 1))))
    with pytest.raises(ConfigError, match=r"\(2, 3, 1\): its second axis must be 1 or the 4"):
        decode(*wrong, PROMPTS, max_new_tokens=NEW)
