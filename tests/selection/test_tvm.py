"""Values of prefixes: the worked numbers, laws of the labels, and the command that writes them."""

import json
from collections import defaultdict

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokjax import cli, select
from tokjax.data.annotated import annotate
from tokjax.data.artifact import read_artifact
from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.data.config import DataConfig
from tokjax.data.prepare import ensure_store
from tokjax.data.sources import JsonlSource
from tokjax.data.store import TokenStore
from tokjax.data.tokenizers import TokenizerConfig
from tokjax.errors import ConfigError, DataError
from tokjax.language_model import LanguageModel
from tokjax.models import ModelConfig, Transformer
from tokjax.selection.methods import selector
from tokjax.selection.scoring import score
from tokjax.selection.tvm import Tvm, label_solutions, prefix_values, write_prefix_values

PATHS = [[1, 2, 3, 9], [1, 2, 4, 9], [1, 5, 6, 9], [7, 8, 9, 9]]
RIGHT = [1, 0, 1, 0]
VALUES = [[2 / 3, 0.5, 1, 1], [2 / 3, 0.5, 0, 0], [2 / 3, 1, 1, 1], [0, 0, 0, 0]]

solutions = st.lists(
    st.tuples(st.lists(st.integers(0, 2), max_size=6), st.booleans()), min_size=1, max_size=20
)


class Rated:
    """Examples (prompt, solution, right) in memory; the first token is BOS."""

    def __init__(self, examples):
        self.examples = [([1, *p], s, r) for p, s, r in examples]
        self.num_examples = len(examples)
        self.lengths = np.array([len(p) + len(s) for p, s, _ in self.examples])

    def tokens(self, i, start=0, stop=None):
        prompt, solution, _ = self.examples[i]
        return np.array([*prompt, *solution][start:stop], np.int32)

    def weights(self, i, start=0, stop=None):
        prompt, solution, right = self.examples[i]
        sign = 1.0 if right else -1.0
        return np.array([0.0] * len(prompt) + [sign] * len(solution), np.float32)[start:stop]

    def example_key(self, i):
        return f"{i:016x}"

    def example_name(self, i):
        return f"memory:{i}"


def two_problems():
    """The worked paths as one problem, in between two other problems."""
    store = [([20, 21], p, r) for p, r in zip(PATHS, RIGHT, strict=True)]
    store.insert(1, ([20], [21, 1, 2], True))  # the same tokens as a prompt and a solution
    store.insert(3, ([30], [5], False))
    store.insert(3, ([30], [5], False))
    return Rated(store)


# ---- the labels of one problem


def test_worked_numbers():
    found = prefix_values(PATHS, RIGHT)
    np.testing.assert_allclose(found.values, VALUES, rtol=1e-6)
    assert [own.tolist() for own in found.counts] == [
        [3, 2, 1, 1],
        [3, 2, 1, 1],
        [3, 1, 1, 1],
        [1, 1, 1, 1],
    ]
    assert found.depths.tolist() == [2, 2, 1, 0]


@pytest.mark.parametrize("right", [True, False])
def test_one_solution_alone_has_its_outcome_everywhere(right):
    (own,) = prefix_values([[5, 6, 7]], [right]).values
    assert own.tolist() == [float(right)] * 3


def test_derivative_at_half_is_that_of_outcome_labels():
    """The sum of (f - label)^2 over tokens, all predictions 0.5: by prefix."""
    found = prefix_values(PATHS, RIGHT).values
    for labels in (found, [[r] * 4 for r in RIGHT]):
        slopes = defaultdict(float)
        for path, own in zip(PATHS, labels, strict=True):
            for k in range(4):
                slopes[tuple(path[: k + 1])] += 2 * (0.5 - float(own[k]))
        assert slopes[1,] == pytest.approx(-1)
        assert slopes[1, 2] == pytest.approx(0)


def naive(paths, right):
    """By the definition, quadratic in the number of paths."""
    return [
        [
            np.mean([r for p, r in zip(paths, right, strict=True) if p[:k] == path[:k]])
            for k in range(1, len(path) + 1)
        ]
        for path in paths
    ]


@given(solutions)
def test_labels_follow_the_definition(found):
    paths, right = [list(p) for p, _ in found], [r for _, r in found]
    # A path that ends where another goes on is another prefix there: paths have end tokens.
    paths = [[*p, 9] for p in paths]
    for own, expected in zip(prefix_values(paths, right).values, naive(paths, right), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-6)


@given(solutions)
def test_last_labels_are_the_mean_outcome_of_equal_solutions(found):
    paths, right = [(*p, 9) for p, _ in found], [r for _, r in found]
    for path, own in zip(paths, prefix_values(paths, right).values, strict=True):
        equal = [r for p, r in zip(paths, right, strict=True) if p == path]
        assert own[-1] == pytest.approx(np.mean(equal))
        assert len(equal) > 1 or own[-1] in (0, 1)


