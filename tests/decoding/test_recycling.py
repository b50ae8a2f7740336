import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.decoding import Prompts, categorical, decode
from tokjax.decoding.recycling import recycling
from tokjax.errors import ConfigError
from tokjax.models import Edits, ModelConfig, Transformer, Write
from tokjax.training.compiles import CompileWatch

L, D, V, NEW, WIDTH = 2, 32, 61, 14, 48
ROWS = [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [60, 0, 60, 0, 11]]
PROMPTS = Prompts.of(ROWS)
THINKING = list(range(0, V, 2))


def recycled(context):
    return context.signals["recycled"]


def tiny(**changes):
    model = Transformer(
        ModelConfig(
            **{
                "vocab_size": V,
                "d_model": D,
                "n_layers": L,
                "n_heads": 4,
                "n_kv_heads": 2,
                "max_positions": 96,
                "tie_embeddings": False,
                **changes,
            }
        )
    )
    params = model.init(jax.random.key(1))
    return model, {**params, "embedding": 50 * params["embedding"], "head": 3 * params["head"]}


@pytest.fixture(scope="module")
def lm():
    return tiny()


def rewritten(model, params, layer, thinking):
    """A function from a prompt to the text, logprobs and recycled steps, without a cache: the
    injected states of all earlier positions are written again in every pass.
    """

    @jax.jit
    def forward(tokens, states, mask):
        write = Edits(write={"resid_pre": Write(states, mask)})
        logits, out = model(params, tokens, edits=write, capture={"resid_post"})
        return jax.nn.log_softmax(logits[0]), out.captured["resid_post"][:, 0]

    def run(prompt):
        ids, logprobs, steps = list(prompt), [], []
        states = np.zeros((L, 1, WIDTH, D), np.float32)
        mask = np.zeros((L, 1, WIDTH), bool)
        for _ in range(NEW):
            padded, at = np.zeros((1, WIDTH), np.int32), len(ids) - 1
            padded[0, : len(ids)] = ids
            logp, outputs = forward(padded, states, mask)
            steps.append(int(logp[at].argmax()) in thinking)
            if steps[-1]:
                states[layer, 0, at], mask[layer, 0, at] = outputs[layer, at], True
                logp, _ = forward(padded, states, mask)
            assert jnp.diff(jnp.sort(logp[at])[-2:])[0] > 1e-4
            ids.append(int(logp[at].argmax()))
            logprobs.append(float(logp[at].max()))
        return ids[len(prompt) :], logprobs, steps

    return run


@pytest.mark.parametrize(
    ("layer", "changes"),
    [(0, {}), (1, {}), (1, {"sliding_window": 4, "window_pattern": (True, False)})],
)
def test_decoding_equals_recomputation_with_the_same_injected_states(layer, changes):
    model, params = tiny(**changes)
    generation = decode(
        *recycling(model, params, THINKING, layer=layer),
        PROMPTS,
        max_new_tokens=NEW,
        record={"recycled": recycled},
    )
    run = rewritten(model, params, layer, THINKING)
    happened = generation.recorded["recycled"][generation.mask]
    assert happened.any() and not happened.all()
    for b, prompt in enumerate(ROWS):
        ids, logprobs, steps = run(prompt)
        assert generation.rows()[b] == ids
        np.testing.assert_allclose(generation.logprobs[b, :NEW], logprobs, atol=1e-3)
        assert generation.recorded["recycled"][b, :NEW].tolist() == steps
    assert generation.rows() != decode(model, params, PROMPTS, max_new_tokens=NEW).rows()


def test_the_cache_holds_one_entry_a_token(lm):
    predictor, given = recycling(*lm, range(V), layer=1)  # every step recycles
    prepared = predictor.prepare(given)
    state, out = jax.jit(predictor.init, static_argnums=2)(prepared, PROMPTS, 32)
    assert out.signals["recycled"].all()
    np.testing.assert_array_equal(state.lengths, PROMPTS.lengths)
    step = jax.jit(predictor.step)
    for n in range(1, 4):
        state, out = step(prepared, state, jnp.argmax(out.logits, -1))
        assert out.signals["recycled"].all()
        np.testing.assert_array_equal(state.lengths, PROMPTS.lengths + n)
    # What lies beyond was never written.
    for buffer in (*state.keys, *state.values):
        for row, length in zip(buffer, state.lengths, strict=True):
            assert not row[int(max(length, PROMPTS.tokens.shape[1])) :].any()


