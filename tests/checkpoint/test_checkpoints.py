"""Saving and restoring a run: bit for bit, on any mesh, and never without saying what went wrong."""

import errno
import os
import pathlib
import random
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from llama_eqx import load_config
from llama_eqx.checkpoint import save
from llama_eqx.checkpoint.manifest import Digest
from llama_eqx.checkpoint.restore import steps
from llama_eqx.checkpoint.save import Checkpoints
from llama_eqx.errors import CheckpointError, ConfigError, StorageError

TWO = load_config("checkpoint.every=1").checkpoint


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
        _, loaded, (step, rest), _ = checkpoints.restore(abstract(model), abstract((training["step"], training)), step=7)
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
        _, loaded, _, _ = checkpoints.restore(target, abstract({"step": jnp.int32(0)}), step=1)
    assert same(loaded, model)
    assert jax.tree.map(lambda x: x.sharding, loaded) == wanted
    assert len(loaded.embed.sharding.device_set) == 8
    assert not loaded.embed.is_fully_replicated


def test_keeps_the_newest(tmp_path, model):
    with Checkpoints(tmp_path, TWO) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, model, {"step": jnp.int32(step)})
        _, _, rest, _ = checkpoints.restore(abstract(model), abstract({"step": jnp.int32(0)}), step=3)
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
        _, _, rest, _ = checkpoints.restore(abstract(model), abstract({"step": jnp.int32(0)}), step=5)
    assert int(rest["step"]) == 1


def test_a_step_is_saved_once_though_the_disk_does_not_show_it_yet(tmp_path, model, monkeypatch):
    """As to a process that has done its part, while the first one has yet to name the folder."""
    said = []
    with Checkpoints(tmp_path, TWO, said.append) as checkpoints:
        checkpoints.save(5, model, {"step": jnp.int32(1)})
        checkpoints.wait()
        monkeypatch.setattr(save.restore, "steps", lambda folder: [])
        checkpoints.save(5, model, {"step": jnp.int32(2)})
        checkpoints.wait()
    assert len(said) == 1


def test_the_saved_arrays_may_be_donated(tmp_path, model):
    update = jax.jit(lambda m: jax.tree.map(lambda x: x + 1, m), donate_argnums=0)
    copy = jax.tree.map(jnp.copy, model)
    with Checkpoints(tmp_path, TWO) as checkpoints:
        checkpoints.save(1, copy, {"step": jnp.int32(1)})
        update(copy)
        _, loaded, _, _ = checkpoints.restore(abstract(model), abstract({"step": jnp.int32(0)}), step=1)
    assert same(loaded, model)


def test_lists_every_difference(tmp_path, model):
    with Checkpoints(tmp_path, TWO) as checkpoints:
        checkpoints.save(1, model, {"step": jnp.int32(1), "old": jnp.zeros(2)})
        other = eqx.tree_at(lambda m: (m.embed, m.final_norm.weight), model, (model.embed.astype(jnp.bfloat16), jnp.zeros(5)))
        with pytest.raises(CheckpointError) as caught:
            checkpoints.restore(abstract(other), abstract({"step": jnp.int32(0), "new": jax.random.key(0)}), step=1)
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
            checkpoints.restore(abstract(model), abstract({"step": jnp.int32(0)}), step=2)


