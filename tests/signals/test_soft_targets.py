import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.models.head import Head
from tokjax.signals import token_stats, vocabulary, weighted_nll
from tokjax.signals.soft_targets import SoftTargets, label_smoothing

B, T, D, V, K, R = 4, 6, 8, 33, 2, 5
rng = np.random.default_rng(0)
X = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
HEAD = Head(
    jnp.asarray(rng.normal(size=(V, D)), jnp.float32),
    jnp.asarray(rng.normal(size=V), jnp.float32),
    softcap=3.0,
)
IDS = jnp.asarray(rng.integers(0, V, (B, T, K)), jnp.int32)
MASS = jnp.asarray(rng.uniform(size=(B, T, K)), jnp.float32)
ROWS = jnp.asarray(rng.dirichlet(np.ones(V), R), jnp.float32)
ROW_IDS = jnp.asarray(rng.integers(0, R, (B, T)), jnp.int32)
OWN_ROWS = jnp.asarray(rng.dirichlet(np.ones(V), (B, T)), jnp.float32)
PART = jnp.asarray(rng.uniform(size=(B, T)), jnp.float32)
NO_IDS = (jnp.zeros((B, T, 0), jnp.int32), jnp.zeros((B, T, 0)))

SPARSE = (jax.nn.one_hot(IDS, V) * MASS[..., None]).sum(-2)
FORMS = {
    "sparse": (SoftTargets(IDS, MASS), SPARSE),
    "repeated id": (
        SoftTargets(jnp.repeat(IDS[..., :1], 2, axis=-1), MASS),
        jax.nn.one_hot(IDS[..., 0], V) * MASS.sum(-1, keepdims=True),
    ),
    "shared rows": (SoftTargets(rows=ROWS, row_ids=ROW_IDS), ROWS[ROW_IDS]),
    "part of shared rows": (
        SoftTargets(IDS, MASS, ROWS, ROW_IDS, PART),
        SPARSE + PART[..., None] * ROWS[ROW_IDS],
    ),
    "own rows": (SoftTargets(rows=OWN_ROWS, row_probs=PART), PART[..., None] * OWN_ROWS),
    "rest spread evenly": (
        SoftTargets(IDS, MASS / K, uniform=1 - MASS.mean(-1)),
        SPARSE / K + (1 - MASS.mean(-1))[..., None] / V,
    ),
    "negative masses": (SoftTargets(IDS, -MASS, uniform=PART), PART[..., None] / V - SPARSE),
}


def naive(x, head, q):
    z = 3.0 * jnp.tanh((jnp.einsum("btd,vd->btv", x, head.table) + head.bias) / 3.0)
    return -(q * jax.nn.log_softmax(z)).sum(-1)


def from_stats(x, head, soft):
    found = token_stats(x, head, want=["cross_entropy"], soft=soft).cross_entropy
    return (PART * found).sum()


def from_training_loss(x, head, soft):
    return weighted_nll(x, head, *NO_IDS, soft=soft.weighted(PART))[0]


@pytest.mark.parametrize("loss", [from_stats, from_training_loss])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_equals_its_dense_distribution(monkeypatch, form, loss):
    monkeypatch.setattr(vocabulary, "_CHUNK_TOKENS", 5)
    monkeypatch.setattr(vocabulary, "_CHUNK_LOGITS", 1)
    monkeypatch.setattr(vocabulary, "_TILE_LOGITS", 40)
    monkeypatch.setattr(vocabulary, "_UNCUT", 8)
    monkeypatch.setattr(vocabulary, "_BLOCK", 8)
    soft, q = FORMS[form]
    found = jax.jit(jax.value_and_grad(lambda *a: loss(*a, soft), argnums=(0, 1)))(X, HEAD)
    dense = jax.value_and_grad(lambda *a: (PART * naive(*a, q)).sum(), argnums=(0, 1))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        found,
        jax.jit(dense)(X, HEAD),
    )


def test_label_smoothing_is_the_textbook_formula():
    targets = IDS[..., 0]
    soft = label_smoothing(targets, 0.1)
    found = token_stats(X, HEAD, want=["cross_entropy"], soft=soft)
    expected = naive(X, HEAD, 0.9 * jax.nn.one_hot(targets, V) + 0.1 / V)
    np.testing.assert_allclose(found.cross_entropy, expected, rtol=1e-5)
    found = token_stats(
        X, HEAD, want=["cross_entropy"], soft=label_smoothing(targets, 0.1, ROWS, ROW_IDS)
    )
    expected = naive(X, HEAD, 0.9 * jax.nn.one_hot(targets, V) + 0.1 * ROWS[ROW_IDS])
    np.testing.assert_allclose(found.cross_entropy, expected, rtol=1e-5)


def test_all_mass_on_one_id_is_its_nll():
    soft = SoftTargets(IDS[..., :1], jnp.ones((B, T, 1)))
    found = token_stats(X, HEAD, IDS[..., 0], ["nll", "cross_entropy"], soft=soft)
    np.testing.assert_allclose(found.cross_entropy, found.nll, rtol=1e-5)


def test_soft_targets_add_to_the_training_loss_and_to_its_z_loss():
    weights = MASS - 0.3
    both, nll = weighted_nll(X, HEAD, IDS, weights, 0.1, soft=SoftTargets(IDS, MASS))
    joined, _ = weighted_nll(
        X, HEAD, jnp.concatenate([IDS, IDS], -1), jnp.concatenate([weights, MASS], -1), 0.1
    )
    np.testing.assert_allclose(both, joined, rtol=1e-5)
    assert nll.shape == (B, T, K)


def test_targets_are_constants():
    def total(masses):
        soft = SoftTargets(IDS, masses[0], masses[1], ROW_IDS, masses[2], masses[2])
        return from_stats(X, HEAD, soft) + from_training_loss(X, HEAD, soft)

    gradients = jax.jit(jax.grad(total))((MASS, ROWS, PART))
    assert not any(np.asarray(g).any() for g in gradients)


@pytest.mark.parametrize(
    ("soft", "message"),
    [
        (SoftTargets(), "need ids with probs, rows, a uniform mass, or a kernel"),
        (SoftTargets(IDS), "need both ids and probs"),
        (SoftTargets(IDS, MASS[..., :1]), "ids (4, 6, 2) and probs (4, 6, 1) must be alike"),
        (SoftTargets(IDS[0], MASS[0]), "ids (6, 2) must be [B, T, K]"),
        (SoftTargets(rows=ROWS), "rows (5, 33) without row_ids must be [B, T, V] = (4, 6, 33)"),
        (SoftTargets(rows=ROWS[:, 1:], row_ids=ROW_IDS), "rows (5, 32) with row_ids must be"),
        (SoftTargets(IDS, MASS, row_ids=ROW_IDS), "row_ids and row_probs need rows"),
        (SoftTargets(uniform=PART[0]), "uniform (6,) must be [B, T]"),
    ],
)
def test_parts_that_do_not_fit_are_named(soft, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        token_stats(X, HEAD, want=["cross_entropy"], soft=soft)
    with pytest.raises(ValueError, match=re.escape(message)):
        weighted_nll(X, HEAD, *NO_IDS, soft=soft)
