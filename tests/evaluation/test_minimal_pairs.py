import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.evaluation.minimal_pairs import pseudo_logprobs, score_sentences
from tokjax.models import ModelConfig, Transformer
from tokjax.models.encoder import Encoder

SIZES = {
    "vocab_size": 17,
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 2,
    "d_ff": 24,
    "init_scale": 0.5,
}
SENTENCES = [[0, 3, 4, 5, 1], [0, 2, 1], [0, 9, 8, 7, 6, 5, 1]]
MASK = 16


def test_causal_scores_are_sums_of_log_probabilities():
    model = Transformer(ModelConfig(**SIZES))
    params = model.init(jax.random.key(0))
    found = score_sentences(model, params, SENTENCES, batch_size=2)
    for ids, score in zip(SENTENCES, found, strict=True):
        logits, _ = model(params, jnp.array([ids[:-1]]))
        logs = jax.nn.log_softmax(logits)[0]
        assert score == pytest.approx(
            float(logs[jnp.arange(len(ids) - 1), jnp.array(ids[1:])].sum()), rel=1e-5
        )
    ends = score_sentences(model, params, SENTENCES, unscored=[1])
    assert (ends > found).all()


@pytest.mark.parametrize("mlm_head", ["gelu", None])
def test_pseudo_log_likelihoods_mask_one_token_at_a_time(mlm_head):
    model = Encoder(ModelConfig(**SIZES, causal=False, mlm_head=mlm_head))
    params = model.init(jax.random.key(0))
    found = score_sentences(model, params, SENTENCES, mask_id=MASK, batch_size=2)
    for ids, score in zip(SENTENCES, found, strict=True):
        total = 0.0
        for t, own in enumerate(ids):
            masked = jnp.array([ids]).at[0, t].set(MASK)
            x = model.encode(params, masked).x
            x = x if mlm_head is None else model.mlm_hidden(params, x)
            logits = jnp.einsum("d,vd->v", x[0, t], model.head(params).table)
            bias = model.head(params).bias
            logits = logits if bias is None else logits + bias
            total += float(jax.nn.log_softmax(logits)[own])
        assert score == pytest.approx(total, rel=1e-5)


def test_a_token_does_not_see_itself():
    model = Encoder(ModelConfig(**SIZES, causal=False, mlm_head="gelu"))
    params = model.init(jax.random.key(0))
    tokens, mask = np.array([SENTENCES[0]]), np.ones((1, 5), bool)
    at = lambda ids: jax.jit(  # noqa: E731
        lambda t: pseudo_logprobs(model, params, t, mask, MASK)
    )(ids)
    other = tokens.copy()
    other[0, 2] = 12
    shifted = np.asarray(at(other) - at(tokens))[0]
    assert np.abs(np.delete(shifted, 2)).min() > 1e-5  # the others see it
    hidden = np.array([[0, 3, MASK, 5, 1]])
    x = model.mlm_hidden(params, model.encode(params, jnp.asarray(hidden)).x)
    logs = jax.nn.log_softmax(jnp.einsum("d,vd->v", x[0, 2], model.head(params).table) + (
        0 if model.head(params).bias is None else model.head(params).bias
    ))  # fmt: skip
    for ids in (tokens, other):
        assert float(at(ids)[0, 2]) == pytest.approx(float(logs[ids[0, 2]]), rel=1e-5)


def test_what_cannot_be_scored_is_refused():
    model = Encoder(ModelConfig(**SIZES, causal=False))
    with pytest.raises(ConfigError, match="needs mask_id"):
        score_sentences(model, {}, SENTENCES)
    with pytest.raises(ConfigError, match="no token"):
        score_sentences(model, {}, [[]], mask_id=MASK)
