import collections
import math
import os
import re
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from llama_eqx import build_model, load_config
from llama_eqx.batch import Batch
from llama_eqx.compose import conf_dir
from llama_eqx.errors import ConfigError
from llama_eqx.sharding import MESH_AXES, Layout, Rules, axis_names, check_shapes, parameter_names
from llama_eqx.training.loss import policy_view
from llama_eqx.training.state import abstract, init_state
from llama_eqx.training.step import make_step

# A TPU's compiler without a TPU, beside others that run at the same time.
TPU_COMPILER = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@pytest.fixture(autouse=True)
def optimised():
    """The compiled step is read here as it would run, not as tests are compiled for speed."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def layout(option="fsdp_tensor", shape=(2, 2, 1, 2)):
    mesh = jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    return Layout(mesh, load_config(f"sharding={option}").sharding)


def test_axis_names_are_read_from_annotations(tiny):
    model = build_model(tiny(), key=jax.random.key(0))
    named = dict(zip(parameter_names(model), axis_names(model), strict=True))
    assert named["embed"] == ("vocab", "embed")
    assert named["blocks.attention.o_proj"] == ("layers", "heads", "head_dim", "embed")
    assert named["blocks.ffn_norm.weight"] == ("layers", "embed")
    assert named["final_norm.weight"] == ("embed",)


def test_the_optimizer_is_split_as_its_parameters(tiny):
    config = load_config()
    optimizer = config.optimizer.build()
    state = eqx.filter_eval_shape(lambda key: init_state(tiny(), optimizer, config.precision, key), jax.random.key(0))
    shardings = layout().shardings(state)
    assert shardings.model.blocks.feed_forward.up_proj.spec == P(None, ("fsdp",), ("tensor",))
    moments = shardings.opt_state[1][0]
    assert moments.mu.blocks.feed_forward.up_proj.spec == shardings.model.blocks.feed_forward.up_proj.spec
    assert moments.count.spec == P()


def test_what_does_not_divide_is_listed(tiny):
    model = eqx.filter_eval_shape(lambda key: tiny("model.dims.mlp=49", "model.dims.embed=33").build(key=key), jax.random.key(0))
    with pytest.raises(ConfigError) as error:
        layout().shardings(model)
    assert "mlp=49" in error.value.what
    assert "embed=33" in error.value.what


def test_kv_heads_alone_are_replicated(tiny):
    model = eqx.filter_eval_shape(lambda key: tiny("model.dims.kv_heads=1").build(key=key), jax.random.key(0))
    attention = layout().shardings(model).blocks.attention
    assert attention.k_proj.spec == P(None, ("fsdp",), None, None)
    assert attention.q_proj.spec == P(None, ("fsdp",), ("tensor",), None)


def test_a_mesh_axis_splits_an_array_once():
    rules = Rules(axes={"embed": ("fsdp",), "mlp": ("fsdp", "tensor")})
    found = Layout(layout().mesh, rules).spec(("embed", "mlp"), (8, 8))
    assert found == P(("fsdp",), ("tensor",))


def test_shapes_that_constructors_did_not_see(tiny):
    model = build_model(tiny(), key=jax.random.key(0))
    check_shapes(model, tiny().dims)
    wrong = eqx.tree_at(lambda m: m.blocks.feed_forward.up_proj, model, jnp.zeros((3, 48, 32)))
    with pytest.raises(ValueError, match=r"blocks\.feed_forward\.up_proj .* embed is 32, not 48"):
        check_shapes(wrong, tiny().dims)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["mesh=v4-32"], "16 tpu devices"),
        (["mesh.fsdp=3"], "does not make 8 devices"),
        (["mesh.fsdp=-1", "mesh.tensor=3"], "mesh.tensor=4 is the nearest"),
        (["mesh=cpu-8", "mesh.hosts=3"], "do not divide over 3 hosts"),
        (["mesh.fsdp=-1", "mesh.tensor=-1"], "one at most may be -1"),
        (["mesh.data=0"], "at least 1"),
    ],
)
def test_meshes_that_cannot_be(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load_config(*overrides).mesh.build()


def test_a_mesh_of_what_is_here():
    assert dict(load_config("mesh.tensor=2").mesh.build().shape) == {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 2}
    assert load_config("mesh=cpu-8").mesh.build().size == 8


TPU_MESHES = sorted(path.stem for path in (conf_dir() / "mesh").glob("v*.yaml"))


@pytest.mark.parametrize("name", TPU_MESHES)
def test_a_slice_has_the_chips_of_its_topology(name):
    mesh = load_config(f"mesh={name}").mesh
    generation, number = name.split("-")
    assert mesh.topology.startswith(f"{generation}:")
    assert math.prod(map(int, mesh.topology.split(":")[1].split("x"))) == mesh.devices
    assert mesh.devices == (int(number) // 2 if generation in ("v4", "v5p") else int(number))
    assert mesh.hosts == max(1, mesh.devices // 4)


def test_the_tpu_compiler_knows_every_slice():
    """Where libtpu is installed: each topology has the devices of its mesh, and each generation's compiler takes its options."""
    pytest.importorskip("libtpu")
    done = subprocess.run([sys.executable, __file__, *TPU_MESHES], env=TPU_COMPILER, capture_output=True, text=True, check=False)
    assert done.stdout.split() == TPU_MESHES, done.stderr


