"""The reproduction of TRIM: its families, and the examples it scores."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tokjax.reproduction import Measurements

FILE = Path(__file__).parent.parent / "configs/repro/trim.py"


@pytest.fixture(scope="module")
def trim():
    spec = importlib.util.spec_from_file_location("repro_trim", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_families_answer_with_the_same_number_of_digits(trim):
    digits = [3, 1, 4, 9]
    found = {family: trim.response(family, digits) for family in trim.FAMILIES}
    assert found == {
        "copy": [3, 1, 4, 9],
        "reverse": [9, 4, 1, 3],
        "sort": [1, 3, 4, 9],
        "sum": [4, 5, 3, 2],
    }


def test_records_say_nothing_of_their_family_and_fit_a_row(trim):
    rng = np.random.default_rng(0)
    for family in trim.FAMILIES:
        for _ in range(50):
            record = trim.drawn(family, rng)
            prompt, answer = record["prompt"].split(), record["response"].split()
            assert prompt[-1] == "=" and all(p.isdigit() for p in [*prompt[:-1], *answer])
            assert trim.DIGITS[0] <= len(answer) == len(prompt) - 1 <= trim.DIGITS[1]
            assert [int(a) for a in answer] == trim.response(family, [int(p) for p in prompt[:-1]])
            assert len(prompt) + len(answer) + 2 <= trim.WIDTH


def test_the_store_in_memory_weighs_responses_and_ends(trim):
    tokenizer = SimpleNamespace(eos_id=99)
    lm = SimpleNamespace(tokenizer=tokenizer, encode=lambda text: [0, *map(ord, text.split())])
    store = trim.Examples(lm, [{"prompt": "3 1 =", "response": " 1 3"}])
    rows = trim.rows_of(store, [0], 8)
    assert rows.tokens.tolist() == [[0, 51, 49, 61, 49, 51, 99, 0]]
    assert rows.weights.tolist() == [[0, 0, 0, 0, 1, 1, 1, 0]]
    assert rows.scope("response", end=False)[0].nonzero()[0].tolist() == [4, 5]


def test_gaps_are_means_over_families_and_pairs(trim):
    values = {
        "a_x": {0: {"m": [1.0, 2.0]}, 1: {"m": [3.0, 4.0]}},
        "a_y": {0: {"m": [0.0, 1.0]}, 1: {"m": [2.0, 3.0]}},
        "b_x": {0: {"m": [5.0, 5.0]}, 1: {"m": [5.0, 5.0]}},
        "b_y": {0: {"m": [2.0, 2.0]}, 1: {"m": [2.0, 2.0]}},
    }
    found = trim._gap(Measurements(values, {}), ("a", "b"), "x", "y", "m")
    assert (found.mean, found.low, found.high) == (2.0, 2.0, 2.0)
