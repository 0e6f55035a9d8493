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
    return Layout(mesh, load_config(*f"sharding={option}".split()).sharding)


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
    state = eqx.filter_eval_shape(lambda key: init_state(tiny(), optimizer, config.precision, config.guard, key), jax.random.key(0))
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


def test_a_mesh_axis_splits_an_activation_once():
    rules = Rules(axes={"embed": ("fsdp",), "mlp": ("fsdp", "tensor")})
    found = Layout(layout().mesh, rules).spec(("embed", "mlp"), (8, 8))
    assert found == P(("fsdp",), ("tensor",))


def test_rules_that_use_a_mesh_axis_twice_for_a_parameter(tiny):
    with pytest.raises(ConfigError, match="used twice: fsdp, fsdp"):
        Rules(axes={"embed": ("fsdp", "fsdp")})
    model = eqx.filter_eval_shape(lambda key: tiny().build(key=key), jax.random.key(0))
    with pytest.raises(ConfigError, match=r"fsdp is used twice, for embed and mlp of one array \(layers embed mlp\)"):
        Layout(layout().mesh, Rules(axes={"embed": ("fsdp",), "mlp": ("fsdp", "tensor")})).shardings(model)


SIZES = {"batch": 16, "seq": 96, "vocab": 512, "layers": 2, "embed": 64, "heads": 8, "kv_heads": 8, "head_dim": 16, "mlp": 320}


@pytest.mark.parametrize(
    ("option", "shape", "sizes", "said", "mesh"),
    [
        ("fsdp_tensor", (1, 2, 1, 4), {"heads": 6, "mlp": 322, "embed": 63}, ["heads=6", "mlp=322", "embed=63"], (4, 1, 1, 2)),
        ("fsdp_tensor", (1, 1, 1, 8), {"heads": 6}, ["heads=6 does not divide by tensor = 8"], (1, 4, 1, 2)),
        ("sequence", (1, 1, 8, 1), {"seq": 100}, ["seq=100 does not divide by sequence = 8"], (1, 2, 4, 1)),
        ("fsdp", (1, 4, 1, 2), {}, ["tensor=2 splits nothing"], (1, 8, 1, 1)),
        ("ddp", (1, 4, 2, 1), {"batch": 12}, ["sequence=2 splits nothing"], None),
        ("fsdp", (1, 8, 1, 1), {"batch": 12}, ["batch=12 does not divide by data x fsdp = 8"], None),
    ],
)
def test_what_does_not_divide_and_the_nearest_mesh_that_does(option, shape, sizes, said, mesh):
    with pytest.raises(ConfigError) as error:
        layout(option, shape).check(SIZES | sizes)
    assert [line for line in said if line not in error.value.what] == []
    if mesh:
        assert " ".join(f"mesh.{axis}={n}" for axis, n in zip(MESH_AXES, mesh, strict=True)) in error.value.next
        layout(option, mesh).check(SIZES | sizes)
    else:
        assert error.value.next.startswith(("sharding=sequence, whose rules use every axis", "train.batch_size="))


def test_a_batch_that_does_not_divide_is_told_the_next_that_does():
    with pytest.raises(ConfigError, match="batch=12") as error:
        layout("fsdp", (1, 8, 1, 1)).check(SIZES | {"batch": 12})
    assert error.value.next.startswith("train.batch_size=16")


