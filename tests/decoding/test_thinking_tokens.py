from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.decoding import Prompts, categorical, decode, on_tokens
from tokjax.decoding.more_thinking import think_longer
from tokjax.decoding.recycling import recycling
from tokjax.decoding.thinking_tokens import THINKING_WORDS, ban_and_control, thinking_ids
from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.training.compiles import CompileWatch

V = 61
MODEL = Transformer(
    ModelConfig(
        vocab_size=V,
        d_model=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        max_positions=96,
        tie_embeddings=False,
    )
)
ROWS = [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [60, 0, 60, 0, 11]]
PROMPTS = Prompts.of(ROWS)
WAIT, HMM, CUE = 17, 23, [33, 34]


@pytest.fixture(scope="module")
def params():
    params = MODEL.init(jax.random.key(1))
    return {**params, "embedding": 50 * params["embedding"], "head": 3 * params["head"]}


@pytest.fixture(scope="module")
def ends(params):
    """Ids at which some of the texts end early, at several places."""
    rows = decode(MODEL, params, PROMPTS, max_new_tokens=14).rows()
    chosen = [rows[0][3], rows[2][6]]
    assert not {WAIT, HMM, *CUE} & set(chosen)
    return chosen


class Words:
    """A tokenizer of a few words, with and without a space before them."""

    ids: ClassVar = {
        "So": [1],
        " So": [2],
        "Hmm": [3, 4],
        " Hmm": [5],
        "Wait": [6, 7],
        " Wait": [8, 9],
    }

    def encode(self, text):
        return self.ids[text]


def continued(params, row, n, ends):
    """Greedy text behind a row, up to an end (which is left out) or n tokens."""
    stop = on_tokens(ends)
    (text,) = decode(MODEL, params, Prompts.of([row]), max_new_tokens=n, stop=stop).rows()
    return (text[:-1], True) if text[-1] in ends else (text, False)


def by_rounds(params, prompt, ends, thinking, base, budget, cue, answer, appends=10**9):
    """The method as one says it: round after round of decoding, every one from its beginning."""
    text, ended = continued(params, prompt, base, ends)
    n = 0
    while len(text) + 1 < budget and n < appends:
        text = [*text, thinking[n % len(thinking)]]
        n += 1
        more, ended = continued(params, [*prompt, *text], min(base, budget - len(text)), ends)
        text += more
    if not cue:
        return text, [], n, ended
    found, _ = continued(params, [*prompt, *text, *cue], answer, ends)
    return text, found, n, ended


@pytest.mark.parametrize(
    ("thinking", "settings"),
    [
        ([WAIT], {"base_budget": 8, "token_budget": 20}),
        ([WAIT, HMM], {"base_budget": 5, "token_budget": 26}),
        ([WAIT], {"base_budget": 8, "token_budget": 30, "appends": 1}),
        ([WAIT], {"base_budget": 14, "token_budget": 0}),
    ],
)
@pytest.mark.parametrize("cue", [CUE, []])
def test_one_loop_writes_what_round_after_round_of_decoding_writes(
    params, ends, thinking, settings, cue
):
    found = think_longer(
        MODEL,
        params,
        PROMPTS,
        thinking=thinking,
        ends=ends,
        cue=cue,
        answer_tokens=4,
        **settings,
    )
    tokens = found.generation.rows()
    appended = np.asarray(found.appended)
    for b, prompt in enumerate(ROWS):
        text, answer, n, ended = by_rounds(
            params,
            prompt,
            ends,
            thinking,
            settings["base_budget"],
            settings["token_budget"],
            cue,
            4,
            settings.get("appends", 10**9),
        )
        reasoning = found.reasoning()[b]
        assert reasoning[: len(text)] == text
        # What is left of it is the end that the text stops with, where no cue takes its place.
        assert len(reasoning) == len(text) + (ended and not cue)
        own = found.answers()[b]
        assert own[: len(answer)] == answer and set(own[len(answer) :]) <= set(ends)
        assert appended[b].sum() == n + len(cue)
        if cue:
            assert tokens[b][len(text) : len(text) + 2] == cue
    assert found.appended[~found.generation.mask].sum() == 0


@pytest.mark.parametrize("budget", [0, 3, 9])
def test_a_budget_up_to_the_first_reasonings_length_gives_the_plain_text(params, budget):
    # Without ends every reasoning has its whole base budget of tokens.
    found = think_longer(
        MODEL, params, PROMPTS, thinking=[WAIT], ends=[], base_budget=9, token_budget=budget
    )
    plain = decode(MODEL, params, PROMPTS, max_new_tokens=9)
    assert found.generation.rows() == found.reasoning() == plain.rows()
    np.testing.assert_array_equal(found.generation.logprobs, plain.logprobs)
    assert not found.appended.any() and not found.answering.any()
    assert found.answers() == [[], [], [], []]


