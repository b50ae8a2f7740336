import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.decoding import (
    Prompts,
    categorical,
    chain,
    check_prompts,
    decode,
    logit_bias,
    min_new_tokens,
    on_tokens,
    repetition_penalty,
    temperature,
    top_k,
    top_p,
)
from tokjax.decoding.speculative import (
    ModelBlocks,
    Written,
    early_exit,
    exact_match,
    prompt_lookup,
    relative_threshold,
    speculative_decode,
)
from tokjax.decoding.speculative.drafters import lookup
from tokjax.decoding.speculative.speculative import _run
from tokjax.decoding.stop_texts import TokenBytes, on_texts
from tokjax.errors import ConfigError, DataError
from tokjax.models import parameters
from tokjax.parallel.mesh import MeshConfig, build_mesh
from tokjax.parallel.rules import parameter_shardings
from tokjax.training.compiles import CompileWatch

NEW = 24


@pytest.fixture(scope="module")
def greedy_text(lm, rows):
    """What plain greedy decoding writes."""
    return decode(lm.model, lm.params, Prompts.of(rows), max_new_tokens=NEW)


@pytest.fixture(scope="module")
def drafts(lm, small):
    """Drafts by a smaller model, the first layer, the text, and the target itself."""
    return {
        "model": (small.model, small.params),
        "early_exit": early_exit(1),
        "prompt_lookup": prompt_lookup(),
        "target": (lm.model, lm.params),
    }


def speculate(lm, rows, draft, **settings):
    settings = {"max_new_tokens": NEW, **settings}
    return speculative_decode(lm.model, lm.params, Prompts.of(rows), draft=draft, **settings)


@pytest.mark.parametrize("name", ["model", "early_exit", "prompt_lookup", "target"])
def test_greedy_text_is_that_of_plain_decoding(lm, rows, drafts, greedy_text, name):
    found = speculate(lm, rows, drafts[name])
    assert found.rows() == greedy_text.rows()
    np.testing.assert_allclose(found.logprobs, greedy_text.logprobs, atol=1e-4)
    np.testing.assert_allclose(found.entropies, greedy_text.entropies, atol=1e-4)
    np.testing.assert_array_equal(found.sampling_logprobs, 0)
    assert not np.asarray(found.stopped).any()
    accepted, blocks = np.asarray(found.accepted), np.asarray(found.blocks)
    np.testing.assert_array_equal(accepted.sum(1) + blocks, NEW)
    assert (np.asarray(found.tested) >= accepted).all()
    assert accepted.sum() > 0
    if name == "target":
        assert blocks.tolist() == [5] * 4
        np.testing.assert_array_equal(found.acceptance_rate, 1)
        np.testing.assert_allclose(found.tokens_per_pass, NEW / 5)
    else:
        assert len(set(blocks.tolist())) > 1  # rows advance at different speeds


@pytest.mark.parametrize(
    ("changes", "gamma"),
    [
        ({"sliding_window": 4}, 7),
        ({"sliding_window": 3, "window_pattern": (True, False)}, 1),
    ],
    ids=["windows", "some windows"],
)
def test_greedy_text_beside_rings_is_that_of_plain_decoding(make, rows, changes, gamma):
    lm, draft = make(**changes), early_exit(1)
    plain = decode(lm.model, lm.params, Prompts.of(rows), max_new_tokens=NEW)
    found = speculate(lm, rows, draft, gamma=gamma)
    assert found.rows() == plain.rows()
    assert len({token for row in found.rows() for token in row}) > 10
    assert found.accepted.sum() > 0
    assert (np.asarray(found.tested).sum(1) > np.asarray(found.accepted).sum(1)).any()


def test_a_row_may_fill_the_models_last_position(make):
    lm = make(positions="learned", norm="layer", max_positions=32)
    row = [[3, 1, 4, 1, 5, 9, 2, 6]]
    plain = decode(lm.model, lm.params, Prompts.of(row), max_new_tokens=NEW)
    for draft in (early_exit(1), (lm.model, lm.params)):
        found = speculate(lm, row, draft, gamma=6)
        assert found.rows() == plain.rows()
        assert np.isfinite(found.logprobs).all()


