"""Two ways to turn a head are one: which of them is compiled depends on the platform."""

import jax
import jax.numpy as jnp
import pytest

from llama_eqx.model.kernel.tokenwise import PLATFORM
from llama_eqx.model.rotary import Rotation, turn, turn_by_product
from llama_eqx.tag import setting


def inputs(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x, d = (jax.random.normal(key, (2, 16, 3, 64)).astype(dtype) for key in keys[:2])
    angle = 50 * jax.random.normal(keys[2], (1, 16, 1, 32))
    return x, d, jnp.cos(angle), jnp.sin(angle)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_by_product_it_is_the_same_bit_for_bit(dtype):
    x, d, cos, sin = inputs(dtype)
    (one, back), (other, other_back) = (jax.vjp(lambda x, f=f: f(x, cos, sin), x) for f in (turn, turn_by_product))
    assert one.dtype == other.dtype == dtype
    assert jnp.array_equal(one, other)
    assert jnp.array_equal(back(d)[0], other_back(d)[0])
    assert not jnp.array_equal(one, x)


@pytest.mark.parametrize(("platform", "products"), [("tpu", True), ("cpu", False)])
def test_each_platform_has_its_own(platform, products):
    x, _, cos, sin = inputs(jnp.bfloat16)
    rotation = Rotation(positions=jnp.arange(16)[None], layer=None, cos=cos, sin=sin, rounded=False)
    traced = jax.jit(lambda x: rotation(x)).trace(x)
    assert ("dot_general" in traced.lower(lowering_platforms=(platform,)).as_text()) is products
    with setting(PLATFORM, platform):  # and where it is known, that one alone is traced
        alone = str(jax.make_jaxpr(lambda x: rotation(x))(x))
    assert ("dot_general" in alone, "platform_index" in alone) == (products, False)
