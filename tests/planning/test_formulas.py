"""Memory by formula, held against the compiler."""

import dataclasses

import jax
import numpy as np
import pytest
from jaxtyping import Array, Float

from llama_eqx import load_config
from llama_eqx.errors import ConfigError, UserError
from llama_eqx.model.feed_forward import FeedForward, FeedForwardConfig
from llama_eqx.planning import compile as compiling
from llama_eqx.planning.compile import build_mesh, compile_step, program_text, too_big
from llama_eqx.planning.memory import memory_by_part, trace
from llama_eqx.sharding import Layout
from llama_eqx.tag import tag
from llama_eqx.training.program import make_program

DIMS = ("vocab=320", "layers=8", "embed=256", "heads=4", "kv_heads=2", "head_dim=64", "mlp=704")


def settings(*overrides):
    dims = [f"model.dims.{dim}" for dim in DIMS]
    return load_config("mesh=cpu-8", "model.context=512", "train.seq_len=512", "train.batch_size=16", *dims, *overrides, name="plan")


def parts(config):
    layout = Layout(build_mesh(config.mesh), config.sharding)
    program = make_program(config, layout)
    return memory_by_part(config, program, layout), program, layout


@pytest.mark.parametrize("remat", ["none", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "names"))])
def test_against_the_compiler(remat):
    config = settings(f"remat={remat}")
    memory, program, layout = parts(config)
    jax.config.update("jax_disable_most_optimizations", False)  # a step's memory is that of the optimised program
    try:
        compiled = compile_step(config, program, layout)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    batch = 3 * 2 * 512 * 4  # tokens, targets and mask of two rows
    np.testing.assert_allclose(compiled.arguments, memory.parameters + memory.optimizer + batch, rtol=1e-3)
    np.testing.assert_allclose(memory.total, compiled.peak, rtol=0.25)


def test_remat_and_rows_change_what_is_kept():
    kept = {remat: trace(settings(f"remat={remat}"), parts(settings())[2]) for remat in ("none", "full", "offload")}
    row, layers = 512 * 256 * 4, 8
    assert layers * row <= kept["full"].whole <= (layers + 4) * row  # the residual between blocks, and a few around the head
    assert kept["none"].whole + kept["none"].split > 8 * layers * row
    assert kept["offload"].host == layers * row
    assert kept["offload"].whole <= 4 * row
    assert kept["none"].flops < kept["full"].flops < 4 / 3 * kept["none"].flops * 1.01


@pytest.mark.parametrize("only", ["null", "[q_proj]", "[final_norm.weight]", "[lm_head]"])
def test_flops_without_remat_are_those_of_the_formula(only):
    from llama_eqx.flops import flops_per_token
    from llama_eqx.training.optimizer import learning

    config = settings("remat=none", "kernel.name=plain", "model.tied=false", f"train.only={only}")
    _, program, layout = parts(config)
    model = program.shapes.model
    expected = flops_per_token(model, 512, learning(config.train.only, model)).palm  # the plain kernel computes the masked half too
    dropped = 0 if only == "null" else 2 * 320 * 256  # of the head's two gradients XLA drops the one that nothing asks for
    assert trace(config, layout).flops / 512 == pytest.approx(expected + dropped, rel=1e-4)


def test_tensor_parallelism_splits_heads_and_feed_forward():
    whole, _, _ = parts(settings("remat=none"))
    half, _, _ = parts(settings("remat=none", "sharding=fsdp_tensor", "mesh.tensor=2"))
    assert half.parameters == pytest.approx(whole.parameters, rel=0.05)  # of 2 x 4 devices as of 8
    assert half.activations > whole.activations  # rows are split over 4 devices then, and the residual is whole on both
    split, _, _ = parts(settings("remat=none", "sharding=fsdp_tensor", "mesh.tensor=2", "+sharding.axes.residual=[tensor]"))
    assert split.activations == pytest.approx(whole.activations, rel=0.05)


class Wide(FeedForward):
    up_proj: Float[Array, "embed wide"]
    down_proj: Float[Array, "wide embed"]

    def __call__(self, x):
        return tag(jax.nn.silu(tag(x @ self.up_proj, "up")) @ self.down_proj, "down")


class WideConfig(FeedForwardConfig):
    wide: int

    def build(self, dims, init, *, key):
        up = init.matrix(Wide, "up_proj", dims, fan_in="embed", wide=self.wide, key=key)
        return Wide(up_proj=up, down_proj=init.matrix(Wide, "down_proj", dims, fan_in="wide", wide=self.wide, key=key))


def test_tensor_parallelism_splits_an_axis_of_ones_own():
    known = settings(
        "sharding=fsdp_tensor", "mesh.tensor=2", "model/feed_forward=plain", "model.dims.mlp=800", "model.feed_forward.activation=silu"
    )
    own = settings("sharding=fsdp_tensor", "mesh.tensor=2", "+sharding.axes.wide=[tensor]")
    own = dataclasses.replace(own, model=dataclasses.replace(own.model, feed_forward=WideConfig(wide=800)))
    assert parts(own)[0].activations == pytest.approx(parts(known)[0].activations, rel=0.05)


def test_microbatches_keep_less_and_a_second_gradient():
    config = settings("remat=none")
    whole, program, layout = parts(config)
    split = memory_by_part(dataclasses.replace(config, train=dataclasses.replace(config.train, microbatch_size=8)), program, layout)
    assert (split.activations, split.gradients) == (whole.activations // 2, 2 * whole.gradients)


@pytest.mark.parametrize(
    ("message", "needs", "may"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (132.50G)"
            " exceeds available HBM (15.75G).",
            132.5,
            15.75,
        ),
        ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: the program requires (116.43G) exceeds available HBM (30.75G)", 116.43, 30.75),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 35.20G of 30.75G hbm. Exceeded by 4.45G", 35.2, 30.75),
        ("RESOURCE_EXHAUSTED: Used 512.0M of 256.0M", 0.5, 0.25),
    ],
)
def test_what_the_compiler_says(message, needs, may):
    error = too_big(message + "\nmore")
    assert (error.needs, error.may) == (int(needs * 2**30), int(may * 2**30))
    assert str(error) == message


def test_a_message_without_numbers():
    error = too_big("RESOURCE_EXHAUSTED: no idea")
    assert (error.needs, error.may) == (None, None)


def test_an_error_of_the_compilers_own_is_answered():
    with (
        pytest.raises(ConfigError, match=r"internal error: INTERNAL: RET_CHECK failure \(x.cc:1\) a == b\n") as error,
        compiling._refused(),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure (x.cc:1) a == b \nmore")
    assert "train.microbatch_size=null" in error.value.next


def test_a_program_that_jax_cannot_read(monkeypatch):
    """What jaxlib 0.10.2 says of programs by libtpu 0.0.52 with asynchronous collectives of several arrays."""

    class Compiled:
        def as_text(self):
            raise jax.errors.JaxRuntimeError(
                "INTERNAL: RET_CHECK failure: async-update instruction should have 1 operands but sees 3\nat …"
            )

    monkeypatch.setattr("importlib.metadata.version", {"libtpu": "0.0.52"}.__getitem__)
    with pytest.raises(UserError) as found:
        program_text(Compiled())
    assert "sees 3\nwhere: jax" in str(found.value)
    assert "libtpu 0.0.52" in str(found.value)
    assert f"jax[tpu]=={jax.__version__}" in str(found.value)
