"""One self-contained HTML page about a selection: scores, lengths, and examples of both sides."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float32, Float64

from tokjax.data.offsets import Offsets, offsets_from_bytes
from tokjax.data.store import TokenStore
from tokjax.data.tokenizers import Tokenizer
from tokjax.files import write_atomically
from tokjax.scores import HEAT_STYLE, heat_spans
from tokjax.training.curves import COLORS, inline_svg
from tokjax.training.templates import PAGE, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEPT_SHOWN, DROPPED_SHOWN = 5, 4
_TOKENS_SHOWN = 400
_INK = "#1f2a37"  # becomes the page's text colour
_FULL = (0.05, 0.95)  # quantiles of the shown values between which colours lie


@dataclass(frozen=True, eq=False)
class Selection:
    """A finished selection.

    Attributes:
        store: the pool.
        scores: of its examples; not finite where there is none.
        keep: which are kept.
        meta: what is written into the artifact.
    """

    store: TokenStore
    scores: Float64[np.ndarray, "N"]
    keep: Bool[np.ndarray, "N"]
    meta: Mapping[str, Any]

    @property
    def scored(self) -> Bool[np.ndarray, "N"]:
        """Which examples have a score."""
        return np.isfinite(self.scores)

    def shown(self) -> tuple[list[int], list[int]]:
        """Returns the kept examples with the highest scores, and dropped ones: the last, and those
        that were nearly kept.
        """
        order = np.argsort(-np.where(self.scored, self.scores, -np.inf), kind="stable")
        kept = [int(i) for i in order if self.keep[i]][:KEPT_SHOWN]
        dropped = [int(i) for i in order if not self.keep[i] and self.scored[i]]
        nearly = dropped[: DROPPED_SHOWN // 2]
        last = dropped[max(len(nearly), len(dropped) - (DROPPED_SHOWN - DROPPED_SHOWN // 2)) :]
        return kept, [*nearly, *last]


def length_correlation(
    scores: Float64[np.ndarray, "N"], lengths: Sequence[int] | np.ndarray
) -> float | None:
    """Returns Spearman's rank correlation of finite scores with lengths; None without one."""
    from scipy.stats import spearmanr

    known = np.isfinite(scores)
    scores, lengths = scores[known], np.asarray(lengths)[known]
    if len(set(scores.tolist())) < 2 or len(set(lengths.tolist())) < 2:
        return None
    found: Any = spearmanr(scores, lengths)
    return float(found.statistic)


def write_report(
    path: Path,
    selection: Selection,
    tokenizer: Tokenizer,
    channel: tuple[str, Mapping[int, Float32[np.ndarray, "n"]]] | None = None,
) -> None:
    """Writes the page.

    Args:
        path: of the file.
        selection: what was selected.
        tokenizer: of the pool.
        channel: name of what each token was found to have, and its values for the shown examples.

    Raises:
        StorageError: the page cannot be written.
    """
    meta = selection.meta
    title = f"Selection by {meta['method']}"
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<div class="soft">{_text(meta["pool"])}, scored by {_text(meta["model"])}</div>',
        _cards(selection),
        "<h2>Scores</h2>",
        f'<div class="figures">{_figures(selection)}</div>',
        _examples(selection, tokenizer, channel),
        "<h2>Settings</h2>",
        _facts(meta),
        f'<footer class="soft">Written {_text(meta["created"])}.</footer>',
    ]
    page = PAGE.format(title=_text(title), style=STYLE + HEAT_STYLE, body="\n".join(parts))
    write_atomically(path, page.encode("utf-8", "replace"))


def _text(value: Any) -> str:
    return html.escape(str(value))