def test_key_heads_that_are_replicated_are_mentioned():
    assert "kv_heads=2" in layout("tensor", (1, 1, 1, 8)).check(SIZES | {"kv_heads": 2})[0]
    assert not layout("tensor", (1, 1, 1, 8)).check(SIZES)


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
        (["mesh.fsdp=-1", "mesh.tensor=-1"], "at most one may be -1"),
        (["mesh.data=0"], "at least 1"),
    ],
)
def test_meshes_that_cannot_be(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load_config(*overrides).mesh.build()


def test_a_mesh_of_what_is_here():
    assert dict(load_config("mesh.tensor=2").mesh.build().shape) == {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 2}
    assert load_config("mesh=cpu-8").mesh.build().size == 8


# Ways of tensor that are no side of the slice (8 x 8 and 4 x 4 x 8 chips), which jax.make_mesh refuses.
PARTS_OF_A_SIDE = {"v6e-64": (2, 4), "v5p-256": (2,)}
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
    """Where libtpu is installed: each topology is of its mesh's size and takes its shapes; each generation's compiler takes its options."""
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
        for size in PARTS_OF_A_SIDE.get(name, ()):
            split = load_config(f"mesh={name}", f"mesh.tensor={size}").mesh.build(mesh.devices.flatten().tolist()).devices
            group = [chip.coords for chip in split[0, 0, 0]]
            box = [max(places) - min(places) + 1 for places in zip(*group, strict=True)]
            assert math.prod(box) == len(group) == size, f"{name}: {group} are not neighbours"
        print(name, flush=True)


def compiled_step(option, shape, *overrides):
    """The training step for a model whose sizes all differ, so that the shape of a collective tells what it moves."""
    sizes = {"vocab": 512, "layers": 2, "embed": 64, "heads": 8, "kv_heads": 8, "head_dim": 16, "mlp": 320}
    config = load_config(*(f"model.dims.{axis}={n}" for axis, n in sizes.items()), "model.tied=false", *overrides)
    where, optimizer = layout(option, shape), config.optimizer.build()
    state = eqx.filter_eval_shape(lambda key: init_state(config.model, optimizer, config.precision, config.guard, key), jax.random.key(0))
    ids, mask = jax.ShapeDtypeStruct((16, 96), jnp.int32), jax.ShapeDtypeStruct((16, 96), jnp.float32)
    batch = eqx.filter_eval_shape(lambda a, b: Batch(a, a, b), ids, mask)
    key = jax.eval_shape(lambda: jax.random.key(0))
    view = policy_view(config.precision, config.remat, where, config.kernel)
    step = make_step(optimizer, lambda step: config.schedule.rate(step, 10), config.loss.build(view, where), where)
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


KERNELS = {"plain": ["kernel.name=plain", "remat=none"], "blocked": ["kernel.name=blocked", "remat=names"]}
CASES = [
    ("fsdp", (1, 8, 1, 1), "blocked"),
    ("fsdp_tensor", (2, 2, 1, 2), "blocked"),
    ("sequence", (1, 4, 2, 1), "blocked"),
    pytest.param("ddp", (8, 1, 1, 1), "blocked", marks=pytest.mark.slow),
    pytest.param("tensor", (1, 1, 1, 8), "blocked", marks=pytest.mark.slow),
    pytest.param("fsdp", (1, 8, 1, 1), "plain", marks=pytest.mark.slow),
    pytest.param("sequence", (1, 4, 2, 1), "plain", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("option", "shape", "kernel"), CASES)
def test_what_a_step_moves_and_what_it_leaves_where_it_is(option, shape, kernel):
    """No axis of the state is lost. Weights are gathered, and activations stay but where the rules are about them."""
    compiled, state, shardings = compiled_step(option, shape, *KERNELS[kernel])
    after = jax.tree.leaves(compiled.output_shardings[0])
    for leaf, wanted, found in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), after, strict=True):
        assert found.is_equivalent_to(wanted, leaf.ndim)

    moved = collectives(compiled)
    rows, tokens = 16 // (shape[0] * shape[1]), 96 // shape[2]
    lengths = {96, tokens, rows * tokens}  # sizes that only activations have
    activations = {(kind, dims) for kind, dims in moved if lengths & set(dims)}
    weights = {(kind, dims) for kind, dims in moved if np.prod(dims) > 64} - activations
    if option == "ddp":
        assert {kind for kind, _ in weights} == {"all-reduce"}, moved  # gradients
    if option in ("fsdp", "fsdp_tensor", "sequence"):
        assert ("all-gather", (64, 320 // shape[3])) in weights, moved
        assert ("reduce-scatter", (64 // (shape[1] * shape[2]), 512 // shape[3])) in weights, moved  # the head's gradient
    if option in ("ddp", "fsdp"):
        assert not activations, moved
    if option == "tensor":
        assert not weights, moved
    if option in ("tensor", "fsdp_tensor"):  # the residual after attention, feed-forward and head, and the sums of a row's softmax
        assert activations <= {("all-reduce", dims) for dims in [(rows, 96, 64), (1, rows * 96, 64), (rows * 96,)]}, moved
    if option == "sequence":  # keys and values of the whole row, and their gradients
        assert {kind for kind, _ in activations} == {"all-gather", "all-reduce"}, moved
        assert {tuple(sorted(dims)) for _, dims in activations} == {tuple(sorted((rows, 96, 8, 16)))}, moved


@pytest.mark.parametrize(("rule", "width"), [("", 64), (" +sharding.axes.residual=[tensor]", 16)])
def test_what_a_layer_keeps_is_split_by_tensor_where_the_rules_say_so(rule, width):
    compiled, _, _ = compiled_step(f"fsdp_tensor{rule}", (1, 2, 1, 4), "remat=full", "kernel.name=blocked")
    kept = re.findall(r"f32\[2,8,96,(\d+)\]", compiled.as_text())  # of 2 layers and the rows of a device
    assert set(kept) == {str(width)}


def test_the_check_sees_activations_that_are_reduced(monkeypatch):
    """Without the constraints at the edges of blocks the partitioner does what the test above forbids."""
    monkeypatch.setattr(Layout, "constrain_residual", lambda self, block: block)
    monkeypatch.setattr(Layout, "gathered", lambda self, model: model)
    with pytest.raises(AssertionError):
        test_what_a_step_moves_and_what_it_leaves_where_it_is("fsdp", (1, 8, 1, 1), "plain")


if __name__ == "__main__":
    open_topologies(sys.argv[1:])
