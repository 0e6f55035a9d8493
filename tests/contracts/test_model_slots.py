"""What every variant of every slot must do: the tests find the variants in conf/, so a new one is tested by being there."""

import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.sharding import AxisType

from llama_eqx.config import load
from llama_eqx.dims import Dims
from llama_eqx.model.feed_forward import ACTIVATIONS
from llama_eqx.precision import cast
from llama_eqx.sharding import MESH_AXES, Layout, axis_names, check_shapes

CONF = pathlib.Path(__file__).parents[2] / "conf" / "model"
SLOTS = sorted(f"model/{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml"))
HEADS = [f"model.dims.kv_heads={n}" for n in (1, 2, 4)]
ACTIVATED = [
    f"model/feed_forward={path.stem} model.feed_forward.activation={name}"
    for path in (CONF / "feed_forward").glob("*.yaml")
    if "activation:" in path.read_text()
    for name in ACTIVATIONS
]
VARIANTS = [*SLOTS, *HEADS, *ACTIVATED, "model.tied=true", "model.dropout=0.1"]

pytestmark = pytest.mark.filterwarnings("error")


def as_tuple(part):
    return part if isinstance(part, tuple) else () if part is None else (part,)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tiny):
    config = tiny(*request.param.split())
    return config, jax.jit(lambda key: config.build(key=key))(jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)), jnp.int32)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@eqx.filter_jit
def logits(model, tokens, **kwargs):
    return model(tokens, **kwargs)


def test_arrays_are_what_their_annotations_say(variant):
    config, model = variant
    assert all(eqx.is_array(leaf) for leaf in jax.tree.leaves(model))
    check_shapes(model, config.dims)
    known = {*Dims.__dataclass_fields__}
    assert {axis for axes in axis_names(model) for axis in axes} <= known


def test_two_builds_are_one_trace(variant, tokens):
    config, model = variant
    other = jax.jit(lambda key: config.build(key=key))(jax.random.key(1))
    traces = []

    @jax.jit
    def forward(model, tokens):
        traces.append(None)
        return model(tokens)

    forward(model, tokens), forward(other, tokens + 1)
    assert len(traces) == 1


def test_every_parameter_has_a_finite_gradient(variant, tokens):
    _, model = variant
    gradient = jax.jit(jax.grad(lambda model: jnp.mean(jax.nn.log_softmax(model(tokens)) ** 2)))(model)
    for leaf in jax.tree.leaves(gradient):
        assert jnp.isfinite(leaf).all()
        assert jnp.any(leaf != 0)


def test_no_token_sees_the_next(variant, tokens):
    _, model = variant
    changed = tokens.at[:, 7].set((tokens[:, 7] + 1) % 64)
    before, after = logits(model, tokens), logits(model, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.allclose(before[:, 7:], after[:, 7:])


def test_decoding_with_a_cache_is_the_full_forward(variant, tokens):
    _, model = variant
    forward = eqx.filter_jit(lambda model, tokens, cache: model.hidden(tokens, cache=cache))
    x, cache = forward(model, tokens[:, :5], model.init_cache(2, 15))
    parts = [x]
    for t in range(5, tokens.shape[1]):
        x, cache = forward(model, tokens[:, t : t + 1], cache)
        parts.append(x)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), model.hidden(tokens)[0], atol=2e-5)


def test_a_packed_document_is_the_document_alone(variant, tokens):
    _, model = variant
    segment_ids = jnp.asarray([[1] * 5 + [2] * 7] * 2, jnp.int32)
    positions = jnp.asarray([[*range(5), *range(7)]] * 2, jnp.int32)
    packed = logits(model, tokens, positions=positions, segment_ids=segment_ids)
    np.testing.assert_allclose(packed[:, 5:], logits(model, tokens[:, 5:]), atol=2e-5)


def test_left_padding_changes_nothing(variant, tokens):
    _, model = variant
    pad = lambda x: jnp.pad(x, ((0, 0), (3, 0)))  # noqa: E731
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    padded = logits(model, pad(tokens), positions=pad(positions), segment_ids=pad(jnp.ones_like(tokens)))
    assert jnp.isfinite(padded).all()
    np.testing.assert_allclose(padded[:, 3:], logits(model, tokens), atol=2e-5)


def test_bfloat16_stays_bfloat16(variant, tokens):
    _, model = variant
    x, cache = cast(model, "bfloat16").hidden(tokens, cache=cast(model, "bfloat16").init_cache(2, 12))
    assert x.dtype == cache.keys.dtype == jnp.bfloat16
    assert model.head(x.astype(jnp.float32)).dtype == jnp.float32


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF.parent / "sharding").glob("*.yaml")))
def test_every_axis_is_split_on_a_cube_of_devices(variant, option):
    config, model = variant
    rules = load(yaml.safe_load((CONF.parent / "sharding" / f"{option}.yaml").read_text()))
    mesh = jax.make_mesh((2, 2, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    specs = [sharding.spec for sharding in jax.tree.leaves(Layout(mesh, rules).shardings(model))]
    for axes, leaf, spec in zip(axis_names(model), jax.tree.leaves(model), specs, strict=True):
        for axis, size, part in zip(axes, leaf.shape, spec, strict=True):
            split = tuple(name for name in rules.axes.get(axis, ()) if mesh.shape[name] > 1)
            replicated = axis == "kv_heads" and size % 2
            assert as_tuple(part) == (() if replicated else split)
