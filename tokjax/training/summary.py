"""The headline numbers of a run, computed from its metrics and facts, and what to be wary of."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokjax.training.metrics import series

_EVAL_LOSS = re.compile(r"(?:eval|validation|valid|test)(?:[/_](.+?))?[/_]loss")
_TRAIN_LOSS = ("loss", "train/loss")
_LAST_SHARE = 0.02  # the training loss is a mean over this last part of the logged steps


@dataclass(frozen=True)
class Evaluation:
    """The last loss on one evaluation set and what to hold it against.

    Attributes:
        name: of the set; empty for the only one.
        step: where the loss was measured, None when only the final number is known.
        loss: nats per token.
        best_loss: lowest finite loss, with its `best_step`.
        unigram_entropy: nats per token of the set under its own token frequencies.
        bits_per_byte: of the set, independent of the tokenizer.
    """

    name: str
    step: int | None
    loss: float
    best_loss: float | None = None
    best_step: int | None = None
    unigram_entropy: float | None = None
    bits_per_byte: float | None = None


@dataclass(frozen=True)
class RunSummary:
    """What a report says first.

    Attributes:
        evaluations: one per evaluation set.
        train_loss: mean of the last part of the logged steps, nats per token.
        last_step: last step with metrics.
        tokens: training tokens seen.
        tokens_per_second: median over the logged steps.
        mfu: median over the logged steps, 0 to 1.
        loss_columns: legend to column of every loss, training first.
        unigram_levels: legend to unigram entropy.
        borders: name of a stage to the step it begins at, without the first.
        warnings: sentences.
    """

    evaluations: tuple[Evaluation, ...] = ()
    train_loss: float | None = None
    last_step: int | None = None
    tokens: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    loss_columns: Mapping[str, str] = field(default_factory=dict)
    unigram_levels: Mapping[str, float] = field(default_factory=dict)
    borders: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def summarise_run(
    table: Mapping[str, list[Any]], run: Mapping[str, Any], ledger: Mapping[str, Any] | None
) -> RunSummary:
    """Returns the headline numbers of a run; whatever is not known is None or empty.

    Args:
        table: the columns of `read_metrics`.
        run: the facts of `read_run`.
        ledger: the summary of `read_ledger`.
    """
    evaluations = _evaluations(table, run)
    train = next((name for name in _TRAIN_LOSS if name in table), None)
    columns = {"training": train} if train else {}
    for name, column in _eval_columns(table).items():
        columns[f"evaluation ({name})" if name else "evaluation"] = column
    levels = {
        f"unigram entropy ({e.name})" if e.name else "unigram entropy": e.unigram_entropy
        for e in evaluations
        if e.unigram_entropy is not None
    }
    return RunSummary(
        evaluations=evaluations,
        train_loss=_last_mean(series(table, train)[1]) if train else None,
        last_step=max(table["step"]) if table.get("step") else None,
        tokens=_last(table, "tokens"),
        tokens_per_second=_median(table, "tokens_per_second"),
        mfu=_median(table, "mfu"),
        loss_columns=columns,
        unigram_levels=levels,
        borders=_borders(run),
        warnings=_warnings(table, run, ledger, evaluations),
    )


def _eval_columns(table: Mapping[str, Any]) -> dict[str, str]:
    matches = ((column, _EVAL_LOSS.fullmatch(column)) for column in table)
    return {match[1] or "": column for column, match in matches if match}


def _evaluations(table: Mapping[str, list[Any]], run: Mapping[str, Any]) -> tuple[Evaluation, ...]:
    data, final = _section(run, "data"), _section(run, "final")
    found: dict[str, tuple[list[Any], list[float], str]] = {}
    for name, column in _eval_columns(table).items():
        steps, values = series(table, column)
        if steps:
            found[name] = (steps, values, column)
    for name, column in _eval_columns(final).items():
        value = _as_number(final[column])
        if name not in found and value is not None:
            found[name] = ([None], [value], column)
    evaluations = []
    for name, (steps, values, column) in found.items():
        finite = [(v, s) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
        best = min(finite, key=lambda pair: pair[0]) if finite else (None, None)
        bits = _last(table, column.removesuffix("loss") + "bits_per_byte")
        bytes_per_token = _of_set(data.get("bytes_per_token"), name)
        if bits is None and bytes_per_token:
            bits = values[-1] / math.log(2) / bytes_per_token
        evaluations.append(
            Evaluation(
                name=name,
                step=steps[-1],
                loss=values[-1],
                best_loss=best[0],
                best_step=best[1],
                unigram_entropy=_of_set(data.get("unigram_entropy"), name),
                bits_per_byte=bits,
            )
        )
    return tuple(evaluations)


def _section(run: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = run.get(name)
    return value if isinstance(value, Mapping) else {}


def _as_number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _of_set(value: Any, name: str) -> float | None:
    """Returns the number of an evaluation set from one number for all or a mapping by name."""
    if isinstance(value, Mapping):
        only = next(iter(value.values())) if len(value) == 1 and not name else None
        value = value.get(name, only)
    return _as_number(value)


def _last(table: Mapping[str, list[Any]], name: str) -> float | None:
    values = series(table, name)[1] if name in table else []
    return values[-1] if values else None


def _median(table: Mapping[str, list[Any]], name: str) -> float | None:
    values = sorted(v for v in (table.get(name) or []) if v is not None and math.isfinite(v))
    return values[len(values) // 2] if values else None


def _last_mean(values: Sequence[float]) -> float | None:
    last = values[-max(1, int(len(values) * _LAST_SHARE)) :]
    finite = [value for value in last if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _borders(run: Mapping[str, Any]) -> dict[str, float]:
    borders: dict[str, float] = {}
    stages = run.get("stages")
    for number, stage in enumerate(stages if isinstance(stages, list) else []):
        step = _as_number(stage.get("first_step")) if isinstance(stage, Mapping) else None
        if step is None or number == 0:
            continue
        name = str(stage.get("name") or f"stage {number + 1}")
        borders[f"{name} ({number + 1})" if name in borders else name] = step
    return borders


def _warnings(
    table: Mapping[str, list[Any]],
    run: Mapping[str, Any],
    ledger: Mapping[str, Any] | None,
    evaluations: Sequence[Evaluation],
) -> tuple[str, ...]:
    listed = run.get("warnings")
    warnings = [str(warning) for warning in listed] if isinstance(listed, list) else []
    for name in (*_TRAIN_LOSS, "grad_norm", *_eval_columns(table).values()):
        steps, values = series(table, name) if name in table else ([], [])
        bad = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
        if bad:
            warnings.append(
                f"{name} was not finite at {len(bad)} of {len(steps)} logged steps, first at "
                f"step {bad[0]}."
            )
    for e in evaluations:
        if e.unigram_entropy is not None and not e.loss < e.unigram_entropy:
            where = f" on {e.name}" if e.name else ""
            warnings.append(
                f"The evaluation loss{where} is not below the unigram entropy: the model predicts "
                "no better than token frequencies alone would."
            )
        if e.best_loss is not None and e.loss > e.best_loss + 0.05 and e.best_step != e.step:
            where = f" on {e.name}" if e.name else ""
            warnings.append(
                f"The evaluation loss{where} was lower before: {e.best_loss:.4f} at step "
                f"{e.best_step}, {e.loss:.4f} at the end."
            )
    if ledger and ledger["lost_steps"]:
        warnings.append(
            f"{ledger['lost_steps']} steps were done again after a restart, which cost "
            f"{ledger['seconds']['lost']:.0f} s; checkpoints more often would cost less."
        )
    return tuple(warnings)
