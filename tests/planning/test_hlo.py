"""A compiled program's text, read."""

import pathlib

import numpy as np
import pytest

from llama_eqx.planning.hlo import buffers, parse, replica_groups

TEXT = pathlib.Path(__file__).with_name("step.hlo").read_text()


def test_parse():
    module = parse(TEXT)
    assert module.entry == "main"
    assert set(module.computations) == {"add.1", "fused_product", "condition", "body", "main"}
    product = module.computations["body"]["product"]
    assert (product.op, product.operands, product.calls("calls")) == ("fusion", ("x", "x"), ["fused_product"])
    assert product.number("estimated_cycles") == 1_000_000
    assert module.computations["main"]["begin"].operands == ("zero", "p", "q")


def test_an_attribute_may_break_the_line():
    kernel = parse(TEXT).computations["main"]["splash_mha_fwd_residuals.1"]
    assert kernel.op == "custom-call"
    assert '"xprof": "splash"' in kernel.rest


def test_what_is_no_program():
    with pytest.raises(ValueError, match="no entry computation"):
        parse("module @jit_step attributes {}")


@pytest.mark.parametrize(
    ("old", "new", "turns"),
    [
        ("", "", 32),
        ("%zero = s32[]{:T(128)} constant(0)", "%zero = s32[]{:T(128)} constant(2)", 30),
        ("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} constant(3)", 11),
        ("direction=LT", "direction=GT", None),
        ("%limit = s32[]{:T(128)} constant(32)", "%limit = s32[]{:T(128)} get-tuple-element(%state), index=1", None),
    ],
)
def test_turns_of_a_loop(old, new, turns):
    module = parse(TEXT.replace(old, new))
    main = module.computations["main"]
    assert module.trip_count(main["loop"], main) == turns


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ("f32[8,64]{1,0:T(8,128)}", [2048]),
        ("(bf16[16,4096]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/u32[]{:S(2)})", [131072, 4]),
        ("(f8e4m3fn[10]{0}, pred[3]{0}, s4[8]{0})", [10, 3, 4]),
        ("token[]", [4]),
    ],
)
def test_buffers(shape, sizes):
    assert buffers(shape) == sizes


@pytest.mark.parametrize(
    ("rest", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,4]<=[8], x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8,'b'=1] {'a','b'}, x", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
        ("channel_id=1", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_replica_groups(rest, groups):
    np.testing.assert_array_equal(replica_groups(rest, 8), groups)
