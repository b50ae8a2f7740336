"""Models that an objective reads: at every start from their checkpoint, in none of the run's."""

import shutil
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tokjax.config import register, resolve
from tokjax.errors import CheckpointError, ConfigError
from tokjax.models.scalar_head import init_scalar_head
from tokjax.pretraining.next_token import NextToken
from tokjax.reproduction.materials import word_tokenizer
from tokjax.signals import token_stats
from tokjax.training.config import TrainConfig
from tokjax.training.frozen import frozen_model
from tokjax.training.loop import train
from tokjax.training.objective import Loss, PerToken, WithoutState
from tokjax.training.passes import forward
from tokjax.training.run import build_run
from tokjax.training.trained import load_trained


@register("objective", "test_student")
@dataclass(frozen=True)
class Student(PerToken, WithoutState):
    """KL from a frozen teacher."""

    teacher: str = ""  # checkpoint of the teacher
    heads: bool = False  # read its heads too
    doubled: bool = False  # begin with twice the last norm

    def frozen(self, model):
        return {"teacher": frozen_model(self.teacher, model, heads=self.heads)}

    def begin(self, model, params):
        return {**params, "norm": 2 * params["norm"]} if self.doubled else params

    def loss(self, model, params, aux, batch, key):
        teacher, theirs = self.frozen(model)["teacher"].model, params["frozen"]["teacher"]
        other = forward(teacher, theirs, batch).x, teacher.head(theirs)
        x, counted = forward(model, params, batch).x, batch.weights != 0
        fixed = jax.lax.stop_gradient(other)
        found = token_stats(x, model.head(params), want=["reverse_kl"], other=fixed, mask=counted)
        return Loss(found.reverse_kl.sum(), counted.sum().astype(np.float32))


@register("objective", "test_scored")
@dataclass(frozen=True)
class Scored(NextToken):
    """Next tokens, with a head beside that nothing trains."""

    def init_heads(self, key, model):
        return {"score": init_scalar_head(key, model.config.d_model)}


def run_of(tree, devices=1):
    config = resolve(TrainConfig, tree)
    return build_run(config, devices=jax.devices()[:devices], show_progress=False)


@pytest.fixture
def teacher(tiny_tree, tmp_path, tmp_path_factory):
    """The workdir of a teacher that is wider than its student, with a head; trained once."""
    once = tmp_path_factory.getbasetemp() / "frozen-teacher"
    if not once.exists():
        tree = tiny_tree(steps=2, model__d_model=64, objective={"name": "test_scored"})
        train(run_of(tree), once)
    return shutil.copytree(once, tmp_path / "teacher")


@pytest.fixture
def tree(tiny_tree, teacher):
    """A function giving the configuration of a student's run, with changes."""

    def make(**changes):
        base = {"objective": {"name": "test_student", "teacher": str(teacher)}, "steps": 8}
        return tiny_tree(**{**base, **changes})

    return make


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_it_is_read_and_never_kept(tree, teacher, tmp_path):
    run = run_of(tree(ema_decay=0.9))
    whole = train(run, tmp_path / "whole").state
    theirs = load_trained(teacher)
    assert_equal(whole.frozen["frozen"]["teacher"], dict(theirs.params))
    for part in (whole.params, whole.ema, whole.opt_state[0].mu):
        assert "frozen" not in part
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/step-00000008")
    parts = train(run_of(tree(ema_decay=0.9)), tmp_path / "parts").state
    assert_equal((whole.params, whole.ema), (parts.params, parts.ema))
    found = load_trained(tmp_path / "whole")
    assert_equal(dict(found.params), whole.ema)

    shutil.rmtree(teacher)
    assert_equal(dict(load_trained(tmp_path / "whole").params), whole.ema)
    with pytest.raises(CheckpointError, match="does not exist"):
        run_of(tree())


def test_another_teacher_in_its_place_is_refused(tree, teacher, tiny_tree, tmp_path):
    train(run_of(tree(steps=4)), tmp_path / "w")
    shutil.move(teacher, tmp_path / "moved")
    objective = {"name": "test_student", "teacher": str(tmp_path / "moved")}
    assert train(run_of(tree(steps=4, objective=objective)), tmp_path / "w").finished
    train(run_of(tiny_tree(steps=2, model__d_model=64, seed=1)), teacher)
    with pytest.raises(CheckpointError, match=r"objective\.teacher: .* in the checkpoint"):
        train(run_of(tree(steps=4)), tmp_path / "w")


