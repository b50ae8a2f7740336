"""UniR: the reasoner learns the guided distribution's gradient, the backbone nothing."""

import dataclasses
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tokjax
from tokjax.config import resolve
from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.decoding import Prompts, decode
from tokjax.decoding.contrast import with_reasoners
from tokjax.errors import CheckpointError, ConfigError
from tokjax.generate import main as generate
from tokjax.language_model import LanguageModel
from tokjax.models import ModelConfig, Transformer
from tokjax.models.head import Head, logits, sum_of_logits
from tokjax.reproduction.materials import word_tokenizer
from tokjax.rl.collector import Collector
from tokjax.rl.policy import Policy
from tokjax.rl.unir import UniR
from tokjax.signals import token_stats
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.metrics import read_metrics
from tokjax.training.state import with_models
from tokjax.training.trained import load_trained

BACKBONE, REASONER = jnp.array([2.0, 1.0, 0.0, -1.0]), jnp.array([0.0, 1.5, -0.5, 0.5])


def head_of(z):
    """A hidden state, and a head whose logits are z."""
    return jnp.ones((1, 1, 1)), Head(z[:, None])


def logprob(theirs, ours, target, temperature=1.0, weight=1.0):
    x, head = sum_of_logits([head_of(theirs), head_of(ours)], [1.0, weight], 4)
    head = dataclasses.replace(head, scale=1 / temperature)
    return token_stats(x, head, jnp.array([[target]]), ["logprob"]).logprob[0, 0]


def test_the_joined_head_is_the_papers_distribution():
    def guided(**options):
        return [float(jnp.exp(logprob(BACKBONE, REASONER, v, **options))) for v in range(4)]

    near = lambda a, b: np.testing.assert_allclose(a, b, atol=6e-6)  # noqa: E731
    near(guided(), [0.35551, 0.58613, 0.02918, 0.02918])
    near(guided(weight=0.5), [0.51331, 0.39977, 0.05410, 0.03282])
    near(guided(temperature=0.7), [0.32269, 0.65917, 0.00907, 0.00907])
    near(guided(weight=0.0), jax.nn.softmax(BACKBONE))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_its_gradient_is_that_of_the_guided_distribution(temperature):
    slope = jax.grad(lambda z: logprob(BACKBONE, z, 1, temperature))(REASONER)
    guided = jax.nn.softmax((BACKBONE + REASONER) / temperature)
    np.testing.assert_allclose(slope, (jnp.eye(4)[1] - guided) / temperature, atol=1e-6)
    if temperature == 1:
        np.testing.assert_allclose(slope, [-0.35551, 0.41387, -0.02918, -0.02918], atol=6e-6)
    wrong = jnp.eye(4)[1] - jax.nn.softmax(REASONER)
    np.testing.assert_allclose(wrong, [-0.12925, 0.42074, -0.07839, -0.21310], atol=6e-6)
    assert np.abs(slope - wrong).max() > 0.1


def test_logits_of_several_heads_add_up():
    keys = jax.random.split(jax.random.key(0), 6)
    normal = jax.random.normal
    one = normal(keys[0], (2, 3, 4)), Head(normal(keys[1], (9, 4)), scale=0.5)
    two = normal(keys[2], (2, 3, 6)), Head(normal(keys[3], (7, 6)), bias=normal(keys[4], (7,)))
    x, head = sum_of_logits([one, two], [1.0, -0.7], 7)
    flat = lambda part: logits(part[1], part[0].reshape(6, -1))[:, :7]  # noqa: E731
    np.testing.assert_allclose(flat((x, head)), flat(one) - 0.7 * flat(two), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="capped"):
        sum_of_logits([(one[0], Head(one[1].table, softcap=3.0))], [1.0], 7)


# ---------------------------------------------------------------- runs


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield
    sys.modules.pop("rewards_for_tests", None)


SMALL = {"d_model": 24, "n_layers": 2, "n_heads": 2, "max_positions": 32, "tie_embeddings": False}


