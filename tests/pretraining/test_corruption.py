import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.pretraining.corruption import BERT, Corruption, corrupt, with_ids

MASK, IDS = 50, 50
B, T = 40, 256
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, IDS, (B, T)), jnp.int32)
ELIGIBLE = jnp.asarray(np.random.default_rng(1).uniform(size=(B, T)) < 0.8)


def shares(spec, rate=None):
    found = corrupt(jax.random.key(3), TOKENS, ELIGIBLE, spec, rate)
    chosen = np.asarray(found.chosen)
    after, before = np.asarray(found.tokens), np.asarray(TOKENS)
    assert (after[~chosen] == before[~chosen]).all()
    assert not (chosen & ~np.asarray(ELIGIBLE)).any()
    masked = (after == MASK) & chosen
    moved = (after != before) & chosen & ~masked
    count = chosen.sum()
    return chosen, masked.sum() / count, moved.sum() / count


@pytest.mark.parametrize("count", ["bernoulli", "fixed"])
def test_shares_are_those_of_the_specification(count):
    chosen, masked, moved = shares(Corruption(count=count, mask_id=MASK, random_ids=IDS))
    eligible = int(ELIGIBLE.sum())
    deviation = (0.15 * 0.85 / eligible) ** 0.5
    assert abs(chosen.sum() / eligible - 0.15) < 5 * deviation
    assert abs(masked - 0.9) < 5 * (0.09 / chosen.sum()) ** 0.5
    # One random id in IDS is the old one; none is kept on purpose.
    assert abs(moved - 0.1 * (1 - 1 / IDS)) < 5 * (0.09 / chosen.sum()) ** 0.5


def test_bert_keeps_a_tenth_as_it_is():
    spec = Corruption(masked=BERT.masked, random=BERT.random, mask_id=MASK, random_ids=IDS)
    chosen, masked, moved = shares(spec)
    assert abs(masked - 0.8) < 5 * (0.16 / chosen.sum()) ** 0.5
    assert abs(1 - masked - moved - 0.1) < 5 * (0.12 / chosen.sum()) ** 0.5


def test_fixed_counts_are_the_nearest_whole_number_of_each_row():
    spec = Corruption(count="fixed", mask_id=MASK, random_ids=IDS)
    chosen, *_ = shares(spec)
    expected = np.floor(0.15 * np.asarray(ELIGIBLE).sum(-1) + 0.5)
    assert (chosen.sum(-1) == expected).all()
    assert chosen.sum(-1).max() <= spec.most(T)
    one = corrupt(jax.random.key(0), TOKENS[:2, :3], ELIGIBLE[:2, :3] | True, spec)
    assert one.chosen.sum(-1).tolist() == [1, 1] and spec.most(3) == 1
    none = corrupt(jax.random.key(0), TOKENS[:2], jnp.zeros((2, T), bool), spec)
    assert not none.chosen.any() and (none.tokens == TOKENS[:2]).all()


@pytest.mark.parametrize("count", ["bernoulli", "fixed"])
def test_each_row_may_have_a_rate_of_its_own(count):
    spec = Corruption(count=count, masked=1.0, random=0.0, mask_id=MASK)
    rates = jnp.linspace(0.1, 1.0, B)
    chosen, masked, _ = shares(spec, rates)
    assert masked == 1
    assert (chosen[-1] == np.asarray(ELIGIBLE[-1])).all()
    assert chosen[0].sum() < 0.25 * ELIGIBLE[0].sum()


def test_rows_are_drawn_apart_and_keys_decide():
    spec = Corruption(mask_id=MASK, random_ids=IDS)
    one, again, other = (corrupt(jax.random.key(k), TOKENS, ELIGIBLE, spec) for k in (1, 1, 2))
    assert (one.tokens == again.tokens).all() and (one.chosen != other.chosen).any()
    assert (one.chosen[0] != one.chosen[1]).any()


def test_open_ids_are_the_tokenizers_or_refused():
    assert with_ids(Corruption(), 40, {"<s>": 0}, 41).mask_id == 40
    named = with_ids(Corruption(), 40, {"[MASK]": 3}, 40)
    assert (named.mask_id, named.random_ids) == (3, 40)
    assert with_ids(Corruption(mask_id=7, random_ids=5), 40, {}, 40).random_ids == 5
    with pytest.raises(ConfigError, match=r"set model\.vocab_size=41"):
        with_ids(Corruption(), 40, {}, 40)
    with pytest.raises(ConfigError, match="mask_id=99 is not among the model's 40 ids"):
        with_ids(Corruption(mask_id=99), 40, {}, 40)
    with pytest.raises(ConfigError, match="mask_id is not known"):
        corrupt(jax.random.key(0), TOKENS, ELIGIBLE, Corruption())
    with pytest.raises(ConfigError, match="random_ids is not known"):
        corrupt(jax.random.key(0), TOKENS, ELIGIBLE, Corruption(mask_id=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "chooses no token"),
        ({"rate": 1.5}, "rate=1.5 must lie in"),
        ({"masked": 0.8, "random": 0.3}, "sum to more than 1"),
        ({"count": "fixd"}, "fixed"),
    ],
)
def test_impossible_specifications_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Corruption(**options)
