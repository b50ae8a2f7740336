"""What was shown to whom and what they did: videos in scenes, and short messages."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokjax.errors import ConfigError, DataError

BINS = 100  # retention values that a platform gives of a video, whatever its length


@dataclass(frozen=True)
class Scene:
    """A part of a video.

    Attributes:
        speech: what is said.
        captions: what is seen, in words.
        ocr: what is written in the picture.
        replay: how often it is watched again, 0 to 100 of the most; None where it is unknown.
    """

    speech: str
    captions: str = ""
    ocr: str = ""
    replay: int | None = None

    def __post_init__(self):
        if self.replay is not None and not 0 <= self.replay <= 100:
            raise DataError(f"replay={self.replay} must be 0 to 100")


@dataclass(frozen=True)
class Video:
    """A video, who published it and what became of it.

    Attributes:
        scenes: in order.
        channel: that published it.
        title: of the video.
        date: of publication, as text.
        subscribers: of the channel.
        views: of the video.
        likes: in percent of the views, to two decimals.
    """

    scenes: tuple[Scene, ...]
    channel: str
    title: str = ""
    date: str = ""
    subscribers: int | None = None
    views: int | None = None
    likes: float | None = None

    def __post_init__(self):
        if not self.scenes:
            raise DataError(f"the video {self.title!r} has no scene")
        for name in ("subscribers", "views", "likes"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise DataError(f"{name}={value} of the video {self.title!r} must not be negative")

    @property
    def replays(self) -> tuple[int, ...]:
        """The replay value of each scene.

        Raises:
            DataError: one is unknown.
        """
        found = tuple(s.replay for s in self.scenes if s.replay is not None)
        if len(found) < len(self.scenes):
            raise DataError(f"a scene of the video {self.title!r} has no replay value")
        return found


@dataclass(frozen=True)
class Message:
    """A post or an e-mail, who sent it, to whom and what became of it.

    Attributes:
        text: of the message.
        sender: an account or a brand.
        kind: "tweet", "e-mail" or the like.
        segment: of the receivers.
        date: of sending, as text.
        behaviour: what is measured, for instance "click rate in percent" or "likes".
        value: of it, a number or a class such as "high".
    """

    text: str
    sender: str
    kind: str = "tweet"
    segment: str = ""
    date: str = ""
    behaviour: str = "likes"
    value: str | float = ""


def _bins(seconds: float) -> int:
    if not seconds > 0:
        raise ConfigError(f"seconds={seconds} must be above 0")
    return math.ceil(BINS / seconds - 1e-9)


def scene_count(seconds: float) -> int:
    """Returns in how many scenes of a second or more the 100 values of a video are merged.

    >>> [scene_count(seconds) for seconds in (10, 30, 50, 60, 100, 200)]
    [10, 25, 50, 50, 100, 100]

    Raises:
        ConfigError: the length is not positive.
    """
    return BINS // _bins(seconds)


def merge_replays(values: Sequence[float], group: int) -> list[int]:
    """Returns the replay value of each scene: the largest of its values, 0 to 100.

    Values left over at the end are left out (recommendation of tokjax).

    Args:
        values: of equal parts of a video, 0 to 1.
        group: how many make a scene; `group_size` gives it.

    >>> merge_replays([0.1, 0.9, 0.2, 0.3, 0.7], 2)
    [90, 30]

    Raises:
        ConfigError: the group is empty.
        DataError: a value is outside 0 to 1.
    """
    if group < 1:
        raise ConfigError(f"group={group} must be at least 1")
    found = np.asarray(values, float)
    if not ((found >= 0) & (found <= 1)).all():
        raise DataError("values of replays must be 0 to 1")
    whole = len(found) // group * group
    merged = found[:whole].reshape(-1, group).max(1)
    return [math.floor(100 * value + 0.5) for value in merged]


def group_size(seconds: float) -> int:
    """Returns how many of a video's 100 values make a scene of a second or more.

    >>> [group_size(seconds) for seconds in (10, 30, 60, 100, 200)]
    [10, 4, 2, 1, 1]

    Raises:
        ConfigError: the length is not positive.
    """
    return _bins(seconds)


def read_videos(file: str) -> Iterator[Video]:
    """Yields the videos of a JSONL file whose lines have the fields of `Video` and `Scene`.

    Raises:
        DataError: a line is no video; it names file and line.
    """
    from tokjax.data.files import numbered_lines

    for number, line in numbered_lines(file):
        try:
            yield _video(json.loads(line))
        except KeyError as error:
            raise DataError(f"{file}:{number} is no video: it has no {error}") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{file}:{number} is no video: {error}") from None


def _video(record: Mapping[str, Any]) -> Video:
    fields = dict(record)
    scenes = tuple(Scene(**scene) for scene in fields.pop("scenes"))
    return Video(scenes, **fields)
