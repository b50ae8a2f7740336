"""The configuration: resolving, overriding, loading, explaining."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import ml_collections
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.config import FrozenDict, choices, diff, load, register, resolve, testing, to_dict
from tokjax.config.describe import describe, field_comments, render
from tokjax.config.overrides import apply_overrides, parse_literal, parse_typed
from tokjax.config.schema import Choice
from tokjax.config.testing import check_misspellings, misspellings, undocumented
from tokjax.errors import ConfigError


@register("test_schedule", "constant")
@dataclass(frozen=True)
class Constant:
    warmup_steps: int = 10  # steps of linear rise from zero


@register("test_schedule", "cosine")
@dataclass(frozen=True)
class Cosine:
    warmup_steps: int = 10  # steps of linear rise from zero
    decay_steps: int = 1000  # steps from the peak to the end value
    end_ratio: float = 0.1  # end value over peak value

    def __post_init__(self):
        if not 0 <= self.end_ratio <= 1:
            raise ConfigError(f"end_ratio must be between 0 and 1, got {self.end_ratio}")


@register("test_optimizer", "adamw")
@dataclass(frozen=True)
class AdamW:
    peak_lr: float = 1e-3  # learning rate after warm-up
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    # how the learning rate moves
    # over the steps
    schedule: Annotated[Any, Choice("test_schedule")] = Cosine()  # None is not allowed


@register("test_optimizer", "lion")
@dataclass(frozen=True)
class Lion:
    peak_lr: float = 1e-4  # learning rate after warm-up
    momentum: float = 0.99  # decay of the momentum


@dataclass(frozen=True)
class Stage:
    k: int  # tokens in a patch
    share: float = 1.0  # part of the steps
    note: str | None = None  # free text


@dataclass(frozen=True)
class Data:
    path: str  # file or folder
    seq_len: int = 128  # tokens in a row
    stages: tuple[Stage, ...] = (Stage(4), Stage(1))  # one after another
    rates: tuple[float, float] = (0.5, 0.5)  # of the two sources


@dataclass(frozen=True)
class Example:
    """A schema with every kind of field."""

    data: Data  # what is read
    seed: int = 0  # of everything random
    shuffle: bool = True  # whether rows are shuffled
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the forward pass
    run_name: str = ""  # shown in reports
    clip: float | None = 1.0  # global norm of the gradient; None is no limit
    every: int | Literal["epoch"] = 100  # steps between evaluations
    tags: tuple[str, ...] = ()  # free words
    optimizer: Annotated[Any, Choice("test_optimizer")] = AdamW(peak_lr=5e-4)  # the update
    ema: Annotated[Any, Choice("test_schedule")] | None = None  # schedule of the average
    evals: Mapping[str, Data] = field(default_factory=dict)  # by name
    extra: Stage | None = None  # a further stage


RICH = {
    "data": {
        "path": "a.txt",
        "seq_len": 64,
        "stages": [{"k": 8, "share": 0.5, "note": "first"}, {"k": 1, "share": 0.5, "note": None}],
        "rates": [0.25, 0.75],
    },
    "seed": 3,
    "shuffle": False,
    "dtype": "bfloat16",
    "run_name": "seven",
    "clip": None,
    "every": "epoch",
    "tags": ["a", "b"],
    "optimizer": {
        "name": "adamw",
        "peak_lr": 0.01,
        "b1": 0.8,
        "b2": 0.9,
        "schedule": {
            "name": "cosine",
            "warmup_steps": 1,
            "decay_steps": 5,
            "end_ratio": 0.0,
        },
    },
    "ema": {"name": "constant", "warmup_steps": 2},
    "evals": {"held_out": {"path": "b", "seq_len": 1, "stages": [], "rates": [1.0, 0.0]}},
    "extra": {"k": 2, "share": 1.0, "note": "x"},
}
MINIMAL = {"data": {"path": "a"}}


def changed(path, value, tree=RICH):
    """Returns a copy of the tree with one dotted key set."""
    result = copy.deepcopy(tree)
    node = result
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in parents:
        node = node[key]
    node[last] = value
    return result


def error_of(tree, schema=Example):
    with pytest.raises(ConfigError) as caught:
        resolve(schema, tree)
    return str(caught.value)


# resolve ----------------------------------------------------------------------------------------


def test_a_rich_tree_resolves_and_returns_unchanged():
    config = resolve(Example, RICH)
    assert config.data.stages == (Stage(8, 0.5, "first"), Stage(1, 0.5))
    assert config.optimizer == AdamW(0.01, 0.8, 0.9, Cosine(1, 5, 0.0))
    assert to_dict(config) == RICH
    assert json.loads(json.dumps(to_dict(config))) == RICH


def test_every_misspelt_key_is_refused_and_the_right_one_suggested():
    keys = {(case.path.rpartition(".")[0], case.right) for case in misspellings(Example, RICH)}
    assert len(keys) == 40
    assert ("data.stages.0", "k") in keys
    assert ("optimizer.schedule", "name") in keys
    assert ("evals.held_out", "rates") in keys
    assert ("evals", "held_out") not in keys
    assert check_misspellings(Example, RICH) > 200


def test_misspelling_check_notices_keys_that_are_accepted_or_not_suggested(monkeypatch):
    monkeypatch.setattr(testing, "resolve", lambda schema, tree: None)
    with pytest.raises(AssertionError, match="xata was accepted in place of 'data'"):
        check_misspellings(Example, RICH)

    def refuse(schema, tree):
        raise ConfigError("config.xata: unknown key")

    monkeypatch.setattr(testing, "resolve", refuse)
    with pytest.raises(AssertionError, match="'data' is not suggested for xata"):
        check_misspellings(Example, RICH)


WRONG = [
    ("seed", True, "expected int, got True (bool)"),
    ("seed", 1.0, "expected int, got 1.0 (float). Write 1."),
    ("seed", "1", "Write 1 without quotes"),
    ("seed", None, "expected int, got None"),
    ("shuffle", 1, "expected bool, got 1 (int)"),
    ("shuffle", "yes", "expected bool"),
    ("dtype", "bfloat61", "Did you mean 'bfloat16'?"),
    ("dtype", 16, "expected 'float32' | 'bfloat16', got 16 (int)"),
    ("run_name", 7, "expected str, got 7 (int). Write '7' in quotes."),
    ("run_name", None, "expected str, got None"),
    ("clip", "1.0", "expected float | None"),
    ("clip", True, "expected float | None, got True (bool)"),
    ("clip", float("nan"), "not a finite number"),
    ("clip", float("inf"), "not a finite number"),
    ("every", "epochs", "expected int | 'epoch', got 'epochs' (str)"),
    ("every", 2.5, "expected int | 'epoch'"),
    ("tags", "ab", "expected tuple[str, ...], got 'ab' (str). Write a list: ['ab']."),
    ("run_name", False, "expected str, got False (bool)."),
    ("tags", ["a", 1], "config.tags.1: expected str, got 1"),
    ("data", None, "expected Data, got None"),
    ("data", [1], "expected Data"),
    ("data.stages", {"k": 1}, "expected tuple[Stage, ...]"),
    ("data.stages.1", 4, "config.data.stages.1: expected Stage, got 4"),
    ("data.stages.1.k", "x", "config.data.stages.1.k: expected int, got 'x'"),
    ("data.rates", [1.0], "expected 2 elements, got 1"),
    ("data.rates.0", "x", "config.data.rates.0: expected float"),
    ("optimizer", "lion", "expected choice of test_optimizer, got 'lion' (str). Write {\"name\""),
    ("optimizer", None, "expected choice of test_optimizer, got None"),
    ("optimizer.name", "adam", "there is no test_optimizer 'adam'. Did you mean 'adamw'?"),
    ("optimizer.name", 3, "there is no test_optimizer 3"),
    ("optimizer.schedule", None, "config.optimizer.schedule: expected choice of test_schedule"),
    ("ema", 3, "expected choice of test_schedule | None, got 3 (int)"),
    ("evals", [], "expected mapping[str, Data]"),
    ("evals", {1: {"path": "a"}}, "the key 1 is not a name"),
    ("evals.held_out", 1, "config.evals.held_out: expected Data"),
    ("extra", 3, "config.extra: expected Stage | None"),
    ("extra.k", None, "config.extra.k: expected int, got None"),
    ("data.path", b"a", "expected str, got b'a' (bytes)"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_wrong_values_name_the_key_the_value_and_the_type(path, value, message):
    text = error_of(changed(path, value))
    assert message in text
    assert text.startswith(f"config.{path}")


def test_wrong_types_are_tested_for_every_field():
    tested = {path.split(".")[0] for path, _, _ in WRONG}
    assert tested == {f.name for f in dataclasses.fields(Example)}


def test_all_problems_are_reported_at_once():
    tree = changed("seed", "x", changed("dtype", "f", changed("sead", 1)))
    text = error_of(tree)
    assert text.startswith("3 problems in config:")
    assert all(part in text for part in ("config.seed:", "config.dtype:", "config.sead:"))


def test_a_missing_required_key_is_named_with_its_type():
    assert "config.data.path: missing; it has no default (str)" in error_of({"data": {}})
    assert "config.data: missing" in error_of({})


def test_a_key_of_a_sibling_choice_is_reported_as_unused():
    text = error_of(changed("optimizer.schedule.name", "constant"))
    assert "config.optimizer.schedule: unused: test_schedule 'constant' has no" in text
    assert "'decay_steps', 'end_ratio'; they belong to 'cosine'" in text
    assert """--config.optimizer.schedule='{"name": "constant"}'""" in text
    one = error_of(changed("ema.decay_steps", 3))
    assert "has no 'decay_steps'; it belongs to 'cosine'" in one


def test_errors_of_post_init_get_their_path():
    text = error_of(changed("optimizer.schedule.end_ratio", 2.0))
    assert text == "config.optimizer.schedule: end_ratio must be between 0 and 1, got 2.0"


def test_a_choice_without_a_name_changes_the_default_choice():
    config = resolve(Example, {**MINIMAL, "optimizer": {"b1": 0.5}})
    assert config.optimizer == AdamW(peak_lr=5e-4, b1=0.5)


def test_a_choice_with_a_name_starts_from_its_class():
    config = resolve(Example, {**MINIMAL, "optimizer": {"name": "adamw"}})
    assert config.optimizer == AdamW()


def test_a_choice_without_name_and_default_is_refused():
    text = error_of({**MINIMAL, "ema": {"warmup_steps": 3}})
    assert "config.ema: needs a 'name' that says which test_schedule is meant" in text
    assert "'constant', 'cosine'" in text


def test_a_partial_nested_dataclass_changes_the_default_instance():
    @dataclass(frozen=True)
    class Outer:
        stage: Stage = Stage(7, 0.25)

    assert resolve(Outer, {"stage": {"share": 0.5}}).stage == Stage(7, 0.5)


def test_integers_become_floats_but_bools_do_not():
    value = resolve(Example, changed("clip", 2)).clip
    assert type(value) is float
    assert value == 2.0


def test_instances_are_accepted_in_place_of_trees():
    config = resolve(Example, {"data": Data("a"), "optimizer": Lion(), "extra": Stage(3)})
    assert (config.data, config.optimizer, config.extra) == (Data("a"), Lion(), Stage(3))
    assert "expected choice" in error_of({"data": Data("a"), "optimizer": Stage(3)})


def test_resolved_configs_are_hashable_frozen_and_picklable():
    config = resolve(Example, RICH)
    again = resolve(Example, copy.deepcopy(RICH))
    assert hash(config) == hash(again)
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config
    assert hash(resolve(Example, MINIMAL)) == hash(resolve(Example, MINIMAL))
    for change in (
        lambda d: d.update(a=1),
        lambda d: d.__setitem__("a", 1),
        lambda d: d.pop("held_out"),
        lambda d: d.clear(),
        lambda d: d.setdefault("a", 1),
        lambda d: d.__ior__({"a": 1}),
    ):
        with pytest.raises(TypeError, match="cannot be changed"):
            change(config.evals)
    assert config == again


def test_config_dicts_resolve_like_dicts():
    tree = ml_collections.ConfigDict(copy.deepcopy(RICH))
    tree.data.stages = [ml_collections.ConfigDict(s) for s in RICH["data"]["stages"]]
    assert resolve(Example, tree.lock()) == resolve(Example, RICH)
    assert resolve(Example, ml_collections.FrozenConfigDict(MINIMAL)) == resolve(Example, MINIMAL)


def test_untyped_values_are_frozen_and_others_refused():
    @dataclass(frozen=True)
    class Open:
        options: Any = None

    value = resolve(Open, {"options": {"a": [1, {"b": 2.0}]}}).options
    assert value == {"a": (1, {"b": 2.0})}
    assert hash(value) == hash(FrozenDict(value))
    assert "config.options.a: a set cannot be part" in error_of({"options": {"a": {1}}}, Open)


def test_registering_twice_is_refused_and_reloading_is_not():
    with pytest.raises(ValueError, match="is already"):
        register("test_schedule", "cosine")(Constant)
    with pytest.raises(ValueError, match="already registered as"):
        register("test_schedule", "flat")(Constant)
    with pytest.raises(TypeError, match="frozen dataclass"):
        register("test_schedule", "flat")(dict)
    assert register("test_schedule", "cosine")(Cosine) is Cosine
    assert set(choices("test_schedule")) == {"constant", "cosine"}


def test_a_registered_class_in_a_fixed_place_accepts_only_its_own_name():
    @dataclass(frozen=True)
    class Fixed:
        schedule: Cosine = Cosine()

    tree = to_dict(Fixed())
    assert tree["schedule"]["name"] == "cosine"
    assert resolve(Fixed, tree) == Fixed()
    assert "must be 'cosine' here" in error_of(changed("schedule.name", "constant", tree), Fixed)


SCHEDULES = st.one_of(
    st.builds(Constant, st.integers()),
    st.builds(Cosine, st.integers(), st.integers(), st.floats(0, 1)),
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
STAGES = st.builds(Stage, st.integers(), FLOATS, st.none() | st.text())
DATA = st.builds(
    Data,
    st.text(),
    st.integers(),
    st.lists(STAGES, max_size=3).map(tuple),
    st.tuples(FLOATS, FLOATS),
)
EXAMPLES = st.builds(
    Example,
    DATA,
    seed=st.integers(),
    shuffle=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    run_name=st.text(),
    clip=st.none() | FLOATS,
    every=st.integers() | st.just("epoch"),
    tags=st.lists(st.text(), max_size=3).map(tuple),
    optimizer=st.builds(AdamW, FLOATS, FLOATS, FLOATS, SCHEDULES) | st.builds(Lion, FLOATS, FLOATS),
    ema=st.none() | SCHEDULES,
    evals=st.dictionaries(st.text(min_size=1), DATA, max_size=2).map(FrozenDict),
    extra=st.none() | STAGES,
)


@settings(max_examples=60, deadline=None)
@given(EXAMPLES)
def test_to_dict_and_resolve_are_inverse(config):
    tree = json.loads(json.dumps(to_dict(config)))
    again = resolve(Example, tree)
    assert again == config
    assert hash(again) == hash(config)
    assert to_dict(again) == tree
    assert diff(to_dict(config), tree) == []


def test_diff_names_every_leaf_that_differs():
    other = changed("data.stages.1.k", 9, changed("optimizer.b1", 1, changed("tags", ["a"])))
    del other["extra"]["note"]
    assert diff(RICH, other) == [
        ("data.stages.1.k", 1, 9),
        ("extra.note", "x", "(absent)"),
        ("optimizer.b1", 0.8, 1),
        ("tags.1", "b", "(absent)"),
    ]
    assert diff({"a": []}, {"a": ()}) == []
    assert diff({"a": {}}, {"a": None}) == [("a", {}, None)]
    assert diff({}, {"a": 1}) == [("a", "(absent)", 1)]


# overrides --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("7", 7),
        ("-7", -7),
        ("true", True),
        ("False", False),
        ("none", None),
        ("null", None),
        ("(1,2)", (1, 2)),
        ("[1, null]", [1, None]),
        ('{"name": "lion", "on": true}', {"name": "lion", "on": True}),
        ("adamw", "adamw"),
        ("'7'", "7"),
        ("a b", "a b"),
        ("", ""),
        ("NaN", "NaN"),
        ("1e999", "1e999"),
        ("{1, 2}", "{1, 2}"),
        ("1j", "1j"),
        ("a.b(", "a.b("),
    ],
)
def test_text_is_read_as_literal(text, value):
    read = parse_literal(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("7", str, "7"),
        ("7", str | None, "7"),
        ("none", str, "none"),
        ("none", str | None, None),
        ("none", Literal["none", "all"], "none"),
        ("7", int, 7),
        ("7", int | str, 7),
        ("adamw", int, "adamw"),
    ],
)
def test_text_is_read_by_the_type_of_its_field(text, hint, value):
    assert parse_typed(text, hint) == value


def overridden(*overrides, tree=RICH):
    return resolve(Example, apply_overrides(tree, overrides, Example))


def test_an_override_may_set_keys_that_the_file_leaves_out():
    config = overridden(
        "--config.optimizer.schedule.decay_steps=7",
        "data.stages.1.k=9",
        "run_name=123",
        "evals.new.path=1e3",
        "extra.k=5",
        tree=MINIMAL,
    )
    assert config.optimizer == AdamW(peak_lr=5e-4, schedule=Cosine(decay_steps=7))
    assert config.data.stages == (Stage(4), Stage(9))
    assert (config.run_name, config.extra) == ("123", Stage(5))
    assert config.evals["new"].path == "1e3"


def test_overrides_without_schema_are_validated_by_resolve():
    tree = apply_overrides(MINIMAL, ["optimizer.b1=0.5", "sede=1"])
    assert "config.sede: unknown key. Did you mean 'seed'?" in error_of(tree)


def test_overrides_do_not_change_the_given_tree():
    before = copy.deepcopy(RICH)
    overridden("data.stages.0.k=1", "optimizer.schedule.decay_steps=1")
    assert before == RICH


def test_mapping_overrides_keep_their_values():
    tree = apply_overrides(RICH, {"run_name": "7", "data.stages.0.k": 3, "tags": ("x",)})
    config = resolve(Example, tree)
    assert (config.run_name, config.data.stages[0].k, config.tags) == ("7", 3, ("x",))


def test_a_choice_is_switched_as_a_whole():
    config = overridden('optimizer={"name": "lion", "momentum": 0.5}')
    assert config.optimizer == Lion(momentum=0.5)
    assert overridden("optimizer.name=lion", tree=MINIMAL).optimizer == Lion()
    with pytest.raises(ConfigError, match=r"has no 'b1', 'b2', 'schedule'; they belong to 'adamw'"):
        overridden("optimizer.name=lion")


def test_a_choice_that_is_none_needs_a_name():
    assert overridden("ema.name=cosine", "ema.decay_steps=3", tree=MINIMAL).ema == Cosine(
        decay_steps=3
    )
    with pytest.raises(ConfigError, match=r"config\.ema: needs a 'name'"):
        overridden("ema.warmup_steps=3", tree={**MINIMAL, "ema": None})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1", "seed=2"], "--config.seed is given twice: '1' and '2'"),
        (["seed=1", "--config.seed=1"], "given twice"),
        (["optimizer.b1=1", "optimizer={}"], "--config.optimizer sets the whole"),
        (["data.stages=[]", "data.stages.0.k=1"], "a part of it"),
        (["data.stages.2.k=1"], "config.data.stages is a sequence of 2 elements"),
        (["data.stages.x=1"], "sequence of 2 elements"),
        (["data.stages.-1.k=1"], "sequence of 2 elements"),
        (["seed.x=1"], "config.seed is 3, which has no keys"),
        (["seed"], "has no value; write --config.seed=VALUE"),
        (["a..b=1"], "has an empty part"),
        (["=1"], "has an empty part"),
    ],
)
def test_overrides_that_contradict_or_lead_nowhere_are_refused(overrides, message):
    with pytest.raises(ConfigError) as caught:
        overridden(*overrides)
    assert message in str(caught.value)


# load -------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path):
    def write(body, name="recipe.py"):
        path = tmp_path / name
        path.write_text(body)
        return path

    return write


WITH_ARGUMENTS = """
import ml_collections