def test_an_int8_cache_gives_the_text_of_single_tokens_beside_one(make, rows):
    lm = make(sliding_window=6, window_pattern=(True, False))
    blocks = ModelBlocks(lm.model, "int8")
    found = speculative_decode(
        blocks, lm.params, Prompts.of(rows), draft=early_exit(1), max_new_tokens=NEW
    )
    prompts, _ = check_prompts(blocks, Prompts.of(rows), NEW)
    prepared = blocks.prepare(lm.params)
    state = jax.jit(blocks.start, static_argnums=(2, 3))(prepared, prompts, 48, 1)
    state = state.rewind(prompts.lengths - 1)
    extend = jax.jit(blocks.extend, static_argnums=4)
    last, expected = np.array([row[-1] for row in rows]), []
    for _ in range(NEW):
        state, logits = extend(prepared, state, last[:, None], np.zeros(4, np.int32), 1)
        last = np.asarray(logits[:, 0].argmax(-1))
        expected.append(last)
    assert found.rows() == np.stack(expected, axis=1).tolist()
    exact_cache = speculate(lm, rows, early_exit(1))
    assert np.abs(exact_cache.logprobs - found.logprobs).max() > 1e-4  # it is another cache


def test_a_row_depends_on_its_own_prompt_and_seed_alone(lm, rows, drafts):
    sampled = {"sampler": categorical(), "transform": chain(temperature(1.0))}
    for name, settings in (("model", sampled), ("prompt_lookup", {})):
        together = speculate(lm, rows, drafts[name], seeds=[3, 1, 4, 1], **settings)
        # Other company, other limits beside it.
        for b in range(2):
            company = [rows[b], rows[3 - b], rows[2], rows[1]]
            found = speculate(
                lm,
                company,
                drafts[name],
                seeds=[[3, 1, 4, 1][b], 9, 9, 9],
                max_new_tokens=[NEW, 5, 20, 1],
                **settings,
            )
            assert found.rows()[0] == together.rows()[b]
            assert [len(row) for row in found.rows()] == [NEW, 5, 20, 1]
            assert found.blocks[0] == together.blocks[b]


def test_samples_are_those_of_the_prompt_repeated(lm, drafts):
    settings = {
        "max_new_tokens": 20,
        "sampler": categorical(),
        "transform": chain(temperature(1.0)),
        "seeds": range(4),
    }
    two = [[3, 1, 4, 1, 5], [9, 2]]
    found = speculate(lm, two, drafts["model"], samples=2, **settings)
    repeated = speculate(lm, [row for row in two for _ in range(2)], drafts["model"], **settings)
    assert found.rows() == repeated.rows()
    assert len({tuple(row) for row in found.rows()}) == 4


RUNS = 20_000
LAW = chain(temperature(6.0), top_k(4), top_p(0.93))


def _joint_law(lm, prompt):
    """The law of the first three tokens, by passes over whole texts."""
    texts = list(itertools.product(range(5), range(5)))
    logits = np.array([lm.logits([*prompt, *text])[-3:] for text in texts]).reshape(-1, 5)
    filtered = jax.jit(lambda x: LAW.update(x, ((), (), ()), None)[0])(logits)
    first, second, third = np.moveaxis(np.asarray(jax.nn.softmax(filtered)).reshape(25, 3, 5), 1, 0)
    law = np.zeros((5, 5, 5))
    for i, (a, b) in enumerate(texts):
        law[a, b] = first[i, a] * second[i, b] * third[i]
    return law


@pytest.mark.parametrize("name", ["model", "prompt_lookup", "exact_match"])
def test_sampled_texts_follow_the_targets_law(make, follows, name):
    tiny = {"vocab_size": 5, "d_model": 8, "n_heads": 2, "n_kv_heads": 1, "max_positions": 16}
    lm, other = make(seed=3, **tiny), make(seed=4, **{**tiny, "n_layers": 1})
    draft = {"exact_match": early_exit(1), "prompt_lookup": prompt_lookup()}.get(
        name, (other.model, other.params)
    )
    prompt = [1, 3, 1, 2, 1, 3]
    found = speculate(
        lm,
        [prompt],
        draft,
        samples=RUNS,
        max_new_tokens=3,
        gamma=2,
        transform=LAW,
        sampler=categorical(),
        acceptance=exact_match() if name == "exact_match" else None,
        key=jax.random.key(8),
    )
    law = _joint_law(lm, prompt)
    assert ((law > 0) & (law < 1)).sum() > 20
    assert 500 < found.accepted.sum() < found.tested.sum()
    texts = np.asarray(found.tokens)[:, :3]
    follows(texts @ [25, 5, 1], law)
    # The log-probabilities are those of the law.
    np.testing.assert_allclose(
        np.exp(np.asarray(found.sampling_logprobs)[:, :3].sum(1)),
        law[tuple(texts.T)],
        rtol=1e-3,
    )


