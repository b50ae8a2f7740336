"""The adapter under lm-evaluation-harness itself, with tasks on a local file."""

import importlib.util
import json
import math

import jax
import numpy as np
import pytest

from tokjax import cli, evaluate
from tokjax.errors import ConfigError

HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(
    not HAS_HARNESS, reason="lm_eval (the extra 'eval') is not installed"
)
DOCS = ["the cat sat", "a dog ran far", "x y", "one two three " * 6 + "four"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCS))
    head = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
    )
    pair = (
        "doc_to_text: \"{{text.split(' ')[:-1]|join(' ')}}\"\n"
        "doc_to_target: \"{{' ' + text.split(' ')[-1]}}\"\n"
    )
    metric = "metric_list:\n  - metric: {}\n    aggregation: {}\n    higher_is_better: true\n"
    for name, kind, texts, metrics in (
        ("last_word", "loglikelihood", pair, metric.format("perplexity", "perplexity")),
        (
            "whole",
            "loglikelihood_rolling",
            'doc_to_text: ""\ndoc_to_target: "{{text}}"\n',
            metric.format("byte_perplexity", "weighted_perplexity"),
        ),
        (
            "written",
            "generate_until",
            pair + 'generation_kwargs:\n  until: ["e"]\n  max_gen_toks: 8\n',
            metric.format("exact_match", "mean"),
        ),
    ):
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\noutput_type: {kind}\n{head}{texts}{metrics}"
        )
    return folder


def logprob(lm, before, ids):
    whole = [*before, *ids]
    logprobs = jax.nn.log_softmax(lm.logits([whole[:-1]])[0])
    return float(sum(logprobs[i - 1, whole[i]] for i in range(len(before), len(whole))))


@needs_harness
def test_tasks_give_what_is_computed_directly(lm, tasks, caplog):
    names = ["last_word", "whole", "written"]
    found = evaluate.evaluate(lm, names, tasks, batch_size=2)
    results, samples = found["results"], found["samples"]
    words = []
    for text in DOCS:
        context, _, last = text.rpartition(" ")
        ids = lm.tokenizer.encode(f" {last}")
        words.append(logprob(lm, lm.encode(context)[-(49 - len(ids)) :], ids))
    assert results["last_word"]["perplexity,none"] == pytest.approx(
        math.exp(-np.mean(words)), rel=1e-4
    )
    total = 0.0
    for text in DOCS:
        ids, start = lm.tokenizer.encode(text), 0
        prefix = [lm.tokenizer.bos_id or lm.tokenizer.eos_id]
        while start < len(ids):
            new = ids[start : start + 48]
            total += logprob(lm, [*prefix, *ids[:start]][-(49 - len(new)) :], new)
            start += 48
    size = sum(len(text.encode()) for text in DOCS)
    assert results["whole"]["byte_perplexity,none"] == pytest.approx(
        math.exp(-total / size), rel=1e-4
    )
    for sample in samples["written"]:
        context = sample["doc"]["text"].rpartition(" ")[0]
        prompt = lm.encode(context)[-40:]
        expected = lm.generate([prompt], max_new_tokens=8, stop=[*lm.eos_ids, "e"]).texts[0]
        assert sample["resps"] == [[expected]]
    assert found["truncated_contexts"] == 2  # of the long text: scored once, written once
    assert "cut from the left" in caplog.text
    assert "last_word" in found["table"]


@needs_harness
def test_a_strategy_and_a_file_of_results(lm, tasks, tmp_path, capsys):
    lm.save(tmp_path / "model")
    words = [f"--model={tmp_path / 'model'}", f"--task_dir={tasks}", "--tasks=last_word"]
    words += [f"--out={tmp_path / 'deep/out.json'}", "--limit=2"]
    plain = run(capsys, *words)
    assert plain[0] == 0 and "perplexity" in plain[1].out
    one = json.loads((tmp_path / "deep/out.json").read_text())
    run(capsys, *words, "--strategy=guided", "--option.weight=3.0")
    two = json.loads((tmp_path / "deep/out.json").read_text())
    assert (one["strategy"], two["strategy"]) == ("sample", "guided")
    assert two["options"] == {"weight": 3.0}
    assert one["results"] != two["results"]


@needs_harness
def test_a_task_that_is_not_there_is_named(lm, tasks):
    with pytest.raises(ConfigError, match=r"no task 'last_wrd'.*'last_word'"):
        evaluate.evaluate(lm, ["last_wrd"], tasks)


@needs_harness
def test_chats_are_read_with_their_special_tokens(lm):
    from tokjax.evaluation.harness import HarnessModel

    adapter = HarnessModel(lm)
    with pytest.raises(ConfigError, match="no chat template"):
        adapter.apply_chat_template([{"role": "user", "content": "hi"}])


@pytest.mark.skipif(HAS_HARNESS, reason="lm_eval is installed")
def test_without_the_harness_it_says_what_to_install(lm, tasks):
    with pytest.raises(ConfigError, match=r"tokjax\[eval\]"):
        evaluate.evaluate(lm, ["last_word"], tasks)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--model is missing"),
        (("--model=a", "--tasks=b"), "--task_dir is missing"),
        (("--model=a", "--tasks=b", "--task_dir=nowhere"), "is no folder"),
        (("--model=a", "--tasks=b", "--task_dir=.", "--limit=0"), "--limit=0"),
    ],
)
def test_what_cannot_be_meant_is_refused_first(capsys, words, message):
    code, shown = run(capsys, *words)
    assert (code, message in shown.err) == (2, True)


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        cli.run(evaluate.main, list(map(str, words)))
    return ended.value.code, capsys.readouterr()
