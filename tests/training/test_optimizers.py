"""Every optimizer in conf/ keeps one contract, and does what PyTorch's, or a few lines of numpy, do."""

import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from llama_eqx import build_model, load_config
from llama_eqx.errors import ConfigError
from llama_eqx.sharding import MESH_AXES, Layout, axis_names, parameter_names
from llama_eqx.training.optimizer import Matrix, matrix
from llama_eqx.training.state import init_state

OPTIONS = sorted(path.stem for path in (pathlib.Path(__file__).parents[2] / "conf" / "optimizer").glob("*.yaml"))


@pytest.fixture(scope="module")
def model(tiny):
    return build_model(tiny("model.tied=false"), key=jax.random.key(0))


def optimizer(option, *overrides):
    return load_config(f"optimizer={option}", "optimizer.clip_norm=1e9", *overrides).optimizer.build()


def random_gradients(model, steps):
    leaves, structure = jax.tree.flatten(model)
    rng = np.random.default_rng(0)
    return [structure.unflatten([jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32) for leaf in leaves]) for _ in range(steps)]


def trained(tx, model, gradients, rate):
    """The parameters after one step per gradient."""

    @jax.jit
    def step(model, state, gradient):
        direction, state = tx.update(gradient, state, model)
        return jax.tree.map(lambda p, d: p - rate * d, model, direction), state

    state = tx.init(model)
    for gradient in gradients:
        model, state = step(model, state, gradient)
    return model


def assert_same(found, wanted, rtol=2e-4):
    for name, a, b in zip(parameter_names(found), jax.tree.leaves(found), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_quadratic_is_minimised(option, model):
    """Twice as far from 0 than at the start, every parameter comes back, and no state is ever not finite."""
    tx, start = optimizer(option, "optimizer.weight_decay=0"), jax.tree.map(lambda leaf: leaf + 0.1, model)

    @jax.jit
    def run(model):
        def step(carry, i):
            model, state = carry
            direction, state = tx.update(model, state, model)
            return (jax.tree.map(lambda p, d: p - 0.02 * (1 - i / 100) * d, model, direction), state), None

        (model, state), _ = jax.lax.scan(step, (model, tx.init(model)), jnp.arange(100))
        return model, state

    end, state = run(start)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((end, state)))
    assert optax.tree.norm(end) < 0.7 * optax.tree.norm(start)


@pytest.mark.parametrize("option", OPTIONS)
def test_matrices_decay_and_norms_do_not(option, model):
    tx = optimizer(option, "optimizer.weight_decay=0.25")
    direction, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, model), tx.init(model), model)
    for name, axes, d, p in zip(parameter_names(model), axis_names(model), jax.tree.leaves(direction), jax.tree.leaves(model), strict=True):
        decays = len([axis for axis in axes if axis != "layers"]) > 1
        np.testing.assert_allclose(d, 0.25 * p if decays else jnp.zeros_like(p), atol=1e-7, err_msg=name)


@pytest.mark.parametrize("option", OPTIONS)
def test_state_lives_where_its_parameter_does(option, tiny):
    mesh = jax.make_mesh((2, 2, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    layout = Layout(mesh, load_config("sharding=fsdp_tensor").sharding)
    tx, precision, guard = optimizer(option), load_config().precision, load_config().guard
    state = eqx.filter_eval_shape(lambda key: init_state(tiny(), tx, precision, guard, key), jax.random.key(0))
    shardings = layout.shardings(state)
    specs = dict(zip(parameter_names(state.model), jax.tree.leaves(shardings.model), strict=True))
    shapes = dict(zip(parameter_names(state.model), jax.tree.leaves(state.model), strict=True))
    large, split = 0, 0
    for path, leaf, found in zip(
        parameter_names(state.opt_state), jax.tree.leaves(state.opt_state), jax.tree.leaves(shardings.opt_state), strict=True
    ):
        name = next((name for name in specs if path.endswith(name)), None)
        if name and leaf.shape == shapes[name].shape:
            assert found.spec == specs[name].spec, path
        else:
            assert found.spec == P(*(None,) * leaf.ndim), path
        large += leaf.size > 1000
        split += leaf.size > 1000 and any(found.spec)
    assert split == large


@pytest.mark.parametrize(
    ("axes", "wanted"),
    [
        (("layers", "embed", "mlp"), Matrix((1,), (2,))),
        (("layers", "embed", "heads", "head_dim"), Matrix((1,), (2, 3))),
        (("layers", "heads", "head_dim", "embed"), Matrix((1, 2), (3,))),
        (("vocab", "embed"), Matrix((0,), (1,))),
        (("layers", "embed"), Matrix((1,), ())),
        (("layers", "heads", "head_dim"), Matrix((1, 2), ())),  # a bias of the queries
        (("layers",), Matrix((), ())),  # a scalar in every layer
        (("layers", "experts", "embed", "mlp"), Matrix((2,), (3,))),
    ],
)
def test_a_matrix_is_read_from_names(axes, wanted):
    assert matrix(axes) == wanted


@pytest.mark.parametrize("clip_norm", ["0", "-1"])
def test_no_gradient_is_clipped_to_nothing(clip_norm):
    with pytest.raises(ConfigError, match="leaves nothing of a gradient"):
        load_config(f"optimizer.clip_norm={clip_norm}")


@pytest.mark.parametrize("zero", ["optimizer.eps=0", "optimizer=muon optimizer.eps=0", "optimizer=adafactor optimizer.clip=0"])
def test_no_update_is_zero_by_zero(zero):
    """As it would be for a token that has not occurred."""
    with pytest.raises(ConfigError, match=r"0\.0 is not at least 1e-37"):
        load_config(*zero.split())


def test_gradients_need_not_be_clipped(model):
    direction = [load_config("optimizer=lion", f"optimizer.clip_norm={norm}").optimizer.build() for norm in ("null", "1e9")]
    gradient = jax.tree.map(lambda leaf: 1e3 * leaf, model)
    free, clipped = (each.update(gradient, each.init(model), model)[0] for each in direction)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), free, clipped))


