"""The command line that selects: results, resumption, and what it refuses."""

import json
import re

import jax
import numpy as np
import pytest

from tokjax import cli, select
from tokjax.data.annotated import annotate
from tokjax.data.artifact import read_artifact
from tokjax.data.store import TokenStore
from tokjax.data.tokenizers import TokenizerConfig, build_tokenizer
from tokjax.language_model import LanguageModel
from tokjax.models import ModelConfig, Transformer
from tokjax.selection.report import length_correlation

WORDS = ["the cat", "on the mat", "a dog", "the log", "sat", "and then", "of all", "cats"]


def records(count, seed):
    rng = np.random.default_rng(seed)
    for i in range(count):
        words = [" ".join(rng.choice(WORDS, int(rng.integers(1, 9)))) for _ in range(2)]
        yield {"question": f"{i}. {words[0]}?", "answer": f" {words[1]}."}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a saved model, pool.jsonl of 24 examples and target.jsonl of 3."""
    folder = tmp_path_factory.mktemp("selection")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(WORDS) * 40)
    tokenizer = build_tokenizer(TokenizerConfig(vocab_size=280, corpus=str(corpus)), folder / "bpe")
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_positions": 128}
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **sizes))
    params = model.init(jax.random.key(0))
    params = {**params, "embedding": 50 * params["embedding"]}
    LanguageModel(model, params, tokenizer).save(folder / "model")
    jsonl(folder / "pool.jsonl", records(24, 0))
    jsonl(folder / "target.jsonl", records(3, 1))
    return folder


@pytest.fixture(autouse=True)
def cache(place, monkeypatch):
    monkeypatch.setenv("TOKJAX_CACHE", str(place / "cache"))


def words(place, out, **changes):
    flags = {
        "method": "trim",
        "model": place / "model",
        "pool": place / "pool.jsonl",
        "target": place / "target.jsonl",
        "budget": "25%",
        "out": out,
        "source.prompt": "question",
        "source.response": "answer",
        **changes,
    }
    return [f"--{name}={value}" for name, value in flags.items() if value is not None]


def run(capsys, *given):
    with pytest.raises(SystemExit) as ended:
        cli.run(select.main, list(map(str, given)))
    return ended.value.code, capsys.readouterr()


def test_the_best_are_kept_and_reported(place, tmp_path, capsys):
    code, shown = run(capsys, *words(place, tmp_path / "out"), "--channels")
    assert code == 0, shown.err
    found = read_artifact(tmp_path / "out/selection.parquet")
    assert (len(found), found.keep.sum(), found.meta["counts"]["kept"]) == (24, 6, 6)
    best = np.argsort(-found.scores, kind="stable")[:6]
    assert found.keep[best].all()
    assert re.search(r"^kept +6 ", shown.out, re.M) and re.search(r"^dropped +18 ", shown.out, re.M)
    assert found.meta["options"]["lam"] == 0.5 and found.meta["method"] == "trim"
    assert found.channels == ("trim",)
    first = found.channel("trim")[: found.starts[1]]
    own = first[first != 0]
    np.testing.assert_allclose(found.scores[0], 0.5 * own.mean() + 0.5 * own.max(), atol=1e-6)

    page = (tmp_path / "out/report.html").read_text()
    assert "<svg" in page and "http://" not in re.sub(r"http://www\.w3\.org/\S*", "", page)
    names = [found.names[i].rsplit("/", 1)[-1] for i in best]
    assert all(name in page for name in names[:5]) and "rgba(" in page and "Dropped" in page

    stores = [TokenStore.open(path) for path in (place / "cache/stores").glob("jsonl-*")]
    pool = next(store for store in stores if store.num_examples == 24)
    kept = annotate(pool, str(tmp_path / "out/selection.parquet"))
    assert kept.kept.tolist() == sorted(best.tolist())
    start, stop = found.starts[min(best) :][:2]
    np.testing.assert_array_equal(kept.channel("trim", 0), found.channel("trim")[start:stop])


def test_a_scoring_that_was_killed_goes_on_and_comes_out_the_same(
    place, tmp_path, capsys, monkeypatch
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(capsys, *words(place, whole, batch_tokens=256))[0] == 0
    parts.mkdir()
    lines = (whole / "scores.jsonl").read_text().splitlines(keepends=True)
    (parts / "scores.jsonl").write_text("".join(lines[:9]) + lines[9][:12])
    assert run(capsys, *words(place, parts, batch_tokens=256))[0] == 0
    one, two = (read_artifact(p / "selection.parquet") for p in (whole, parts))
    np.testing.assert_allclose(one.scores, two.scores, atol=1e-6)
    np.testing.assert_array_equal(one.keep, two.keep)
    redone = (parts / "scores.jsonl").read_text().splitlines(keepends=True)
    assert redone[:9] == lines[:9] and len(redone) == 24

    before = (parts / "scores.jsonl").read_bytes()
    code, shown = run(capsys, *words(place, parts, budget=2))
    assert (code, read_artifact(parts / "selection.parquet").keep.sum()) == (0, 2), shown.err
    assert (parts / "scores.jsonl").read_bytes() == before


def test_results_of_other_settings_are_not_mixed(place, tmp_path, capsys):
    assert run(capsys, *words(place, tmp_path, method="random", target=None))[0] == 0
    for other in ({"method": "longest"}, {"method": "random", "set.seed": 1}):
        code, shown = run(capsys, *words(place, tmp_path, target=None, **other))
        assert (code, "choose another --out" in shown.err) == (2, True), shown.err
    (tmp_path / "scores.jsonl").write_text("something else\n")
    code, shown = run(capsys, *words(place, tmp_path, method="random", target=None))
    assert (code, "scores.jsonl:1 was not written by this command" in shown.err) == (3, True)


@pytest.mark.parametrize("method", ["random", "longest", "loss", "rds", "gradient"])
def test_every_method_selects(place, tmp_path, capsys, method):
    target = place / "target.jsonl" if method in ("rds", "gradient") else None
    code, shown = run(capsys, *words(place, tmp_path, method=method, target=target, budget=3))
    assert code == 0, shown.err
    found = read_artifact(tmp_path / "selection.parquet")
    assert found.keep.sum() == 3 and np.isfinite(found.scores).all()
    assert f"Selection by {method}" in (tmp_path / "report.html").read_text()


def test_examples_without_a_token_that_counts_are_never_kept_and_counted(place, tmp_path, capsys):
    rows = [*records(4, 3)]
    for i in (0, 1):  # their responses lie behind the tokens that are read
        rows[i] = {**rows[i], "question": "the cat sat on the mat and " * 20}
    pool = jsonl(tmp_path / "pool.jsonl", rows)
    changes = {"pool": pool, "budget": "100%", "method": "longest", "target": None}
    code, shown = run(capsys, *words(place, tmp_path / "out", max_tokens=96, **changes))
    assert code == 0, shown.err
    found = read_artifact(tmp_path / "out/selection.parquet")
    assert np.isnan(found.scores[:2]).all() and found.keep.tolist() == [False, False, True, True]
    assert "never kept: 2" in shown.out and found.meta["counts"]["unscored"] == 2
    code, shown = run(capsys, *words(place, tmp_path / "none", max_tokens=2, **changes))
    assert (code, "no example" in shown.err and "--kind" in shown.err) == (3, True)


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"budget": "0"}, 2, "keeps nothing"),
        ({"budget": "101%"}, 2, "more than the whole pool"),
        ({"budget": "many"}, 2, "neither a share"),
        ({"target": None}, 2, "give --target"),
        ({"method": "random"}, 2, "leave --target out"),
        ({"method": "trimm"}, 2, "Did you mean 'trim'"),
        ({"set.lamb": 1}, 2, "Did you mean 'lam'"),
        ({"set.lam": 2.0}, 2, "lam=2.0"),
        ({"pool": "nowhere.jsonl"}, 2, "nowhere.jsonl"),
        ({"max_tokens": 1}, 2, "--max_tokens=1"),
        ({"batch_tokens": 0}, 2, "--batch_tokens=0"),
        ({"kind": "preference"}, 2, "--kind"),
        ({"buget": 3}, 2, "Did you mean '--budget'"),
        ({"model": "nowhere"}, 4, "nowhere does not exist"),
    ],
)
def test_what_cannot_be_meant_is_refused(place, tmp_path, capsys, changes, code, message):
    if changes.get("model") != "nowhere":
        changes = {"model": "unread", **changes}  # found out before a model is loaded
    given, shown = run(capsys, *words(place, tmp_path / "out", **changes))
    assert (given, message in shown.err) == (code, True), shown.err
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be_used_is_named(place, tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    code, shown = run(capsys, *words(place, tmp_path / "out", pool=empty))
    assert (code, "--pool=" in shown.err and "is empty" in shown.err) == (3, True)
    code, shown = run(capsys, *words(place, tmp_path / "out", budget=25))
    assert (code, "more than the pool's 24 examples" in shown.err) == (2, True)
    code, shown = run(capsys, *words(place, tmp_path / "out", **{"source.promt": "question"}))
    assert (code, "Did you mean 'prompt'" in shown.err) == (2, True)
    code, shown = run(capsys, *words(place, tmp_path / "out", **{"source.kind": "text"}))
    assert (code, "has a flag of its own" in shown.err) == (2, True)


def test_the_correlation_with_length_is_of_ranks():
    assert length_correlation(np.array([1.0, 10, 100, -np.inf]), [3, 4, 9, 0]) == 1.0
    assert length_correlation(np.array([1.0, 1.0]), [3, 4]) is None
    assert length_correlation(np.array([np.nan]), [3]) is None
