"""Prompts and responses of behaviour fine-tuning: masked behaviour, and masked content."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from tokjax.errors import ConfigError, DataError
from tokjax.files import write_atomically
from tokjax.finetuning.lcbm.records import Message, Video
from tokjax.finetuning.lcbm.verbalise import (
    MASK,
    Numbers,
    plain,
    tell_replays,
    tell_speech,
    tell_values,
    verbalise,
    verbalise_message,
)

Sample = dict[str, str]  # prompt, response
Regime = Literal["past", "future", "random", "all"]
WINDOWS = (3, 5, 7, 11)  # scenes that are masked together

# Each family is asked for in several wordings, so that none of them is what is learned.
FORWARD = (
    "What are the masked replay values (0 to 100), views and likes?",
    f"Estimate everything that is {MASK} about how viewers behaved.",
    "Say how often viewers watched each masked scene again, and the masked counts.",
)
REVERSE = (
    "What is said in the masked scenes?",
    f"Given how viewers behaved, write the speech that is {MASK}.",
    "Write the masked speech, scene by scene.",
)


def masked_scenes(
    count: int, regime: Regime, rng: np.random.Generator, *, run: int = 5
) -> list[int]:
    """Returns the scenes, counted from 0, whose behaviour is masked.

    Args:
        count: scenes of the video.
        regime: "past" masks the first 5 to 20 %, "future" the last, "random" one run of scenes
            anywhere, "all" each.
        rng: draws the share or the place.
        run: scenes of a run, cut to all but one scene.

    Raises:
        ConfigError: an unknown regime, or an empty run.
    """
    if regime not in ("past", "future", "random", "all") or run < 1:
        raise ConfigError(
            f"regime={regime!r} must be 'past', 'future', 'random' or 'all', and run={run} 1 or "
            f"more"
        )
    if regime == "all":
        return list(range(count))
    if regime == "random":
        length = max(1, min(run, count - 1))
        first = int(rng.integers(0, count - length + 1))
        return list(range(first, first + length))
    length = min(count, max(1, round(count * float(rng.uniform(0.05, 0.2)))))
    return list(range(length) if regime == "past" else range(count - length, count))


def forward_sample(
    video: Video,
    masked: Sequence[int],
    numbers: Numbers | None = None,
    *,
    counts: bool = True,
    wording: int = 0,
) -> Sample:
    """Returns a sample that asks for behaviour given content.

    Args:
        video: with its replay values.
        masked: scenes whose replay values are asked for.
        numbers: how they are written.
        counts: whether views and likes are masked and asked for too, where they are known.
        wording: of the question, one of `FORWARD`.

    Raises:
        DataError: a masked scene's value is unknown.
    """
    numbers = numbers or Numbers()
    replays = {}
    for i in masked:
        value = video.scenes[i].replay
        if value is None:
            raise DataError(f"scene {i + 1} of the video {video.title!r} has no replay value")
        replays[i] = value
    told = verbalise(video, numbers, hide_replays=masked, hide_views=counts)
    answers = [tell_replays(replays, numbers)] if replays else []
    values = tell_values(video.views, video.likes, numbers) if counts else ""
    response = ", ".join([*answers, *([values] if values else [])])
    if not response:
        raise DataError(f"nothing is asked about the video {video.title!r}")
    return _sample(told, FORWARD[wording % len(FORWARD)], response)


def reverse_sample(
    video: Video, masked: Sequence[int], numbers: Numbers | None = None, *, wording: int = 0
) -> Sample:
    """Returns a sample that asks for the speech of scenes given behaviour; see `forward_sample`.

    Raises:
        DataError: no scene is masked.
    """
    numbers = numbers or Numbers()
    if not masked:
        raise DataError(f"nothing is asked about the video {video.title!r}")
    told = verbalise(video, numbers, hide_speech=masked)
    speech = {i: video.scenes[i].speech for i in masked}
    return _sample(told, REVERSE[wording % len(REVERSE)], tell_speech(speech, numbers))


def _sample(told: str, question: str, response: str) -> Sample:
    return {"prompt": f"{told}\n{question}\nAnswer:", "response": f" {response}"}


def behaviour_samples(
    videos: Sequence[Video],
    rng: np.random.Generator,
    *,
    families: Sequence[Literal["forward", "reverse"]] = ("forward", "reverse"),
    windows: Sequence[int] = WINDOWS,
    all_masked: float = 0.25,
    repeats: int = 1,
    numbers: Numbers | None = None,
) -> list[Sample]:
    """Returns samples of both families, of each video in turn.

    A sample masks a run of scenes of a drawn length; of forward ones some mask all scenes.

    Args:
        videos: to learn from.
        rng: draws windows, places and wordings.
        families: "forward" asks for behaviour, "reverse" for speech.
        windows: lengths of masked runs.
        all_masked: probability that a forward sample masks all scenes.
        repeats: samples of each family and video.
        numbers: how they are written.

    Raises:
        ConfigError: an unknown family, or no window.
        DataError: a video lacks a replay value.
    """
    if not windows or not set(families) <= {"forward", "reverse"}:
        raise ConfigError(
            f"windows={list(windows)} must not be empty, and families={list(families)} be of "
            f"'forward' and 'reverse'"
        )
    found = []
    for video in videos:
        for family in [f for f in families for _ in range(repeats)]:
            run, wording = int(rng.choice(list(windows))), int(rng.integers(len(FORWARD)))
            every = family == "forward" and rng.random() < all_masked
            masked = masked_scenes(len(video.scenes), "all" if every else "random", rng, run=run)
            build = forward_sample if family == "forward" else reverse_sample
            found.append(build(video, masked, numbers, wording=wording))
    return found


def message_samples(
    messages: Iterable[Message],
    families: Sequence[Literal["forward", "reverse"]] = ("forward", "reverse"),
) -> list[Sample]:
    """Returns samples of posts or e-mails: behaviour given the text, the text given behaviour."""
    found = []
    for message in messages:
        if "forward" in families:
            told, question = verbalise_message(message, hide="value"), plain(message.behaviour)
            found.append(_sample(told, f"What is the {question}?", plain(str(message.value))))
        if "reverse" in families:
            told = verbalise_message(message, hide="text")
            found.append(_sample(told, "What is the text?", plain(message.text)))
    return found


def split_by_channel(
    videos: Sequence[Video], share: float, seed: int = 0
) -> tuple[list[Video], list[Video]]:
    """Returns training and test videos without a channel in both, and without repeated ones.

    Args:
        videos: to split; of those with the same speech the first counts.
        share: of the channels that are for testing, at least one.
        seed: of the choice.

    Raises:
        ConfigError: the share is not within (0, 1), or there is one channel only.
    """
    seen: dict[tuple[str, ...], Video] = {}
    for video in videos:
        seen.setdefault(tuple(plain(scene.speech) for scene in video.scenes), video)
    channels = sorted({video.channel for video in seen.values()})
    if not 0 < share < 1 or len(channels) < 2:
        raise ConfigError(
            f"share={share} must be between 0 and 1, and there must be two channels or more, not "
            f"{len(channels)}"
        )
    count = min(len(channels) - 1, max(1, round(share * len(channels))))
    chosen = {channels[i] for i in np.random.default_rng(seed).permutation(len(channels))[:count]}
    kept = list(seen.values())
    return [v for v in kept if v.channel not in chosen], [v for v in kept if v.channel in chosen]


def write_samples(path: str | Path, samples: Iterable[Sample]) -> None:
    """Writes samples as the JSONL file that `kind="response"` reads; it appears whole or not.

    Raises:
        StorageError: the file cannot be written.
    """
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_atomically(Path(path), "".join(lines))
