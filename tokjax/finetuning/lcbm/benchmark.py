"""Tasks of the benchmark as items, and a model's answers to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tokjax.decoding.prompts import bucket
from tokjax.errors import ConfigError, DataError
from tokjax.evaluation.requests import fitted, split_pair
from tokjax.evaluation.scoring import batches, score_pairs
from tokjax.finetuning.lcbm.instructions import (
    Regime,
    forward_sample,
    masked_scenes,
    reverse_sample,
)
from tokjax.finetuning.lcbm.metrics import interpolated
from tokjax.finetuning.lcbm.records import Video
from tokjax.finetuning.lcbm.verbalise import Numbers, parse_replays, parse_value, tell_speech
from tokjax.language_model import LanguageModel


@dataclass(frozen=True)
class ReplayItem:
    """Replay values to simulate.

    Attributes:
        prompt: asks for them.
        response: the right answer.
        masked: scenes, counted from 0.
        replays: the true values of these.
        known: values of the other scenes.
    """

    prompt: str
    response: str
    masked: tuple[int, ...]
    replays: tuple[int, ...]
    known: dict[int, int]

    def interpolation(self, fallback: float) -> list[float]:
        """Returns what straight lines between known scenes give: the obligatory baseline."""
        return interpolated(self.known, self.masked, fallback=fallback)


def replay_items(
    videos: Sequence[Video],
    regime: Regime,
    rng: np.random.Generator,
    *,
    run: int = 5,
    numbers: Numbers | None = None,
) -> list[ReplayItem]:
    """Returns an item for each video; for the arguments see `masked_scenes`.

    Views and likes are masked too, but not asked for.

    Raises:
        DataError: a video lacks a replay value.
    """
    found = []
    for video in videos:
        replays = video.replays
        masked = masked_scenes(len(replays), regime, rng, run=run)
        unknown = Video(video.scenes, video.channel, video.title, video.date, video.subscribers)
        sample = forward_sample(unknown, masked, numbers)
        found.append(
            ReplayItem(
                **sample,
                masked=tuple(masked),
                replays=tuple(replays[i] for i in masked),
                known={i: r for i, r in enumerate(replays) if i not in masked},
            )
        )
    return found


def simulate_replays(
    lm: LanguageModel, items: Sequence[ReplayItem], *, batch_size: int = 16
) -> list[list[float]]:
    """Returns the replay values that a model writes, NaN for those it does not."""
    written = _answers(lm, [i.prompt for i in items], [i.response for i in items], batch_size)
    found = []
    for item, text in zip(items, written, strict=True):
        values = parse_replays(text)
        found.append([values.get(i, float("nan")) for i in item.masked])
    return found


@dataclass(frozen=True)
class ValueItem:
    """A number to simulate.

    Attributes:
        prompt: asks for it.
        response: the right answer.
        name: as the answer calls it.
        value: the true one.
    """

    prompt: str
    response: str
    name: Literal["Views", "Likes-per-View"]
    value: float


def value_items(
    videos: Sequence[Video],
    name: Literal["Views", "Likes-per-View"],
    numbers: Numbers | None = None,
) -> list[ValueItem]:
    """Returns an item for each video: all its behaviour is masked.

    Raises:
        ConfigError: an unknown name.
        DataError: a video lacks the number.
    """
    if name not in ("Views", "Likes-per-View"):
        raise ConfigError(f"name={name!r} must be 'Views' or 'Likes-per-View'")
    found = []
    for video in videos:
        value = video.views if name == "Views" else video.likes
        if value is None:
            raise DataError(f"the video {video.title!r} has no {name}")
        # All scenes are masked, as in training with all of them, so that none tells the number.
        sample = forward_sample(video, range(len(video.scenes)), numbers)
        found.append(ValueItem(**sample, name=name, value=float(value)))
    return found


def simulate_values(
    lm: LanguageModel, items: Sequence[ValueItem], *, batch_size: int = 16
) -> list[float]:
    """Returns the numbers that a model writes, NaN for those it does not."""
    written = _answers(lm, [i.prompt for i in items], [i.response for i in items], batch_size)
    found = [parse_value(text, item.name) for item, text in zip(items, written, strict=True)]
    return [float("nan") if value is None else value for value in found]


def _answers(
    lm: LanguageModel, prompts: Sequence[str], truth: Sequence[str], batch_size: int
) -> list[str]:
    """Returns greedy answers, a fourth longer at most than the right ones are."""
    begun = [len(lm.encode(prompt)) for prompt in prompts]
    lengths = [
        len(lm.encode(prompt + text)) - n
        for prompt, text, n in zip(prompts, truth, begun, strict=True)
    ]
    found = [""] * len(prompts)
    for some in batches([a + b for a, b in zip(begun, lengths, strict=True)], batch_size):
        full = some + some[:1] * (min(batch_size, len(prompts)) - len(some))
        most = bucket(max(lengths[i] for i in some) * 5 // 4 + 1)
        room = lm.model.config.max_positions - max(begun[i] for i in some)
        if room < 1:
            raise ConfigError(
                f"a prompt has no room for an answer within max_positions="
                f"{lm.model.config.max_positions}: give shorter videos"
            )
        texts = lm.generate([prompts[i] for i in full], max_new_tokens=min(most, room)).texts
        for i, text in zip(some, texts, strict=False):
            found[i] = text
    return found


@dataclass(frozen=True)
class ChoiceItem:
    """A question with options.

    Attributes:
        prompt: the question.
        options: continuations of it.
        right: number of the right one.
    """

    prompt: str
    options: tuple[str, ...]
    right: int


def content_items(
    videos: Sequence[Video],
    rng: np.random.Generator,
    *,
    run: int = 5,
    options: int = 25,
    numbers: Numbers | None = None,
) -> list[ChoiceItem]:
    """Returns an item for each video: the speech of consecutive scenes is among options.

    The others are speech of as many consecutive scenes of other videos. Chance is 1 / options.

    Args:
        videos: the test set.
        rng: draws scenes and options.
        run: scenes that are masked.
        options: number of them, the right one included.
        numbers: how they are written.

    Raises:
        ConfigError: there are fewer videos than options.
    """
    if not 2 <= options <= len(videos):
        raise ConfigError(f"options={options} must be 2 to the number of videos, {len(videos)}")
    numbers, found = numbers or Numbers(), []
    for v, video in enumerate(videos):
        masked = masked_scenes(len(video.scenes), "random", rng, run=run)
        sample = reverse_sample(video, masked, numbers)
        others = [i for i in range(len(videos)) if i != v]
        texts = []
        for i in rng.permutation(others):
            scenes = videos[i].scenes
            if len(scenes) < len(masked):
                continue
            first = int(rng.integers(0, len(scenes) - len(masked) + 1))
            speech = [scenes[first + j].speech for j in range(len(masked))]
            text = " " + tell_speech(dict(zip(masked, speech, strict=True)), numbers)
            if text != sample["response"] and text not in texts:
                texts.append(text)
            if len(texts) == options - 1:
                break
        if len(texts) < options - 1:
            raise ConfigError(
                f"only {len(texts)} other videos have {len(masked)} scenes of other speech: fewer "
                f"options or a shorter run are needed"
            )
        right = int(rng.integers(options))
        texts.insert(right, sample["response"])
        found.append(ChoiceItem(sample["prompt"], tuple(texts), right))
    return found


def choose(
    lm: LanguageModel,
    items: Sequence[ChoiceItem],
    *,
    normalise: Literal["token", "character", "none"] = "token",
    batch_size: int = 25,
) -> list[int]:
    """Returns the option of each item that a model finds likeliest; of equals, the earliest.

    Args:
        lm: the model.
        items: questions.
        normalise: log-probabilities are divided by the option's tokens, by its characters, or not.
        batch_size: options that are scored at a time.

    Raises:
        ConfigError: an unknown normalisation, or nothing can begin a text.
        DataError: an option is empty or longer than the model's positions.
    """
    if normalise not in ("token", "character", "none"):
        raise ConfigError(f"normalise={normalise!r} must be 'token', 'character' or 'none'")
    prefix = lm.tokenizer.eos_id if lm.tokenizer.bos_id is None else lm.tokenizer.bos_id
    if prefix is None:
        raise ConfigError("the tokenizer has neither BOS nor EOS: nothing can begin a text")
    pairs, most = [], lm.model.config.max_positions
    for item in items:
        for option in item.options:
            context, continuation = split_pair(lm.encode, item.prompt, option, prefix)
            pairs.append(fitted(context, continuation, most))
    totals = [total for total, _ in score_pairs(lm, pairs, batch_size=batch_size)]
    found, at = [], 0
    for item in items:
        own = np.array(totals[at : at + len(item.options)])
        if normalise != "none":
            sizes = [len(p.continuation) for p in pairs[at : at + len(own)]]
            if normalise == "character":
                sizes = [len(option) for option in item.options]
            own = own / np.array(sizes)
        found.append(int(own.argmax()))
        at += len(own)
    return found