def test_without_thinking_tokens_it_is_greedy_decoding_bit_for_bit(lm):
    plain = decode(*lm, PROMPTS, max_new_tokens=NEW)
    for settings in ({"thinking": []}, {"thinking": THINKING, "probability": 0.0, "seeds": [3]}):
        given = recycling(*lm, **settings, layer=1)
        found = decode(*given, PROMPTS, max_new_tokens=NEW)
        jax.tree.map(np.testing.assert_array_equal, found, plain)


def test_a_blocks_own_input_changes_nothing(lm):
    plain = decode(*lm, PROMPTS, max_new_tokens=NEW)
    for layer in range(L):
        found = decode(
            *recycling(*lm, range(V), layer=layer, state="input"),
            PROMPTS,
            max_new_tokens=NEW,
            record={"recycled": recycled},
        )
        assert found.recorded["recycled"][found.mask].all()
        assert found.rows() == plain.rows()
        np.testing.assert_allclose(found.logprobs, plain.logprobs, atol=1e-4)


def test_rows_do_not_depend_on_one_another(lm):
    layers = [0, 1, 1, 0]
    together = decode(
        *recycling(*lm, THINKING, layer=layers, probability=0.5, seeds=range(4)),
        PROMPTS,
        max_new_tokens=NEW,
    )
    for b in range(4):
        others = [ROWS[b], *ROWS[:b][::-1], *ROWS[b + 1 :]]
        settings = {"layer": [layers[b], 0, 0, 1], "seeds": [b, 9, 8, 7], "probability": 0.5}
        found = decode(
            *recycling(*lm, THINKING, **settings), Prompts.of(others), max_new_tokens=NEW
        )
        np.testing.assert_array_equal(found.tokens[0], together.tokens[b])
        np.testing.assert_array_equal(found.logprobs[0], together.logprobs[b])


def test_a_probability_draws_for_each_row_by_its_seed(lm):
    def run(seeds):
        return decode(
            *recycling(*lm, range(V), layer=0, probability=0.5, seeds=seeds),
            PROMPTS,
            max_new_tokens=NEW,
            samples=2,
            sampler=categorical(),
            seeds=[0] * 8,
            record={"recycled": recycled},
        )

    shared = run(range(4))
    assert (shared.tokens[::2] == shared.tokens[1::2]).all()
    own = run(range(8))
    share = float(own.recorded["recycled"][own.mask].mean())
    assert abs(share - 0.5) < 4 * (0.25 / (8 * NEW)) ** 0.5
    own = own.recorded["recycled"]
    assert (own[::2, 0] == own[1::2, 0]).all()  # the prompt's last position belongs to both
    assert (own[::2] != own[1::2]).any(1).all()


def test_new_values_compile_nothing(lm):
    decode(*recycling(*lm, [1, 2], layer=0), PROMPTS, max_new_tokens=NEW)
    with CompileWatch() as watch:
        decode(*recycling(*lm, [1, 5, 7], layer=1), PROMPTS, max_new_tokens=NEW)
        assert watch.count == 0


def test_impossible_settings_are_refused(lm):
    with pytest.raises(ConfigError, match=r"layer=2 must be an integer from 0 to 1"):
        recycling(*lm, [1], layer=2)
    with pytest.raises(ConfigError, match=r"ids \[61\]"):
        recycling(*lm, [1, 61], layer=0)
    with pytest.raises(ConfigError, match=r"probability=0.5 draws at random: give seeds"):
        recycling(*lm, [1], layer=0, probability=0.5)
    with pytest.raises(ConfigError, match="probability=2 must be from 0 to 1"):
        recycling(*lm, [1], layer=0, probability=2)
    with pytest.raises(ConfigError, match="state='both'"):
        recycling(*lm, [1], layer=0, state="both")
    with pytest.raises(ConfigError, match="layer has 3 values for 4 prompts"):
        decode(*recycling(*lm, [1], layer=[0, 1, 0]), PROMPTS, max_new_tokens=NEW)
    with pytest.raises(ConfigError, match="3 seeds for 4 prompts"):
        decode(
            *recycling(*lm, [1], layer=0, probability=0.5, seeds=range(3)),
            PROMPTS,
            max_new_tokens=NEW,
        )
