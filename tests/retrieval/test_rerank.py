"""Reranking with models, from Python and from the command line."""

import json

import jax
import numpy as np
import pytest

from tokjax import cli, rerank
from tokjax.config import resolve
from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.data.rankings import Limits, Passage
from tokjax.errors import ConfigError
from tokjax.language_model import LanguageModel
from tokjax.models import ModelConfig, Transformer
from tokjax.retrieval.pointwise import Reranker, load_reranker
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.run import build_run
from tokjax.training.run_facts import RUN_FILE

QUERY, PASSAGES = "ab", (Passage("xyz"), Passage("x", title="t"), Passage("zz"))


@pytest.fixture(scope="module")
def reranker(lm):
    model, params = lm
    own = {name: value for name, value in params.items() if name != "heads"}
    return Reranker(model, own, params["heads"], ByteTokenizer(), (256,), (256,))


def test_a_passage_is_read_as_in_training(reranker, stored):
    record = {
        "query": QUERY,
        "passages": [{"text": p.text, "title": p.title} for p in PASSAGES],
    }
    store = stored([record])
    expected = np.split(store.tokens(0)[:-1], store.cuts(0))
    for ids, own in zip(reranker.sequences(QUERY, PASSAGES), expected, strict=True):
        assert ids == own.tolist()


def test_a_score_depends_on_the_query_and_the_passage_alone(reranker):
    groups = [(QUERY, PASSAGES), ("b", PASSAGES[:1]), (QUERY, PASSAGES[::-1])]
    one, two, three = reranker.scores(groups, batch_size=3)
    assert len(one) == 3 and len(two) == 1
    np.testing.assert_allclose(one, three[::-1], atol=1e-6)
    assert abs(two[0] - one[0]) > 1e-6
    for passage, score in zip(PASSAGES, one, strict=True):
        np.testing.assert_allclose(reranker.scores([(QUERY, [passage])])[0], [score], atol=1e-5)
    assert reranker.scores([]) == []


def test_too_long_a_passage_is_refused(reranker):
    with pytest.raises(ConfigError, match=r"has 1\d\d tokens, the model 64 positions"):
        reranker.scores([(QUERY, [Passage("x" * 120)])])