def test_temperature_zero_is_greedy_in_its_row(lm, rows, drafts, greedy_text):
    found = speculate(
        lm,
        rows,
        drafts["model"],
        transform=chain(temperature([0.0, 1.0, 0.0, 2.0]), logit_bias({2: 0.0})),
        sampler=categorical(),
        seeds=range(4),
    )
    same = [a == b for a, b in zip(found.rows(), greedy_text.rows(), strict=True)]
    assert same == [True, False, True, False]


@pytest.mark.parametrize("name", ["model", "target"])
def test_a_stop_within_a_block_discards_the_rest(lm, rows, drafts, greedy_text, name):
    texts = greedy_text.rows()
    ids = [texts[0][6], texts[2][3]]
    plain = decode(lm.model, lm.params, Prompts.of(rows), max_new_tokens=NEW, stop=on_tokens(ids))
    found = speculate(lm, rows, drafts[name], stop=on_tokens(ids))
    assert found.rows() == plain.rows()
    np.testing.assert_array_equal(found.stopped, plain.stopped)
    assert np.asarray(found.stopped).any()
    behind = ~np.asarray(found.mask)
    for values in (found.tokens, found.logprobs, found.sampling_logprobs, found.entropies):
        assert (np.asarray(values)[behind] == 0).all()
    if name == "target":
        np.testing.assert_array_equal(found.acceptance_rate, 1)


def test_a_stop_may_read_the_rows_own_text(lm, rows, drafts, greedy_text):
    alphabet = TokenBytes.of([f"<{i}>".encode() for i in range(61)])
    texts = ["".join(f"<{i}>" for i in row) for row in greedy_text.rows()]
    stop = on_texts([texts[0][4:14], texts[3][-9:-2]], alphabet)
    plain = decode(lm.model, lm.params, Prompts.of(rows), max_new_tokens=NEW, stop=stop)
    found = speculate(lm, rows, drafts["model"], stop=stop)
    assert found.rows() == plain.rows()
    assert np.asarray(found.stopped).any()
    assert found.lengths[0] < NEW


def test_other_values_compile_nothing(lm, rows, drafts):
    def run(seed, t, k, p, ids, limit, share):
        return speculate(
            lm,
            rows,
            drafts["model"],
            transform=chain(temperature(t), top_k(k), top_p(p)),
            sampler=categorical(),
            seeds=range(seed, seed + 4),
            stop=on_tokens(ids),
            max_new_tokens=limit,
            acceptance=relative_threshold(share),
        )

    run(0, 0.9, 20, 0.9, [3], 17, 0.5)
    size = _run._cache_size()
    with CompileWatch() as watch:
        lossy = run(7, 1.3, 5, 0.5, [4, 5], 23, 0.0)
    assert _run._cache_size() == size
    assert watch.count == 0
    np.testing.assert_array_equal(lossy.acceptance_rate, 1)  # everything stands


def test_a_sharded_model_writes_the_same_text(lm, rows, drafts, greedy_text):
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = parameter_shardings(
        parameters.logical_axes(lm.model.config), lm.model.abstract_params(), mesh
    )
    with jax.set_mesh(mesh):
        found = speculative_decode(
            lm.model,
            jax.device_put(lm.params, shardings),
            Prompts.of(rows),
            draft=early_exit(1),
            max_new_tokens=NEW,
        )
    assert found.rows() == greedy_text.rows()


