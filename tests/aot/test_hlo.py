"""Totals of program texts: by hand for a small one, and against what a compiled one must do."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lcm import aot
from lcm.aot import checks, hlo
from tests.aot.test_program import needs_libtpu

TEXT = """
HloModule jit_step, is_scheduled=true

%fused (p0: f32[8,4,128], p1: s32[]) -> f32[4,128] {
  %p0 = f32[8,4,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %slice = f32[1,4,128]{2,1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,4,128}
  ROOT %bitcast = f32[4,128]{1,0} bitcast(%slice)
}

%body (state: (s32[], f32[8,4,128])) -> (s32[], f32[8,4,128]) {
  %state = (s32[], f32[8,4,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %all = f32[8,4,128]{2,1,0} get-tuple-element(%state), index=1
  %one = f32[4,128]{1,0} fusion(%all, %i), calls=%fused, backend_config={"estimated_cycles":"100"}
  %sum = f32[4,128]{1,0} all-reduce(%one), to_apply=%add, backend_config={"estimated_cycles":"7"}
  %core = f32[4,128]{1,0:T(8,128)S(1)} copy(%sum)
  ROOT %out = (s32[], f32[8,4,128]{2,1,0}) tuple(%i, %all)
}

%condition (state: (s32[], f32[8,4,128])) -> pred[] {
  %state = (s32[], f32[8,4,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %limit = s32[]{:T(128)} constant(8)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: f32[8,4,128]) -> f32[8,4,128] {
  %x = f32[8,4,128]{2,1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,4,128]{2,1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[8,4,128]{2,1,0}) while(%start), condition=%condition, body=%body
  %gather-start = (bf16[2,128]{1,0}, bf16[8,128]{1,0}) all-gather-start(%x), dimensions={0}
  %gather-done = bf16[8,128]{1,0} all-gather-done(%gather-start)
  ROOT %result = f32[8,4,128]{2,1,0} get-tuple-element(%loop), index=1
}
"""


def test_loops_count_as_often_as_they_run():
    totals = hlo.Module(TEXT).totals()
    piece = 4 * 128 * 4
    assert totals.cycles == 8 * 107
    assert totals.collectives["all-reduce"] == (8, 8 * piece)
    assert totals.collectives["all-gather"] == (1, 8 * 128 * 2)
    assert totals.sent == 8 * piece + 8 * 128 * 2
    # A fusion reads an index and the piece it cuts out, and writes it; the sum reads and writes
    # one; of a copy into the memory of the core the reading counts. The gather starts from x.
    body = 4 + (1 + 1) * piece + 2 * piece + piece
    assert totals.accessed == 8 * body + hlo.size("f32[8,4,128]") + 2 * 128 * 2 + 8 * 128 * 2


def test_collectives_that_go_on_within_other_operations_count_where_they_start():
    gather = "  %all = f32[8,4,128]{2,1,0} all-gather(%p0), channel_id=1\n"
    start = (
        "\n%starting (p0: f32[1,4,128]) -> (f32[1,4,128], f32[8,4,128]) {\n"
        f"  %p0 = f32[1,4,128]{{2,1,0}} parameter(0)\n{gather}"
        "  ROOT %call = (f32[1,4,128]{2,1,0}, f32[8,4,128]{2,1,0}) custom-call(%all), "
        'custom_call_target="AsyncCollectiveStart"\n}\n'
    )
    between = start.replace("starting", "going").replace("CollectiveStart", "CollectiveUpdate")
    both = "(f32[1,4,128]{2,1,0}, f32[8,4,128]{2,1,0})"
    ops = "".join(f"  %{n} = {both} fusion(%one), calls=%{n}ing\n" for n in ("start", "go"))
    at = "  %core = "
    totals = hlo.Module(start + between + TEXT.replace(at, ops + at)).totals()
    assert totals.collectives["all-gather"] == (8 + 1, 8 * 8 * 4 * 128 * 4 + 8 * 128 * 2)


def test_planted_regressions_are_found():
    text = TEXT.replace("bf16[8,128]{1,0}", "bf16[8,4096,512]{2,1,0}")
    (found,) = checks.stacked_gathers(hlo.Module(text), {(8, 8 * 4096 * 512)})
    assert found.startswith("parameter-gather: gather-start gathers (8, 4096, 512)")
    assert not list(checks.stacked_gathers(hlo.Module(TEXT), {(8, 8 * 4096 * 512)}))
    # One layer of eight heads, in a model of eight layers, each of as many numbers.
    assert not list(checks.stacked_gathers(hlo.Module(text), {(8, 8 * 8 * 4096 * 512)}))
    square = hlo.Module(TEXT.replace("f32[4,128]{1,0:T(8,128)S(1)}", "f32[2,2048,2048]{2,1,0}"))
    (found,) = checks.square_arrays(square, 2048)
    assert found == "square-array: core is (2, 2048, 2048), 2048 being the tokens of a row"
    x = jnp.ones((64, 64), jnp.bfloat16)
    wide = jax.make_jaxpr(lambda x: x @ x + x.astype(jnp.float32) @ x.astype(jnp.float32))(x)
    (found,) = checks.wide_products(wide.jaxpr)
    assert found == "float32-matmul: 50.0 % of all FLOPs are of float32 products"
    assert not list(checks.wide_products(jax.make_jaxpr(lambda x: x @ x)(x).jaxpr))


@needs_libtpu
@pytest.mark.parametrize("layers", [3, 5])
def test_collectives_of_a_compiled_scan(layers):
    mesh = aot.mesh("v5e:2x2", (4,), ("x",))

    def place(shape, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    def stack(x, weights):
        return jax.lax.scan(lambda x, w: (jax.lax.psum(x @ w, "x"), None), x, weights)[0]

    mapped = jax.shard_map(
        stack,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(None, None, "x")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    square = lambda x, w: mapped(x, w)  # noqa: E731
    x, w = place((64, 256)), place((layers, 256, 1024), None, None, "x")
    totals = hlo.Module(aot.compile(square, x, w, topology=mesh).compiled.as_text()).totals()
    assert totals.collectives["all-reduce"] == (layers, layers * 64 * 256 * 4)
    assert totals.accessed >= layers * 256 * 256 * 4  # every weight is read
    assert totals.cycles > 0
