"""Twenty steps of training against a plain loop of PyTorch, `transformers` and torch.optim.AdamW."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from llama_eqx import build_model, load_config, save_pretrained
from llama_eqx.batch import Batch
from llama_eqx.model.kernel import KernelConfig
from llama_eqx.precision import PrecisionConfig
from llama_eqx.sharding import MESH_AXES, Layout
from llama_eqx.training.loss import policy_view
from llama_eqx.training.state import TrainState
from llama_eqx.training.step import make_step

STEPS, SIZE, LENGTH = 20, 8, 24


@pytest.fixture(scope="module")
def config():
    sizes = {"vocab": 64, "layers": 3, "embed": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 48}
    return load_config(*(f"model.dims.{axis}={n}" for axis, n in sizes.items()), "schedule.warmup_steps=5", "schedule.peak=1e-2")


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).integers(0, 64, (STEPS, SIZE, LENGTH + 1))


def our_losses(config, rows, *, remat="none", sharding="fsdp", mesh=(1, 1, 1, 1), kernel=None, unroll=1, microbatch_size=None):
    devices = jax.devices()[: math.prod(mesh)]
    layout = Layout(
        jax.make_mesh(mesh, MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices),
        load_config(*f"sharding={sharding}".split()).sharding,
    )
    view = policy_view(PrecisionConfig(params="float32", compute="float32"), load_config(f"remat={remat}").remat, layout, kernel, unroll)
    optimizer, loss = config.optimizer.build(), config.loss.build(view, layout)
    step = eqx.filter_jit(make_step(optimizer, lambda step: config.schedule.rate(step, STEPS), loss, layout, microbatch_size))
    model = build_model(config.model, key=jax.random.key(0))
    state = TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model))
    state = jax.device_put(state, layout.shardings(state))
    losses = []
    for batch in rows:
        tokens = jnp.asarray(batch, jnp.int32)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], jnp.ones((SIZE, LENGTH)))
        state, metrics = step((jax.device_put(batch, layout.shardings(batch)), jax.random.key(1)), state)
        losses.append(float(metrics["train/loss"]))
    return losses


@pytest.fixture(scope="module")
def ours(config, rows):
    return our_losses(config, rows)


@pytest.fixture(scope="module")
def theirs(config, rows, tmp_path_factory):
    import torch
    import transformers

    path = tmp_path_factory.mktemp("hf") / "model"
    save_pretrained(build_model(config.model, key=jax.random.key(0)), path, format="hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    settings = config.optimizer
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(settings.b1, settings.b2), eps=settings.eps)
    losses = []
    for step, batch in enumerate(rows):
        for group in optimizer.param_groups:
            group["lr"] = float(config.schedule.rate(jnp.asarray(step), STEPS))
        tokens = torch.tensor(batch)
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_curve_is_that_of_pytorch(ours, theirs):
    assert ours[-1] < ours[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize(
    "broken",
    [
        "optimizer.weight_decay=0",
        "model.rotary.theta=1e3",
        *(pytest.param(b, marks=pytest.mark.slow) for b in ("optimizer.b2=0.99", "optimizer.clip_norm=0.5", "schedule.final_fraction=1")),
    ],
)
def test_the_comparison_sees_what_is_broken(broken, config, rows, theirs):
    sizes = [f"model.dims.{axis}={n}" for axis, n in vars(config.model.dims).items()]
    changed = load_config(*sizes, "schedule.warmup_steps=5", "schedule.peak=1e-2", broken)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(our_losses(changed, rows), theirs, rtol=1e-4)


BLOCKED = KernelConfig(name="blocked", q_block=128, kv_block=128, fused_backward=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"remat": "full", "kernel": BLOCKED},
        {"remat": "dots_attention", "mesh": (1, 8, 1, 1), "kernel": BLOCKED},
        {"remat": "names", "mesh": (1, 4, 1, 1), "microbatch_size": 4},
        {"remat": "offload", "unroll": 3},
        *(pytest.param({"remat": name}, marks=pytest.mark.slow) for name in ("dots", "dots_attention", "names", "offload")),
    ],
    ids=lambda settings: "-".join(str(getattr(value, "name", value)) for value in settings.values()),
)
def test_policies_do_not_change_the_curve(settings, config, rows, ours):
    np.testing.assert_allclose(our_losses(config, rows, **settings), ours, rtol=1e-5)


@pytest.mark.parametrize(
    ("sharding", "mesh"),
    [
        ("ddp", (8, 1, 1, 1)),
        ("fsdp", (1, 8, 1, 1)),
        ("tensor", (2, 1, 1, 4)),  # with key heads that do not divide
        ("sequence", (1, 2, 2, 2)),
        ("fsdp_tensor +sharding.axes.residual=[tensor]", (2, 2, 1, 2)),
        pytest.param("fsdp_tensor", (2, 2, 1, 2), marks=pytest.mark.slow),
        pytest.param("sequence", (1, 2, 4, 1), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kernel", [pytest.param(None, marks=pytest.mark.slow), BLOCKED], ids=["plain", "blocked"])
def test_eight_devices_give_the_losses_of_one(kernel, sharding, mesh, config, rows, ours):
    np.testing.assert_allclose(our_losses(config, rows, sharding=sharding, mesh=mesh, kernel=kernel), ours, rtol=1e-5)
