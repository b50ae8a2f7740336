"""The command line that writes texts: one prompt, files, stops and resumption."""

import json
import re

import jax
import pytest

from tokjax import cli, generate
from tokjax.data.tokenizers import TokenizerConfig, build_tokenizer
from tokjax.language_model import LanguageModel
from tokjax.models import ModelConfig, Transformer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model with a tokenizer, saved."""
    place = tmp_path_factory.mktemp("model")
    corpus = place / "corpus.txt"
    corpus.write_text("the cat sat on the mat and the dog sat on the log\n" * 40)
    tokenizer = build_tokenizer(
        TokenizerConfig(vocab_size=270, corpus=str(corpus)), place / "cache"
    )
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_positions": 128}
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **sizes))
    LanguageModel(model, model.init(jax.random.key(0)), tokenizer).save(place / "saved")
    return place / "saved"


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "in.jsonl"
    lines = ["the cat", {"prompt": "on the"}, {"prompt": "the dog sat"}, "a", "the log"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        cli.run(generate.main, list(map(str, words)))
    return ended.value.code, capsys.readouterr()


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_one_prompt_is_continued_on_the_screen(folder, capsys):
    words = (f"--model={folder}", "--prompt=the cat", "--max_new_tokens=8")
    code, shown = run(capsys, *words)
    assert code == 0
    assert run(capsys, *words)[1].out == shown.out != ""
    code, shown = run(capsys, *words, "--temperature=1", "--samples=3")
    assert len({*shown.out.splitlines()}) > 1


def test_a_file_of_prompts_is_the_same_whatever_the_batches_and_stops(
    folder, prompts, tmp_path, capsys
):
    common = (f"--model={folder}", f"--prompts={prompts}", "--temperature=1", "--samples=2")
    common += ("--max_new_tokens=6",)
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "deep/parts.jsonl"
    assert run(capsys, *common, f"--out={whole}", "--batch_size=4")[0] == 0
    expected = records(whole)
    assert [(r["index"], r["sample"]) for r in expected] == [
        (i, s) for i in range(5) for s in (0, 1)
    ]
    assert all(r["tokens"] <= 6 and r["mean_logprob"] < 0 for r in expected)
    assert len({r["text"] for r in expected}) > 5

    parts.parent.mkdir()
    lines = whole.read_text().splitlines(keepends=True)
    parts.write_text("".join(lines[:3]) + lines[3][:20])  # killed in the middle of a line
    code, shown = run(capsys, *common, f"--out={parts}", "--batch_size=3")
    assert (code, "10 texts of 5 prompts" in shown.out) == (0, True)
    for one, two in zip(records(parts), expected, strict=True):
        assert one | {"mean_logprob": 0} == two | {"mean_logprob": 0}
    before = parts.read_bytes()
    assert run(capsys, *common, f"--out={parts}")[0] == 0
    assert parts.read_bytes() == before


def test_a_file_of_other_settings_is_not_mixed_with(folder, prompts, tmp_path, capsys):
    common = (f"--model={folder}", f"--prompts={prompts}", f"--out={tmp_path / 'out.jsonl'}")
    assert run(capsys, *common, "--max_new_tokens=2")[0] == 0
    code, shown = run(capsys, *common, "--max_new_tokens=3")
    assert (code, "choose another --out" in shown.err) == (2, True)
    (tmp_path / "out.jsonl").write_text("something else\n")
    code, shown = run(capsys, *common, "--max_new_tokens=2")
    assert (code, "out.jsonl:1 was not written by this command" in shown.err) == (3, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --prompt or --prompts"),
        (("--prompt=a", "--prompts=b", "--out=c"), "one of them"),
        (("--prompts=b",), "go together"),
        (("--prompt=a", "--samples=2"), "--temperature above 0"),
        (("--prompt=a", "--max_new_tokens=0"), "--max_new_tokens=0"),
        (("--prompt=a", "--tempurature=1"), "Did you mean '--temperature'"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_model_is_loaded(capsys, words, message):
    code, shown = run(capsys, "--model=nowhere", *words)
    assert code == 2
    assert message in shown.err


@pytest.mark.parametrize("line", ["{", "3", '{"text": "a"}', '{"prompt": 3}', '{"messages": "a"}'])
def test_a_bad_line_is_named(tmp_path, capsys, line):
    file = tmp_path / "in.jsonl"
    file.write_text('"fine"\n' + line + "\n")
    words = ("--model=nowhere", f"--prompts={file}", f"--out={tmp_path / 'out'}")
    code, shown = run(capsys, *words)
    assert (code, f"{file}:2" in shown.err) == (3, True)


def test_what_is_printed_as_it_is_written_is_the_same(folder, capsys):
    words = (f"--model={folder}", "--prompt=the cat", "--max_new_tokens=12", "--temperature=1")
    words += ("--samples=2",)
    code, shown = run(capsys, *words)
    assert run(capsys, *words, "--stream") == (code, shown)
    assert run(capsys, *words, "--no-stream") == (code, shown)
    code, shown = run(capsys, f"--model={folder}", "--prompts=a", "--out=b", "--stream")
    assert (code, "--stream is for --prompt" in shown.err) == (2, True)


def test_constraints_are_flags(folder, tmp_path, capsys):
    pytest.importorskip("outlines_core", reason="the extra 'constrained' is not installed")
    words = (f"--model={folder}", "--prompt=the", "--max_new_tokens=24", "--temperature=1")
    assert re.fullmatch("[0-9]{3}\n", run(capsys, *words, "--regex=[0-9]{3}")[1].out)
    assert run(capsys, *words, "--choices=cat,dog")[1].out in ("cat\n", "dog\n")
    assert run(capsys, *words, '--choices=["a, b"]')[1].out == "a, b\n"
    schema = '{"type": "integer", "minimum": 5, "maximum": 7}'
    (tmp_path / "schema.json").write_text(schema)
    for given in (schema, tmp_path / "schema.json"):
        assert run(capsys, *words, f"--json_schema={given}")[1].out in ("5\n", "6\n", "7\n")
    for flags, message in (
        (("--regex=a", "--choices=b"), "--regex or --choices"),
        (("--json_schema=nowhere.json",), "give a file, or JSON"),
        (("--choices=[",), "no valid JSON list"),
    ):
        code, shown = run(capsys, "--model=nowhere", "--prompt=a", *flags)
        assert (code, message in shown.err) == (2, True)


def test_strategies_have_options_and_files_remember_them(folder, prompts, tmp_path, capsys):
    common = (f"--model={folder}", f"--prompts={prompts}", "--max_new_tokens=4")
    guided = (*common, f"--out={tmp_path / 'out'}", "--strategy=guided", "--option.weight=3.0")
    assert run(capsys, *guided)[0] == 0
    assert run(capsys, *guided)[0] == 0
    other = tuple(w.replace("3.0", "2.0") for w in guided)
    for words in (other, guided[:-1]):
        code, shown = run(capsys, *words)
        assert (code, "choose another --out" in shown.err) == (2, True)
    for flags, message in (
        (("--strategy=guidde",), "Did you mean 'guided'"),
        (("--strategy=guided", "--option.wieght=1"), "Did you mean 'weight'"),
        (("--option.temperature=1",), "write --temperature"),
        (("--option=3",), "write --option.KEY=VALUE"),
        (("--option.a=1", "--option.a=2"), "--option.a is given twice"),
    ):
        code, shown = run(capsys, f"--model={folder}", "--prompt=a", *flags)
        assert (code, message in shown.err) == (2, True), shown.err
    code, shown = run(capsys, "--help")
    assert (code, "[--option.KEY=...]" in shown.out) == (0, True)
