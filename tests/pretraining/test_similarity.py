import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.pretraining import similarity as module
from tokjax.pretraining.similarity import Similarity, profiles, similarities, smoothing_table
from tokjax.signals import SoftTargets, weighted_nll

C = jnp.array([[8, 2, 0], [4, 1, 0], [0, 5, 0], [0, 0, 7], [0, 0, 0]], jnp.float32)
ALL = jnp.ones(5, bool)
Z = jnp.array([2.0, 1, 0, -1, 0])
KINDS = [
    *[Similarity("cosine", t) for t in (None, 0.5)],
    *[Similarity(k, t, rows) for k in ("kl", "js") for t in (None, 0.5) for rows in ("l1", "l2")],
    Similarity("uniform"),
]


def target(y, g, sim, counts=C, allowed=ALL):
    """The target distribution of y, by the table."""
    table = smoothing_table(counts, allowed, sim)
    w = jnp.exp(table.log_prob(table.features[y : y + 1], table.keys)[0]).at[y].set(0.0)
    return ((1 - g) * w).at[y].set(g)


def naive(counts, sim):
    """Weights w [y, v] by the formulas, in float64, all at once."""
    c = np.asarray(counts, np.float64) + 1e-8
    if sim.kind == "uniform":
        S = np.ones((len(c), len(c)))
    elif sim.kind == "cosine":
        n = c / np.linalg.norm(c, axis=-1, keepdims=True)
        S = n @ n.T
    else:
        norm = np.linalg.norm(c, axis=-1) if sim.rows == "l2" else c.sum(-1)
        p = c / norm[:, None]
        kl = lambda a, b: (a * np.log(a / b)).sum(-1)  # noqa: E731
        a, b = p[:, None], p[None]
        m = (a + b) / 2
        d = kl(a, b) if sim.kind == "kl" else (kl(a, m) + kl(b, m)) / 2
        S = 1 - d / d.max(-1, keepdims=True)
    e = np.exp((S - 1) * sim.sharpness) * (1 - np.eye(len(c)))
    missing = np.exp(-sim.sharpness) if sim.normaliser == "reference" else 0.0
    return e / (e.sum(-1, keepdims=True) + missing)


def test_cosines_are_the_known_ones():
    S = similarities(C, Similarity())
    np.testing.assert_allclose(S[0], [1, 1, 0.242536, 0, 0.70014], atol=2e-6)
    assert float(S[2, 4]) == pytest.approx(0.57735, abs=5e-6)
    twelve = jnp.zeros((2, 12)).at[0, 3].set(9.0)
    assert float(similarities(twelve, Similarity())[0, 1]) == pytest.approx(12**-0.5, abs=1e-6)


def test_targets_are_the_known_ones():
    exact = target(0, 0.8, Similarity(temperature=0.5))
    np.testing.assert_allclose(exact, [0.8, 0.105035, 0.023089, 0.014215, 0.057661], atol=1e-6)
    reference = target(0, 0.8, Similarity(temperature=0.5, normaliser="reference"))
    known = [0.8, 0.098065, 0.021557, 0.013272, 0.053834]
    np.testing.assert_allclose(reference, known, atol=1e-6)
    assert float(reference.sum()) == pytest.approx(0.986728, abs=1e-6)
    for normaliser in ("exact", "reference"):
        sharp = target(0, 0.8, Similarity(normaliser=normaliser))
        np.testing.assert_allclose(sharp, [0.8, 0.199999, 0, 0, 1e-6], atol=1e-6)


def test_losses_are_the_known_ones():
    loss = lambda q: float(-(q * jax.nn.log_softmax(Z)).sum())  # noqa: E731
    assert loss(target(0, 0.8, Similarity(temperature=0.5))) == pytest.approx(0.832924, abs=1e-6)
    reference = Similarity(temperature=0.5, normaliser="reference")
    assert loss(target(0, 0.8, reference)) == pytest.approx(0.805456, abs=1e-6)
    assert loss(target(0, 0.8, Similarity())) == pytest.approx(0.723745, abs=1e-6)
    assert loss(target(0, 1.0, Similarity())) == pytest.approx(0.523744, abs=1e-6)


