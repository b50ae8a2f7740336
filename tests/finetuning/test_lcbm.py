import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from tokjax.config import resolve
from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.errors import ConfigError, DataError
from tokjax.finetuning.lcbm import (
    ChoiceItem,
    Message,
    Numbers,
    Scene,
    Video,
    behaviour_samples,
    bleu,
    choose,
    content_items,
    forward_sample,
    interpolated,
    merge_replays,
    message_samples,
    parse_replays,
    parse_video,
    read_videos,
    replay_items,
    replay_scores,
    reverse_sample,
    rouge_l,
    scene_count,
    simulate_replays,
    simulate_values,
    split_by_channel,
    value_items,
    value_scores,
    verbalise,
    write_samples,
)
from tokjax.finetuning.lcbm.instructions import masked_scenes
from tokjax.finetuning.lcbm.records import group_size
from tokjax.finetuning.lcbm.verbalise import parse_speech, parse_value
from tokjax.language_model import LanguageModel
from tokjax.models import ModelConfig, Transformer
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.run import build_run

STYLES = [Numbers("plain"), Numbers("spaced"), Numbers("padded"), Numbers("padded", 1)]
NASTY = ["", "a {b}, Replays: 5}", "}, Scene 2: {ASR: x", "Views: 3, Likes-per-View: 4%}", "1\n2"]


def video_of(seed, scenes=None, channel=None):
    rng = np.random.default_rng(seed)
    text = lambda: str(rng.choice([*NASTY, "the cat", "caf\u00e9 {7}"]))  # noqa: E731
    count = int(rng.integers(1, 12)) if scenes is None else scenes
    return Video(
        scenes=tuple(
            Scene(f"{text()} {seed} {i}", text(), text(), int(rng.integers(0, 101)))
            for i in range(count)
        ),
        channel=channel or text(),
        title=text(),
        date=text(),
        subscribers=int(rng.integers(0, 10**9)),
        views=int(rng.integers(0, 10**10)),
        likes=round(float(rng.uniform(0, 30)), 2),
    )


VIDEOS = [video_of(i, scenes=8, channel=f"c{i % 6}") for i in range(30)]


@pytest.fixture(scope="module")
def lm():
    tokenizer = ByteTokenizer()
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_positions": 1536}
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **sizes))
    params = model.init(jax.random.key(0))
    return LanguageModel(model, {**params, "embedding": 30 * params["embedding"]}, tokenizer)


# ---- records


def test_scenes_of_a_video_last_a_second_or_more():
    lengths = [10, 30, 50, 60, 100, 200]
    assert [scene_count(s) for s in lengths] == [10, 25, 50, 50, 100, 100]
    assert all(group_size(s) * s / 100 >= 1 for s in range(1, 300))
    with pytest.raises(ConfigError, match="seconds=0"):
        scene_count(0)


def test_a_scene_has_the_largest_of_its_values():
    assert merge_replays([0.1, 0.9, 0.2, 0.3], 2) == [90, 30]
    assert merge_replays([0.1, 0.9, 0.2, 0.3, 1.0], 2) == [90, 30]  # what is left over goes
    assert len(merge_replays([0.5] * 100, group_size(30))) == scene_count(30)
    for values, group, error in (
        ([1.2], 1, DataError),
        ([float("nan")], 1, DataError),
        ([], 0, ConfigError),
    ):
        with pytest.raises(error):
            merge_replays(values, group)


def test_records_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(DataError, match="replay=101"):
        Scene("a", replay=101)
    with pytest.raises(DataError, match="views=-1"):
        Video((Scene("a"),), "c", views=-1)
    with pytest.raises(DataError, match="no scene"):
        Video((), "c")
    with pytest.raises(DataError, match="no replay value"):
        Video((Scene("a"),), "c").replays  # noqa: B018
    file = tmp_path / "videos.jsonl"
    lines = [json.dumps(dataclasses.asdict(video)) for video in VIDEOS[:3]]
    file.write_text("\n".join(lines))
    assert [*read_videos(str(file))] == VIDEOS[:3]
    for bad in ('{"channel": "c"}', '{"scenes": [{"speech": "a"}], "chanel": "c"}', "[]", "x"):
        file.write_text(lines[0] + "\n" + bad)
        with pytest.raises(DataError, match=r"videos.jsonl:2 is no video"):
            [*read_videos(str(file))]


