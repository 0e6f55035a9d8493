"""Saving and restoring a run: bit for bit, on any mesh, and never without saying what went wrong."""

import pathlib
import resource

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from llama_eqx.checkpoint.restore import steps
from llama_eqx.checkpoint.save import CheckpointConfig, Checkpoints
from llama_eqx.errors import CheckpointError, ConfigError, StorageError

TWO = CheckpointConfig(every=1, keep=2, export=None)


@pytest.fixture(scope="module")
def training(model):
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), jax.tree.map(lambda x: x.ndim > 2, model)))
    odd = jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45], jnp.float32)
    return {"step": jnp.int32(7), "key": jax.random.key(3), "opt_state": adam.init(model), "odd": odd, "half": odd.astype(jnp.bfloat16)}


def abstract(tree, sharding=None):
    sharding = sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def bits(x) -> bytes:
    return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and bits(x) == bits(y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def mesh(*sizes: int) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(sizes), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def sharded(tree, mesh: Mesh):
    """Sharding of every array over its last axes where their sizes divide, for want of rules."""

    def spec(x):
        axes = [None] * x.ndim
        for place, axis in zip(range(x.ndim - 1, -1, -1), ("tensor", "fsdp"), strict=False):
            axes[place] = axis if x.shape[place] % mesh.shape[axis] == 0 else None
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(spec, tree)


def test_restores_every_bit_static_fields_and_types(tmp_path, model, training):
    with Checkpoints(tmp_path, TWO) as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(7, model, (training["step"], training), {"val/loss": 1.5})
        loaded, (step, rest) = checkpoints.restore(7, abstract(model), abstract((training["step"], training)))
        assert checkpoints.latest == 7
    assert same(loaded, model)
    assert same(rest, training)
    assert int(step) == 7
    assert loaded.config == model.config
    changed = eqx.tree_at(lambda m: m.embed, model, model.embed.at[3, 5].multiply(1.0000001))
    assert not same(loaded, changed)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2), (1, 1, 8)])
def test_moves_to_another_mesh(tmp_path, model, sizes):
    on_mesh = jax.device_put(model, sharded(model, mesh(2, 2, 2)))
    with Checkpoints(tmp_path, TWO) as checkpoints:
        checkpoints.save(1, on_mesh, {"step": jnp.int32(1)})
        wanted = sharded(model, mesh(*sizes))
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), model, wanted)
        loaded, _ = checkpoints.restore(1, target, abstract({"step": jnp.int32(0)}))
    assert same(loaded, model)
    assert jax.tree.map(lambda x: x.sharding, loaded) == wanted
    assert len(loaded.embed.sharding.device_set) == 8
    assert not loaded.embed.is_fully_replicated


def test_keeps_the_newest(tmp_path, model):
    with Checkpoints(tmp_path, TWO) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, model, {"step": jnp.int32(step)})
        _, rest = checkpoints.restore(3, abstract(model), abstract({"step": jnp.int32(0)}))
    assert int(rest["step"]) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]
    with Checkpoints(tmp_path, TWO) as again:
        assert again.latest == 4


def test_a_step_is_saved_once(tmp_path, model):
    with Checkpoints(tmp_path, TWO) as checkpoints:
        checkpoints.save(5, model, {"step": jnp.int32(1)})
        checkpoints.save(5, model, {"step": jnp.int32(2)})
    with Checkpoints(tmp_path, TWO) as checkpoints:
        checkpoints.save(5, model, {"step": jnp.int32(3)})
        _, rest = checkpoints.restore(5, abstract(model), abstract({"step": jnp.int32(0)}))
    assert int(rest["step"]) == 1


def test_the_saved_arrays_may_be_donated(tmp_path, model):
    update = jax.jit(lambda m: jax.tree.map(lambda x: x + 1, m), donate_argnums=0)
    copy = jax.tree.map(jnp.copy, model)
    with Checkpoints(tmp_path, TWO) as checkpoints:
        checkpoints.save(1, copy, {"step": jnp.int32(1)})
        update(copy)
        loaded, _ = checkpoints.restore(1, abstract(model), abstract({"step": jnp.int32(0)}))
    assert same(loaded, model)