def as_pytorch(model):
    """A torch parameter for every matrix and vector, those of a stack one by one, with the way back."""
    import torch

    parameters = []
    for axes, leaf in zip(axis_names(model), jax.tree.leaves(model), strict=True):
        shape = matrix(tuple(axis for axis in axes if axis != "layers"))
        layers = np.asarray(leaf) if "layers" in axes else np.asarray(leaf)[None]
        rows = int(np.prod([layers.shape[1:][i] for i in shape.rows]))
        parameters.append([torch.nn.Parameter(torch.tensor(x.reshape(rows, -1) if shape.columns else x)) for x in layers])
    return parameters


def back(parameters, model):
    return [
        np.stack([p.detach().numpy() for p in layers]).reshape(leaf.shape)
        for layers, leaf in zip(parameters, jax.tree.leaves(model), strict=True)
    ]


@pytest.mark.parametrize("option", ["adamw", "adafactor"])
def test_against_pytorch(option, model):
    import torch

    settings = [] if option == "adamw" else ["optimizer.min_scale=0.16"]  # some matrices are smaller
    ours, settings = optimizer(option, *settings), load_config(f"optimizer={option}", *settings).optimizer
    gradients, parameters, rate = random_gradients(model, 4), as_pytorch(model), 1e-2
    flat = [p for layers in parameters for p in layers]
    groups = [
        {"params": [p for p in flat if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in flat if p.ndim == 1], "weight_decay": 0.0},
    ]
    if option == "adamw":
        theirs = torch.optim.AdamW(groups, lr=rate, betas=(settings.b1, settings.b2), eps=settings.eps)
    else:
        theirs = torch.optim.Adafactor(groups, lr=rate, beta2_decay=-settings.decay, eps=(1e-15, settings.min_scale), d=settings.clip)
    for gradient in gradients:
        for p, g in zip(flat, (g for layers in as_pytorch(gradient_like(gradient, model)) for g in layers), strict=True):
            p.grad = g.detach()
        theirs.step()
    assert_same(trained(ours, model, gradients, rate), back(parameters, model))


def gradient_like(gradient, model):
    return jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(gradient))


def test_lion_in_numpy(model):
    settings, gradients = load_config("optimizer=lion").optimizer, random_gradients(model, 4)
    wanted = []
    for axes, p, *gs in zip(axis_names(model), jax.tree.leaves(model), *map(jax.tree.leaves, gradients), strict=True):
        p, m = np.asarray(p), np.zeros(p.shape, np.float32)
        decay = settings.weight_decay if len(set(axes) - {"layers"}) > 1 else 0
        for g in map(np.asarray, gs):
            p = p - 1e-2 * (np.sign(settings.b1 * m + (1 - settings.b1) * g) + decay * p)
            m = settings.b2 * m + (1 - settings.b2) * g
        wanted.append(p)
    assert_same(trained(optimizer("lion"), model, gradients, 1e-2), wanted)


def orthogonalised(x):
    """Newton–Schulz with the coefficients of Jordan's Muon."""
    flip = x.shape[0] > x.shape[1]
    x = (x.T if flip else x) / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if flip else x


def test_muon_in_numpy(model):
    """Each layer's matrices alone, heads and head_dim as one axis; tables and norms as AdamW has them."""
    settings, gradients, rate = load_config("optimizer=muon").optimizer, random_gradients(model, 3), 1e-2
    adam = trained(optimizer("adamw", "optimizer.b1=0.9", "optimizer.b2=0.95", "optimizer.eps=0.1"), model, gradients, rate)
    found = trained(optimizer("muon", "optimizer.eps=0.1"), model, gradients, rate)
    seen, beta = 0, settings.momentum
    for name, start, ours, others, *gs in zip(parameter_names(model), *map(jax.tree.leaves, (model, found, adam, *gradients)), strict=True):
        if not name.startswith("blocks") or "norm" in name:
            np.testing.assert_allclose(ours, others, rtol=1e-5, atol=1e-7, err_msg=name)
            continue
        seen += 1
        inputs = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 2}.get(name.split(".")[-1], 1)  # how many axes after "layers"
        for layer in range(start.shape[0]):
            rows = int(np.prod(start.shape[1 : 1 + inputs]))
            p, m = np.asarray(start[layer]).reshape(rows, -1), 0.0
            for t, g in enumerate((np.asarray(g[layer]).reshape(rows, -1) for g in gs), start=1):
                m = beta * m + (1 - beta) * g
                nesterov = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
                p = p - rate * (0.2 * np.sqrt(max(p.shape)) * orthogonalised(nesterov) + settings.weight_decay * p)
            np.testing.assert_allclose(np.asarray(ours[layer]).reshape(rows, -1), p, rtol=2e-3, atol=2e-5, err_msg=name)
        singular = np.linalg.svd(orthogonalised(nesterov), compute_uv=False)
        assert singular.min() > 0.3
        assert singular.max() < 1.5
    assert seen == 7
