"""A batch in microbatches is the batch at once: the same update, however unevenly the mask counts, and rows stay where they are."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from llama_eqx import build_model, load_config
from llama_eqx.batch import Batch
from llama_eqx.errors import ConfigError
from llama_eqx.precision import cast
from llama_eqx.sharding import MESH_AXES, Layout
from llama_eqx.training.loss import LossSums, policy_view
from llama_eqx.training.meters import METERS
from llama_eqx.training.program import jitted_step, make_program
from llama_eqx.training.state import TrainState
from llama_eqx.training.step import make_step, split

COMPILED = "/jax/core/compile/backend_compile_duration"


def layout(option, *shape):
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)
    return Layout(mesh, load_config(f"sharding={option}").sharding)


def batch(rows=16, seq=12):
    """The mask counts hardly anything in the first rows and everything in the last."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 64, (rows, seq + 1)), jnp.int32)
    mask = rng.random((rows, seq)) < np.linspace(0.05, 1, rows)[:, None]
    return Batch(tokens[:, :-1], tokens[:, 1:], jnp.asarray(mask, jnp.float32))


def update(where, model, microbatch_size, meters=()):
    config = load_config("optimizer.clip_norm=1e9")
    optimizer, view = config.optimizer.build(), policy_view(config.precision, config.remat, where)
    plain = config.loss.build(view, where)

    def loss(model, batch, key):
        objective, sums = plain(model, batch, key)
        return objective, sums._replace(terms={"targets": (batch.targets * batch.loss_mask).sum(), "draws": jax.random.uniform(key)})

    step = make_step(optimizer, lambda step: jnp.float32(0.1), loss, where, microbatch_size, meters=meters)
    state = TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model))
    state, rows = jax.device_put((state, batch()), (where.shardings(state), where.shardings(batch())))
    new, metrics = eqx.filter_jit(step)((rows, jax.random.key(0)), state)
    for leaf, sharding in zip(jax.tree.leaves(new), jax.tree.leaves(where.shardings(new)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    first_moment = new.opt_state[1][0].mu  # is 0.1 of the gradient
    return metrics, [np.asarray(leaf) for leaf in jax.tree.leaves(first_moment)]


@pytest.mark.parametrize(
    ("option", "shape", "microbatch_size"), [("fsdp", (1, 1, 1, 1), 2), ("fsdp", (2, 2, 1, 1), 8), ("fsdp_tensor", (1, 2, 1, 2), 4)]
)
def test_microbatches_add_up_to_the_batch(option, shape, microbatch_size, tiny):
    model = build_model(tiny(), key=jax.random.key(0))
    where = layout(option, *shape)
    metrics, gradient = update(where, model, microbatch_size)
    wanted_metrics, wanted = update(layout("fsdp", 1, 1, 1, 1), model, None)
    for name in ("train/loss", "train/targets", "optim/grad_norm"):
        np.testing.assert_allclose(metrics[name], wanted_metrics[name], rtol=1e-5)
    rows = batch()
    np.testing.assert_allclose(wanted_metrics["train/targets"], np.average(rows.targets, weights=rows.loss_mask), rtol=1e-5)
    for a, b in zip(gradient, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), number) for number in range(16 // microbatch_size)]
    np.testing.assert_allclose(metrics["train/draws"] * rows.loss_mask.sum(), sum(map(jax.random.uniform, keys)), rtol=1e-5)


def test_a_meter_may_give_several_numbers(tiny, monkeypatch):
    norms = lambda model, gradient, update: {"embed": jnp.linalg.norm(gradient.embed), "before": jnp.linalg.norm(model.embed)}  # noqa: E731
    monkeypatch.setitem(METERS, "norms", norms)
    model = build_model(tiny(), key=jax.random.key(0))
    metrics, gradient = update(layout("fsdp", 1, 1, 1, 1), model, None, ("norms", "update_norm"))
    assert {name for name in metrics if "norms" in name} == {"optim/norms/embed", "optim/norms/before"}
    np.testing.assert_allclose(metrics["optim/norms/before"], np.linalg.norm(model.embed), rtol=1e-5)
    np.testing.assert_allclose(metrics["optim/norms/embed"], 10 * np.linalg.norm(gradient[0]), rtol=1e-5)


@pytest.mark.parametrize("name", sorted(METERS))
def test_a_meter_measures_a_model_of_any_size(name):
    """The parameters of a large model are more than an int32 can count."""
    config = load_config("model=llama3_1_405b").model
    model = eqx.filter_eval_shape(lambda: config.build(key=jax.random.key(0)))
    assert eqx.filter_eval_shape(METERS[name], model, model, model).dtype == jnp.float32


@pytest.mark.parametrize(("option", "microbatch_size"), [("adamw", 8), ("lion", None)])
def test_a_state_keeps_its_dtypes_and_the_step_is_compiled_once(option, microbatch_size, tiny):
    """Also in bfloat16, whose gradients are float32 where microbatches add up. Without a target that counts, a batch changes nothing."""
    compiled, where = [], layout("fsdp", 1, 4, 1, 1)
    config = load_config("precision.params=bfloat16", "precision.compute=bfloat16", f"optimizer={option}", "optimizer.weight_decay=0")
    optimizer, view = config.optimizer.build(), policy_view(config.precision, config.remat, where)
    step = make_step(optimizer, lambda step: jnp.float32(0.1), config.loss.build(view, where), where, microbatch_size)
    model = cast(build_model(tiny(), key=jax.random.key(0)), "bfloat16")
    state = TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model))
    empty = eqx.tree_at(lambda b: b.loss_mask, batch(), jnp.zeros((16, 12)))
    state, rows, empty = jax.device_put((state, batch(), empty), (where.shardings(state), *2 * (where.shardings(batch()),)))
    before, run, key = state, eqx.filter_jit(step), jax.device_put(jax.random.key(0), where.sharding((), ()))
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, fun_name="", **__: compiled.append((event, fun_name)))
    unchanged, metrics = run((empty, key), state)
    assert jnp.isnan(metrics["train/loss"])
    assert metrics["optim/withheld"] == 1
    assert unchanged.step == 1
    kept = zip(*(jax.tree.leaves((each.model, each.opt_state)) for each in (unchanged, before)), strict=True)
    assert all((a == b).all() for a, b in kept)
    state = unchanged
    for _ in range(2):
        state, metrics = run((rows, key), state)
        for new, old in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
            assert (new.dtype, new.sharding.is_equivalent_to(old.sharding, new.ndim)) == (old.dtype, True)
    assert metrics["optim/withheld"] == 0
    assert {metric.dtype.name for metric in metrics.values()} == {"float32"}
    assert compiled.count((COMPILED, "jit(step)")) == 1