def save(folder, change=lambda params: params, **settings):
    """A model with a byte tokenizer, as a checkpoint; its table is padded beyond the ids."""
    model = Transformer(ModelConfig(**{"vocab_size": 264, **SMALL, **settings}))
    params = change(model.init(jax.random.key(5)))
    params = {**params, "embedding": 20 * params["embedding"], "head": params["head"]}
    LanguageModel(model, params, ByteTokenizer(), False).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save(tmp_path_factory.mktemp("backbone") / "b")


@pytest.fixture
def unir_run(rl_run, backbone):
    """A function building a run of a reasoner of width 16 beside the backbone of width 24."""

    def run(devices=1, **changes):
        rollouts = {"group": 4, "minibatches": 2, "max_new_tokens": 3}
        rewards = [{"name": "function", "path": "rewards_for_tests:first_token"}]
        objective = {
            **{"name": "unir", "backbone": backbone, "rewards": rewards, "rollouts": rollouts},
            **changes.pop("objective", {}),
        }
        if "stages" in changes:
            objective = {"name": "next_token"}
        changes = {"objective": objective, "model__tie_embeddings": False, **changes}
        return rl_run(devices, **changes)

    return run


def started(run):
    """A run's first state and the collector of its first stage."""
    state = jax.jit(lambda: run.init_state(run.stages[0], run.initial_params()))()
    state = with_models(state, run.frozen_params(run.stages[0]))
    return state, Collector(
        run.config.objective, run, run.stages[0], Path(run.config.data.cache_dir)
    )


def collected(run):
    """The first state, and the first batch that it collects."""
    state, collector = started(run)
    with collector:
        collector.collect(state, 0)
        rows, chosen = collector.batches[0]
    return state, jax.tree.map(lambda a: jnp.asarray(a[chosen]), rows)


def sampled(run, prompts=((49, 43, 49, 61), (50, 61))):
    state, collector = started(run)
    with collector:
        return collector.sample(state, prompts, 7)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def distance(a, b):
    """Norm of the difference of two trees over the norm of the second."""
    return optax.tree.norm(jax.tree.map(lambda x, y: x - y, a, b)) / optax.tree.norm(b)


def test_the_gradient_is_that_of_finite_differences_and_not_the_reasoners_own(unir_run):
    run = unir_run()
    objective, model = run.config.objective, run.model
    state, batch = collected(run)
    frozen = state.whole["frozen"]

    @jax.jit
    def loss(params, frozen):
        whole = {**params, "frozen": frozen}
        return objective.loss(model, whole, (), batch, jax.random.key(0)).total

    gradient, of_backbone = jax.grad(loss, argnums=(0, 1))(state.params, frozen)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_backbone))

    keys = iter(jax.random.split(jax.random.key(1), 100))
    noise = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), gradient)
    one, other = optax.tree.norm(gradient), optax.tree.norm(noise)
    direction = jax.tree.map(lambda g, n: g / one + n / other, gradient, noise)
    moved = lambda h: jax.tree.map(lambda p, d: p + h * d, state.params, direction)  # noqa: E731
    h = 1e-3
    slope = (float(loss(moved(h), frozen)) - float(loss(moved(-h), frozen))) / (2 * h)
    np.testing.assert_allclose(slope, optax.tree.vdot(gradient, direction), rtol=0.01)

    # Had the loss been built from the reasoner's own distribution, it would be another.
    plain = Policy(**{f.name: getattr(objective, f.name) for f in dataclasses.fields(Policy)})
    alone = plain.score(model, state.params, (), batch)["logprob"]
    wrong_batch = batch.replace(channels={**batch.channels, "old": alone})
    wrong = jax.grad(
        lambda params: plain.loss(model, params, (), wrong_batch, jax.random.key(0)).total
    )(state.params)
    assert distance(wrong, gradient) > 0.1