# ---- text


@pytest.mark.parametrize("numbers", STYLES, ids=str)
def test_numbers_survive_being_told_and_read(numbers):
    for seed in range(250):  # 1,000 records with all styles
        video = video_of(seed)
        found = parse_video(verbalise(video, numbers))
        assert found.replays == video.replays
        assert (found.subscribers, found.views) == (video.subscribers, video.views)
        assert found.likes == video.likes


def test_texts_survive_but_for_braces_and_lines():
    video = Video((Scene("a {b}\nc", "seen", "read", 4),), "me", "Title", "May", 1, 2, 3.0)
    told = dataclasses.replace(video, scenes=(Scene("a (b) c", "seen", "read", 4),))
    assert parse_video(verbalise(video)) == told
    with pytest.raises(DataError, match="no video told"):
        parse_video("Scene 1: {}")


def test_what_is_masked_is_not_told():
    video = VIDEOS[0]
    told = parse_video(verbalise(video, hide_replays=[1, 3], hide_views=True))
    expected = [None if i in (1, 3) else s.replay for i, s in enumerate(video.scenes)]
    assert [s.replay for s in told.scenes] == expected
    assert (told.views, told.likes, told.subscribers) == (None, None, video.subscribers)
    hidden = parse_video(verbalise(video, hide_speech=[2]))
    assert hidden.scenes[2].speech == "[MASK]" != hidden.scenes[1].speech
    assert hidden.replays == video.replays


@pytest.mark.parametrize("numbers", STYLES, ids=str)
def test_answers_are_read_back(numbers):
    video = VIDEOS[1]
    sample = forward_sample(video, [0, 4, 5], numbers)
    assert parse_replays(sample["response"]) == {i: video.scenes[i].replay for i in (0, 4, 5)}
    assert parse_value(sample["response"], "Views") == video.views
    assert parse_value(sample["response"], "Likes-per-View") == video.likes
    assert sample["prompt"].count("[MASK]") >= 5  # three values, two counts
    other = reverse_sample(video, [2, 3], numbers)
    assert set(parse_speech(other["response"])) == {2, 3}
    assert parse_video(other["prompt"].split("\n")[0]).replays == video.replays


def test_only_numbers_in_the_form_are_read():
    assert parse_replays("Scene 1: {Replay: 7}, Scene 1: {Replay: 8}") == {0: 7.0}
    assert parse_replays("Scene 2: {Replay: 101}, Scene 3: {Replay: }, Scene 4: 5") == {}
    assert parse_value("Views: many", "Views") is None


# ---- instructions


@pytest.mark.parametrize("count", [1, 2, 5, 10, 20, 100])
def test_masks_are_where_their_regime_says(count):
    rng = np.random.default_rng(0)
    for _ in range(20):
        past, future = (masked_scenes(count, r, rng) for r in ("past", "future"))
        most = max(1, round(0.2 * count))
        assert past == [*range(len(past))] and 1 <= len(past) <= most
        assert future == [*range(count - len(future), count)] and 1 <= len(future) <= most
        for run in (5, 7):
            found = masked_scenes(count, "random", rng, run=run)
            assert len(found) == max(1, min(run, count - 1))
            assert found == [*range(found[0], found[0] + len(found))]
            assert found[0] >= 0 and found[-1] < count
        assert masked_scenes(count, "all", rng) == [*range(count)]
    assert len({tuple(masked_scenes(40, "past", rng)) for _ in range(60)}) == 7  # 2 to 8 scenes
    with pytest.raises(ConfigError, match="regime='none'"):
        masked_scenes(3, "none", rng)  # type: ignore[arg-type]