def test_every_row_is_in_one_microbatch_and_on_its_own_device():
    where, rows = layout("fsdp", 2, 4, 1, 1), batch(rows=32)
    shardings = where.shardings(rows)
    compiled = jax.jit(lambda rows: split(rows, 16, where), in_shardings=(shardings,)).lower(rows).compile()
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
    parts = compiled(jax.device_put(rows, shardings))
    assert parts.tokens.shape == (2, 16, 12)
    flat = np.asarray(parts.tokens).reshape(32, 12)
    assert sorted(map(tuple, flat.tolist())) == sorted(map(tuple, np.asarray(rows.tokens).tolist()))
    np.testing.assert_array_equal(np.asarray(parts.tokens)[:, :2], np.asarray(rows.tokens)[:4].reshape(2, 2, 12))


@pytest.mark.parametrize(("microbatch_size", "said"), [(5, "4, 8, 16"), (6, "4, 8, 16"), (2, "4, 8, 16")])
def test_microbatches_that_do_not_divide_are_refused(microbatch_size, said):
    with pytest.raises(ConfigError) as error:
        split(batch(), microbatch_size, layout("fsdp", 2, 2, 1, 1))
    assert said in error.value.next


def test_the_host_is_back_before_the_device_is_done():
    """Else the device would wait in every step for the host's next call."""
    sizes = ["model.dims.vocab=4096", "train.batch_size=8", "train.seq_len=128"]
    config = load_config(*sizes)
    where = Layout(config.mesh.build(), config.sharding)
    program = make_program(config, where)
    step, key = jitted_step(program, config), jax.random.key(0)
    state = jax.jit(program.initial, out_shardings=program.shardings)(key)
    rows = jnp.zeros((8, 128), jnp.int32)
    rows = jax.device_put(Batch(rows, rows, jnp.ones((8, 128))), where.sharding(("batch", "seq"), rows.shape))
    state, metrics = step((rows, key), state)  # compiles
    jax.block_until_ready((state, metrics))
    _, metrics = step((rows, key), state)
    assert not metrics["train/loss"].is_ready()


def test_a_step_in_bfloat16_is_that_of_pytorch_in_float32_rounded(tiny):
    """In bfloat16, 0.99 is 0.9883 while 0.01 is 0.01, and the norm loses what small arrays add to a large sum."""
    import torch

    where, settings = layout("fsdp", 1, 1, 1, 1), ("optimizer.b2=0.99", "optimizer.weight_decay=0")
    optimizer = load_config(*settings).optimizer.build()

    @jax.jit
    def gradient(model, key):
        sizes = [(2 if leaf is model.embed else 0.12) / leaf.size**0.5 for leaf in jax.tree.leaves(model)]
        return [size * jax.random.normal(key, leaf.shape, leaf.dtype) for leaf, size in zip(jax.tree.leaves(model), sizes, strict=True)]

    def loss(model, batch, key):
        terms = [(leaf * g).astype(jnp.float32).sum() for leaf, g in zip(jax.tree.leaves(model), gradient(model, key), strict=True)]
        return sum(terms), LossSums(jnp.float32(0), jnp.float32(1))

    model, key = cast(build_model(tiny(), key=jax.random.key(0)), "bfloat16"), jax.random.key(1)
    state, rows = TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model)), batch()
    step = jax.jit(make_step(optimizer, lambda _: 0.01, loss, where))
    theirs = [torch.nn.Parameter(torch.tensor(np.asarray(leaf, "float32"))) for leaf in jax.tree.leaves(model)]
    adamw = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0)
    for number in range(200):
        for parameter, g in zip(theirs, gradient(model, jax.random.fold_in(key, number)), strict=True):
            parameter.grad = torch.tensor(np.asarray(g, "float32"))
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        adamw.step()
        state, _ = step((rows, key), state)
    for ours, parameter in zip(jax.tree.leaves(state.opt_state[1][0].nu), theirs, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(ours, "float32").mean(), adamw.state[parameter]["exp_avg_sq"].mean(), rtol=0.03)
