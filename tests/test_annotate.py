"""The command line that weighs the tokens of preference pairs."""

import json

import jax
import numpy as np
import pytest

from tokjax import annotate, cli
from tokjax.data.annotated import annotate as joined
from tokjax.data.artifact import read_artifact
from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.data.store import TokenStore
from tokjax.language_model import LanguageModel
from tokjax.loading import load
from tokjax.models import ModelConfig, Transformer
from tokjax.preference.critical_tokens import critical_scores, critical_weights
from tokjax.preference.figa import figa_weights

PAIRS = [
    {"question": "2+2=", "good": "four", "bad": "fore"},
    {"question": "abc", "good": "yes", "bad": "no"},
    {"question": "same", "good": "as is", "bad": "as is"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pairs.jsonl and three models of bytes: model, right, wrong; and another."""
    folder = tmp_path_factory.mktemp("annotation")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    tokenizer = ByteTokenizer()
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_positions": 64}
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **sizes))
    for seed, name in enumerate(("model", "right", "wrong")):
        params = model.init(jax.random.key(seed))
        params = {**params, "embedding": 20 * params["embedding"]}
        LanguageModel(model, params, tokenizer).save(folder / name)
    return folder


@pytest.fixture(autouse=True)
def cache(place, monkeypatch):
    monkeypatch.setenv("TOKJAX_CACHE", str(place / "cache"))


def run(capsys, place, out, **changes):
    flags = {
        "method": "figa",
        "model": place / "model",
        "pairs": place / "pairs.jsonl",
        "out": out,
        "source.prompt": "question",
        "source.chosen": "good",
        "source.rejected": "bad",
        **changes,
    }
    words = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    with pytest.raises(SystemExit) as ended:
        cli.run(annotate.main, words)
    return ended.value.code, capsys.readouterr()


def the_store(place):
    (found,) = [TokenStore.open(path) for path in (place / "cache/stores").glob("jsonl-*")]
    return found


def test_edits_are_what_the_function_finds_and_join_the_store(place, tmp_path, capsys):
    out = tmp_path / "edits.parquet"
    code, shown = run(capsys, place, out, **{"set.beta": 0.25})
    assert code == 0, shown.err
    store = the_store(place)
    annotated = joined(store, str(out))
    for i, weights in enumerate(figa_weights(store, beta=0.25)):
        np.testing.assert_array_equal(annotated.weights(i), store.weights(i) * weights)
    meta = read_artifact(out).meta
    assert meta["method"] == "figa" and meta["options"]["beta"] == 0.25
    assert "rejected" in shown.out and "3 pairs" in shown.out
    chosen, rejected = (line.split() for line in shown.out.splitlines()[1:3])
    sizes = [sum(len(p[side]) for p in PAIRS) for side in ("good", "bad")]
    ends = len(PAIRS) if store.manifest["tokenizer"].get("after") else 0
    assert [int(chosen[1]), int(rejected[1])] == [n + ends for n in sizes]


def test_critical_tokens_are_those_of_the_two_models(place, tmp_path, capsys):
    out, sides = tmp_path / "critical.parquet", {n: place / n for n in ("right", "wrong")}
    code, shown = run(capsys, place, out, method="cdpo", **sides, **{"set.beta": 2.0})
    assert code == 0, shown.err
    store = the_store(place)
    loaded = [load(place / name) for name in ("right", "wrong")]
    scores = critical_scores(store, *((lm.model, lm.params) for lm in loaded), beta=2.0)
    expected = np.concatenate(critical_weights(store, scores))
    np.testing.assert_allclose(read_artifact(out).channel("weights"), expected, atol=1e-6)
    assert read_artifact(out).meta["options"]["wrong"] == str(place / "wrong")


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"method": "cdpo", "right": "x"}, 2, "give --wrong"),
        ({"right": "x"}, 2, "leave --right out"),
        ({"set.bta": 1}, 2, "Did you mean 'beta'"),
        ({"set.beta": -1.0}, 2, "--set.beta=-1.0"),
        ({"method": "fida"}, 2, "--method"),
        ({"batch_tokens": 0}, 2, "--batch_tokens=0"),
        ({"pairs": "nowhere.jsonl"}, 2, "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_model_is_loaded(
    place, tmp_path, capsys, changes, code, message
):
    changes = {"model": "unread", **changes}
    given, shown = run(capsys, place, tmp_path / "out.parquet", **changes)
    assert (given, message in shown.err) == (code, True), shown.err
    assert not (tmp_path / "out.parquet").exists()


def test_an_empty_file_and_a_folder_are_named(place, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    code, shown = run(capsys, place, tmp_path / "o", pairs=tmp_path / "empty.jsonl", model="unread")
    assert (code, "is empty" in shown.err) == (3, True)
    code, shown = run(capsys, place, tmp_path, model="unread")
    assert (code, "is a folder" in shown.err) == (2, True)