@pytest.mark.parametrize(("normaliser", "mass"), [("exact", 1.0), ("reference", 0.986728)])
def test_the_gradient_of_the_logits_is_the_mass_times_p_less_q(normaliser, mass):
    q = target(0, 0.8, Similarity(temperature=0.5, normaliser=normaliser))
    assert float(q.sum()) == pytest.approx(mass, abs=1e-6)
    head, row = jnp.eye(5), SoftTargets(rows=q[None], row_ids=jnp.zeros((1, 1), jnp.int32))
    none = jnp.zeros((1, 1, 1))

    def loss(z):  # with the identity as head states are logits
        return weighted_nll(z[None, None], head, none.astype(jnp.int32), none, soft=row)[0]

    value, gradient = jax.value_and_grad(loss)(Z)
    known = {"exact": 0.832924, "reference": 0.805456}[normaliser]
    assert float(value) == pytest.approx(known, abs=1e-6)
    np.testing.assert_allclose(gradient, q.sum() * jax.nn.softmax(Z) - q, atol=1e-6)
    assert float(gradient.sum()) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("normaliser", ["exact", "reference"])
@pytest.mark.parametrize("sim", KINDS, ids=str)
def test_every_similarity_is_its_formula(sim, normaliser, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 20)  # blocks of 2 rows and a rest
    if sim.kind == "uniform":
        normaliser = "exact"
    sim = Similarity(sim.kind, sim.temperature, sim.rows, normaliser)
    rng = np.random.default_rng(0)
    counts = jnp.asarray(rng.poisson(2.0, (9, 4)) * rng.integers(0, 2, (9, 4)), jnp.float32)
    table = smoothing_table(counts, jnp.ones(9, bool), sim)
    w = jnp.exp(table.log_prob(table.features, table.keys)) * (1 - jnp.eye(9))
    np.testing.assert_allclose(w, naive(counts, sim), atol=2e-5)


def test_a_temperature_without_end_is_label_smoothing_over_the_others():
    uniform = target(1, 0.6, Similarity("uniform"))
    np.testing.assert_allclose(uniform, [0.1, 0.6, 0.1, 0.1, 0.1], rtol=1e-6)
    for kind in ("cosine", "kl", "js"):
        flat = target(1, 0.6, Similarity(kind, 1e9))
        np.testing.assert_allclose(flat, uniform, rtol=1e-5)


def test_constant_similarities_are_label_smoothing():
    same = jnp.ones((5, 3)) * jnp.arange(1.0, 6.0)[:, None]
    for kind in ("cosine", "kl", "js"):
        found = target(2, 0.5, Similarity(kind), same)
        np.testing.assert_allclose(found, [0.125, 0.125, 0.5, 0.125, 0.125], rtol=1e-4)


def test_sharp_temperatures_stay_finite():
    found = target(0, 0.8, Similarity(temperature=1e-3))
    assert np.isfinite(found).all() and float(found[1]) == pytest.approx(0.2, rel=1e-3)


def test_mass_never_goes_to_ids_that_are_not_allowed():
    allowed = jnp.array([True, False, True, True, False])
    found = target(4, 0.5, Similarity(), allowed=allowed)
    assert found[1] == 0 and float(found.sum()) == pytest.approx(1, abs=1e-6)
    # Without the mask a token without counts gives all it spreads to those alike.
    two = jnp.concatenate([C, jnp.zeros((1, 3))])
    loose = target(4, 0.5, Similarity(), two, jnp.ones(6, bool))
    assert float(loose[5]) == pytest.approx(0.5, abs=1e-4)


def test_profiles_take_any_counts():
    huge = profiles(jnp.array([[3e30, 4e30], [0, 0]]), "l2")
    np.testing.assert_allclose(huge, [[0.6, 0.8], [0.5**0.5, 0.5**0.5]], rtol=1e-6)


def test_impossible_options_are_refused():
    with pytest.raises(ConfigError, match="cosine"):
        Similarity("cosin")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be above 0"):
        Similarity(temperature=0.0)
