import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tokjax.decoding import Prompts, decode
from tokjax.decoding.contrast import contrastive
from tokjax.decoding.contrast.contrastive import contrastive_scores
from tokjax.errors import ConfigError
from tokjax.training.compiles import CompileWatch

NEW = 14


def test_scores_are_the_papers():
    expert = jnp.log(jnp.array([0.55, 0.30, 0.10, 0.05]))
    amateur = jnp.log(jnp.array([0.60, 0.10, 0.20, 0.10]))
    np.testing.assert_allclose(
        contrastive_scores(expert, amateur), [-0.0870, 1.0986, -0.6931, -np.inf], atol=5e-5
    )
    at_half = [0.4238, 3.4012, 0.9163, -np.inf]
    np.testing.assert_allclose(contrastive_scores(expert, amateur / 0.5), at_half, atol=5e-5)
    # With the softened amateur normalised again, one constant apart: the same distribution.
    normalised = contrastive_scores(expert, jax.nn.log_softmax(amateur / 0.5))
    difference = np.asarray(normalised - jnp.array(at_half))[:3]
    np.testing.assert_allclose(difference, np.log((np.exp(amateur) ** 2).sum()), atol=5e-5)
    # The reference code keeps two tokens in beam search.
    kept = contrastive_scores(expert, amateur, plausibility=0.9, min_keep=2)
    assert jnp.isfinite(kept).tolist() == [True, True, False, False]


@pytest.mark.parametrize("context", ["last", "all"])
def test_decoding_equals_recomputation_without_caches(
    lm, small, rows, check_recomputed, masked, context
):
    generation = decode(
        *contrastive(
            (lm.model, lm.params),
            (small.model, small.params),
            weight=0.7,
            temperature=0.5,
            plausibility=0.05,
            context=context,
        ),
        Prompts.of(rows),
        max_new_tokens=NEW,
    )
    for b, row in enumerate(rows):

        def scores(ids, row=row):
            seen = ids if context == "all" else ids[len(row) - 1 :]
            amateur = scipy.special.log_softmax(small.logp(seen)[-1] / 0.5)
            expert = lm.logp(ids)[-1]
            return masked(expert - 0.7 * amateur, expert, 0.05)

        check_recomputed(generation, b, row, scores)


def test_a_weight_of_zero_is_the_expert(lm, small, rows, check_recomputed):
    given = contrastive(
        (lm.model, lm.params), (small.model, small.params), weight=0.0, plausibility=0.0
    )
    generation = decode(*given, Prompts.of(rows), max_new_tokens=NEW)
    for b, row in enumerate(rows):
        check_recomputed(generation, b, row, lambda ids: lm.logp(ids)[-1])


def test_a_row_alone_says_the_same_and_new_values_compile_nothing(lm, small, rows):
    def run(rows, **settings):
        pair = (lm.model, lm.params), (small.model, small.params)
        return decode(*contrastive(*pair, **settings), Prompts.of(rows), max_new_tokens=NEW)

    together = run(rows, weight=0.5)
    alone = run([rows[2]] * 4, weight=0.5)
    assert alone.rows() == together.rows()[2:3] * 4
    with CompileWatch() as watch:
        run(rows, weight=1, temperature=2, plausibility=0)
        assert watch.count == 0


def test_vocabularies_padded_differently_need_the_tokenizers_size(small, make):
    padded = make(vocab_size=64, n_layers=1, seed=5)
    pair = (small.model, small.params), (padded.model, padded.params)
    with pytest.raises(ConfigError, match=r"differ \(expert 61, amateur 64\).*vocab_size"):
        contrastive(*pair)
    with pytest.raises(ConfigError, match="vocab_size=62 is above"):
        contrastive(*pair, vocab_size=62)
    found = decode(*contrastive(*pair, vocab_size=60), Prompts.of([[3, 4]]), max_new_tokens=NEW)
    assert max(found.rows()[0]) < 60


def test_the_amateurs_positions_are_checked(lm, make):
    short = make(max_positions=12, n_layers=1, seed=6)
    pair = (lm.model, lm.params), (short.model, short.params)
    with pytest.raises(ConfigError, match="max_new_tokens=12 exceeds the amateur's"):
        decode(*contrastive(*pair), Prompts.of([[3] * 20]), max_new_tokens=12)
    with pytest.raises(ConfigError, match="max_positions=12"):
        decode(*contrastive(*pair, context="all"), Prompts.of([[3] * 4]), max_new_tokens=12)
    with pytest.raises(ConfigError, match="temperature=0"):
        contrastive(*pair, temperature=0)
    with pytest.raises(ConfigError, match="min_keep=0"):
        contrastive(*pair, min_keep=0)
