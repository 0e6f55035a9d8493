"""The list of what a checkpoint holds: what it says, and that it is made while the files are written."""

import hashlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from llama_eqx import load_config
from llama_eqx.checkpoint import save
from llama_eqx.checkpoint.manifest import find_damage, hashed_meanwhile, read_manifest, write_manifest
from llama_eqx.checkpoint.save import Checkpoints

CONFIG = load_config("checkpoint.every=1").checkpoint


def test_what_a_manifest_says(tmp_path, model):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(2, model, {"step": jnp.int32(2)}, facts={"data": "abc"})
    folder = tmp_path / "2"
    manifest = read_manifest(folder)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert manifest["files"].keys() == files.keys() - {"manifest.json"}
    for name, entry in manifest["files"].items():
        content = files[name].read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest["tree"]["model.embed"] == {"shape": [64, 32], "dtype": "float32"}
    assert manifest["tree"]["training.step"] == {"shape": [], "dtype": "int32"}
    assert len(manifest["tree"]) == len(jax.tree.leaves(model)) + 1
    assert (manifest["step"], manifest["data"]) == (2, "abc")


def test_a_file_is_hashed_while_it_grows(tmp_path):
    growing = tmp_path / "growing"
    growing.write_bytes(b"begun, ")
    with hashed_meanwhile(lambda: {"growing": growing}) as hashed:
        for _ in range(1000):
            if "growing" in hashed and hashed["growing"].size == len(b"begun, "):
                break
            time.sleep(0.03)
        with growing.open("ab") as stream:
            stream.write(b"and ended")
    (tmp_path / "other").write_bytes(b"found only at the end")
    sha256 = hashed["growing"].hash
    entries = write_manifest(tmp_path, {}, hashed=hashed, show=False)["files"]
    assert sha256.hexdigest() == entries["growing"]["sha256"]  # it went on from where it was
    assert entries["growing"] == {"size": 16, "sha256": hashlib.sha256(b"begun, and ended").hexdigest()}
    assert not find_damage(tmp_path).lines()


def test_large_arrays_go_into_several_files_which_are_hashed_while_they_are_written(tmp_path, monkeypatch):
    arrays = {f"w{i}": jnp.arange(i, i + 1000.0) for i in range(9)}
    first, later = [], []

    def spied(files):
        first.append(files)
        return hashed_meanwhile(files)

    monkeypatch.setattr(save, "FILE_BYTES", 2**13)
    monkeypatch.setattr(save, "hashed_meanwhile", spied)
    with Checkpoints(tmp_path, CONFIG, later.append) as checkpoints:
        checkpoints.save(1, arrays, {"step": jnp.int32(1)})
        checkpoints.finish(1)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)  # noqa: E731
        restored = checkpoints.restore(jax.tree.map(abstract, arrays), {"step": abstract(jnp.int32(1))})
    for name, array in arrays.items():
        np.testing.assert_array_equal(restored.model[name], array)
    large = [name for name, entry in read_manifest(tmp_path / "1")["files"].items() if entry["size"] > 2**12]
    assert len(large) > 2
    (tmp_path / "1").rename(tmp_path / "1.unfinished")
    assert {*large} <= first[0]().keys()
