"""The model of time: by hand on a small program."""

import itertools
import pathlib

import numpy as np
import pytest

from llama_eqx.planning.chips import CHIPS, HOST_LINK, Torus
from llama_eqx.planning.estimate import HOP_SECONDS, KERNEL_EFFICIENCY, LINK_EFFICIENCY, collective_seconds, estimate, kernel_seconds
from llama_eqx.planning.hlo import parse

TEXT = pathlib.Path(__file__).with_name("step.hlo").read_text()
CLOCK = CHIPS["TPU v4"].clock
GATHER = (
    15 / 16 * 4096 * 4096 * 2 / (3 * 4.5e10) / LINK_EFFICIENCY + 5 * HOP_SECONDS
)  # 2 x 2 x 4 in a line each: one link on each of three axes
REDUCE = 2 * (GATHER - 5 * HOP_SECONDS) + 5 * HOP_SECONDS
KERNEL = 2 * 2 * 8 * 4096 * 4096 * 128 * (36 / 64) / (KERNEL_EFFICIENCY * 275e12)  # 8 x 8 blocks, of which 36 on or below the diagonal


class Device:
    def __init__(self, coords, kind):
        self.coords, self.device_kind = coords, kind


def torus(kind, *sizes):
    return Torus.of([Device(place, kind) for place in itertools.product(*map(range, sizes))])


SLICE = torus("TPU v4", 2, 2, 4)


def test_a_loop_with_a_hidden_gather_and_an_exposed_reduction():
    found = estimate(TEXT, SLICE)
    product = 1e6 / CLOCK
    assert product > GATHER  # the gather ends before the product does
    np.testing.assert_allclose(found.compute, 32 * product + KERNEL + 5000 / CLOCK)
    np.testing.assert_allclose(found.step, found.compute + 32 * REDUCE)
    np.testing.assert_allclose((found.exposed, found.kernels), (32 * REDUCE, KERNEL))
    assert found.doubts == ()
    gathers, reductions = found.traffic["all-gather", True], found.traffic["all-reduce", False]
    assert (gathers.count, gathers.bytes) == (32, 32 * 4096 * 4096 * 2)
    assert (reductions.count, reductions.bytes) == (32, 32 * 4096 * 4096 * 2)


def test_a_gather_longer_than_what_it_overlaps_is_waited_for():
    found = estimate(TEXT.replace('"1000000"', '"1000"'), SLICE)
    np.testing.assert_allclose(found.step, 32 * (GATHER + REDUCE) + KERNEL + 5000 / CLOCK, rtol=1e-6)


def test_a_synchronous_gather_is_waited_for():
    line = next(line for line in TEXT.splitlines() if "all-gather-start(" in line)
    _, shape = line.split(" = ")[1].split(" all-gather-start")[0].strip("()").split(", bf16")
    text = TEXT.replace(
        line,
        line.replace(f"(bf16[256,4096]{{1,0:T(8,128)(2,1)}}, bf16{shape})", f"bf16{shape}").replace("all-gather-start(", "all-gather("),
    )
    text = "\n".join(line for line in text.splitlines() if "all-gather-done" not in line)
    np.testing.assert_allclose(estimate(text, SLICE).step - estimate(TEXT, SLICE).step, 32 * GATHER, rtol=1e-6)