def test_each_stage_has_its_own(tree, teacher, tmp_path):
    student = {"name": "test_student", "teacher": str(teacher), "doubled": True}
    stages = [
        {"objective": objective, "share": 1 / 3}
        for objective in ({"name": "next_token"}, student, {"name": "next_token"})
    ]
    made = tree(steps=12, stages=stages)
    del made["objective"]
    run = run_of(made)
    assert [bool(run.abstract_state(stage).frozen) for stage in run.stages] == [False, True, False]
    whole = train(run, tmp_path / "w").state
    assert whole.frozen == ()
    # The same from the border at which the second stage begins.
    for step in ("08", "12"):
        shutil.rmtree(tmp_path / f"w/checkpoints/step-000000{step}")
    assert_equal(train(run_of(made), tmp_path / "w").state.params, whole.params)


def test_a_stage_begins_as_its_objective_says(tree, teacher):
    plain, doubled = (
        run_of(tree(objective={"name": "test_student", "teacher": str(teacher), "doubled": d}))
        for d in (False, True)
    )
    one, two = (
        jax.jit(lambda run=run: run.init_state(run.stages[0]))() for run in (plain, doubled)
    )
    assert_equal(two.params.pop("norm"), 2 * one.params.pop("norm"))
    assert_equal(two.params, one.params)


def test_adapters_are_trained_beside_it(tree, teacher, tiny_tree, tmp_path):
    train(run_of(tiny_tree(steps=2)), tmp_path / "base")
    made = tree(steps=4, init_from=str(tmp_path / "base"))
    made["model"] = {"lora": {"rank": 2}}
    state = train(run_of(made), tmp_path / "w").state
    assert set(state.params) == {"layers"}
    base, theirs = load_trained(tmp_path / "base").params, load_trained(teacher).params
    assert_equal(state.frozen, {**base, "frozen": {"teacher": dict(theirs)}})
    again = train(run_of(made), tmp_path / "w").state
    assert_equal(again.frozen, state.frozen)


def test_its_heads_come_along_where_they_are_asked_for(tree, teacher):
    run = run_of(tree(objective__heads=True))
    found = run.frozen_params(run.stages[0])["teacher"]
    assert_equal(found["heads"], load_trained(teacher).heads)
    shapes = run.abstract_state(run.stages[0]).frozen["frozen"]["teacher"]
    assert jax.tree.map(lambda a: a.shape, found) == jax.tree.map(lambda a: a.shape, shapes)


def test_heads_that_are_not_there_are_missed(tree, teacher, tiny_tree, tmp_path):
    train(run_of(tiny_tree(steps=2)), tmp_path / "headless")
    objective = {"name": "test_student", "teacher": str(tmp_path / "headless"), "heads": True}
    with pytest.raises(ConfigError, match="headless' has no heads"):
        run_of(tree(objective=objective))


def test_a_mesh_lays_it_out_and_gives_the_same_student(tree, tmp_path):
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    single = train(run_of(tree(steps=4)), tmp_path / "single").state
    sharded = train(run_of(tree(steps=4, mesh=mesh), devices=8), tmp_path / "sharded").state
    theirs = sharded.frozen["frozen"]["teacher"]
    assert theirs["layers"]["attention"]["query"].sharding.spec == P(None, "fsdp", "tensor")
    np.testing.assert_allclose(
        sharded.params["embedding"], single.params["embedding"], rtol=1e-3, atol=1e-5
    )


def test_it_is_held_in_the_type_that_is_computed_in(tree):
    run = run_of(tree(model__dtype="bfloat16"))
    found = run.frozen_params(run.stages[0])["teacher"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"bfloat16"}


def test_what_cannot_read_the_same_ids_is_refused(tree, tmp_path):
    words = word_tokenizer(tmp_path / "words", ["tokens", "and", "more"])
    with pytest.raises(ConfigError, match="another tokenizer"):
        run_of(tree(data__tokenizer=words))
    with pytest.raises(ConfigError, match=r"data\.seq_len=96 is longer than the 64 positions"):
        run_of(tree(data__seq_len=96, model__max_positions=128))