def test_a_plain_text_that_ends_keeps_its_end(params, ends):
    found = think_longer(
        MODEL, params, PROMPTS, thinking=[WAIT], ends=ends, base_budget=14, token_budget=0
    )
    plain = decode(MODEL, params, PROMPTS, max_new_tokens=14, stop=on_tokens(ends))
    assert found.generation.rows() == plain.rows()
    assert min(map(len, plain.rows())) < 14


def test_rows_have_budgets_of_their_own_and_do_not_depend_on_one_another(params, ends):
    budgets = {"base_budget": [5, 6, 7, 8], "token_budget": [0, 12, 20, 26]}
    given = {"thinking": [WAIT], "ends": ends, "cue": CUE, "answer_tokens": 3}
    together = think_longer(MODEL, params, PROMPTS, **given, **budgets)
    order = [2, 0, 3, 1]
    apart = think_longer(
        MODEL,
        params,
        Prompts.of([ROWS[b] for b in order]),
        **given,
        **{name: [values[b] for b in order] for name, values in budgets.items()},
    )
    rows = together.generation.rows()
    assert apart.generation.rows() == [rows[b] for b in order]
    assert len({len(row) for row in together.reasoning()}) == 4


def test_samples_and_other_predictors(params, ends):
    found = think_longer(
        *recycling(MODEL, params, [], layer=1),
        PROMPTS,
        thinking=[WAIT],
        ends=ends,
        base_budget=8,
        token_budget=20,
        cue=CUE,
        answer_tokens=4,
        samples=2,
        sampler=categorical(),
        seeds=range(8),
    )
    assert all(WAIT in row for row in found.reasoning())
    assert all(len(row) == 20 or row[-1] not in ends for row in found.reasoning())
    # Tokens that the model did not choose have no uncertainty, but for the ends they replaced.
    lp = np.asarray(found.generation.logprobs)
    cue_places = np.asarray(found.appended & found.answering)
    assert (lp[cue_places] == 0).any() and np.isfinite(lp).all()
    with pytest.raises(ConfigError, match="layer has 3 values"):
        think_longer(
            *recycling(MODEL, params, [], layer=[0, 1, 1]),
            PROMPTS,
            thinking=[WAIT],
            ends=ends,
            base_budget=8,
            token_budget=20,
        )


def test_new_values_compile_nothing(params, ends):
    def run(**changes):
        given = {"thinking": [WAIT], "ends": ends, "base_budget": 8, "token_budget": 20}
        given |= {"cue": CUE, "answer_tokens": 4}
        return think_longer(MODEL, params, PROMPTS, **{**given, **changes})

    run()
    with CompileWatch() as watch:
        run(thinking=[HMM, WAIT], ends=[9], base_budget=3, token_budget=21, answer_tokens=5)
        run(cue=[1, 2, 3], appends=1)
        assert watch.count == 0


def test_impossible_settings_are_refused(params):
    def run(**changes):
        given = {"thinking": [WAIT], "ends": [2], "base_budget": 8, "token_budget": 20}
        return think_longer(MODEL, params, PROMPTS, **{**given, **changes})

    with pytest.raises(ConfigError, match="thinking has no ids"):
        run(thinking=[])
    with pytest.raises(ConfigError, match=r"cue has ids \[61\]"):
        run(cue=[3, 61])
    with pytest.raises(ConfigError, match=r"ids \[17\] would be appended, but they also end"):
        run(ends=[2, WAIT])
    with pytest.raises(ConfigError, match="base_budget=0 must be an integer, 1 or above"):
        run(base_budget=0)
    with pytest.raises(ConfigError, match=r"token_budget=2\.5"):
        run(token_budget=2.5)
    with pytest.raises(ConfigError, match="appends has 2 values for 4 prompts"):
        run(appends=[1, 2])
    with pytest.raises(ConfigError, match="max_positions=96"):
        run(token_budget=95)


def test_words_of_one_token_are_found_in_either_form():
    assert thinking_ids(Words(), ["So", "Hmm", "Wait"]) == [1, 2, 5]
    with pytest.raises(ConfigError, match=r"none of \['Wait'\]"):
        thinking_ids(Words(), ["Wait"])
    assert {"Wait", "Hmm", "So", "Therefore"} <= set(THINKING_WORDS)


def test_the_control_forbids_as_many_other_ids(params):
    thinking = [1, 5, 9, 30]
    ban, control = ban_and_control(thinking, V, seed=1, keep=[2])
    logits = jnp.zeros((1, V))

    def forbidden(transform):
        changed, _ = transform.update(logits, (), None)
        return set(np.flatnonzero(np.isneginf(changed[0])).tolist())

    assert forbidden(ban) == set(thinking)
    assert len(forbidden(control)) == 4
    assert not forbidden(control) & {*thinking, 2}
    assert forbidden(ban_and_control(thinking, V, seed=2, keep=[2])[1]) != forbidden(control)
    text = decode(MODEL, params, PROMPTS, max_new_tokens=14, transform=ban)
    assert not set(np.asarray(text.tokens)[np.asarray(text.mask)].tolist()) & set(thinking)
    with pytest.raises(ConfigError, match="only 2 others are left"):
        ban_and_control(range(4), 6)