def test_beside_a_constant_backbone_it_is_the_plain_policy(unir_run, rl_run, tmp_path):
    flat = save(tmp_path / "flat", lambda p: {**p, "head": 0 * p["head"]})
    run = unir_run(objective={"backbone": flat})
    objective = run.config.objective
    state, batch = collected(run)
    plain = Policy(**{f.name: getattr(objective, f.name) for f in dataclasses.fields(Policy)})

    def slope(objective):
        def total(params):
            whole = {**params, "frozen": state.whole["frozen"]}
            return objective.loss(run.model, whole, (), batch, jax.random.key(0)).total

        return jax.value_and_grad(total)(state.params)

    (one, guided), (two, alone) = slope(objective), slope(plain)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    assert distance(guided, alone) < 1e-4


def test_weight_zero_is_bitwise_the_backbone_and_learns_nothing(unir_run, rl_run, tmp_path):
    exact = save(tmp_path / "exact", vocab_size=257)  # the draw of a token depends on their number
    run = unir_run(objective={"weight": 0.0, "backbone": exact})
    plain = rl_run(init_from=exact, model={}, objective__rollouts__temperature=0.7)
    zero, theirs = sampled(run), sampled(plain)
    assert (zero.tokens, zero.logprobs) == (theirs.tokens, theirs.logprobs)
    state, batch = collected(run)
    gradient = jax.grad(
        lambda p: (
            run.config.objective.loss(
                run.model, {**p, "frozen": state.whole["frozen"]}, (), batch, jax.random.key(0)
            ).total
        )
    )(state.params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_a_head_of_zeros_starts_as_the_backbone(unir_run):
    zero = unir_run(objective={"start": "zero_head", "reference": True})
    state, batch = collected(zero)
    assert not np.any(state.params["head"])
    scores = zero.config.objective.score(zero.model, state.whole, (), batch)
    np.testing.assert_allclose(scores["logprob"], scores["reference"], atol=1e-6)
    backbone = unir_run(objective={"weight": 0.0})
    one, two = sampled(zero), sampled(backbone)
    assert (one.tokens, one.logprobs) == (two.tokens, two.logprobs)
    assert sampled(unir_run()).logprobs != two.logprobs


def test_the_reference_is_the_backbone(unir_run):
    run = unir_run(objective={"kl_coef": 0.1})
    state, batch = collected(run)
    model = run.frozen_models(run.stages[0])["backbone"].model
    z = model(
        state.whole["frozen"]["backbone"],
        batch.tokens,
        positions=batch.positions,
        segments=batch.segment_ids,
    )[0]
    logp = jax.nn.log_softmax(z[..., :257] / 0.7)
    expected = jnp.take_along_axis(logp, batch.targets[..., None], -1)[..., 0]
    mask = np.asarray(batch.weights) != 0
    np.testing.assert_allclose(
        np.asarray(batch.channels["reference"])[mask], np.asarray(expected)[mask], atol=1e-5
    )


def test_the_pair_learns_and_the_workdir_holds_the_reasoner_alone(
    unir_run, backbone, tmp_path, capsys
):
    run = unir_run(steps=40, data__batch_size=32, optimizer__peak_lr=2e-2)
    state = train(run, tmp_path / "w").state
    table = read_metrics(tmp_path / "w")
    rewards = [r for r in table["reward/mean"] if r is not None]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2
    # Decoding and training compute one policy.
    assert max(m for m in table["mismatch/max"] if m is not None) < 1e-3
    assert_equal(dict(load_trained(tmp_path / "w").params), state.params)

    # It is attached to a backbone by its workdir, here and from the command line.
    lm, reasoner = tokjax.load(backbone), tokjax.load(tmp_path / "w")
    settings = {"max_new_tokens": 3, "strategy": "reasoners"}
    found = lm.generate(["1+2="], reasoners=str(tmp_path / "w"), **settings)
    pair = with_reasoners(
        (lm.model, lm.params), [(reasoner.model, reasoner.params)], vocab_size=257
    )
    expected = decode(*pair, Prompts.of([lm.encode("1+2=")]), max_new_tokens=3)
    assert found.tokens[0].tolist()[:3] == expected.rows()[0][:3]
    halves = lm.generate(["1+2="], reasoners=[reasoner, reasoner], weights=0.5, **settings)
    np.testing.assert_array_equal(halves.tokens, found.tokens)
    alone = lm.generate(["1+2="], max_new_tokens=3)
    zero = lm.generate(["1+2="], reasoners=[reasoner], weights=[0.0], **settings)
    np.testing.assert_array_equal(zero.tokens, alone.tokens)
    words = [f"--model={backbone}", "--prompt=1+2=", "--max_new_tokens=3"]
    words += ["--strategy=reasoners", f"--option.reasoners={tmp_path / 'w'}"]
    capsys.readouterr()
    assert generate(words) == 0
    assert capsys.readouterr().out == found.texts[0] + "\n"


def test_it_resumes_bit_for_bit_behind_a_warm_start(unir_run, backbone, tmp_path):
    rewards = [{"name": "function", "path": "rewards_for_tests:first_token"}]
    rollouts = {"group": 4, "minibatches": 2, "max_new_tokens": 3}
    guided = {"name": "unir", "backbone": backbone, "rewards": rewards, "rollouts": rollouts}
    stages = [
        {"objective": {"name": "sft"}, "share": 0.25},
        {"objective": {**guided, "start": "zero_head"}, "share": 0.75},
    ]

    def run():
        held = {"name": "arithmetic", "examples": 4, "split": "validation"}
        tree = {"stages": stages, "data__evals": {"held": held}, "data__seq_len": 12}
        answers = {"every_steps": 4, "answers": {"max_new_tokens": 3}}
        return unir_run(**tree, evaluation=answers)

    whole = train(run(), tmp_path / "whole")
    assert "eval/held/accuracy" in whole.metrics
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/step-00000008")
    assert_equal(train(run(), tmp_path / "parts").state.params, whole.state.params)


def test_a_mesh_gives_the_same_scores(unir_run):
    single, sharded = unir_run(), unir_run(devices=8, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    state, batch = collected(single)
    with jax.set_mesh(sharded.mesh):
        other, collector = started(sharded)
        with collector:
            found = collector.scores(
                other, jax.device_get(batch.replace(channels={"decoded": batch.weights}))
            )
    expected = single.config.objective.score(single.model, state.whole, (), batch)
    np.testing.assert_allclose(found["logprob"], expected["logprob"], atol=1e-4)


def test_what_cannot_be_meant_is_refused(unir_run, rl_tree, tmp_path, backbone):
    with pytest.raises(ConfigError, match="needs a backbone"):
        resolve(TrainConfig, {"steps": 1, "objective": {"name": "unir"}})
    with pytest.raises(ConfigError, match=r"start='zero'.* 'zero_head'"):
        UniR(backbone="b", start="zero")
    with pytest.raises(CheckpointError, match="does not exist"):
        unir_run(objective={"backbone": "nowhere"})
    with pytest.raises(ConfigError, match="caps its logits"):
        unir_run(model__logit_softcap=30.0)
    with pytest.raises(ConfigError, match="an output table of its own"):
        unir_run(objective={"start": "zero_head"}, model__tie_embeddings=True)
    with pytest.raises(ConfigError, match="another tokenizer"):
        unir_run(data__tokenizer=word_tokenizer(tmp_path / "words", ["one", "two"]))
    lm = tokjax.load(backbone)
    with pytest.raises(ConfigError, match="name them by the option reasoners"):
        lm.generate(["1"], strategy="reasoners")
    with pytest.raises(ConfigError, match="2 weights for 1 reasoners"):
        lm.generate(["1"], strategy="reasoners", reasoners=[lm], weights=[1.0, 2.0])