def open_topologies(names):
    """Prints each name whose topology opens with the devices of its mesh, and whose generation's compiler takes its options."""
    compiled = set()
    for name in names:
        config = load_config(f"mesh={name}").mesh
        generation = config.topology.split(":")[0]
        more = {"chip_config_name": "megacore"} if generation == "v4" else {}
        if config.devices == 1:
            more["chips_per_host_bounds"] = (1, 1, 1)
        mesh = config.build(topologies.get_topology_desc(platform="tpu", topology_name=config.topology, **more).devices)
        if generation not in compiled and mesh.size > 1:
            compiled.add(generation)
            x = jax.ShapeDtypeStruct((mesh.size, 128), jnp.float32, sharding=jax.NamedSharding(mesh, P("fsdp")))
            jax.jit(lambda x: x @ x.T).lower(x).compile(config.compiler_options)
        print(name, flush=True)


def compiled_step(option, shape, *overrides):
    """The training step for a model whose sizes all differ, so that the shape of a collective tells what it moves."""
    sizes = {"vocab": 512, "layers": 2, "embed": 64, "heads": 8, "kv_heads": 8, "head_dim": 16, "mlp": 320}
    config = load_config(*(f"model.dims.{axis}={n}" for axis, n in sizes.items()), "model.tied=false", *overrides)
    where, optimizer = layout(option, shape), config.optimizer.build()
    state = eqx.filter_eval_shape(lambda key: init_state(config.model, optimizer, config.precision, key), jax.random.key(0))
    ids, mask = jax.ShapeDtypeStruct((16, 96), jnp.int32), jax.ShapeDtypeStruct((16, 96), jnp.float32)
    batch = eqx.filter_eval_shape(lambda a, b: Batch(a, a, b), ids, mask)
    key = jax.eval_shape(lambda: jax.random.key(0))
    view = policy_view(config.precision, config.remat, where)
    step = make_step(optimizer, lambda step: config.schedule.rate(step, 10), view, where)
    inputs = (abstract(batch, where.shardings(batch)), abstract(key, where.sharding((), ())))
    shardings = where.shardings(state)
    return jax.jit(step, donate_argnums=1).lower(inputs, abstract(state, shardings)).compile(), state, shardings


def collectives(compiled):
    """How often each kind of collective moves an array of each shape."""
    found = collections.Counter()
    for line in compiled.as_text().splitlines():
        if match := re.search(r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(", line):
            found.update((match[2], tuple(map(int, dims.split(",")))) for dims in re.findall(r"\[([\d,]+)\]", match[1]))
    return found


@pytest.mark.parametrize(("option", "shape"), [("fsdp", (1, 8, 1, 1)), ("fsdp_tensor", (2, 2, 1, 2))])
def test_no_axis_is_lost_in_a_step(option, shape):
    compiled, state, shardings = compiled_step(option, shape)
    after = jax.tree.leaves(compiled.output_shardings[0])
    for leaf, wanted, found in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), after, strict=True):
        assert found.is_equivalent_to(wanted, leaf.ndim)


def test_fsdp_gathers_weights_and_leaves_activations_where_they_are():
    compiled, _, _ = compiled_step("fsdp", (1, 8, 1, 1))
    moved = collectives(compiled)
    assert any(kind == "all-gather" and np.prod(shape) == 64 * 320 for kind, shape in moved)
    activations = {(2, 96, 64), (16, 96, 64), (2, 96, 320), (16, 96, 320), (2, 96, 512), (16, 96, 512)}
    assert not {shape for _, shape in moved} & activations, moved


def test_the_check_sees_activations_that_are_reduced(monkeypatch):
    """Without the constraints at the edges of blocks the partitioner does what the test above forbids."""
    monkeypatch.setattr(Layout, "constrain_residual", lambda self, block: block)
    monkeypatch.setattr(Layout, "gathered", lambda self, model: model)
    moved = collectives(compiled_step("fsdp", (1, 8, 1, 1))[0])
    assert {shape for _, shape in moved} & {(2, 96, 64), (16, 96, 64), (2, 96, 320), (16, 96, 320), (2, 96, 512), (16, 96, 512)}


if __name__ == "__main__":
    open_topologies(sys.argv[1:])
