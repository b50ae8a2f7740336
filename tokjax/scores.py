"""What a model says of each token of some texts, as numbers, as a table and as a coloured page."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from tokjax.data.tokenizers import Tokenizer
from tokjax.signals.token_stats import TokenStats

_NLL_OF_FULL_COLOUR = 10.0
HEAT_STYLE = """
.heat { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; }
.heat span { border-radius: 3px; } .heat .unscored { color: var(--soft); }
.heat .special { border: 1px dashed var(--line); color: var(--soft); font-size: 80%; }
.heat .line::before { content: "\\21b5"; color: var(--soft); }
"""


@dataclass(frozen=True, eq=False)
class Scores:
    """Statistics of texts, token by token. T is the longest row.

    A row's first token has no prediction: its numbers are NaN (ranks -1), as those behind its
    length are.

    Attributes:
        texts: what was scored.
        tokens: ids, with the BOS id if the model expects one; zeros behind a row's length.
        lengths: number of ids of each row.
        offsets: for each row and token the characters [start, end) of the text it touches; (0, 0)
            for BOS.
        mask: where there is a prediction.
        stats: nll, logprob, entropy (in nats), rank (0 is the likeliest), top_ids and top_logprobs
            of the prediction of each token, as NumPy arrays.
        tokenizer: the one that made the ids.
    """

    texts: tuple[str, ...]
    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, "B"]
    offsets: tuple[tuple[tuple[int, int], ...], ...]
    mask: Bool[np.ndarray, "B T"]
    stats: TokenStats = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)

    @property
    def nll(self) -> Float[np.ndarray, "B T"]:
        """Negative log-likelihood of each token given those before it, in nats."""
        return np.asarray(self.stats.nll)

    @property
    def logprob(self) -> Float[np.ndarray, "B T"]:
        """Its negative."""
        return np.asarray(self.stats.logprob)

    @property
    def entropy(self) -> Float[np.ndarray, "B T"]:
        """Entropy of the prediction of each token, in nats."""
        return np.asarray(self.stats.entropy)

    @property
    def rank(self) -> Int[np.ndarray, "B T"]:
        """Number of tokens likelier than the one that came."""
        return np.asarray(self.stats.rank)

    @property
    def mean_nll(self) -> Float[np.ndarray, "B"]:
        """Mean over each row's predicted tokens, in nats; NaN where there is none."""
        counts = self.mask.sum(1)
        total = np.where(self.mask, self.nll, 0.0).sum(1)
        return np.where(counts > 0, total / np.maximum(counts, 1), np.nan)

    def pieces(self, row: int = 0) -> list[str]:
        """Returns a readable form of each token of a row."""
        ids = self.tokens[row, : self.lengths[row]].tolist()
        return [self.tokenizer.token_text(i) for i in ids]

    def table(self, row: int | None = None) -> str:
        """Returns a plain table with a line for each token, of one row or of all.

        Args:
            row: which; None takes all of them.
        """
        rows = range(len(self.texts)) if row is None else [row]
        return "\n\n".join("\n".join(self._lines(b)) for b in rows)

    def heatmap(self) -> str:
        """Returns an HTML page of the texts, each token coloured by its nll.

        The page needs no network and no script; the numbers show where the pointer rests.
        """
        # Imported here: scoring alone needs no page.
        from tokjax.training.templates import PAGE, STYLE

        return PAGE.format(title="Token scores", style=STYLE + HEAT_STYLE, body=self._body())

    def _repr_html_(self) -> str:
        return f"<style>{HEAT_STYLE}</style>{self._body()}"

    def _lines(self, b: int) -> Iterator[str]:
        names = [_printable(piece) for piece in self.pieces(b)]
        width = min(24, max([5, *map(len, names)]))
        yield f"{'':>4} {'token':<{width}} {'nll':>7} {'entropy':>7} {'rank':>6}  likeliest"
        for t, name in enumerate(names):
            line = f"{t:>4} {name[:width]:<{width}} "
            if not self.mask[b, t]:
                yield line + f"{'-':>7} {'-':>7} {'-':>6}"
                continue
            likeliest = _printable(self.tokenizer.token_text(self._best(b, t)))
            yield line + (
                f"{self.nll[b, t]:>7.3f} {self.entropy[b, t]:>7.3f} {self.rank[b, t]:>6}  "
                f"{likeliest}"
            )
        scored = int(self.mask[b].sum())
        if scored:
            mean = self.mean_nll[b]
            yield f"mean nll {mean:.4f} nats over {scored} tokens, perplexity {np.exp(mean):.2f}"

    def _best(self, b: int, t: int) -> int:
        return int(np.asarray(self.stats.top_ids)[b, t, 0])

    def _body(self) -> str:
        blocks = []
        for b in range(len(self.texts)):
            scored = int(self.mask[b].sum())
            facts = f"{scored} tokens" + (f", mean nll {self.mean_nll[b]:.3f}" if scored else "")
            spans = "".join(self._spans(b))
            blocks.append(f'<h3>{facts}</h3><div class="box heat">{spans}</div>')
        return "\n".join(blocks)

    def _spans(self, b: int) -> Iterator[str]:
        """Yields a span for each token, or for several that share a character."""
        pieces = self.pieces(b)
        shares = [
            float(self.nll[b, t]) / _NLL_OF_FULL_COLOUR if self.mask[b, t] else None
            for t in range(len(pieces))
        ]
        titles = [self._tooltip(b, t, piece) for t, piece in enumerate(pieces)]
        return heat_spans(self.texts[b], pieces, self.offsets[b], shares, titles)

    def _tooltip(self, b: int, t: int, piece: str) -> str:
        name = _printable(piece)
        if not self.mask[b, t]:
            return f"{name}: no prediction"
        probability = np.exp(self.logprob[b, t])
        return (
            f"{name}: nll {self.nll[b, t]:.3f}, p {probability:.3g}, entropy "
            f"{self.entropy[b, t]:.3f}, rank {self.rank[b, t]}, likeliest "
            f"{_printable(self.tokenizer.token_text(self._best(b, t)))}"
        )


