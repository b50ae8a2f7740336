"""A video as text, with or without some of its fields, and its numbers read back.

Texts lose their braces (they become parentheses) and line breaks, so that what a field holds is
never taken for a field.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from tokjax.errors import ConfigError, DataError
from tokjax.finetuning.lcbm.records import Message, Scene, Video

MASK = "[MASK]"
_SCENE = re.compile(
    r"Scene ([\d ]+): \{ASR: ([^{}]*), OCR: ([^{}]*), Captions: ([^{}]*), Replays: ([^{},]*)\}"
)
_VIDEO = re.compile(
    r"\{Channel: ([^{}]*), Title: ([^{}]*), Date: ([^{}]*), Subscribers: ([^{},]*), "
    r"Views: ([^{},]*), Likes-per-View: ([^{},]*)%\}\Z"
)
_REPLAY = re.compile(r"Scene ([\d ]+): \{Replay: ?([^{}]*)\}")
_SPEECH = re.compile(r"Scene ([\d ]+): \{ASR: ([^{}]*)\}")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Numbers:
    """How numbers are written, so that tokenizers cut all of them alike.

    Attributes:
        style: "plain" as usual; "spaced" with a space between digits, for tokenizers that join
            digits; "padded" with zeros before, so that each has the same width.
        width: digits of a padded whole number.
    """

    style: Literal["plain", "spaced", "padded"] = "plain"
    width: int = 3

    def __post_init__(self):
        if self.style not in ("plain", "spaced", "padded") or self.width < 1:
            raise ConfigError(
                f"style={self.style!r} must be 'plain', 'spaced' or 'padded', and "
                f"width={self.width} 1 or more"
            )

    def write(self, value: float | None, decimals: int = 0) -> str:
        """Returns a number as text, the mask for None.

        >>> [Numbers(style).write(47) for style in ("plain", "spaced", "padded")]
        ['47', '4 7', '047']
        """
        if value is None:
            return MASK
        text = f"{value:.{decimals}f}" if decimals else str(int(value))
        if self.style == "padded":
            whole, dot, rest = text.partition(".")
            return whole.zfill(self.width) + dot + rest
        return " ".join(text) if self.style == "spaced" else text


def number_of(text: str) -> float | None:
    """Returns the number that a text is, in any style; None where it is none.

    >>> [number_of(text) for text in ("4 7", "047", "4.25", "[MASK]", "4 7 or 5")]
    [47.0, 47.0, 4.25, None, None]
    """
    bare = text.replace(" ", "").rstrip("%")
    return float(bare) if _NUMBER.fullmatch(bare) else None


def plain(text: str) -> str:
    """Returns a text as it stands in a field: on one line, without braces.

    >>> plain(" a {b}\\n c")
    'a (b) c'
    """
    return " ".join(text.replace("{", "(").replace("}", ")").split())


def verbalise(
    video: Video,
    numbers: Numbers | None = None,
    *,
    hide_replays: Collection[int] = (),
    hide_speech: Collection[int] = (),
    hide_views: bool = False,
) -> str:
    """Returns a video as text.

    Args:
        video: what is told.
        numbers: how they are written.
        hide_replays: scenes, counted from 0, whose replay value is masked.
        hide_speech: scenes whose speech is masked.
        hide_views: whether views and likes are masked.
    """
    numbers = numbers or Numbers()
    scenes = []
    for i, scene in enumerate(video.scenes):
        speech = MASK if i in hide_speech else plain(scene.speech)
        replay = None if i in hide_replays else scene.replay
        scenes.append(
            f"Scene {numbers.write(i + 1)}: {{ASR: {speech}, OCR: {plain(scene.ocr)}, Captions: "
            f"{plain(scene.captions)}, Replays: {numbers.write(replay)}}}"
        )
    views, likes = (None, None) if hide_views else (video.views, video.likes)
    return (
        f"The video has the following scenes: {', '.join(scenes)}. {{Channel: "
        f"{plain(video.channel)}, Title: {plain(video.title)}, Date: {plain(video.date)}, "
        f"Subscribers: {numbers.write(video.subscribers)}, Views: {numbers.write(views)}, "
        f"Likes-per-View: {numbers.write(likes, 2)}%}}"
    )


def parse_video(text: str) -> Video:
    """Returns the video that a text of `verbalise` tells; None where a number is masked.

    Raises:
        DataError: it is no such text.
    """
    about, scenes = _VIDEO.search(text.strip()), _SCENE.findall(text)
    if about is None or not scenes:
        raise DataError(f"{text[:60]!r} is no video told as text")
    channel, title, date, subscribers, views, likes = about.groups()
    found = tuple(
        Scene(speech, captions, ocr, _whole(replay)) for _, speech, ocr, captions, replay in scenes
    )
    return replace(
        Video(found, channel, title, date),
        subscribers=_whole(subscribers),
        views=_whole(views),
        likes=number_of(likes),
    )


def _whole(text: str) -> int | None:
    number = number_of(text)
    return None if number is None else int(number)


def tell_replays(replays: dict[int, int], numbers: Numbers) -> str:
    """Returns replay values of scenes, counted from 0, as an answer."""
    return ", ".join(
        f"Scene {numbers.write(i + 1)}: {{Replay: {numbers.write(value)}}}"
        for i, value in replays.items()
    )


def parse_replays(answer: str) -> dict[int, float]:
    """Returns the replay values of scenes, counted from 0, that an answer gives in its form.

    Of a scene named twice the first counts; values outside 0 to 100 are left out.

    >>> parse_replays("Scene 2: {Replay: 47}, Scene 3: {Replay: 4 7}, Scene 4: {Replay: many}")
    {1: 47.0, 2: 47.0}
    """
    found: dict[int, float] = {}
    for scene, value in _REPLAY.findall(answer):
        number, place = number_of(value), number_of(scene)
        if number is not None and place is not None and number <= 100:
            found.setdefault(int(place) - 1, number)
    return found


def tell_speech(speech: dict[int, str], numbers: Numbers) -> str:
    """Returns speech of scenes, counted from 0, as an answer."""
    return ", ".join(
        f"Scene {numbers.write(i + 1)}: {{ASR: {plain(text)}}}" for i, text in speech.items()
    )


def parse_speech(answer: str) -> dict[int, str]:
    """Returns the speech of scenes, counted from 0, that an answer gives in its form."""
    found: dict[int, str] = {}
    for scene, text in _SPEECH.findall(answer):
        place = number_of(scene)
        if place is not None:
            found.setdefault(int(place) - 1, text)
    return found


def tell_values(views: float | None, likes: float | None, numbers: Numbers) -> str:
    """Returns views and likes as an answer; those that are None are not told."""
    told = []
    if views is not None:
        told.append(f"Views: {numbers.write(views)}")
    if likes is not None:
        told.append(f"Likes-per-View: {numbers.write(likes, 2)}%")
    return ", ".join(told)


def parse_value(answer: str, name: str) -> float | None:
    """Returns the number behind a name in an answer; None where there is none.

    >>> parse_value("Views: 1200, Likes-per-View: 4.50%", "Likes-per-View")
    4.5
    """
    found = re.search(rf"{re.escape(name)}: ?([\d. ]*\d)", answer)
    return None if found is None else number_of(found.group(1))


def verbalise_message(message: Message, *, hide: Literal["", "text", "value"] = "") -> str:
    """Returns a post or an e-mail as text, its text or the receivers' behaviour masked."""
    text = MASK if hide == "text" else plain(message.text)
    value = MASK if hide == "value" else plain(str(message.value))
    to = f", Segment: {plain(message.segment)}" if message.segment else ""
    return (
        f"{{Sender: {plain(message.sender)}, Kind: {plain(message.kind)}{to}, Date: "
        f"{plain(message.date)}, Text: {text}, {plain(message.behaviour)}: {value}}}"
    )