def test_lists_every_difference(tmp_path, model):
    with Checkpoints(tmp_path, TWO) as checkpoints:
        checkpoints.save(1, model, {"step": jnp.int32(1), "old": jnp.zeros(2)})
        other = eqx.tree_at(lambda m: (m.embed, m.final_norm.weight), model, (model.embed.astype(jnp.bfloat16), jnp.zeros(5)))
        with pytest.raises(CheckpointError) as caught:
            checkpoints.restore(1, abstract(other), abstract({"step": jnp.int32(0), "new": jax.random.key(0)}))
    rows = [line.split() for line in caught.value.what.splitlines()[1:]]
    assert rows == [
        ["name", "expected", "found"],
        ["model.embed", "bfloat16[64,32]", "float32[64,32]"],
        ["model.final_norm.weight", "float32[5]", "float32[32]"],
        ["training.new", "uint32[2]", "nothing"],
        ["training.old", "nothing", "float32[2]"],
    ]
    assert caught.value.code == 4


def test_a_missing_step_names_those_there(tmp_path, model):
    with Checkpoints(tmp_path, TWO) as checkpoints:
        checkpoints.save(1, model, {"step": jnp.int32(1)})
        with pytest.raises(CheckpointError, match="saved steps: 1"):
            checkpoints.restore(2, abstract(model), abstract({"step": jnp.int32(0)}))


def test_clears_what_a_killed_save_left(tmp_path, model):
    with Checkpoints(tmp_path, TWO) as checkpoints:
        checkpoints.save(1, model, {"step": jnp.int32(1)})
    half = tmp_path / "2.orbax-checkpoint-tmp" / "model.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    (half / "manifest.ocdbt").write_bytes(b"half")
    with Checkpoints(tmp_path, TWO) as checkpoints:
        assert checkpoints.latest == 1
        assert not half.exists()
        checkpoints.save(2, model, {"step": jnp.int32(2)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


@pytest.fixture
def full_disk():
    """Files may not grow past 40 kB until `free()` is called: to the writer it is as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def free():
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    jax.config.update("jax_enable_compilation_cache", False)  # it would fail to write too
    yield lambda: (resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard)), free)[1]
    free()
    jax.config.update("jax_enable_compilation_cache", True)


def test_a_failed_save_is_told_at_the_next_and_then_training_may_go_on(tmp_path, model, full_disk):
    with Checkpoints(tmp_path, TWO) as checkpoints:
        checkpoints.save(1, model, {"step": jnp.int32(1)})
        checkpoints.restore(1, abstract(model), abstract({"step": jnp.int32(0)}))
        free = full_disk()
        checkpoints.save(2, model, {"step": jnp.int32(2)})
        with pytest.raises(StorageError) as caught:
            checkpoints.save(3, model, {"step": jnp.int32(3)})
        free()
        assert caught.value.what.startswith("step 2 could not be saved")
        assert "File too large" in caught.value.what
        assert len(str(caught.value).splitlines()) == 4
        assert caught.value.kept == "the checkpoint of step 1"
        assert checkpoints.latest == 1
        checkpoints.save(2, model, {"step": jnp.int32(4)})
        checkpoints.save(3, model, {"step": jnp.int32(3)})
        _, rest = checkpoints.restore(2, abstract(model), abstract({"step": jnp.int32(0)}))
    assert int(rest["step"]) == 4
    assert steps(tmp_path) == [2, 3]


def test_a_failed_last_save_is_told_at_close(tmp_path, model, full_disk):
    checkpoints = Checkpoints(tmp_path, TWO)
    free = full_disk()
    checkpoints.save(2, model, {"step": jnp.int32(2)})
    with pytest.raises(StorageError, match="no checkpoint yet"):
        checkpoints.close()
    free()
    with Checkpoints(tmp_path, TWO) as again:
        assert again.latest is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: pathlib.Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="checkpoints cannot be written"):
        Checkpoints(tmp_path / "file" / "checkpoints", TWO)


@pytest.mark.parametrize("values", [{"every": -1, "keep": 1}, {"every": 1, "keep": 0}])
def test_config_refuses(values):
    with pytest.raises(ConfigError):
        CheckpointConfig(**values, export=None)
