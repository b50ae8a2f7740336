"""Effective ranks of real tokens and of the mask, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import DataError
from tokjax.models import ModelConfig
from tokjax.models.encoder import Encoder
from tokjax.signals.mask_ranks import mask_ranks
from tokjax.signals.representation import effective_rank, spectrum, state_moments

MODEL = Encoder(
    ModelConfig(
        vocab_size=32, d_model=16, n_layers=2, n_heads=2, d_ff=24, causal=False, init_scale=1.0
    )
)
MASK = 31
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, MASK, (2, 4, 12)).astype(np.int32)
MASKS = RNG.random((2, 4, 12)) < 0.3
TOKENS[MASKS] = MASK
SEGMENTS = np.ones((2, 4, 12), np.int32)
SEGMENTS[:, 1, 9:] = 0


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


def batches(tokens=TOKENS, masks=MASKS):
    return [tuple(map(jnp.asarray, each)) for each in zip(tokens, masks, SEGMENTS, strict=True)]


@pytest.mark.parametrize(("share", "rank"), [(0.9, 3), (0.8, 2), (1.0, 4)])
def test_the_rank_of_known_singular_values(share, rank):
    energies = jnp.square(jnp.array([4.0, 3.0, 2.0, 1.0]))
    assert float(effective_rank(energies, share=share)) == rank


def test_ranks_of_a_line_and_of_isotropic_states():
    line = jnp.outer(jnp.arange(1.0, 9.0), jnp.array([1.0, -2.0, 0.5]))[None]
    full = jnp.asarray(RNG.normal(size=(1, 4000, 32)), jnp.float32)
    ranks = [
        float(effective_rank(spectrum(state_moments(x, jnp.ones(x.shape[:2], bool)), False)))
        for x in (line, full)
    ]
    assert ranks[0] == 1 and 27 <= ranks[1] <= 29


def test_ranks_are_those_of_all_states_stacked(params):
    found = mask_ranks(MODEL, params, batches(), share=0.999)
    stacked = {True: [[] for _ in range(3)], False: [[] for _ in range(3)]}
    for tokens, masks, segments in batches():
        out = MODEL.backbone(
            params, MODEL.embed(params, tokens), segments=segments,
            capture={"resid_pre", "resid_post"},
        )  # fmt: skip
        layers = [out.captured["resid_pre"][0], *out.captured["resid_post"]]
        for masked in (True, False):
            own = np.asarray((masks == masked) & (segments > 0))
            for layer, states in zip(stacked[masked], layers, strict=True):
                layer.append(np.asarray(states)[own])
    for masked, ranks in ((False, found.real), (True, found.mask)):
        expected = []
        for layer in stacked[masked]:
            energy = np.square(np.linalg.svd(np.concatenate(layer), compute_uv=False))
            expected.append(int((np.cumsum(energy) / energy.sum() < 0.999 - 1e-6).sum()) + 1)
        assert ranks.tolist() == expected
    # The mask enters as one vector, and its states come apart in the layers.
    assert found.mask[0] == 1 and found.mask[1] > 1


def test_filling_counts_for_nothing_and_no_mask_has_rank_zero(params):
    other = np.where(SEGMENTS == 0, 5, TOKENS)
    for a, b in zip(
        jax.tree.leaves(mask_ranks(MODEL, params, batches())),
        jax.tree.leaves(mask_ranks(MODEL, params, batches(other))),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    none = mask_ranks(MODEL, params, batches(masks=np.zeros_like(MASKS)))
    assert none.mask.tolist() == [0, 0, 0] and none.real.min() > 1


def test_no_batch_is_refused(params):
    with pytest.raises(DataError, match="no batch"):
        mask_ranks(MODEL, params, [])
