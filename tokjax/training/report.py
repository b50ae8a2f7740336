"""One self-contained HTML page about a run, made of whatever its workdir holds so far."""

import html
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokjax.errors import ConfigError
from tokjax.files import write_atomically
from tokjax.training import ledger as ledger_file
from tokjax.training.curves import COLORS, Curve, inline_svg, plot_curves, save_figure
from tokjax.training.ledger import duration, read_ledger
from tokjax.training.metrics import read_metrics, series
from tokjax.training.run_facts import read_run, read_samples
from tokjax.training.summary import RunSummary, summarise_run
from tokjax.training.templates import PAGE, STYLE

__all__ = ["REPORT_FILE", "Curve", "plot_curves", "save_figure", "write_report"]

REPORT_FILE = "report.html"
_OTHER_FIGURES = 24
_SAMPLE_STEPS = 6
_PLAIN = (
    ("learning_rate", "Learning rate", ""),
    ("grad_norm", "Gradient norm", ""),
    ("tokens_per_second", "Speed", "tokens per second"),
    ("mfu", "Model FLOPs utilisation", "share of the peak"),
)
_CATEGORY_COLORS = {
    "step": "#2a9d76",
    "compile": "#3a86c8",
    "start_up": "#7fb2dc",
    "data_wait": "#b8961e",
    "rollout": "#d98032",
    "eval": "#7a6fd0",
    "save": "#c4589a",
    "sample": "#5bb8b0",
    "report": "#a98f7a",
    "other": "#9aa3ad",
    "lost": "#cf4a4a",
}


def write_report(workdir: Path) -> Path:
    """Writes `workdir/report.html` about a run, going on or ended, and returns its path.

    The page needs no network and no script. It reads `metrics.csv`, `ledger.json`, `run.json`
    and `samples.jsonl`, and leaves out what is missing.

    Raises:
        ConfigError: `workdir` holds none of these files.
        StorageError: the page cannot be written; an older one is untouched.
    """
    workdir = Path(workdir)
    run, samples = read_run(workdir), read_samples(workdir)
    table = read_metrics(workdir)
    ledger = read_ledger(workdir / ledger_file.FILE_NAME)
    if not (run or samples or table or ledger):
        raise ConfigError(
            f"{workdir} is not the workdir of a run: there is no metrics.csv, run.json, "
            "ledger.json or samples.jsonl in it"
        )
    summary = summarise_run(table, run, ledger)
    parts = [
        _header(workdir, run),
        _cards(summary, run, ledger),
        _warnings(summary.warnings),
        _evaluations(summary),
        _figures(table, summary),
        _samples(samples),
        _wall_time(ledger),
        _facts(run),
        f'<footer class="soft">Written {_date(time.time())}.</footer>',
    ]
    title = html.escape(str(run.get("title") or workdir.resolve().name))
    page = PAGE.format(title=title, style=STYLE, body="\n".join(filter(None, parts)))
    # A model may emit half a character: it must not cost the report.
    write_atomically(workdir / REPORT_FILE, page.encode("utf-8", "replace"))
    return workdir / REPORT_FILE


