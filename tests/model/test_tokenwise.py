"""What is computed as one row of tokens on a CPU is what is computed in rows."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from llama_eqx import load_config
from llama_eqx.model.init import named
from llama_eqx.model.kernel.tokenwise import ONE_ROW
from llama_eqx.sharding import Layout
from llama_eqx.tag import setting
from llama_eqx.tracing import trace
from llama_eqx.training.loss import policy_view

SMALL = ["model.dims.vocab=64", "model.dims.layers=2", "model.dims.embed=32", "model.dims.mlp=48", "model.dims.head_dim=8"]


def products(jaxpr):
    """The numbers of axes of all factors of a program's matrix products, its inner programs' too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield max(len(factor.aval.shape) for factor in equation.invars)
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


def traced(feed_forward, devices):
    """The products of a feed-forward alone, in a model as the loss sees it on so many devices."""
    config = load_config("model=llama3_1m", f"model/feed_forward={feed_forward}", *SMALL)
    model = config.model.build(key=named(jax.random.key(0), "init"))
    layout = Layout(config.mesh.build(jax.devices()[:devices]), config.sharding)
    seen = policy_view(config.precision, config.remat, layout, config.kernel)(model)
    layer = jax.tree.map(lambda leaf: leaf[0], model.blocks.feed_forward)
    x = jnp.zeros((8, 16, 32))
    call = seen.blocks.wrap(lambda layer, x, *_: (layer(x), None))
    return list(products(jax.make_jaxpr(lambda x: call(layer, x, None, None, None, None)[0])(x).jaxpr))


@pytest.mark.parametrize("feed_forward", ["plain", "gated"])
def test_a_cpu_multiplies_matrices(feed_forward):
    assert set(traced(feed_forward, 1)) == {2}
    assert set(traced(feed_forward, 2)) == {3}


@pytest.mark.parametrize("feed_forward", ["plain", "gated"])
def test_one_row_is_rows(feed_forward):
    config = load_config("model=llama3_1m", f"model/feed_forward={feed_forward}", *SMALL)
    model = config.model.build(key=named(jax.random.key(0), "init"))
    tokens = jax.random.randint(jax.random.key(1), (3, 16), 0, 64)

    def loss(model, holds):
        with setting(ONE_ROW, holds):
            return jnp.square(model.hidden(tokens)[0]).sum() + jnp.square(model(tokens)[0]).mean()

    (row, row_gradient), (rows, rows_gradient) = (eqx.filter_value_and_grad(loss)(model, holds) for holds in (True, False))
    np.testing.assert_allclose(row, rows, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(row_gradient), jax.tree.leaves(rows_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4 * np.abs(b).max())


def test_a_probe_sees_rows():
    config = load_config("model=llama3_1m", *SMALL)
    layout = Layout(config.mesh.build(jax.devices()[:1]), config.sharding)
    model = policy_view(config.precision, config.remat, layout, config.kernel)(config.model.build(key=named(jax.random.key(0), "init")))
    seen = trace(model, jnp.zeros((3, 16), jnp.int32), ["gate", "down", "q"])
    assert [seen[name].shape for name in ("gate", "down", "q")] == [(2, 3, 16, 48), (2, 3, 16, 32), (2, 3, 16, 4, 8)]
