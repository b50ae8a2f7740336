"""LCBM: what receivers do (replays, views, likes, clicks) as text, learned in both directions.

    samples = behaviour_samples(videos, np.random.default_rng(0))
    write_samples("behaviour.jsonl", samples)   # trained on by configs/sft.py with kind=response
    items = replay_items(test_videos, "random", np.random.default_rng(1))
    replay_scores([i.replays for i in items], simulate_replays(lm, items), fallback=mean)

Reference: "Large Content and Behavior Models to Understand, Simulate, and Optimize Content and
Behavior", arXiv 2309.00359; this is its text-only form, in which captions stand for pictures.
"""

from tokjax.finetuning.lcbm.benchmark import (
    ChoiceItem,
    ReplayItem,
    ValueItem,
    choose,
    content_items,
    replay_items,
    simulate_replays,
    simulate_values,
    value_items,
)
from tokjax.finetuning.lcbm.instructions import (
    Sample,
    behaviour_samples,
    forward_sample,
    message_samples,
    reverse_sample,
    split_by_channel,
    write_samples,
)
from tokjax.finetuning.lcbm.metrics import (
    RegressionScores,
    ReplayScores,
    bleu,
    interpolated,
    replay_scores,
    rouge_l,
    value_scores,
)
from tokjax.finetuning.lcbm.records import (
    Message,
    Scene,
    Video,
    group_size,
    merge_replays,
    read_videos,
    scene_count,
)
from tokjax.finetuning.lcbm.verbalise import Numbers, parse_replays, parse_video, verbalise

__all__ = [
    "ChoiceItem",
    "Message",
    "Numbers",
    "RegressionScores",
    "ReplayItem",
    "ReplayScores",
    "Sample",
    "Scene",
    "ValueItem",
    "Video",
    "behaviour_samples",
    "bleu",
    "choose",
    "content_items",
    "forward_sample",
    "group_size",
    "interpolated",
    "merge_replays",
    "message_samples",
    "parse_replays",
    "parse_video",
    "read_videos",
    "replay_items",
    "replay_scores",
    "reverse_sample",
    "rouge_l",
    "scene_count",
    "simulate_replays",
    "simulate_values",
    "split_by_channel",
    "value_items",
    "value_scores",
    "verbalise",
    "write_samples",
]