@given(solutions)
def test_tower_property(found):
    """A prefix has the mean value of its children, by their counts."""
    paths, right = [(*p, 9) for p, _ in found], [r for _, r in found]
    labels = prefix_values(paths, right)
    node = {}
    for path, values, counts in zip(paths, labels.values, labels.counts, strict=True):
        for k in range(len(path)):
            node[path[: k + 1]] = (float(values[k]), int(counts[k]))
    for prefix, (value, count) in node.items():
        children = [node[p] for p in node if p[:-1] == prefix]
        if children:
            assert sum(n for _, n in children) == count
            assert sum(v * n for v, n in children) / count == pytest.approx(value)


@given(solutions, st.randoms(use_true_random=False))
def test_the_order_of_solutions_permutes_labels_only(found, random):
    paths, right = [[*p, 9] for p, _ in found], [r for _, r in found]
    order = list(range(len(paths)))
    random.shuffle(order)
    labels = prefix_values(paths, right)
    moved = prefix_values([paths[i] for i in order], [right[i] for i in order])
    for at, i in enumerate(order):
        assert moved.values[at].tolist() == labels.values[i].tolist()
        assert moved.depths[at] == labels.depths[i]


def test_grades_between_are_averaged_and_others_refused():
    assert prefix_values([[1], [1]], [0.25, 0.75]).values[0].tolist() == [0.5]
    for bad in ([1.5, 0], [np.nan, 0]):
        with pytest.raises(DataError, match=r"must lie in \[0, 1\]"):
            prefix_values([[1], [2]], bad)
    with pytest.raises(DataError, match="2 solutions need as many grades"):
        prefix_values([[1], [2]], [1])


# ---- of a store


def test_problems_are_told_apart_by_their_prompts():
    found = label_solutions(two_problems())
    own = [i for i in range(7) if found.problems[i] == found.problems[0]]
    assert own == [0, 2, 5, 6]
    for i, expected in zip(own, VALUES, strict=True):
        np.testing.assert_allclose(found.values[i], [0, 0, 0, *expected], rtol=1e-6)
    assert found.values[1].tolist() == [0, 0, 1, 1, 1]
    assert found.values[3].tolist() == found.values[4].tolist() == [0, 0, 0]
    assert found.depths.tolist() == [2, 0, 2, 1, 1, 1, 0]
    assert found.sharing_depth == pytest.approx(1.0)
    assert found.sizes.tolist() == [4, 1, 2] and found.rates.tolist() == [0.5, 1, 0]
    # A problem sampled once is no evidence of a constant.
    assert found.constant.tolist() == [False, False, True]
    assert found.summary() == {
        "problems": 3,
        "solutions_each": 2.33,
        "right": 0.4286,
        "constant_problems": 1,
        "sharing_depth": 1.0,
        "soft_labels": 5,
    }


def test_examples_without_an_answer_are_no_solutions():
    store = two_problems()
    store.examples[1] = (store.examples[1][0], [], True)
    store.lengths[1] = 2
    found = label_solutions(store)
    assert found.problems[1] == -1 and not found.kept(1.0)[1]
    assert found.kept(1.0).sum() == 6


@pytest.mark.parametrize("right", [True, False])
def test_data_without_ratings_are_refused(right):
    with pytest.raises(DataError, match=r'nothing to tell apart.*kind "rated"'):
        label_solutions(Rated([([5], [6], right), ([5], [7], right)]))


@pytest.mark.parametrize(("share", "most"), [(0.0, 0), (0.25, 1), (0.5, 3), (0.6, 4), (1.0, 9)])
def test_constant_problems_are_capped(share, most):
    mixed = [([p], [p, s], bool(s)) for p in range(3) for s in range(2)]
    constant = [([10 + p], [5, s], bool(p % 2)) for p in range(9) for s in range(2)]
    labels = label_solutions(Rated([*mixed, *constant]))
    kept = labels.kept(share)
    assert kept[:6].all()
    stay = set(labels.problems[kept]) - {0, 1, 2}
    assert len(stay) == most
    assert kept.sum() == 6 + 2 * most  # whole problems
    np.testing.assert_array_equal(kept, labels.kept(share))
    if 0 < most < 9:
        assert any((labels.kept(share, seed) != kept).any() for seed in range(1, 6))


def test_nothing_but_constant_problems_is_refused_under_a_cap():
    labels = label_solutions(Rated([([p], [5, s], p == 4) for p in (4, 5) for s in range(2)]))
    with pytest.raises(DataError, match="all right or all wrong"):
        labels.kept(0.5)
    assert labels.kept(1.0).all()


