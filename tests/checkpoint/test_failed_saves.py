"""Checkpoints that cannot be written: training goes on after one failed save and stops after two, and what was saved before stays."""

import pathlib
import re
import resource
import threading

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from llama_eqx import load_config
from llama_eqx.checkpoint import save
from llama_eqx.checkpoint.manifest import write_manifest
from llama_eqx.checkpoint.restore import steps
from llama_eqx.checkpoint.save import Checkpoints
from llama_eqx.errors import StorageError

TWO = load_config("checkpoint.every=1").checkpoint


def abstract(tree, sharding=None):
    sharding = sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


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


def test_after_one_failed_save_training_goes_on_and_after_two_it_stops(tmp_path, model, full_disk):
    said = []
    with Checkpoints(tmp_path, TWO, said.append) as checkpoints:
        checkpoints.save(1, model, {"step": jnp.int32(1)})
        checkpoints.wait()
        assert said.pop().startswith("saved step 1: ")
        free = full_disk()
        checkpoints.save(2, model, {"step": jnp.int32(2)})
        checkpoints.wait()
        assert re.match("warning: step 2 could not be saved: .*File too large.*saved so far: the checkpoint of step 1", said.pop())
        checkpoints.save(3, model, {"step": jnp.int32(3)})
        with pytest.raises(StorageError, match="step 3 could not be saved") as caught:
            checkpoints.wait()
        free()
        assert len(str(caught.value).splitlines()) == 4
        assert caught.value.kept == "the checkpoint of step 1"
        assert checkpoints.latest == 1
        checkpoints.save(2, model, {"step": jnp.int32(4)})
        checkpoints.save(3, model, {"step": jnp.int32(3)})
        _, _, rest, _ = checkpoints.restore(abstract(model), abstract({"step": jnp.int32(0)}), step=2)
        free = full_disk()
        checkpoints.save(4, model, {"step": jnp.int32(4)})
        checkpoints.wait()  # the save before it succeeded
        assert said.pop().startswith("warning: step 4 could not be saved")
        free()
        checkpoints.save(4, model, {"step": jnp.int32(4)})
    assert int(rest["step"]) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_polling_waits_for_nothing_and_tells_of_a_failure(tmp_path, model, full_disk):
    said = []
    with Checkpoints(tmp_path, TWO, said.append) as checkpoints:
        checkpoints.poll()
        free = full_disk()
        checkpoints.save(2, model, {"step": jnp.int32(2)})
        while not said:
            checkpoints.poll()
        free()
    assert "step 2 could not be saved" in said[0]


def test_a_save_that_keeps_training_waiting_is_named(tmp_path, model, monkeypatch):
    monkeypatch.setattr(save, "PATIENCE", 0.1)
    written, said = threading.Event(), []

    def slow(*args, **settings):
        assert written.wait(60)
        return write_manifest(*args, **settings)

    monkeypatch.setattr(save, "write_manifest", slow)
    with Checkpoints(tmp_path, TWO, lambda line: (said.append(line), written.set())) as checkpoints:
        checkpoints.save(1, model, {"step": jnp.int32(1)})
    assert [line.split(":")[0] for line in said] == [f"waiting for the save of step 1 to {tmp_path}", "saved step 1"]


def test_no_room_is_said_before_anything_is_written(tmp_path, model, monkeypatch):
    said = []
    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with Checkpoints(tmp_path, TWO, said.append) as checkpoints:
        with pytest.raises(StorageError, match=r"it needs 90.* kB, and 100 B are free"):
            checkpoints.require_room(model)
        checkpoints.save(2, model, {"step": jnp.int32(2)})
        checkpoints.poll()
        assert "step 2 could not be saved: there is no room for a checkpoint" in said[0]
        assert list(tmp_path.iterdir()) == []
        checkpoints.save(2, model, {"step": jnp.int32(2)})
        with pytest.raises(StorageError, match="step 2 could not be saved: there is no room for a checkpoint"):  # it was the last
            checkpoints.finish(2)


def test_one_look_at_the_folder_that_fails_does_not_end_a_run(tmp_path, model, monkeypatch):
    said = []

    def down(folder):
        raise StorageError("the object store says: 503")

    with Checkpoints(tmp_path, TWO, said.append) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(save.restore, "steps", down)
            checkpoints.save(1, model, {"step": jnp.int32(1)})
            checkpoints.wait()
        checkpoints.save(2, model, {"step": jnp.int32(2)})
        checkpoints.finish(2)
    assert said[0].startswith("warning: step 1 could not be saved: the object store says: 503; saved so far: whatever was saved before")


def test_a_step_that_is_saved_is_said_to_be_though_older_ones_cannot_be_removed(tmp_path, model, monkeypatch):
    said = []
    with Checkpoints(tmp_path, load_config("checkpoint.keep=1").checkpoint, said.append) as checkpoints:
        (tmp_path / "1.removed" / "in" / "the way").mkdir(parents=True)
        for step in (1, 2, 3):
            checkpoints.save(step, model, {"step": jnp.int32(step)})
        checkpoints.finish(3)
    for line in said[1:3]:  # one that stays is not in the way of the others
        assert re.match(r"saved step [23]: .*\nwarning: older steps could not be removed: 1: .*Directory not empty[^;]*$", line)
    assert steps(tmp_path) == [1, 3]


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
    (tmp_path / "another's").symlink_to("/proc/self")  # where nobody may make a file, not even root
    with pytest.raises(StorageError, match="checkpoints cannot be written"):
        Checkpoints(tmp_path / "another's", TWO)
