"""The reproductions of data construction: their traces, rewriter and videos."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

CONFIGS = Path(__file__).parent.parent / "configs/repro"


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"repro_{name}", CONFIGS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def r1():
    return loaded("r1_compress")


@pytest.fixture(scope="module")
def lcbm():
    return loaded("lcbm")


def test_traces_end_with_the_answer_and_every_slip_is_corrected(r1):
    rng = np.random.default_rng(0)
    slips = 0
    for _ in range(200):
        record = r1.record(rng)
        words = record["prompt"].split()
        right, pairs = 0, zip(words[:-1:2], words[1:-1:2], strict=True)
        chunks = [c for c in record["response"].partition(" </think>")[0].split(" .") if c]
        assert len(chunks) == r1.STEPS
        for (op, digit), chunk in zip(pairs, chunks, strict=True):
            before, right = right, (right + r1.SIGN[op] * int(digit)) % r1.MODULUS
            told = chunk.split()
            at = told.index("so")
            assert told[at + 1] == str(before) and told[at + 3] == digit
            if told[at + 5] != str(right):
                slips += 1
                assert f"no so it is {right} ;" in chunk
        assert record["response"].split()[-1] == str(right)
        assert set((record["prompt"] + record["response"]).split()) <= set(r1.WORDS)
    assert 80 < slips < 160  # a fifth of 600


def test_the_rewriter_only_drops_what_it_says(r1):
    parts = {"long": True, "check": True, "filler": True}
    text = r1.chunk(2, "add", 4, 3, 2, parts).removesuffix(" .")
    versions = [v for seed in range(60) for v in r1.rewritten(text, seed)]
    assert len(versions) == 60 * r1.VERSIONS
    assert versions[:8] == r1.rewritten(text, 0)
    share = lambda word: np.mean([word in v.split() for v in versions])  # noqa: E731
    for word, kept in (("good", 0.4), ("now", 0.5), ("wait", 0.7)):
        assert share(word) == pytest.approx(kept, abs=0.09)
    assert all(set(v.split()) <= set(r1.WORDS) for v in versions)
    assert all(len(v.split()) <= len(text.split()) for v in versions)


def test_a_whole_trace_is_rewritten_chunk_by_chunk(r1):
    text = r1.record(np.random.default_rng(0))["response"].partition(" </think>")[0].strip()
    for version in r1.rewritten(text.removesuffix(" ."), 3):
        assert version.split().count(".") == r1.STEPS - 1


def test_behaviour_follows_the_channels_audience_and_is_hidden(lcbm):
    world, rng = lcbm.World(0), np.random.default_rng(0)
    liked, replayed = [], []
    for _ in range(300):
        video, topic = world.video(rng)
        assert video.title == f"topic{topic}"
        for scene in video.scenes:
            liked.append(world.appeal[int(video.channel[1:]), int(scene.speech[1])])
            replayed.append(scene.replay)
        assert lcbm.hidden(video).count("[MASK]") == lcbm.SCENES + 3
    assert np.corrcoef(liked, replayed)[0, 1] > 0.9
    item = lcbm._topic_item(video, topic)
    assert item.prompt.endswith("Title:") and item.options[item.right] == f" {video.title},"