def get_config(k: int = 1, share: float = 0.5, note="none", on=True):
    stage = {"k": k, "share": share, "note": note}
    return ml_collections.ConfigDict({"data": {"path": "p", "stages": [stage]}, "shuffle": on})
"""


def test_load_returns_a_locked_config_with_arguments_and_overrides(config_file):
    path = config_file(WITH_ARGUMENTS)
    tree = load(f"{path}:k=4,share=1,note=7,on=false", ["seed=5", "data.stages.0.k=6"])
    assert isinstance(tree, ml_collections.ConfigDict)
    assert tree.is_locked
    config = resolve(Example, tree)
    assert config.data.stages == (Stage(6, 1.0, "7"),)
    assert (config.seed, config.shuffle) == (5, False)
    assert not list(path.parent.glob("__pycache__"))


def test_load_reads_the_file_as_it_is_now(config_file):
    path = config_file("def get_config(): return {'seed': 1}")
    assert load(path).seed == 1
    config_file("def get_config(): return {'seed': 2}")
    assert load(path).seed == 2


def test_load_with_schema_reads_text_by_type(config_file):
    path = config_file("def get_config(): return {'data': {'path': 'a'}}")
    assert load(path, ["run_name=12", "data.stages.0.k=2"], schema=Example).run_name == "12"


def test_a_single_parameter_takes_the_whole_text(config_file):
    path = config_file("def get_config(arg): return {'run_name': arg}")
    assert load(f"{path}:k=4,big").run_name == "k=4,big"
    assert load(f"{path}:(a,b)").run_name == "(a,b)"
    named = config_file("def get_config(size='s'): return {'run_name': size}", "named.py")
    assert load(f"{named}:large").run_name == "large"


def test_arguments_may_hold_commas_in_brackets(config_file):
    path = config_file("def get_config(a=(), b=''): return {'tags': list(a), 'run_name': b}")
    tree = load(f"{path}:a=(1,2),b='x,y'")
    assert (tree.tags, tree.run_name) == ([1, 2], "x,y")


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (":kk=4", "has no argument 'kk'. Did you mean 'k'?"),
        (":k=x", "k: expected int, got 'x' (str)"),
        (":on=maybe", "on: expected bool"),
        (":k=1,k=2", "the argument 'k' is given twice"),
        (":4", "cannot read the arguments '4'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(config_file, suffix, message):
    path = config_file(WITH_ARGUMENTS)
    with pytest.raises(ConfigError) as caught:
        load(f"{path}{suffix}")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def get_confg(): return {}", "has no function get_config. Did you mean 'get_confg'?"),
        ("x = 1", "has no function get_config."),
        (
            "import ml_collections\nfrom ml_collections import config_dict\ndef get_config():\n"
            "  return ml_collections.ConfigDict({'a': config_dict.required_placeholder(int)})",
            "a required placeholder is not filled",
        ),
        ("get_config = 3", "has no function get_config."),
        ("def get_config(): return 3", "returned a int; it must return a ConfigDict"),
        ("def get_config(: pass", "recipe.py:1: SyntaxError: "),
        ("\n\n1/0", "recipe.py:3: ZeroDivisionError: division by zero"),
        ("def get_config():\n  return {}['a']", "recipe.py:2: KeyError: 'a'"),
        ("def get_config(k): return {}", "needs the argument 'k'"),
        ("import no_such_module_anywhere", "recipe.py:1: ModuleNotFoundError"),
        (
            "import ml_collections\ndef get_config():\n  c = ml_collections.ConfigDict({'ab': 1})\n"
            "  c.lock()\n  c.abb = 2\n  return c",
            "recipe.py:5: AttributeError",
        ),
    ],
)
def test_broken_files_are_named_with_their_line(config_file, body, message):
    path = config_file(body)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert message in str(caught.value)


def test_a_file_that_takes_no_arguments_says_so(config_file):
    path = config_file("def get_config(): return {}")
    with pytest.raises(ConfigError, match="takes no arguments, got 'k=4'"):
        load(f"{path}:k=4")


def test_a_missing_file_suggests_its_neighbour(config_file):
    path = config_file("x = 1")
    with pytest.raises(ConfigError, match=r"does not exist. Did you mean '.*recipe.py'"):
        load(path.with_name("recipes.py"))
    with pytest.raises(ConfigError, match="is a folder"):
        load(path.parent)
    with pytest.raises(ConfigError, match="There is no config file in"):
        load("/no/such/folder/a.py")


# describe ---------------------------------------------------------------------------------------


def test_comments_above_and_behind_a_field_are_its_documentation():
    comments = field_comments(AdamW)
    assert comments["b1"] == "decay of the first moment"
    assert comments["schedule"] == "how the learning rate moves over the steps None is not allowed"


def test_inherited_fields_keep_their_comments():
    @dataclass(frozen=True)
    class Derived(Stage):
        width: int = 1  # of it

    assert field_comments(Derived)["k"] == "tokens in a patch"
    assert field_comments(Derived)["width"] == "of it"


def test_describe_lists_every_key_with_value_default_and_comment():
    tree = {**MINIMAL, "optimizer": {"b1": 0.5}, "ema": {"name": "cosine"}, "seed": "wrong"}
    docs = {doc.path: doc for doc in describe(Example, tree)}
    assert docs["optimizer.b1"].value == 0.5
    assert docs["optimizer.b1"].default == 0.9
    assert docs["optimizer.peak_lr"].value == 5e-4
    assert docs["optimizer.name"].value == "adamw"
    assert docs["ema.decay_steps"].value == 1000
    assert docs["seed"].value == "wrong"
    assert docs["data.stages.1.k"].comment == "tokens in a patch"
    assert docs["clip"].type == "float | None"
    assert not any(doc.required for doc in docs.values())
    assert [d.path for d in describe(Example) if d.required] == ["data"]


def test_rendered_keys_can_be_pasted_back():
    text = render(describe(Example, RICH))
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("--config.")]
    overrides = [line for line in lines if "=" in line]
    assert resolve(Example, apply_overrides(RICH, overrides, Example)) == resolve(Example, RICH)
    assert "(float, default 0.9) decay of the first moment" in text


def test_undocumented_fields_are_found_in_choices_and_elements():
    assert undocumented(Example) == []

    @dataclass(frozen=True)
    class Bare:
        inner: tuple[Stage, ...] = ()
        seed: int = 0  # known

    assert undocumented(Bare) == [f"{Bare.__qualname__}.inner"]


def test_configuration_needs_neither_jax_nor_tensorflow():
    program = (
        "import sys, tokjax.config, tokjax.cli\n"
        "heavy = {'jax', 'tensorflow', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
