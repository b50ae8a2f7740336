"""Collectives are read from a program's text: kind, size, group, how often."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tokjax.ahead.collectives import Collective, by_kind, collectives


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    auto = (AxisType.Auto,) * 2
    return jax.make_mesh((2, 4), ("a", "b"), devices=jax.devices()[:8], axis_types=auto)


def compiled(mesh, function, specs, out, *shapes):
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    sharded = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return jax.jit(sharded).lower(*arguments).compile().as_text()


def test_a_sum_over_four_devices(mesh):
    text = compiled(mesh, lambda x: jax.lax.psum(x, "b"), (P("b"),), P(), (64, 32))
    (found,) = collectives(text, 8)
    assert (found.kind, found.size, found.group, found.times) == ("all-reduce", 16 * 32 * 4, 4, 1)
    assert found.moved == 2 * 0.75 * 16 * 32 * 4


def test_gathering_and_scattering_move_the_same(mesh):
    gather = compiled(
        mesh, lambda x: jax.lax.all_gather(x, "b", tiled=True), (P("b"),), P(), (64, 32)
    )
    (gathered,) = collectives(gather, 8)
    assert (gathered.kind, gathered.size, gathered.group) == ("all-gather", 64 * 32 * 4, 4)
    scatter = compiled(
        mesh, lambda x: jax.lax.psum_scatter(x, "b", tiled=True), (P(),), P("b"), (64, 32)
    )
    (scattered,) = collectives(scatter, 8)
    assert scattered.kind == "reduce-scatter"
    assert scattered.moved == gathered.moved == 0.75 * 64 * 32 * 4


def test_a_loop_runs_its_collectives_as_often_as_it_says(mesh):
    def loop(x):
        def step(c, _):
            return jax.lax.ppermute(c, "a", [(0, 1), (1, 0)]) + 1.0, None

        def outer(c, _):
            return jax.lax.scan(step, c, None, length=3)[0], None

        return jax.lax.scan(outer, x, None, length=5)[0]

    text = compiled(mesh, loop, (P("a"),), P("a"), (64, 32))
    (found,) = collectives(text, 8)
    assert (found.kind, found.size, found.times) == ("collective-permute", 32 * 32 * 4, 15)
    assert found.moved == 15 * 32 * 32 * 4


def test_a_program_of_one_device_has_none():
    assert collectives(jax.jit(jnp.sin).lower(jnp.ones(3)).compile().as_text(), 1) == []


_TPU = """
%cond (p: (s32[], bf16[2,3])) -> pred[] {
  %c = s32[]{:T(128)} constant(30), metadata={}
  ROOT %lt = pred[] compare(%g, %c), direction=LT
}

