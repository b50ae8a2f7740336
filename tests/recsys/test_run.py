"""From files to recommendations, in Python and by the command."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from tokjax import cli
from tokjax.config import load as load_config
from tokjax.config import resolve
from tokjax.errors import CheckpointError, ConfigError, DataError
from tokjax.language_model import LanguageModel
from tokjax.models import ModelConfig, Transformer
from tokjax.recommend import main
from tokjax.recsys import run
from tokjax.recsys.embeddings import embed_texts, of_items, read_embeddings

ROOT = Path(__file__).parents[2]
SMALL = (
    "--config.codes.levels=2",
    "--config.codes.size=4",
    "--config.codes.epochs=10",
    "--config.model.d_model=16",
    "--config.model.head_dim=4",
    "--config.model.d_ff=16",
    "--config.model.branch_d_ff=16",
    "--config.model.n_layers=1",
    "--config.fit.epochs=2",
    "--config.fewest=2",
    "--config.history=3",
    "--config.beams=9",
    "--config.at=(1,5)",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    rows = [f"u{u},i{(u + t) % 9},{t}" for u in range(12) for t in range(5)]
    (folder / "log.csv").write_text("user,item,when\n" + "\n".join(rows) + "\n")
    rng = np.random.default_rng(0)
    lines = [{"item": f"i{i}", "embedding": rng.normal(size=6).tolist()} for i in range(9)]
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def command(files, workdir, *more):
    where = f"interactions={files}/log.csv,embeddings={files}/items.jsonl,time=when,small=True"
    config = f"--config={ROOT}/configs/recommend/discrec.py:{where}"
    return [config, f"--workdir={workdir}", *SMALL, *more]


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    main(command(files, workdir))
    return workdir


def test_the_command_trains_measures_and_recommends(files, trained, tmp_path, capsys):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert set(metrics) == {"recall@1", "ndcg@1", "recall@5", "ndcg@5"}
    main([f"--workdir={trained}", "--stage=evaluate"])
    shown = dict(re.findall(r"(\S+@\d) ([\d.]+)", capsys.readouterr().out))
    assert {name: round(value, 4) for name, value in metrics.items()} == {
        name: float(value) for name, value in shown.items()
    }
    data, out = tmp_path / "users.jsonl", tmp_path / "found.jsonl"
    data.write_text('{"history": ["i3", "i4"], "user": 7}\n{"history": ["i1"]}\n')
    main([f"--workdir={trained}", "--stage=recommend", f"--data={data}", f"--out={out}", "--k=9"])
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert first["user"] == 7 and first["history"] == ["i3", "i4"]
    assert sorted(each["item"] for each in second["items"]) == [f"i{i}" for i in range(9)]
    scores = [each["score"] for each in first["items"]]
    assert scores == sorted(scores, reverse=True)


def test_a_finished_run_is_not_trained_again_and_another_is_refused(files, trained, monkeypatch):
    from tokjax.recsys import training

    before = run.load(trained)
    monkeypatch.setattr(training, "_update", None)
    main(command(files, trained))
    again = run.load(trained)
    jax.tree.map(np.testing.assert_array_equal, again.trained.params, before.trained.params)
    with pytest.raises(ConfigError, match="another configuration"):
        main(command(files, trained, "--config.fit.seed=1"))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"history": ["i3", "film"]}', "users.jsonl:1: 'film' is no item"),
        ('{"history": []}', 'users.jsonl:1: write {"history"'),
        ("", "holds no history"),
    ],
)
def test_bad_histories_are_named(trained, tmp_path, line, told):
    data = tmp_path / "users.jsonl"
    data.write_text(line + "\n")
    with pytest.raises(DataError, match=told):
        main([f"--workdir={trained}", "--stage=recommend", f"--data={data}", f"--out={data}.out"])


def test_histories_by_name_are_checked(trained):
    found = run.load(trained)
    with pytest.raises(DataError, match="history 0 is empty"):
        found.recommend([[]])
    with pytest.raises(DataError, match=r"history 1 names 'i33', which is no item. Did you mean"):
        found.recommend([["i3"], ["i33"]])
    assert len(found.recommend([["i1"] * 10], k=2)[0]) == 2


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        (["--stage=recommend"], ConfigError, "give both"),
        (["--stage=evaluate", "--config=x.py"], ConfigError, "leave --config out"),
        (["--k=0"], ConfigError, "--k=0"),
        ([], ConfigError, "--config is missing"),
    ],
)
def test_commands_that_cannot_be_meant_are_refused(trained, words, error, told):
    with pytest.raises(error, match=told):
        main([f"--workdir={trained}", *words])


def test_a_folder_without_a_recommender_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no recommender"):
        main([f"--workdir={tmp_path}", "--stage=evaluate"])


def test_help_explains_the_keys(files, tmp_path, capsys):
    assert main([*command(files, tmp_path), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "branch_d_ff" in shown and "--stage" in shown
    assert cli.parse_args(["--help"], flags={}).help


@pytest.mark.parametrize("method", ["discrec", "tiger"])
def test_the_config_resolves(method):
    path = f"{ROOT}/configs/recommend/discrec.py:method={method}"
    config = resolve(run.RecommendConfig, load_config(path, schema=run.RecommendConfig))
    assert config.model.gate == (method == "discrec")
    assert config.codes.size == 256 and config.model.d_model == 128 and config.fit.epochs == 200


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="set either embeddings or texts"):
        run.RecommendConfig("log.csv")
    with pytest.raises(ConfigError, match="at="):
        run.RecommendConfig("log.csv", texts="x", at=(30,))


def test_items_without_embeddings_are_named(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"item": 1, "embedding": [1, 2]}\n{"item": "b", "embedding": [1]}\n')
    vectors = read_embeddings(path)
    assert of_items(["1"], vectors, "x").tolist() == [[1.0, 2.0]]
    with pytest.raises(DataError, match="x has no embedding of 1 of 2 items, 'c'"):
        of_items(["1", "c"], vectors, "x")
    with pytest.raises(DataError, match=r"different widths: \[1, 2\]"):
        of_items(["1", "b"], vectors, "x")
    path.write_text('{"item": "a", "embedding": "1 2"}\n')
    with pytest.raises(DataError, match=r"items.jsonl:1: 'embedding' must be a list"):
        read_embeddings(path)


def test_embeddings_of_texts_do_not_depend_on_their_batch():
    from tokjax.data.byte_tokenizer import ByteTokenizer

    model = Transformer(
        ModelConfig(vocab_size=257, d_model=16, n_layers=1, n_heads=2, max_positions=64)
    )
    lm = LanguageModel(model, model.init(jax.random.key(0)), ByteTokenizer(), add_bos=False)
    texts = ["a", "a longer text, of more tokens", "bc"]
    found = embed_texts(lm, texts, batch_size=2)
    alone = np.concatenate([embed_texts(lm, [text], batch_size=1) for text in texts])
    np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="text 1 is empty"):
        embed_texts(lm, ["a", ""])
