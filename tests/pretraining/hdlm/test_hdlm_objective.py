"""The objective: who sees whom, one pass against a pass for each block, losses by hand, limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.config import load, resolve
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.models.encoder import Encoder
from tokjax.pretraining.hdlm import (
    HDLM,
    Block,
    EpsilonHybrid,
    GammaHybrid,
    Hybrid,
    SimpleAnnealing,
    autoregressive,
)
from tokjax.pretraining.hdlm.draws import spread
from tokjax.pretraining.hdlm.masks import one_pass_mask, step_mask
from tokjax.pretraining.hdlm.passes import block_states, step_states
from tokjax.training.config import TrainConfig

V, B, T = 7, 3, 8
MASK = V
CONFIG = ModelConfig(
    vocab_size=V + 1, d_model=16, n_layers=2, n_heads=2, d_ff=24, remat="none", causal=False,
    max_positions=2 * T, init_scale=0.6,
)  # fmt: skip
MODEL = Encoder(CONFIG)
KEY = jax.random.key(5)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, V, (B, T)).astype(np.int32)
NOISED = np.where(RNG.random((B, T)) < 0.5, MASK, (TOKENS + 1) % V).astype(np.int32)
PLACES = jnp.broadcast_to(jnp.arange(T), (B, T))
ONES = jnp.ones((B, T), jnp.int32)


def batch_of(tokens, segments=ONES, weights=None):
    ids, segments = jnp.asarray(tokens, jnp.int32), np.asarray(segments, np.int32)
    positions = np.zeros_like(segments)
    for row, own in zip(positions, segments, strict=True):
        for segment in set(own.tolist()):
            row[own == segment] = np.arange((own == segment).sum())
    return Batch(
        tokens=ids,
        targets=jnp.roll(ids, -1, 1),
        positions=jnp.asarray(positions),
        segment_ids=jnp.asarray(segments),
        weights=jnp.asarray(segments > 0 if weights is None else weights, jnp.float32),
        example_id=jnp.zeros((len(ids), 2), jnp.int32),
    )


BATCH = batch_of(TOKENS)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(1))


@jax.jit
def stepped(params, tokens, visible):
    return step_states(MODEL, params, tokens, visible, PLACES)


@jax.jit
def both_copies(params, clean, noised):
    return block_states(MODEL, params, clean, noised, PLACES, ONES, 2)


def classes(settled, active):
    """Flags of rows whose first positions are settled and whose next ones are active."""
    places = np.arange(T)[None].repeat(B, 0)
    return places < settled, (places >= settled) & (places < settled + active)


def of(objective, **changes):
    return dataclasses.replace(objective, mask_id=MASK, random_ids=V, **changes)


def test_classes_see_what_the_method_says():
    places = jnp.arange(6)[None]
    settled, active = places < 4, places == 4
    found = np.asarray(step_mask(places, settled, active, 2)[0]).astype(int).tolist()
    assert found == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],  # a worthless position sees itself, or its softmax were NaN
    ]
    causal = np.asarray(step_mask(places, settled, active, 2, "causal")[0])
    assert (causal[:4, :4] == np.tri(4, dtype=bool)).all()
    assert np.asarray(step_mask(places, settled, active, 2, "full")[0])[:4, :4].all()
    triangle = step_mask(places, settled & False, places < 3, 2, "causal", "causal")[0]
    assert (np.asarray(triangle)[:3, :3] == np.tri(3, dtype=bool)).all()


def test_worthless_positions_leak_nothing_and_settled_ones_depend_on_no_active(params):
    settled, active = classes(4, 2)
    visible = step_mask(PLACES, settled, active, 2)
    start = np.where(settled, TOKENS, NOISED)
    before = np.asarray(stepped(params, start, visible))
    assert np.isfinite(before).all()
    other = np.where(settled | active, start, (start + 3) % V)
    assert (other != start)[:, 6:].all()
    after = np.asarray(stepped(params, other, visible))
    np.testing.assert_array_equal(after[:, :6], before[:, :6])
    assert np.abs(after - before)[:, 6:].max() > 1e-3
    moved = np.where(active, (start + 3) % V, start)
    after = np.asarray(stepped(params, moved, visible))
    np.testing.assert_array_equal(after[:, :4], before[:, :4])
    assert np.abs(after - before)[:, 4:6].max() > 1e-3
    earlier = start.copy()
    earlier[:, 1] = (start[:, 1] + 3) % V
    assert np.abs(np.asarray(stepped(params, earlier, visible)) - before)[:, 4:6].max() > 1e-3


def test_one_pass_equals_a_pass_for_each_block(params):
    noisy, clean = both_copies(params, TOKENS, NOISED)
    for start in range(0, T, 2):
        settled, active = classes(start, 2)
        tokens = np.where(active, NOISED, TOKENS)
        alone = stepped(params, tokens, step_mask(PLACES, settled, active, 2))
        np.testing.assert_allclose(
            noisy[:, start : start + 2], alone[:, start : start + 2], atol=2e-5
        )
        np.testing.assert_allclose(clean[:, :start], alone[:, :start], atol=2e-5)
    # With all positions settled, the clean copy.
    everything = step_mask(PLACES, *classes(T, 0), 2)
    np.testing.assert_allclose(clean, stepped(params, TOKENS, everything), atol=2e-5)


def test_a_block_changes_no_block_before_it(params):
    before, _ = both_copies(params, TOKENS, NOISED)
    clean, noised = TOKENS.copy(), NOISED.copy()
    clean[:, 4:6], noised[:, 4:6] = (TOKENS[:, 4:6] + 2) % V, (TOKENS[:, 4:6] + 3) % V
    after, _ = both_copies(params, clean, noised)
    changed = np.abs(np.asarray(after - before)).max((0, 2))
    assert (changed[:4] == 0).all() and (changed[4:] > 1e-4).all()
    # The noisy copy of a block is seen by itself alone.
    after, _ = both_copies(params, TOKENS, noised)
    assert (np.abs(np.asarray(after - before)).max((0, 2))[6:] == 0).all()


def test_shifted_predictions_come_from_the_state_before(params):
    noisy, clean = both_copies(params, TOKENS, NOISED)
    run = jax.jit(lambda p: block_states(MODEL, p, TOKENS, NOISED, PLACES, ONES, 2, shifted=True))
    shifted, _ = run(params)
    np.testing.assert_allclose(shifted[:, 1], noisy[:, 0], atol=1e-5)
    np.testing.assert_allclose(shifted[:, 4], clean[:, 3], atol=1e-5)  # a block's first token
    eligible = np.asarray(of(HDLM(Block(2)), shifted=True).eligible(BATCH))
    assert not eligible[:, 0].any() and eligible[:, 1:].all()


def test_packed_texts_are_as_if_alone(params):
    packed = batch_of(TOKENS, np.array([[1] * 4 + [2] * 4] * B))

    @jax.jit
    def run(params, tokens, noised, positions, segments):
        return block_states(MODEL, params, tokens, noised, positions, segments, 2)[0]

    whole = run(params, TOKENS, NOISED, packed.positions, packed.segment_ids)
    # The second text alone, behind filling that must not be seen either.
    segments = jnp.where(packed.segment_ids == 2, 2, 0)
    other = np.where(segments == 0, (TOKENS + 1) % V, TOKENS)
    alone = run(params, other, NOISED, packed.positions, segments)
    np.testing.assert_allclose(whole[:, 4:], alone[:, 4:], atol=2e-5)
    first, _ = both_copies(params, TOKENS, NOISED)
    np.testing.assert_allclose(whole[:, :4], first[:, :4], atol=2e-5)


def dense_logits(params, x):
    """Logits without the mask, by a plain product."""
    return np.asarray(x, np.float64) @ np.asarray(params["embedding"], np.float64).T[:, :V]


def nll_of(params, x, targets):
    z = dense_logits(params, x)
    z = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return -np.take_along_axis(z, np.asarray(targets)[..., None], -1)[..., 0]


def run_of(objective):
    """A function giving the loss, its gradient, and what it is made of."""

    @jax.jit
    def run(params):
        gradient, found = jax.grad(lambda p: _total(objective, p), has_aux=True)(params)
        draw, corrupt = jax.random.split(KEY)
        step = objective.drawn(BATCH, draw)
        noised = objective.noised(BATCH, step, corrupt)
        x, clean, _ = objective.states(MODEL, params, BATCH, step, noised.tokens)
        return found, gradient, step, noised, x, clean

    return run


def _total(objective, params):
    found = objective.loss(MODEL, params, (), BATCH, KEY)
    return found.total, found


@pytest.mark.parametrize(
    "objective",
    [
        HDLM(Block(2, 3), times="levels"),
        HDLM(SimpleAnnealing(4, 4), noise=EpsilonHybrid(0.3, 0.5)),
        HDLM(noise=EpsilonHybrid(0.0, 0.0)),
    ],
    ids=["blocks", "annealing", "diffusion"],
)
def test_the_loss_is_the_weighted_cross_entropy_of_active_tokens(params, objective):
    objective = of(objective)
    found, gradient, step, noised, x, _ = run_of(objective)(params)
    nll = nll_of(params, x, TOKENS)
    active, masked, p = (np.asarray(a) for a in (step.active, noised.masked, step.p))
    e, lam = objective.noise.epsilon, objective.noise.visible_weight
    visible = lam * np.where(noised.replaced, 1 - e, e)
    weights = np.where(active, np.where(masked, 1 / np.maximum(p, 1e-4), visible), 0)
    assert active.any(1).all() and float(found.weight) == active.sum()
    assert float(found.total) == pytest.approx((weights * nll).sum(), rel=1e-4)
    bound, count = found.metrics["bound"]
    assert float(bound) == pytest.approx((nll / np.maximum(p, 1e-4))[masked].sum(), rel=1e-4)
    assert float(count) == active.sum()
    if lam == 0:  # masked diffusion's loss
        assert float(found.total) == pytest.approx(float(bound), rel=1e-6)
    if objective.times == "levels":
        assert {round(float(level), 4) for level in p.ravel()} <= {0.001, 0.5, 0.999}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.abs(gradient["layers"]["attention"]["query"]).max() > 0


def test_blocks_of_one_token_at_one_level_are_autoregression(params):
    objective = of(HDLM(autoregressive(), noise=EpsilonHybrid(0.3, 1.0)))
    found = jax.jit(lambda p: _total(objective, p)[1])(params)
    nll = np.zeros((B, T))
    for i in range(T):
        tokens = np.where(np.arange(T) == i, MASK, TOKENS)
        alone = stepped(params, tokens, step_mask(PLACES, *classes(i, 1), 1))
        nll[:, i] = nll_of(params, alone[:, i], TOKENS[:, i])
    assert float(found.total / found.weight) == pytest.approx(nll.mean(), rel=1e-4)
    assert float(found.metrics["masked"][0]) == B * T  # nothing is visible, nothing is replaced


def test_gamma_noise_is_trained_by_score_entropy_and_settled_tokens(params):
    objective = of(HDLM(Block(2), noise=GammaHybrid(0.3)))
    assert objective.weight_of_settled == 1
    found, gradient, step, noised, x, clean = run_of(objective)(params)
    z = np.concatenate([dense_logits(params, x), np.zeros((B, T, 1))], -1).reshape(B * T, -1)
    time, noise = jnp.maximum(step.p, 1e-4).ravel(), objective.noise
    entropy = noise.rate(time) * noise.score_entropy(
        jnp.asarray(z, jnp.float32), noised.tokens.ravel(), jnp.asarray(TOKENS.ravel()),
        noise.sigma(time), MASK,
    )  # fmt: skip
    settled = nll_of(params, clean, TOKENS).mean()
    assert float(found.metrics["score_entropy"][0]) == pytest.approx(float(entropy.sum()), rel=1e-3)
    assert float(found.metrics["nll_settled"][0]) == pytest.approx(settled * B * T, rel=1e-4)
    assert float(found.total) == pytest.approx(float(entropy.sum()) + settled * B * T, rel=1e-3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert of(HDLM(noise=GammaHybrid(0.3), settled_weight=0.0)).weight_of_settled == 0


def test_prompts_are_never_noised_and_fillings_do_not_count():
    segments = np.array([[1] * 8, [1] * 5 + [0] * 3, [1] * 3 + [2] * 5])
    weights = np.where(np.arange(T) < 2, 0, segments > 0)
    batch = batch_of(TOKENS, segments, weights)
    for schedule in (Block(2), Hybrid(4, 2)):
        objective = of(HDLM(schedule, noise=EpsilonHybrid(1.0)))
        run = jax.jit(lambda key, o=objective: o.noised(batch, o.drawn(batch, key), KEY))
        for seed in range(3):
            found = run(jax.random.key(seed))
            changed = np.asarray(found.masked | found.replaced)
            eligible = np.asarray(objective.eligible(batch))
            assert not changed[~eligible].any() and not eligible[segments == 0].any()
            np.testing.assert_array_equal(np.asarray(found.tokens)[~changed], TOKENS[~changed])
    # The weight of a target stands at the token before it.
    assert np.asarray(of(HDLM()).eligible(batch))[0].tolist() == [False] * 3 + [True] * 5


def test_each_text_is_trained_at_steps_that_it_takes():
    segments = np.array([[1] * 2 + [2] * 6] * B)
    batch = batch_of(TOKENS, segments)
    objective = of(HDLM(SimpleAnnealing(3, 3)))
    table, seen = objective.schedule.table(T), set()
    drawn = jax.jit(lambda key: objective.drawn(batch, key))
    for seed in range(20):
        step = drawn(jax.random.key(seed))
        active = np.asarray(step.active)
        assert active[:, :2].any(1).all() and active[:, 2:].any(1).all()
        assert not np.asarray(step.settled & step.active).any()
        seen |= {"".join(map(str, row[:2].astype(int))) for row in active}
    assert seen == {"10", "11", "01"} and table.steps_of(2) == 4


def test_times_are_spread_evenly_over_blocks():
    texts = np.array([[1] * 8, [1] * 4 + [2] * 4])
    blocks = np.arange(8)[None] // 2 % np.array([[4], [2]])
    found = np.asarray(spread(KEY, jnp.asarray(texts), jnp.asarray(blocks)))
    np.testing.assert_array_equal(found[:, ::2], found[:, 1::2])
    gaps = np.diff(np.sort(found[:, ::2].ravel()))
    np.testing.assert_allclose(gaps, 1 / 8, atol=1e-6)
    assert np.abs(np.diff(found[0, ::2])).max() > 0.2  # in no order


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: HDLM(times="level"), "Did you mean 'levels'"),
        (lambda: HDLM(passes="two"), "unknown passes='two'"),
        (lambda: HDLM(Hybrid(4), passes="one"), "passes='one' is for blocks"),
        (lambda: HDLM(SimpleAnnealing(4), times="continuous"), "is for blocks"),
        (lambda: HDLM(passes="one", settled_attention="full"), "set passes='step'"),
        (lambda: HDLM(active_attention="ful"), "Did you mean 'full'"),
        (lambda: HDLM(settled_weight=-1.0), "settled_weight"),
        (lambda: HDLM().ids(), "name mask_id"),
        (lambda: one_pass_mask(PLACES, 2, "full"), "one pass for all blocks"),
    ],
)
def test_impossible_settings_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"causal": True}, r"set model\.causal=False"),
        ({"positions": "relative"}, "positions='relative'"),
        ({"sliding_window": 4}, "sliding_window"),
        ({"logit_softcap": 5.0}, "logit_softcap"),
        ({"positions": "learned", "max_positions": T}, "max_positions=16 or more"),
    ],
)
def test_models_that_do_not_fit_are_refused(params, changes, said):
    config = dataclasses.replace(CONFIG, **changes)
    model = Transformer(config) if config.causal else Encoder(config)
    with pytest.raises(ConfigError, match=said):
        of(HDLM(Block(2))).loss(model, params, (), BATCH, KEY)


def test_a_visible_of_another_shape_is_refused(params):
    x = MODEL.embed(params, jnp.asarray(TOKENS))
    with pytest.raises(ValueError, match=r"each of 8 queries which of 8 keys"):
        MODEL.backbone(params, x, visible=jnp.ones((B, T, T - 1), bool))
    with pytest.raises(ValueError, match=r"must be \[B, T, S\] for 3 rows"):
        MODEL.backbone(params, x, visible=jnp.ones((2, T, T), bool))
    windowed = Encoder(dataclasses.replace(CONFIG, sliding_window=2))
    with pytest.raises(ValueError, match="cannot be combined"):
        windowed.backbone(params, x, visible=jnp.ones((B, T, T), bool))


def test_the_config_says_what_it_trains():
    found = resolve(TrainConfig, load("configs/hdlm.py:width=8"))
    assert isinstance(found.objective, HDLM) and found.objective.schedule == Block(8, 8)
    assert not found.model.causal and found.ema_decay is not None
    found = resolve(TrainConfig, load("configs/hdlm.py:width=0"))
    assert found.objective.schedule.width is None and found.objective.relative_cost == 1


def test_a_run_trains_and_its_texts_are_written_by_a_command(tiny_tree, tmp_path, capsys):
    from tokjax.pretraining.hdlm.__main__ import main
    from tokjax.training.loop import train
    from tokjax.training.run import build_run

    tree = tiny_tree(
        objective={"name": "hdlm", "schedule": {"name": "block", "width": 4, "tau": 2}},
        model__causal=False,
        model__vocab_size=258,
        model__n_layers=1,
        model__remat="none",
        data__seq_len=16,
        steps=2,
        evaluation__every_steps=2,
    )
    run = build_run(resolve(TrainConfig, tree), devices=jax.devices()[:1], show_progress=False)
    objective = run.stages[0].objective
    assert isinstance(objective, HDLM) and objective.ids() == (257, 257)
    result = train(run, tmp_path / "run")
    assert np.isfinite(result.metrics["eval/validation/bound"])
    given = [f"--model={tmp_path / 'run'}", "--prompt=ab", "--length=8", "--steps=1", "--samples=2"]
    assert main(given) == 0
    assert capsys.readouterr().out.count("ab") >= 2
    with pytest.raises(ConfigError, match="does not fit"):
        main([*given, "--sampler=reverse"])