# ---- the selector


def test_scores_are_the_variance_of_outcomes_and_long_solutions_are_left_out():
    model = Transformer(ModelConfig(vocab_size=61, d_model=8, n_layers=1, n_heads=1))
    found = score(
        selector("tvm", {"constant_share": 1.0}), model, {}, two_problems(), channels=True
    )
    np.testing.assert_allclose(found.scores, [0.25, 0, 0.25, 0, 0, 0.25, 0.25])
    np.testing.assert_allclose(found.channels["value"][0], [0, 0, 0, *VALUES[0]], rtol=1e-6)
    capped = score(Tvm(constant_share=0.0), model, {}, two_problems())
    assert np.isneginf(capped.scores).tolist() == [False, False, False, True, True, False, False]
    short = score(Tvm(), model, {}, two_problems(), max_tokens=6, channels=True)
    assert np.isneginf(short.scores).tolist() == [True, False, True, False, False, True, True]


@pytest.mark.parametrize("options", [{"constant_share": 1.5}, {"seed": -1}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Tvm(**options)


# ---- files


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with solutions.jsonl of rated answers and a model of bytes."""
    folder = tmp_path_factory.mktemp("solutions")
    rows = [("2+2=", "4", True), ("2+2=", "5", False), ("2+2=", "4", True), ("2+2=", "44", False)]
    rows += [("7-7=", "0", True), ("7-7=", "0", True)]
    text = "".join(
        json.dumps({"prompt": p, "response": r, "label": label}) + "\n" for p, r, label in rows
    )
    (folder / "solutions.jsonl").write_text(text)
    sizes = {"d_model": 8, "n_layers": 1, "n_heads": 1, "max_positions": 64}
    model = Transformer(ModelConfig(vocab_size=ByteTokenizer().vocab_size, **sizes))
    LanguageModel(model, model.init(jax.random.key(0)), ByteTokenizer()).save(folder / "model")
    return folder


EXPECTED = {"4": [3 / 4 * 2 / 3 + 1 / 6, 1.0], "5": [0.0, 0.0], "44": [2 / 3, 0.0, 0.0]}


def test_a_store_of_rated_answers_gets_an_artifact(place, tmp_path):
    source = JsonlSource(files=(str(place / "solutions.jsonl"),), kind="rated")
    data = DataConfig(tokenizer=TokenizerConfig(name="bytes"), cache_dir=str(place / "cache"))
    store = TokenStore.open(ensure_store(source, data, progress=False))
    labels = write_prefix_values(tmp_path / "v.parquet", store, constant_share=1.0)
    found = annotate(store, str(tmp_path / "v.parquet"))
    assert found.channels == ("value",) and found.num_examples == 6
    for i, name in enumerate(["4", "5", "4", "44"]):
        own = found.channel("value", i)
        answer = np.flatnonzero(store.weights(i))
        np.testing.assert_allclose(own[answer], EXPECTED[name], rtol=1e-6)
        assert not own[: answer[0]].any()
    assert read_artifact(tmp_path / "v.parquet").meta["found"] == labels.summary()
    assert labels.correct.tolist() == [True, False, True, False, True, True]


def test_the_command_writes_what_the_function_does(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TOKJAX_CACHE", str(place / "cache"))
    given = {"model": place / "model", "pool": place / "solutions.jsonl", "kind": "rated"}
    words = [f"--{k}={v}" for k, v in {**given, "budget": "100%", "out": tmp_path}.items()]
    with pytest.raises(SystemExit) as ended:
        cli.run(select.main, ["--method=tvm", *words])
    shown = capsys.readouterr()
    assert ended.value.code == 0, shown.err
    found = read_artifact(tmp_path / "selection.parquet")
    assert found.keep.all() and found.channels == ("value",)
    values = found.channel("value")
    for i, name in enumerate(["4", "5", "4", "44"]):
        own = values[found.starts[i] : found.starts[i + 1]]
        np.testing.assert_allclose(own[-len(EXPECTED[name]) :], EXPECTED[name], rtol=1e-6)
    assert found.meta["found"]["sharing_depth"] == pytest.approx((2 + 0 + 2 + 1 + 2 + 2) / 6)
    assert "sharing depth: 1.5" in shown.out


def test_the_command_refuses_answers_without_ratings(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TOKJAX_CACHE", str(place / "cache"))
    given = {"model": place / "model", "pool": place / "solutions.jsonl", "kind": "response"}
    words = [f"--{k}={v}" for k, v in {**given, "budget": "100%", "out": tmp_path}.items()]
    with pytest.raises(SystemExit) as ended:
        cli.run(select.main, ["--method=tvm", *words])
    assert ended.value.code != 0 and 'kind "rated"' in capsys.readouterr().err
