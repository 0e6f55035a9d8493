"""What every variant of every slot must do: they are found in conf/ and in installed extensions, so a new one is tested by being there."""

import dataclasses
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.sharding import AxisType

from llama_eqx import build_model, load_config
from llama_eqx.batch import Batch
from llama_eqx.compose import conf_dirs
from llama_eqx.config import load
from llama_eqx.dims import Dims
from llama_eqx.generation.layout import for_decoding
from llama_eqx.model.cache import emptied
from llama_eqx.model.feed_forward import ACTIVATIONS
from llama_eqx.model.llama import Llama
from llama_eqx.precision import PrecisionConfig, cast
from llama_eqx.remat import RematConfig
from llama_eqx.sharding import MESH_AXES, Layout, Rules, axis_names, check_shapes, parameter_names
from llama_eqx.training.evaluation import make_score
from llama_eqx.training.loss import policy_view

CONF = pathlib.Path(__file__).parents[2] / "conf" / "model"
SLOTS = sorted(f"model/{path.parent.name}={path.stem}" for folder in conf_dirs() for path in folder.glob("model/*/*.yaml"))
MODELS = sorted(f"model={path.stem}" for folder in conf_dirs() for path in folder.glob("model/[!_]*.yaml") if folder / "model" != CONF)
HEADS = [f"model.dims.kv_heads={n}" for n in (1, 2, 4)]
ACTIVATED = [
    f"model/feed_forward={path.stem} model.feed_forward.activation={name}"
    for path in (CONF / "feed_forward").glob("*.yaml")
    if "activation" in yaml.safe_load(path.read_text())
    for name in ACTIVATIONS
]
VARIANTS = {}  # options that come to the same model are tested once, under all their names
for overrides in [*SLOTS, *MODELS, *HEADS, "model.tied=true", "model.tied=false", "model.dropout=0.1"]:
    VARIANTS.setdefault(load_config(overrides).model, []).append(overrides)


def as_tuple(part):
    return part if isinstance(part, tuple) else () if part is None else (part,)


@pytest.fixture(scope="module", params=[pytest.param(names[0], id=" ".join(names)) for names in VARIANTS.values()])
def variant(request, tiny):
    config = tiny(*request.param.split())
    return config, build_model(config, key=jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)), jnp.int32)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@eqx.filter_jit
def logits(model, tokens):
    return model(tokens)


def loss(model, tokens):
    return jnp.mean(jax.nn.log_softmax(model(tokens)) ** 2)


@eqx.filter_jit
def segmented_logits(model, tokens, positions, segment_ids):
    return model(tokens, positions=positions, segment_ids=segment_ids)


@eqx.filter_jit
def cached_logits(model, tokens, cache):
    x, cache = model.hidden(tokens, cache=cache)
    return model.head(x), cache


def test_arrays_are_what_their_annotations_say(variant):
    config, model = variant
    assert all(eqx.is_array(leaf) for leaf in jax.tree.leaves(model))
    check_shapes(model, config.dims)
    slots = (config, config.attention, config.feed_forward, config.norm, config.block)
    own = {field.name for slot in slots for field in dataclasses.fields(slot) if field.type is int}
    assert {axis for axes in axis_names(model) for axis in axes if not axis.isdigit()} <= {*Dims.__dataclass_fields__, *own}


def test_parameters_and_logits_stay_float32_where_jax_has_64_bits(variant, tokens):
    config, _ = variant
    with jax.enable_x64(True):
        model = eqx.filter_eval_shape(lambda: config.build(key=jax.random.key(0)))
        found = {leaf.dtype for leaf in jax.tree.leaves((model, eqx.filter_eval_shape(logits, model, tokens)))}
    assert found == {jnp.dtype("float32")}


def test_two_builds_are_one_trace(variant, tokens):
    config, model = variant
    other = build_model(config, key=jax.random.key(1))
    traces = []

    @jax.jit
    def forward(model, tokens):
        traces.append(None)
        return tokens

    forward(model, tokens)
    forward(other, tokens + 1)
    assert len(traces) == 1


def test_every_parameter_has_a_finite_gradient(variant, tokens):
    """Through the policies that the training loss puts around a model."""
    _, model = variant
    model = jax.tree.map(lambda x: jnp.where(jnp.any(x != 0), x, 0.1), model)  # a factor that begins at zero leaves the other none
    mesh = jax.make_mesh((1, 1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:1])
    layout, remat = Layout(mesh, Rules(axes={})), RematConfig(policy="full")

    def gradient(dtype):
        view = policy_view(PrecisionConfig(params="float32", compute=dtype), remat, layout)
        return jax.grad(lambda model: loss(view(model), tokens))

    found = jax.jit(gradient("float32"))(model)
    for name, leaf in zip(parameter_names(model), jax.tree.leaves(found), strict=True):
        assert jnp.isfinite(leaf).all()
        own = name.partition(".")[0] not in Llama.__dataclass_fields__  # of a model's own class, for a loss of its own
        assert own or jnp.any(leaf != 0)
    with jax.numpy_dtype_promotion("standard"):
        assert eqx.filter_eval_shape(gradient("bfloat16"), model).embed.dtype == jnp.float32