%body (p: (s32[], bf16[2,3])) -> (s32[], bf16[2,3]) {
  %s = (bf16[1,36,576], bf16[1,36,576]{2,1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=4, source_target_pairs={{0,15},{1,0}}
  %d = bf16[1,36,576]{2,1,0} collective-permute-done(%s)
}

ENTRY %main (p: s32[]) -> s32[] {
  %w = (s32[], bf16[2,3]) while(%t), condition=%cond, body=%body, metadata={}
  %g = bf16[16,36,64]{2,1,0} all-gather(%c), channel_id=137, \
replica_groups=mesh['axis_0'=2,'axis_1'=16] {'axis_1'}, dimensions={0}
  %r = f32[8]{0} all-reduce(%c), channel_id=1, replica_groups=[4,8]<=[32], to_apply=%add
}
"""


def test_the_forms_in_which_tpu_programs_write_groups_and_loops():
    found = collectives(_TPU, 32)
    assert [(each.kind, each.size, each.group, each.times) for each in found] == [
        ("collective-permute", 36 * 576 * 2, 2, 30),
        ("all-gather", 16 * 36 * 64 * 2, 16, 1),
        ("all-reduce", 32, 8, 1),
    ]
    assert found[1].groups == tuple(range(16))
    assert found[2].groups == tuple(range(8))
    across = _TPU.replace("{'axis_1'}", "{'axis_0'}").replace("[4,8]<=[32]", "[8,4]<=[4,8]T(1,0)")
    assert [each.groups for each in collectives(across, 32)[1:]] == [(0, 16), (0, 8, 16, 24)]
    assert by_kind(found)["collective-permute"] == (30, 30 * 36 * 576 * 2)


_SCATTERED = """
%all-reduce-scatter.clone.1 (p: bf16[576,192]) -> bf16[144,192] {
  %r = bf16[576,192]{1,0} all-reduce(%p), channel_id=33, \
replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}, to_apply=%add
  ROOT %d = bf16[144,192]{1,0} dynamic-slice(%r, %n, %c), dynamic_slice_sizes={144,192}
}

ENTRY %main (p: bf16[576,192]) -> bf16[144,192] {
  %f = bf16[144,192]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.clone.1
  %r = bf16[144,192]{1,0} all-reduce(%f), channel_id=34, \
replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=4], device_ids=([4,4]T(1,0)) {'axis_2'}, \
to_apply=%add
  ROOT %g = bf16[576,192]{1,0} all-gather(%r), channel_id=35, \
replica_groups=mesh['axis_0'=4,'axis_1'=4], device_ids=([4,4]T(1,0)) {'axis_0'}, dimensions={1}
}
"""


def test_a_sum_of_which_each_device_keeps_its_slice_is_scattered():
    found = collectives(_SCATTERED, 16)
    assert [(each.kind, each.size, each.groups) for each in found] == [
        ("reduce-scatter", 576 * 192 * 2, (0, 1, 2, 3)),
        ("all-reduce", 144 * 192 * 2, (0, 4, 8, 12)),
        ("all-gather", 576 * 192 * 2, (0, 1, 2, 3)),
    ]
    assert found[0].moved == found[2].moved == 0.75 * 576 * 192 * 2


def test_groups_written_in_an_unknown_way_are_not_guessed():
    with pytest.raises(ValueError, match=r"unknown way: %r = .*sixteen"):
        collectives(_SCATTERED.replace("{{0,1,2,3},{4,5,6,7}", "{{sixteen}"), 16)


_BESIDE = """
%begin (p: bf16[1,36]) -> (bf16[1,36], bf16[16,36]) {
  %a = bf16[16,36]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,16]<=[16], dimensions={0}
  ROOT %c = (bf16[1,36], bf16[16,36]) custom-call(%p, %a), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (p: bf16[1,36]) -> (bf16[16,36], f32[4]) {
  %a = bf16[16,36]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,16]<=[16], dimensions={0}
  ROOT %t = (bf16[16,36], f32[4]) tuple(%a, %b)
}

%body (p: (s32[], bf16[1,36])) -> (s32[], bf16[1,36]) {
  %k = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call", metadata={
"sizes":"{\\"block\\": 512}"
}}, backend_config={}
  %f = (bf16[16,36], f32[4]) fusion(%p), kind=kOutput, calls=%meanwhile
  %r = f32[8]{0} all-reduce(%k), channel_id=8, replica_groups=[1,16]<=[16], to_apply=%add
}

ENTRY %main (p: s32[]) -> s32[] {
  %s = (bf16[1,36], bf16[16,36]) fusion(%p), kind=kCustom, calls=%begin
  %w = (s32[], bf16[1,36]) while(%t), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %f = (bf16[16,36], f32[4]) fusion(%p), kind=kOutput, calls=%meanwhile
}
"""


_UNROLLED = """
%cond (p: (bf16[2,3], u32[])) -> pred[] {
  %c = u32[]{:T(128)} constant(9), metadata={}
  %g = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%g, %c), direction=LT
}

%body (p: (bf16[2,3], u32[])) -> (bf16[2,3], u32[]) {
  %one = u32[]{:T(128)} constant(1)
  %two = u32[]{:T(128)} constant(2), metadata={}
  %g = u32[]{:T(128)} get-tuple-element(%p), index=1
  %between = u32[]{:T(128)} add(%g, %one)
  %next = u32[]{:T(128)S(6)} add(%g, %two), metadata={}
  %r = bf16[2,3]{1,0} all-reduce(%x), channel_id=1, replica_groups=[4,8]<=[32], to_apply=%add
  ROOT %t = (bf16[2,3], u32[]) tuple(%r, /*index=1*/%next)
}

ENTRY %main (p: bf16[2,3]) -> bf16[2,3] {
  %w = (bf16[2,3], u32[]) while(%t), condition=%cond, body=%body, metadata={}
}
"""


def test_a_loop_that_counts_in_twos_runs_half_as_often():
    (found,) = collectives(_UNROLLED, 32)
    assert found.times == 5
    (found,) = collectives(_UNROLLED.replace("%next)", "%between)"), 32)
    assert found.times == 9


def test_a_gathering_beside_other_work_counts_once_and_kernels_hide_nothing():
    found = collectives(_BESIDE, 16)
    assert [(each.kind, each.size, each.times) for each in found] == [
        ("all-gather", 16 * 36 * 2, 1),
        ("all-reduce", 32, 5),
    ]


def test_a_group_of_one_moves_nothing():
    assert Collective("all-reduce", 100, 1, 1).moved == 0
