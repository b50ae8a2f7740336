"""What a task asks of a model, as ids that fit its positions. Nothing here runs a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokjax.errors import ConfigError, DataError, nearest


@dataclass(frozen=True)
class Pair:
    """A context and the continuation to score, in ids; together at most one more than the model's
    positions, because the last one is read by nobody.

    Attributes:
        context: at least one id.
        continuation: at least one id.
        dropped: how many ids were cut off the context's left.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    dropped: int = 0


def split_pair(
    encode: Any, context: str, continuation: str, prefix: int
) -> tuple[list[int], list[int]]:
    """Returns the ids of a context and of its continuation.

    Both are encoded together, blanks at the context's end with the continuation; where the
    context's own ids end, the continuation's begin. This is the harness's rule.

    Args:
        encode: text -> ids, as the model expects a text to begin.
        context: may be empty; then the prefix takes its place.
        continuation: text to score.
        prefix: id that begins a text (BOS, or else EOS).
    """
    if not context:
        ids = encode(continuation)
        return [prefix], ids[1:] if ids[:1] == [prefix] else ids
    bare = context.rstrip()
    whole, before = encode(context + continuation), encode(bare)
    if not before:  # a context of blanks, and no BOS
        before, whole = [prefix], [prefix, *whole]
    return before, whole[len(before) :]


def fitted(context: Sequence[int], continuation: Sequence[int], positions: int) -> Pair:
    """Returns a pair whose context is cut from the left to what fits.

    Raises:
        DataError: the continuation is empty, or longer than the positions.
    """
    if not 1 <= len(continuation) <= positions:
        raise DataError(
            f"a continuation has {len(continuation)} tokens, but must have 1 to {positions}, the "
            f"model's max_positions"
        )
    dropped = max(0, len(context) + len(continuation) - (positions + 1))
    return Pair(tuple(context[dropped:]), tuple(continuation), dropped)


def rolling_pairs(ids: Sequence[int], prefix: int, positions: int) -> list[Pair]:
    """Returns the windows by which a long text is scored, each id once.

    The first begins with the prefix; the last is a full window, of which only what is new is
    scored.
    """
    whole, pairs = [prefix, *ids], []
    for start in range(0, len(ids), positions):
        new = ids[start : start + positions]
        room = positions + 1 - len(new)
        pairs.append(Pair(tuple(whole[: start + 1][-room:]), tuple(new)))
    return pairs


@dataclass(frozen=True)
class Writing:
    """How a text is to be written.

    Attributes:
        until: texts that end it.
        max_new_tokens: most tokens of it.
        settings: of `LanguageModel.generate`, sorted by name.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    settings: tuple[tuple[str, Any], ...]


_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def writing(given: Mapping[str, Any], default_length: int = 256) -> Writing:
    """Returns what a task's generation arguments say; greedy unless `do_sample` is true.

    Raises:
        ConfigError: an argument is unknown, or is one that cannot be done (more than one beam).
    """
    rest = dict(given)
    until = rest.pop("until", None) or []
    lengths = [rest.pop(name) for name in _LENGTHS if rest.get(name) is not None]
    sample = rest.pop("do_sample", None)
    settings = {name: rest.pop(name) for name in _SETTINGS if rest.get(name) is not None}
    if sample is None:
        sample = settings.get("temperature", 0) > 0
    settings["temperature"] = settings.get("temperature", 1.0) if sample else 0.0
    if rest.pop("num_beams", 1) != 1:
        raise ConfigError("generation_kwargs.num_beams must be 1: beams are not searched here")
    rest = {name: value for name, value in rest.items() if value is not None}
    if rest:
        name = next(iter(rest))
        known = ("until", "do_sample", *_LENGTHS, *_SETTINGS)
        raise ConfigError(f"generation_kwargs.{name} is not understood.{nearest(name, known)}")
    texts = [until] if isinstance(until, str) else list(until)
    return Writing(
        until=tuple(dict.fromkeys(text for text in texts if text)),
        max_new_tokens=int(lengths[0]) if lengths else default_length,
        settings=tuple(sorted(settings.items())),
    )