def test_samples_have_both_directions_all_windows_and_several_wordings():
    rng = np.random.default_rng(0)
    samples = behaviour_samples(VIDEOS, rng, repeats=4)
    assert len(samples) == 2 * 4 * len(VIDEOS)
    assert len({s["prompt"].split("\n")[-2] for s in samples}) == 6
    forward = [parse_replays(s["response"]) for s in samples if "Replay:" in s["response"]]
    assert len(forward) == 4 * len(VIDEOS)
    assert {len(f) for f in forward} == {3, 5, 7, 8}  # of 11 all but one; 8: all are masked
    one = behaviour_samples(VIDEOS, rng, families=["forward"], windows=[3], all_masked=0)
    assert {len(parse_replays(s["response"])) for s in one} == {3}
    again = behaviour_samples(VIDEOS, np.random.default_rng(5))
    assert again == behaviour_samples(VIDEOS, np.random.default_rng(5))
    for options in ({"families": ["sideways"]}, {"windows": []}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            behaviour_samples(VIDEOS, rng, **options)


def test_a_sample_without_an_answer_is_refused():
    bare = Video((Scene("a"), Scene("b", replay=3)), "c")
    with pytest.raises(DataError, match=r"scene 1 .* has no replay value"):
        forward_sample(bare, [0])
    with pytest.raises(DataError, match="nothing is asked"):
        forward_sample(bare, [])
    with pytest.raises(DataError, match="nothing is asked"):
        reverse_sample(bare, [])
    assert forward_sample(bare, [1])["response"] == " Scene 2: {Replay: 3}"


def test_messages_are_told_in_both_directions():
    mail = Message("Buy {now}", "Shop", "e-mail", "adults", "May", "click rate in percent", 2.5)
    forward, reverse = message_samples([mail])
    assert forward["response"] == " 2.5" and "2.5" not in forward["prompt"]
    assert reverse["response"] == " Buy (now)" and "now" not in reverse["prompt"]
    assert "Segment: adults" in forward["prompt"]
    assert "Segment" not in message_samples([Message("a", "b")])[0]["prompt"]


def test_a_split_shares_no_channel_and_no_video():
    train_videos, test = split_by_channel([*VIDEOS, *VIDEOS], 0.3)
    assert not {v.channel for v in train_videos} & {v.channel for v in test}
    assert len({v.channel for v in test}) == 2
    assert len(train_videos) + len(test) == len(VIDEOS)
    with pytest.raises(ConfigError, match="two channels"):
        split_by_channel(VIDEOS[:1], 0.5)
    with pytest.raises(ConfigError, match="share=1"):
        split_by_channel(VIDEOS, 1)


# ---- metrics


def test_the_truth_has_no_error_and_an_offset_has_its_own():
    truth = [[10, 20, 30], [40, 50]]

    def scores(offset):
        return replay_scores(truth, [[v + offset for v in own] for own in truth])

    assert (scores(0).rmse, scores(0).accuracy) == (0, 1)
    assert (scores(5).rmse, scores(5).accuracy) == (5, 1)
    assert (scores(6).rmse, scores(6).accuracy) == (6, 0)


def test_errors_are_of_each_video_first():
    found = replay_scores([[0, 0], [0] * 4], [[3, 3], [1, 1, 1, 1]], band=2)
    assert found.rmse == 2 and found.by_video.tolist() == [3, 1]
    assert found.accuracy == pytest.approx(4 / 6)


def test_random_numbers_against_random_numbers():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 101, (2, 1, 200_000))
    scores = replay_scores(truth.tolist(), found.tolist())
    assert scores.rmse == pytest.approx(math.sqrt((101**2 - 1) / 6), abs=0.2)  # 41.23
    assert scores.accuracy == pytest.approx(
        (101 + 2 * sum(101 - k for k in range(1, 6))) / 101**2, abs=0.003
    )
    assert scores.accuracy == pytest.approx(0.106, abs=0.003)