def test_one_forward_serves_all(variant, tokens):
    """Causal, packed, left-padded and cached: the same numbers."""
    _, model = variant
    alone = logits(model, tokens)

    changed = logits(model, tokens.at[:, 7].set((tokens[:, 7] + 1) % 64))
    np.testing.assert_array_equal(alone[:, :7], changed[:, :7])
    assert not np.allclose(alone[:, 7:], changed[:, 7:])

    # Two documents in a row of 12, the second of which is the row's last 7 tokens.
    segment_ids = jnp.asarray([[1] * 5 + [2] * 7] * 2, jnp.int32)
    positions = jnp.asarray([[*range(5), *range(7)]] * 2, jnp.int32)
    packed = segmented_logits(model, jnp.roll(tokens, 5, axis=1), positions, segment_ids)
    np.testing.assert_allclose(packed[:, 5:], alone[:, :7], atol=2e-5)

    # The row's first 9 tokens after 3 of padding.
    padding = jnp.asarray([[0] * 3 + [1] * 9] * 2, jnp.int32)
    padded = segmented_logits(model, jnp.roll(tokens, 3, axis=1), jnp.maximum(jnp.cumsum(padding, axis=1) - 1, 0), padding)
    assert jnp.isfinite(padded).all()
    np.testing.assert_allclose(padded[:, 3:], alone[:, :9], atol=2e-5)

    # Pieces of 4 tokens into a cache with room to spare.
    cache, parts = model.init_cache(2, 15), []
    for piece in jnp.split(tokens, 3, axis=1):
        part, cache = cached_logits(model, piece, cache)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), alone, atol=2e-5)
    assert cache.length.tolist() == [12] * 3

    # All at once, laid out for decoding, into a cache that is known to be empty.
    laid_out = for_decoding(model)
    whole, cache = cached_logits(laid_out, tokens, emptied(laid_out.init_cache(2, 15)))
    np.testing.assert_allclose(whole, alone, atol=2e-5)
    assert {int(each.length) for each in cache} == {12}


def test_scores_are_those_of_the_logits(variant, tokens):
    _, model = variant
    mesh = jax.make_mesh((1, 1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:1])
    score = make_score(lambda model: model, Layout(mesh, Rules(axes={})), chunk=5)
    with jax.numpy_dtype_promotion("standard"):
        found = jax.jit(score)(model, Batch(tokens[:, :-1], tokens[:, 1:], jnp.ones((2, 11))))
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits(model, tokens)[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.nats, -logprobs, atol=2e-5)


def test_bfloat16_stays_bfloat16(variant, tokens):
    _, model = variant
    model = cast(model, "bfloat16")
    with jax.numpy_dtype_promotion("standard"):  # the promotions inside jax.nn's attention are its own
        x, cache = eqx.filter_eval_shape(lambda: model.hidden(tokens, cache=model.init_cache(2, 12)))
    assert x.dtype == cache.keys.dtype == jnp.bfloat16
    assert eqx.filter_eval_shape(model.head, x).dtype == jnp.float32


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF.parent / "sharding").glob("*.yaml")))
def test_every_axis_is_split_on_a_cube_of_devices(variant, option):
    _, model = variant
    rules = load(yaml.safe_load((CONF.parent / "sharding" / f"{option}.yaml").read_text()))
    mesh = jax.make_mesh((2, 2, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    specs = [sharding.spec for sharding in jax.tree.leaves(Layout(mesh, rules).shardings(model))]
    for axes, leaf, spec in zip(axis_names(model), jax.tree.leaves(model), specs, strict=True):
        used = set()  # a mesh axis splits an array once
        for axis, size, part in zip(axes, leaf.shape, spec, strict=True):
            split = tuple(name for name in rules.axes.get(axis, ()) if mesh.shape[name] > 1 and name not in used)
            used |= {*split}
            replicated = axis == "kv_heads" and size % 2
            assert as_tuple(part) == (() if replicated else split)


@pytest.mark.parametrize("overrides", ACTIVATED)
def test_every_activation_learns(overrides, tiny):
    module = tiny(*overrides.split()).build(key=jax.random.key(0)).blocks.feed_forward
    x = jax.random.normal(jax.random.key(1), (2, 3, 32))
    first = jax.tree.map(lambda leaf: leaf[0], module)
    for leaf in jax.tree.leaves(jax.grad(lambda module: jnp.mean(module(x) ** 2))(first)):
        assert jnp.isfinite(leaf).all()
        assert jnp.any(leaf != 0)
