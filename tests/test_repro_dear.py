"""The invented language of DeAR's reproduction: grades are overlaps, batches hold whole groups."""

import runpy

import numpy as np
import pytest

from tokjax.reproduction.plan import PLANS

PLAN = runpy.run_path(str(PLANS / "dear.py"))


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    return PLAN["get_plan"]("smoke").prepare(tmp_path_factory.mktemp("dear"), 0)


def test_the_grade_of_a_passage_is_how_many_attributes_it_covers(materials):
    attribute = {int(t): a for a, own in enumerate(materials.synonyms) for t in own}
    drawn = materials.lists
    for query, passages, relevance in zip(*drawn.values(), strict=True):
        for words, grade in zip(passages, relevance, strict=True):
            assert len({attribute[int(w)] for w in words} & set(query.tolist())) == grade
        assert relevance.any()


def test_the_judged_passage_of_the_pool_is_relevant_and_others_may_be(materials):
    relevance = materials.pool["relevance"]
    assert (relevance[:, 0] > 0).all()
    assert (relevance[:, 1:] > relevance[:, :1]).any()


def test_each_passage_of_a_group_is_a_segment_with_its_query(materials):
    drawn = {name: values[:2] for name, values in materials.pool.items()}
    batch = PLAN["groups"](drawn, label=drawn["relevance"])
    assert batch.group == 8 and batch.example_id.shape == (2, 8)
    for b in range(2):
        for s in range(8):
            own = batch.tokens[b][batch.segment_ids[b] == s + 1]
            expected = [*drawn["query"][b], *drawn["passages"][b, s], PLAN["END"]]
            np.testing.assert_array_equal(own, expected)


def test_a_written_batch_counts_the_order_alone(materials):
    drawn = {name: values[:2] for name, values in materials.lists.items()}
    drawn |= {name: drawn[name][:, :4] for name in ("passages", "relevance")}
    order = np.array([[2, 0, 1, 3], [3, 2, 1, 0]])
    batch = PLAN["written"](drawn, order)
    counted = batch.targets[batch.weights > 0].reshape(2, 4) - PLAN["NUMBER"]
    np.testing.assert_array_equal(counted, order)