@pytest.fixture
def queries(tmp_path):
    lines = [
        {"query": x, "passages": [y * 3, {"text": x * 3, "id": 7}, "f"], "labels": [0, 2, 0]}
        for x, y in ("ab", "bc", "cd")
    ]
    file = tmp_path / "queries.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        cli.run(rerank.main, list(map(str, words)))
    return ended.value.code, capsys.readouterr()


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_trained_model_finds_the_relevant_passages(trained, queries, tmp_path, capsys):
    workdir, _ = trained
    out = tmp_path / "deep/out.jsonl"
    words = ("--stage=pointwise", f"--data={queries}", f"--model={workdir}", f"--out={out}")
    code, shown = run(capsys, *words)
    assert code == 0, shown.err
    assert "nDCG@10 1.0000 (before 0.6309)" in shown.out and "MRR@10 1.0000" in shown.out
    for record, given in zip(lines_of(out), lines_of(queries), strict=True):
        assert record["ranking"][0] == 1 and record["labels"] == given["labels"]
        assert record["passages"][1]["id"] == 7
        scores = [p["score"] for p in record["passages"]]
        assert [scores[i] for i in record["ranking"]] == sorted(scores, reverse=True)
    # What was written is not computed again; what was cut off is.
    before = out.read_bytes()
    out.write_bytes(before[: len(before) * 2 // 3])
    assert run(capsys, *words, "--batch_size=2")[0] == 0
    for one, two in zip(lines_of(out), map(json.loads, before.splitlines()), strict=True):
        assert one["ranking"] == two["ranking"]
    code, shown = run(capsys, *words, "--seed=1")
    assert (code, "choose another --out" in shown.err) == (2, True)


def test_scores_become_a_teachers(trained, queries, tmp_path, capsys, stored):
    workdir, _ = trained
    out, again = tmp_path / "out.jsonl", tmp_path / "again.jsonl"
    run(capsys, "--stage=pointwise", f"--data={queries}", f"--model={workdir}", f"--out={out}")
    store = stored(lines_of(out))
    for i, record in enumerate(lines_of(out)):
        expected = [p["score"] for p in record["passages"]]
        np.testing.assert_allclose(store.values("score", i), expected, rtol=1e-6)
        assert store.values("label", i).tolist() == [0, 2, 0]
    scored = lines_of(out)
    for record in scored:
        for passage in record["passages"]:
            passage["score"] *= -1
    out.write_text("".join(json.dumps(record) + "\n" for record in scored))
    words = ("--stage=pointwise", f"--data={out}", f"--model={workdir}", f"--out={again}")
    assert "Kendall tau to the given scores -1.0000, 3 queries" in run(capsys, *words)[1].out


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random model with its tokenizer."""
    from tokjax.data.tokenizers import TokenizerConfig, build_tokenizer

    folder = tmp_path_factory.mktemp("model")
    (folder / "corpus.txt").write_text("[1] > [2] > [3] the passages 0 5 9\n" * 20)
    config = TokenizerConfig(vocab_size=270, corpus=str(folder / "corpus.txt"))
    tokenizer = build_tokenizer(config, folder / "cache")
    sizes = {"d_model": 32, "n_layers": 1, "n_heads": 2, "max_positions": 2048}
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **sizes))
    LanguageModel(model, model.init(jax.random.key(0)), tokenizer).save(folder / "saved")
    return folder / "saved"


def test_a_language_model_orders_from_the_ranking_given(saved, queries, tmp_path, capsys):
    given = [{**record, "ranking": [2, 1, 0]} for record in lines_of(queries)]
    queries.write_text("".join(json.dumps(record) + "\n" for record in given))
    words = ("--stage=listwise", f"--data={queries}", f"--model={saved}", "--max_new_tokens=4")
    words += ("--chat_template=chatml", "--window=2", "--step=1", "--temperature=1")
    outs = [tmp_path / f"{n}.jsonl" for n in (1, 2)]
    for out, size in zip(outs, (2, 8), strict=True):
        code, shown = run(capsys, *words, f"--out={out}", f"--batch_size={size}")
        assert code == 0, shown.err
        assert "3 queries with labels" in shown.out
    one, two = map(lines_of, outs)
    assert [r["ranking"] for r in one] == [r["ranking"] for r in two]
    for record, own in zip(one, given, strict=True):
        assert sorted(record["ranking"]) == [0, 1, 2]
        assert record["passages"] == own["passages"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--stage=pairwise",), "--stage"),
        ((), "--stage is missing"),
        (("--stage=listwise", "--step=30"), "step"),
        (("--stage=listwise", "--end=0"), "places 0 to 0"),
        (("--stage=pointwise", "--k=0"), "--k=0"),
        (("--stage=listwise", "--temperature=-1"), "must not be negative"),
    ],
)
def test_what_cannot_be_meant_is_refused(capsys, words, said):
    code, shown = run(capsys, "--data=a", "--model=nowhere", "--out=b", *words)
    assert (code, said in shown.err) == (2, True), shown.err


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"query": "a"}',
        '{"query": 1, "passages": ["a"]}',
        '{"query": "a", "passages": []}',
        '{"query": "a", "passages": [3]}',
        '{"query": "a", "passages": ["a"], "labels": [1, 2]}',
        '{"query": "a", "passages": ["a", "b"], "ranking": [0, 0]}',
    ],
)
def test_a_bad_line_is_named(tmp_path, capsys, line):
    file = tmp_path / "in.jsonl"
    file.write_text('{"query": "a", "passages": ["b"]}\n' + line + "\n")
    words = ("--stage=pointwise", "--model=nowhere", f"--data={file}", f"--out={tmp_path / 'o'}")
    code, shown = run(capsys, *words)
    assert (code, f"{file}:2" in shown.err) == (3, True), shown.err


def test_a_run_that_ranks_nothing_is_refused(trained, tmp_path):
    assert load_reranker(trained[0]).limits == Limits()
    told = json.loads((trained[0] / RUN_FILE).read_text())
    told["config"]["data"]["train"][0]["source"]["kind"] = "text"
    (tmp_path / RUN_FILE).write_text(json.dumps(told))
    with pytest.raises(ConfigError, match="not trained on rankings"):
        load_reranker(tmp_path)


def test_adapters_are_trained_beside_a_checkpoint(trained, tmp_path):
    """What configs/dear.py does: the head begins anew, the adapters change scores."""
    workdir, tree = trained
    data = {**tree["data"], "tokenizer": {"name": "checkpoint"}, "evals": {}}
    tree = {
        **tree,
        "init_from": str(workdir),
        "model": {"lora": {"rank": 2, "alpha": 4.0, "targets": ("query", "down")}},
        "data": data,
        "steps": 3,
    }
    run = build_run(resolve(TrainConfig, tree), devices=jax.devices()[:1], show_progress=False)
    train(run, tmp_path / "run")
    found, before = load_reranker(tmp_path / "run"), load_reranker(workdir)
    groups = [("a", [Passage("aaa"), Passage("bbb")])]
    assert found.model.config.lora is not None
    assert (found.heads["score"]["weight"] != before.heads["score"]["weight"]).any()
    np.testing.assert_array_equal(found.params["embedding"], before.params["embedding"])
    (scores,) = found.scores(groups)
    assert np.isfinite(scores).all() and scores[0] != scores[1]
