"""Samples and beams within a catalogue: both forms, exact distributions, exact rankings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogues_for_tests import END, drawn, example

from tokjax.decoding.constrained.on_trie import automaton, heights, on_trie, recommend
from tokjax.decoding.constrained.trie import TokenTrie
from tokjax.decoding.engine import decode
from tokjax.decoding.prompts import Prompts
from tokjax.decoding.samplers import categorical
from tokjax.errors import ConfigError
from tokjax.gflownet.exact import flow_policy, item_logprobs
from tokjax.models import ModelConfig, Transformer

TRIE = drawn(1, items=30, symbols=6, longest=4)
PROMPTS = Prompts.of([[8, 9, 3], [9]])


@pytest.fixture(scope="module")
def model():
    model = Transformer(
        ModelConfig(vocab_size=10, d_model=16, n_layers=1, n_heads=2, max_positions=32)
    )
    return model, model.init(jax.random.key(0))


def test_heights_count_the_tokens_to_the_nearest_end():
    assert heights(example()).tolist() == [2, 1, 1, 1, 1, 0]


def test_the_automaton_matches_items_with_their_ends_and_nothing_else():
    found = automaton(TRIE, 10)
    for item in TRIE.items:
        assert found.matches((*item, END))
        assert not found.matches(item)
    assert not found.matches((9, END))
    assert found.shortest == 2


@pytest.mark.parametrize("form", ["dense", "compact"])
def test_every_sample_is_an_item(model, form):
    found = decode(
        *model,
        PROMPTS,
        max_new_tokens=TRIE.longest + 1,
        samples=50,
        transform=on_trie(TRIE, 10, form=form),
        sampler=categorical(),
        seeds=np.arange(100),
    )
    items = [TRIE.item_of(row) for row in found.rows()]
    assert min(items) >= 0
    assert len(set(items)) > 10
    assert np.all(found.stopped)


@pytest.mark.parametrize("limit", [2, 3, 5, 9])
def test_both_forms_draw_the_same(model, limit):
    both = [
        decode(
            *model,
            PROMPTS,
            max_new_tokens=limit,
            samples=20,
            transform=on_trie(TRIE, 10, form=form),
            sampler=categorical(),
            seeds=np.arange(40),
        )
        for form in ("dense", "compact")
    ]
    np.testing.assert_array_equal(both[0].tokens, both[1].tokens)
    np.testing.assert_allclose(both[0].sampling_logprobs, both[1].sampling_logprobs, atol=1e-6)
    assert all(TRIE.item_of(row) >= 0 for row in both[0].rows())  # completed within the limit


def test_without_finishing_rows_may_be_cut_off(model):
    for form in ("dense", "compact"):
        found = decode(
            *model,
            PROMPTS,
            max_new_tokens=2,
            samples=20,
            transform=on_trie(TRIE, 10, finish=False, form=form),
            sampler=categorical(),
            seeds=np.arange(40),
        )
        assert not np.all(found.stopped)


def test_what_is_impossible_is_said_before_compilation(model):
    for form in ("dense", "compact"):
        with pytest.raises(ConfigError, match="shortest"):
            decode(*model, PROMPTS, max_new_tokens=1, transform=on_trie(TRIE, 10, form=form))
        with pytest.raises(ConfigError, match="another tokenizer"):
            decode(*model, PROMPTS, max_new_tokens=9, transform=on_trie(TRIE, 99, form=form))


def test_item_logprobs_are_those_of_sampling(model):
    within = item_logprobs(*model, (8, 9, 3), TRIE, rows=7)
    np.testing.assert_allclose(np.exp(within).sum(), 1.0, rtol=1e-5)
    found = decode(
        *model,
        Prompts.of([[8, 9, 3]]),
        max_new_tokens=TRIE.longest + 1,
        samples=30,
        transform=on_trie(TRIE, 10),
        sampler=categorical(),
        seeds=np.arange(30),
    )
    items = [TRIE.item_of(row) for row in found.rows()]
    np.testing.assert_allclose(np.asarray(found.sampling_logprobs).sum(1), within[items], rtol=1e-4)
    plain = item_logprobs(*model, (8, 9, 3), TRIE, within=False)
    np.testing.assert_allclose(np.asarray(found.logprobs).sum(1), plain[items], rtol=1e-4)
    assert np.exp(plain).sum() < 1


@pytest.mark.parametrize("length", [3, 1])
def test_beams_rank_items_by_their_probability(model, length):
    prompt = (8, 9, 3)[:length]
    found = recommend(*model, Prompts.of([list(prompt)]), TRIE, k=5, beams=30)
    plain = item_logprobs(*model, prompt, TRIE, within=False)
    best = np.argsort(-plain)[:5]
    np.testing.assert_array_equal(found.items[0], best)
    np.testing.assert_allclose(found.scores[0], plain[best], rtol=1e-4)


def test_a_catalogue_may_have_fewer_items_than_are_wanted(model):
    small = TokenTrie.of([(1, 2), (3,)], [1.0, 2.0], END)
    found = recommend(*model, PROMPTS, small, k=4)
    assert np.all(np.sort(found.items, axis=1) == [-1, -1, 0, 1])
    assert np.all(np.isneginf(found.scores) == (found.items < 0))


def test_exact_flows_recommend_in_proportion_to_weights():
    table = flow_policy(example(), 5)
    np.testing.assert_allclose(np.exp(table[:-1]).sum(1), 1.0)
    np.testing.assert_allclose(np.exp(table[0, END]), 3.059e-7, rtol=1e-4)
    for item, weight in zip(example().items, example().weights, strict=True):
        node, logp = 0, 0.0
        for token in (*item, END):
            logp += table[node, token]
            child, _ = example().arrays(5).step(jnp.int32(node), jnp.int32(token))
            node = int(child)
        np.testing.assert_allclose(np.exp(logp), weight / 12, rtol=1e-6)
