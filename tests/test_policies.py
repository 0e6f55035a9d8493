"""Precision, FLOPs, schedules and decay: what is done to a tree from outside."""

import dataclasses
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jaxtyping import Array, Float

from llama_eqx import build_model, load_config
from llama_eqx.flops import flops_per_token, mfu
from llama_eqx.model.llama import Llama
from llama_eqx.precision import PrecisionConfig, cast
from llama_eqx.remat import RematConfig
from llama_eqx.sharding import MESH_AXES, Layout, Rules
from llama_eqx.training.loss import policy_view

MIXED = PrecisionConfig(params="float32", compute="bfloat16")


def test_gradients_of_mixed_precision_are_float32_and_near(tiny):
    model = build_model(tiny("model.tied=true"), key=jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 16)), jnp.int32)
    loss = lambda model: jnp.mean(jax.nn.log_softmax(model(tokens))[..., 3])  # noqa: E731
    mesh = jax.make_mesh((1, 1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:1])
    view = policy_view(MIXED, RematConfig(policy="none"), Layout(mesh, Rules(axes={})))
    exact, mixed = (jax.jit(jax.grad(f))(model) for f in (loss, lambda model: loss(view(model))))
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(mixed), strict=True):
        assert b.dtype == jnp.float32
        assert float(jnp.linalg.norm(a - b)) < 0.05 * float(jnp.linalg.norm(a))


@pytest.mark.parametrize(("params", "compute"), [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_gradients_of_the_table_add_up_in_float32(params, compute, tiny):
    """4,096 equal gradients of 1 on one row: in bfloat16 the sum would stop at 256."""
    model = cast(build_model(tiny(), key=jax.random.key(0)), params)
    tokens, policy = jnp.zeros((1, 4096), jnp.int32), PrecisionConfig(params=params, compute=compute)
    gradient = jax.grad(lambda model: jnp.sum(policy.apply(model).embed[tokens].astype(jnp.float32)))(model)
    np.testing.assert_array_equal(gradient.embed[0], 4096)


class Both(Llama):
    """A model of one's own, with a second head."""

    second: Float[Array, "embed vocab"]


def test_what_a_model_of_ones_own_adds_is_under_the_policies_too(tiny):
    plain = build_model(tiny(), key=jax.random.key(0))
    model = Both(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}, second=plain.embed.T)
    assert MIXED.apply(model).second.dtype == MIXED.apply(model).final_norm.weight.dtype == jnp.bfloat16
    mesh = jax.make_mesh((1, 4, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:4])
    layout = Layout(mesh, load_config("sharding=fsdp").sharding)
    model = jax.device_put(model, layout.shardings(model))
    assert not model.second.sharding.is_fully_replicated
    assert jax.jit(layout.gathered)(model).second.sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("preset", "seq_len", "causal", "palm"),
    [("llama3_8b", 8192, 51.5e9, 57.9e9)],
)
def test_flops_of_a_published_size(preset, seq_len, causal, palm):
    config = load_config(f"model={preset}").model
    model = eqx.filter_eval_shape(lambda key: config.build(key=key), jax.random.key(0))
    assert flops_per_token(model, seq_len) == (pytest.approx(causal, rel=2e-3), pytest.approx(palm, rel=2e-3))


def test_a_tied_table_counts_as_the_head(tiny):
    def flops(tied):
        config = tiny(f"model.tied={tied}")
        return flops_per_token(eqx.filter_eval_shape(lambda key: config.build(key=key), jax.random.key(0)), 8)

    assert flops("true") == flops("false")


def test_mfu_only_where_the_peak_is_known():
    assert mfu(1000.0, 10**9, "TPU v4", 4) == pytest.approx(1e12 / 1.1e15)
    assert mfu(1000.0, 10**9, "cpu", 1) is None


def test_schedules_are_those_of_pytorch_and_transformers():
    """Theirs warm up from the step before our first. Their wsd has a linear fall and a 1-sqrt one; ours ends where theirs would at the step
    after the last.
    """
    import torch
    import transformers

    warmup = {"num_warmup_steps": 10}
    wsd = {"num_stable_steps": 60, "num_decay_steps": 20, "decay_type": "1-sqrt", "min_lr_ratio": 0.1}
    schedules = torch.optim.lr_scheduler
    for option, warmed, course in (
        ("cosine schedule.final_fraction=0.1", 0, lambda sgd: schedules.CosineAnnealingLR(sgd, T_max=90, eta_min=1e-4)),
        ("linear schedule.final_fraction=0.2", 0, lambda sgd: schedules.LinearLR(sgd, start_factor=1.0, end_factor=0.2, total_iters=90)),
        ("inverse_sqrt", 10, lambda sgd: transformers.get_inverse_sqrt_schedule(sgd, **warmup)),
        (
            "wsd schedule.decay_fraction=0.25 schedule.final_fraction=0.1",
            10,
            lambda sgd: transformers.get_wsd_schedule(sgd, **warmup, **wsd),
        ),
    ):
        config = load_config("schedule.peak=1e-3", "schedule.warmup_steps=10", *f"schedule={option}".split()).schedule
        sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        theirs, last = course(sgd), 90 if option.startswith("wsd") else 100
        for step in range(10 - warmed, last):
            if step >= 10:
                assert float(config.rate(jnp.asarray(step), last)) == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-4), (option, step)
            sgd.step()
            theirs.step()


@pytest.mark.parametrize("option", sorted(path.stem for path in (pathlib.Path(__file__).parents[1] / "conf" / "schedule").glob("*.yaml")))
def test_every_schedule_warms_up_and_stays_below_its_peak(option):
    config = load_config(f"schedule={option}", "schedule.peak=0.5", "schedule.warmup_steps=10").schedule
    rates = np.array([config.rate(jnp.asarray(step), 50) for step in range(50)])
    assert np.isfinite(rates).all()
    assert (rates > 0).all()
    np.testing.assert_allclose(rates[:10], 0.5 * np.arange(1, 11) / 10, rtol=1e-6)
    assert rates.max() == np.float32(0.5)