def test_a_gather_spread_over_fusions():
    """As in "continuation fusion": begun by one fusion, carried on inside products, ended by another."""
    body = """
%start_body (s: bf16[256,4096]) -> bf16[4096,4096] {
  %s = bf16[256,4096]{1,0} parameter(0)
  ROOT %g = bf16[4096,4096]{1,0} all-gather(%s), replica_groups=mesh['a'=16] {'a'}, dimensions={0}
}
"""
    start = next(line for line in TEXT.splitlines() if "all-gather-start(" in line)
    end = next(line for line in TEXT.splitlines() if "all-gather-done(" in line)
    text = TEXT.replace(
        start, "  %async-collective-start.1 = (bf16[256,4096]{1,0}, bf16[4096,4096]{1,0}, s32[2]{0:S(4)}) fusion(%shard), calls=%start_body"
    )
    text = text.replace(end, "  %async-collective-done.1 = bf16[4096,4096]{1,0} fusion(%product), calls=%start_body")
    text = text.replace("\n%condition", body + "\n%condition", 1)
    found = estimate(text, SLICE)
    np.testing.assert_allclose(found.step, estimate(TEXT, SLICE).step)
    slow = estimate(text.replace('"1000000"', '"1000"'), SLICE)
    np.testing.assert_allclose(slow.step, 32 * (GATHER + REDUCE) + KERNEL + 5000 / CLOCK, rtol=1e-6)
    assert found.traffic["all-gather", True].count == 32


STACK, SLICE_OF_IT = "bf16[32,4096,4096]{2,1,0:T(8,128)(2,1)S(5)}", "bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)}"
INDICES = "s32[]{:T(128)}, s32[]{:T(128)}, /*index=4*/s32[]{:T(128)}"
TO_AND_FROM_THE_HOST = {
    "copy": (f"({SLICE_OF_IT[:-1]}S(5)}}, {SLICE_OF_IT}, u32[]{{:S(2)}})", "copy-start(%x)"),
    "dynamic-update-slice": (
        f"(({STACK}, {SLICE_OF_IT}, {INDICES}), {STACK}, u32[]{{:S(2)}})",
        "dynamic-update-slice-start(%stack, %x, %next, %one, %one)",
    ),
    "dynamic-slice": (f"(({STACK}, {INDICES}), {SLICE_OF_IT}, u32[]{{:S(2)}})", "dynamic-slice-start(%stack, %next, %one, %one)"),
}


@pytest.mark.parametrize("op", TO_AND_FROM_THE_HOST)
def test_what_the_host_keeps_takes_its_time(op):
    """In each turn a layer's 32 MiB move to or from the host, beside a product that is shorter than that."""
    shape, call = TO_AND_FROM_THE_HOST[op]
    line = next(line for line in TEXT.splitlines() if "%product = " in line)
    text = TEXT.replace(line, f"  %away = {shape} {call}\n{line}\n  %back = {SLICE_OF_IT} {op}-done(%away)")
    found, moved = estimate(text, SLICE), 4096 * 4096 * 2
    assert moved / HOST_LINK > 1e6 / CLOCK
    assert (found.traffic["host-copy", True].count, found.traffic["host-copy", True].bytes) == (32, 32 * moved)
    np.testing.assert_allclose(found.step - estimate(TEXT, SLICE).step, 32 * (moved / HOST_LINK - 1e6 / CLOCK), rtol=1e-6)


def test_a_scatter_beside_a_permutation_and_the_dearer_of_two_branches():
    """By its result, a reduce-scatter is a 16th of what it moves. A permutation has its own link."""
    text = """HloModule step

%short (a: bf16[256,4096]) -> bf16[256,4096] {
  ROOT %a = bf16[256,4096]{1,0} fusion(), backend_config={"estimated_cycles":"1000"}
}

%long (b: bf16[256,4096]) -> bf16[256,4096] {
  ROOT %b = bf16[256,4096]{1,0} fusion(), backend_config={"estimated_cycles":"9000"}
}

ENTRY %main (x: bf16[4096,4096]) -> bf16[256,4096] {
  %x = bf16[4096,4096]{1,0} parameter(0)
  %sent = (bf16[256,4096]{1,0}, bf16[256,4096]{1,0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %scattered = bf16[256,4096]{1,0} reduce-scatter(%x), replica_groups=mesh['a'=16] {'a'}, dimensions={0}
  %come = bf16[256,4096]{1,0} collective-permute-done(%sent)
  ROOT %chosen = bf16[256,4096]{1,0} conditional(%x, %come, %come), branch_computations={%long, %short}
}
"""
    found = estimate(text, SLICE)
    assert found.traffic["reduce-scatter", False].bytes == 4096 * 4096 * 2
    assert 0 < found.traffic["collective-permute", True].seconds < GATHER
    np.testing.assert_allclose(found.step, GATHER + 9000 / CLOCK, rtol=1e-6)


