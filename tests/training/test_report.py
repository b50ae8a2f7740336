"""The report: complete, self-contained and safe, whatever the workdir holds."""

import itertools
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from tokjax import report as report_cli
from tokjax.errors import ConfigError, StorageError
from tokjax.training.curves import Curve, _running_mean, _thin, plot_curves, save_figure
from tokjax.training.ledger import Ledger
from tokjax.training.metrics import MetricWriter
from tokjax.training.report import write_report
from tokjax.training.run_facts import add_sample, read_run, read_samples, update_run
from tokjax.training.summary import summarise_run


def write_run(workdir, *, steps=600, every=1):
    """Fills a workdir like a patch-training run with two stages, one kill and two evaluations."""
    rng = np.random.default_rng(0)
    clock = itertools.count(0.0, 0.031)
    with MetricWriter(workdir, resume_step=None, clock=lambda: 1.77e9) as writer:
        for step in range(1, steps + 1, every):
            base = 2.9 + 5.4 * math.exp(-step / (steps * 0.12)) + (0.5 if step < steps // 2 else 0)
            row = {
                "loss": base + rng.normal(scale=0.08),
                "learning_rate": 3e-4
                * min(1, step / (steps * 0.05))
                * (0.55 + 0.45 * math.cos(step / steps * math.pi)),
                "grad_norm": float(np.exp(rng.normal(scale=0.25))) * (8 if step < 20 else 0.8),
                "tokens_per_second": 45_000 * (1 + rng.normal(scale=0.03)),
                "mfu": 0.38 + rng.normal(scale=0.01),
                "tokens": step * 16_384.0,
                "update_norm": rng.uniform(),
            }
            writer.write(step, row)
            if step % (steps // 12) == 0:
                writer.write(step, {"eval/docs/loss": base + 0.05, "eval/code/loss": base + 0.4})
    ledger = Ledger(
        workdir / "ledger.json",
        elapsed_before=6.0,
        clock=lambda: next(clock),
        wall=lambda: 1.77e9,
    )
    ledger.resume_from(0)
    for step in range(1, 200):
        with ledger.measure("step"):
            next(clock), next(clock), next(clock)
        ledger.at_step(step)
        if step % 50 == 0:
            ledger.saved(step)
    ledger.flush()
    ledger = Ledger(workdir / "ledger.json", clock=lambda: next(clock), wall=lambda: 1.77e9 + 600)
    ledger.resume_from(150)
    for category in ("compile", "eval", "save", "sample", "data_wait"):
        with ledger.measure(category):
            [next(clock) for _ in range(50)]
    for step in range(151, 600):
        with ledger.measure("step"):
            next(clock), next(clock), next(clock)
        ledger.at_step(step)
    ledger.close()
    update_run(
        workdir,
        title="Patch training on the standard library",
        command="python -m tokjax.train --config=configs/patch.py:k=4 --workdir=runs/patch",
        state="finished",
        total_steps=steps,
        config={
            "model": {"layers": 8, "width": 512},
            "optimizer": {"name": "adamw", "peak_lr": 3e-4},
            "stages": [{"patch": 4}, {"patch": 1}],
            "seed": 0,
        },
        versions={"tokjax": "0.1.0", "jax": "0.10.2"},
        model={"parameters": 29_100_000, "embedding": "2.1M", "blocks": "27.0M"},
        data={
            "examples": 8604,
            "tokens per step": 16_384,
            "unigram_entropy": {"docs": 5.874, "code": 5.412},
            "bytes_per_token": {"docs": 3.87},
        },
        compute={"FLOPs per step": "2.86T"},
        mesh={"data": 1, "fsdp": 8},
        stages=[{"name": "patches of 4", "first_step": 1}, {"name": "tokens", "first_step": 301}],
        warnings=["3 records of docs.jsonl were skipped: no text.", "1 update was skipped: <nan>"],
    )
    for step in range(0, steps + 1, steps // 10):
        add_sample(workdir, step, "The sorted function", f" returns a new list <b>{step}</b> &\n")
        add_sample(workdir, step, "import ", "os, sys" * (1 + step % 3))
    return workdir


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


class Page(HTMLParser):
    """Checks that tags nest, and collects text, attributes and tags."""

    VOID = frozenset({"meta", "br", "link", "img", "path", "use", "rect", "line"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.ids = [], [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] != "style" else ""


def read_page(workdir):
    path = write_report(workdir)
    assert path == workdir / "report.html"
    text = path.read_text()
    page = Page(text)
    # Nothing is fetched from anywhere and nothing is executed.
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "xlink:href"):
            assert value.startswith("#")
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert len(page.ids) == len(set(page.ids))
    references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert references <= set(page.ids)
    return page


def test_a_finished_run_shows_everything(finished_run):
    page = read_page(finished_run)
    assert page.tags.count("svg") == 1 + 4 + 2
    for text in (
        "Patch training on the standard library",
        "--config=configs/patch.py:k=4",
        "finished",
        "unigram entropy",
        "5.874",
        "bits per byte",
        "3 records of docs.jsonl were skipped",
        "1 update was skipped: <nan>",
        "49 steps were done again",
        "returns a new list <b>600</b> &",
        "optimizer.peak_lr",
        "stages.1.patch",
        "29,100,000",
        "data wait",
        "150 to 599",
        "Other metrics (2)",
        "6 of 11 samples",
    ):
        assert text in page.text, text
    assert page.tags.count("b") == 1  # "Worth knowing": none of the samples' markup came through


def test_the_final_loss_stands_beside_the_entropy_of_the_same_set(finished_run):
    from tokjax.training.ledger import read_ledger
    from tokjax.training.metrics import read_metrics, series

    table = read_metrics(finished_run)
    summary = summarise_run(
        table, read_run(finished_run), read_ledger(finished_run / "ledger.json")
    )
    docs, code = summary.evaluations
    assert (docs.name, docs.step, docs.unigram_entropy) == ("docs", 600, 5.874)
    assert docs.loss == series(table, "eval/docs/loss")[1][-1]
    assert docs.bits_per_byte == pytest.approx(docs.loss / math.log(2) / 3.87)
    assert (code.unigram_entropy, code.bits_per_byte) == (5.412, None)
    assert summary.borders == {"tokens": 301}
    assert list(summary.loss_columns) == ["training", "evaluation (docs)", "evaluation (code)"]
    assert summary.tokens == 600 * 16_384
    assert summary.tokens_per_second == pytest.approx(45_000, rel=0.02)


@pytest.mark.parametrize(
    "present",
    [
        ["metrics.csv"],
        ["run.json"],
        ["ledger.json"],
        ["samples.jsonl"],
        ["metrics.csv", "ledger.json"],
        ["run.json", "samples.jsonl"],
    ],
)
def test_whatever_is_missing_is_left_out(finished_run, tmp_path, present):
    for name in present:
        (tmp_path / name).write_bytes((finished_run / name).read_bytes())
    page = read_page(tmp_path)
    assert ("Wall time" in page.text) == ("ledger.json" in present)
    assert ("returns a new list" in page.text) == ("samples.jsonl" in present)
    assert ("Configuration" in page.text) == ("run.json" in present)
    assert ("svg" in page.tags) == ("metrics.csv" in present)


def test_a_run_of_one_step_without_an_evaluation(tmp_path):
    with MetricWriter(tmp_path, resume_step=None) as writer:
        writer.write(1, {"loss": 8.3})
    page = read_page(tmp_path)
    assert "8.300" in page.text
    assert "perplexity" not in page.text
    assert page.tags.count("svg") == 1


def test_a_run_that_has_only_begun(tmp_path):
    update_run(tmp_path, title="just begun", state="running")
    MetricWriter(tmp_path, resume_step=None).close()
    Ledger(tmp_path / "ledger.json")
    page = read_page(tmp_path)
    assert "just begun" in page.text
    assert "No metrics have been written yet" in page.text


def test_losses_that_are_not_finite_are_drawn_as_gaps_and_said(tmp_path):
    with MetricWriter(tmp_path, resume_step=None) as writer:
        for step in range(1, 7):
            writer.write(step, {"loss": math.nan if step in (3, 4) else math.inf / step})
        writer.write(6, {"eval/loss": math.inf, "grad_norm": math.nan})
    update_run(tmp_path, data={"unigram_entropy": 5.0})
    page = read_page(tmp_path)
    assert "loss was not finite at 6 of 6 logged steps, first at step 1" in page.text
    assert "not below the unigram entropy" in page.text


def test_an_evaluation_that_beats_unigrams_is_not_warned_about(tmp_path):
    with MetricWriter(tmp_path, resume_step=None) as writer:
        writer.write(1, {"eval/loss": 4.0})
        writer.write(2, {"eval/loss": 3.0})
    update_run(tmp_path, data={"unigram_entropy": 5.0, "bytes_per_token": 4.0})
    page = read_page(tmp_path)
    assert "Worth knowing" not in page.text
    assert "-2.0000" in page.text
    assert "20.09" in page.text  # perplexity, e^3


def test_an_evaluation_that_got_worse_is_named(tmp_path):
    with MetricWriter(tmp_path, resume_step=None) as writer:
        for step, loss in ((10, 3.0), (20, 3.5)):
            writer.write(step, {"eval/loss": loss})
    assert "lower before: 3.0000 at step 10" in read_page(tmp_path).text


HOSTILE = "<script>alert('&')</script>\"><img src=x onerror=y>{title}"


def test_text_from_models_and_users_never_becomes_markup(tmp_path):
    with MetricWriter(tmp_path, resume_step=None) as writer:
        writer.write(1, {"loss": 1.0, HOSTILE: 2.0, f"eval/{HOSTILE}/loss": 3.0, "a$b_{x": 1.0})
    update_run(
        tmp_path,
        title=HOSTILE,
        command=HOSTILE,
        state=HOSTILE,
        config={HOSTILE: HOSTILE},
        warnings=[HOSTILE],
        model={HOSTILE: HOSTILE},
        stages=[{"name": "a", "first_step": 1}, {"name": HOSTILE, "first_step": 1}],
    )
    add_sample(tmp_path, 1, HOSTILE, HOSTILE)
    assert read_page(tmp_path).text.count(HOSTILE) >= 8


@pytest.mark.parametrize("value", [None, 3, "text", [1, 2], {"a": None}])
@pytest.mark.parametrize(
    "key",
    ["title", "state", "total_steps", "config", "data", "model", "stages", "final", "warnings"],
)
def test_facts_of_any_shape_do_not_break_the_report(tmp_path, key, value):
    update_run(tmp_path, **{key: value, "versions": {"jax": "0.10.2"}})
    assert "0.10.2" in read_page(tmp_path).text


def test_the_final_numbers_stand_in_for_missing_metrics(tmp_path):
    update_run(tmp_path, final={"eval/loss": 3.25, "loss": "n/a"})
    assert "3.250" in read_page(tmp_path).text


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no metrics\.csv"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="nowhere"):
        report_cli.main([str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match="Usage"):
        report_cli.main([])


def test_the_command_writes_the_report_and_names_it(finished_run, capsys):
    report_cli.main([str(finished_run)])
    assert capsys.readouterr().out == f"{finished_run / 'report.html'}\n"
    report_cli.main(["--help"])
    assert "python -m tokjax.report WORKDIR" in capsys.readouterr().out


def test_an_old_report_survives_a_failure_to_write(finished_run, monkeypatch):
    write_report(finished_run)
    before = (finished_run / "report.html").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StorageError, match=r"report\.html.*No space left"):
        write_report(finished_run)
    assert (finished_run / "report.html").read_bytes() == before
    assert not list(finished_run.glob(".*tmp"))


def test_drawing_is_lazy(tmp_path):
    code = (
        "import sys\nimport tokjax.training.report, tokjax.training.run_facts\n"
        "assert not {'matplotlib', 'tensorflow', 'rich'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_facts_are_merged_and_samples_of_a_resumed_run_replace_the_old(tmp_path):
    update_run(tmp_path, title="a", state="running")
    update_run(tmp_path, state="finished", saved={"where": tmp_path})
    assert read_run(tmp_path) == {
        "title": "a",
        "state": "finished",
        "saved": {"where": str(tmp_path)},
    }
    add_sample(tmp_path, 20, "p", "later")
    add_sample(tmp_path, 10, "p", "old")
    with open(tmp_path / "samples.jsonl", "a") as file:
        file.write('{"step": 15, "pro')
    add_sample(tmp_path, 10, "p", "new")
    assert read_samples(tmp_path) == [
        {"step": 10, "prompt": "p", "text": "new"},
        {"step": 20, "prompt": "p", "text": "later"},
    ]
    (tmp_path / "run.json").write_text("[1")
    assert read_run(tmp_path) == {}
    update_run(tmp_path, title="b")
    assert read_run(tmp_path) == {"title": "b"}
    assert (tmp_path / "run.damaged-1.json").read_text() == "[1"


def curves():
    steps = np.arange(1000)
    loss = 3 + 5 * np.exp(-steps / 100) + np.random.default_rng(0).normal(size=1000) * 0.05
    return [
        Curve("method", steps, loss),
        Curve("control", steps[::100], 3.4 + loss[::100] * 0.1, "--"),
    ]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_figures_of_reproductions_are_saved(tmp_path, suffix):
    figure = plot_curves(curves(), title="t", borders={"tokens": 500}, levels={"claimed": 3.1})
    save_figure(figure, tmp_path / f"f{suffix}")
    content = (tmp_path / f"f{suffix}").read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["method", "control", "claimed"]
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        save_figure(figure, tmp_path / "f.jpg")


def test_a_far_outlier_leaves_the_curve_readable_and_is_mentioned():
    values = np.linspace(8, 3, 1000)
    values[500] = 1e6
    figure = plot_curves([Curve("loss", np.arange(1000), values)])
    assert figure.axes[0].get_ylim()[1] < 20
    assert any("1e+06" in text.get_text() for text in figure.axes[0].texts)


def test_thinning_keeps_extremes_and_gaps():
    values = np.random.default_rng(0).normal(size=10_000)
    values[1234], values[5678], values[7000] = 50.0, -50.0, np.nan
    steps, thin = _thin(np.arange(10_000.0), values)
    assert len(thin) < 2000
    assert np.nanmax(thin) == 50
    assert np.nanmin(thin) == -50
    assert np.isnan(thin[steps == 7000]).all()
    assert (np.diff(steps) > 0).all()


def test_the_running_mean_is_the_mean_of_the_window():
    values = np.random.default_rng(0).normal(size=1000)
    values[400:430] = np.nan
    steps, mean = _running_mean(np.arange(1000.0), values)
    at = int(np.argmin(np.abs(steps - 600)))
    center = int(steps[at])
    assert mean[at] == pytest.approx(values[center - 10 : center + 11].mean())
    assert (mean[0], mean[-1]) == pytest.approx((values[:11].mean(), values[-11:].mean()))
    inside = (steps >= 411) & (steps <= 418)
    assert inside.any()
    assert np.isnan(mean[inside]).all()


def test_the_running_mean_does_not_mix_stages():
    steps, values = np.arange(1, 1001.0), np.where(np.arange(1, 1001) < 301, 8.0, 3.0)
    steps, mean = _running_mean(steps, values, [301])
    assert set(mean[steps < 301]) == {8.0}
    assert set(mean[steps >= 301]) == {3.0}
    assert {300.0, 301.0} <= set(steps)


@pytest.mark.parametrize("borders", [[0], [1], [5], [1000], [2000], [300, 300, 700]])
def test_borders_anywhere_are_fine(borders):
    steps, mean = _running_mean(np.arange(1, 1001.0), np.ones(1000), borders)
    assert (np.diff(steps) > 0).all()
    assert set(mean) == {1.0}


def test_labels_are_shown_as_they_are(tmp_path):
    names = ["_hidden", "cost in $ and $x_", "損失"]
    figure = plot_curves([Curve(name, [1, 2], [1, 2]) for name in names], title="$\\frac$")
    save_figure(figure, tmp_path / "f.png")
    assert len(figure.axes[0].get_legend().get_texts()) == 3


def test_half_a_character_in_a_sample_does_not_cost_the_report(tmp_path):
    add_sample(tmp_path, 1, "p", "caf\udcc3 au lait")
    assert "caf? au lait" in read_page(tmp_path).text


def test_a_report_of_a_long_run_stays_small(tmp_path):
    rows = "".join(f"{s},1.0,{8 - s / 30000},{s % 7}\n" for s in range(1, 100_001))
    (tmp_path / "metrics.csv").write_text("step,time,loss,grad_norm\n" + rows)
    assert write_report(tmp_path).stat().st_size < 1_000_000
    json.dumps(read_run(tmp_path))
