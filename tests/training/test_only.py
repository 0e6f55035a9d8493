"""`train.only`: the named parameters learn, and nothing is computed or kept for the others."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_eqx import load_config
from llama_eqx.batch import Batch
from llama_eqx.errors import ConfigError
from llama_eqx.planning.memory import memory_by_part
from llama_eqx.sharding import Layout, parameter_names
from llama_eqx.training.program import make_program

SIZES = {"vocab": 64, "layers": 3, "embed": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 48}
TINY = (
    *(f"model.dims.{axis}={size}" for axis, size in SIZES.items()),
    "train.seq_len=12",
    "train.batch_size=16",
    "schedule=constant",
    "schedule.warmup_steps=1",
)
KEY = jax.random.key(0)


def build(*overrides):
    config = load_config(*TINY, *overrides)
    layout = Layout(config.mesh.build(), config.sharding)
    return config, layout, make_program(config, layout)


def batch(rows=16, seq=12):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (rows, seq + 1)), jnp.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], jnp.ones((rows, seq), jnp.float32))


def stepped(program, layout):
    state, rows = program.initial(KEY), batch()
    state, rows = jax.device_put((state, rows), (layout.shardings(state), layout.shardings(rows)))
    new, metrics = eqx.filter_jit(program.step)((rows, KEY), state)
    named = lambda state: dict(zip(parameter_names(state.model), map(np.asarray, jax.tree.leaves(state.model)), strict=True))  # noqa: E731
    return named(state), named(new), new, metrics


@pytest.mark.parametrize("settings", ["mesh=cpu-8 train.microbatch_size=8", "mesh=cpu-8 sharding=fsdp_tensor mesh.tensor=2"])
def test_the_step_is_that_of_the_named_parameters_alone(settings):
    """Against optax's own AdamW, with its clipping and decay, on a loss of these parameters."""
    _, layout, program = build(
        "train.only=[q_proj,down_proj,final_norm.weight]",
        "schedule.peak=0.03",
        "optimizer.clip_norm=0.1",
        "optimizer.eps=1e-3",
        *settings.split(),
    )
    before, after, state, metrics = stepped(program, layout)
    learned = [name for name in before if name.endswith(("q_proj", "down_proj")) or name == "final_norm.weight"]
    assert len(learned) == 3

    model = program.initial(KEY).model
    names, leaves, tree = parameter_names(model), jax.tree.leaves(model), jax.tree.structure(model)

    def loss(some):
        whole = jax.tree.unflatten(tree, [some.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)])
        return program.loss(whole, batch(), None)[0] / batch().loss_mask.sum()

    some = {name: before[name] for name in learned}
    gradient = jax.grad(loss)(some)
    assert float(metrics["optim/grad_norm"]) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)
    matrix = {name: name != "final_norm.weight" for name in some}
    adamw = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.03, 0.9, 0.95, 1e-3, weight_decay=0.1, mask=matrix))
    update, _ = adamw.update(gradient, adamw.init(some), some)
    for name, leaf in after.items():
        if name in learned:
            np.testing.assert_allclose(leaf, some[name] + update[name], atol=2e-5, err_msg=name)
            assert not np.array_equal(leaf, before[name])
        else:
            np.testing.assert_array_equal(leaf, before[name], err_msg=name)
    kept = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert kept == 2 * sum(before[name].size for name in learned)


@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_any_optimizer(optimizer):
    _, layout, program = build(f"optimizer={optimizer}", "train.only=[blocks.attention.v_proj,embed,attn_norm.weight]", "mesh=cpu-8")
    before, after, *_ = stepped(program, layout)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {"blocks.attention.v_proj", "embed", "blocks.attn_norm.weight"}


def test_no_gradient_of_the_others_is_computed():
    """The gradient of a matrix is a third of its products."""

    def flops(*overrides):
        program = build("mesh=cpu-8", *overrides)[2]
        compiled = jax.jit(program.step).lower((batch(), KEY), program.shapes).compile()
        return compiled.cost_analysis()["flops"]

    assert flops("train.only=[final_norm.weight]") < 0.75 * flops()


def test_microbatches_add_up_no_gradient_of_the_others():
    config = load_config(*TINY, "model.dims.mlp=2048", "train.microbatch_size=8", "train.only=[final_norm.weight]")
    program = make_program(config, Layout(config.mesh.build(jax.devices()[:1]), config.sharding))
    compiled = jax.jit(program.step).lower((batch(), KEY), program.shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < sum(4 * leaf.size for leaf in jax.tree.leaves(program.shapes.model))


def test_the_plan_counts_gradients_and_state_of_the_named_alone():
    whole, part = (memory_by_part(*(found := build("mesh=cpu-8", *more))[:1], found[2], found[1]) for more in ((), ("train.only=[embed]",)))
    assert part.parameters == whole.parameters
    assert part.copies <= whole.copies
    assert part.gradients == 64 * 32 * 4 // 8 < whole.gradients
    assert 2 * part.gradients <= part.optimizer <= 2 * part.gradients + 64 < whole.optimizer


def test_what_names_nothing_is_refused():
    with pytest.raises(ConfigError, match="the model has no parameter qproj") as error:
        build("train.only=[embed,qproj]")
    assert (error.value.where, error.value.next) == ("train.only", "did you mean q_proj?")
    with pytest.raises(ConfigError, match="then nothing learns"):
        load_config(*TINY, "train.only=[]")
