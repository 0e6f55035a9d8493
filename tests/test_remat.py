"""What each rematerialisation policy keeps of a block, counted in what the backward pass is given."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from llama_eqx import load_config
from llama_eqx.batch import Batch
from llama_eqx.errors import ConfigError
from llama_eqx.remat import NAMES
from llama_eqx.sharding import MESH_AXES, Layout, Rules
from llama_eqx.training.loss import policy_view

BATCH, SEQ, LAYERS = 2, 128, 3
SIZES = {"vocab": 64, "layers": LAYERS, "embed": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 48}


def program(*overrides, unroll=1):
    """The loss as a function of model and batch, and what to call it with, abstract."""
    config = load_config(*(f"model.dims.{axis}={n}" for axis, n in SIZES.items()), *overrides)
    mesh = jax.make_mesh((1, 1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:1])
    layout = Layout(mesh, Rules(axes={}))
    loss = config.loss.build(policy_view(config.precision, config.remat, layout, config.kernel, unroll), layout)
    model = eqx.filter_eval_shape(lambda key: config.model.build(key=key), jax.random.key(0))
    ids, weights = jax.ShapeDtypeStruct((BATCH, SEQ), jnp.int32), jax.ShapeDtypeStruct((BATCH, SEQ), jnp.float32)
    return (lambda model, ids, weights: loss(model, Batch(ids, ids, weights), None)[0]), (model, ids, weights)


def kept(*overrides):
    """Numbers per token and layer that wait for the backward pass, beyond those with no name kept."""

    def count(*overrides):
        loss, inputs = program(*overrides)
        backward = jax.eval_shape(lambda model, *rest: jax.vjp(lambda model: loss(model, *rest), model)[1], *inputs)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    return (count(*overrides) - count("remat=names", "remat.names=[]")) / (BATCH * SEQ * LAYERS)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("input", 0), ("q", 32), ("k", 16), ("v", 16), ("attention", 32), ("attention_out", 32), ("residual", 32), ("gate", 48), ("up", 48)],
)
def test_a_name_keeps_what_it_names(name, numbers):
    """The residual that enters a block is kept in any case; the result of `down` goes into it and nowhere else."""
    assert kept("remat=names", f"remat.names=[{name}]") == numbers


def test_a_kernel_keeps_its_output_and_the_logarithms_of_its_sums():
    assert kept("remat=names", "remat.names=[attention]", "kernel.name=blocked") == 32 + 4
    assert kept("remat=dots_attention", "kernel.name=blocked") == kept("remat=dots", "kernel.name=blocked") + 32 + 4


def test_full_keeps_least_and_none_most():
    full, dots, none = (kept(f"remat={name}") for name in ("full", "dots", "none"))
    assert full == 0
    assert dots == 32 + 16 + 16 + 32 + 48 + 48  # q k v, attention_out, gate, up
    assert none > 2 * dots


def test_full_takes_less_memory_than_none():
    def temporary(remat):
        loss, inputs = program(f"remat={remat}")
        return jax.jit(jax.grad(loss)).lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    jax.config.update("jax_disable_most_optimizations", False)
    try:
        assert temporary("full") < 0.75 * temporary("none")
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.parametrize(("unroll", "barriers"), [(1, False), (LAYERS, True)])
def test_without_a_loop_the_compiler_is_kept_from_undoing_it(unroll, barriers):
    """Where forward and backward are not in two loops it would find what is computed twice. (A CPU's does so all the same.)"""
    loss, inputs = program("remat=full", unroll=unroll)
    assert ("optimization_barrier" in jax.jit(jax.grad(loss)).lower(*inputs).as_text()) == barriers


def test_offloaded_activations_leave_the_device():
    def moves(remat):
        loss, inputs = program(remat)
        return "MemorySpace.Host" in str(jax.make_jaxpr(jax.grad(loss))(*inputs))

    assert moves("remat=offload")
    assert not moves("remat=names")


def test_names_that_do_not_exist_are_refused():
    assert {"q", "k", "v", "attention"} < set(NAMES)
    with pytest.raises(ConfigError, match="did you mean gate"):
        load_config("remat=names", "remat.names=[gat]")
    with pytest.raises(ConfigError, match="kept and offloaded: q"):
        load_config("remat=offload", "remat.offloaded=[q]", "remat.names=[q,k]")