def test_what_cannot_be_read_is_wrong_and_counts_as_the_mean():
    nan = float("nan")
    found = replay_scores([[50, 40]], [[nan, 40]], fallback=50)
    assert (found.rmse, found.accuracy, found.unread) == (0, 0.5, 0.5)
    values = value_scores([10, 20], [nan, 20], fallback=10)
    assert (values.rmse, values.r2, values.accuracy, values.unread) == (0, 1, 0.5, 0.5)


def test_counts_are_compared_by_error_variance_and_relative_band():
    found = value_scores([100, 200], [110, 221], fallback=0)
    assert found.rmse == pytest.approx(math.sqrt((10**2 + 21**2) / 2))
    assert found.r2 == pytest.approx(1 - 541 / 5000)
    assert found.accuracy == 0.5
    assert value_scores([1, 3], [2, 2], fallback=0).r2 == 0
    assert math.isnan(value_scores([1, 1], [1, 2], fallback=0).r2)


def test_scores_of_other_things_are_refused():
    for truth, found in (([[1]], [[1, 2]]), ([[1]], []), ([], []), ([[]], [[]])):
        with pytest.raises(DataError):
            replay_scores(truth, found)
    with pytest.raises(DataError, match="2 true and 1"):
        value_scores([1, 2], [1], fallback=0)


def test_interpolation_lies_between_what_is_known():
    assert interpolated({0: 0, 4: 40}, [1, 2, 3], fallback=9) == [10, 20, 30]
    assert interpolated({2: 7}, [0, 1, 5], fallback=9) == [7, 7, 7]
    assert interpolated({}, [0, 1], fallback=9) == [9, 9]
    rng = np.random.default_rng(0)
    item = replay_items(VIDEOS[:1], "all", rng)[0]
    assert item.interpolation(31.5) == [31.5] * 8
    (item,) = replay_items(VIDEOS[:1], "random", rng, run=7)
    (known,) = item.known.values()
    assert item.interpolation(31.5) == [known] * 7


def test_texts_are_compared_by_common_words():
    assert bleu(["a b c d e"], ["a b c d e"]) == 1
    assert bleu(["a b c d"], ["w x y z"]) == 0
    # Half of the unigrams and a third of the bigrams, at full length.
    assert bleu(["a b c x", ""], ["a b y z", ""], 2) == pytest.approx(math.sqrt(0.5 / 3))
    assert bleu(["a b"], ["a b c d"], 1) == pytest.approx(math.exp(-1))
    assert rouge_l("a b c", "a x c d") == pytest.approx(2 * 2 / 7)
    assert rouge_l("", "a") == 0


# ---- a model's answers


class Oracle(LanguageModel):
    """Writes what it is told to."""

    def generate(self, prompts, **settings):
        texts = [self.answers[p] for p in prompts]  # type: ignore[attr-defined]
        return type("Generated", (), {"texts": texts})()


@pytest.mark.parametrize("regime", ["past", "future", "random", "all"])
def test_right_answers_score_full_and_mute_ones_nothing(lm, regime):
    items = replay_items(VIDEOS, regime, np.random.default_rng(0))
    oracle = Oracle(lm.model, lm.params, lm.tokenizer)
    object.__setattr__(oracle, "answers", {i.prompt: i.response for i in items})
    truth = [i.replays for i in items]
    scores = replay_scores(truth, simulate_replays(oracle, items, batch_size=7))
    assert (scores.rmse, scores.accuracy, scores.unread) == (0, 1, 0)
    object.__setattr__(oracle, "answers", {i.prompt: "no idea" for i in items})
    mute = replay_scores(truth, simulate_replays(oracle, items), fallback=47)
    constant = replay_scores(truth, [[47] * len(t) for t in truth])
    assert mute.rmse == constant.rmse and (mute.accuracy, mute.unread) == (0, 1)


def test_items_tell_nothing_of_what_they_ask():
    items = replay_items(VIDEOS, "all", np.random.default_rng(0))
    for item, video in zip(items, VIDEOS, strict=True):
        told = parse_video(item.prompt.split("\n")[0])
        assert {s.replay for s in told.scenes} == {None} and told.views is told.likes is None
        assert item.replays == video.replays and not item.known
    values = value_items(VIDEOS, "Likes-per-View")
    assert [v.value for v in values] == [v.likes for v in VIDEOS]
    with pytest.raises(ConfigError, match="name='Likes'"):
        value_items(VIDEOS, "Likes")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="has no Views"):
        value_items([Video((Scene("a", replay=1),), "c")], "Views")