def heat_spans(
    text: str,
    pieces: Sequence[str],
    offsets: Sequence[tuple[int, int]],
    shares: Sequence[float | None],
    titles: Sequence[str],
) -> Iterator[str]:
    """Yields a coloured HTML span for each token, or for several that share a character.

    The page needs `HEAT_STYLE`, and the spans a parent of the class `heat`.

    Args:
        text: that the tokens make up.
        pieces: a readable form of each token.
        offsets: characters [start, end) that each token touches.
        shares: of the full colour, for each token; those of several in one span add up. None where
            there is no value.
        titles: what is shown where the pointer rests, for each token.
    """
    shown = 0
    for tokens in _groups(offsets):
        start, end = offsets[tokens[0]][0], offsets[tokens[-1]][1]
        part = text[max(start, shown) : end]
        shown = max(shown, end)
        title = html.escape("\n".join(titles[t] for t in tokens))
        scored = [share for t in tokens if (share := shares[t]) is not None]
        names = [] if scored else ["unscored"]
        if not part:
            names.append("special")
            part = "".join(pieces[t] for t in tokens)
        elif not part.strip("\r\n"):
            names.append("line")
        style = ""
        if scored:
            share = max(0.0, min(sum(scored), 1.0))
            style = f' style="background: rgba(214, 69, 65, {0.85 * share:.3f})"'
        kind = f' class="{" ".join(names)}"' if names else ""
        yield f'<span{kind}{style} title="{title}">{html.escape(part)}</span>'


def _printable(text: str) -> str:
    """Returns a token on one line, its blanks visible."""
    for blank, shown in ((" ", "\u00b7"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(blank, shown)
    return text


def _groups(offsets: Any) -> list[list[int]]:
    """Returns runs of tokens, each sharing no character with the next."""
    groups: list[list[int]] = []
    end = 0
    for t, (start, stop) in enumerate(offsets):
        if groups and start < end and stop > start:
            groups[-1].append(t)
        else:
            groups.append([t])
        end = max(end, stop)
    return groups