def test_what_cannot_be_read_is_said():
    found = estimate(TEXT.replace("direction=LT", "direction=GT").replace("splash_mha_fwd", "my_kernel"), SLICE)
    assert [doubt.split(":")[0] for doubt in found.doubts] == ["loop loop", "kernel my_kernel_residuals.1"]
    assert found.kernels == 0


@pytest.mark.parametrize(
    ("kernel", "products"), [("splash_mha_fwd", 2), ("splash_mqa_fwd", 2), ("splash_mha_dq", 3), ("splash_mha_dkv", 4)]
)
def test_kernels(kernel, products):
    instruction = parse(TEXT.replace("splash_mha_fwd", kernel)).computations["main"][f"{kernel}_residuals.1"]
    np.testing.assert_allclose(kernel_seconds(instruction, 275e12), products / 2 * KERNEL)


@pytest.mark.parametrize(("kernel", "products"), [("splash_mha_fwd", 2), ("splash_mha_dkv", 4)])
def test_devices_that_split_a_row_have_a_part_of_its_front_and_one_of_its_end(kernel, products):
    """The 2 blocks of queries of one of 4 see 1 and 8 of the 8 blocks of keys, where all 8 blocks of a whole row see 36."""
    text = TEXT.replace("splash_mha_fwd", kernel).replace("s8[1,8,8]{2,1,0}, bf16[8,4096", "s8[1,2,8]{2,1,0}, bf16[8,1024")
    instruction = parse(text).computations["main"][f"{kernel}_residuals.1"]
    np.testing.assert_allclose(kernel_seconds(instruction, 275e12), products / 2 * KERNEL * (1 + 8) / 36)


def test_a_fused_backward_kernel_has_a_product_more():
    text = TEXT.replace("splash_mha_fwd", "splash_mha_dkv").replace(
        "(bf16[8,4096,128]{2,1,0:T(8,128)(2,1)}, f32", "(bf16[8,8,4096,128]{3,2,1,0}, f32"
    )
    instruction = parse(text).computations["main"]["splash_mha_dkv_residuals.1"]
    np.testing.assert_allclose(kernel_seconds(instruction, 275e12), 5 / 2 * KERNEL)


@pytest.mark.parametrize(
    ("kind", "sizes", "members", "links"),
    [
        ("TPU v4", (2, 2, 4), slice(None), 3),  # smaller than a cube: no rings
        ("TPU v4", (4, 4, 4), slice(None), 6),
        ("TPU v4", (4, 4, 4), [0, 1, 2, 3], 2),  # one ring
        ("TPU v4", (4, 4, 4), [0, 1], 1),
        ("TPU v4", (4, 4, 8), slice(None), 6),
        ("TPU v5 lite", (8, 16), slice(None), 3),  # only 16 close
        ("TPU v6 lite", (4, 4), slice(None), 2),
    ],
)
def test_bandwidth(kind, sizes, members, links):
    found = torus(kind, *sizes)
    assert found.bandwidth(np.arange(len(found.places))[members]) == links * CHIPS[kind].link


def test_collectives():
    gather = collective_seconds("all-gather", 2**30, 4, 9e10, 4.5e10, 0)
    np.testing.assert_allclose(gather, 0.75 * 2**30 / 9e10 / LINK_EFFICIENCY)
    assert collective_seconds("reduce-scatter", 2**30, 4, 9e10, 4.5e10, 0) == gather
    np.testing.assert_allclose(collective_seconds("all-reduce", 2**30, 4, 9e10, 4.5e10, 0), 2 * gather)
    np.testing.assert_allclose(collective_seconds("collective-permute", 2**30, 2, 9e10, 4.5e10, 3), 2**30 / 4.5e10 / LINK_EFFICIENCY + 3e-6)