def test_numbers_are_read_from_what_a_model_writes(lm):
    items = value_items(VIDEOS, "Views")
    oracle = Oracle(lm.model, lm.params, lm.tokenizer)
    object.__setattr__(oracle, "answers", {i.prompt: i.response for i in items})
    assert simulate_values(oracle, items) == [v.views for v in VIDEOS]
    found = simulate_values(lm, value_items(VIDEOS[:2], "Views"))
    assert np.isnan(found).all()
    with pytest.raises(ConfigError, match="no room"):
        simulate_values(lm, [dataclasses.replace(items[0], prompt="x" * 1600)])


def test_shuffled_options_permute_the_choice_alone(lm):
    items = content_items(VIDEOS, np.random.default_rng(0), options=7, run=3)[:2]
    order = np.random.default_rng(1).permutation(7)
    mixed = [ChoiceItem(i.prompt, tuple(i.options[o] for o in order), 0) for i in items]
    first, second = choose(lm, items, batch_size=5), choose(lm, mixed, batch_size=14)
    assert [i.options[c] for i, c in zip(items, first, strict=True)] == [
        i.options[c] for i, c in zip(mixed, second, strict=True)
    ]


def test_choices_are_by_the_mean_log_probability_of_a_token(lm):
    item = ChoiceItem("the cat", (" sat", " sat on the mat", " is"), 0)
    scores = lm.score([item.prompt + option for option in item.options])
    before = len(lm.encode(item.prompt))
    totals = [float(scores.logprob[i, before : scores.lengths[i]].sum()) for i in range(3)]
    means = [t / (n - before) for t, n in zip(totals, scores.lengths, strict=True)]
    assert choose(lm, [item]) == [int(np.argmax(means))]
    assert choose(lm, [item], normalise="none") == [int(np.argmax(totals))]
    with pytest.raises(ConfigError, match="normalise='word'"):
        choose(lm, [item], normalise="word")  # type: ignore[arg-type]


def test_content_items_offer_speech_of_other_videos_of_the_same_length():
    items = content_items(VIDEOS, np.random.default_rng(0))
    assert len(items) == len(VIDEOS)
    for item, video in zip(items, VIDEOS, strict=True):
        assert len({*item.options}) == len(item.options) == 25
        right = parse_speech(item.options[item.right])
        assert len(right) == 5
        assert all(set(parse_speech(o)) == set(right) for o in item.options)
        assert parse_video(item.prompt.split("\n")[0]).replays == video.replays
    assert len({i.right for i in items}) > 10
    with pytest.raises(ConfigError, match="options=25"):
        content_items(VIDEOS[:5], np.random.default_rng(0))
    short = [video_of(i, scenes=2, channel="c") for i in range(4)]
    with pytest.raises(ConfigError, match="fewer options"):
        content_items([*short, VIDEOS[0]], np.random.default_rng(0), options=3)


def test_fine_tuning_reads_the_samples(lm, tmp_path):
    lm.save(tmp_path / "model")
    file = tmp_path / "behaviour.jsonl"
    videos = [Video((Scene("a", replay=i), Scene("b", replay=9)), "c", views=7) for i in range(4)]
    samples = behaviour_samples(videos, np.random.default_rng(0))
    write_samples(file, samples)
    assert [json.loads(line) for line in file.read_text().splitlines()] == samples
    source = {"name": "jsonl", "files": (str(file),), "kind": "response"}
    tree = {
        "init_from": str(tmp_path / "model"),
        "data": {"train": [{"source": source}], "evals": {}, "seq_len": 384, "batch_size": 8},
        "objective": {"name": "sft"},
        "steps": 1,
    }
    assert train(build_run(resolve(TrainConfig, tree)), tmp_path / "run").finished