def _looked_up(prompt, generated, ngram=3, gamma=4):
    """What is proposed behind a prompt and new tokens, padded so that few programs are compiled."""
    prompt = [0, *prompt]
    tokens = np.full((1, 16), prompt[-1], np.int32)  # filling must not count
    tokens[0, : len(prompt)] = prompt
    new = np.full((1, 8), prompt[-1], np.int32)
    new[0, : len(generated)] = generated
    prompts = Prompts(tokens, np.array([len(prompt)]))
    written = Written(prompts, new, np.array([len(generated)]))
    proposed, found = jax.jit(lookup, static_argnums=(1, 2))(written, ngram, gamma)
    return proposed[0].tolist() if found[0] else None


def test_prompt_lookup_copies_what_followed_the_longest_latest_match():
    assert _looked_up([1, 2, 3, 4, 5, 6, 1, 2], []) == [3, 4, 5, 6]
    # The longest match counts, then the latest.
    assert _looked_up([1, 2, 3, 7, 2, 5, 8, 2, 6, 4, 1, 2], []) == [3, 7, 2, 5]
    assert _looked_up([2, 3, 7, 2, 5, 8, 6, 2], []) == [5, 8, 6, 2]
    assert _looked_up([4, 1, 2, 3, 5, 9, 1, 2, 3, 6, 4, 1, 2, 3], [], ngram=2) == [6, 4, 1, 2]
    # Across the end of the prompt, and within the new text.
    assert _looked_up([1, 2, 3, 4], [5, 1, 2]) == [3, 4, 5, 1]
    assert _looked_up([1], [5, 6, 7, 8, 5, 6]) == [7, 8, 5, 6]
    # A copy that reaches the end goes on with the period.
    assert _looked_up([7, 7, 7], []) == [7, 7, 7, 7]
    assert _looked_up([3, 1, 2, 1, 2], []) == [1, 2, 1, 2]
    assert _looked_up([1, 2, 3, 4], []) is None
    assert _looked_up([], []) is None


def test_prompt_lookup_proposes_nothing_without_a_match(lm):
    found = speculate(lm, [[17]], prompt_lookup(), max_new_tokens=1)
    assert found.tested.sum() == 0
    np.testing.assert_array_equal(found.acceptance_rate, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gamma": 0}, ConfigError, "gamma=0"),
        ({"gamma": 2.5}, ConfigError, "gamma=2.5"),
        ({"samples": 0}, ConfigError, "samples=0"),
        ({"draft": early_exit(2)}, ConfigError, "layers must be 1 to 1"),
        ({"draft": "lookup"}, ConfigError, "draft=str"),
        ({"sampler": categorical()}, ConfigError, "give seeds"),
        ({"sampler": object()}, ConfigError, "sampler=object"),
        ({"transform": repetition_penalty(1.2)}, ConfigError, "RepetitionPenalty depends on the"),
        ({"transform": chain(chain(min_new_tokens(2, [0])))}, ConfigError, "MinNewTokens"),
        ({"prompts": Prompts.of([[61]])}, DataError, "id 61"),
        ({"max_new_tokens": 96}, ConfigError, "max_positions=96"),
        ({"max_new_tokens": 0}, ConfigError, "at least 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(lm, change, error, message):
    given = {"prompts": Prompts.of([[1]]), "max_new_tokens": 4, "draft": early_exit(1), **change}
    with pytest.raises(error, match=message):
        speculative_decode(lm.model, {}, given.pop("prompts"), **given)


def test_a_draft_that_does_not_fit_is_refused(lm, make):
    other = make(vocab_size=32)
    with pytest.raises(ConfigError, match="32 token ids and the target 61"):
        speculate(lm, [[1]], (other.model, other.params))
    short = make(max_positions=8)
    with pytest.raises(ConfigError, match="the draft has max_positions=8"):
        speculate(lm, [[1]], (short.model, short.params))
    with pytest.raises(ConfigError, match="layers must be 1 to 1"):
        early_exit(0).of(ModelBlocks(lm.model))


def test_a_stop_with_settings_for_each_row_is_refused(lm, rows):
    stop = lambda context: context.last == jnp.array([1, 2, 3, 4])  # noqa: E731
    with pytest.raises(ConfigError, match="settings for each row"):
        speculate(lm, rows, early_exit(1), stop=jax.tree_util.Partial(stop))