def test_clears_what_a_killed_save_left(tmp_path, model):
    with Checkpoints(tmp_path, TWO) as checkpoints:
        checkpoints.save(1, model, {"step": jnp.int32(1)})
    half = tmp_path / "2.unfinished.orbax-checkpoint-tmp" / "model.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    (half / "manifest.ocdbt").write_bytes(b"half")
    with Checkpoints(tmp_path, TWO) as checkpoints:
        assert checkpoints.latest == 1
        assert not half.exists()
        checkpoints.save(2, model, {"step": jnp.int32(2)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("wrong", ["every=-1", "keep=0", "keep_every=0", "keep_best=-1", "grace=0"])
def test_config_refuses(wrong):
    with pytest.raises(ConfigError):
        load_config(f"checkpoint.{wrong}")


@pytest.mark.parametrize(
    ("recorded", "best"),
    [
        ('{"step": 5, "val/loss": 2.5}\n{"step": 6}\n', [2, 4, 6]),
        ('{"step": 5, "val/loss": 1.2}\n{"step": 6}\n', [2, 4, 5, 6]),
        ('damaged\n{"step": 5, "val/loss": 1.2}\n', [2, 4, 6]),
    ],
)
def test_what_is_kept(tmp_path, model, recorded, best, monkeypatch):
    """Step 5 was saved before it was evaluated."""
    read, reads = save.read_metrics, []
    monkeypatch.setattr(save, "read_metrics", lambda path: reads.append(path) or read(path))
    folder = tmp_path / "checkpoints"
    config = load_config("checkpoint.keep=1", "checkpoint.keep_every=4", "checkpoint.keep_best=2").checkpoint
    losses = {1: 3.0, 2: 1.0, 3: 2.5, 4: 2.0, 5: None, 6: 1.5}
    with Checkpoints(folder, config, run_dir=tmp_path) as checkpoints:
        (tmp_path / "metrics.jsonl").write_text(recorded)  # what a start makes up for comes after this
        for step, loss in losses.items():
            metrics = None if loss is None else {"val/loss": loss}
            checkpoints.save(step, jax.tree.map(jnp.zeros_like, model.final_norm), {"step": jnp.int32(step)}, metrics)
    assert steps(folder) == best
    assert len(reads) == 1  # it grows with the run


def test_a_loss_that_is_no_number_is_not_the_best():
    config = load_config("checkpoint.keep=1", "checkpoint.keep_best=1").checkpoint
    losses = {1: 2.0, 2: float("nan"), 3: 1.0, 4: 3.0}
    assert config.kept({step: {"val/loss": loss} for step, loss in losses.items()}) == {3, 4}


# --- Damage: every byte of a checkpoint is guarded.


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("two")
    with Checkpoints(folder, TWO) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, model, {"step": jnp.int32(step)}, facts={"data": "abc"})
    return folder


def restored(folder, model):
    said = []
    with Checkpoints(folder, TWO, said.append) as checkpoints:
        found = checkpoints.restore(abstract(model), abstract({"step": jnp.int32(0)}))
    return found, said


def flip_a_bit(file: pathlib.Path, random):
    content = bytearray(file.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def truncate(file: pathlib.Path, random):
    file.write_bytes(file.read_bytes()[: random.randrange(file.stat().st_size)])


def garbage(file: pathlib.Path, random):
    file.write_bytes(random.randbytes(file.stat().st_size))


def remove(file: pathlib.Path, random):
    file.unlink()


DAMAGES = [flip_a_bit, truncate, garbage, remove]


def damaged_everywhere(two_saved, model, tmp_path, damage, trials):
    """Damages every file of step 2 in turn; of an empty one, nothing can be damaged but its name."""
    files = (path for path in (two_saved / "2").rglob("*") if path.is_file())
    for file in sorted(path.relative_to(two_saved) for path in files if path.stat().st_size or damage is remove):
        for trial in range(trials):
            seed = f"{damage.__name__} {file} {trial}"
            folder = tmp_path / f"{abs(hash(seed))}"
            shutil.copytree(two_saved, folder)
            damage(folder / file, random.Random(seed))
            found, said = restored(folder, model)
            assert found.step == 1, seed
            assert int(found.training["step"]) == 1
            assert same(found.model, model)
            assert said[0].startswith(f"warning: step 2 is damaged: {file.relative_to('2')}: "), said
            assert "step 1 is used" in said[0]
            assert sorted(path.name for path in folder.iterdir()) == ["1", "2.damaged"]
            shutil.rmtree(folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_step_before_is_used(two_saved, model, tmp_path, damage):
    damaged_everywhere(two_saved, model, tmp_path, damage, 1)


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_many_times(two_saved, model, tmp_path, damage):
    damaged_everywhere(two_saved, model, tmp_path, damage, 25)


def test_a_file_that_cannot_be_read_is_damage(two_saved, model, tmp_path, monkeypatch):
    """A sector of the disk is gone: who reads it is told by the system."""
    read = Digest.read

    def worn(self, file, stop, **rest):
        if file.match("2/_CHECKPOINT_METADATA"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return read(self, file, stop, **rest)

    folder = tmp_path / "a"
    shutil.copytree(two_saved, folder)
    monkeypatch.setattr(Digest, "read", worn)
    found, said = restored(folder, model)
    assert found.step == 1
    assert said == ["warning: step 2 is damaged: _CHECKPOINT_METADATA: cannot be read: Input/output error; step 1 is used"]


def test_no_good_one_is_left(two_saved, model, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(two_saved, folder)
    for step in (1, 2):
        flip_a_bit(folder / str(step) / "_CHECKPOINT_METADATA", random.Random(step))
    for _ in range(2):  # nor does the next start begin anew over them
        with pytest.raises(CheckpointError, match=r"(?s)step 2 is damaged: .*sha256 .*step 1 is damaged: _CHECK") as caught:
            restored(folder, model)
        assert caught.value.code == 4
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_a_folder_without_a_manifest_is_no_checkpoint_and_its_step_can_be_saved(two_saved, model, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(two_saved, folder)
    (folder / "3").mkdir()
    assert steps(folder) == [1, 2]
    found, said = restored(folder, model)
    assert found.step == 2
    assert said == ["warning: step 3 is damaged: manifest.json: missing; step 2 is used"]
    (folder / "3" / "model").mkdir(parents=True)
    with Checkpoints(folder, TWO) as checkpoints:
        checkpoints.save(3, model, {"step": jnp.int32(3)})
    assert steps(folder) == [2, 3]


def test_the_last_save_is_verified(tmp_path, model):
    said = []
    with Checkpoints(tmp_path, TWO, said.append) as checkpoints:
        checkpoints.save(1, model, {"step": jnp.int32(1)})
        checkpoints.finish(1)
        assert said[-1].startswith("final checkpoint verified: step 1, ")
        with pytest.raises(StorageError, match=r"step 2 is not on the disk as it was written: manifest\.json: missing"):
            checkpoints.finish(2)
        flip_a_bit(tmp_path / "1" / "_CHECKPOINT_METADATA", random.Random(0))
        with pytest.raises(StorageError, match="step 1 is not on the disk as it was written: _CHECK"):
            checkpoints.finish(1)
