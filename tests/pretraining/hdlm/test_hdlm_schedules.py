"""Hyperschedules: the tables, the noise of their levels, and what they refuse."""

import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.pretraining.hdlm import (
    Block,
    Hybrid,
    SimpleAnnealing,
    autoregressive,
    full_diffusion,
)
from tokjax.pretraining.hdlm.schedules import grid_time, probability, transfers


def digits(table):
    return ["".join(map(str, row)) for row in table.levels]


def test_blocks_descend_one_after_the_other():
    table = Block(2, 3).table(4)
    assert digits(table) == ["3333", "2233", "1133", "0033", "0022", "0011", "0000"]
    assert table.settled.tolist() == [0, 0, 0, 0, 2, 2, 2]
    assert table.steps == 3 * 2 and (table.steps_of(2), table.steps_of(3)) == (3, 6)
    # Positions that have reached level 0 are active for one more step.
    assert table.active[3].tolist() == [True, True, False, False]
    assert table.active[4].tolist() == [False, False, True, True]
    assert Block(3, 2).table(7).steps == 2 * 3


def test_simple_annealing_slides_a_ramp_and_settles_a_step_late():
    table = SimpleAnnealing(4, 4).table(6)
    assert digits(table) == [
        *("444444", "344444", "234444", "123444", "012344"),
        *("001234", "000123", "000012", "000001", "000000"),
    ]
    assert table.settled.tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 4, 5]
    steep = SimpleAnnealing(3, 6).table(4)
    assert digits(steep) == ["6666", "5666", "2566", "0256", "0025", "0002", "0000"]


def test_hybrid_has_ramps_inside_blocks_which_settle_as_a_whole():
    table = Hybrid(2, 3).table(4)
    assert digits(table) == [
        *("3333", "2233", "1233", "0133", "0033"),
        *("0022", "0012", "0001", "0000"),
    ]
    assert table.settled.tolist() == [0] * 5 + [2] * 4
    assert digits(Hybrid(2, 1).table(2)) == ["11", "00", "00"]


def test_autoregression_and_diffusion_are_blocks():
    table = autoregressive().table(3)
    assert digits(table) == ["111", "011", "001", "000"]
    assert table.settled.tolist() == [0, 0, 1, 2]
    assert digits(SimpleAnnealing(1).table(3)) == digits(table)
    assert digits(full_diffusion(3).table(4)) == ["3333", "2222", "1111", "0000"]
    assert digits(Block().table(3)) == ["333", "222", "111", "000"]
    assert Block(100, 2).table(3).settled.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "schedule", [Block(3, 2), SimpleAnnealing(4, 7), SimpleAnnealing(5, 3), Hybrid(4, 3)]
)
@pytest.mark.parametrize("length", [1, 5, 8])
def test_every_position_descends_and_is_active_before_it_settles(schedule, length):
    table = schedule.table(length)
    assert (table.levels[0] == table.tau).all() and (table.levels[-1] == 0).all()
    assert (np.diff(table.levels, axis=0) <= 0).all() and (np.diff(table.settled) >= 0).all()
    assert table.active[1:].any(1).all() and not table.active[0].any()
    settled = np.arange(length) < table.settled[:, None]
    assert (table.levels[settled] == 0).all()
    # Each is finished at level 0 while it is still active.
    assert (table.active & (table.levels == 0)).any(0).all()
    odds = np.asarray(transfers(table))
    assert (odds[~table.active] == 0).all() and (odds >= 0).all() and (odds <= 1).all()
    assert (odds[table.active & (table.levels == 0)] == 1).all()


def test_levels_become_probabilities_that_keep_from_0_and_1():
    np.testing.assert_allclose(
        probability(np.arange(4), 4), [0.001, 0.333667, 0.666333, 0.999], atol=1e-6
    )
    assert probability(np.array([0]), 1).tolist() == [1.0]


def test_masks_are_lifted_as_on_an_even_grid_of_times():
    grid = np.linspace(1, 1e-5, 5)
    odds = np.asarray(transfers(Block(2, 4).table(2)))[1:, 0]
    np.testing.assert_allclose(odds[:3], (1 - grid[1:] / grid[:-1])[:3], rtol=1e-5)
    assert odds[3] == 1
    np.testing.assert_allclose(grid_time(np.array([3, 0, -1]), 4), [1, grid[3], 1e-5], rtol=1e-5)
    # Where a level does not change, nothing is lifted.
    flat = np.asarray(transfers(SimpleAnnealing(5, 3).table(5)))
    levels = SimpleAnnealing(5, 3).table(5).levels
    same = (levels[:-1] == levels[1:]) & (levels[:-1] > 0)
    assert same.any() and (flat[:-1][same] == 0).all()


def test_impossible_schedules_are_refused():
    for make in (Block, SimpleAnnealing, Hybrid):
        with pytest.raises(ConfigError, match="width=0 must be at least 1"):
            make(0)
        with pytest.raises(ConfigError, match="tau=-1 must be at least 1"):
            make(2, -1)
        with pytest.raises(ConfigError, match="at least 1 position, not 0"):
            make(2, 2).table(0)
    with pytest.raises(ConfigError, match="width=1 with tau=2"):
        SimpleAnnealing(1, 2)