def _text(value: Any) -> str:
    return html.escape(str(value))


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _number(value: float, digits: int = 4) -> str:
    """Returns a number for people: 12,000; 2.914; 3.0e-05."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1e-3 <= abs(value) < 10 ** (digits + 1):
        whole = max(1, len(str(int(abs(value)))))
        return f"{value:,.{max(0, digits - whole)}f}"
    return f"{value:,.0f}" if 1 <= abs(value) < 1e15 else f"{value:.2e}"


def _rows(
    rows: Iterable[Sequence[Any]], header: Sequence[str] = (), numbers: int = 0, kind: str = ""
) -> str:
    """Returns a table; the last `numbers` columns are aligned to the right. Cells are escaped."""
    lines = []
    for row, cell in [(header, "th"), *((row, "td") for row in rows)]:
        first_number = len(row) - numbers
        classes = [' class="number"' if i >= first_number else "" for i in range(len(row))]
        cells = (
            f"<{cell}{c}>{v if isinstance(v, _Markup) else _text(v)}</{cell}>"
            for c, v in zip(classes, row, strict=True)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>" if row else "")
    return f'<div class="box {kind}"><table>{"".join(lines)}</table></div>'


class _Markup(str):
    """HTML that is escaped already."""


def _header(workdir: Path, run: Mapping[str, Any]) -> str:
    state = f'<span class="state">{_text(run["state"])}</span>' if run.get("state") else ""
    lines = [f"<h1>{_text(run.get('title') or workdir.resolve().name)}{state}</h1>"]
    lines.append(f'<div class="soft">{_text(workdir.resolve())}</div>')
    if run.get("command"):
        lines.append(f"<pre>{_text(run['command'])}</pre>")
    return "\n".join(lines)


def _cards(summary: RunSummary, run: Mapping[str, Any], ledger: Mapping[str, Any] | None) -> str:
    cards: list[tuple[str, str]] = []
    if summary.evaluations:
        final = summary.evaluations[0]
        of = f" ({final.name})" if final.name else ""
        cards.append((_number(final.loss), f"final evaluation loss{of}, nats per token"))
        if final.unigram_entropy is not None:
            cards.append((_number(final.unigram_entropy), "unigram entropy, nats per token"))
        of_unigrams = ""
        if final.unigram_entropy is not None:
            of_unigrams = f" (unigrams: {_number(_exp(final.unigram_entropy), 3)})"
        cards.append((_number(_exp(final.loss)), f"perplexity{of_unigrams}"))
        if final.bits_per_byte is not None:
            cards.append((_number(final.bits_per_byte), "bits per byte"))
    if summary.train_loss is not None:
        cards.append((_number(summary.train_loss), "training loss, mean of the last steps"))
    if summary.last_step is not None:
        total = run.get("total_steps")
        of = f" of {_number(float(total))}" if isinstance(total, int | float) else ""
        cards.append((_number(summary.last_step), f"steps done{of}"))
    if summary.tokens is not None:
        cards.append((_number(summary.tokens), "training tokens seen"))
    if summary.tokens_per_second is not None:
        share = f" at {100 * summary.mfu:.1f} % MFU" if summary.mfu is not None else ""
        cards.append((_number(round(summary.tokens_per_second)), f"tokens per second{share}"))
    if ledger:
        useful = f"wall time, {100 * ledger['useful']:.0f} % of it in training steps"
        cards.append((duration(ledger["wall_seconds"]), useful))
    boxes = (
        f'<div class="card"><div class="value">{_text(value)}</div>'
        f'<div class="label">{_text(label)}</div></div>'
        for value, label in cards
    )
    return f'<h2>Result</h2><div class="cards">{"".join(boxes)}</div>' if cards else ""


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    items = "".join(f"<li>{_text(warning)}</li>" for warning in warnings)
    return f'<div class="warnings"><b>Worth knowing</b><ul>{items}</ul></div>'


def _evaluations(summary: RunSummary) -> str:
    if not summary.evaluations:
        return ""
    header = ["evaluation", "at step", "loss", "unigram entropy", "difference", "perplexity",
              "unigram perplexity", "bits per byte", "best loss (step)"]  # fmt: skip
    rows = []
    for e in summary.evaluations:
        unigram = e.unigram_entropy
        rows.append([
            e.name or "evaluation data",
            _number(e.step) if e.step is not None else "–",
            _number(e.loss),
            _number(unigram) if unigram is not None else "–",
            f"{e.loss - unigram:+.4f}" if unigram is not None else "–",
            _number(_exp(e.loss)),
            _number(_exp(unigram)) if unigram is not None else "–",
            _number(e.bits_per_byte) if e.bits_per_byte is not None else "–",
            f"{_number(e.best_loss)} ({e.best_step})" if e.best_loss is not None else "–",
        ])  # fmt: skip
    note = (
        "Losses in nats per token. The unigram entropy is the loss of a model that knows only how "
        "frequent each token is in the evaluation data: a model that has learned to use context "
        "is below it."
    )
    return _rows(rows, header, numbers=8) + f'<p class="soft">{note}</p>'


def _figures(table: Mapping[str, list[Any]], summary: RunSummary) -> str:
    if not table or not table["step"]:
        return '<h2>Curves</h2><p class="soft">No metrics have been written yet.</p>'
    figures = []
    losses = [Curve(name, *series(table, column)) for name, column in summary.loss_columns.items()]
    levels = dict(summary.unigram_levels)
    if losses:
        figure = plot_curves(
            losses, title="Loss", y_label="nats per token", levels=levels,
            borders=summary.borders, size=(11, 4.6),
        )  # fmt: skip
        svg = inline_svg(figure, "Training and evaluation loss by step", "loss")
        figures.append(f'<div class="figure wide">{svg}</div>')
    used = {"step", "time", *summary.loss_columns.values()}
    for column, title, unit in _PLAIN:
        if column in table:
            used.add(column)
            figures.append(_small_figure(table, column, title, unit, summary.borders))
    rest = [column for column in table if column not in used and any(
        v is not None for v in table[column]
    )]  # fmt: skip
    others = [
        _small_figure(table, column, column, "", summary.borders)
        for column in rest[:_OTHER_FIGURES]
    ]
    body = f'<h2>Curves</h2><div class="figures">{"".join(figures)}</div>'
    if others:
        more = len(rest) - len(others)
        note = f'<p class="soft">{more} more are in metrics.csv.</p>' if more else ""
        body += (
            f"<details><summary>Other metrics ({len(rest)})</summary>"
            f'<div class="figures">{"".join(others)}</div>{note}</details>'
        )
    return body


def _small_figure(
    table: Mapping[str, list[Any]],
    column: str,
    title: str,
    unit: str,
    borders: Mapping[str, float],
) -> str:
    steps, values = series(table, column)
    if len(steps) == 0:
        return ""
    figure = plot_curves(
        [Curve(title, steps, values)], title=title, y_label=unit, borders=borders, size=(6, 3)
    )
    name = re.sub(r"\W", "_", column)
    return f'<div class="figure">{inline_svg(figure, f"{title} by step", name)}</div>'


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    prompts = list(dict.fromkeys(sample["prompt"] for sample in samples))
    parts = ["<h2>Samples</h2>"]
    for prompt in prompts:
        own = [sample for sample in samples if sample["prompt"] == prompt]
        count = min(len(own), _SAMPLE_STEPS)
        # Evenly spread over the run, the first and the last included.
        picks = {round(i * (len(own) - 1) / max(1, count - 1)) for i in range(count)}
        rows = [
            [_number(own[i]["step"]), _Markup(f'<div class="sample">{_text(own[i]["text"])}</div>')]
            for i in sorted(picks)
        ]
        shown = prompt if prompt.strip() else "(empty prompt)"
        note = f" – {len(picks)} of {len(own)} samples" if len(own) > len(picks) else ""
        parts.append(
            f"<h3>{_text(shown)}{note}</h3>" + _rows(rows, ["step", "text"], kind="samples")
        )
    return "\n".join(parts)


def _wall_time(ledger: Mapping[str, Any] | None) -> str:
    if not ledger or not ledger["wall_seconds"]:
        return ""
    wall, shares = ledger["wall_seconds"], []
    rows = []
    order = sorted(ledger["seconds"].items(), key=lambda item: -item[1])
    for category, seconds in order:
        if seconds <= 0:
            continue
        color, name = _CATEGORY_COLORS.get(category, COLORS[-2]), category.replace("_", " ")
        share = 100 * seconds / wall
        shares.append(
            f'<span style="width:{share:.3f}%;background:{color}" title="{_text(name)} '
            f'{share:.1f} %"></span>'
        )
        dot = _Markup(f'<span class="dot" style="background:{color}"></span>{_text(name)}')
        rows.append([dot, duration(seconds), f"{share:.1f} %"])
    parts = [
        f"<h2>Wall time: {duration(wall)}</h2>",
        f'<div class="bar" role="img" aria-label="Wall time by category">{"".join(shares)}</div>',
        _rows(rows, ["where it went", "time", "share"], numbers=2),
    ]
    if ledger["starts"] > 1:
        starts = [
            [
                number,
                _date(entry["started"]),
                duration(sum(entry["seconds"].values())),
                "–"
                if entry["last_step"] is None
                else f"{entry['first_step']} to {entry['last_step']}",
                entry["lost_steps"],
                entry["exit"] or "running",
            ]
            for number, entry in enumerate(ledger["entries"], 1)
        ]
        header = ["start", "began", "ran for", "steps", "steps done again later", "ended"]
        parts.append(_rows(starts, header))
        away = duration(ledger["away_seconds"])
        parts.append(f'<p class="soft">Between the starts nothing ran for {away}.</p>')
    return "\n".join(parts)


def _facts(run: Mapping[str, Any]) -> str:
    parts = []
    for section in ("model", "data", "compute", "mesh", "saved", "versions"):
        facts = run.get(section)
        if isinstance(facts, Mapping) and facts:
            rows = _flatten(facts, digits=6)
            parts.append(f"<h2>{section.capitalize()}</h2>{_rows(rows, kind='facts')}")
    config = run.get("config")
    if isinstance(config, Mapping) and config:
        table = _rows(_flatten(config), ["key", "value"], kind="facts")
        parts.append(f"<details><summary>Configuration</summary>{table}</details>")
    return "\n".join(parts)


def _flatten(
    tree: Mapping[str, Any], prefix: str = "", *, digits: int = 17
) -> list[tuple[str, str]]:
    """Returns the leaves of nested mappings and lists of mappings under dotted keys.

    Args:
        tree: the mapping.
        prefix: of every key.
        digits: significant ones of a number; 17 tell every two apart.
    """
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping) and value:
            rows += _flatten(value, f"{name}.", digits=digits)
        elif isinstance(value, float | int) and not isinstance(value, bool):
            exact = repr(value) if digits == 17 else f"{value:.{digits}g}"
            rows.append((name, exact if isinstance(value, float) else f"{value:,}"))
        else:
            rows.append((name, "none" if value is None else str(value)))
    return rows
