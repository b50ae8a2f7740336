"""The invented answers of the reproduction of SHAD and RFT."""

import runpy

import numpy as np

from tokjax.reproduction.plan import PLANS

PLAN = runpy.run_path(str(PLANS / "rft_shad.py"))


def test_slots_follow_the_prompt_and_templates_do_not():
    rng = np.random.default_rng(0)
    places = PLAN["PLACES"] - PLAN["PROMPT"]
    wordings, tasks = set(), set()
    for _ in range(200):
        found = PLAN["record"](rng, True)
        task, *digits = found["prompt"].split()
        answer, digits = found["response"].split(), np.array(digits, int)
        assert 1 + len(found["prompt"].split()) + len(answer) == PLAN["LENGTH"]
        right = digits if task == "copy" else (digits + np.roll(digits, -1)) % 10
        assert [answer[p] for p in places] == [str(n) for n in right]
        wordings.add(tuple(np.delete(answer, places).tolist()))
        tasks.add(task)
    assert wordings == {tuple(words) for words in PLAN["templates"]()} and len(wordings) == 3
    assert tasks == {"copy", "sum"}
    assert len({w for words in wordings for w in words}) == 48


def test_the_base_model_sees_random_words_around_slots():
    rng = np.random.default_rng(0)
    places = PLAN["PLACES"] - PLAN["PROMPT"]
    answers = [PLAN["record"](rng, False)["response"].split() for _ in range(100)]
    assert all(answer[p].isdigit() for answer in answers for p in places)
    assert len({w for answer in answers for w in np.delete(answer, places)}) == 200


def test_the_true_mask_marks_the_slots_alone():
    mask = PLAN["true_mask"](3)
    assert mask.shape == (3, 26)
    assert np.flatnonzero(mask[2]).tolist() == [10, 15, 20, 25]
