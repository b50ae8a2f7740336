"""What a configuration's programs need, compiled without data and without the devices."""

import dataclasses
import json

import jax
import pytest

from tokjax import aot
from tokjax.ahead.chips import CHIPS, Topology, topology
from tokjax.ahead.estimate import Estimate, estimate
from tokjax.ahead.programs import advice, decoding_estimate, program, training_estimate
from tokjax.config import resolve
from tokjax.errors import ConfigError
from tokjax.training.config import TrainConfig


def config(**changes) -> TrainConfig:
    tree = {
        "model": {"d_model": 32, "n_layers": 3, "n_heads": 4, "vocab_size": 64},
        "data": {"seq_len": 16, "batch_size": 8},
        "mesh": {"data": 1, "fsdp": 4, "tensor": 2},
        "steps": 10,
    }
    return resolve(TrainConfig, tree | changes)


@pytest.fixture(scope="module")
def trained() -> Estimate:
    made = program(config(), topology("cpu"))
    return training_estimate(made, topology("cpu"), made.stages[0])


def test_a_step_on_a_mesh_has_the_collectives_of_its_axes(trained):
    assert trained.chips == 8
    assert trained.sent["all-reduce"][1] > 0
    assert trained.total_sent == sum(size for _, size in trained.sent.values())


def test_a_step_computes_at_least_the_models_formula(trained):
    # The formula counts the embedding look-up as nothing and the backward pass as twice the
    # forward; attention may be computed again.
    assert trained.flops >= 0.95 * trained.model_flops
    assert trained.flops < 2 * trained.model_flops


def test_parameters_split_over_more_chips_leave_less_on_each(trained):
    alone = program(config(mesh={"data": 8}), topology("cpu"))
    assert training_estimate(alone, topology("cpu"), alone.stages[0]).arguments > (
        2 * trained.arguments
    )


def test_decoding_is_compiled_beside_a_full_cache():
    made = program(config(), topology("cpu"))
    small = decoding_estimate(made, topology("cpu"), 4, 16)
    large = decoding_estimate(made, topology("cpu"), 4, 64)
    cache = 2 * 3 * 4 * (64 - 16) * 32 * 4 / 8  # keys and values of 3 layers, on 8 chips
    assert large.arguments - small.arguments == pytest.approx(cache, rel=0.01)


class _Compiled:
    """A program whose figures are given."""

    def memory_analysis(self):
        class Memory:
            argument_size_in_bytes = 8e9
            output_size_in_bytes = 8e9
            alias_size_in_bytes = 8e9
            temp_size_in_bytes = 4e9
            generated_code_size_in_bytes = 0

        return Memory()

    def as_text(self):
        return (
            "ENTRY %main (p: f32[]) -> f32[] {\n"
            "  %r = f32[1000000]{0} all-reduce(%c), replica_groups={{0,1,2,3}}\n"
            "  %s = f32[1000000]{0} all-reduce(%c), replica_groups={{0,4}}\n"
            "}\n"
        )


def test_the_roofline_is_the_longest_of_three_and_leaving_a_slice_is_slow():
    there = Topology("two", CHIPS["v5e"], jax.devices(), slices=2)
    flops = 8 * 197e12 * 0.5
    found = estimate("x", _Compiled(), there, model_flops=0.8 * flops, flops=flops)
    assert found.seconds is not None
    assert found.seconds["computing"] == pytest.approx(0.5)
    assert found.seconds["memory"] == pytest.approx((8e9 + 8e9 + 8e9) / 8.19e11)
    cached = estimate("x", _Compiled(), there, model_flops=flops, flops=flops, rewrites=False)
    assert cached.traffic == 8e9 + 8e9  # the results lie where the arguments did
    inside, outside = 2 * 0.75 * 4e6 / 9e10, 2 * 0.5 * 4e6 / 6.25e9
    assert found.seconds["collectives"] == pytest.approx(inside + outside)
    assert found.bound == "computing"
    assert found.mfu is not None
    assert found.mfu[1] == pytest.approx(0.8)
    assert found.mfu[0] < 0.8
    assert found.fits is True
    assert dataclasses.replace(found, temporary=9e9).bytes > CHIPS["v5e"].memory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": "smollm2-135m"}, "leave out init_from"),
        ({"mesh": {"data": 8}, "data": {"seq_len": 16, "batch_size": 6}}, "multiple of 8"),
        ({"mesh": {"data": 3}}, "does not fit 8 devices"),
    ],
)
def test_what_cannot_be_compiled_is_told(changes, message):
    with pytest.raises(ConfigError, match=message):
        program(config(**changes), topology("cpu"))


@pytest.mark.parametrize(
    ("tokenizer", "given", "size"),
    [({"name": "bpe", "vocab_size": 500}, None, 500), ({"name": "bytes"}, 70, 70)],
)
def test_the_vocabulary_is_known_without_training_a_tokenizer(tokenizer, given, size):
    data = {"seq_len": 16, "batch_size": 8, "tokenizer": tokenizer}
    open_size = config(model={"d_model": 32, "n_heads": 4}, data=data)
    assert program(open_size, topology("cpu"), given).model.config.vocab_size == size


def test_advice_names_what_is_left_to_change():
    assert "remat='block'" in advice(config())
    frugal = config(
        model={"d_model": 32, "vocab_size": 64, "remat": "block"}, mesh={"data": 1, "fsdp": -1}
    )
    assert "remat" not in advice(frugal)
    assert "mesh.fsdp" not in advice(frugal)
    assert "micro_batches=2" in advice(frugal)


def test_the_command_prints_and_writes_what_it_found(tmp_path, capsys):
    file = tmp_path / "config.py"
    file.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        "    return ConfigDict(dict(model=dict(d_model=32, n_layers=2, n_heads=4, vocab_size=64),\n"
        "        data=dict(seq_len=16, batch_size=8), mesh=dict(data=2, fsdp=4), steps=3))\n"
    )
    out = tmp_path / "found.json"
    argv = [f"--config={file}", "--topology=cpu", "--decode_rows=8", f"--json={out}"]
    assert aot.main(argv) == 0
    told = capsys.readouterr().out
    assert "training step" in told
    assert "decoding step (8 rows, 16 tokens)" in told
    assert "memory of a chip" in told
    found = json.loads(out.read_text())
    assert [each["chips"] for each in found] == [8, 8]