def _cards(selection: Selection) -> str:
    counts, lengths = selection.meta["counts"], np.asarray(selection.store.lengths)
    keep = selection.keep
    correlation = selection.meta["length_correlation"]
    cards = [
        (f"{counts['kept']:,}", "examples kept"),
        (f"{counts['dropped']:,}", "examples dropped"),
        (
            f"{counts['unscored']:,}",
            "of these without a score: no token that counts, or left out by the method",
        ),
        (_number(lengths[keep].mean() if keep.any() else None), "tokens of a kept example, mean"),
        (
            _number(lengths[~keep].mean() if (~keep).any() else None),
            "tokens of a dropped example, mean",
        ),
        (_number(correlation), "rank correlation of score and length (Spearman)"),
    ]
    boxes = (
        f'<div class="card"><div class="value">{value}</div><div class="label">{label}</div></div>'
        for value, label in cards
    )
    return f'<h2>Result</h2><div class="cards">{"".join(boxes)}</div>'


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _figures(selection: Selection) -> str:
    scored, keep = selection.scored, selection.keep
    groups = [
        ("dropped", selection.scores[scored & ~keep], selection.store.lengths[scored & ~keep]),
        ("kept", selection.scores[keep], selection.store.lengths[keep]),
    ]
    histogram, axes = _axes("Scores", "score", "examples")
    bins = np.histogram_bin_edges(selection.scores[scored], 40) if scored.any() else 1
    axes.hist(
        [scores for _, scores, _ in groups],
        bins=bins,  # type: ignore[arg-type]
        stacked=True,
        color=[COLORS[6], COLORS[2]],
        label=[name for name, _, _ in groups],
    )
    axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
    scatter, axes = _axes("Scores and lengths", "tokens", "score")
    for (name, scores, lengths), color in zip(groups, (COLORS[6], COLORS[2]), strict=True):
        some = np.random.default_rng(0).permutation(len(scores))[:2000]
        axes.scatter(lengths[some], scores[some], s=9, color=color, alpha=0.6, label=name)
    figures = (
        inline_svg(histogram, "Histogram of the scores", "scores"),
        inline_svg(scatter, "Scores by the number of tokens", "lengths"),
    )
    return "".join(f'<div class="figure">{svg}</div>' for svg in figures)


def _axes(title: str, x_label: str, y_label: str) -> "tuple[Figure, Any]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, color=_INK, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel(x_label, color=_INK)
    axes.set_ylabel(y_label, color=_INK)
    axes.grid(alpha=0.18, color=_INK, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK)
    return figure, axes


def _examples(
    selection: Selection,
    tokenizer: Tokenizer,
    channel: tuple[str, Mapping[int, np.ndarray]] | None,
) -> str:
    kept, dropped = selection.shown()
    bounds = None
    if channel is not None:
        values = [v[v != 0] for v in channel[1].values()]
        flat = np.concatenate([np.zeros(0), *values])
        if len(flat):
            bounds = tuple(float(q) for q in np.quantile(flat, _FULL))
    parts = []
    if bounds is not None and channel is not None:
        parts.append(
            f'<p class="soft">Coloured by {_text(channel[0])}, from {bounds[0]:.3g} (no colour) to '
            f"{bounds[1]:.3g} (full colour); the values show where the pointer rests. Grey tokens "
            f"do not count.</p>"
        )
    for title, group in (("Kept: the highest scores", kept), ("Dropped", dropped)):
        parts.append(f"<h2>{title}</h2>")
        if not group:
            parts.append('<p class="soft">None.</p>')
        for i in group:
            name = _text(selection.store.example_name(i))
            parts.append(f"<h3>{name}, score {selection.scores[i]:.4f}</h3>")
            own = None if channel is None or bounds is None else channel[1].get(i)
            parts.append(_heat(selection.store, tokenizer, i, own, bounds or (0.0, 1.0)))
    return "\n".join(parts)


def _heat(
    store: TokenStore,
    tokenizer: Tokenizer,
    i: int,
    values: np.ndarray | None,
    bounds: tuple[float, ...],
) -> str:
    ids = store.tokens(i)[:_TOKENS_SHOWN].tolist()
    pieces = [tokenizer.token_text(token) for token in ids]
    text, offsets = _decoded(tokenizer, ids)
    width = max(bounds[1] - bounds[0], 1e-9)
    shares: list[float | None] = [None] * len(ids)
    titles = list(pieces)
    for t, value in enumerate([] if values is None else values[: len(ids)].tolist()):
        if value != 0:
            shares[t] = (value - bounds[0]) / width
            titles[t] = f"{pieces[t]}: {value:.3f}"
    spans = "".join(heat_spans(text, pieces, offsets, shares, titles))
    rest = int(store.lengths[i]) - len(ids)
    more = f' <span class="soft">... and {rest} more tokens</span>' if rest else ""
    return f'<div class="box heat">{spans}{more}</div>'


def _decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, Offsets]:
    """Returns the text of ids and the characters that each touches."""
    pieces = [tokenizer.token_bytes(token) for token in ids]
    try:
        text = b"".join(pieces).decode()
    except UnicodeDecodeError:  # broken off inside a character, or bytes that are no text
        shown = ["" if not p else tokenizer.token_text(t) for p, t in zip(pieces, ids, strict=True)]
        pieces = [part.encode("utf-8", "replace") for part in shown]
        text = b"".join(pieces).decode()
    return text, offsets_from_bytes(text, pieces)


def _facts(meta: Mapping[str, Any]) -> str:
    rows = []
    for name, value in meta.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [(f"{name}.{key}" if key else name, own) for key, own in inner]
    cells = "".join(f"<tr><td>{_text(n)}</td><td>{_text(v)}</td></tr>" for n, v in rows)
    return f'<div class="box facts"><table>{cells}</table></div>'
